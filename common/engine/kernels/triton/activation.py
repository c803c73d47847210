"""SiLU(gate) * up, the gated MLP's activation (Shazeer 2020), with the quantization that the next
matrix wants."""

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
def silu_mul_kernel(
    gate_up, out, scale, d, scale_row, scale_column,
    MODE: tl.constexpr, BLOCK: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.program_id(1) * BLOCK
    columns = column + tl.arange(0, BLOCK)
    at = gate_up + row.to(tl.int64) * (2 * d) + columns
    gate = tl.load(at, mask=columns < d, other=0.0).to(tl.float32)
    up = tl.load(at + d, mask=columns < d, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    # Rounded as if it had been written: quantizing it here or later gives the same bytes.
    value = value.to(gate_up.dtype.element_ty).to(tl.float32)
    store_row(value, out, scale, row, column, d, scale_row, scale_column, MODE, BLOCK, NATIVE)


def silu_mul(
    gate_up: torch.Tensor,
    *,
    activation: Activation | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor | Quantized:
    """gate_up [n, 2 * d], contiguous, gate first -> silu(gate) * up [n, d].

    activation  None: the result is like gate_up. Else it is Quantized as `quantize` would
                (TENSOR by `input_scale`, TOKEN or GROUP)
    """
    n, d = gate_up.shape[0], gate_up.shape[1] // 2
    block, programs, warps = row_tiles(d, activation)
    scale, strides = None, (0, 0)
    if activation is None:
        result = out = torch.empty(n, d, dtype=gate_up.dtype, device=gate_up.device)
    else:
        result = empty_quantized(n, d, activation, input_scale, gate_up)
        out, scale, strides = result.values.view(torch.uint8), result.scale, result.scale.stride()
    if n:
        silu_mul_kernel[(n, programs)](
            gate_up, out, scale, d, *strides,
            MODE="none" if activation is None else activation.value,
            BLOCK=block, NATIVE=NATIVE_FP8, num_warps=warps,
        )  # fmt: skip
    return result
