"""Attention of single query tokens over the paged KV cache.

A context is cut into splits at fixed positions (Flash-Decoding, Dao et al. 2023), whose parts are
merged in order, so that a result depends neither on the other sequences nor on the number of
threads. Of a split come the scores of all its tokens, then their softmax, then the sum of their V,
which the caches fetch during the scores. Pages are read as they are; numbers become float32, or
stay bfloat16 in pairs, in registers, and the query heads of a KV head share each read.
"""

import ctypes
import math
from functools import cache

import numpy as np
from numba import carray

from common.engine.kernels.cpu import simd, tiles
from common.engine.kernels.cpu.launch import Kernel, compile_kernel, fields

TILE_TOKENS = 16  # the lanes of a vector
SPLIT_TOKENS = 256
MAX_GROUP = 8  # query heads at once: their sums stay in registers
# How far ahead of the products K is fetched.
AHEAD_TOKENS = 64
LOG2_E = math.log2(math.e)
# Of a head's scores, with room for a vector that begins at the last, and one past that.
SCORES_BYTES = 4 * (SPLIT_TOKENS + 2 * TILE_TOKENS)


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
    """Of a thread, 4 bytes each: queries and sums [group, head_dim], products [group, 16, 16],
    scores [group, 288], V's scales [288], zeros [head_dim], maxima and totals [16]."""
    numbers = (2 * group + 1) * head_dim + group * 256 + 2 * simd.LANES
    return 4 * numbers + (group + 1) * SCORES_BYTES


@simd.part
def load_queries(io, a, source, count, q):
    """`count` scaled queries, next to each other at `source`, as float32."""
    factor = simd.splat(np.float32(a.scale))
    for i in range(0, count * a.head_dim, 16):
        x = simd.load(io, source + i * simd.size(io))
        simd.store_float32(q + 4 * i, simd.mul(x, factor))


@simd.part
def run_end(a, token, end):
    """Where the tokens end that lie with this one in a page and in a tile, at `end` at most."""
    inside = token % a.block_size
    return min(token - token % TILE_TOKENS + TILE_TOKENS, end, token + a.block_size - inside)


