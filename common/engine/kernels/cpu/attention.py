"""Attention of single query tokens over the paged KV cache.

Online softmax (Milakov & Gimelshein 2018) over tiles of 16 tokens, read straight from the block
format and turned into float32 in registers; the query heads of a KV head share each read. A long
context is split (Flash-Decoding, Dao et al. 2023) at fixed positions, and the parts are merged in
order, so that a result depends neither on the other sequences nor on the number of threads.
"""

import ctypes
from functools import cache

import numpy as np
from numba import carray

from common.engine.kernels.cpu import simd, tiles
from common.engine.kernels.cpu.launch import Kernel, compile_kernel, fields

TILE_TOKENS = 16  # the lanes of a vector
SPLIT_TOKENS = 256
MAX_GROUP = 8  # query heads at once: their sums stay in registers


class DecodeArguments(ctypes.Structure):
    """Addresses and sizes in bytes unless said otherwise. A row is one query token.

    q, out             [rows, heads, head_dim], q's rows q_stride apart, out's contiguous
    cache, scales      the layer's payload and scales of block 0, of the first KV head (scales 0:
                       none); blocks are block_bytes apart and have block_heads KV heads
    tables             [sequences, table_width] int32
    items              [splits, 2] int32: the row, and which split of its context
    row_sequence       [rows] int32
    row_context        [rows] int32, tokens to attend to, the row's own included
    row_parts          [rows] int32: where the row's parts begin, -1 when there is but one
    pending            [rows, kv_heads, passes] int64: splits that are not done; left as found
    parts              [parts, kv_heads, passes, group, head_dim + 16] float32
    scratch            scratch_bytes for each thread
    window             tokens; 0: all
    passes, group      the query heads of a KV head: passes * group
    """

    _fields_ = (
        *fields(
            "q out q_stride cache scales block_bytes block_size block_heads tables table_width "
            "items row_sequence row_context row_parts pending parts scratch scratch_bytes window "
            "kv_heads passes head_dim"
        ),
        ("scale", ctypes.c_double),
    )


def scratch_bytes(group: int, head_dim: int) -> int:
    """Of a thread: queries and sums [group, head_dim], products [group, 16, 16], weights
    [group, 16], maxima and totals [16]."""
    return 4 * (2 * group * head_dim + group * 17 * TILE_TOKENS + 2 * simd.LANES)


@simd.part
def load_queries(io, a, source, count, q, sums):
    """`count` scaled queries, next to each other at `source`, as float32; their sums are zero."""
    factor, zero = simd.splat(np.float32(a.scale)), simd.splat(np.float32(0.0))
    for i in range(0, count * a.head_dim, 16):
        x = simd.load(io, source + i * simd.size(io))
        simd.store_float32(q + 4 * i, simd.mul(x, factor))
        simd.store_float32(sums + 4 * i, zero)


@simd.part
def copy_queries(a, source, count, q, sums):
    """The same in pairs of bfloat16: as they are, not scaled."""
    for i in range(0, 2 * count * a.head_dim, 64):
        simd.store_float32(q + i, simd.load_float32(source + i))
    for i in range(0, 4 * count * a.head_dim, 64):
        simd.store_float32(sums + i, simd.splat(np.float32(0.0)))


@simd.part
def multiply_keys(kv, pairs, group, a, k, count, q, products, ahead):
    """Of `count` tokens and each head 16 numbers whose sum is the score. Meanwhile the caches fetch
    the tile of K at `ahead`, a little at a time, so that no load waits behind it."""
    row_bytes, token_bytes = 4 * a.head_dim, a.head_dim * simd.size(kv)
    for t in range(count):
        for i in range(t * token_bytes, (t + 1) * token_bytes, 64):
            simd.prefetch(ahead + i)
        rows = tiles.zero_rows(group)
        if pairs:
            for c in range(0, 2 * a.head_dim, 64):
                x = simd.load_float32(k + 2 * t * a.head_dim + c)
                rows = tiles.dot_pairs(rows, x, q + c, 2 * a.head_dim)
        else:
            for c in range(0, a.head_dim, 16):
                x = simd.load(kv, k + (t * a.head_dim + c) * simd.size(kv))
                rows = tiles.dot_rows(rows, x, q + 4 * c, row_bytes)
        tiles.store_rows(rows, products + 64 * t, 1024)


