"""Products of float32 and bfloat16 matrices, of one row or of thousands.

The matrix lies in panels of 32 columns of the result (rows of the weight), each read once from its
first byte to its last: bfloat16 in pairs along a row, as AVX-512's dot product of pairs takes them
(the layout that Intel calls VNNI). A tile of up to 12 rows of the result stays in registers
(Goto & van de Geijn 2008); while a panel is multiplied by 8 rows or more, the next comes from
memory, so that reading and computing take the time of the longer and not of both. Fewer rows take
as long as the reading, which is quickest where a thread reads on and on: most of their panels are
handed out in one run for each thread. Every sum goes along the row in one order, whatever the tile:
a row's bits depend on that row alone.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from numba import carray

from common.engine.kernels.cpu import memory, simd, tiles
from common.engine.kernels.cpu.launch import KIND, Kernel, compile_kernel, empty, fields, spread

LANES = simd.LANES
PANEL = 2 * LANES
# Rows of a work item: of x they stay in a core's second cache while panels pass by.
ITEM_ROWS = 192
MANY_ROWS = 8
# How far ahead of fewer rows' products panels are fetched, in bytes.
AHEAD = 4096
# Of fewer rows' panels so many eighths are in runs; the rest is for who is done with a run first.
RUN_EIGHTHS = 6
# A product with fewer multiplications is done sooner than a second thread has begun it.
PRODUCTS_PER_THREAD = 2**17


class MatmulArguments(ctypes.Structure):
    """Addresses and sizes. An item is a panel for ITEM_ROWS rows; of fewer than MANY_ROWS rows the
    first `threads` items are a run of panels each, and the others a panel.

    x           [rows, width], rows x_stride bytes apart
    weights     [panels, width * 32], as `pack` has them
    bias        [panels * 32] float32
    out         [rows, columns], rows out_stride bytes apart; a panel's columns are 16 where the
                matrix is gated, else 32
    threads     that share the items
    run         panels of a run
    """

    _fields_ = fields(
        "x x_stride weights bias out out_stride rows columns width panels threads run"
    )


@simd.part
def multiply_rows(io, native, gated, size, a, panel, first, last, ahead, lines, end):
    """The rows [first, last), `size` at once; the last tile begins earlier rather than ending
    later. With every 4 steps the caches fetch `lines` more lines, from `ahead` to `end`; the first
    that is left."""
    steps = a.width * simd.size(io)
    column = panel * PANEL
    columns = a.columns - column
    row = first
    while row < last:
        at = min(row, last - size)
        x = a.x + at * a.x_stride
        weights = a.weights + panel * steps * PANEL
        tile = tiles.start_tile(size, a.bias + 4 * column)
        for k in range(0, steps, 16):
            stop = min(ahead + 64 * lines, end)
            while ahead < stop:
                simd.prefetch(ahead)
                ahead += 64
            for step in range(4):
                tile = tiles.add_step(io, native, tile, x + k + 4 * step, a.x_stride, weights)
                weights += 4 * PANEL
        out = a.out + at * a.out_stride
        if gated:
            out += panel * LANES * simd.size(io)
            tiles.store_half(io, 0, tiles.gate_tile(io, tile), out, a.out_stride, LANES)
        else:
            out += column * simd.size(io)
            tiles.store_half(io, 0, tile, out, a.out_stride, columns)
            if columns > LANES:
                tiles.store_half(io, 1, tile, out, a.out_stride, columns)
        row += size
    return ahead


@simd.part
def multiply_few(io, native, gated, a, panel, stop, first, last):
    """Rows [first, last), fewer than MANY_ROWS, by the panels [panel, stop)."""
    panel_bytes = a.width * simd.size(io) * PANEL
    end, count = a.weights + stop * panel_bytes, last - first
    while panel < stop:
        # A panel is done with as soon as it has come, so it is fetched shortly before.
        ahead = a.weights + panel * panel_bytes + AHEAD
        if count >= 4:
            multiply_rows(io, native, gated, 4, a, panel, first, last, ahead, 8, end)
        elif count >= 2:
            multiply_rows(io, native, gated, 2, a, panel, first, last, ahead, 8, end)
        else:
            multiply_rows(io, native, gated, 1, a, panel, first, last, ahead, 8, end)
        panel += 1


@simd.part
def cut_rows(count):
    """Tiles of 12 and of 8 rows for `count` rows, 8 or more: as few rows as can be, then as few
    tiles."""
    if count < 12:
        return 0, -(-count // 8)
    fours = -(-count // 4)
    eights = 2 * fours % 3
    return (fours - 2 * eights) // 3, eights


@simd.part
def multiply_many(io, native, gated, a, item, first, last):
    """Rows [first, last), MANY_ROWS or more, by the item's panel."""
    # Threads mostly take turns, so this one's next item is known: its panel comes from memory
    # while this one's is computed with.
    following, panel_bytes = item + a.threads, a.width * simd.size(io) * PANEL
    ahead = a.weights + following % a.panels * panel_bytes
    end = ahead + panel_bytes if following < a.num_items else ahead
    twelves, eights = cut_rows(last - first)
    # 4 steps are 8 lines of a panel, which comes once and is read by each tile.
    lines = 1 + 7 // (twelves + eights)
    panel, middle = item % a.panels, first + 12 * twelves
    if eights == 0:
        middle = last
    ahead = multiply_rows(io, native, gated, 12, a, panel, first, middle, ahead, lines, end)
    multiply_rows(io, native, gated, 8, a, panel, middle, last, ahead, lines, end)


