"""Attention of one query token a sequence over its paged KV."""

import torch
import triton
import triton.language as tl

from common.engine.kernels.triton.fp8 import NATIVE_FP8, decode_e4m3_pairs

# Keys of one thread block at least, so that one sequence of a thousand tokens fills some of the
# GPU, and splits of one sequence at most, which bounds what is merged.
SPLIT_TOKENS = 256
MAX_SPLITS = 32
COMPUTE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
LOG2_E = 1.4426950408889634


def decode_attention(
    q: torch.Tensor,
    payload: torch.Tensor,
    scales: torch.Tensor | None,
    block_table: torch.Tensor,
    context_len: torch.Tensor,
    max_context: int,
    *,
    scale: float,
    window: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q K^T * scale) V, one query for each sequence, the last of its tokens.

    q            [batch, heads, d] float16, bfloat16 or float32, elements of a head adjacent
    payload      [num_blocks, 2, kv_heads, block_size, d], a layer of the cache
    scales       [num_blocks, 2, kv_heads, block_size] float32; None unless payload is e4m3
    block_table  [batch, max_blocks] int32; entries past the context are never read
    context_len  [batch] int32, tokens including the query's own; 0 gives zeros
    max_context  at least the longest context: how many thread blocks start. Nothing else depends
                 on it, so that a CUDA graph may be captured with a larger one
    window       tokens attended to, the last ones; None for all
    out          [batch, heads, d] of q's dtype, written and returned

    Flash-Decoding (Dao et al. 2023): thread blocks take splits of the sequence, with an online
    softmax (Milakov & Gimelshein 2018) in each, and a second kernel merges their results by their
    log-sum-exp. The heads of a group are the rows of one matrix product. Where a sequence is split
    depends on its own context alone, and sums have a fixed order: a sequence's result is bitwise
    the same in every batch.

    e4m3 becomes float16, which holds it exactly: K's scale multiplies the scores, V's the
    probabilities. float32 queries compute in float32 throughout.
    """
    batch, heads, d = q.shape
    kv_heads, block_size = payload.shape[2], payload.shape[3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    fp8 = scales is not None
    compute = compute_type(q.dtype, fp8)
    tile, warps, stages = tile_config(d, payload.element_size(), compute)
    span = max_context if window is None else min(max_context, window + tile)
    splits = min(MAX_SPLITS, max(1, triton.cdiv(span, SPLIT_TOKENS)))
    partial = lse = None
    if splits > 1:
        partial = torch.empty(batch, heads, MAX_SPLITS, d, dtype=torch.float32, device=q.device)
        lse = torch.empty(batch, heads, MAX_SPLITS, dtype=torch.float32, device=q.device)
    if batch == 0:
        return out
    pages = payload.view(torch.int16) if fp8 else payload
    decode_kernel[(kv_heads, splits, batch)](
        q, pages, scales, block_table, context_len,
        out, partial, lse, scale * LOG2_E, window or 0,
        *q.stride()[:2], *pages.stride()[:4], *(scales.stride()[:3] if fp8 else (0, 0, 0)),
        block_table.stride(0), *out.stride()[:2],
        GROUP=heads // kv_heads, ROWS=max(16, triton.next_power_of_2(heads // kv_heads)),
        D=d, HALF=triton.next_power_of_2(d // 2), BLOCK_SIZE=block_size, TILE=tile,
        SPLIT_TOKENS=SPLIT_TOKENS, MAX_SPLITS=MAX_SPLITS, FP8=fp8,
        COMPUTE=compute, NATIVE=NATIVE_FP8, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(heads, batch)](
            partial, lse, context_len, out, window or 0, *out.stride()[:2],
            HEADS=heads, D=d, COLUMNS=triton.next_power_of_2(d), TILE=tile,
            SPLIT_TOKENS=SPLIT_TOKENS, MAX_SPLITS=MAX_SPLITS, num_warps=4, num_stages=1,
        )  # fmt: skip
    return out


def tile_config(d: int, kv_bytes: int, compute: tl.dtype) -> tuple[int, int, int]:
    """Keys of a tile, warps and pipeline stages, for kv_bytes an element of the cache.

    About 16 KiB of K and as much of V: Triton makes two buffers of 5 stages, since V waits for
    K's product and K for the block table, and two thread blocks fit in a multiprocessor's shared
    memory. float32 is multiplied in registers, without tensor cores: smaller tiles.
    """
    if compute == tl.float32:
        return 32, 8, 3
    return min(128, max(32, 16384 // (triton.next_power_of_2(d) * kv_bytes))), 4, 5


def compute_type(q: torch.dtype, fp8: bool) -> tl.dtype:
    """What tiles are multiplied in. float16 for e4m3 also where the model has bfloat16: a GPU
    converts to it in one instruction of two elements, and it keeps more of Q."""
    return tl.float16 if fp8 and q == torch.bfloat16 else COMPUTE[q]


@triton.jit
def split_bounds(
    context,
    window,
    split,
    TILE: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """First key of a split and the one past its last, the first key in the window, and how many
    splits the sequence has. window 0: none."""
    lowest = tl.where(window > 0, tl.maximum(context - window, 0), 0)
    first = lowest // TILE * TILE
    span = context - first
    size = tl.maximum(tl.cdiv(tl.cdiv(span, MAX_SPLITS), TILE) * TILE, SPLIT_TOKENS)
    begin = first + split * size
    return begin, tl.minimum(begin + size, context), lowest, tl.cdiv(span, size)


@triton.jit
def part_columns(HALF: tl.constexpr, D: tl.constexpr, FP8: tl.constexpr):
    """The columns of a head's two parts [HALF] each: even and odd ones of e4m3, which is loaded
    two at a time, and the left and right half of other types."""
    column = tl.arange(0, HALF)
    if FP8:
        return 2 * column, 2 * column + 1
    else:
        return column, D // 2 + column


@triton.jit
def load_queries(first, second, mask, COMPUTE: tl.constexpr):
    """Both parts of Q's rows as COMPUTE, and the power of two [rows] to multiply scores by.

    bfloat16 has float32's range and float16 has not: rows become less than 2 then.
    """
    first = tl.load(first, mask=mask, other=0.0)
    second = tl.load(second, mask=mask, other=0.0)
    if first.dtype == COMPUTE or COMPUTE != tl.float16:
        factor = tl.full((first.shape[0],), 1.0, tl.float32)
    else:
        first, second = first.to(tl.float32), second.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
        # The exponent alone: a power of two, so that nothing is rounded.
        factor = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        factor = tl.where(factor == 0.0, 1.0, factor)
        first, second = first / factor[:, None], second / factor[:, None]
    return first.to(COMPUTE), second.to(COMPUTE), factor


@triton.jit
def load_parts(
    base,
    at,
    mask,
    D: tl.constexpr,
    FP8: tl.constexpr,
    COMPUTE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Both parts of rows of K or V as COMPUTE. e4m3 is read as int16, two columns an element:
    tensor cores take operands by 16 bits, and V transposed."""
    if FP8:
        pair = tl.load(base + at, mask=mask, other=0)
        return decode_e4m3_pairs(pair, COMPUTE, NATIVE)
    else:
        first = tl.load(base + at, mask=mask, other=0.0)
        second = tl.load(base + at + D // 2, mask=mask, other=0.0)
        return first.to(COMPUTE), second.to(COMPUTE)


@triton.jit
def decode_kernel(
    q,
    payload,
    scales,
    table,
    contexts,
    out,
    partial,
    lse,
    scale,
    window,
    q_row,
    q_head,
    stride_block,
    stride_kv,
    stride_head,
    stride_token,
    scale_block,
    scale_kv,
    scale_head,
    table_row,
    out_row,
    out_head,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    FP8: tl.constexpr,
    COMPUTE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    kv_head, split, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin, end, lowest, splits = split_bounds(
        tl.load(contexts + sequence), window, split, TILE, SPLIT_TOKENS, MAX_SPLITS
    )
    if begin >= end and split > 0:
        return
    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row
    column = tl.arange(0, HALF)[None, :]
    first_column, second_column = part_columns(HALF, D, FP8)
    held = (row < GROUP)[:, None] & (column < D // 2)
    query = q + sequence * q_row + head[:, None] * q_head
    q_first, q_second, factor = load_queries(
        query + first_column[None, :], query + second_column[None, :], held, COMPUTE
    )
    factor *= scale

    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    first = tl.zeros((ROWS, HALF), tl.float32)
    second = tl.zeros((ROWS, HALF), tl.float32)
    payload += kv_head * stride_head
    for start in range(begin, end, TILE):
        token = start + tl.arange(0, TILE)
        alive = (token >= lowest) & (token < end)
        block = tl.load(table + sequence * table_row + token // BLOCK_SIZE, mask=alive, other=0)
        offset = token % BLOCK_SIZE
        slot = (block.to(tl.int64) * stride_block + offset * stride_token)[:, None] + column
        mask = alive[:, None] & (column < D // 2)
        k_first, k_second = load_parts(payload, slot, mask, D, FP8, COMPUTE, NATIVE)
        v_first, v_second = load_parts(payload + stride_kv, slot, mask, D, FP8, COMPUTE, NATIVE)
        scores = tl.dot(q_first, tl.trans(k_first), input_precision="ieee")
        scores = tl.dot(q_second, tl.trans(k_second), scores, input_precision="ieee")
        scores *= factor[:, None]
        if FP8:
            at = block.to(tl.int64) * scale_block + kv_head * scale_head + offset
            scores *= tl.load(scales + at, mask=alive, other=0.0)[None, :]
        scores = tl.where(alive[None, :], scores, float("-inf"))
        new_most = tl.maximum(most, tl.max(scores, 1))
        shrink = tl.exp2(most - new_most)
        weights = tl.exp2(scores - new_most[:, None])
        total = total * shrink + tl.sum(weights, 1)
        most = new_most
        if FP8:
            # Weights relative to the tile's largest scale stay in float16's range.
            v_scale = tl.load(scales + scale_kv + at, mask=alive, other=0.0)
            largest = tl.max(v_scale, 0)
            largest = tl.where(largest > 0.0, largest, 1.0)
            weights = (weights * (v_scale / largest)[None, :]).to(COMPUTE)
            grow = tl.dot(weights, v_first, input_precision="ieee")
            first = first * shrink[:, None] + grow * largest
            grow = tl.dot(weights, v_second, input_precision="ieee")
            second = second * shrink[:, None] + grow * largest
        else:
            weights = weights.to(COMPUTE)
            first = tl.dot(weights, v_first, first * shrink[:, None], input_precision="ieee")
            second = tl.dot(weights, v_second, second * shrink[:, None], input_precision="ieee")

    total = tl.where(total == 0.0, 1.0, total)
    first, second = first / total[:, None], second / total[:, None]
    to = out + sequence * out_row + head[:, None] * out_head
    whole = held & (splits <= 1)
    tl.store(to + first_column[None, :], first.to(out.dtype.element_ty), mask=whole)
    tl.store(to + second_column[None, :], second.to(out.dtype.element_ty), mask=whole)
    if partial is not None:
        part = (sequence * GROUP * tl.num_programs(0) + head) * MAX_SPLITS + split
        to = partial + part[:, None] * D
        tl.store(to + first_column[None, :], first, mask=held & (splits > 1))
        tl.store(to + second_column[None, :], second, mask=held & (splits > 1))
        tl.store(lse + part, most + tl.log2(total), mask=(row < GROUP) & (splits > 1))


@triton.jit
def merge_kernel(
    partial,
    lse,
    contexts,
    out,
    window,
    out_row,
    out_head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """out = sum of partial * 2**lse over the splits, over the sum of 2**lse; of a sequence with
    one split the result is there already. The tile has MAX_SPLITS rows whatever the batch, since
    the order of a sum follows the tile's shape."""
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    _, _, _, splits = split_bounds(
        tl.load(contexts + sequence), window, 0, TILE, SPLIT_TOKENS, MAX_SPLITS
    )
    if splits <= 1:
        return
    split = tl.arange(0, MAX_SPLITS)
    column = tl.arange(0, COLUMNS)
    at = (sequence * HEADS + head) * MAX_SPLITS + split
    logs = tl.load(lse + at, mask=split < splits, other=float("-inf"))
    mask = (split < splits)[:, None] & (column < D)[None, :]
    parts = tl.load(partial + at[:, None] * D + column[None, :], mask=mask, other=0.0)
    weights = tl.exp2(logs - tl.max(logs, 0))
    result = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    to = sequence * out_row + head * out_head + column
    tl.store(out + to, result.to(out.dtype.element_ty), mask=column < D)
