"""Attention of a step's chunks, of any lengths, over the paged KV of their sequences."""

import torch
import triton
import triton.language as tl

from common.engine.kernels.triton.fp8 import (
    NATIVE_FP8,
    encode_e4m3,
    fp8_scale,
    quantize_e4m3,
)
from common.engine.kernels.triton.pages import (
    LOG2_E,
    compute_type,
    load_or_zero,
    load_parts,
    load_queries,
    page_arguments,
    scale_weights,
    softmax_step,
    store_parts,
)


def prefill_attention(
    q: torch.Tensor,
    payload: torch.Tensor,
    scales: torch.Tensor | None,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    fp8_products: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q K^T * scale) V, causal: a sequence's queries are the last of its tokens, and its
    keys all of them, the cached prefix and the new chunk, already in the pages.

    q             [n, heads, d] float16, bfloat16 or float32, elements of a head adjacent
    payload       [num_blocks, 2, kv_heads, block_size, d], a layer of the cache
    scales        [num_blocks, 2, kv_heads, block_size] float32; None unless payload is e4m3
    block_table   [sequences, max_blocks] int32; entries past the context are never read
    query_start   [sequences + 1] int32, sequence i's queries being rows query_start[i] to [i + 1]
    context_len   [sequences] int32, tokens including the queries
    window        tokens each query attends to, the last ones; None for all
    fp8_products  of an e4m3 cache: Q (a scale a row) and the probabilities become e4m3 too
    out           [n, heads, d] of q's dtype, written and returned; rows of no sequence are not

    FlashAttention-2 (Dao 2023) over the block table; the heads of a group share a tile. Tiles lie
    at multiples of their length from the sequence's first token and hidden keys add exact zeros,
    so that a row's result is bitwise the same however the chunk is cut and whatever the batch, one
    query or many. It is not bitwise that of decode_attention.

    e4m3 becomes float16, which holds it exactly, or stays with `fp8_products`: FlashAttention-3's
    FP8 (Shah et al. 2024) with float32 sums on two levels. A tensor core sums FP8 products in some
    14 bits: at most 128 of them, and those of one tile, go to a partial sum, which is then added
    to a float32 one.
    """
    n, heads, d = q.shape
    kv_heads, block_size = payload.shape[2], payload.shape[3]
    group, fp8 = heads // kv_heads, scales is not None
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    compute = compute_type(q.dtype, fp8)
    eight = fp8 and fp8_products
    rows, tile, warps, stages = tile_config(d, group, tl.float16 if eight else compute, fp8, eight)
    sequences = len(context_len)
    if n == 0:
        return out
    grid = (kv_heads, n // (rows // group) + sequences)
    last = (
        block_table, query_start, context_len, out, scale * LOG2_E, window or 0, sequences,
        *q.stride()[:2], block_table.stride(0), *out.stride()[:2],
    )  # fmt: skip
    columns = triton.next_power_of_2(d)
    shape = {
        "GROUP": group, "ROWS": rows, "D": d, "BLOCK_SIZE": block_size, "TILE": tile,
        "NATIVE": NATIVE_FP8, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
    if eight:
        pages = (payload.view(torch.uint8), scales, *payload.stride()[:4], *scales.stride()[:3])
        prefill_fp8_kernel[grid](q, *pages, *last, WIDTH=columns, **shape)
    else:
        pages = page_arguments(payload, scales)
        prefill_kernel[grid](
            q, *pages, *last, WIDTH=columns // 2, FP8=fp8, COMPUTE=compute, **shape
        )
    return out


def tile_config(
    d: int, group: int, compute: tl.dtype, fp8: bool, fp8_products: bool = False
) -> tuple[int, int, int, int]:
    """Rows (queries times heads of a group) and keys of a tile, warps and pipeline stages.

    Two warpgroups of 64 rows each; 3 stages are two buffers of K and V, and 5 where scales and
    conversions make the chain of a tile longer. e4m3 takes registers to convert, V also to be
    transposed: smaller tiles. So does float32, which is multiplied without tensor cores.

    e4m3 heads over 128 have 64 rows. One warpgroup converts each key once for them, where two would
    do so twice; a multiprocessor holds two such thread blocks. With `fp8_products` one has not the
    registers.
    """
    rows = max(64 if fp8 and d > 128 else 128, triton.next_power_of_2(group))
    if compute == tl.float32:
        return max(16, triton.next_power_of_2(group)), 16 if fp8 and d > 128 else 32, 8, 3
    if fp8:
        warps = 4 if rows == 64 and not fp8_products else 8
        return rows, 64 if d <= 128 else 32, warps, 5
    return rows, 128 if d <= 128 else 64, 8, 3


@triton.jit
def find_tile(query_start, sequences, tile, QUERIES: tl.constexpr):
    """The sequence of a tile of queries, its first query's number in the sequence's chunk, and
    the chunk's first row and length. Every sequence has a tile more than rows / QUERIES, rounded
    down: where a sequence begins follows from its first row alone, found by bisection."""
    low, high = 0, sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // QUERIES + middle <= tile:
            low = middle + 1
        else:
            high = middle
    sequence = low - 1
    row = tl.load(query_start + sequence)
    local = (tile - row // QUERIES - sequence) * QUERIES
    return sequence, local, row, tl.load(query_start + sequence + 1) - row


@triton.jit
def key_bounds(lowest, window, TILE: tl.constexpr):
    """For queries at positions `lowest` and on: the first key to look at
    and the one after the last tile that no query's mask touches, both multiples of TILE."""
    begin = tl.where(window > 0, tl.maximum(lowest + 1 - window, 0), 0) // TILE * TILE
    return begin, tl.where(window > 0, begin, (lowest + 1) // TILE * TILE)


@triton.jit
def find_rows(query_start, contexts, sequences, kv_head, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """What a tile's rows are: the sequence, their number in the chunk, the chunk's length, the
    head, the row of Q, the position in the sequence, [ROWS] each but the sequence and the length;
    then the first position, the one after the last, and whether the tile has any row."""
    QUERIES: tl.constexpr = ROWS // GROUP
    # Later tiles see more keys: the longest work starts first.
    sequence, local, chunk, count = find_tile(
        query_start, sequences, tl.num_programs(1) - 1 - tl.program_id(1), QUERIES
    )
    row = tl.arange(0, ROWS)
    query = local + row // GROUP
    held = (query < count) & (row < QUERIES * GROUP)
    before = tl.load(contexts + sequence) - count
    end = before + tl.minimum(local + QUERIES, count)
    token = (chunk + query).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    return sequence, token, head, held, before + query, before + local, end, local < count


@triton.jit
def tile_slots(
    table, key, alive, stride_block, stride_token, scale_block, BLOCK_SIZE: tl.constexpr
):
    """Offsets of keys in the payload and in the scales, [TILE] each; alive None: of all keys."""
    block = load_or_zero(table + key // BLOCK_SIZE, alive).to(tl.int64)
    offset = key % BLOCK_SIZE
    return block * stride_block + offset * stride_token, block * scale_block + offset


@triton.jit
def hide(scores, key, position, window):
    """-inf for the keys after a row's position, and for those before its window."""
    visible = key[None, :] <= position[:, None]
    visible &= (window <= 0) | (key[None, :] > position[:, None] - window)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def attend_tile(
    first, second, most, total, unit, q_first, q_second, factor, payload, scales,
    stride_block, stride_kv, stride_token, scale_block, scale_kv, table,
    start, end, position, window,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, FP8: tl.constexpr,
    COMPUTE: tl.constexpr, NATIVE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the new sums [ROWS, WIDTH] of both parts, largest scores, totals, units."""
    WIDTH: tl.constexpr = first.shape[1]
    key = start + tl.arange(0, TILE)
    alive = key < end if MASKED else None
    slot, at = tile_slots(table, key, alive, stride_block, stride_token, scale_block, BLOCK_SIZE)
    column = tl.arange(0, WIDTH)[None, :]
    slot = slot[:, None] + column
    mask = None if not MASKED and D // 2 == WIDTH else (key < end)[:, None] & (column < D // 2)
    k_first, k_second = load_parts(payload, slot, mask, D, FP8, COMPUTE, NATIVE)
    v_first, v_second = load_parts(payload + stride_kv, slot, mask, D, FP8, COMPUTE, NATIVE)
    scores = tl.dot(q_first, tl.trans(k_first), input_precision="ieee")
    scores = tl.dot(q_second, tl.trans(k_second), scores, input_precision="ieee")
    if FP8:
        scores *= load_or_zero(scales + at, alive)[None, :]
    if MASKED:
        scores = hide(scores, key, position, window)
    weights, shrink, most, total = softmax_step(scores, factor, most, total)
    if FP8:
        v_scale = load_or_zero(scales + scale_kv + at, alive)
        weights, grow, unit = scale_weights(weights, v_scale, scores, unit, 1.0, MASKED)
        shrink *= grow
    weights = weights.to(COMPUTE)
    first = tl.dot(weights, v_first, first * shrink[:, None], input_precision="ieee")
    second = tl.dot(weights, v_second, second * shrink[:, None], input_precision="ieee")
    return first, second, most, total, unit


# Not compiled anew for another width of the table, or a step's part that begins elsewhere.
@triton.jit(
    do_not_specialize=["window", "sequences", "table_row"],
    do_not_specialize_on_alignment=["table", "query_start", "contexts"],
)
def prefill_kernel(
    q, payload, scales, stride_block, stride_kv, stride_head, stride_token,
    scale_block, scale_kv, scale_head, table, query_start, contexts, out, scale, window,
    sequences, q_row, q_head, table_row, out_row, out_head,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, FP8: tl.constexpr, COMPUTE: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    sequence, token, head, held, position, lowest, end, any_row = find_rows(
        query_start, contexts, sequences, kv_head, GROUP, ROWS
    )
    if not any_row:
        return
    at = q + token * q_row + head * q_head
    q_first, q_second, factor = load_queries(at, held, D, WIDTH, FP8, COMPUTE)
    factor *= scale

    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    unit = tl.full((ROWS,), 1.0, tl.float32)
    first = tl.zeros((ROWS, WIDTH), tl.float32)
    second = tl.zeros((ROWS, WIDTH), tl.float32)
    payload += kv_head * stride_head
    if FP8:
        scales += kv_head * scale_head
    table += sequence.to(tl.int64) * table_row
    begin, middle = key_bounds(lowest, window, TILE)
    for start in range(begin, middle, TILE):
        first, second, most, total, unit = attend_tile(
            first, second, most, total, unit, q_first, q_second, factor, payload, scales,
            stride_block, stride_kv, stride_token, scale_block, scale_kv, table,
            start, end, position, window, D, BLOCK_SIZE, TILE, FP8, COMPUTE, NATIVE, False,
        )  # fmt: skip
    for start in range(middle, end, TILE):
        first, second, most, total, unit = attend_tile(
            first, second, most, total, unit, q_first, q_second, factor, payload, scales,
            stride_block, stride_kv, stride_token, scale_block, scale_kv, table,
            start, end, position, window, D, BLOCK_SIZE, TILE, FP8, COMPUTE, NATIVE, True,
        )  # fmt: skip

    share = (unit / tl.where(total == 0.0, 1.0, total))[:, None]
    store_parts(
        out + token * out_row + head * out_head, first * share, second * share, held, D, FP8
    )


@triton.jit
def attend_fp8_tile(
    sums, most, total, unit, q, factor, payload, scales,
    stride_block, stride_kv, stride_token, scale_block, scale_kv, table,
    start, end, position, window,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, NATIVE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """As attend_tile, with e4m3 products and heads as one part."""
    WIDTH: tl.constexpr = sums.shape[1]
    key = start + tl.arange(0, TILE)
    alive = key < end if MASKED else None
    slot, at = tile_slots(table, key, alive, stride_block, stride_token, scale_block, BLOCK_SIZE)
    column = tl.arange(0, WIDTH)[None, :]
    slot = slot[:, None] + column
    mask = None if not MASKED and D == WIDTH else (key < end)[:, None] & (column < D)
    k = load_or_zero(payload + slot, mask).to(tl.float8e4nv, bitcast=True)
    v = load_or_zero(payload + stride_kv + slot, mask).to(tl.float8e4nv, bitcast=True)
    scores = tl.dot(q, tl.trans(k), max_num_imprecise_acc=min(128, WIDTH))
    scores *= load_or_zero(scales + at, alive)[None, :]
    if MASKED:
        scores = hide(scores, key, position, window)
    weights, shrink, most, total = softmax_step(scores, factor, most, total)
    v_scale = load_or_zero(scales + scale_kv + at, alive)
    # 448 is the largest of e4m3: its whole range for weights of 0 to 1.
    weights, grow, unit = scale_weights(weights, v_scale, scores, unit, 448.0, MASKED)
    code = encode_e4m3(weights, NATIVE).to(tl.float8e4nv, bitcast=True)
    # A sum of its own, added in float32: a tensor core's own sum of e4m3 products has 14 bits.
    partial = tl.dot(code, v, max_num_imprecise_acc=min(128, TILE))
    return sums * (shrink * grow)[:, None] + partial, most, total, unit


@triton.jit(
    do_not_specialize=["window", "sequences", "table_row"],
    do_not_specialize_on_alignment=["table", "query_start", "contexts"],
)
def prefill_fp8_kernel(
    q, payload, scales, stride_block, stride_kv, stride_head, stride_token,
    scale_block, scale_kv, scale_head, table, query_start, contexts, out, scale, window,
    sequences, q_row, q_head, table_row, out_row, out_head,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    sequence, token, head, held, position, lowest, end, any_row = find_rows(
        query_start, contexts, sequences, kv_head, GROUP, ROWS
    )
    if not any_row:
        return
    column = tl.arange(0, WIDTH)[None, :]
    held = held[:, None] & (column < D)
    at = q + token[:, None] * q_row + head[:, None] * q_head + column
    queries = tl.load(at, mask=held, other=0.0).to(tl.float32)
    factor = fp8_scale(queries, held)
    queries = quantize_e4m3(queries, factor, NATIVE).to(tl.float8e4nv, bitcast=True)
    factor = tl.where(factor == 0.0, 1.0, factor) * scale  # a row of zeros has scores of 0

    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    unit = tl.full((ROWS,), 1.0, tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    payload += kv_head * stride_head
    scales += kv_head * scale_head
    table += sequence.to(tl.int64) * table_row
    begin, middle = key_bounds(lowest, window, TILE)
    for start in range(begin, middle, TILE):
        sums, most, total, unit = attend_fp8_tile(
            sums, most, total, unit, queries, factor, payload, scales,
            stride_block, stride_kv, stride_token, scale_block, scale_kv, table,
            start, end, position, window, D, BLOCK_SIZE, TILE, NATIVE, False,
        )  # fmt: skip
    for start in range(middle, end, TILE):
        sums, most, total, unit = attend_fp8_tile(
            sums, most, total, unit, queries, factor, payload, scales,
            stride_block, stride_kv, stride_token, scale_block, scale_kv, table,
            start, end, position, window, D, BLOCK_SIZE, TILE, NATIVE, True,
        )  # fmt: skip

    share = (unit / tl.where(total == 0.0, 1.0, total))[:, None]
    to = out + token[:, None] * out_row + head[:, None] * out_head + column
    tl.store(to, (sums * share).to(out.dtype.element_ty), mask=held)