@simd.part
def fade_row(row, row_bytes, maximum, total, new):
    """Sums and their total for a larger maximum than before."""
    fade = simd.exp(simd.splat(simd.scalar_float32(maximum) - new))
    simd.put_float32(maximum, new)
    simd.put_float32(total, simd.scalar_float32(total) * simd.first(fade))
    for i in range(0, row_bytes, 64):
        simd.store_float32(row + i, simd.mul(simd.load_float32(row + i), fade))


@simd.part
def soften(kv, pairs, group, a, scale, count, products, weights, sums, maxima, totals):
    """From products to the weights of V; `scale` is where K's scales are."""
    row_bytes = 4 * a.head_dim
    for g in range(group):
        x = tiles.totals(products + 1024 * g)
        if pairs:
            x = simd.mul(x, simd.splat(np.float32(a.scale)))
        if kv == simd.E4M3:
            x = simd.mul(x, simd.load_first(scale, count))
        x = simd.keep_first(x, count, np.float32(-np.inf))
        new, old = simd.largest(x), simd.scalar_float32(maxima + 4 * g)
        if new > old:
            fade_row(sums + g * row_bytes, row_bytes, maxima + 4 * g, totals + 4 * g, new)
        else:
            new = old
        p = simd.exp(simd.add(x, simd.splat(-new)))
        total = simd.scalar_float32(totals + 4 * g) + simd.total(p)
        simd.put_float32(totals + 4 * g, total)
        if kv == simd.E4M3:
            p = simd.mul(p, simd.load_first(scale + 4 * a.block_heads * a.block_size, count))
        simd.store_float32(weights + 64 * g, p)


@simd.part
def add_values(kv, group, a, v, count, weights, sums, ahead):
    """Adds `count` tokens of V, weighted, and has the tile at `ahead` fetched."""
    row_bytes, token_bytes = 4 * a.head_dim, a.head_dim * simd.size(kv)
    for c in range(0, a.head_dim, 16):
        rows = tiles.load_rows(group, sums + 4 * c, row_bytes)
        for t in range(count):
            simd.prefetch(ahead + t * token_bytes + c * simd.size(kv))
            x = simd.load(kv, v + (t * a.head_dim + c) * simd.size(kv))
            rows = tiles.mix_rows(rows, x, weights + 4 * t, 64)
        tiles.store_rows(rows, sums + 4 * c, row_bytes)


