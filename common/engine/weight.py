"""A matrix as its checkpoint means it, whatever the format it was published in."""

from dataclasses import dataclass, replace

import torch

from common.engine.quantization.scheme import BLOCK, Activation


@dataclass(frozen=True, slots=True)
class Weight:
    """What a backend packs into a Linear (`Ops.linear`).

    values       [out, in], a float dtype, or float8_e4m3fn (never NaN) with what follows
    scale        None, or float32, positive: [out, 1] for each row, or [out / 128, in / 128]
                 rounded up for each block; the matrix is values * scale. A scale for the whole
                 tensor is repeated for each row when read, so that fused matrices need no case of
                 their own
    activation   None for float values
    input_scale  float32 [], for Activation.TENSOR
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None
    activation: Activation | None = None
    input_scale: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Weight":
        """The same on another device."""
        moved = {
            name: tensor.to(device)
            for name in ("values", "scale", "input_scale")
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **moved)


def fuse(parts: list[Weight]) -> Weight | None:
    """The matrices as one, stacked along their rows; None where one Linear cannot have them: some
    are quantized and others not, or differently, or a part's last block scale is not whole.

    Their static input scales become one, the largest, as the field does: the input is quantized
    once for all of them.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(part.activation is not first.activation for part in parts):
        return None
    values = torch.cat([part.values for part in parts])
    if first.scale is None:
        return Weight(values)
    if first.activation is Activation.GROUP and any(len(p.values) % BLOCK for p in parts[:-1]):
        return None
    scale = torch.cat([part.scale for part in parts])
    if first.activation is not Activation.TENSOR:
        return Weight(values, scale, first.activation)
    input_scale = torch.stack([part.input_scale for part in parts]).amax()
    return Weight(values, scale, first.activation, input_scale)
