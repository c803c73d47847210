"""FP8 products in plain torch, any device: the oracle of every other backend's.

What FP8 tensor cores with float32 accumulation compute: both factors are e4m3 values, exact in
float32, so a float32 product of them differs from theirs by the order of the sum only. A float32
matrix product is taken because torch's bf16 one rounds its sum to bf16 before a scale can be
applied. The weights are decoded once, here: 4 bytes each.
"""

import torch
import torch.nn.functional as F

from common.engine.kernels import Linear
from common.engine.quantization.fp8 import decode, quantize_input, spread
from common.engine.quantization.scheme import Activation
from common.engine.weight import Weight


class ScaledLinear:
    """Scales for each row of the weight, and for each token or one for all of the input: they
    are factors of the sum."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None) -> None:
        self.values = decode(weight.values)  # [out, in]
        self.scale = weight.scale.view(-1)  # [out]
        self.activation = weight.activation
        self.input_scale = weight.input_scale
        self.bias = None if bias is None else bias.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        values, scale = quantize_input(x, self.activation, self.input_scale)
        out = F.linear(values, self.values).mul_(scale).mul_(self.scale)
        return (out if self.bias is None else out.add_(self.bias)).to(x.dtype)


class BlockLinear:
    """Scales for each block of 128 x 128 weights and each 128 columns of a token: they differ
    within a sum, so they are multiplied into its terms, which float32 rounds by 2**-24 each."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None) -> None:
        self.values = decode(weight.values).mul_(spread(weight.scale, *weight.values.shape))
        self.bias = None if bias is None else bias.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        values, scale = quantize_input(x, Activation.GROUP, None)
        scaled = values.mul_(scale).flatten(1)[:, : x.shape[1]]
        return F.linear(scaled, self.values, self.bias).to(x.dtype)


class StackedLinear:
    """See `Ops.stacked`."""

    def __init__(self, parts: list[Linear]) -> None:
        self.parts = parts

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], -1)
