"""What lies between the matrices of a layer: norms, activations, rotary positions and KV writes.

Everything is computed in float32 and rounded where the plain torch version rounds.
"""

import ctypes
import math
from functools import cache

import numpy as np
from numba import carray

from common.engine.kernels.cpu import simd
from common.engine.kernels.cpu.e4m3 import FLOAT32_MAX, quantize_row, scale_of
from common.engine.kernels.cpu.launch import Kernel, compile_kernel, fields

WIDEN_COLUMNS = 4096


@simd.part
def rows_at_once(count):
    """Of `count` rows those that a thread takes at a time: neighbours, which come from memory
    together, and few enough that the threads end at about the same time."""
    return 1 + count // 64


class TakeArguments(ctypes.Structure):
    """Addresses. x [any, row_bytes], its rows `stride` bytes apart, of which the rows [num_items]
    int64 go to out."""

    _fields_ = fields("x rows out row_bytes stride")


@cache
def take_kernel() -> Kernel:
    """For rows of whole vectors, 64 bytes each."""

    def take(address):
        a = carray(address, 1)[0]
        next_item = simd.address_of(address)
        each = rows_at_once(a.num_items)
        while True:
            first = simd.fetch_add(next_item, each)
            if first >= a.num_items:
                break
            for row in range(first, min(first + each, a.num_items)):
                source = a.x + simd.scalar_int64(a.rows + 8 * row) * a.stride
                for i in range(0, a.row_bytes, 64):
                    x = simd.load_float32(source + i)
                    simd.store_float32(a.out + row * a.row_bytes + i, x)

    return compile_kernel(take, TakeArguments)


class WidenArguments(ctypes.Structure):
    """Addresses. x [rows, width], of 16 columns at least, is copied to out, float32. An item is
    WIDEN_COLUMNS of a row, or what is left of them."""

    _fields_ = fields("x out width")


@cache
def widen_kernel(io: int) -> Kernel:
    """io: simd's kind of x."""

    def widen(address):
        a = carray(address, 1)[0]
        next_item = simd.address_of(address)
        pieces = (a.width + WIDEN_COLUMNS - 1) // WIDEN_COLUMNS
        while True:
            item = simd.fetch_add(next_item, 1)
            if item >= a.num_items:
                break
            row, start = item // pieces * a.width, item % pieces * WIDEN_COLUMNS
            for i in range(start, min(start + WIDEN_COLUMNS, a.width), 16):
                # The last vector begins earlier rather than ending later.
                at = row + min(i, a.width - 16)
                simd.store_float32(a.out + 4 * at, simd.load(io, a.x + at * simd.size(io)))

    return compile_kernel(widen, WidenArguments)


class QuantizeArguments(ctypes.Structure):
    """Addresses. x [num_items, width] becomes what e4m3.quantize_row makes of it: `out`, its rows
    out_stride bytes apart, and scales [num_items, width / columns rounded up]."""

    _fields_ = fields("x out out_stride scales static width columns")


@cache
def quantize_kernel(io: int) -> Kernel:
    """io: simd's kind of x."""

    def quantize(address):
        a = carray(address, 1)[0]
        next_item = simd.address_of(address)
        groups = (a.width + a.columns - 1) // a.columns
        each = rows_at_once(a.num_items)
        while True:
            first = simd.fetch_add(next_item, each)
            if first >= a.num_items:
                break
            for row in range(first, min(first + each, a.num_items)):
                x, out = a.x + row * a.width * simd.size(io), a.out + row * a.out_stride
                scales = a.scales + 4 * row * groups
                quantize_row(io, x, out, scales, a.static, a.width, a.columns)

    return compile_kernel(quantize, QuantizeArguments)


class NormArguments(ctypes.Structure):
    """Addresses. x, delta, out [num_items, width], rows of out out_stride bytes apart; weight
    [width]. delta 0: none. x gets the sum, out its RMSNorm, quantized in place where scales is not
    0: see QuantizeArguments."""

    _fields_ = (
        *fields("x delta weight out out_stride width scales static columns"),
        ("eps", ctypes.c_double),
    )


