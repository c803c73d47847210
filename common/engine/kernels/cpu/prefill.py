"""Attention of a chunk of query tokens over the paged KV cache: FlashAttention (Dao et al. 2022).

A work item is a run of a sequence's queries with all heads of one KV head, 32 rows (a token's query
of one head) at a time. It goes over the context in tiles of 64 tokens. All is kept with the rows
side by side in vectors, scores as [token, row] and sums as [dim, row]: maxima and exponentials of
32 rows are then made at once, and both products are one step, 8 numbers of K or V by 32 rows in
registers, which takes K as it lies in its page. Numbers are float32, unless queries and KV are
bfloat16 and the CPU multiplies `pairs` of those: scores, exponentials and sums are float32 then
too, but the weights of V are rounded to bfloat16, as on GPUs.
"""

import ctypes
import math
from functools import cache

import numpy as np
from numba import carray

from common.engine.kernels.cpu import simd, tiles
from common.engine.kernels.cpu.launch import Kernel, compile_kernel, fields

TILE_TOKENS = 64
# Two vectors.
BLOCK_ROWS = 2 * simd.LANES
# A step of a product takes a line of 4 bytes from each row of a block.
LINE = 4 * BLOCK_ROWS
LOG2_E = math.log2(math.e)


class PrefillArguments(ctypes.Structure):
    """As DecodeArguments, but for

    items              [num_items / (kv_heads * passes), 4] int32: sequence, first row, rows,
                       position of the first
    """

    _fields_ = (
        *fields(
            "q out q_stride cache scales block_bytes block_size block_heads tables table_width "
            "items scratch scratch_bytes window kv_heads passes head_dim"
        ),
        ("scale", ctypes.c_double),
    )


def queries_of_item(group: int) -> int:
    """Query tokens of a work item; with the heads whole blocks of rows that fit a near cache."""
    return 16 if group in (6, 8) else 32


def scratch_bytes(group: int, head_dim: int) -> int:
    """Of a thread, 4 bytes each: queries and sums [rows / 32, head_dim, 32], K and V
    [64, head_dim], scores [64, 32], a 16 x 16 block, maxima, totals and ends of contexts [rows],
    what sums shrink by [32], zeros [head_dim]."""
    rows = queries_of_item(group) * group
    numbers = (2 * rows + 2 * TILE_TOKENS + 1) * head_dim
    numbers += TILE_TOKENS * BLOCK_ROWS + 256 + 3 * rows + BLOCK_ROWS
    return 4 * numbers


@simd.part
def load_rows(io, pairs, group, a, source, rows, most, q, block):
    """The queries of an item, a row for each token and head, and zeros up to `most` rows: of each
    block of 32 rows the first 4 bytes (a pair, or a float32) of all, then the next."""
    dim, row_bytes, zero = a.head_dim, a.head_dim * simd.size(io), simd.splat(np.float32(0.0))
    steps = dim // 2 if pairs else dim
    for row in range(0, most, 16):
        target = q + row // BLOCK_ROWS * steps * LINE + row % BLOCK_ROWS * 4
        for step in range(0, steps, 16):
            for r in range(row, row + 16):
                x = zero
                if r < rows:
                    at = source + r // group * a.q_stride + r % group * row_bytes
                    if pairs:
                        x = simd.load_float32(at + 4 * step)
                    else:
                        x = simd.load(io, at + step * simd.size(io))
                simd.store_float32(block + 64 * (r - row), x)
            tiles.transpose(block, 64, target + LINE * step, LINE)


@simd.part
def write_rows(io, group, a, sums, totals, rows, target, token_bytes, block):
    """The results of an item: sums over their totals."""
    dim = a.head_dim
    for row in range(0, rows, 16):
        source = sums + row // BLOCK_ROWS * dim * LINE + row % BLOCK_ROWS * 4
        for c in range(0, dim, 16):
            tiles.transpose(source + LINE * c, LINE, block, 64)
            for r in range(row, min(row + 16, rows)):
                by = simd.splat(simd.scalar_float32(totals + 4 * r))
                x = simd.div(simd.load_float32(block + 64 * (r - row)), by)
                at = target + r // group * token_bytes + (r % group * dim + c) * simd.size(io)
                simd.store(io, at, x)


