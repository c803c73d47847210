"""Attention of one query token a sequence over its paged KV."""

import torch
import triton
import triton.language as tl

from common.engine.kernels.triton.fp8 import NATIVE_FP8
from common.engine.kernels.triton.pages import (
    LOG2_E,
    compute_type,
    load_parts,
    load_queries,
    page_arguments,
    scale_weights,
    softmax_step,
    store_parts,
)

# Keys of one thread block at least, so that one sequence of a thousand tokens fills some of the
# GPU, and splits of one sequence at most, which bounds what is merged.
SPLIT_TOKENS = 256
MAX_SPLITS = 32


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
        partial = torch.empty(batch, heads, splits, d, dtype=torch.float32, device=q.device)
        lse = torch.empty(batch, heads, splits, dtype=torch.float32, device=q.device)
    if batch == 0:
        return out
    decode_kernel[(kv_heads, splits, batch)](
        q, *page_arguments(payload, scales), block_table, context_len, out, partial, lse,
        scale * LOG2_E, window or 0, *q.stride()[:2], block_table.stride(0), *out.stride()[:2],
        GROUP=heads // kv_heads, ROWS=max(16, triton.next_power_of_2(heads // kv_heads)),
        D=d, WIDTH=triton.next_power_of_2(d // 2), BLOCK_SIZE=block_size, TILE=tile,
        SPLIT_TOKENS=SPLIT_TOKENS, MAX_SPLITS=MAX_SPLITS, FP8=fp8,
        COMPUTE=compute, NATIVE=NATIVE_FP8, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(heads, batch)](
            partial, lse, context_len, out, splits, window or 0, *out.stride()[:2],
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
        return 32 if d <= 128 else 16, 8, 3
    return min(128, max(32, 16384 // (triton.next_power_of_2(d) * kv_bytes))), 4, 5


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


# Not compiled anew for another width of the table, or a step's part that begins elsewhere.
@triton.jit(
    do_not_specialize=["window", "table_row"],
    do_not_specialize_on_alignment=["table", "contexts"],
)
def decode_kernel(
    q,
    payload,
    scales,
    stride_block,
    stride_kv,
    stride_head,
    stride_token,
    scale_block,
    scale_kv,
    scale_head,
    table,
    contexts,
    out,
    partial,
    lse,
    scale,
    window,
    q_row,
    q_head,
    table_row,
    out_row,
    out_head,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
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
    column = tl.arange(0, WIDTH)[None, :]
    held = row < GROUP
    q_first, q_second, factor = load_queries(
        q + sequence * q_row + head * q_head, held, D, WIDTH, FP8, COMPUTE
    )
    factor *= scale

    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    unit = tl.full((ROWS,), 1.0, tl.float32)
    first = tl.zeros((ROWS, WIDTH), tl.float32)
    second = tl.zeros((ROWS, WIDTH), tl.float32)
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
        if FP8:
            at = block.to(tl.int64) * scale_block + kv_head * scale_head + offset
            scores *= tl.load(scales + at, mask=alive, other=0.0)[None, :]
        scores = tl.where(alive[None, :], scores, float("-inf"))
        weights, shrink, most, total = softmax_step(scores, factor, most, total)
        if FP8:
            v_scale = tl.load(scales + scale_kv + at, mask=alive, other=0.0)
            weights, grow, unit = scale_weights(weights, v_scale, scores, unit, 1.0, False)
            shrink *= grow
        weights = weights.to(COMPUTE)
        first = tl.dot(weights, v_first, first * shrink[:, None], input_precision="ieee")
        second = tl.dot(weights, v_second, second * shrink[:, None], input_precision="ieee")

    most = most * factor + tl.log2(total)
    share = (unit / tl.where(total == 0.0, 1.0, total))[:, None]
    first, second = first * share, second * share
    to = out + sequence * out_row + head * out_head
    store_parts(to, first, second, held & (splits <= 1), D, FP8)
    if partial is not None:
        part = (sequence * GROUP * tl.num_programs(0) + head) * tl.num_programs(1) + split
        store_parts(partial + part * D, first, second, held & (splits > 1), D, FP8)
        tl.store(lse + part, most, mask=held & (splits > 1))


@triton.jit(do_not_specialize=["stride", "window"], do_not_specialize_on_alignment=["contexts"])
def merge_kernel(
    partial,
    lse,
    contexts,
    out,
    stride,
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
    at = (sequence * HEADS + head) * stride + split
    logs = tl.load(lse + at, mask=split < splits, other=float("-inf"))
    mask = (split < splits)[:, None] & (column < D)[None, :]
    parts = tl.load(partial + at[:, None] * D + column[None, :], mask=mask, other=0.0)
    weights = tl.exp2(logs - tl.max(logs, 0))
    result = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    to = sequence * out_row + head * out_head + column
    tl.store(out + to, result.to(out.dtype.element_ty), mask=column < D)
