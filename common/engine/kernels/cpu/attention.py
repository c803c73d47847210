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

from common.engine.kernels.cpu import simd
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


@cache
def decode_kernel(kv: int, io: int, group: int) -> Kernel:
    """kv and io: simd's kind of the cache's and of the queries' numbers; group: heads at once."""
    element = (4, 2, 1)[kv]
    has_scales = kv == simd.E4M3
    io_element = (4, 2)[io]

    def paged_decode(address):
        a = carray(address, 1)[0]
        next_item = simd.address_of(address)
        dim = a.head_dim
        row_bytes = 4 * dim
        thread = simd.fetch_add(next_item + 8, 1)
        q = a.scratch + thread * a.scratch_bytes
        sums = q + group * row_bytes
        products = sums + group * row_bytes
        weights = products + group * 1024
        maxima = weights + group * 64
        totals = maxima + 64
        head_block = a.block_size * dim * element
        scale_step = 4 * a.block_heads * a.block_size
        while True:
            item = simd.fetch_add(next_item, 1)
            if item >= a.num_items:
                break
            per_split = a.kv_heads * a.passes
            which = item // per_split
            lane = item % per_split
            kv_head = lane // a.passes
            row = simd.scalar_int32(a.items + 8 * which)
            split = simd.scalar_int32(a.items + 8 * which + 4)
            context = simd.scalar_int32(a.row_context + 4 * row)
            table = a.tables + 4 * a.table_width * simd.scalar_int32(a.row_sequence + 4 * row)
            first_head = lane * group
            start = split * SPLIT_TOKENS
            end = min(start + SPLIT_TOKENS, context)
            if a.window > 0:
                start = max(start, context - a.window)
            source = a.q + row * a.q_stride + first_head * dim * io_element
            factor = simd.splat(np.float32(a.scale))
            zero = simd.splat(np.float32(0.0))
            for i in range(0, group * dim, 16):
                x = simd.load(io, source + i * io_element)
                simd.store_float32(q + 4 * i, simd.mul(x, factor))
                simd.store_float32(sums + 4 * i, zero)
            simd.store_float32(maxima, simd.splat(np.float32(-np.inf)))
            simd.store_float32(totals, zero)

            token = start
            while token < end:
                inside = token % a.block_size
                stop = min(token - token % 16 + 16, end, token + a.block_size - inside)
                count = stop - token
                block = simd.scalar_int32(table + 4 * (token // a.block_size)) * a.block_bytes
                k = a.cache + block + kv_head * head_block + inside * dim * element
                v = k + a.block_heads * head_block
                scale = a.scales + block + 4 * (kv_head * a.block_size + inside)
                if stop < end:
                    ahead = simd.scalar_int32(table + 4 * (stop // a.block_size)) * a.block_bytes
                    ahead += a.cache + kv_head * head_block + stop % a.block_size * dim * element
                    for i in range(0, TILE_TOKENS * dim * element, 64):
                        simd.prefetch(ahead + i)
                        simd.prefetch(ahead + a.block_heads * head_block + i)
                for t in range(count):
                    rows = simd.zero_rows(group)
                    for c in range(0, dim, 16):
                        x = simd.load(kv, k + (t * dim + c) * element)
                        rows = simd.dot_rows(rows, x, q + 4 * c, row_bytes)
                    simd.store_rows(rows, products + 64 * t, 1024)
                for g in range(group):
                    x = simd.totals(products + 1024 * g)
                    if has_scales:
                        x = simd.mul(x, simd.load_first(scale, count))
                    x = simd.keep_first(x, count, np.float32(-np.inf))
                    old = simd.scalar_float32(maxima + 4 * g)
                    new = simd.largest(x)
                    if not new > old:
                        new = old
                    p = simd.exp(simd.add(x, simd.splat(-new)))
                    total = simd.scalar_float32(totals + 4 * g)
                    if new > old:
                        simd.put_float32(maxima + 4 * g, new)
                        fade = simd.exp(simd.splat(old - new))
                        total *= simd.first(fade)
                        for i in range(g * dim, g * dim + dim, 16):
                            y = simd.load_float32(sums + 4 * i)
                            simd.store_float32(sums + 4 * i, simd.mul(y, fade))
                    simd.put_float32(totals + 4 * g, total + simd.total(p))
                    if has_scales:
                        p = simd.mul(p, simd.load_first(scale + scale_step, count))
                    simd.store_float32(weights + 64 * g, p)
                for c in range(0, dim, 16):
                    rows = simd.load_rows(group, sums + 4 * c, row_bytes)
                    for t in range(count):
                        x = simd.load(kv, v + (t * dim + c) * element)
                        rows = simd.mix_rows(rows, x, weights + 4 * t, 64)
                    simd.store_rows(rows, sums + 4 * c, row_bytes)
                token = stop

            out = a.out + (row * per_split * group + first_head) * dim * io_element
            first_part = simd.scalar_int32(a.row_parts + 4 * row)
            part_bytes = group * (row_bytes + 64)
            if first_part >= 0:
                first_split = 0
                if a.window > 0:
                    first_split = max(0, context - a.window) // SPLIT_TOKENS
                splits = (context - 1) // SPLIT_TOKENS + 1 - first_split
                stride = per_split * part_bytes
                parts = a.parts + first_part * stride + lane * part_bytes
                mine = parts + (split - first_split) * stride
                for g in range(group):
                    for i in range(0, dim, 16):
                        x = simd.load_float32(sums + g * row_bytes + 4 * i)
                        simd.store_float32(mine + g * row_bytes + 4 * i, x)
                    at = mine + group * row_bytes + 64 * g
                    simd.put_float32(at, simd.scalar_float32(maxima + 4 * g))
                    simd.put_float32(at + 4, simd.scalar_float32(totals + 4 * g))
                waiting = a.pending + 8 * (row * per_split + lane)
                if simd.fetch_add(waiting, -1) > 1:
                    continue
                # The last to come merges all parts, in their order.
                simd.fetch_add(waiting, splits)
                for g in range(group):
                    at = parts + group * row_bytes + 64 * g
                    new = np.float32(-np.inf)
                    for s in range(splits):
                        x = simd.scalar_float32(at + s * stride)
                        if x > new:
                            new = x
                    total = np.float32(0.0)
                    for i in range(0, dim, 16):
                        simd.store_float32(sums + g * row_bytes + 4 * i, zero)
                    for s in range(splits):
                        fade = simd.exp(simd.splat(simd.scalar_float32(at + s * stride) - new))
                        total += simd.first(fade) * simd.scalar_float32(at + s * stride + 4)
                        for i in range(g * row_bytes, g * row_bytes + row_bytes, 64):
                            x = simd.load_float32(parts + s * stride + i)
                            y = simd.load_float32(sums + i)
                            simd.store_float32(sums + i, simd.fma(x, fade, y))
                    simd.put_float32(totals + 4 * g, total)
            for g in range(group):
                by = simd.splat(simd.scalar_float32(totals + 4 * g))
                for i in range(0, dim, 16):
                    x = simd.load_float32(sums + g * row_bytes + 4 * i)
                    simd.store(io, out + (g * dim + i) * io_element, simd.div(x, by))

    return compile_kernel(paged_decode, DecodeArguments)
