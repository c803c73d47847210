"""Products with FP8 matrices on a CPU, one byte a weight in memory.

Every e4m3 value is exact in bfloat16, so matrix and input, quantized as its scheme says, are
multiplied as pairs of bfloat16, with sums in float32: what FP8 tensor cores with float32
accumulation compute. Row scales are factors of the sum; block scales of the sums of 128 terms,
which are added up in float32 (DeepSeek-AI 2024, DeepSeek-V3).

The matrix lies in panels as in `matmul`, of bytes. A few rows have them decoded in registers; for
many, a chunk of a panel is decoded once for all of an item's tiles. Either way a sum goes
along the row in one order: a row's bits depend on that row alone.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from numba import carray

from common.engine.kernels.cpu import e4m3, elementwise, simd, tiles
from common.engine.kernels.cpu.launch import (
    KIND,
    Kernel,
    compile_kernel,
    empty,
    fields,
    spread,
    threads_for,
)
from common.engine.quantization.scheme import BLOCK, Activation
from common.engine.weight import Weight

LANES, BFLOAT16 = simd.LANES, simd.BFLOAT16
PANEL = 2 * LANES
# Rows of a work item, a multiple of 4.
ITEM_ROWS = 192
# Rows, one or two, for which an item is two panels.
PAIR_ROWS = 2
# Rows for which decoding in registers is quicker than doing it once for all.
FEW_ROWS = 16
# How far ahead of the products a panel is fetched, in bytes.
AHEAD = 4096
# A product with fewer multiplications is done sooner than a second thread has begun it.
PRODUCTS_PER_THREAD = 2**17

STEPS = BLOCK // 2  # of a block's columns
STEP = e4m3.STEP_BYTES
# Columns that are decoded together: few enough for a core's first cache, enough for rows of x to
# be read in long runs.
CHUNK_STEPS = 2 * STEPS
DECODED_BYTES = 2 * STEP * CHUNK_STEPS
SUMS_BYTES = 4 * PANEL * ITEM_ROWS


class MultiplyArguments(ctypes.Structure):
    """Addresses and sizes. An item is a panel for ITEM_ROWS rows, or two for all of PAIR_ROWS.

    x         [rows, width] bfloat16 that are e4m3 values, rows x_stride bytes apart
    x_scales  [rows, blocks] float32 for block scales, else [rows]
    weights   [panels, width / 2, 64], as `e4m3.pack` has them
    scales    [columns / 128 rounded up, blocks] float32 for block scales, else [panels * 32]
    bias      [panels * 32] float32
    out       [rows, columns], contiguous
    blocks    width / 128, rounded up
    """

    _fields_ = fields(
        "x x_stride x_scales weights scales bias out rows columns width panels blocks"
    )


@simd.part
def finish_tile(has_blocks, io, a, panel, row, tile):
    """Rows `row` and up of the result, from sums."""
    column, out_stride = panel * PANEL, a.columns * simd.size(io)
    if not has_blocks:
        tile = e4m3.scale_tile(tile, a.x_scales + 4 * row, 4, a.scales + 4 * column)
    tile = e4m3.add_row(tile, a.bias + 4 * column)
    out, left = a.out + row * out_stride + column * simd.size(io), a.columns - column
    tiles.store_half(io, 0, tile, out, out_stride, left)
    if left > LANES:
        tiles.store_half(io, 1, tile, out, out_stride, left)


@simd.part
def add_block(a, panel, row, block, tile, part):
    """tile and the sums of a block's terms, times their scales."""
    scale = simd.scalar_float32(a.scales + 4 * (panel * PANEL // BLOCK * a.blocks + block))
    x_scales = a.x_scales + 4 * (row * a.blocks + block)
    return e4m3.add_scaled(tile, part, x_scales, 4 * a.blocks, scale)


@simd.part
def multiply_few(has_blocks, io, native, size, a, panel, first, last):
    """The rows [first, last), `size` at once; the last tile begins earlier rather than ending
    later. Decodes in registers."""
    steps = a.width // 2
    row = first
    while row < last:
        at = min(row, last - size)
        x = a.x + at * a.x_stride
        weights = a.weights + panel * steps * STEP
        tile = e4m3.zero_tile(size)
        for start in range(0, steps, STEPS if has_blocks else steps):
            part = e4m3.zero_tile(size)
            for step in range(start, min(start + STEPS, steps) if has_blocks else steps):
                simd.prefetch(weights + AHEAD)
                part = e4m3.add_step(native, part, x + 4 * step, a.x_stride, weights)
                weights += STEP
            tile = add_block(a, panel, at, start // STEPS, tile, part) if has_blocks else part
        finish_tile(has_blocks, io, a, panel, at, tile)
        row += size


@simd.part
def multiply_pair(has_blocks, io, native, size, a, panel, other):
    """The same for `size` rows, all there are, and two panels: one or two rows alone have too few
    sums under way for a core, since each waits for the one before."""
    steps = a.width // 2
    weights, others = a.weights + panel * steps * STEP, a.weights + other * steps * STEP
    tile, other_tile = e4m3.zero_tile(size), e4m3.zero_tile(size)
    for start in range(0, steps, STEPS if has_blocks else steps):
        part, other_part = e4m3.zero_tile(size), e4m3.zero_tile(size)
        for step in range(start, min(start + STEPS, steps) if has_blocks else steps):
            simd.prefetch(weights + AHEAD)
            simd.prefetch(others + AHEAD)
            x = a.x + 4 * step
            part = e4m3.add_step(native, part, x, a.x_stride, weights)
            other_part = e4m3.add_step(native, other_part, x, a.x_stride, others)
            weights += STEP
            others += STEP
        if has_blocks:
            tile = add_block(a, panel, 0, start // STEPS, tile, part)
            other_tile = add_block(a, other, 0, start // STEPS, other_tile, other_part)
        else:
            tile, other_tile = part, other_part
    finish_tile(has_blocks, io, a, panel, 0, tile)
    finish_tile(has_blocks, io, a, other, 0, other_tile)


@simd.part
def multiply_chunk(has_blocks, native, size, a, panel, first, last, start, count, decoded, sums):
    """Of the rows [first, last), `size` at once as above: adds the products of `count` steps from
    `start` on, which are at `decoded` for this panel, to the tiles at `sums`. Where these end."""
    row = first
    while row < last:
        at = min(row, last - size)
        x = a.x + at * a.x_stride + 4 * start
        tile = e4m3.load_tile(size, sums)
        for begin in range(0, count, STEPS if has_blocks else count):
            part = e4m3.zero_tile(size) if has_blocks else tile
            for step in range(begin, min(begin + STEPS, count) if has_blocks else count):
                weights = decoded + 2 * STEP * step
                part = tiles.add_step(BFLOAT16, native, part, x + 4 * step, a.x_stride, weights)
            block = (start + begin) // STEPS
            tile = add_block(a, panel, at, block, tile, part) if has_blocks else part
        tiles.store_rows(tile, sums, 64)
        row += size
        sums += 4 * PANEL * size
    return sums


@simd.part
def finish_tiles(has_blocks, io, size, a, panel, first, last, sums):
    """The rows [first, last) of the result, from the tiles at `sums`. Where these end."""
    row = first
    while row < last:
        at = min(row, last - size)
        finish_tile(has_blocks, io, a, panel, at, e4m3.load_tile(size, sums))
        row += size
        sums += 4 * PANEL * size
    return sums


@simd.part
def multiply_many(has_blocks, io, native, a, panel, first, last):
    """The rows [first, last), 8 to ITEM_ROWS: each chunk of columns is decoded once and multiplied
    by all tiles' part of x. Their sums wait in memory."""
    decoded, sums = e4m3.stack(DECODED_BYTES), e4m3.stack(SUMS_BYTES)
    steps = a.width // 2
    weights = a.weights + panel * steps * STEP
    e4m3.clear(sums, SUMS_BYTES)
    # Tiles of 12 and, at the end, up to two of 8: as few rows as can be.
    fours = (last - first + 3) // 4
    eights = 2 * fours % 3
    middle = first + 4 * (fours - 2 * eights) if eights > 0 else last
    for start in range(0, steps, CHUNK_STEPS):
        count = min(CHUNK_STEPS, steps - start)
        for step in range(count):
            simd.prefetch(weights + AHEAD)
            e4m3.unpack_step(native, weights, decoded + 2 * STEP * step)
            weights += STEP
        place = multiply_chunk(
            has_blocks, native, 12, a, panel, first, middle, start, count, decoded, sums
        )
        multiply_chunk(has_blocks, native, 8, a, panel, middle, last, start, count, decoded, place)
    place = finish_tiles(has_blocks, io, 12, a, panel, first, middle, sums)
    finish_tiles(has_blocks, io, 8, a, panel, middle, last, place)


@cache
def multiply_kernel(has_blocks: bool, io: int, native: bool) -> Kernel:
    """io: simd's kind of out; native: as `e4m3.NATIVE`."""

    def multiply(address):
        a = carray(address, 1)[0]
        next_item = simd.address_of(address)
        while True:
            item = simd.fetch_add(next_item, 1)
            if item >= a.num_items:
                break
            if a.rows <= PAIR_ROWS:
                panel, other = 2 * item, min(2 * item + 1, a.panels - 1)
                if a.rows == 1:
                    multiply_pair(has_blocks, io, native, 1, a, panel, other)
                else:
                    multiply_pair(has_blocks, io, native, 2, a, panel, other)
                continue
            panel, first = item % a.panels, item // a.panels * ITEM_ROWS
            last = min(first + ITEM_ROWS, a.rows)
            count = last - first
            if count > FEW_ROWS:
                multiply_many(has_blocks, io, native, a, panel, first, last)
            elif count >= 8:
                multiply_few(has_blocks, io, native, 8, a, panel, first, last)
            elif count >= 4:
                multiply_few(has_blocks, io, native, 4, a, panel, first, last)
            elif count >= 2:
                multiply_few(has_blocks, io, native, 2, a, panel, first, last)
            else:
                multiply_few(has_blocks, io, native, 1, a, panel, first, last)

    return compile_kernel(multiply, MultiplyArguments)


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows as an Fp8Linear multiplies them.

    values  [n, in] bfloat16 that are e4m3 values, each row contiguous
    scales  [n, 1], or [n, in / 128] rounded up, float32
    dtype   of what they were made from, and of the product
    """

    values: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype


def fits(weight: Weight) -> bool:
    """Whether Fp8Linear takes this matrix [out, in]: `in` is a multiple of 16."""
    return weight.values.shape[1] % LANES == 0


class Fp8Linear:
    """See `Linear`. For matrices that fit. The matrix itself is not kept."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None) -> None:
        self.out, self.width = weight.values.shape
        self.has_blocks = weight.activation is Activation.GROUP
        self.packed = e4m3.pack(weight.values)
        # What its input is divided by, as QuantizeArguments has it.
        self.columns = BLOCK if self.has_blocks else self.width
        self.groups = -(-self.width // self.columns)
        self.input_scale = None if weight.input_scale is None else weight.input_scale.contiguous()
        padded = len(self.packed) * PANEL
        self.scales, self.bias = weight.scale.contiguous(), torch.zeros(padded)
        if not self.has_blocks:
            self.scales = torch.zeros(padded)
            self.scales[: self.out] = weight.scale.view(-1)
        if bias is not None:
            self.bias[: self.out] = bias
        a = self._arguments = MultiplyArguments()
        a.weights, a.scales = self.packed.data_ptr(), self.scales.data_ptr()
        a.bias, a.blocks = self.bias.data_ptr(), -(-self.width // BLOCK)
        a.columns, a.width, a.panels = self.out, self.width, len(self.packed)
        self._quantize = elementwise.QuantizeArguments()

    def results(self, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, Quantized]:
        """Memory for a kernel that computes its input: [rows, in] of this dtype, and the same
        memory as what quantizing that in place makes of it."""
        out = spread(rows, self.width, dtype)
        values = out.view(torch.bfloat16)[:, : self.width]
        return out, Quantized(values, empty(rows, self.groups, torch.float32), dtype)

    def describe(self, a: ctypes.Structure, x: Quantized) -> None:
        """Tells such a kernel, by its arguments, to quantize what it computes."""
        a.scales, a.columns = x.scales.data_ptr(), self.columns
        a.static = 0 if self.input_scale is None else self.input_scale.data_ptr()

    def quantize(self, x: torch.Tensor) -> Quantized:
        """x [n, in] as this matrix has its input."""
        x = x.contiguous()
        out, made = self.results(len(x), x.dtype)
        a = self._quantize
        a.x, a.out, a.width = x.data_ptr(), out.data_ptr(), self.width
        a.out_stride = out.stride(0) * x.element_size()
        self.describe(a, made)
        elementwise.quantize_kernel(KIND[x.dtype]).run(a, len(x), threads_for(2 * x.numel()))
        return made

    def __call__(self, x: torch.Tensor | Quantized) -> torch.Tensor:
        if not isinstance(x, Quantized):
            x = self.quantize(x)
        rows = len(x.values)
        out = empty(rows, self.out, x.dtype)
        if rows == 0:
            return out
        a = self._arguments
        a.x, a.x_stride = x.values.data_ptr(), 2 * x.values.stride(0)
        a.x_scales, a.out, a.rows = x.scales.data_ptr(), out.data_ptr(), rows
        items = a.panels * -(-rows // ITEM_ROWS) if rows > PAIR_ROWS else -(-a.panels // 2)
        products = rows * self.out * self.width
        threads = min(torch.get_num_threads(), 1 + products // PRODUCTS_PER_THREAD)
        multiply_kernel(self.has_blocks, KIND[x.dtype], e4m3.NATIVE).run(a, items, threads)
        return out
