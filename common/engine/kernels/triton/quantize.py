"""Quantization of activations and weights to e4m3, by itself or as the end of another kernel.

Bound by memory: every element is read once and written once, as a byte. The scale is amax / 448 of
what it covers, as in `quantize_fp8` of reference.py, and so are the bytes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from common.engine.kernels.triton.fp8 import NATIVE_FP8, fp8_scale, quantize_e4m3
from common.engine.quantization.scheme import BLOCK as GROUP
from common.engine.quantization.scheme import Activation
from common.errors import ConfigError

# A row in one program: 16 warps of 64 elements a thread.
MAX_ROW = 32768


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows as a quantized matrix multiplies them, x being about values * scale.

    values  [n, d]                                  float8_e4m3fn, contiguous
    scale   [n, 1], or [n, d / 128] for each group  float32, any strides
    dtype   of x, and of what it is multiplied to
    """

    values: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype


@triton.jit
def store_row(
    x, out, scale, row, column, d, scale_row, scale_column,
    MODE: tl.constexpr, BLOCK: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Puts x float32 [BLOCK], a row's part from `column` on, into out [n, d].

    MODE: none: of out's dtype. tensor: e4m3 by the one scale given. token: by the scale of the
    row, which x is the whole of. group: by that of each 128 columns. The two write their scales.
    """
    columns = column + tl.arange(0, BLOCK)
    inside = columns < d
    if MODE == "none":
        code = x.to(out.dtype.element_ty)
    elif MODE == "tensor":
        code = tl.reshape(
            quantize_e4m3(tl.reshape(x, (1, BLOCK)), tl.load(scale + tl.arange(0, 1)), NATIVE),
            (BLOCK,),
        )
    else:
        WIDTH: tl.constexpr = 128 if MODE == "group" else BLOCK
        rows = tl.reshape(x, (BLOCK // WIDTH, WIDTH))
        found = fp8_scale(rows, tl.reshape(inside, (BLOCK // WIDTH, WIDTH)))
        code = tl.reshape(quantize_e4m3(rows, found, NATIVE), (BLOCK,))
        groups = column // WIDTH + tl.arange(0, BLOCK // WIDTH)
        where = scale + row.to(tl.int64) * scale_row + groups * scale_column
        tl.store(where, found, mask=groups * WIDTH < d)
    tl.store(out + row.to(tl.int64) * d + columns, code, mask=inside)


@triton.jit(do_not_specialize=["scale_column"])
def quantize_rows_kernel(
    x, out, scale, d, x_row, scale_row, scale_column,
    MODE: tl.constexpr, BLOCK: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.program_id(1) * BLOCK
    columns = column + tl.arange(0, BLOCK)
    wide = tl.load(x + row.to(tl.int64) * x_row + columns, mask=columns < d, other=0.0)
    store_row(wide.to(tl.float32), out, scale, row, column, d, scale_row, scale_column,
              MODE, BLOCK, NATIVE)  # fmt: skip


@triton.jit
def quantize_blocks_kernel(x, out, scale, rows, d, x_row, EDGE: tl.constexpr, NATIVE: tl.constexpr):
    """One block of 128 x 128 a program."""
    row = tl.program_id(0) * EDGE + tl.arange(0, EDGE)[:, None]
    column = tl.program_id(1) * EDGE + tl.arange(0, EDGE)[None, :]
    inside = (row < rows) & (column < d)
    row = row.to(tl.int64)
    wide = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    flat = tl.reshape(wide, (1, EDGE * EDGE))
    found = fp8_scale(flat, tl.reshape(inside, (1, EDGE * EDGE)))
    code = tl.reshape(quantize_e4m3(flat, found, NATIVE), (EDGE, EDGE))
    tl.store(out + row * d + column, code, mask=inside)
    tl.store(
        scale + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1) + tl.arange(0, 1), found
    )


def quantize(
    x: torch.Tensor, activation: Activation, input_scale: torch.Tensor | None = None
) -> Quantized:
    """x [n, d], a float dtype, contiguous rows -> its rows quantized the way a matrix wants them.

    activation   TENSOR: by `input_scale` (float32 [], on the device). TOKEN: a scale for each row.
                 GROUP: for each row and 128 columns
    """
    out = empty_quantized(x.shape[0], x.shape[1], activation, input_scale, x)
    block, programs, warps = row_tiles(x.shape[1], activation)
    if x.shape[0]:
        quantize_rows_kernel[(x.shape[0], programs)](
            x, out.values.view(torch.uint8), out.scale, x.shape[1],
            x.stride(0), *out.scale.stride(),
            MODE=activation.value, BLOCK=block, NATIVE=NATIVE_FP8, num_warps=warps,
        )  # fmt: skip
    return out


def quantize_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, d], a float dtype -> e4m3 [rows, d] and float32 [rows / 128, d / 128] rounded up:
    one scale for each block of 128 x 128, as DeepSeek-V3 (2024) quantizes weights."""
    rows, d = x.shape
    values = torch.empty(rows, d, dtype=torch.float8_e4m3fn, device=x.device)
    grid = (triton.cdiv(rows, GROUP), triton.cdiv(d, GROUP))
    scale = torch.empty(grid, dtype=torch.float32, device=x.device)
    quantize_blocks_kernel[grid](
        x, values.view(torch.uint8), scale, rows, d, x.stride(0),
        EDGE=GROUP, NATIVE=NATIVE_FP8, num_warps=8,
    )  # fmt: skip
    return values, scale


def empty_quantized(
    n: int, d: int, activation: Activation, input_scale: torch.Tensor | None, like: torch.Tensor
) -> Quantized:
    """Room for n quantized rows of what is `like`; TENSOR's one scale is in place."""
    values = torch.empty(n, d, dtype=torch.float8_e4m3fn, device=like.device)
    if activation is Activation.TENSOR:
        # Strides of its own, the same for one row: kernels are compiled for them.
        return Quantized(values, input_scale.as_strided((n, 1), (0, 0)), like.dtype)
    groups = triton.cdiv(d, GROUP) if activation is Activation.GROUP else 1
    # Tokens innermost: a tile of the GEMM reads the scales of its tokens side by side.
    scale = torch.empty(groups, n, dtype=torch.float32, device=like.device).t()
    return Quantized(values, scale, like.dtype)


def row_tiles(d: int, activation: Activation | None) -> tuple[int, int, int]:
    """Columns in a program, programs in a row, warps in a program. Only what needs the whole row
    gets it in one program; none of it depends on the number of rows."""
    block = max(GROUP, triton.next_power_of_2(d))
    if activation is not Activation.TOKEN:
        block = min(block, 4096)
    elif d > MAX_ROW:
        raise ConfigError(
            f"a row has {d} elements; the Triton kernels take up to {MAX_ROW} where a row has one "
            "scale: set kernels to reference"
        )
    return block, triton.cdiv(d, block), min(16, max(1, block // 1024))