@simd.part
def key_address(kv, a, table, kv_head, token):
    """Where a token's K lies; its V lies block_heads * block_size vectors further."""
    block = simd.scalar_int32(table + 4 * (token // a.block_size)) * a.block_bytes
    vectors = kv_head * a.block_size + token % a.block_size
    return a.cache + block + vectors * a.head_dim * simd.size(kv)


@simd.part
def scale_address(a, table, kv_head, token):
    """Where the scale of a token's K lies; its V's lies block_heads * block_size further."""
    block = simd.scalar_int32(table + 4 * (token // a.block_size)) * a.block_bytes
    return a.scales + block + 4 * (kv_head * a.block_size + token % a.block_size)


@simd.part
def multiply_keys(kv, pairs, group, a, k, count, q, products, ahead):
    """Of `count` tokens and each head 16 numbers whose sum is the score. Meanwhile the caches fetch
    K at `ahead` and these tokens' V, a little at a time, so that no load waits behind it."""
    row_bytes, token_bytes = 4 * a.head_dim, a.head_dim * simd.size(kv)
    to_v = a.block_heads * a.block_size * token_bytes
    for t in range(count):
        for i in range(t * token_bytes, (t + 1) * token_bytes, 64):
            simd.prefetch(ahead + i)
            simd.prefetch(k + to_v + i)
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
def score_tokens(kv, pairs, group, a, table, kv_head, start, end, q, products, scores, v_scales):
    """The scores of the tokens [start, end), -inf after them; of e4m3 the scales of V too."""
    for token in range(start, min(start + AHEAD_TOKENS, end)):
        k = key_address(kv, a, table, kv_head, token)
        for i in range(0, a.head_dim * simd.size(kv), 64):
            simd.prefetch(k + i)
    token = start
    while token < end:
        stop = run_end(a, token, end)
        count, at = stop - token, scores + 4 * (token - start)
        k = key_address(kv, a, table, kv_head, token)
        ahead = k
        if token + AHEAD_TOKENS < end:
            ahead = key_address(kv, a, table, kv_head, token + AHEAD_TOKENS)
        multiply_keys(kv, pairs, group, a, k, count, q, products, ahead)
        for g in range(group):
            x = tiles.totals(products + 1024 * g)
            if kv == simd.E4M3:
                scale = scale_address(a, table, kv_head, token)
                x = simd.mul(x, simd.load_first(scale, count))
            simd.store_float32(at + g * SCORES_BYTES, x)
        if kv == simd.E4M3:
            scale = scale_address(a, table, kv_head, token) + 4 * a.block_heads * a.block_size
            simd.store_float32(v_scales + 4 * (token - start), simd.load_first(scale, count))
        token = stop
    for g in range(group):
        at = scores + 4 * (end - start) + g * SCORES_BYTES
        simd.store_float32(at, simd.splat(np.float32(-np.inf)))


@simd.part
def soften(kv, pairs, group, scale, count, scores, v_scales, maxima, totals):
    """From scores to the weights of V in their place, as bfloat16 where it goes by pairs; one past
    the last is 0. Maxima are of the scores times `scale`, which has them powers of 2."""
    for g in range(group):
        at, bytes_ = scores + g * SCORES_BYTES, 4 * count + 4
        x = simd.splat(np.float32(-np.inf))
        for t in range(0, bytes_, 64):
            x = simd.larger(x, simd.load_float32(at + t))
        largest = simd.largest(x) * scale
        by, shift, total = simd.splat(scale), simd.splat(-largest), simd.splat(np.float32(0.0))
        for t in range(0, bytes_, 64):
            p = simd.exp2(simd.fma(simd.load_float32(at + t), by, shift))
            if pairs:
                # What is summed is what V is multiplied by.
                simd.store_bfloat16(at + t // 2, p)
                p = simd.load_bfloat16(at + t // 2)
            total = simd.add(total, p)
            if kv == simd.E4M3:
                p = simd.mul(p, simd.load_float32(v_scales + t))
            if not pairs:
                simd.store_float32(at + t, p)
        simd.put_float32(maxima + 4 * g, largest)
        simd.put_float32(totals + 4 * g, simd.total(total))


@simd.part
def add_columns(kv, pairs, group, vectors, a, table, kv_head, start, end, c, weights, sums, zeros):
    """The weighted sums of V in the columns from c on, so many vectors of them."""
    token_bytes = a.head_dim * simd.size(kv)
    to_columns = a.block_heads * a.block_size * token_bytes + c * simd.size(kv)
    rows = tiles.zero_columns(group, vectors)
    token, at = start, weights
    while token < end:
        stop = run_end(a, token, end)
        v = key_address(kv, a, table, kv_head, token) + to_columns
        if pairs:
            for _ in range(token, stop - 1, 2):
                rows = tiles.mix_pairs(rows, vectors, at, SCORES_BYTES, v, v + token_bytes)
                v, at = v + 2 * token_bytes, at + 4
            if (stop - token) % 2 == 1:
                rows = tiles.mix_pairs(rows, vectors, at, SCORES_BYTES, v, zeros)
                at += 2
        else:
            for _ in range(token, stop):
                x, y = simd.load(kv, v), simd.load(kv, v + 16 * simd.size(kv))
                rows = tiles.mix_columns(rows, at, SCORES_BYTES, x, y)
                v, at = v + token_bytes, at + 4
        token = stop
    tiles.store_columns(rows, vectors, sums + 4 * c, 4 * a.head_dim)


@simd.part
def attend_tokens(kv, pairs, group, a, table, kv_head, start, end, source, q):
    """A group's queries, in pairs at `source` or float32 at q, over the tokens [start, end) of a
    split; see scratch_bytes."""
    sums = q + group * 4 * a.head_dim
    products = sums + group * 4 * a.head_dim
    scores = products + group * 1024
    v_scales = scores + group * SCORES_BYTES
    zeros = v_scales + SCORES_BYTES
    maxima = zeros + 4 * a.head_dim
    scale = np.float32(LOG2_E)
    x = q
    if pairs:
        scale, x = np.float32(a.scale * LOG2_E), source
    score_tokens(kv, pairs, group, a, table, kv_head, start, end, x, products, scores, v_scales)
    soften(kv, pairs, group, scale, end - start, scores, v_scales, maxima, maxima + 64)
    c = 0
    if pairs and group <= 4:
        # Enough sums at once that none waits for the one before.
        while c < a.head_dim - 32:
            add_columns(kv, pairs, group, 4, a, table, kv_head, start, end, c, scores, sums, zeros)
            c += 64
    while c < a.head_dim:
        add_columns(kv, pairs, group, 2, a, table, kv_head, start, end, c, scores, sums, zeros)
        c += 32


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
            fade = simd.exp2(simd.splat(simd.scalar_float32(at + s * stride) - new))
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
    native: the CPU has products of bfloat16, which it takes where all are bfloat16."""
    pairs = native and kv == io == simd.BFLOAT16

    def paged_decode(address):
        a = carray(address, 1)[0]
        counters = simd.address_of(address)
        dim, row_bytes, lanes = a.head_dim, 4 * a.head_dim, a.kv_heads * a.passes
        q = a.scratch + simd.fetch_add(counters + 8, 1) * a.scratch_bytes
        sums = q + group * row_bytes
        zeros = sums + group * (row_bytes + 1024 + SCORES_BYTES) + SCORES_BYTES
        maxima = zeros + row_bytes
        for i in range(0, row_bytes, 64):
            simd.store_float32(zeros + i, simd.splat(np.float32(0.0)))
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
            source = a.q + row * a.q_stride + head
            if not pairs:
                load_queries(io, a, source, group, q)
            kv_head = lane // a.passes
            attend_tokens(kv, pairs, group, a, table, kv_head, max(start, first), end, source, q)
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
