"""float8_e4m3fn for products in bfloat16, which holds every e4m3 value exactly.

Of a matrix, bytes become pairs of bfloat16 in registers, by two lookups in tables of 128 bytes
where the CPU has them (AVX-512 VBMI) beside its dot products of such pairs. Of an input, numbers
become e4m3 values that are kept as bfloat16. A tile is what `tiles` calls so: rows of 32 columns.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba.core import types
from numba.extending import intrinsic

from common.engine.kernels.cpu import emit, memory, simd, tiles
from common.engine.kernels.cpu.emit import LANES, vector

# A step of a product: 2 of the columns that are summed over, for the 32 columns of a panel.
STEP_BYTES = 64
FLOAT32_MAX = np.float32(3.4028234663852886e38)

_BYTES = ir.VectorType(emit.I8, STEP_BYTES)
_WORDS = ir.VectorType(emit.I16, 2 * LANES)

# Products of pairs are of no use here without the tables: one way for all CPUs that lack either.
NATIVE = tiles.HAS_BFLOAT16 and bool(binding.get_host_cpu_features().get("avx512vbmi"))


def pack(values: torch.Tensor) -> torch.Tensor:
    """e4m3 [out, in], `in` even -> uint8 [panels of 32 rows, in / 2, 64], zeros past the last row.

    A step's bytes lie as `_unpacked` takes them apart, which goes by quarters of a register: row
    16 h + 4 q + i of the panel, column p of the two, is byte 16 q + 8 h + 2 i + p.
    """
    out, width = values.shape
    panels = -(-out // 32)
    padded = torch.zeros(panels * 32, width, dtype=torch.uint8)
    padded[:out] = values.view(torch.uint8)
    parts = padded.view(panels, 2, 4, 4, width // 2, 2)  # panel, h, q, i, step, p
    packed = memory.zeros(panels, width // 2, STEP_BYTES, dtype=torch.uint8)
    packed.view(panels, width // 2, 4, 2, 4, 2).copy_(parts.permute(0, 4, 2, 1, 3, 5))
    return packed


# Steps of a product ------------------------------------------------------------------------------


def _unpacked(builder: ir.IRBuilder, low: Any, high: Any) -> list[Any]:
    """Both bytes of 64 bfloat16 -> [16] i32 with two of them for each of the first 16 columns, and
    for each of the last."""
    halves = []
    for half in range(2):
        places = [
            side + 16 * quarter + 8 * half + i
            for quarter in range(4)
            for i in range(8)
            for side in (0, STEP_BYTES)
        ]
        mask = ir.Constant(ir.VectorType(emit.I32, STEP_BYTES), places)
        halves.append(builder.bitcast(builder.shuffle_vector(low, high, mask), emit.I32V))
    return halves


def _tables() -> list[ir.Constant]:
    """Both bytes of the bfloat16 of every positive e4m3, the low ones first."""
    every = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn)
    both = every.to(torch.bfloat16).view(torch.uint8).view(128, 2).T
    return [ir.Constant(ir.VectorType(emit.I8, 128), row.tolist()) for row in both]


def _by_table(builder: ir.IRBuilder, codes: Any) -> list[Any]:
    first, second = (
        ir.Constant(ir.VectorType(emit.I32, STEP_BYTES), list(range(start, start + STEP_BYTES)))
        for start in (0, STEP_BYTES)
    )
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    low, high = (
        emit.call(
            builder,
            name,
            _BYTES,
            builder.shuffle_vector(table, table, first),
            codes,  # of which this looks at the low seven bits
            builder.shuffle_vector(table, table, second),
        )
        for table in _tables()
    )
    signs = builder.and_(codes, ir.Constant(_BYTES, [0x80] * STEP_BYTES))
    return _unpacked(builder, low, builder.or_(high, signs))


def _by_arithmetic(builder: ir.IRBuilder, codes: Any) -> list[Any]:
    """For every CPU: as in `simd.load_e4m3`, moved to bfloat16's places a number is 2**-120 of
    itself; float32's product puts that right for subnormal numbers too."""

    def words(value: int) -> ir.Constant:
        return ir.Constant(_WORDS, [value] * 2 * LANES)

    scale = emit.lanes(emit.F32, 2.0**120)
    upper, out = emit.lanes(emit.I32, 0xFFFF0000), []
    for pairs in _unpacked(builder, ir.Constant(_BYTES, [0] * STEP_BYTES), codes):
        word = builder.bitcast(pairs, _WORDS)
        size = builder.and_(builder.lshr(word, words(4)), words(0x07F0))
        moved = builder.or_(size, builder.and_(word, words(0x8000)))
        pairs = builder.bitcast(moved, emit.I32V)
        halves = (builder.shl(pairs, emit.lanes(emit.I32, 16)), builder.and_(pairs, upper))
        low, high = (
            builder.bitcast(builder.fmul(builder.bitcast(half, emit.F32V), scale), emit.I32V)
            for half in halves
        )
        out.append(builder.or_(builder.lshr(low, emit.lanes(emit.I32, 16)), high))
    return out