@cache
def matmul_kernel(io: int, native: bool, gated: bool) -> Kernel:
    """io: simd's kind of x, weights and out; native: bfloat16 by AVX-512's own products; gated:
    for GatedLinear."""

    def matmul(address):
        a = carray(address, 1)[0]
        next_item = simd.address_of(address)
        while True:
            item = simd.fetch_add(next_item, 1)
            if item >= a.num_items:
                break
            panel, first = item % a.panels, item // a.panels * ITEM_ROWS
            stop, last = panel + 1, min(first + ITEM_ROWS, a.rows)
            if a.rows < MANY_ROWS:
                first, last = 0, a.rows
                panel = item * a.run
                stop = panel + a.run
                if item >= a.threads:
                    panel = a.threads * a.run + item - a.threads
                    stop = panel + 1
            if last - first >= MANY_ROWS:
                multiply_many(io, native, gated, a, item, first, last)
            else:
                multiply_few(io, native, gated, a, panel, stop, first, last)

    return compile_kernel(matmul, MatmulArguments)


def fits(weight: torch.Tensor) -> bool:
    """Whether CompiledLinear takes this matrix [out, in]: `in` is a multiple of 16."""
    return weight.shape[1] % LANES == 0


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] -> [panels, in * 32], zeros past the last row."""
    out, width = weight.shape
    panels, pair = -(-out // PANEL), 4 // weight.element_size()
    packed = memory.zeros(panels, width // pair, PANEL, pair, dtype=weight.dtype)
    whole = out // PANEL
    rows = weight[: whole * PANEL].view(whole, PANEL, width // pair, pair)
    packed[:whole] = rows.transpose(1, 2)
    rest = weight[whole * PANEL :].view(-1, width // pair, pair)
    packed[whole:, :, : len(rest)] = rest.transpose(0, 1)
    return packed.view(panels, -1)


def fits_gated(weight: torch.Tensor) -> bool:
    """Whether GatedLinear takes it: half of `out` is a multiple of 16, too."""
    return fits(weight) and weight.shape[0] % PANEL == 0


def pair_up(weight: torch.Tensor) -> torch.Tensor:
    """Rows of a gate and, after them, as many `up`: 16 of these after every 16 of those."""
    return weight.view(2, -1, LANES, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)


class CompiledLinear:
    """See `Linear`. For matrices that fit. The matrix itself is not kept."""

    _gated = False

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
        return self._multiply(x, empty(len(x), self.out, x.dtype))

    def _multiply(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        rows = len(x)
        if rows == 0:
            return out
        if x.stride(1) != 1:
            x = x.contiguous()
        a = self._arguments
        a.x, a.x_stride, a.out = x.data_ptr(), x.stride(0) * x.element_size(), out.data_ptr()
        a.rows, a.out_stride = rows, out.stride(0) * out.element_size()
        a.threads = torch.get_num_threads()
        a.run = a.panels * RUN_EIGHTHS // 8 // a.threads
        items = a.panels * -(-rows // ITEM_ROWS)
        if rows < MANY_ROWS:
            items = a.threads + a.panels - a.threads * a.run
        threads = min(a.threads, 1 + rows * self.packed.numel() // PRODUCTS_PER_THREAD)
        matmul_kernel(KIND[self.dtype], tiles.HAS_BFLOAT16, self._gated).run(a, items, threads)
        return out


@dataclass(frozen=True, slots=True)
class Gated:
    """silu(gate) * up [n, out / 2], of a matrix that computes no more than this."""

    values: torch.Tensor


class GatedLinear(CompiledLinear):
    """Of a gate's rows [out / 2, in] and, after them, as many `up`: what is in registers becomes
    silu(gate) * up on its way to memory. For matrices that fit gated."""

    _gated = True

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(pair_up(weight), None if bias is None else pair_up(bias))
        self.out //= 2
        self._arguments.columns = self.out

    def __call__(self, x: torch.Tensor) -> Gated:
        return Gated(self._multiply(x, spread(len(x), self.out, x.dtype)))
