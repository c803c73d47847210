"""Attention of a chunk of query tokens over the paged KV cache: FlashAttention (Dao et al. 2022).

A work item is a run of a sequence's queries with all heads of one KV head. It goes over the
context in tiles of 64 tokens: K is transposed, and both products are made of one step, 8 rows by 32
columns in registers. Numbers are float32, unless queries and KV are bfloat16 and the CPU multiplies
`pairs` of those: scores, exponentials and sums are float32 then too, but the weights of V are
rounded to bfloat16, as on GPUs.
"""

import ctypes
from functools import cache

import numpy as np
from numba import carray

from common.engine.kernels.cpu import simd, tiles
from common.engine.kernels.cpu.attention import fade_row, load_queries, write_row
from common.engine.kernels.cpu.launch import Kernel, compile_kernel, fields

TILE_TOKENS = 64


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
    """Query tokens of a work item; with the heads a multiple of 8 rows that fit a near cache."""
    return 32 if group <= 4 else 16


def scratch_bytes(group: int, head_dim: int) -> int:
    """Of a thread: queries and sums [rows, head_dim], K and V [64, head_dim], weights [8, 64], a
    16 x 16 block, maxima and totals [rows], places of K and V [2, 64] int64, zeros [head_dim]."""
    rows = queries_of_item(group) * group
    floats = 2 * (rows + TILE_TOKENS) * head_dim + 8 * TILE_TOKENS + 256 + 2 * rows
    floats += 4 * TILE_TOKENS + head_dim
    # Whole lines, so that the next thread's begin at one.
    return -(-4 * floats // 64) * 64


@simd.part
def load_rows_of(io, pairs, group, a, source, rows, most, q, sums):
    """The queries of an item, a row for each token and head, zeros up to `most` rows: scaled, or as
    they are in pairs."""
    row_bytes, zero = 4 * a.head_dim, simd.splat(np.float32(0.0))
    for i in range(0, most * row_bytes, 64):
        simd.store_float32(q + i, zero)
        simd.store_float32(sums + i, zero)
    for token in range(rows // group):
        start = source + token * a.q_stride
        if pairs:
            count = 2 * group * a.head_dim
            for i in range(0, count, 64):
                simd.store_float32(q + token * count + i, simd.load_float32(start + i))
        else:
            at = token * group * row_bytes
            load_queries(io, a, start, group, q + at, sums + at)


@simd.part
def load_tile(kv, a, table, kv_head, tile, start, end, keys, values, block):
    """K and V of the tokens [tile, tile + 64) as float32, zeros outside [start, end); K as a
    column for each token."""
    head_bytes = a.block_size * a.head_dim * simd.size(kv)
    for t in range(0, TILE_TOKENS, 16):
        for c in range(0, a.head_dim, 16):
            for s in range(16):
                token = tile + t + s
                x = simd.splat(np.float32(0.0))
                y = simd.splat(np.float32(0.0))
                if token >= start and token < end:
                    inside = token % a.block_size
                    page = simd.scalar_int32(table + 4 * (token // a.block_size)) * a.block_bytes
                    k = a.cache + page + kv_head * head_bytes
                    k += (inside * a.head_dim + c) * simd.size(kv)
                    x, y = simd.load(kv, k), simd.load(kv, k + a.block_heads * head_bytes)
                    if kv == simd.E4M3:
                        k = a.scales + page + 4 * (kv_head * a.block_size + inside)
                        x = simd.mul(x, simd.splat(simd.scalar_float32(k)))
                        k += 4 * a.block_heads * a.block_size
                        y = simd.mul(y, simd.splat(simd.scalar_float32(k)))
                simd.store_float32(block + 64 * s, x)
                simd.store_float32(values + 4 * ((t + s) * a.head_dim + c), y)
            tiles.transpose(block, keys + 256 * c + 4 * t, 256)


@simd.part
def load_tile_pairs(a, table, kv_head, tile, start, end, keys, values, block, places):
    """The same in pairs of bfloat16: neighbours in a row of K, the same place of two tokens' V."""
    row_bytes = 2 * a.head_dim
    head_bytes, nothing = a.block_size * row_bytes, places + 16 * TILE_TOKENS
    for t in range(TILE_TOKENS):
        k, v, token = nothing, nothing, tile + t
        if token >= start and token < end:
            inside = token % a.block_size
            k = a.cache + simd.scalar_int32(table + 4 * (token // a.block_size)) * a.block_bytes
            k += kv_head * head_bytes + inside * row_bytes
            v = k + a.block_heads * head_bytes
        simd.put_int64(places + 8 * t, k)
        simd.put_int64(places + 8 * (TILE_TOKENS + t), v)
    for c in range(0, row_bytes, 64):
        for t in range(0, TILE_TOKENS, 16):
            for s in range(16):
                k = simd.scalar_int64(places + 8 * (t + s))
                simd.store_float32(block + 64 * s, simd.load_float32(k + c))
            tiles.transpose(block, keys + 64 * c + 4 * t, 256)
    for t in range(0, TILE_TOKENS, 2):
        low = simd.scalar_int64(places + 8 * (TILE_TOKENS + t))
        high = simd.scalar_int64(places + 8 * (TILE_TOKENS + t + 1))
        for c in range(0, row_bytes, 32):
            simd.store_float32(values + t * row_bytes + 2 * c, tiles.interleave(low + c, high + c))


@simd.part
def multiply_rows(pairs, dim, rows, keys, weights):
    """8 rows of queries by the tile's K: their scores [8, 64]."""
    if pairs:
        steps, row_bytes = dim // 2, 2 * dim
    else:
        steps, row_bytes = dim, 4 * dim
    for t in range(0, 256, 128):
        products = tiles.zero_rows(16)
        for d in range(steps):
            at = keys + 256 * d + t
            if pairs:
                products = tiles.add_pairs(products, rows + 4 * d, row_bytes, at)
            else:
                products = tiles.add_products(products, rows + 4 * d, row_bytes, at)
        tiles.store_block(products, weights + t, 256)


@simd.part
def add_tile(pairs, row_bytes, values, weights, sums):
    """8 rows of weights by the tile's V, added to 8 rows of sums."""
    for c in range(0, row_bytes, 128):
        products = tiles.load_block(sums + c, row_bytes)
        if pairs:
            for t in range(TILE_TOKENS // 2):
                at = values + t * row_bytes + c
                products = tiles.add_pairs(products, weights + 4 * t, 256, at)
        else:
            for t in range(TILE_TOKENS):
                at = values + t * row_bytes + c
                products = tiles.add_products(products, weights + 4 * t, 256, at)
        tiles.store_block(products, sums + c, row_bytes)


@simd.part
def soften_row(pairs, scale, p, low, high, row, row_bytes, maximum, total):
    """From the scores of a tile, of which [low, high) are seen, to the weights of V; in pairs in
    the first half of where the scores were."""
    if pairs:
        for t in range(0, 256, 64):
            simd.store_float32(p + t, simd.mul(simd.load_float32(p + t), scale))
    if low > 0 or high < TILE_TOKENS:
        for t in range(0, TILE_TOKENS, 16):
            x = simd.hide_outside(simd.load_float32(p + 4 * t), low - t, high - t)
            simd.store_float32(p + 4 * t, x)
    left = simd.larger(simd.load_float32(p), simd.load_float32(p + 64))
    right = simd.larger(simd.load_float32(p + 128), simd.load_float32(p + 192))
    new, old = simd.largest(simd.larger(left, right)), simd.scalar_float32(maximum)
    if new > old:
        fade_row(row, row_bytes, maximum, total, new)
    else:
        new = old
    # A row that has seen nothing yet has no maximum.
    shift = simd.splat(np.float32(0.0))
    if new > np.float32(-np.inf):
        shift = simd.splat(-new)
    x = simd.splat(np.float32(0.0))
    for t in range(0, 256, 64):
        y = simd.exp(simd.add(simd.load_float32(p + t), shift))
        if pairs:
            # What is summed is what V is multiplied by.
            simd.store_bfloat16(p + t // 2, y)
            y = simd.load_bfloat16(p + t // 2)
        else:
            simd.store_float32(p + t, y)
        x = simd.add(x, y)
    simd.put_float32(total, simd.scalar_float32(total) + simd.total(x))


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
        q = a.scratch + simd.fetch_add(counters + 8, 1) * a.scratch_bytes
        sums = q + most * row_bytes
        keys = sums + most * row_bytes
        values = keys + TILE_TOKENS * row_bytes
        weights = values + TILE_TOKENS * row_bytes
        block = weights + 8 * 256
        maxima = block + 1024
        totals = maxima + 4 * most
        places = totals + 4 * most
        q_bytes, scale = row_bytes, simd.splat(np.float32(a.scale))
        if pairs:
            q_bytes = 2 * dim
            for i in range(0, row_bytes, 64):
                simd.store_float32(places + 16 * TILE_TOKENS + i, simd.splat(np.float32(0.0)))
        while True:
            item = simd.fetch_add(counters, 1)
            if item >= a.num_items:
                break
            lane, at = item % lanes, a.items + 16 * (item // lanes)
            table = a.tables + 4 * a.table_width * simd.scalar_int32(at)
            first_row, queries = simd.scalar_int32(at + 4), simd.scalar_int32(at + 8)
            position = simd.scalar_int32(at + 12)
            rows, end, start = queries * group, position + queries, 0
            if a.window > 0:
                start = max(0, position + 1 - a.window)
            head = lane * group * dim * simd.size(io)
            source = a.q + first_row * a.q_stride + head
            load_rows_of(io, pairs, group, a, source, rows, most, q, sums)
            for row in range(most):
                simd.put_float32(maxima + 4 * row, np.float32(-np.inf))
                simd.put_float32(totals + 4 * row, np.float32(0.0))
            for tile in range(start - start % TILE_TOKENS, end, TILE_TOKENS):
                kv_head = lane // a.passes
                if pairs:
                    load_tile_pairs(
                        a, table, kv_head, tile, start, end, keys, values, block, places
                    )
                else:
                    load_tile(kv, a, table, kv_head, tile, start, end, keys, values, block)
                for row in range(0, rows, 8):
                    if tile > position + min(row + 7, rows - 1) // group:
                        continue
                    multiply_rows(pairs, dim, q + row * q_bytes, keys, weights)
                    for r in range(row, row + 8):
                        seen, hidden = position + r // group + 1 - tile, np.int64(0)
                        if a.window > 0:
                            hidden = max(0, seen - a.window)
                        p, into = weights + 256 * (r - row), sums + r * row_bytes
                        at = maxima + 4 * r, totals + 4 * r
                        soften_row(pairs, scale, p, hidden, seen, into, row_bytes, at[0], at[1])
                    add_tile(pairs, row_bytes, values, weights, sums + row * row_bytes)
            token_bytes = lanes * group * dim * simd.size(io)
            for row in range(rows):
                target = a.out + (first_row + row // group) * token_bytes + head
                target += row % group * dim * simd.size(io)
                write_row(io, dim, sums + row * row_bytes, totals + 4 * row, target)

    return compile_kernel(paged_prefill, PrefillArguments)
