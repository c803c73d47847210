"""RMSNorm (Zhang & Sennrich 2019) with what comes before it, the residual's addition, and what
comes after it, the next matrix's quantization, in one pass over the row."""

import torch
import triton
import triton.language as tl

from common.engine.kernels.triton.fp8 import NATIVE_FP8
from common.engine.kernels.triton.quantize import (
    Quantized,
    empty_quantized,
    row_tiles,
    store_row,
)
from common.engine.quantization.scheme import Activation


@triton.jit(do_not_specialize=["scale_column"])
def rms_norm_kernel(
    x, delta, weight, out, scale, eps, d, scale_row, scale_column,
    MODE: tl.constexpr, BLOCK: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    at = x + row.to(tl.int64) * d + columns
    value = tl.load(at, mask=inside, other=0.0)
    if delta is not None:
        added = tl.load(delta + row.to(tl.int64) * d + columns, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(at, value, mask=inside)
    value = value.to(tl.float32)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value * value) / d
    normed = value * (1.0 / tl.sqrt_rn(mean + eps)) * gain
    # Rounded as if it had been written: quantizing it here or later gives the same bytes.
    normed = normed.to(x.dtype.element_ty).to(tl.float32)
    store_row(normed, out, scale, row, 0, d, scale_row, scale_column, MODE, BLOCK, NATIVE)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    delta: torch.Tensor | None = None,
    activation: Activation | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor | Quantized:
    """x [n, d] contiguous, weight [d] -> x / rms(x) * weight.

    delta       [n, d], contiguous, is added to x in place first
    activation  None: the result is like x, contiguous. Else it is Quantized as `quantize` would
                (TENSOR by `input_scale`, TOKEN or GROUP)

    A row is one program, in float32; nothing depends on the number of rows.
    """
    n, d = x.shape
    block, _, warps = row_tiles(d, Activation.TOKEN)
    scale, strides = None, (0, 0)
    if activation is None:
        result = out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    else:
        result = empty_quantized(n, d, activation, input_scale, x)
        out, scale, strides = result.values.view(torch.uint8), result.scale, result.scale.stride()
    if n:
        rms_norm_kernel[(n,)](
            x, delta, weight, out, scale, eps, d, *strides,
            MODE="none" if activation is None else activation.value,
            BLOCK=block, NATIVE=NATIVE_FP8, num_warps=warps,
        )  # fmt: skip
    return result
