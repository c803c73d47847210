"""The Hadamard transform: rotates vectors so that no element stands out, before FP8."""

import torch
import triton
import triton.language as tl

from common.errors import ConfigError

# Rows of a tile: what a warpgroup's matrix product takes.
ROWS = 64


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x [n, d] float16, bfloat16 or float32, d a power of two of 64 to 512 -> x @ H_d / sqrt(d),
    of x's dtype; its own inverse.

    H_d is Sylvester's matrix, element (i, j) being -1 to the number of ones in i & j. H_d is
    H_(d/b) (x) H_b: one tensor-core product with H_b, as in HadaCore (Agarwal et al. 2024), whose
    operands are exact, then a butterfly of sums in float32. Raises ConfigError for another d.
    """
    n, d = x.shape
    if d not in (64, 128, 256, 512):
        raise ConfigError(
            f"a Hadamard transform of {d} elements is not served; use 64, 128, 256 or 512"
        )
    x = x.contiguous()
    out = torch.empty_like(x)
    matrix = matrix_size(d, x.dtype)
    grid = (triton.cdiv(n * d // matrix, ROWS),)
    if n:
        hadamard_kernel[grid](
            x, out, n * d // matrix, PARTS=d // matrix, MATRIX=matrix, ROWS=ROWS, NORM=d**-0.5,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return out


def matrix_size(d: int, dtype: torch.dtype) -> int:
    """b of H_b. float32 products need more registers, which hold a smaller one only."""
    return min(d, 64 if dtype == torch.float32 else 128)


def supports(head_dim: int) -> bool:
    """Whether `rotate_halves` can rotate heads of this size."""
    return head_dim in (32, 64, 128, 256)


@triton.jit
def hadamard_matrix(SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """H of this size, [SIZE, SIZE], 1 and -1, made in registers."""
    ones = tl.arange(0, SIZE)[:, None] & tl.arange(0, SIZE)[None, :]
    ones ^= ones >> 4
    ones ^= ones >> 2
    ones ^= ones >> 1
    return (1 - 2 * (ones & 1)).to(DTYPE)


@triton.jit
def times_hadamard(x, SIZE: tl.constexpr):
    """x [rows, SIZE] -> x @ H float32."""
    matrix = hadamard_matrix(SIZE, x.dtype)
    if x.dtype == tl.float32:
        # tf32 keeps 10 of 23 bits of mantissa: a product for those, and one for the rest.
        high = (x.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
        return tl.dot(high, matrix, tl.dot(x - high, matrix))
    else:
        return tl.dot(x, matrix)


@triton.jit
def rotate_halves(left, right, HALF: tl.constexpr):
    """The left and right halves [rows, HALF] of vectors -> those of vectors @ H / sqrt(2 * HALF),
    float32. Rows a power of two of at least 16."""
    left, right = times_hadamard(left, HALF), times_hadamard(right, HALF)
    norm: tl.constexpr = (2 * HALF) ** -0.5
    return (left + right) * norm, (left - right) * norm


@triton.jit
def hadamard_kernel(
    x,
    out,
    rows,
    PARTS: tl.constexpr,
    MATRIX: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
):
    """A vector is PARTS rows of MATRIX columns, which lie end to end in memory."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None].to(tl.int64) * MATRIX + tl.arange(0, MATRIX)[None, :]
    inside = (row < rows)[:, None]
    tile = tl.load(x + at, mask=inside, other=0.0)
    y = times_hadamard(tile, MATRIX)
    if PARTS >= 2:
        y = butterfly(y, 1, ROWS, MATRIX)
    if PARTS >= 4:
        y = butterfly(y, 2, ROWS, MATRIX)
    if PARTS >= 8:
        y = butterfly(y, 4, ROWS, MATRIX)
    tl.store(out + at, (y * NORM).to(tile.dtype), mask=inside)


@triton.jit
def butterfly(y, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y [ROWS, COLUMNS]: rows i and i + STEP become their sum and their difference, for every i
    whose bit STEP is 0."""
    pairs = tl.reshape(y, (ROWS // (2 * STEP), 2, STEP * COLUMNS))
    low, high = tl.split(tl.permute(pairs, (0, 2, 1)))
    both = tl.permute(tl.join(low + high, low - high), (0, 2, 1))
    return tl.reshape(both, (ROWS, COLUMNS))
