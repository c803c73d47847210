"""FP8 checkpoints as others publish them, written from a float folder by plain code.

Each format is what its own tools write: names, shapes and config.json. Nothing here is shared with
the code under test.
"""

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.engine.emulation import nearest_e4m3

TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
STATIC = {**TOKEN, "strategy": "tensor", "dynamic": False}
CHANNEL = {**STATIC, "strategy": "channel"}
GROUP = {**TOKEN, "strategy": "group", "group_size": 128}
BLOCKS = {**STATIC, "strategy": "block", "block_structure": [128, 128]}


def compressed(weights: dict, inputs: dict, **changes) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        **changes,
    }


@dataclass(frozen=True)
class Format:
    """config    quantization_config
    weight    what has a scale: tensor, channel or block
    inputs    how activations are quantized: static, token or group
    weight_scale, input_scale, scalar_shape    how the tensors are called and single scales shaped
    """

    config: dict
    weight: str
    inputs: str
    weight_scale: str = "weight_scale"
    input_scale: str = "input_scale"
    scalar_shape: tuple[int, ...] = ()


FORMATS = {
    "autofp8-static": Format(
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        "tensor",
        "static",
    ),
    "autofp8-dynamic": Format(
        {"quant_method": "fp8", "activation_scheme": "dynamic"}, "tensor", "token"
    ),
    "transformers-static": Format(
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        "tensor",
        "static",
        weight_scale="weight_scale_inv",
        input_scale="activation_scale",
    ),
    "deepseek": Format(
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
        },
        "block",
        "group",
        weight_scale="weight_scale_inv",
    ),
    "compressed-channel": Format(compressed(CHANNEL, TOKEN), "channel", "token"),
    "compressed-tensor": Format(compressed(STATIC, STATIC), "tensor", "static", scalar_shape=(1,)),
    "compressed-block": Format(compressed(BLOCKS, GROUP), "block", "group"),
}


@dataclass(frozen=True)
class Matrix:
    """values [out, in] float64 of e4m3, scale [out, in] float64 beside them."""

    values: np.ndarray
    scale: np.ndarray
    inputs: str
    input_scale: float | None


@dataclass
class Published:
    """A folder in a published format, and what its matrices mean."""

    path: Path
    matrices: dict[str, Matrix] = field(default_factory=dict)

    def multiply(self, module: str, x: np.ndarray) -> np.ndarray:
        """x @ the module's matrix in float64, both factors rounded to e4m3 first."""
        m = self.matrices[module]
        group = 128 if m.inputs == "group" else x.shape[-1]
        parts = []
        for start in range(0, x.shape[-1], group):
            part = x[:, start : start + group]
            scale = m.input_scale or np.abs(part).max(-1, keepdims=True) / 448
            parts.append(nearest_e4m3(part / np.where(scale == 0, 1, scale)) * scale)
        return np.concatenate(parts, -1) @ (m.values * m.scale).T


def _scales(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """[rows, columns] float32, the same within what shares a scale."""
    size = weight.abs()
    if kind == "tensor":
        return (size.max() / 448).expand(weight.shape)
    if kind == "channel":
        return (size.amax(1, keepdim=True) / 448).expand(weight.shape)
    out = torch.empty_like(weight)
    for r in range(0, len(weight), 128):
        for c in range(0, weight.shape[1], 128):
            out[r : r + 128, c : c + 128] = size[r : r + 128, c : c + 128].max() / 448
    return out


def _stored(scale: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The scale as the file has it."""
    if fmt.weight == "tensor":
        return scale[0, 0].reshape(fmt.scalar_shape).clone()
    if fmt.weight == "channel":
        return scale[:, :1].clone()
    return scale[::128, ::128].clone()


def publish(source: Path, target: Path, name: str, *, skip: tuple[str, ...] = ()) -> Published:
    """Writes `source` (float, one file) into `target` in this format; modules in `skip` stay float.

    Static input scales differ from module to module; they are of the size of normed activations.
    """
    fmt = FORMATS[name]
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    out = Published(target)
    for key in sorted(tensors):
        module = key.removesuffix(".weight")
        if not module.endswith("_proj") or module in skip or not key.endswith(".weight"):
            continue
        weight = tensors[key].float()
        scale = _scales(weight, fmt.weight)
        values = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[key] = values
        tensors[f"{module}.{fmt.weight_scale}"] = _stored(scale, fmt)
        static = None
        if fmt.inputs == "static":
            static = torch.tensor(4.0 / 448 * (1 + math.sin(len(tensors)) / 4))
            tensors[f"{module}.{fmt.input_scale}"] = static.reshape(fmt.scalar_shape)
        out.matrices[module] = Matrix(
            values.double().numpy(),
            scale.double().numpy(),
            fmt.inputs,
            None if static is None else static.item(),
        )
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {**fmt.config}
    (target / "config.json").write_text(json.dumps(config))
    return out


def fuse_input_scales(published: Published) -> None:
    """Matrices of one input share the largest static scale, as where the field fuses them."""
    for module in list(published.matrices):
        for part, together in (("q", "qkv"), ("gate", ("gate", "up"))):
            if not module.endswith(f"{part}_proj"):
                continue
            stem = module.removesuffix(f"{part}_proj")
            members = [f"{stem}{p}_proj" for p in together]
            largest = max(published.matrices[m].input_scale for m in members)
            for member in members:
                m = published.matrices[member]
                published.matrices[member] = Matrix(m.values, m.scale, m.inputs, largest)