@intrinsic(prefer_literal=True)
def unpack_step(typing, native, source, target):
    """64 bytes of a packed matrix -> the 32 pairs of bfloat16 that `tiles.add_step` takes."""
    decode = _by_table if native.literal_value else _by_arithmetic

    def generate(context, builder, signature, values):
        _, source, target = values
        for i, column in enumerate(decode(builder, emit.read(builder, source, _BYTES))):
            emit.write(builder, builder.add(target, target.type(64 * i)), column)
        return context.get_dummy_value()

    return types.void(native, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def add_step(typing, native, tile, x, stride, weights):
    """tile[r] + the two bfloat16 at x + r * stride times the 32 pairs of e4m3 at `weights`."""
    decode, dot = (
        (_by_table, tiles.dot_native)
        if native.literal_value
        else (_by_arithmetic, tiles.dot_as_float32)
    )

    def generate(context, builder, signature, values):
        _, tile, x, stride, weights = values
        columns = decode(builder, emit.read(builder, weights, _BYTES))
        sums = emit.unpack(builder, tile)
        for r, place in enumerate(emit.places(builder, x, stride, len(sums) // 2)):
            pair = emit.splat(builder, emit.read(builder, place, emit.I32))
            for i, column in enumerate(columns, 2 * r):
                sums[i] = dot(builder, sums[i], pair, column)
        return emit.pack(builder, sums)

    return tile(native, tile, types.int64, types.int64, types.int64), generate


# Tiles -------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def zero_tile(typing, count):
    """`count` rows of zeros."""
    rows = types.UniTuple(vector, 2 * count.literal_value)

    def generate(context, builder, signature, values):
        return emit.pack(builder, [emit.lanes(emit.F32, 0.0)] * rows.count)

    return rows(count), generate


@intrinsic(prefer_literal=True)
def load_tile(typing, count, address):
    """`count` rows that lie next to each other."""
    rows = types.UniTuple(vector, 2 * count.literal_value)

    def generate(context, builder, signature, values):
        places = emit.places(builder, values[1], values[1].type(64), rows.count)
        return emit.pack(builder, [emit.read(builder, place, emit.F32V) for place in places])

    return rows(count, types.int64), generate


@intrinsic
def add_scaled(typing, tile, part, scales, stride, scale):
    """tile[r] + part[r] * scale * the float32 at scales + r * stride."""

    def generate(context, builder, signature, values):
        tile, part, scales, stride, scale = values
        sums, parts = emit.unpack(builder, tile), emit.unpack(builder, part)
        for r, place in enumerate(emit.places(builder, scales, stride, len(sums) // 2)):
            factor = builder.fmul(emit.read(builder, place, emit.F32), scale)
            factor = emit.splat(builder, factor)
            for i in (2 * r, 2 * r + 1):
                sums[i] = emit.fma(builder, parts[i], factor, sums[i])
        return emit.pack(builder, sums)

    return tile(tile, tile, types.int64, types.int64, types.float32), generate


@intrinsic
def scale_tile(typing, tile, scales, stride, columns):
    """tile[r] * the float32 at scales + r * stride * the 32 float32 at `columns`."""

    def generate(context, builder, signature, values):
        tile, scales, stride, columns = values
        sums, both = emit.unpack(builder, tile), _pair(builder, columns)
        for r, place in enumerate(emit.places(builder, scales, stride, len(sums) // 2)):
            factor = emit.splat(builder, emit.read(builder, place, emit.F32))
            for i, column in enumerate(both, 2 * r):
                sums[i] = builder.fmul(builder.fmul(sums[i], factor), column)
        return emit.pack(builder, sums)

    return tile(tile, types.int64, types.int64, types.int64), generate


@intrinsic
def add_row(typing, tile, columns):
    """tile[r] + the 32 float32 at `columns`."""

    def generate(context, builder, signature, values):
        sums, both = emit.unpack(builder, values[0]), _pair(builder, values[1])
        return emit.pack(builder, [builder.fadd(s, both[i % 2]) for i, s in enumerate(sums)])

    return tile(tile, types.int64), generate


def _pair(builder: ir.IRBuilder, address: Any) -> list[Any]:
    places = [builder.add(address, address.type(64 * i)) for i in range(2)]
    return [emit.read(builder, place, emit.F32V) for place in places]


@intrinsic(prefer_literal=True)
def stack(typing, count):
    """The address of so many bytes that are the function's until it returns."""

    def generate(context, builder, signature, values):
        with builder.goto_entry_block():
            room = builder.alloca(ir.ArrayType(emit.I8, count.literal_value))
        room.align = 64
        return builder.ptrtoint(room, simd.INT64)

    return types.int64(count), generate


@emit.function(types.void, types.int64, types.int64)
def clear(builder, address, count):
    """Zeros in so many bytes."""
    start = emit.pointer(builder, address, emit.I8)
    no = ir.Constant(ir.IntType(1), 0)
    emit.call(builder, "llvm.memset.p0.i64", ir.VoidType(), start, emit.I8(0), count, no)


# Inputs ------------------------------------------------------------------------------------------


@emit.function(vector, vector)
def rounded(builder, value):
    """The nearest e4m3 values of numbers within +-448, ties to even; NaN stays NaN.

    Where e4m3 values are `step` apart, adding and subtracting 1.5 * 2**23 * step rounds to them.
    """
    bits = builder.and_(builder.bitcast(value, emit.I32V), emit.lanes(emit.I32, 0x7F800000))
    smallest = emit.lanes(emit.I32, (127 - 6) << 23)  # under 2**-6 the step is that of 2**-6
    exponent = builder.select(builder.icmp_signed(">", bits, smallest), bits, smallest)
    magic = builder.add(exponent, emit.lanes(emit.I32, 20 << 23))
    magic = builder.bitcast(builder.or_(magic, emit.lanes(emit.I32, 0x400000)), emit.F32V)
    return builder.fsub(builder.fadd(value, magic), magic)


@simd.part
def scale_of(io, x, count, static):
    """By what `count` numbers, a multiple of 16, are divided: the float32 at `static`, or their
    amax / 448 where that is 0."""
    if static != 0:
        return simd.scalar_float32(static)
    sizes = simd.splat(np.float32(0.0))
    for i in range(0, count, 16):
        sizes = simd.larger_size(sizes, simd.load(io, x + i * simd.size(io)))
    largest = simd.largest_size(sizes)
    if largest > FLOAT32_MAX:
        largest = FLOAT32_MAX
    return largest / np.float32(448.0)


@simd.part
def quantize_row(io, x, out, scales, static, width, columns):
    """A row's e4m3 values, as bfloat16 to `out`, which may be x, and the scale of each `columns` of
    them to `scales`; see `scale_of` for `static`."""
    start, group = 0, 0
    while start < width:
        count = min(columns, width - start)
        scale = scale_of(io, x + start * simd.size(io), count, static)
        simd.put_float32(scales + 4 * group, scale)
        divisor = simd.splat(np.float32(1.0))
        if scale != np.float32(0.0):
            divisor = simd.splat(scale)
        for i in range(start, start + count, 16):
            y = simd.clamp(simd.load(io, x + i * simd.size(io)), FLOAT32_MAX)
            y = simd.clamp(simd.div(y, divisor), np.float32(448.0))
            simd.store_bfloat16(out + 2 * i, rounded(y))
        start += count
        group += 1