@simd.part
def attend_tokens(kv, pairs, group, a, table, kv_head, start, end, q):
    """A group's queries at q over the tokens [start, end) of a sequence; see scratch_bytes."""
    row_bytes = 4 * a.head_dim
    sums = q + group * row_bytes
    products = sums + group * row_bytes
    weights = products + group * 1024
    maxima = weights + group * 64
    simd.store_float32(maxima, simd.splat(np.float32(-np.inf)))
    simd.store_float32(maxima + 64, simd.splat(np.float32(0.0)))
    token_bytes = a.head_dim * simd.size(kv)
    head_bytes = a.block_size * token_bytes
    keys = a.cache + kv_head * head_bytes
    token = start
    while token < end:
        inside = token % a.block_size
        stop = min(token - token % TILE_TOKENS + TILE_TOKENS, end, token + a.block_size - inside)
        block = simd.scalar_int32(table + 4 * (token // a.block_size)) * a.block_bytes
        k = keys + block + inside * token_bytes
        ahead = k
        if stop < end:
            ahead = simd.scalar_int32(table + 4 * (stop // a.block_size)) * a.block_bytes
            ahead += keys + stop % a.block_size * token_bytes
        scale = a.scales + block + 4 * (kv_head * a.block_size + inside)
        count = stop - token
        multiply_keys(kv, pairs, group, a, k, count, q, products, ahead)
        soften(kv, pairs, group, a, scale, count, products, weights, sums, maxima, maxima + 64)
        to_v = a.block_heads * head_bytes
        add_values(kv, group, a, k + to_v, count, weights, sums, ahead + to_v)
        token = stop


@simd.part
def save_part(group, row_bytes, sums, maxima, target):
    """Sums, and for each head its maximum and total in a line of 64 bytes."""
    for i in range(0, group * row_bytes, 64):
        simd.store_float32(target + i, simd.load_float32(sums + i))
    for g in range(group):
        at = target + group * row_bytes + 64 * g
        simd.put_float32(at, simd.scalar_float32(maxima + 4 * g))
        simd.put_float32(at + 4, simd.scalar_float32(maxima + 64 + 4 * g))


@simd.part
def merge_parts(group, row_bytes, parts, stride, count, sums, totals):
    """`count` parts that are `stride` bytes apart, in their order."""
    zero = simd.splat(np.float32(0.0))
    for g in range(group):
        row = sums + g * row_bytes
        at = parts + group * row_bytes + 64 * g
        new = np.float32(-np.inf)
        for s in range(count):
            x = simd.scalar_float32(at + s * stride)
            if x > new:
                new = x
        total = np.float32(0.0)
        for i in range(0, row_bytes, 64):
            simd.store_float32(row + i, zero)
        for s in range(count):
            fade = simd.exp(simd.splat(simd.scalar_float32(at + s * stride) - new))
            total += simd.first(fade) * simd.scalar_float32(at + s * stride + 4)
            for i in range(0, row_bytes, 64):
                x = simd.load_float32(parts + s * stride + g * row_bytes + i)
                simd.store_float32(row + i, simd.fma(x, fade, simd.load_float32(row + i)))
        simd.put_float32(totals + 4 * g, total)


@simd.part
def write_row(io, dim, row, total, target):
    """One head's result: its sums over their total."""
    by = simd.splat(simd.scalar_float32(total))
    for i in range(0, dim, 16):
        x = simd.div(simd.load_float32(row + 4 * i), by)
        simd.store(io, target + i * simd.size(io), x)


@cache
def decode_kernel(kv: int, io: int, group: int, native: bool = tiles.HAS_BFLOAT16) -> Kernel:
    """kv and io: simd's kind of the cache's and of the queries' numbers; group: heads at once;
    native: the CPU has products of bfloat16, which scores are made of where all are bfloat16."""
    pairs = native and kv == io == simd.BFLOAT16

    def paged_decode(address):
        a = carray(address, 1)[0]
        counters = simd.address_of(address)
        dim, row_bytes, lanes = a.head_dim, 4 * a.head_dim, a.kv_heads * a.passes
        q = a.scratch + simd.fetch_add(counters + 8, 1) * a.scratch_bytes
        sums = q + group * row_bytes
        maxima = sums + group * (row_bytes + 1024 + 64)
        part_bytes = group * (row_bytes + 64)
        while True:
            item = simd.fetch_add(counters, 1)
            if item >= a.num_items:
                break
            lane = item % lanes
            row = simd.scalar_int32(a.items + 8 * (item // lanes))
            split = simd.scalar_int32(a.items + 8 * (item // lanes) + 4)
            context = simd.scalar_int32(a.row_context + 4 * row)
            table = a.tables + 4 * a.table_width * simd.scalar_int32(a.row_sequence + 4 * row)
            first = 0
            if a.window > 0:
                first = max(0, context - a.window)
            start, end = split * SPLIT_TOKENS, min(split * SPLIT_TOKENS + SPLIT_TOKENS, context)
            head = lane * group * dim * simd.size(io)
            if pairs:
                copy_queries(a, a.q + row * a.q_stride + head, group, q, sums)
            else:
                load_queries(io, a, a.q + row * a.q_stride + head, group, q, sums)
            attend_tokens(kv, pairs, group, a, table, lane // a.passes, max(start, first), end, q)
            first_part = simd.scalar_int32(a.row_parts + 4 * row)
            if first_part >= 0:
                skipped = first // SPLIT_TOKENS
                count = (context - 1) // SPLIT_TOKENS + 1 - skipped
                stride = lanes * part_bytes
                parts = a.parts + first_part * stride + lane * part_bytes
                save_part(group, row_bytes, sums, maxima, parts + (split - skipped) * stride)
                waiting = a.pending + 8 * (row * lanes + lane)
                if simd.fetch_add(waiting, -1) > 1:
                    continue
                # The last to come merges all.
                simd.fetch_add(waiting, count)
                merge_parts(group, row_bytes, parts, stride, count, sums, maxima + 64)
            out = a.out + row * lanes * group * dim * simd.size(io) + head
            for g in range(group):
                target = out + g * dim * simd.size(io)
                write_row(io, dim, sums + g * row_bytes, maxima + 64 + 4 * g, target)

    return compile_kernel(paged_decode, DecodeArguments)