@simd.part
def load_tile(kv, pairs, a, table, kv_head, tile, start, end, keys, values, zeros):
    """K and V of the tokens [tile, tile + 64), zeros outside [start, end): [64, head_dim] float32,
    or K as it is and V [32, head_dim] in pairs of two tokens."""
    row_bytes = a.head_dim * simd.size(kv)
    head_bytes = a.block_size * row_bytes
    to_v = a.block_heads * head_bytes
    place, inside = table + 4 * (tile // a.block_size), tile % a.block_size
    page = np.int64(-1)
    k0, v0 = zeros, zeros
    for t in range(TILE_TOKENS):
        k, v, token = zeros, zeros, tile + t
        scales = np.int64(0)
        if token >= start and token < end:
            if page < 0:
                page = simd.scalar_int32(place) * a.block_bytes
            k = a.cache + page + kv_head * head_bytes + inside * row_bytes
            v = k + to_v
            scales = a.scales + page + 4 * (kv_head * a.block_size + inside)
        if pairs:
            if t % 2 == 0:
                k0, v0 = k, v
            else:
                for c in range(0, row_bytes, 64):
                    at = keys + (t - 1) * row_bytes + c
                    simd.store_float32(at, simd.load_float32(k0 + c))
                    simd.store_float32(at + row_bytes, simd.load_float32(k + c))
                for c in range(0, row_bytes, 32):
                    at = values + (t - 1) * row_bytes + 2 * c
                    simd.store_float32(at, tiles.interleave(v0 + c, v + c))
        else:
            load_token(kv, a, k, v, scales, keys + 4 * t * a.head_dim, values + 4 * t * a.head_dim)
        inside += 1
        if inside == a.block_size:
            place, inside, page = place + 4, np.int64(0), np.int64(-1)


@simd.part
def load_token(kv, a, k, v, scales, key, value):
    """One token's K and V as float32; scales 0: they are zeros."""
    for c in range(0, a.head_dim, 16):
        x, y = simd.load(kv, k + c * simd.size(kv)), simd.load(kv, v + c * simd.size(kv))
        if kv == simd.E4M3 and scales != 0:
            x = simd.mul(x, simd.splat(simd.scalar_float32(scales)))
            to_v = 4 * a.block_heads * a.block_size
            y = simd.mul(y, simd.splat(simd.scalar_float32(scales + to_v)))
        simd.store_float32(key + 4 * c, x)
        simd.store_float32(value + 4 * c, y)


@simd.part
def multiply_keys(pairs, dim, q, keys, first, last, scores):
    """Scores of the tokens [first, last) of a tile for a block of rows, not scaled."""
    steps = dim // 2 if pairs else dim
    for t in range(first, last, 8):
        products = tiles.zero_rows(16)
        for d in range(steps):
            at = keys + 4 * (t * steps + d)
            if pairs:
                products = tiles.add_pairs(products, at, 4 * steps, q + LINE * d)
            else:
                products = tiles.add_float32(products, at, 4 * steps, q + LINE * d)
        tiles.store_columns(products, 2, scores + LINE * t, LINE)


@simd.part
def larger_of_all(start, end, value):
    """The largest of `value` and the vectors, lines apart and a multiple of 4 of them: four at a
    time, since each waits for the one that it is compared with."""
    second, third, fourth = value, value, value
    for at in range(start, end, 4 * LINE):
        value = simd.larger(value, simd.load_float32(at))
        second = simd.larger(second, simd.load_float32(at + LINE))
        third = simd.larger(third, simd.load_float32(at + 2 * LINE))
        fourth = simd.larger(fourth, simd.load_float32(at + 3 * LINE))
    return simd.larger(simd.larger(value, second), simd.larger(third, fourth))


@simd.part
def soften(pairs, masked, a, tile, first, last, scores, maxima, totals, ends, fades):
    """From scores to the weights of V, in place (in pairs of two tokens in the first half), of 16
    rows; `masked`: some see but some of the tokens."""
    infinite, zero = simd.splat(np.float32(-np.inf)), simd.splat(np.float32(0.0))
    scale = simd.splat(np.float32(a.scale * LOG2_E))
    minus = simd.splat(np.float32(-a.scale * LOG2_E))
    old = simd.load_float32(maxima)
    new = old
    if masked:
        until = simd.load_float32(ends)
        for t in range(first, last):
            x, token = simd.load_float32(scores + LINE * t), np.float32(tile + t)
            x = simd.where_less(simd.splat(token), until, x, infinite)
            if a.window > 0:
                oldest = simd.splat(token + np.float32(a.window + 1))
                x = simd.where_less(until, oldest, x, infinite)
            simd.store_float32(scores + LINE * t, x)
    new = larger_of_all(scores + LINE * first, scores + LINE * last, new)
    # A row that has seen nothing yet has no maximum.
    shift = simd.where_less(infinite, new, simd.mul(new, minus), zero)
    # Not by fma: the same maximum is to give 1.
    fade = simd.exp2(simd.add(simd.mul(old, scale), shift))
    total = simd.mul(simd.load_float32(totals), fade)
    for t in range(first, last, 2):
        low = simd.exp2(simd.fma(simd.load_float32(scores + LINE * t), scale, shift))
        high = simd.exp2(simd.fma(simd.load_float32(scores + LINE * (t + 1)), scale, shift))
        if pairs:
            # What is summed is what V is multiplied by.
            both = tiles.round_pairs(low, high)
            total = tiles.add_pair_sums(total, both)
            simd.store_float32(scores + LINE // 2 * t, both)
        else:
            total = simd.add(total, simd.add(low, high))
            simd.store_float32(scores + LINE * t, low)
            simd.store_float32(scores + LINE * (t + 1), high)
    simd.store_float32(maxima, new)
    simd.store_float32(totals, total)
    simd.store_float32(fades, fade)


@simd.part
def add_values(pairs, dim, values, first, last, weights, fades, sums):
    """The tile's V by the weights of a block of rows, added to what remains of its sums."""
    if pairs:
        first, last = first // 2, last // 2
    low, high = simd.load_float32(fades), simd.load_float32(fades + 64)
    for d in range(0, dim, 8):
        products = tiles.scale_columns(tiles.load_block(sums + LINE * d, LINE), low, high)
        for t in range(first, last):
            at = values + 4 * (t * dim + d)
            if pairs:
                products = tiles.add_pairs(products, at, 4, weights + LINE * t)
            else:
                products = tiles.add_float32(products, at, 4, weights + LINE * t)
        tiles.store_columns(products, 2, sums + LINE * d, LINE)


@simd.part
def clear(pairs, most, position, group, dim, sums, maxima, totals, ends):
    """Of an item that has seen nothing yet."""
    zero = simd.splat(np.float32(0.0))
    for i in range(0, most * dim * 4, 64):
        simd.store_float32(sums + i, zero)
    for row in range(most):
        simd.put_float32(maxima + 4 * row, np.float32(-np.inf))
        simd.put_float32(totals + 4 * row, np.float32(0.0))
        simd.put_float32(ends + 4 * row, np.float32(position + row // group + 1))


@cache
def prefill_kernel(kv: int, io: int, group: int, native: bool = tiles.HAS_BFLOAT16) -> Kernel:
    """kv and io: simd's kind of the cache's and of the queries' numbers; group: heads at once;
    native: the CPU has products of bfloat16."""
    pairs = native and kv == io == simd.BFLOAT16
    most = queries_of_item(group) * group

    def paged_prefill(address):
        a = carray(address, 1)[0]
        counters = simd.address_of(address)
        dim, row_bytes, lanes = a.head_dim, 4 * a.head_dim, a.kv_heads * a.passes
        chunks = a.num_items // lanes
        q = a.scratch + simd.fetch_add(counters + 8, 1) * a.scratch_bytes
        sums = q + most * row_bytes
        keys = sums + most * row_bytes
        values = keys + TILE_TOKENS * row_bytes
        scores = values + TILE_TOKENS * row_bytes
        block = scores + TILE_TOKENS * LINE
        maxima = block + 1024
        totals, ends, fades = maxima + 4 * most, maxima + 8 * most, maxima + 12 * most
        zeros = fades + LINE
        for i in range(0, row_bytes, 64):
            simd.store_float32(zeros + i, simd.splat(np.float32(0.0)))
        while True:
            item = simd.fetch_add(counters, 1)
            if item >= a.num_items:
                break
            # All of a head's items, one after the other: they read the same K and V.
            lane, at = item // chunks, a.items + 16 * (item % chunks)
            table = a.tables + 4 * a.table_width * simd.scalar_int32(at)
            first_row, queries = simd.scalar_int32(at + 4), simd.scalar_int32(at + 8)
            position = simd.scalar_int32(at + 12)
            rows, end, start = queries * group, position + queries, np.int64(0)
            if a.window > 0:
                start = max(start, position + 1 - a.window)
            head = lane * group * dim * simd.size(io)
            source = a.q + first_row * a.q_stride + head
            load_rows(io, pairs, group, a, source, rows, most, q, block)
            clear(pairs, most, position, group, dim, sums, maxima, totals, ends)
            for tile in range(start - start % TILE_TOKENS, end, TILE_TOKENS):
                kv_head = lane // a.passes
                load_tile(kv, pairs, a, table, kv_head, tile, start, end, keys, values, zeros)
                for row in range(0, rows, BLOCK_ROWS):
                    # What the block's first row sees, and its last, in whole steps.
                    seen = position + row // group + 1 - tile
                    last = position + (min(row + BLOCK_ROWS, rows) - 1) // group + 1 - tile
                    stop, first = min(TILE_TOKENS, (last + 7) // 8 * 8), np.int64(0)
                    masked = seen < stop
                    if a.window > 0:
                        first = max(first, (seen - a.window) // 8 * 8)
                        masked = masked or last - a.window > first
                    if first >= stop:
                        continue
                    at, into = row * row_bytes, sums + row * row_bytes
                    if pairs:
                        at = row * 2 * dim
                    multiply_keys(pairs, dim, q + at, keys, first, stop, scores)
                    for half in range(0, LINE, 64):
                        p, f, place = scores + half, fades + half, 4 * row + half
                        m, t, e = maxima + place, totals + place, ends + place
                        soften(pairs, masked, a, tile, first, stop, p, m, t, e, f)
                    add_values(pairs, dim, values, first, stop, scores, fades, into)
            token_bytes = lanes * group * dim * simd.size(io)
            target = a.out + first_row * token_bytes + head
            write_rows(io, group, a, sums, totals, rows, target, token_bytes, block)

    return compile_kernel(paged_prefill, PrefillArguments)
