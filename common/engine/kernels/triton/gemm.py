"""x @ w.T for float and e4m3 matrices: a persistent kernel that reads tiles by TMA.

An e4m3 product adds up 128 columns in the tensor core and goes on in float32 outside of it: its own
accumulator keeps some 14 bits on Hopper (DeepSeek-V3, 2024, section 3.3.2). Scales of blocks are
multiplied in there; scales of rows and tokens at the end.

Few tokens: weights are the left operand (64 rows, the least that wgmma takes, so that tokens need
no padding beyond 16), and K is split over programs where the matrix has fewer tiles than the GPU
has multiprocessors; the program that arrives last adds the parts up in their order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from common.engine.kernels.triton.quantize import GROUP, Quantized
from common.errors import ConfigError

# Splitting K pays until each multiprocessor has this many programs.
PROGRAMS_PER_SM = 2
MAX_SPLIT = 8
# Blocks of K that are worth a program of their own.
LEAST_BLOCKS = 4
# Tokens up to which the weights are the left operand.
FEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a product is cut. swap: weights are the left operand."""

    m: int
    n: int
    k: int
    split: int
    swap: bool
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Workspace:
    """What programs that share a tile meet in; one for all products of a stream.

    partial  float32 [programs * largest split tile]
    arrived  int32 [programs], zero between launches
    """

    multiprocessors: int
    partial: torch.Tensor
    arrived: torch.Tensor

    @classmethod
    def on(cls, device: torch.device, multiprocessors: int | None = None) -> "Workspace":
        """Multiprocessors: None asks the device."""
        if multiprocessors is None:
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        programs = PROGRAMS_PER_SM * multiprocessors
        return cls(
            multiprocessors,
            torch.empty(programs * 128 * 64, dtype=torch.float32, device=device),
            torch.zeros(programs, dtype=torch.int32, device=device),
        )


def choose_tiles(
    m: int, n: int, k: int, fp8: bool, multiprocessors: int, batch_invariant: bool
) -> Tiles:
    """A function of the shapes alone. `batch_invariant`: and not of the number of tokens m."""
    block_k = 128 if fp8 else 64
    if batch_invariant:
        return Tiles(64, 64, block_k, 1, False, 4, 6)
    if m > FEW_TOKENS and triton.cdiv(m, 128) * triton.cdiv(n, 128) >= multiprocessors:
        return Tiles(128, 128, block_k, 1, False, 8, 4)
    block_m = max(16, triton.next_power_of_2(min(m, 128)))
    programs = triton.cdiv(m, block_m) * triton.cdiv(n, 64)
    most = min(
        MAX_SPLIT,
        PROGRAMS_PER_SM * multiprocessors // programs,
        triton.cdiv(k, block_k) // LEAST_BLOCKS,
    )
    # A power of two: few kernels to compile.
    split = 1 << (max(1, most).bit_length() - 1)
    return Tiles(block_m, 64, block_k, split, m <= FEW_TOKENS, 4, 6 if m <= FEW_TOKENS else 4)


