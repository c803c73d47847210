"""What lies between the matrices of a layer: norms, activations, rotary positions and KV writes.

Everything is computed in float32 and rounded where the plain torch version rounds.
"""

import ctypes
import math
from functools import cache

import numpy as np
from numba import carray

from common.engine.kernels.cpu import simd
from common.engine.kernels.cpu.launch import Kernel, compile_kernel, fields


class TakeArguments(ctypes.Structure):
    """Addresses. x [any, row_bytes], of which the rows [num_items] int64 go to out."""

    _fields_ = fields("x rows out row_bytes")


@cache
def take_kernel() -> Kernel:
    """For rows of whole vectors, 64 bytes each."""

    def take(address):
        a = carray(address, 1)[0]
        next_item = simd.address_of(address)
        while True:
            row = simd.fetch_add(next_item, 1)
            if row >= a.num_items:
                break
            source = a.x + simd.scalar_int64(a.rows + 8 * row) * a.row_bytes
            for i in range(0, a.row_bytes, 64):
                x = simd.load_float32(source + i)
                simd.store_float32(a.out + row * a.row_bytes + i, x)

    return compile_kernel(take, TakeArguments)


class NormArguments(ctypes.Structure):
    """Addresses. x, delta, out [num_items, width]; weight [width]. delta 0: none. x gets the
    sum, out its RMSNorm."""

    _fields_ = (*fields("x delta weight out width"), ("eps", ctypes.c_double))


@cache
def add_norm_kernel(io: int) -> Kernel:
    """io: simd's kind of all four."""
    element = (4, 2)[io]

    def add_norm(address):
        a = carray(address, 1)[0]
        next_item = simd.address_of(address)
        while True:
            row = simd.fetch_add(next_item, 1)
            if row >= a.num_items:
                break
            offset = row * a.width * element
            squares = simd.splat(np.float32(0.0))
            for i in range(0, a.width * element, 16 * element):
                x = simd.load(io, a.x + offset + i)
                if a.delta != 0:
                    x = simd.add(x, simd.load(io, a.delta + offset + i))
                    simd.store(io, a.x + offset + i, x)
                    x = simd.load(io, a.x + offset + i)
                squares = simd.fma(x, x, squares)
            mean = simd.total(squares) / np.float32(a.width)
            factor = simd.splat(np.float32(1.0) / np.float32(math.sqrt(mean + np.float32(a.eps))))
            for i in range(0, a.width * element, 16 * element):
                x = simd.mul(simd.load(io, a.x + offset + i), factor)
                simd.store(io, a.out + offset + i, simd.mul(x, simd.load(io, a.weight + i)))

    return compile_kernel(add_norm, NormArguments)


class SiluArguments(ctypes.Structure):
    """Addresses. gate_up [num_items, 2 * width], out [num_items, width]."""

    _fields_ = fields("gate_up out width")


@cache
def silu_mul_kernel(io: int) -> Kernel:
    """io: simd's kind of both."""
    element = (4, 2)[io]

    def silu_mul(address):
        a = carray(address, 1)[0]
        next_item = simd.address_of(address)
        bytes_ = a.width * element
        one = simd.splat(np.float32(1.0))
        while True:
            row = simd.fetch_add(next_item, 1)
            if row >= a.num_items:
                break
            for i in range(0, bytes_, 16 * element):
                gate = simd.load(io, a.gate_up + 2 * row * bytes_ + i)
                up = simd.load(io, a.gate_up + (2 * row + 1) * bytes_ + i)
                below = simd.exp(simd.mul(gate, simd.splat(np.float32(-1.0))))
                x = simd.div(gate, simd.add(one, below))
                simd.store(io, a.out + row * bytes_ + i, simd.mul(x, up))

    return compile_kernel(silu_mul, SiluArguments)


class WriteArguments(ctypes.Structure):
    """Addresses, sizes in bytes unless said otherwise. One item is one token.

    qkv           [num_items, heads + 2 * kv_heads, head_dim]; q is turned in place
    positions     [num_items] int64
    slots         [num_items] int64, block * block_size + offset
    cos, sin      [positions, head_dim] float32, sin's first half negated
    cache, scales the layer's payload and scales of block 0, of the first KV head (scales 0:
                  none); blocks are block_bytes apart and have block_heads KV heads
    static        [2, kv_heads] float32: scales to quantize by; 0: amax / 448 of each vector
    """

    _fields_ = fields(
        "qkv positions slots cos sin cache scales static block_bytes block_size block_heads "
        "heads kv_heads head_dim"
    )


@cache
def write_kernel(kv: int, io: int) -> Kernel:
    """kv and io: simd's kind of the cache's and of qkv's numbers."""
    element = (4, 2, 1)[kv]
    has_scales = kv == simd.E4M3
    io_element = (4, 2)[io]

    def rope_and_write(address):
        a = carray(address, 1)[0]
        next_item = simd.address_of(address)
        dim = a.head_dim
        half = dim // 2
        turned = a.heads + a.kv_heads
        limit = np.float32(3.4028234663852886e38)
        while True:
            row = simd.fetch_add(next_item, 1)
            if row >= a.num_items:
                break
            slot = simd.scalar_int64(a.slots + 8 * row)
            block = slot // a.block_size * a.block_bytes
            inside = slot % a.block_size
            table = 4 * dim * simd.scalar_int64(a.positions + 8 * row)
            source = a.qkv + row * (turned + a.kv_heads) * dim * io_element
            for head in range(turned):
                x = source + head * dim * io_element
                for i in range(0, half, 16):
                    low = simd.load(io, x + i * io_element)
                    high = simd.load(io, x + (half + i) * io_element)
                    cos = simd.load_float32(a.cos + table + 4 * i)
                    minus_sin = simd.load_float32(a.sin + table + 4 * i)
                    new = simd.fma(high, minus_sin, simd.mul(low, cos))
                    cos = simd.load_float32(a.cos + table + 4 * (half + i))
                    sin = simd.load_float32(a.sin + table + 4 * (half + i))
                    simd.store(io, x + i * io_element, new)
                    new = simd.fma(low, sin, simd.mul(high, cos))
                    simd.store(io, x + (half + i) * io_element, new)
            for head in range(2 * a.kv_heads):
                x = source + (a.heads + head) * dim * io_element
                place = head * a.block_size + inside
                if head >= a.kv_heads:
                    place += (a.block_heads - a.kv_heads) * a.block_size
                target = a.cache + block + place * dim * element
                divisor = simd.splat(np.float32(1.0))
                if has_scales:
                    sizes = simd.splat(np.float32(0.0))
                    for i in range(0, dim, 16):
                        sizes = simd.larger_size(sizes, simd.load(io, x + i * io_element))
                    largest = simd.largest_size(sizes)
                    if largest > limit:
                        largest = limit
                    scale = largest / np.float32(448.0)
                    if a.static != 0:
                        scale = simd.scalar_float32(a.static + 4 * head)
                    simd.put_float32(a.scales + block + 4 * place, scale)
                    if scale != np.float32(0.0):
                        divisor = simd.splat(scale)
                for i in range(0, dim, 16):
                    y = simd.load(io, x + i * io_element)
                    if has_scales:
                        y = simd.div(simd.clamp(y, limit), divisor)
                        y = simd.clamp(y, np.float32(448.0))
                    simd.store(kv, target + i * element, y)

    return compile_kernel(rope_and_write, WriteArguments)
