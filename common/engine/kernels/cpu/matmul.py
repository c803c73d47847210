"""Products of float32 and bfloat16 matrices, of one row or of thousands.

The matrix lies in panels of 32 columns of the result (rows of the weight), each read once from its
first byte to its last: bfloat16 in pairs along a row, as AVX-512's dot product of pairs takes them
(the layout that Intel calls VNNI). A tile of up to 12 rows of the result stays in registers
(Goto & van de Geijn 2008). Every sum goes along the row in one order, whatever the tile: a row's
bits depend on that row alone.
"""

import ctypes
from functools import cache

import torch
from numba import carray

from common.engine.kernels.cpu import simd, tiles
from common.engine.kernels.cpu.launch import KIND, Kernel, compile_kernel, empty, fields

LANES = simd.LANES
PANEL = 2 * LANES
# Rows of a work item: of x they stay in a core's second cache while panels pass by.
ITEM_ROWS = 192
# How far ahead of the products a panel is fetched, in bytes.
AHEAD = 2048
# A product with fewer multiplications is done sooner than a second thread has begun it.
PRODUCTS_PER_THREAD = 2**17


class MatmulArguments(ctypes.Structure):
    """Addresses and sizes. An item is a panel for ITEM_ROWS rows.

    x           [rows, width], rows x_stride bytes apart
    weights     [panels, width * 32], as `pack` has them
    bias        [panels * 32] float32
    out         [rows, columns], contiguous
    """

    _fields_ = fields("x x_stride weights bias out rows columns width panels")


@simd.part
def multiply_rows(io, native, size, a, panel, first, last):
    """The rows [first, last), `size` at once; the last tile begins earlier rather than ending
    later."""
    steps, out_stride = a.width * simd.size(io), a.columns * simd.size(io)
    column = panel * PANEL
    columns = a.columns - column
    row = first
    while row < last:
        at = min(row, last - size)
        x = a.x + at * a.x_stride
        weights = a.weights + panel * steps * PANEL
        tile = tiles.start_tile(size, a.bias + 4 * column)
        for k in range(0, steps, 4):
            simd.prefetch(weights + AHEAD)
            simd.prefetch(weights + AHEAD + 64)
            tile = tiles.add_step(io, native, tile, x + k, a.x_stride, weights)
            weights += 4 * PANEL
        out = a.out + at * out_stride + column * simd.size(io)
        tiles.store_half(io, 0, tile, out, out_stride, columns)
        if columns > LANES:
            tiles.store_half(io, 1, tile, out, out_stride, columns)
        row += size


@cache
def matmul_kernel(io: int, native: bool) -> Kernel:
    """io: simd's kind of x, weights and out; native: bfloat16 by AVX-512's own products."""

    def matmul(address):
        a = carray(address, 1)[0]
        next_item = simd.address_of(address)
        while True:
            item = simd.fetch_add(next_item, 1)
            if item >= a.num_items:
                break
            panel, first = item % a.panels, item // a.panels * ITEM_ROWS
            last = min(first + ITEM_ROWS, a.rows)
            count = last - first
            if count > 16:
                multiply_rows(io, native, 12, a, panel, first, last)
            elif count >= 8:
                multiply_rows(io, native, 8, a, panel, first, last)
            elif count >= 4:
                multiply_rows(io, native, 4, a, panel, first, last)
            elif count >= 2:
                multiply_rows(io, native, 2, a, panel, first, last)
            else:
                multiply_rows(io, native, 1, a, panel, first, last)

    return compile_kernel(matmul, MatmulArguments)


def fits(weight: torch.Tensor) -> bool:
    """Whether CompiledLinear takes this matrix [out, in]: `in` is a multiple of 16."""
    return weight.shape[1] % LANES == 0


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] -> [panels, in * 32], zeros past the last row."""
    out, width = weight.shape
    panels, pair = -(-out // PANEL), 4 // weight.element_size()
    packed = weight.new_zeros(panels, width // pair, PANEL, pair)
    whole = out // PANEL
    rows = weight[: whole * PANEL].view(whole, PANEL, width // pair, pair)
    packed[:whole] = rows.transpose(1, 2)
    rest = weight[whole * PANEL :].view(-1, width // pair, pair)
    packed[whole:, :, : len(rest)] = rest.transpose(0, 1)
    return packed.view(panels, -1)


class CompiledLinear:
    """See `Linear`. For matrices that fit. The matrix itself is not kept."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        if not fits(weight):
            raise ValueError(
                f"a matrix of {tuple(weight.shape)}; its sizes must be multiples of 16"
            )
        self.out, self.width = weight.shape
        self.dtype = weight.dtype
        self.packed = pack(weight)
        self.bias = torch.zeros(len(self.packed) * PANEL)
        if bias is not None:
            self.bias[: self.out] = bias
        a = self._arguments = MatmulArguments()
        a.weights, a.bias = self.packed.data_ptr(), self.bias.data_ptr()
        a.columns, a.width, a.panels = self.out, self.width, len(self.packed)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = len(x)
        out = empty(rows, self.out, x.dtype)
        if rows == 0:
            return out
        if x.stride(1) != 1:
            x = x.contiguous()
        a = self._arguments
        a.x, a.x_stride, a.out = x.data_ptr(), x.stride(0) * x.element_size(), out.data_ptr()
        a.rows = rows
        items = a.panels * -(-rows // ITEM_ROWS)
        threads = min(
            torch.get_num_threads(), 1 + rows * self.packed.numel() // PRODUCTS_PER_THREAD
        )
        matmul_kernel(KIND[self.dtype], tiles.HAS_BFLOAT16).run(a, items, threads)
        return out
