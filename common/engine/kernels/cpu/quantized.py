"""FP8 matrices on a CPU, one byte a weight in memory: e4m3 becomes float32 in registers.

For few tokens, where reading the weights is what takes the time, a kernel multiplies as it reads
them. For many, tiles of the matrix are turned into float32, which stays in the cache, for torch's
float32 product. Products of e4m3 values are exact in float32, sums are float32, row scales are
factors of the sum and block scales of the sums of 128 terms (DeepSeek-AI 2024, DeepSeek-V3).
"""

import ctypes
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numba import carray

from common.engine.kernels.cpu import simd, tiles
from common.engine.kernels.cpu.launch import KIND, Kernel, compile_kernel, fields
from common.engine.quantization.scheme import BLOCK, Activation
from common.engine.weight import Weight

LANES = simd.LANES
# Tokens that the kernel can have at once, their sums in registers. For more, tiles for torch are
# faster (4096 x 4096, one thread: 6 ms both ways at 8 tokens; 10 and 8 ms at 16).
GROUPS = (1, 4, 8)
# Of a tile in float32.
TILE_BYTES = 2**22
FLOAT32_MAX = 3.4028234663852886e38


class QuantizeArguments(ctypes.Structure):
    """Addresses. One item is a row.

    x       [num_items, width]
    out     [num_items, width] float32: e4m3 values, times their scale if `scaled`
    scales  [num_items, width / columns rounded up] float32
    fixed   one float32: the scale of all; 0: amax / 448 of each
    """

    _fields_ = fields("x out scales fixed width columns scaled")


@cache
def quantize_kernel(io: int) -> Kernel:
    """io: simd's kind of x."""
    element = (4, 2)[io]

    def quantize(address):
        a = carray(address, 1)[0]
        next_item = simd.address_of(address)
        limit = np.float32(FLOAT32_MAX)
        groups = (a.width + a.columns - 1) // a.columns
        while True:
            row = simd.fetch_add(next_item, 1)
            if row >= a.num_items:
                break
            for group in range(groups):
                start = row * a.width + group * a.columns
                count = min(a.columns, a.width - group * a.columns)
                x, out = a.x + start * element, a.out + 4 * start
                if a.fixed != 0:
                    scale = simd.scalar_float32(a.fixed)
                else:
                    sizes = simd.splat(np.float32(0.0))
                    for i in range(0, count, 16):
                        sizes = simd.larger_size(sizes, simd.load(io, x + i * element))
                    largest = simd.largest_size(sizes)
                    if largest > limit:
                        largest = limit
                    scale = largest / np.float32(448.0)
                simd.put_float32(a.scales + 4 * (row * groups + group), scale)
                divisor = simd.splat(scale)
                if scale == np.float32(0.0):
                    divisor = simd.splat(np.float32(1.0))
                factor = simd.splat(np.float32(1.0))
                if a.scaled != 0:
                    factor = simd.splat(scale)
                for i in range(0, count, 16):
                    y = simd.div(simd.clamp(simd.load(io, x + i * element), limit), divisor)
                    simd.store_e4m3(out + 4 * i, simd.clamp(y, np.float32(448.0)))
                    rounded = simd.load_e4m3(out + 4 * i)
                    simd.store_float32(out + 4 * i, simd.mul(rounded, factor))

    return compile_kernel(quantize, QuantizeArguments)


class DecodeArguments(ctypes.Structure):
    """Addresses. One item is a row of weights [num_items, width] e4m3, out float32, times the
    scales of its blocks if there are any: those of the row are scales_width, of float32, apart."""

    _fields_ = fields("weights out scales scales_width first_row width")


