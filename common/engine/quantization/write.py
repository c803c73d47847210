"""Writes a quantized checkpoint in the formats that are published, from an unquantized one.

fp8-static    compressed-tensors: a scale for each matrix and one for its inputs, from calibration
fp8-dynamic   compressed-tensors: a scale for each row, each token's found as it comes
fp8-block     fp8 with weight_block_size: 128 x 128 weights, 128 columns of a token
The head, the embeddings, norms and biases stay as they are.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.engine.checkpoint import INDEX, Checkpoint
from common.engine.config import ModelConfig
from common.engine.json_file import read_json
from common.engine.models.llama import tensor_shapes
from common.engine.quantization import scheme as schemes
from common.engine.quantization.fp8 import FP8, quantize_weight
from common.engine.quantization.scheme import BLOCK, Activation, Scheme, WeightScale
from common.engine.quantization.tensor_file import Slot, TensorFile
from common.engine.weight import Weight
from common.errors import ConfigError

SCHEMES = {
    "fp8-static": Scheme(WeightScale.TENSOR, Activation.TENSOR),
    "fp8-dynamic": schemes.SCHEMES["fp8"],
    "fp8-block": schemes.SCHEMES["fp8-block"],
}
# What belongs to a model beside its weights: tokenizer, template, generation config, license.
COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md")
COPIED_NAMES = ("LICENSE", "NOTICE")
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class Calibration:
    """Static scales found by running prompts: of each module's input, and of each layer's K and V
    ([k, v]; empty: the KV cache is not calibrated)."""

    inputs: dict[str, float]
    kv: list[tuple[float, float]] = field(default_factory=list)


def quantized_modules(config: ModelConfig) -> list[str]:
    """The matrices that are quantized: all of the layers."""
    names = (name.removesuffix(".weight") for name in tensor_shapes(config))
    return [name for name in names if name.endswith("_proj")]


def write_quantized(
    source: Path, target: Path, scheme: str, calibration: Calibration | None
) -> None:
    """Writes the checkpoint `source` into the new folder `target`, which appears when it is whole.

    scheme       a name of SCHEMES
    calibration  for fp8-static, and for whom the KV cache is calibrated

    Its memory is that of the largest tensor. Raises ConfigError for a target that has content and
    a source that is quantized, CheckpointError for a source that is not whole.
    """
    config = ModelConfig.from_folder(source)
    if config.quantization is not None:
        raise ConfigError(f"{source} is quantized already; give the checkpoint it was made from")
    with Checkpoint(source) as checkpoint, _new_folder(target) as folder:
        shapes = tensor_shapes(config)
        ignored = ("rotary_emb.inv_freq", "lm_head.weight")
        checkpoint.check(shapes, ignored)
        writer = _Writer(checkpoint, config, SCHEMES[scheme], calibration)
        weight_map: dict[str, str] = {}
        for file in checkpoint.files:
            for name in writer.write_file(file, folder / file.name):
                weight_map[name] = file.name
        if (source / INDEX).is_file():
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
        _copy_rest(source, folder)
        raw = read_json(source / "config.json")
        raw["quantization_config"] = quantization_config(scheme, calibration)
        (folder / "config.json").write_text(json.dumps(raw, indent=2))


class _Writer:
    """The tensors of each file of a checkpoint, quantized."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        scheme: Scheme,
        calibration: Calibration | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.scheme = scheme
        self.calibration = calibration
        self.modules = set(quantized_modules(config))
        self.scale_name = "weight_scale"
        if scheme.weight is WeightScale.BLOCK:
            self.scale_name = "weight_scale_inv"

    def write_file(self, source: Path, target: Path) -> list[str]:
        """Writes what becomes of one file's tensors; returns their names."""
        names = [name for name, entry in self.checkpoint.entries.items() if entry.file == source]
        slots: dict[str, Slot] = {}
        for name in names:
            slots |= self._slots(name)
        with TensorFile(target, slots) as out:
            for name in names:
                for key, tensor in self._tensors(name).items():
                    out.write(key, tensor)
        return list(slots)

    def _module(self, name: str) -> str | None:
        module = name.removesuffix(".weight")
        return module if name.endswith(".weight") and module in self.modules else None

    def _slots(self, name: str) -> dict[str, Slot]:
        entry, module = self.checkpoint.entries[name], self._module(name)
        if module is None:
            return {name: Slot(TORCH_DTYPES[entry.dtype], entry.shape)}
        rows, columns = entry.shape
        shape = {
            WeightScale.TENSOR: (1,),
            WeightScale.CHANNEL: (rows, 1),
            WeightScale.BLOCK: (-(-rows // BLOCK), -(-columns // BLOCK)),
        }[self.scheme.weight]
        slots = {
            name: Slot(FP8, entry.shape),
            f"{module}.{self.scale_name}": Slot(torch.float32, shape),
        }
        return slots | {key: Slot(t.dtype, tuple(t.shape)) for key, t in self._static(module)}

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        tensor, module = self.checkpoint.read(name), self._module(name)
        if module is None:
            return {name: tensor}
        weight = quantize_weight(tensor, self.scheme)
        found = {name: weight.values, f"{module}.{self.scale_name}": self._scale(weight)}
        return found | dict(self._static(module))

    def _scale(self, weight: Weight) -> torch.Tensor:
        # Weight repeats a matrix's one scale for each row.
        return weight.scale[0] if self.scheme.weight is WeightScale.TENSOR else weight.scale

    def _static(self, module: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Scales from calibration that lie beside this module: of its input, of the KV cache."""
        if self.calibration is None:
            return
        if self.scheme.activation is Activation.TENSOR:
            yield f"{module}.input_scale", torch.tensor([self.calibration.inputs[module]])
        for side, part in enumerate("kv"):
            if self.calibration.kv and module.endswith(f".{part}_proj"):
                stem = module.removesuffix(f"{part}_proj")
                scale = self.calibration.kv[int(module.split(".")[2])][side]
                yield f"{stem}{part}_scale", torch.tensor([scale])


def quantization_config(scheme: str, calibration: Calibration | None) -> dict[str, Any]:
    """What config.json says of a checkpoint that was written so."""
    static = {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "dynamic": False,
        "symmetric": True,
    }
    kv = static if calibration is not None and calibration.kv else None
    if scheme == "fp8-block":
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head"],
        } | ({} if kv is None else {"kv_cache_scheme": "static"})
    dynamic = scheme == "fp8-dynamic"
    group = {
        "targets": ["Linear"],
        "weights": static | ({"strategy": "channel"} if dynamic else {}),
        "input_activations": static | ({"strategy": "token", "dynamic": True} if dynamic else {}),
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": kv,
    }


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target that becomes it at the end, or vanishes."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty; name a new folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ConfigError(f"{target.parent}: cannot be written ({error.strerror})") from error
    try:
        yield folder
        folder.chmod(0o755)
        os.rename(folder, target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copy_rest(source: Path, folder: Path) -> None:
    for path in sorted(source.iterdir()):
        wanted = path.suffix in COPIED_SUFFIXES or path.name.startswith(COPIED_NAMES)
        if wanted and path.is_file() and path.name not in ("config.json", INDEX):
            shutil.copyfile(path, folder / path.name)
