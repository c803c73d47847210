"""A matrix as its checkpoint means it, whatever the format it was published in."""

from dataclasses import dataclass
from enum import StrEnum

import torch


class Activation(StrEnum):
    """How the input of a quantized matrix is quantized to e4m3 before the product."""

    TENSOR = "tensor"  # one scale, given by the checkpoint
    DYNAMIC_TENSOR = "dynamic-tensor"  # one scale for all rows of a step, amax / 448
    TOKEN = "token"  # one scale for each row, amax / 448
    GROUP = "group"  # one scale for each row and 128 columns, amax / 448


@dataclass(frozen=True, slots=True)
class Weight:
    """What a backend packs into a Linear (`Ops.linear`).

    values       [out, in], a float dtype, or float8_e4m3fn with what follows
    scale        None, or float32: [out, 1] for each row, or [out / 128, in / 128] rounded up for
                 each block; the matrix is values * scale. A scale for the whole tensor is
                 repeated for each row when read, so that fused matrices need no case of their own
    activation   None for float values
    input_scale  float32 [], for Activation.TENSOR
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None
    activation: Activation | None = None
    input_scale: torch.Tensor | None = None