@triton.jit
def multiply(
    x, w, x_scale, w_scale, row, column, first, last, m, n,
    xs_row, xs_column, ws_row, ws_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALES: tl.constexpr, W_GROUP: tl.constexpr, FP8: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """Blocks [first, last) of K of one tile -> float32 [BLOCK_M, BLOCK_N], or with SWAP turned."""
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for block in tl.range(first, last):
        if SCALES == "blocks":
            # Asked for before the product, so that they arrive during it.
            at_row = x_scale + rows * xs_row + block * xs_column
            by_row = tl.load(at_row, mask=rows < m, other=0.0)
            if W_GROUP >= BLOCK_N:
                by_column = tl.load(w_scale + column // W_GROUP * ws_row + block * ws_column)
            else:
                at_column = w_scale + columns // W_GROUP * ws_row + block * ws_column
                by_column = tl.load(at_column, mask=columns < n, other=0.0)
                by_column = by_column[:, None] if SWAP else by_column[None, :]
            by_row = by_row[None, :] if SWAP else by_row[:, None]
        left = x.load([row, block * BLOCK_K])
        right = w.load([column, block * BLOCK_K])
        if FP8:
            part = tl.dot(right, left.T) if SWAP else tl.dot(left, right.T)
            if SCALES == "blocks":
                part *= by_row * by_column
            acc += part
        else:
            acc = tl.dot(right, left.T, acc) if SWAP else tl.dot(left, right.T, acc)
    return acc


@triton.jit
def finish(
    acc, out, bias, x_scale, w_scale, row, column, m, n, xs_row, ws_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALES: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """Scales, adds the bias, rounds and writes one tile."""
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    if SWAP:
        acc = tl.trans(acc)
    if SCALES == "rows":
        by_row = tl.load(x_scale + rows * xs_row, mask=rows < m, other=0.0)
        by_column = tl.load(w_scale + columns * ws_row, mask=columns < n, other=0.0)
        acc *= by_row[:, None] * by_column[None, :]
    if bias is not None:
        acc += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    at = out + rows[:, None].to(tl.int64) * n + columns[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])


# Not compiled anew for numbers of tokens that are 1, or divisible by 16.
@triton.jit(do_not_specialize=["m", "xs_column"])
def matmul_kernel(
    x, w, out, bias, x_scale, w_scale, partial, arrived,
    m, n, k, xs_row, xs_column, ws_row, ws_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    SCALES: tl.constexpr, W_GROUP: tl.constexpr, FP8: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(m, BLOCK_M)
    blocks = tl.cdiv(k, BLOCK_K)
    each = tl.cdiv(blocks, SPLIT)
    work = tiles_m * tl.cdiv(n, BLOCK_N) * SPLIT
    for item in tl.range(tl.program_id(0), work, tl.num_programs(0), flatten=SPLIT == 1):
        tile, share = item // SPLIT, item % SPLIT
        # All tokens of some weights first: weights leave the L2 cache once.
        row, column = tile % tiles_m * BLOCK_M, tile // tiles_m * BLOCK_N
        first = share * each
        acc = multiply(
            x, w, x_scale, w_scale, row, column, first, tl.minimum(first + each, blocks), m, n,
            xs_row, xs_column, ws_row, ws_column,
            BLOCK_M, BLOCK_N, BLOCK_K, SCALES, W_GROUP, FP8, SWAP,
        )  # fmt: skip
        if SPLIT == 1:
            finish(acc, out, bias, x_scale, w_scale, row, column, m, n, xs_row, ws_row,
                   BLOCK_M, BLOCK_N, SCALES, SWAP)  # fmt: skip
        else:
            size: tl.constexpr = BLOCK_M * BLOCK_N
            shape: tl.constexpr = (BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N)
            within = tl.reshape(tl.arange(0, size), shape)
            tl.store(partial + item * size + within, acc)
            # All threads' stores before the one thread's release.
            tl.debug_barrier()
            if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLIT - 1:
                total = tl.zeros(shape, tl.float32)
                for other in tl.static_range(SPLIT):
                    at = partial + (tile * SPLIT + other) * size + within
                    total += tl.load(at, cache_modifier=".cg")
                finish(total, out, bias, x_scale, w_scale, row, column, m, n, xs_row, ws_row,
                       BLOCK_M, BLOCK_N, SCALES, SWAP)  # fmt: skip
                tl.store(arrived + tile, 0)


def matmul(
    x: torch.Tensor | Quantized,
    weight: torch.Tensor,
    workspace: Workspace,
    *,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """x [m, k] times the transpose of weight [n, k] -> [m, n] of x's dtype; float32
    accumulation.

    x       contiguous, float16 or bfloat16, or Quantized with an e4m3 weight
    weight  contiguous, of x's dtype, rows of a multiple of 16 bytes (TMA's alignment)
    scale   of an e4m3 weight: float32 [n, 1], or [n / 128, k / 128] rounded up
    bias    [n]

    Raises ConfigError for rows that TMA cannot read. Deterministic: parts are added in their order.
    """
    values = x.values if isinstance(x, Quantized) else x
    (m, k), n, fp8 = values.shape, weight.shape[0], isinstance(x, Quantized)
    if k * weight.element_size() % 16:
        raise ConfigError(
            f"a matrix has rows of {k} {weight.dtype} elements; TMA reads multiples of 16 bytes, "
            "use kernels=reference for this model"
        )
    out = torch.empty(m, n, dtype=x.dtype, device=weight.device)
    if m == 0:
        return out
    tiles = choose_tiles(m, n, k, fp8, workspace.multiprocessors, batch_invariant)
    work = triton.cdiv(m, tiles.m) * triton.cdiv(n, tiles.n) * tiles.split
    # Many small programs at a time, or one large one a multiprocessor that stays.
    resident = workspace.multiprocessors * (1 if tiles.warps == 8 else 4)
    by_block = fp8 and (scale.shape != (n, 1) or x.scale.shape[1] > 1)
    matmul_kernel[(min(work, resident),)](
        TensorDescriptor.from_tensor(values, [tiles.m, tiles.k]),
        TensorDescriptor.from_tensor(weight, [tiles.n, tiles.k]),
        out, bias, x.scale if fp8 else None, scale, workspace.partial, workspace.arrived,
        m, n, k, *_strides(x.scale if fp8 else None), *_strides(scale),
        BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, SPLIT=tiles.split,
        SCALES=("blocks" if by_block else "rows") if fp8 else "none",
        W_GROUP=GROUP if fp8 and scale.shape != (n, 1) else 1, FP8=fp8, SWAP=tiles.swap,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def _strides(scale: torch.Tensor | None) -> tuple[int, int]:
    """Of a scale's rows and columns; 0 where one value holds for all."""
    if scale is None:
        return 0, 0
    return scale.stride(0), scale.stride(1) if scale.shape[1] > 1 else 0
