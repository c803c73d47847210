"""Attention of a chunk of query tokens over the paged KV cache: FlashAttention (Dao et al. 2022).

A work item is a run of a sequence's queries with all heads of one KV head. It goes over the
context in tiles of 64 tokens: K is turned into float32 and transposed, V into float32, and both
products are made of one step, 8 rows by 32 columns in registers. In float32 throughout.
"""

import ctypes
from functools import cache

import numpy as np
from numba import carray

from common.engine.kernels.cpu import simd
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
    16 x 16 block, maxima and totals [rows]."""
    rows = queries_of_item(group) * group
    floats = 2 * (rows + TILE_TOKENS) * head_dim + 8 * TILE_TOKENS + 256 + 2 * rows
    # Whole lines, so that the next thread's begin at one.
    return -(-4 * floats // 64) * 64


@cache
def prefill_kernel(kv: int, io: int, group: int) -> Kernel:
    """kv and io: simd's kind of the cache's and of the queries' numbers; group: heads at once."""
    element = (4, 2, 1)[kv]
    has_scales = kv == simd.E4M3
    io_element = (4, 2)[io]
    most = queries_of_item(group) * group

    def paged_prefill(address):
        a = carray(address, 1)[0]
        next_item = simd.address_of(address)
        dim = a.head_dim
        row_bytes = 4 * dim
        thread = simd.fetch_add(next_item + 8, 1)
        q = a.scratch + thread * a.scratch_bytes
        sums = q + most * row_bytes
        keys = sums + most * row_bytes
        values = keys + 64 * row_bytes
        weights = values + 64 * row_bytes
        block = weights + 8 * 256
        maxima = block + 1024
        totals = maxima + 4 * most
        head_block = a.block_size * dim * element
        zero = simd.splat(np.float32(0.0))
        lowest = np.float32(-np.inf)
        while True:
            item = simd.fetch_add(next_item, 1)
            if item >= a.num_items:
                break
            lanes = a.kv_heads * a.passes
            lane = item % lanes
            at = a.items + 16 * (item // lanes)
            table = a.tables + 4 * a.table_width * simd.scalar_int32(at)
            first_row = simd.scalar_int32(at + 4)
            queries = simd.scalar_int32(at + 8)
            position = simd.scalar_int32(at + 12)
            kv_head = lane // a.passes
            rows = queries * group
            factor = simd.splat(np.float32(a.scale))
            for row in range(most):
                token = row // group
                source = a.q + (first_row + token) * a.q_stride
                source += (lane * group + row % group) * dim * io_element
                for i in range(0, dim, 16):
                    x = zero
                    if row < rows:
                        x = simd.mul(simd.load(io, source + i * io_element), factor)
                    simd.store_float32(q + row * row_bytes + 4 * i, x)
                    simd.store_float32(sums + row * row_bytes + 4 * i, zero)
                simd.put_float32(maxima + 4 * row, lowest)
                simd.put_float32(totals + 4 * row, np.float32(0.0))
            end = position + queries
            start = 0
            if a.window > 0:
                start = max(0, position + 1 - a.window)
            for tile in range(start - start % 64, end, 64):
                # K and V of the tile as float32, K transposed: a column for each token.
                for t in range(0, 64, 16):
                    for c in range(0, dim, 16):
                        for s in range(16):
                            token = tile + t + s
                            x, y = zero, zero
                            if token >= start and token < end:
                                inside = token % a.block_size
                                page = simd.scalar_int32(table + 4 * (token // a.block_size))
                                page *= a.block_bytes
                                k = a.cache + page + kv_head * head_block
                                k += (inside * dim + c) * element
                                x = simd.load(kv, k)
                                y = simd.load(kv, k + a.block_heads * head_block)
                                if has_scales:
                                    k = a.scales + page + 4 * (kv_head * a.block_size + inside)
                                    by = simd.splat(simd.scalar_float32(k))
                                    x = simd.mul(x, by)
                                    k += 4 * a.block_heads * a.block_size
                                    y = simd.mul(y, simd.splat(simd.scalar_float32(k)))
                            simd.store_float32(block + 64 * s, x)
                            simd.store_float32(values + (t + s) * row_bytes + 4 * c, y)
                        simd.transpose(block, keys + 256 * c + 4 * t, 256)
                for row in range(0, rows, 8):
                    last = position + min(row + 7, rows - 1) // group
                    if tile > last:
                        continue
                    for t in range(0, 256, 128):
                        products = simd.zero_rows(16)
                        for d in range(dim):
                            products = simd.add_products(
                                products,
                                q + row * row_bytes + 4 * d,
                                row_bytes,
                                keys + 256 * d + t,
                            )
                        simd.store_block(products, weights + t, 256)
                    for r in range(8):
                        p = weights + 256 * r
                        place = position + (row + r) // group - tile
                        hidden = np.int64(0)
                        if a.window > 0:
                            hidden = max(0, place + 1 - a.window)
                        if place < 63 or hidden > 0:
                            for t in range(0, 64, 16):
                                x = simd.load_float32(p + 4 * t)
                                x = simd.hide_outside(x, hidden - t, place + 1 - t)
                                simd.store_float32(p + 4 * t, x)
                        x = simd.larger(
                            simd.larger(simd.load_float32(p), simd.load_float32(p + 64)),
                            simd.larger(simd.load_float32(p + 128), simd.load_float32(p + 192)),
                        )
                        old = simd.scalar_float32(maxima + 4 * (row + r))
                        new = simd.largest(x)
                        if not new > old:
                            new = old
                        # A row that sees nothing of the tile has no maximum yet.
                        shift = zero
                        if new > lowest:
                            shift = simd.splat(-new)
                        x = zero
                        for t in range(0, 256, 64):
                            y = simd.exp(simd.add(simd.load_float32(p + t), shift))
                            simd.store_float32(p + t, y)
                            x = simd.add(x, y)
                        total = simd.scalar_float32(totals + 4 * (row + r))
                        if new > old:
                            fade = simd.exp(simd.splat(old - new))
                            total *= simd.first(fade)
                            simd.put_float32(maxima + 4 * (row + r), new)
                            for i in range((row + r) * row_bytes, (row + r + 1) * row_bytes, 64):
                                y = simd.load_float32(sums + i)
                                simd.store_float32(sums + i, simd.mul(y, fade))
                        simd.put_float32(totals + 4 * (row + r), total + simd.total(x))
                    for c in range(0, row_bytes, 128):
                        at = sums + row * row_bytes + c
                        products = simd.load_block(at, row_bytes)
                        for t in range(64):
                            products = simd.add_products(
                                products, weights + 4 * t, 256, values + t * row_bytes + c
                            )
                        simd.store_block(products, at, row_bytes)
            out_row = a.kv_heads * a.passes * group * dim * io_element
            for row in range(rows):
                target = a.out + (first_row + row // group) * out_row
                target += (lane * group + row % group) * dim * io_element
                by = simd.splat(simd.scalar_float32(totals + 4 * row))
                for i in range(0, dim, 16):
                    x = simd.load_float32(sums + row * row_bytes + 4 * i)
                    simd.store(io, target + i * io_element, simd.div(x, by))

    return compile_kernel(paged_prefill, PrefillArguments)
