"""Reads what a quantized checkpoint holds beside its plain tensors, and refuses what is unsound."""

import torch

from common.engine.checkpoint import Checkpoint
from common.engine.config import ModelConfig
from common.engine.quantization.fp8 import FP8, has_nan, quantize_weight
from common.engine.quantization.scheme import BLOCK, Activation, Quantization, Scheme, WeightScale
from common.engine.weight import Weight
from common.errors import CheckpointError

# The names in use for one thing. DeepSeek's "inv" is multiplied like the others.
WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")
INPUT_SCALES = ("input_scale", "activation_scale")
# Of a layer's self_attn; kv_scale is one for both, of AutoFP8's first version.
K_SCALES = ("k_scale", "attn.k_scale", "k_proj.k_scale", "k_proj.output_scale", "kv_scale")
V_SCALES = ("v_scale", "attn.v_scale", "v_proj.v_scale", "v_proj.output_scale", "kv_scale")
# For attention in FP8, which takes dynamic scales here.
UNUSED = ("q_scale", "prob_scale", "prob_output_scale", "q_proj.output_scale")

# The ends of the names of all tensors that a quantized checkpoint may hold beside the model's own.
SCALE_NAMES = tuple(
    f".{name}" for name in (*WEIGHT_SCALES, *INPUT_SCALES, *K_SCALES, *V_SCALES, *UNUSED)
)


def read_plain(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor that is not quantized, in its own dtype. Raises CheckpointError for an FP8 one."""
    tensor = checkpoint.read(name)
    if tensor.dtype is FP8:
        raise CheckpointError(
            f"{checkpoint.entries[name].file}: tensor {name!r} is FP8, but quantization_config in "
            "config.json does not say that it is quantized; download the folder again"
        )
    return tensor


def read_weight(checkpoint: Checkpoint, module: str, quantization: Quantization) -> Weight:
    """The module's matrix, with float values where it is not quantized.

    Raises CheckpointError, naming file, tensor and remedy, for a dtype that config.json does not
    announce, NaN among the values, and scales that are missing, misshapen or not positive numbers.
    """
    scheme = quantization.scheme(module)
    name = f"{module}.weight"
    if scheme is None:
        return Weight(read_plain(checkpoint, name))
    if quantization.on_load:
        return quantize_weight(read_plain(checkpoint, name), scheme)
    values, file = checkpoint.read(name), checkpoint.entries[name].file
    if values.dtype is not FP8:
        raise CheckpointError(
            f"{file}: tensor {name!r} is {_spelled(values.dtype)}, but quantization_config in "
            "config.json says that it is FP8 e4m3; add the module to the list of ignored ones "
            "there, or download the folder again"
        )
    if has_nan(values):
        raise CheckpointError(
            f"{file}: tensor {name!r} holds NaN; the file is damaged, download it again"
        )
    scale = _weight_scale(checkpoint, module, scheme, *values.shape)
    input_scale = _input_scale(checkpoint, module, scheme)
    # A copy of its own: the file may change under a mapping.
    return Weight(values.clone(), scale, scheme.activation, input_scale)


def _weight_scale(
    checkpoint: Checkpoint, module: str, scheme: Scheme, rows: int, columns: int
) -> torch.Tensor:
    shapes = {
        WeightScale.TENSOR: ((), (1,), (1, 1)),
        WeightScale.CHANNEL: ((rows, 1), (rows,)),
        WeightScale.BLOCK: ((-(-rows // BLOCK), -(-columns // BLOCK)),),
    }[scheme.weight]
    scale = _read_scale(checkpoint, module, WEIGHT_SCALES, shapes)
    if scheme.weight is WeightScale.BLOCK:
        return scale
    return scale.view(-1, 1).expand(rows, 1).contiguous()


def _input_scale(checkpoint: Checkpoint, module: str, scheme: Scheme) -> torch.Tensor | None:
    if scheme.activation is not Activation.TENSOR:
        return None
    return _read_scale(checkpoint, module, INPUT_SCALES, ((), (1,), (1, 1))).view(())


def read_kv_scales(checkpoint: Checkpoint, config: ModelConfig) -> torch.Tensor | None:
    """The static scales of the KV cache, [layers, 2, kv_heads] float32; None where the checkpoint
    has none. Raises CheckpointError where only some layers have them, or one is unsound."""
    quantization = config.quantization
    if quantization is None or quantization.on_load:
        return None
    layers = [f"model.layers.{index}.self_attn" for index in range(config.num_layers)]
    found = [_find(checkpoint, layer, K_SCALES) is not None for layer in layers]
    if not any(found) and not quantization.fp8_kv:
        return None
    scalar = ((), (1,), (1, 1), (1, 1, 1))
    scales = [
        [_read_scale(checkpoint, layer, names, scalar).view(()) for names in (K_SCALES, V_SCALES)]
        for layer in layers
    ]
    heads = torch.tensor(scales).unsqueeze(-1)
    return heads.expand(-1, -1, config.num_kv_heads).contiguous()


def _find(checkpoint: Checkpoint, module: str, names: tuple[str, ...]) -> str | None:
    return next((n for n in names if f"{module}.{n}" in checkpoint.entries), None)


def _read_scale(
    checkpoint: Checkpoint, module: str, names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]
) -> torch.Tensor:
    """The first of these scales that the module has, float32; its shape must be one of these."""
    found = _find(checkpoint, module, names)
    if found is None:
        raise CheckpointError(
            f"{checkpoint.folder}: tensor '{module}.{names[0]}' is missing, which "
            "quantization_config in config.json asks for; download the folder again, or use "
            "another quantized checkpoint of the model"
        )
    name = f"{module}.{found}"
    entry = checkpoint.entries[name]
    scale = checkpoint.read(name)
    if tuple(scale.shape) not in shapes or scale.dtype is FP8:
        raise CheckpointError(
            f"{entry.file}: scale {name!r} is {_spelled(scale.dtype)} of shape "
            f"{tuple(scale.shape)}; quantization_config in config.json makes it float32 of shape "
            f"{shapes[0]}; is config.json of another download?"
        )
    scale = scale.float()
    sound = scale.isfinite() & (scale > 0)
    if not sound.all():
        raise CheckpointError(
            f"{entry.file}: scale {name!r} holds {scale[~sound].view(-1)[0].item()}; scales are "
            "positive numbers, so the file is damaged or was badly made: download it again, or "
            "quantize the original checkpoint with `baton quantize`"
        )
    return scale.clone()


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
