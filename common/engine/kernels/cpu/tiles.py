"""A few vectors at once, in registers: the query heads that share a row of K or V, the tile of a
product. A tuple of vectors is what most of these take and give; see `simd`."""

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba.core import config, types
from numba.extending import intrinsic, overload

from common.engine.kernels.cpu import emit, simd
from common.engine.kernels.cpu.emit import LANES, vector

# AVX-512's own products of bfloat16. Numba can be told to compile for another CPU than this one.
_FOR_THIS_CPU = config.CPU_NAME is None and config.CPU_FEATURES is None
HAS_BFLOAT16 = _FOR_THIS_CPU and bool(binding.get_host_cpu_features().get("avx512bf16"))

_I16X32, _I32X32 = (ir.VectorType(element, 2 * LANES) for element in (emit.I16, emit.I32))


@intrinsic
def store_rows(typing, rows, address, stride):
    """The other way round."""

    def generate(context, builder, signature, values):
        places = emit.places(builder, values[1], values[2], rows.count)
        for place, row in zip(places, emit.unpack(builder, values[0]), strict=True):
            emit.write(builder, place, row)
        return context.get_dummy_value()

    return types.void(rows, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def zero_rows(typing, count):
    """A tuple of `count` zero vectors."""
    rows = types.UniTuple(vector, count.literal_value)

    def generate(context, builder, signature, values):
        return emit.pack(builder, [emit.lanes(emit.F32, 0.0)] * rows.count)

    return rows(count), generate


@intrinsic(prefer_literal=True)
def zero_columns(typing, count, vectors):
    """`count` rows of so many zero vectors each."""
    rows = types.UniTuple(vector, count.literal_value * vectors.literal_value)

    def generate(context, builder, signature, values):
        return emit.pack(builder, [emit.lanes(emit.F32, 0.0)] * rows.count)

    return rows(count, vectors), generate


@intrinsic
def dot_rows(typing, rows, k, address, stride):
    """rows[g] + k * the vector at address + g * stride."""

    def generate(context, builder, signature, values):
        rows, k, address, stride = values
        places = emit.places(builder, address, stride, signature.args[0].count)
        pairs = zip(places, emit.unpack(builder, rows), strict=True)
        return emit.pack(
            builder, [emit.fma(builder, k, emit.read(builder, p, emit.F32V), r) for p, r in pairs]
        )

    return rows(rows, vector, types.int64, types.int64), generate


@intrinsic
def dot_pairs(typing, rows, k, address, stride):
    """rows[g] + the products of 16 pairs of bfloat16, of k and at address + g * stride."""

    def generate(context, builder, signature, values):
        rows, k, address, stride = values
        k = builder.bitcast(k, emit.I32V)
        sums = []
        places = emit.places(builder, address, stride, signature.args[0].count)
        for place, row in zip(places, emit.unpack(builder, rows), strict=True):
            sums.append(dot_native(builder, row, emit.read(builder, place, emit.I32V), k))
        return emit.pack(builder, sums)

    return rows(rows, vector, types.int64, types.int64), generate


@intrinsic
def mix_columns(typing, rows, address, stride, first, second):
    """rows[2 * g] and rows[2 * g + 1] + the one float32 at address + g * stride, times these two
    vectors."""

    def generate(context, builder, signature, values):
        rows, address, stride, *columns = values
        sums = emit.unpack(builder, rows)
        for g, place in enumerate(emit.places(builder, address, stride, len(sums) // 2)):
            weight = emit.splat(builder, emit.read(builder, place, emit.F32))
            for i, column in enumerate(columns, 2 * g):
                sums[i] = emit.fma(builder, weight, column, sums[i])
        return emit.pack(builder, sums)

    return rows(rows, types.int64, types.int64, vector, vector), generate


@intrinsic(prefer_literal=True)
def mix_pairs(typing, rows, vectors, address, stride, low, high):
    """rows[vectors * g + i] + the two bfloat16 at address + g * stride, the first times the i-th
    16 bfloat16 at `low`, the second times those at `high`. `vectors` is even."""
    count = vectors.literal_value

    def generate(context, builder, signature, values):
        rows, _, address, stride, low, high = values
        columns = []
        for i in range(0, count, 2):
            halves = [
                emit.read(builder, builder.add(place, place.type(32 * i)), _I16X32)
                for place in (low, high)
            ]
            for first in (0, LANES):
                order = [first + k // 2 + k % 2 * 2 * LANES for k in range(2 * LANES)]
                pairs = builder.shuffle_vector(*halves, ir.Constant(_I32X32, order))
                columns.append(builder.bitcast(pairs, emit.I32V))
        sums = emit.unpack(builder, rows)
        for g, place in enumerate(emit.places(builder, address, stride, len(sums) // count)):
            weights = emit.splat(builder, emit.read(builder, place, emit.I32))
            for i, column in enumerate(columns, count * g):
                sums[i] = dot_native(builder, sums[i], weights, column)
        return emit.pack(builder, sums)

    return rows(rows, vectors, *[types.int64] * 4), generate


@intrinsic
def load_block(typing, address, stride):
    """8 rows of 32 columns of float32, `stride` bytes apart, as 16 vectors."""
    rows = types.UniTuple(vector, 16)

    def generate(context, builder, signature, values):
        places = emit.places(builder, *values, 8)
        halves = [builder.add(p, p.type(64 * i)) for p in places for i in range(2)]
        return emit.pack(builder, [emit.read(builder, half, emit.F32V) for half in halves])

    return rows(types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def store_columns(typing, rows, vectors, address, stride):
    """Rows of so many vectors each, `stride` bytes apart."""
    count = vectors.literal_value

    def generate(context, builder, signature, values):
        sums = emit.unpack(builder, values[0])
        places = emit.places(builder, *values[2:], len(sums) // count)
        columns = [builder.add(p, p.type(64 * i)) for p in places for i in range(count)]
        for place, row in zip(columns, sums, strict=True):
            emit.write(builder, place, row)
        return context.get_dummy_value()

    return types.void(rows, vectors, types.int64, types.int64), generate


@emit.function(types.void, types.int64, types.int64, types.int64, types.int64)
def transpose(builder, source, source_stride, target, target_stride):
    """16 x 16 float32, in rows so many bytes apart."""
    places = emit.places(builder, source, source_stride, 16)
    rows = [emit.read(builder, place, emit.F32V) for place in places]
    # Blocks off the diagonal change places: of 8 x 8, then of 4 x 4 within each, and so on.
    for size in (8, 4, 2, 1):
        upper = emit.places_of(i + LANES - size if i & size else i for i in range(LANES))
        lower = emit.places_of(i + LANES if i & size else i + size for i in range(LANES))
        for t in (t for t in range(16) if not t & size):
            a, b = rows[t], rows[t + size]
            rows[t] = builder.shuffle_vector(a, b, upper)
            rows[t + size] = builder.shuffle_vector(a, b, lower)
    for place, row in zip(emit.places(builder, target, target_stride, 16), rows, strict=True):
        emit.write(builder, place, row)


@emit.function(vector, types.int64)
def totals(builder, address):
    """The sums of 16 vectors that lie next to each other: of a 16 x 16 matrix's rows.

    Half the vectors at a time: pairs are added so that the halves of a sum end up side by side.
    """
    rows = [
        emit.read(builder, builder.add(address, ir.IntType(64)(64 * t)), emit.F32V)
        for t in range(16)
    ]
    for low, high in _FOLDS:
        pairs = zip(rows[::2], rows[1::2], strict=True)
        rows = [
            builder.fadd(
                builder.shuffle_vector(a, b, emit.places_of(low)),
                builder.shuffle_vector(a, b, emit.places_of(high)),
            )
            for a, b in pairs
        ]
    return rows[0]


def _quarters(inside: list[int]) -> list[int]:
    """A shuffle within each quarter of two vectors; 4 and up: of the second."""
    return [4 * q + (i if i < 4 else i - 4 + LANES) for q in range(4) for i in inside]


def _whole_quarters(quarters: list[int]) -> list[int]:
    return [4 * q + i for q in quarters for i in range(4)]


# What `totals` adds at each level; these are the cheap shuffles of x86.
_FOLDS = (
    (_quarters([0, 4, 1, 5]), _quarters([2, 6, 3, 7])),
    (_quarters([0, 1, 4, 5]), _quarters([2, 3, 6, 7])),
    (_whole_quarters([0, 1, 4, 5]), _whole_quarters([2, 3, 6, 7])),
    (_whole_quarters([0, 2, 4, 6]), _whole_quarters([1, 3, 5, 7])),
)


@emit.function(vector, types.int64, types.int64)
def interleave(builder, low, high):
    """16 pairs, of the 16 elements of 16 bits at `low` and those at `high`."""
    halves = [emit.read(builder, place, emit.I16V) for place in (low, high)]
    low, high = (builder.zext(half, emit.I32V) for half in halves)
    pairs = builder.or_(low, builder.shl(high, emit.lanes(emit.I32, 16)))
    return builder.bitcast(pairs, emit.F32V)


@intrinsic
def scale_columns(typing, rows, low, high):
    """Rows of 32 columns, two vectors each, the columns times those of two vectors."""

    def generate(context, builder, signature, values):
        columns = emit.unpack(builder, values[0])
        return emit.pack(
            builder, [builder.fmul(row, values[1 + i % 2]) for i, row in enumerate(columns)]
        )

    return rows(rows, vector, vector), generate


# The tile of a matrix product: some rows of 32 columns, two vectors each ------------------------


class _BFloat16(ir.Type):
    """What llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


_PAIRS = ir.VectorType(_BFloat16(), 2 * LANES)


@intrinsic(prefer_literal=True)
def start_tile(typing, count, bias):
    """`count` rows, each the 32 float32 at `bias`."""
    rows = types.UniTuple(vector, 2 * count.literal_value)

    def generate(context, builder, signature, values):
        return emit.pack(builder, _columns(builder, values[1], emit.F32V) * (rows.count // 2))

    return rows(count, types.int64), generate


def _columns(builder: ir.IRBuilder, address: Any, element: ir.Type) -> list[Any]:
    places = [builder.add(address, address.type(64 * i)) for i in range(2)]
    return [emit.read(builder, place, element) for place in places]


@intrinsic
def add_float32(typing, tile, x, stride, weights):
    """tile[r] + the float32 at x + r * stride times the 32 float32 at `weights`."""

    def generate(context, builder, signature, values):
        tile, x, stride, weights = values
        columns, sums = _columns(builder, weights, emit.F32V), emit.unpack(builder, tile)
        for r, place in enumerate(emit.places(builder, x, stride, len(sums) // 2)):
            factor = emit.splat(builder, emit.read(builder, place, emit.F32))
            for i, column in enumerate(columns, 2 * r):
                sums[i] = emit.fma(builder, factor, column, sums[i])
        return emit.pack(builder, sums)

    return tile(tile, types.int64, types.int64, types.int64), generate


@intrinsic
def add_pairs(typing, tile, x, stride, weights):
    """tile[r] + the two bfloat16 at x + r * stride times the 32 pairs at `weights`, by AVX-512's
    own dot product."""
    return _of_pairs(tile, dot_native)


@intrinsic
def add_pairs_as_float32(typing, tile, x, stride, weights):
    """The same for other CPUs."""
    return _of_pairs(tile, dot_as_float32)


def _of_pairs(kind: types.Type, dot: Callable) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        tile, x, stride, weights = values
        columns, sums = _columns(builder, weights, emit.I32V), emit.unpack(builder, tile)
        for r, place in enumerate(emit.places(builder, x, stride, len(sums) // 2)):
            pair = emit.splat(builder, emit.read(builder, place, emit.I32))
            for i, column in enumerate(columns, 2 * r):
                sums[i] = dot(builder, sums[i], pair, column)
        return emit.pack(builder, sums)

    return kind(kind, types.int64, types.int64, types.int64), generate


def dot_native(builder: ir.IRBuilder, total: Any, a: Any, b: Any) -> Any:
    a, b = (builder.bitcast(x, _PAIRS) for x in (a, b))
    return emit.call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", emit.F32V, total, a, b)


def dot_as_float32(builder: ir.IRBuilder, total: Any, a: Any, b: Any) -> Any:
    low, high = emit.lanes(emit.I32, 16), emit.lanes(emit.I32, 0xFFFF0000)
    for half in (lambda x: builder.shl(x, low), lambda x: builder.and_(x, high)):
        x, y = (builder.bitcast(half(value), emit.F32V) for value in (a, b))
        total = emit.fma(builder, x, y, total)
    return total


@emit.function(vector, vector, vector)
def round_pairs(builder, low, high):
    """16 pairs of bfloat16, rounded by AVX-512's own conversion."""
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    both = emit.call(builder, name, _PAIRS, high, low)
    both = builder.bitcast(both, _I16X32)
    order = ir.Constant(_I32X32, [i // 2 + i % 2 * LANES for i in range(2 * LANES)])
    return builder.bitcast(builder.shuffle_vector(both, both, order), emit.F32V)


@emit.function(vector, vector, vector)
def add_pair_sums(builder, total, pairs):
    """total + both bfloat16 of each pair."""
    one = emit.lanes(emit.I32, 0x3F803F80)
    return dot_native(builder, total, pairs, one)


def add_step(kind: int, native: bool, tile: Any, x: int, stride: int, weights: int) -> Any:
    """One step of 4 bytes along the rows of x: one float32, or two bfloat16."""
    raise NotImplementedError("compiled code only")


@overload(add_step, prefer_literal=True)
def _add_step(kind, native, tile, x, stride, weights):
    chosen = add_float32
    if kind.literal_value == simd.BFLOAT16:
        chosen = add_pairs if native.literal_value else add_pairs_as_float32
    return lambda kind, native, tile, x, stride, weights: chosen(tile, x, stride, weights)


@intrinsic(prefer_literal=True)
def gate_tile(typing, kind, tile):
    """The first 16 columns of each row become silu(gate) * up, gate being themselves and up the
    others, both rounded to the kind before."""
    bfloat16 = kind.literal_value == simd.BFLOAT16

    def generate(context, builder, signature, values):
        columns = emit.unpack(builder, values[1])
        if bfloat16:
            columns = [emit.round_bfloat16(builder, column) for column in columns]
        for r in range(0, len(columns), 2):
            columns[r] = emit.silu_mul(builder, columns[r], columns[r + 1])
        return emit.pack(builder, columns)

    return tile(kind, tile), generate


@intrinsic(prefer_literal=True)
def store_half(typing, kind, half, tile, target, stride, count):
    """The first or second 16 columns of the rows, of which there are `count` at least, rounded to
    the kind."""
    which, kind_value = half.literal_value, kind.literal_value
    element = (emit.F32, emit.I16)[kind_value]
    bytes_each = (4, 2)[kind_value]

    def generate(context, builder, signature, values):
        columns = emit.unpack(builder, values[2])[which::2]
        places = emit.places(builder, *values[3:5], len(columns))
        if kind_value == simd.BFLOAT16:
            bits = [emit.bfloat16_bits(builder, row) for row in columns]
            columns = [builder.trunc(row, emit.I16V) for row in bits]
        left = builder.sub(values[5], values[5].type(LANES * which))
        whole = builder.icmp_signed(">=", left, left.type(LANES))
        with builder.if_else(whole) as (then, otherwise):
            with then:
                for place, row in zip(places, columns, strict=True):
                    at = builder.add(place, place.type(LANES * bytes_each * which))
                    emit.write(builder, at, row)
            with otherwise:
                mask = emit.first_lanes(builder, left)
                name = f"llvm.masked.store.v16{'i16' if bytes_each == 2 else 'f32'}.p0"
                for place, row in zip(places, columns, strict=True):
                    at = builder.add(place, place.type(LANES * bytes_each * which))
                    pointer = emit.pointer(builder, at, ir.VectorType(element, LANES))
                    emit.call(builder, name, ir.VoidType(), row, pointer, emit.I32(1), mask)
        return context.get_dummy_value()

    return types.void(kind, half, tile, types.int64, types.int64, types.int64), generate
