"""How matrices are quantized, and what a checkpoint's config.json says of it. Imports no torch.

Two published families are read:
  fp8                 AutoFP8, vLLM, DeepSeek, transformers: one scheme for all but the ignored
  compressed-tensors  llm-compressor: groups of modules, each with a scheme of its own
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from common.engine.json_file import JsonReader
from common.errors import CheckpointError

BLOCK = 128  # rows and columns of a block scale, columns of an activation group
# Of compressed-tensors: what it is called, was called, and is where each group names its own.
FORMATS = ("float-quantized", "naive-quantized", "mixed-precision")
SERVED = (
    "this version serves FP8 e4m3 weights with FP8 activations (quant_method fp8, or "
    "compressed-tensors of format float-quantized); use such a checkpoint or the unquantized one"
)


class Activation(StrEnum):
    """How the input of a quantized matrix is quantized to e4m3 before the product.

    A dynamic scale for all rows of a step is not among them: what a request computes would depend
    on who else is in its batch. Checkpoints that name it are served with a scale for each row, as
    vLLM serves them where its kernels can.
    """

    TENSOR = "tensor"  # one scale, given by the checkpoint
    TOKEN = "token"  # one scale for each row, amax / 448
    GROUP = "group"  # one scale for each row and 128 columns, amax / 448


class WeightScale(StrEnum):
    """What has one scale."""

    TENSOR = "tensor"  # the matrix
    CHANNEL = "channel"  # each row
    BLOCK = "block"  # each 128 x 128 block


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one matrix is stored and multiplied."""

    weight: WeightScale
    activation: Activation


@dataclass(frozen=True, slots=True)
class Group:
    """Modules that share a scheme. A target is a module's name, "re:" and a regular expression
    that its start matches, or "Linear" for all."""

    targets: tuple[str, ...]
    scheme: Scheme


@dataclass(frozen=True, slots=True)
class Quantization:
    """Which matrices of a model are quantized, and how.

    groups    the first that targets a module counts
    ignored   modules that stay as they are, written like targets
    fp8_kv    the checkpoint asks for an FP8 KV cache with its own scales
    on_load   the checkpoint is not quantized: its matrices are, while they are read
    """

    groups: tuple[Group, ...]
    ignored: tuple[str, ...]
    fp8_kv: bool = False
    on_load: bool = False

    def scheme(self, module: str) -> Scheme | None:
        """The module's scheme; None for one that is not quantized."""
        if any(_matches(name, module) for name in self.ignored):
            return None
        for group in self.groups:
            if any(target == "Linear" or _matches(target, module) for target in group.targets):
                return group.scheme
        return None


# Of --quantization and of `baton quantize --scheme`; both leave the head as it is.
SCHEMES = {
    "fp8": Scheme(WeightScale.CHANNEL, Activation.TOKEN),
    "fp8-block": Scheme(WeightScale.BLOCK, Activation.GROUP),
}


def on_load(name: str) -> Quantization:
    """What `--quantization` means; a name of SCHEMES."""
    return Quantization((Group(("Linear",), SCHEMES[name]),), ("lm_head",), on_load=True)


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    # A part of a name stands for what is under it ("model.layers.0") and for every module that
    # ends so ("o_proj"), as transformers reads these lists.
    return f".{pattern}." in f".{module}."


def parse_quantization(reader: JsonReader) -> Quantization | None:
    """`quantization_config` of a config.json; None where there is none.

    Raises CheckpointError, naming the field, for what is not served.
    """
    section = reader.section("quantization_config")
    if section is None:
        return None
    method = section.raw.get("quant_method")
    if method == "fp8":
        return _fp8(section)
    if method == "compressed-tensors":
        return _compressed_tensors(section)
    raise _refuse(section, "quant_method")


def _refuse(section: JsonReader, name: str, why: str = "") -> CheckpointError:
    value = section.raw.get(name)
    return CheckpointError(
        f"{section.path}: {section.prefix}{name} is {value!r}{why}, which is not served; {SERVED}"
    )