@cache
def decode_kernel(has_blocks: bool) -> Kernel:
    def decode(address):
        a = carray(address, 1)[0]
        next_item = simd.address_of(address)
        while True:
            row = simd.fetch_add(next_item, 1)
            if row >= a.num_items:
                break
            weights, out = a.weights + row * a.width, a.out + 4 * row * a.width
            scales = a.scales + 4 * ((a.first_row + row) // BLOCK) * a.scales_width
            for k in range(0, a.width, 16):
                value = simd.load_e4m3_number(weights + k)
                if has_blocks:
                    scale = simd.scalar_float32(scales + 4 * (k // BLOCK))
                    value = simd.mul(value, simd.splat(scale))
                simd.store_float32(out + 4 * k, value)

    return compile_kernel(decode, DecodeArguments)


class MultiplyArguments(ctypes.Structure):
    """Addresses. One item is 16 rows of weights, for all tokens.

    x            [group, width] float32, e4m3 values
    x_scales     [tokens, width / 128 rounded up] float32 for block scales, else [tokens]
    weights      [16 * num_items, width] e4m3
    scales       [rows / 128, width / 128] rounded up, float32, else one for each row
    bias         [16 * num_items] float32; 0: none
    out          [tokens, 16 * num_items]
    scratch      scratch_bytes for each thread
    """

    _fields_ = fields("x x_scales weights scales bias out width tokens scratch scratch_bytes")


def scratch_bytes(group: int) -> int:
    """Of a thread: 16 sums of each token [group, 16, 16], sums of a block [group, 16]."""
    return 4 * group * LANES * (LANES + 1)


@cache
def multiply_kernel(has_blocks: bool, io: int, group: int) -> Kernel:
    """io: simd's kind of out; group: tokens at once."""
    element = (4, 2)[io]
    sums_bytes = 4 * LANES * LANES

    def multiply(address):
        a = carray(address, 1)[0]
        next_item = simd.address_of(address)
        thread = simd.fetch_add(next_item + 8, 1)
        sums = a.scratch + thread * a.scratch_bytes
        part = sums + group * sums_bytes
        row_bytes = 4 * a.width
        columns = BLOCK if has_blocks else a.width
        blocks = (a.width + columns - 1) // columns
        outs = LANES * a.num_items
        while True:
            item = simd.fetch_add(next_item, 1)
            if item >= a.num_items:
                break
            for r in range(LANES):
                row = item * LANES + r
                weights = a.weights + row * a.width
                if has_blocks:
                    for g in range(group):
                        zero = simd.splat(np.float32(0.0))
                        simd.store_float32(sums + g * sums_bytes + 64 * r, zero)
                for block in range(blocks):
                    start = block * columns
                    acc = tiles.zero_rows(group)
                    for k in range(start, min(start + columns, a.width), 16):
                        w = simd.load_e4m3_number(weights + k)
                        acc = tiles.dot_rows(acc, w, a.x + 4 * k, row_bytes)
                    if not has_blocks:
                        tiles.store_rows(acc, sums + 64 * r, sums_bytes)
                        continue
                    tiles.store_rows(acc, part, 64)
                    scale = simd.scalar_float32(a.scales + 4 * ((row // BLOCK) * blocks + block))
                    for g in range(a.tokens):
                        of_x = simd.scalar_float32(a.x_scales + 4 * (g * blocks + block))
                        place = sums + g * sums_bytes + 64 * r
                        total = simd.fma(
                            simd.load_float32(part + 64 * g),
                            simd.splat(scale * of_x),
                            simd.load_float32(place),
                        )
                        simd.store_float32(place, total)
            for g in range(a.tokens):
                value = tiles.totals(sums + g * sums_bytes)
                if not has_blocks:
                    of_x = simd.scalar_float32(a.x_scales + 4 * g)
                    value = simd.mul(value, simd.splat(of_x))
                    value = simd.mul(value, simd.load_float32(a.scales + 64 * item))
                if a.bias != 0:
                    value = simd.add(value, simd.load_float32(a.bias + 64 * item))
                place = g * outs + LANES * item
                simd.store(io, a.out + place * element, value)

    return compile_kernel(multiply, MultiplyArguments)


@cache
def warm(has_blocks: bool, io: int) -> None:
    """Compiles all that a matrix may need, so that no later step waits for it."""
    quantize_kernel(io)
    decode_kernel(has_blocks)
    for group in GROUPS:
        multiply_kernel(has_blocks, io, group)


def multiply_float32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T: by oneDNN where torch has it, twice as fast as its other library on some CPUs,
    also with a matrix that is not laid out for it."""
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def fits(weight: Weight) -> bool:
    """Whether Fp8Linear takes this matrix: its sizes are multiples of 16."""
    return all(size % LANES == 0 for size in weight.values.shape)


class Fp8Linear:
    """See `Linear`. For matrices that fit."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None) -> None:
        self.out, self.width = weight.values.shape
        self.weights = weight.values.contiguous()
        self.scales = weight.scale.contiguous()
        self.has_blocks = weight.activation is Activation.GROUP
        self.columns = BLOCK if self.has_blocks else self.width
        self.groups = -(-self.width // self.columns)
        self.fixed = None if weight.input_scale is None else weight.input_scale.contiguous()
        self.bias = None if bias is None else bias.float()
        self._quantize = QuantizeArguments()
        self._decode = DecodeArguments()
        self._multiply = MultiplyArguments()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 0:
            return x.new_empty(0, self.out)
        warm(self.has_blocks, KIND[x.dtype])
        return self._few(x) if len(x) <= GROUPS[-1] else self._many(x)

    def _input(self, x: torch.Tensor, rows: int, scaled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """e4m3 values [rows, in] float32 and scales [tokens, groups]; rows past x are zero."""
        x = x.contiguous()
        values = torch.empty(rows, self.width)
        values[len(x) :] = 0
        scales = torch.empty(len(x), self.groups)
        a = self._quantize
        a.x, a.out, a.scales = x.data_ptr(), values.data_ptr(), scales.data_ptr()
        a.fixed = 0 if self.fixed is None else self.fixed.data_ptr()
        a.width, a.columns, a.scaled = self.width, self.columns, scaled
        threads = torch.get_num_threads() if x.numel() > 16384 else 1
        quantize_kernel(KIND[x.dtype]).run(a, len(x), threads)
        return values, scales

    def _few(self, x: torch.Tensor) -> torch.Tensor:
        tokens, threads = len(x), torch.get_num_threads()
        group = next(g for g in GROUPS if g >= tokens)
        values, scales = self._input(x, group, False)
        out = x.new_empty(tokens, self.out)
        each = scratch_bytes(group)
        scratch = np.empty(threads * each + 64, np.uint8)
        a = self._multiply
        a.x, a.x_scales, a.out = values.data_ptr(), scales.data_ptr(), out.data_ptr()
        a.weights, a.scales = self.weights.data_ptr(), self.scales.data_ptr()
        a.bias = 0 if self.bias is None else self.bias.data_ptr()
        a.width, a.tokens = self.width, tokens
        a.scratch, a.scratch_bytes = -(-scratch.ctypes.data // 64) * 64, each
        kernel = multiply_kernel(self.has_blocks, KIND[x.dtype], group)
        kernel.run(a, self.out // LANES, threads)
        return out

    def _many(self, x: torch.Tensor) -> torch.Tensor:
        values, scales = self._input(x, len(x), self.has_blocks)
        rows = min(self.out, max(LANES, TILE_BYTES // (4 * self.width)))
        tile = torch.empty(rows, self.width)
        out = torch.empty(len(x), self.out)
        a = self._decode
        a.out, a.scales, a.width = tile.data_ptr(), self.scales.data_ptr(), self.width
        a.scales_width = self.groups
        for first in range(0, self.out, rows):
            last = min(first + rows, self.out)
            a.weights, a.first_row = self.weights.data_ptr() + first * self.width, first
            decode_kernel(self.has_blocks).run(a, last - first, torch.get_num_threads())
            out[:, first:last] = multiply_float32(values, tile[: last - first])
        if not self.has_blocks:
            out.mul_(scales).mul_(self.scales.view(-1))
        return (out if self.bias is None else out.add_(self.bias)).to(x.dtype)
