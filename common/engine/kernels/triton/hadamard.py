"""The Hadamard transform: rotates vectors so that no element stands out, before FP8."""

import torch
import triton
import triton.language as tl

from common.errors import ConfigError

# Larger vectors are columns of this many: one product with H_128 in shared memory, then sums.
MATRIX = 128


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
    matrix = min(d, MATRIX)
    rows = 64 * MATRIX // d if x.element_size() == 2 else 16
    grid = (triton.cdiv(n, rows),)
    if n:
        hadamard_kernel[grid](
            x, out, n, D=d, MATRIX=matrix, ROWS=rows, NORM=d**-0.5, num_warps=4, num_stages=1
        )
    return out


def supports(head_dim: int) -> bool:
    """Whether `rotate_halves` can rotate heads of this size."""
    return head_dim in (64, 128, 256)


@triton.jit
def hadamard_matrix(SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """H of this size, [SIZE, SIZE], 1 and -1, made in registers."""
    ones = tl.arange(0, SIZE)[:, None] & tl.arange(0, SIZE)[None, :]
    ones ^= ones >> 4
    ones ^= ones >> 2
    ones ^= ones >> 1
    return (1 - 2 * (ones & 1)).to(DTYPE)


@triton.jit
def rotate_halves(left, right, HALF: tl.constexpr):
    """The left and right halves [rows, HALF] of vectors -> those of vectors @ H / sqrt(2 * HALF),
    float32. Rows a power of two of at least 16."""
    matrix = hadamard_matrix(HALF, left.dtype)
    left = tl.dot(left, matrix, input_precision="ieee")
    right = tl.dot(right, matrix, input_precision="ieee")
    norm: tl.constexpr = (2 * HALF) ** -0.5
    return (left + right) * norm, (left - right) * norm


@triton.jit
def hadamard_kernel(
    x,
    out,
    n,
    D: tl.constexpr,
    MATRIX: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
):
    PARTS: tl.constexpr = D // MATRIX
    # Row i of the tile is part i % PARTS of vector i // PARTS: the parts lie end to end.
    part = tl.program_id(0).to(tl.int64) * ROWS * PARTS + tl.arange(0, ROWS * PARTS)
    at = part[:, None] * MATRIX + tl.arange(0, MATRIX)[None, :]
    inside = (part < n * PARTS)[:, None]
    tile = tl.load(x + at, mask=inside, other=0.0)
    y = tl.dot(tile, hadamard_matrix(MATRIX, tile.dtype), input_precision="ieee")
    if PARTS >= 2:
        y = butterfly(y, 1, ROWS * PARTS, MATRIX)
    if PARTS >= 4:
        y = butterfly(y, 2, ROWS * PARTS, MATRIX)
    tl.store(out + at, (y * NORM).to(tile.dtype), mask=inside)


@triton.jit
def butterfly(y, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y [ROWS, COLUMNS]: rows i and i + STEP become their sum and their difference, for every i
    whose bit STEP is 0."""
    pairs = tl.reshape(y, (ROWS // (2 * STEP), 2, STEP * COLUMNS))
    low, high = tl.split(tl.permute(pairs, (0, 2, 1)))
    both = tl.permute(tl.join(low + high, low - high), (0, 2, 1))
    return tl.reshape(both, (ROWS, COLUMNS))