def _fp8(section: JsonReader) -> Quantization:
    kind = section.raw.get("activation_scheme", "dynamic")
    if kind not in ("dynamic", "static"):
        raise section.fail("activation_scheme", "dynamic or static")
    if section.raw.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise _refuse(section, "fmt")
    if section.raw.get("scale_fmt") not in (None, "float"):
        raise _refuse(section, "scale_fmt")
    if section.raw.get("modules_to_convert"):
        raise _refuse(section, "modules_to_convert")
    block = section.raw.get("weight_block_size")
    if block is None:
        activation = Activation.TENSOR if kind == "static" else Activation.TOKEN
        scheme = Scheme(WeightScale.TENSOR, activation)
    elif block != [BLOCK, BLOCK] or kind == "static":
        raise _refuse(section, "weight_block_size", f" with {kind} activations")
    else:
        scheme = SCHEMES["fp8-block"]
    ignored = _names(section, "modules_to_not_convert") + _names(section, "ignored_layers")
    # The head is left out by every writer of this method, whether the list names it or not.
    return Quantization(
        (Group(("Linear",), scheme),),
        (*ignored, "lm_head"),
        fp8_kv=section.raw.get("kv_cache_scheme") is not None,
    )


def _compressed_tensors(section: JsonReader) -> Quantization:
    if section.raw.get("format", FORMATS[0]) not in FORMATS:
        raise _refuse(section, "format")
    sparsity = section.section("sparsity_config")
    if sparsity is not None and sparsity.raw.get("format", "dense") != "dense":
        raise _refuse(sparsity, "format")
    if section.raw.get("transform_config"):
        raise _refuse(section, "transform_config")
    groups = section.section("config_groups")
    parsed = [] if groups is None else [_group(groups, name) for name in groups.raw]
    return Quantization(tuple(parsed), _names(section, "ignore"), fp8_kv=_kv_scheme(section))


def _group(groups: JsonReader, name: str) -> Group:
    group = _needed(groups, name)
    if group.raw.get("format") not in (None, *FORMATS[:2]):
        raise _refuse(group, "format")
    if group.raw.get("output_activations") is not None:
        raise _refuse(group, "output_activations")
    if group.raw.get("input_activations") is None:
        raise _refuse(group, "input_activations", " (weights alone are quantized)")
    weights, inputs = _needed(group, "weights"), _needed(group, "input_activations")
    for section in (weights, inputs):
        _check_e4m3(section)
    if weights.flag("dynamic"):
        raise _refuse(weights, "dynamic")
    kind, scale = inputs.raw.get("strategy"), weights.raw.get("strategy")
    dynamic = inputs.flag("dynamic")
    if scale == "block":
        _check_blocks(weights, inputs, dynamic)
        return Group(_names(group, "targets"), SCHEMES["fp8-block"])
    if scale not in ("tensor", "channel"):
        raise _refuse(weights, "strategy")
    if kind not in ("tensor", "token") or (kind == "token" and not dynamic):
        raise _refuse(inputs, "strategy", f" with {scale} weights")
    activation = Activation.TOKEN if dynamic else Activation.TENSOR
    return Group(_names(group, "targets"), Scheme(WeightScale(scale), activation))


def _check_e4m3(section: JsonReader) -> None:
    wanted = {"num_bits": 8, "type": "float", "symmetric": True}
    for name, value in wanted.items():
        if section.raw.get(name, value) != value:
            raise _refuse(section, name)
    if section.raw.get("type") is None:
        raise section.fail("type", "float")


def _check_blocks(weights: JsonReader, inputs: JsonReader, dynamic: bool) -> None:
    if weights.raw.get("block_structure") not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
        raise _refuse(weights, "block_structure")
    grouped = inputs.raw.get("strategy") == "group" and inputs.raw.get("group_size") == BLOCK
    if not grouped or not dynamic:
        raise _refuse(inputs, "strategy", " with block weights")


def _kv_scheme(section: JsonReader) -> bool:
    scheme = section.section("kv_cache_scheme")
    if scheme is None:
        return False
    _check_e4m3(scheme)
    if scheme.flag("dynamic") or scheme.raw.get("strategy", "tensor") != "tensor":
        raise _refuse(scheme, "strategy", " (static scales of a tensor are)")
    return True


def _needed(section: JsonReader, name: str) -> JsonReader:
    found = section.section(name)
    if found is None:
        raise section.fail(name, "an object")
    return found


def _names(section: JsonReader, name: str) -> tuple[str, ...]:
    value: Any = section.raw.get(name)
    names = [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
        raise section.fail(name, "a list of module names")
    for entry in names:
        try:
            re.compile(entry[3:] if entry.startswith("re:") else "")
        except re.error as error:
            raise section.fail(name, f"valid after 're:' ({error})") from error
    return tuple(names)