@cache
def add_norm_kernel(io: int) -> Kernel:
    """io: simd's kind of x, delta, weight and out."""
    element = (4, 2)[io]

    def add_norm(address):
        a = carray(address, 1)[0]
        next_item = simd.address_of(address)
        groups = (a.width + a.columns - 1) // a.columns
        each = rows_at_once(a.num_items)
        while True:
            first = simd.fetch_add(next_item, each)
            if first >= a.num_items:
                break
            for row in range(first, min(first + each, a.num_items)):
                offset, out = row * a.width * element, a.out + row * a.out_stride
                squares = simd.splat(np.float32(0.0))
                for i in range(0, a.width * element, 16 * element):
                    x = simd.load(io, a.x + offset + i)
                    if a.delta != 0:
                        x = simd.add(x, simd.load(io, a.delta + offset + i))
                        simd.store(io, a.x + offset + i, x)
                        x = simd.load(io, a.x + offset + i)
                    squares = simd.fma(x, x, squares)
                mean = simd.total(squares) / np.float32(a.width)
                factor = simd.splat(
                    np.float32(1.0) / np.float32(math.sqrt(mean + np.float32(a.eps)))
                )
                for i in range(0, a.width * element, 16 * element):
                    x = simd.mul(simd.load(io, a.x + offset + i), factor)
                    simd.store(io, out + i, simd.mul(x, simd.load(io, a.weight + i)))
                if a.scales != 0:
                    scales = a.scales + 4 * row * groups
                    quantize_row(io, out, out, scales, a.static, a.width, a.columns)

    return compile_kernel(add_norm, NormArguments)


class SiluArguments(ctypes.Structure):
    """Addresses. gate_up [num_items, 2 * width], out [num_items, width], its rows out_stride bytes
    apart, quantized in place where scales is not 0: see QuantizeArguments."""

    _fields_ = fields("gate_up out out_stride width scales static columns")


@cache
def silu_mul_kernel(io: int) -> Kernel:
    """io: simd's kind of gate_up and out."""
    element = (4, 2)[io]

    def silu_mul(address):
        a = carray(address, 1)[0]
        next_item = simd.address_of(address)
        groups = (a.width + a.columns - 1) // a.columns
        bytes_ = a.width * element
        each = rows_at_once(a.num_items)
        while True:
            first = simd.fetch_add(next_item, each)
            if first >= a.num_items:
                break
            for row in range(first, min(first + each, a.num_items)):
                out = a.out + row * a.out_stride
                for i in range(0, bytes_, 16 * element):
                    gate = simd.load(io, a.gate_up + 2 * row * bytes_ + i)
                    up = simd.load(io, a.gate_up + (2 * row + 1) * bytes_ + i)
                    simd.store(io, out + i, simd.silu_mul(gate, up))
                if a.scales != 0:
                    scales = a.scales + 4 * row * groups
                    quantize_row(io, out, out, scales, a.static, a.width, a.columns)

    return compile_kernel(silu_mul, SiluArguments)


class WriteArguments(ctypes.Structure):
    """Addresses, sizes in bytes unless said otherwise. One item is one token.

    qkv           [num_items, heads + 2 * kv_heads, head_dim]; q and k are changed in place
    norm          [heads + kv_heads, head_dim], weights of an RMSNorm of q and k; 0: none
    positions     [num_items] int64
    slots         [num_items] int64, block * block_size + offset
    cos, sin      [positions, head_dim] float32, sin's first half negated
    signs         [16, 16] float32, a Hadamard matrix, where q and k are rotated; 0: they are not
    cache, scales the layer's payload and scales of block 0, of the first KV head (scales 0:
                  none); blocks are block_bytes apart and have block_heads KV heads
    static        [2, kv_heads] float32: scales to quantize by; 0: amax / 448 of each vector
    scratch       scratch_bytes for each thread, head_dim float32 at least
    """

    _fields_ = (
        *fields(
            "qkv norm positions slots cos sin signs cache scales static block_bytes block_size "
            "block_heads heads kv_heads head_dim scratch scratch_bytes"
        ),
        ("eps", ctypes.c_double),
    )


@simd.part
def norm_head(io, x, weight, dim, eps):
    """RMSNorm in place, rounded before and after the weight."""
    squares = simd.splat(np.float32(0.0))
    for i in range(0, dim * simd.size(io), 16 * simd.size(io)):
        y = simd.load(io, x + i)
        squares = simd.fma(y, y, squares)
    mean = simd.total(squares) / np.float32(dim)
    factor = simd.splat(np.float32(1.0) / np.float32(math.sqrt(mean + np.float32(eps))))
    for i in range(0, dim * simd.size(io), 16 * simd.size(io)):
        simd.store(io, x + i, simd.mul(simd.load(io, x + i), factor))
        simd.store(io, x + i, simd.mul(simd.load(io, x + i), simd.load(io, weight + i)))


@simd.part
def turn_head(io, x, cos, sin, dim):
    """RoPE in place by the angles at cos and sin."""
    half = dim // 2
    for i in range(0, half, 16):
        low = simd.load(io, x + i * simd.size(io))
        high = simd.load(io, x + (half + i) * simd.size(io))
        new = simd.mul(low, simd.load_float32(cos + 4 * i))
        new = simd.fma(high, simd.load_float32(sin + 4 * i), new)
        simd.store(io, x + i * simd.size(io), new)
        new = simd.mul(high, simd.load_float32(cos + 4 * (half + i)))
        new = simd.fma(low, simd.load_float32(sin + 4 * (half + i)), new)
        simd.store(io, x + (half + i) * simd.size(io), new)


@simd.part
def rotate_head(io, x, dim, signs, scratch):
    """x @ H / sqrt(dim) in place, dim a power of two: H is H_(dim/16) (x) H_16, the latter a
    product with `signs`, the former butterflies of whole vectors (fast Walsh-Hadamard)."""
    minus = simd.splat(np.float32(-1.0))
    for i in range(0, dim, 16):
        simd.store_float32(scratch + 4 * i, simd.load(io, x + i * simd.size(io)))
        y = simd.splat(np.float32(0.0))
        for j in range(16):
            number = simd.splat(simd.scalar_float32(scratch + 4 * (i + j)))
            y = simd.fma(number, simd.load_float32(signs + 64 * j), y)
        simd.store_float32(scratch + 4 * i, y)
    step = 64
    while step < 4 * dim:
        for i in range(0, 4 * dim, 64):
            if i & step == 0:
                low, high = simd.load_float32(scratch + i), simd.load_float32(scratch + i + step)
                simd.store_float32(scratch + i, simd.add(low, high))
                simd.store_float32(scratch + i + step, simd.fma(high, minus, low))
        step *= 2
    by = simd.splat(np.float32(1.0) / np.float32(math.sqrt(np.float32(dim))))
    for i in range(0, dim, 16):
        y = simd.mul(simd.load_float32(scratch + 4 * i), by)
        simd.store(io, x + i * simd.size(io), y)


@simd.part
def write_head(kv, io, x, dim, target, scale):
    """One vector of K or V to `target`; `scale` matters to e4m3 alone."""
    divisor = simd.splat(np.float32(1.0))
    if scale != np.float32(0.0):
        divisor = simd.splat(scale)
    for i in range(0, dim, 16):
        y = simd.load(io, x + i * simd.size(io))
        if kv == simd.E4M3:
            y = simd.div(simd.clamp(y, FLOAT32_MAX), divisor)
            y = simd.clamp(y, np.float32(448.0))
        simd.store(kv, target + i * simd.size(kv), y)


@cache
def write_kernel(kv: int, io: int) -> Kernel:
    """kv and io: simd's kind of the cache's and of qkv's numbers."""

    def form_and_write(address):
        a = carray(address, 1)[0]
        counters = simd.address_of(address)
        scratch = a.scratch + simd.fetch_add(counters + 8, 1) * a.scratch_bytes
        dim, heads, kv_heads = a.head_dim, a.heads, a.kv_heads
        row_bytes = dim * simd.size(io)
        norm, signs = a.norm, a.signs
        each = rows_at_once(a.num_items)
        while True:
            first = simd.fetch_add(counters, each)
            if first >= a.num_items:
                break
            for row in range(first, min(first + each, a.num_items)):
                slot = simd.scalar_int64(a.slots + 8 * row)
                block = slot // a.block_size * a.block_bytes
                inside = slot % a.block_size
                table = 4 * dim * simd.scalar_int64(a.positions + 8 * row)
                source = a.qkv + row * (heads + 2 * kv_heads) * row_bytes
                for head in range(heads + kv_heads):
                    x = source + head * row_bytes
                    if norm != 0:
                        norm_head(io, x, norm + head * row_bytes, dim, a.eps)
                    turn_head(io, x, a.cos + table, a.sin + table, dim)
                    if signs != 0:
                        rotate_head(io, x, dim, signs, scratch)
                for head in range(2 * kv_heads):
                    x = source + (heads + head) * row_bytes
                    place = head * a.block_size + inside
                    if head >= kv_heads:
                        place += (a.block_heads - kv_heads) * a.block_size
                    scale = np.float32(1.0)
                    if kv == simd.E4M3:
                        static = a.static + 4 * head if a.static != 0 else 0
                        scale = scale_of(io, x, dim, static)
                        simd.put_float32(a.scales + block + 4 * place, scale)
                    target = a.cache + block + place * dim * simd.size(kv)
                    write_head(kv, io, x, dim, target, scale)

    return compile_kernel(form_and_write, WriteArguments)
