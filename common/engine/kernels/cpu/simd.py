"""Vectors of 16 float32 for Numba, as LLVM knows them: the registers of AVX-512, pairs of AVX2's.

Numba turns a plain loop into vector code only when it feels like it; these functions say what is
meant. Addresses are integers, elements lie next to each other and need no alignment. No function
assumes that numbers are finite.
"""

from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

LANES = 16
F32, I32, I16, I8 = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8)
F32V, I32V = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
I16V, I8V = ir.VectorType(I16, LANES), ir.VectorType(I8, LANES)
NAN_BITS = 0x7FC00000
# exp is 0 below, where float32 would be subnormal, and stays finite up to the other end.
EXP_LOW, EXP_HIGH = -87.0, 88.0


class Vector(types.Type):
    """16 float32."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


vector = Vector()


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, F32V)


def _function(returns: types.Type, *arguments: types.Type) -> Callable[[Callable], Callable]:
    """An intrinsic of fixed types from a function (builder, *values) -> value of LLVM."""

    def decorate(emit: Callable) -> Callable:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            out = emit(builder, *values)
            return context.get_dummy_value() if out is None else out

        # Numba counts the parameters of a typing function, hence one for each number of them.
        typings = {
            1: lambda typing, a: (returns(*arguments), generate),
            2: lambda typing, a, b: (returns(*arguments), generate),
            3: lambda typing, a, b, c: (returns(*arguments), generate),
        }
        typing = typings[len(arguments)]
        typing.__name__ = typing.__qualname__ = emit.__name__
        typing.__doc__ = emit.__doc__
        return intrinsic(typing)

    return decorate


def _lanes(element: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, LANES), [value] * LANES)


def _call(builder: ir.IRBuilder, name: str, returns: ir.Type, *values: Any, flags: Any = ()) -> Any:
    kind = ir.FunctionType(returns, [value.type for value in values])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, values, fastmath=flags)


def _pointer(builder: ir.IRBuilder, address: Any, element: ir.Type) -> Any:
    return builder.inttoptr(address, element.as_pointer())


def _read(builder: ir.IRBuilder, address: Any, element: ir.Type) -> Any:
    load = builder.load(_pointer(builder, address, element))
    load.align = 1
    return load


def _write(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    builder.store(value, _pointer(builder, address, value.type), align=1)


def _splat(builder: ir.IRBuilder, value: Any) -> Any:
    lanes = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    start = builder.insert_element(lanes, value, I32(0))
    return builder.shuffle_vector(start, start, ir.Constant(I32V, [0] * LANES))


def _total(builder: ir.IRBuilder, value: Any) -> Any:
    start = ir.Constant(F32, -0.0)
    return _call(builder, "llvm.vector.reduce.fadd.v16f32", F32, start, value, flags=("reassoc",))


def _fma(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "llvm.fma.v16f32", F32V, a, b, c)


# Memory ------------------------------------------------------------------------------------


@_function(vector, types.int64)
def load_float32(builder, address):
    """16 float32."""
    return _read(builder, address, F32V)


@_function(vector, types.int64)
def load_bfloat16(builder, address):
    """16 bfloat16: the upper halves of float32."""
    bits = builder.zext(_read(builder, address, I16V), I32V)
    return builder.bitcast(builder.shl(bits, _lanes(I32, 16)), F32V)


@_function(vector, types.int64)
def load_e4m3(builder, address):
    """16 float8_e4m3fn: exponent and mantissa moved to float32's place are 2**-120 of the value,
    the biases being 7 and 127; subnormals come out right by themselves."""
    bits = builder.zext(_read(builder, address, I8V), I32V)
    size = builder.and_(bits, _lanes(I32, 0x7F))
    sign = builder.shl(builder.and_(bits, _lanes(I32, 0x80)), _lanes(I32, 24))
    moved = builder.or_(builder.shl(size, _lanes(I32, 20)), sign)
    value = builder.fmul(builder.bitcast(moved, F32V), _lanes(F32, 2.0**120))
    nan = builder.icmp_unsigned("==", size, _lanes(I32, 0x7F))
    return builder.select(nan, builder.bitcast(_lanes(I32, NAN_BITS), F32V), value)


@_function(vector, types.int64)
def load_e4m3_number(builder, address):
    """16 float8_e4m3fn, none of them NaN, in half as many instructions."""
    bits = builder.shl(builder.sext(_read(builder, address, I8V), I32V), _lanes(I32, 20))
    moved = builder.and_(bits, _lanes(I32, 0x87F00000))  # what the sign was extended over
    return builder.fmul(builder.bitcast(moved, F32V), _lanes(F32, 2.0**120))


@_function(types.void, types.int64, vector)
def store_float32(builder, address, value):
    """16 float32."""
    _write(builder, address, value)


@_function(types.void, types.int64, vector)
def store_bfloat16(builder, address, value):
    """16 bfloat16, rounded to nearest, ties to even."""
    _write(builder, address, builder.trunc(_bfloat16_bits(builder, value), I16V))


@_function(types.void, types.int64, vector)
def store_e4m3(builder, address, value):
    """16 float8_e4m3fn of values within +-448, rounded to nearest, ties to even; NaN stays NaN."""
    bits = builder.bitcast(value, I32V)
    sign = builder.lshr(builder.and_(bits, _lanes(I32, 0x80000000)), _lanes(I32, 24))
    size = builder.and_(bits, _lanes(I32, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, _lanes(I32, 20)), _lanes(I32, 1))
    rounded = builder.add(builder.add(size, _lanes(I32, 0x7FFFF)), odd)
    normal = builder.sub(builder.lshr(rounded, _lanes(I32, 20)), _lanes(I32, 120 << 3))
    # At 2**14 neighbouring float32 are 2**-9 apart, as e4m3's subnormals are.
    shifted = builder.fadd(builder.bitcast(size, F32V), _lanes(F32, 2.0**14))
    small = builder.sub(builder.bitcast(shifted, I32V), _lanes(I32, 0x46800000))
    is_small = builder.icmp_unsigned("<", size, _lanes(I32, 0x3C800000))  # 2**-6
    byte = builder.select(is_small, small, normal)
    nan = builder.icmp_unsigned(">", size, _lanes(I32, 0x7F800000))
    byte = builder.or_(builder.select(nan, _lanes(I32, 0x7F), byte), sign)
    _write(builder, address, builder.trunc(byte, I8V))


def _bfloat16_bits(builder: ir.IRBuilder, value: Any) -> Any:
    """[16] i32 that hold bfloat16."""
    bits = builder.bitcast(value, I32V)
    odd = builder.and_(builder.lshr(bits, _lanes(I32, 16)), _lanes(I32, 1))
    rounded = builder.add(builder.add(bits, _lanes(I32, 0x7FFF)), odd)
    nan = builder.fcmp_unordered("uno", value, value)
    kept = builder.select(nan, builder.or_(bits, _lanes(I32, 0x400000)), rounded)
    return builder.lshr(kept, _lanes(I32, 16))


@_function(types.float32, types.int64)
def scalar_float32(builder, address):
    """One float32."""
    return _read(builder, address, F32)


@_function(types.void, types.int64, types.float32)
def put_float32(builder, address, value):
    """One float32."""
    _write(builder, address, value)


@_function(types.int64, types.int64)
def scalar_int64(builder, address):
    """One int64."""
    return _read(builder, address, ir.IntType(64))


@_function(types.int64, types.int64)
def scalar_int32(builder, address):
    """One int32."""
    return builder.sext(_read(builder, address, I32), ir.IntType(64))


@intrinsic
def address_of(typing, pointer):
    """A pointer as the number that the functions here take."""

    def generate(context, builder, signature, values):
        return builder.ptrtoint(values[0], ir.IntType(64))

    return types.int64(pointer), generate


@_function(types.void, types.int64)
def prefetch(builder, address):
    """Has the cache fetch the line of 64 bytes; any address will do."""
    pointer = _pointer(builder, address, I8)
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(3), I32(1))


@_function(types.int64, types.int64, types.int64)
def fetch_add(builder, address, value):
    """Adds to an int64 that threads share; what it was before."""
    pointer = _pointer(builder, address, ir.IntType(64))
    return builder.atomic_rmw("add", pointer, value, "seq_cst")


# Arithmetic --------------------------------------------------------------------------------


@_function(vector, types.float32)
def splat(builder, value):
    """The same number 16 times."""
    return _splat(builder, value)


@_function(vector, vector, vector)
def add(builder, a, b):
    """a + b."""
    return builder.fadd(a, b)


@_function(vector, vector, vector)
def mul(builder, a, b):
    """a * b."""
    return builder.fmul(a, b)


@_function(vector, vector, vector)
def div(builder, a, b):
    """a / b."""
    return builder.fdiv(a, b)


@_function(vector, vector, vector, vector)
def fma(builder, a, b, c):
    """a * b + c, rounded once."""
    return _fma(builder, a, b, c)


@_function(vector, vector)
def round_bfloat16(builder, value):
    """To the nearest bfloat16."""
    bits = builder.shl(_bfloat16_bits(builder, value), _lanes(I32, 16))
    return builder.bitcast(bits, F32V)


@_function(vector, vector, types.float32)
def clamp(builder, value, limit):
    """Into [-limit, limit]; NaN stays NaN."""
    high = _splat(builder, limit)
    low = builder.fsub(_lanes(F32, -0.0), high)
    value = builder.select(builder.fcmp_ordered(">", value, high), high, value)
    return builder.select(builder.fcmp_ordered("<", value, low), low, value)


@_function(vector, vector, vector)
def larger_size(builder, a, b):
    """max(|a|, |b|): compared as whole numbers, where NaN is more than all."""
    a, b = (builder.and_(builder.bitcast(x, I32V), _lanes(I32, 0x7FFFFFFF)) for x in (a, b))
    return builder.bitcast(builder.select(builder.icmp_unsigned(">", a, b), a, b), F32V)


@_function(types.float32, vector)
def largest_size(builder, value):
    """The largest of the absolute values; NaN if there is one."""
    bits = builder.and_(builder.bitcast(value, I32V), _lanes(I32, 0x7FFFFFFF))
    return builder.bitcast(_call(builder, "llvm.vector.reduce.umax.v16i32", I32, bits), F32)


@_function(types.float32, vector)
def first(builder, value):
    """The first of the 16."""
    return builder.extract_element(value, I32(0))


@_function(types.float32, vector)
def total(builder, value):
    """The sum of the 16, always in the same order."""
    return _total(builder, value)


@_function(types.float32, vector)
def largest(builder, value):
    """The largest of the 16; anything when there is a NaN."""
    for half in (8, 4, 2, 1):
        turned = builder.shuffle_vector(value, value, _places_of(range(half, half + LANES)))
        value = builder.select(builder.fcmp_ordered(">", value, turned), value, turned)
    return builder.extract_element(value, I32(0))


@_function(vector, vector, types.int64, types.float32)
def keep_first(builder, value, count, other):
    """The first `count` of the 16, `other` in place of the rest."""
    return builder.select(_first_lanes(builder, count), value, _splat(builder, other))


@_function(vector, types.int64, types.int64)
def load_first(builder, address, count):
    """The first `count` float32 of 16, zeros in place of the rest, which are not read."""
    mask, pointer = _first_lanes(builder, count), _pointer(builder, address, F32V)
    name = "llvm.masked.load.v16f32.p0"
    return _call(builder, name, F32V, pointer, I32(4), mask, _lanes(F32, 0.0))


@_function(vector, types.int64)
def totals(builder, address):
    """The sums of 16 vectors that lie next to each other: of a 16 x 16 matrix's rows.

    Half the vectors at a time: pairs are added so that the halves of a sum end up side by side.
    """
    rows = [_read(builder, builder.add(address, ir.IntType(64)(64 * t)), F32V) for t in range(16)]
    for low, high in _FOLDS:
        pairs = zip(rows[::2], rows[1::2], strict=True)
        rows = [
            builder.fadd(
                builder.shuffle_vector(a, b, _places_of(low)),
                builder.shuffle_vector(a, b, _places_of(high)),
            )
            for a, b in pairs
        ]
    return rows[0]


def _places_of(lanes: Iterable[int]) -> ir.Constant:
    return ir.Constant(I32V, list(lanes))


def _first_lanes(builder: ir.IRBuilder, count: Any) -> Any:
    count = _splat(builder, builder.trunc(count, I32))
    return builder.icmp_signed("<", _places_of(range(LANES)), count)


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


@_function(vector, vector)
def exp(builder, x):
    """e**x to 2 units in the last place, 0 below EXP_LOW, e**EXP_HIGH above; NaN stays NaN.

    x = n * log(2) + r with |r| <= log(2) / 2, log(2) in two parts (Cody & Waite 1980), a
    polynomial for e**r, and n added to the exponent.
    """
    high = builder.fcmp_ordered(">", x, _lanes(F32, EXP_HIGH))
    x = builder.select(high, _lanes(F32, EXP_HIGH), x)
    low = builder.fcmp_ordered("<", x, _lanes(F32, EXP_LOW))
    x = builder.select(low, _lanes(F32, EXP_LOW), x)
    # Adding 1.5 * 2**23 rounds to a whole number, which is then found in the low bits.
    magic = _lanes(F32, 1.5 * 2.0**23)
    shifted = _fma(builder, x, _lanes(F32, 1.4426950408889634), magic)
    n = builder.fsub(shifted, magic)
    r = _fma(builder, n, _lanes(F32, -0.693145751953125), x)
    r = _fma(builder, n, _lanes(F32, -1.428606765330187e-06), r)
    p = _lanes(F32, 1 / 720)
    for factor in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        p = _fma(builder, p, r, _lanes(F32, factor))
    exponent = builder.shl(builder.bitcast(shifted, I32V), _lanes(I32, 23))
    power = builder.add(exponent, _lanes(I32, 127 << 23))
    out = builder.fmul(p, builder.bitcast(power, F32V))
    return builder.select(low, _lanes(F32, 0.0), out)


# Parts of kernels ----------------------------------------------------------------------------


def part(function: Callable) -> Callable:
    """A function that kernels call; constants among its arguments are constants in it too."""

    def typing(*arguments):
        return function

    overload(function, strict=False, prefer_literal=True)(typing)
    return function


# By the kind of number, a constant where the kernel is compiled ---------------------------------

FLOAT32, BFLOAT16, E4M3 = range(3)
_LOADS = {FLOAT32: load_float32, BFLOAT16: load_bfloat16, E4M3: load_e4m3}
_STORES = {FLOAT32: store_float32, BFLOAT16: store_bfloat16, E4M3: store_e4m3}


def load(kind: int, address: int) -> Any:
    """16 elements of a kind."""
    raise NotImplementedError("compiled code only")


def store(kind: int, address: int, value: Any) -> None:
    """16 elements, rounded to a kind."""
    raise NotImplementedError("compiled code only")


@overload(load, prefer_literal=True)
def _load(kind, address):
    chosen = _LOADS[kind.literal_value]
    return lambda kind, address: chosen(address)


def size(kind: int) -> int:
    """Bytes of an element of a kind."""
    raise NotImplementedError("compiled code only")


@overload(size, prefer_literal=True)
def _size(kind):
    count = (4, 2, 1)[kind.literal_value]
    return lambda kind: count


@overload(store, prefer_literal=True)
def _store(kind, address, value):
    chosen = _STORES[kind.literal_value]
    return lambda kind, address, value: chosen(address, value)


# A few vectors at once: the query heads that share a row of K or V ---------------------------


def _unpack(builder: ir.IRBuilder, group: Any) -> list[Any]:
    return [builder.extract_value(group, g) for g in range(group.type.count)]


def _pack(builder: ir.IRBuilder, values: list[Any]) -> Any:
    out = ir.Constant(ir.ArrayType(F32V, len(values)), ir.Undefined)
    for g, value in enumerate(values):
        out = builder.insert_value(out, value, g)
    return out


def _places(builder: ir.IRBuilder, address: Any, stride: Any, count: int) -> list[Any]:
    return [builder.add(address, builder.mul(stride, stride.type(g))) for g in range(count)]


@intrinsic(prefer_literal=True)
def load_rows(typing, count, address, stride):
    """A tuple of `count` vectors of float32, `stride` bytes apart."""
    rows = types.UniTuple(vector, count.literal_value)

    def generate(context, builder, signature, values):
        places = _places(builder, values[1], values[2], rows.count)
        return _pack(builder, [_read(builder, place, F32V) for place in places])

    return rows(count, types.int64, types.int64), generate


@intrinsic
def store_rows(typing, rows, address, stride):
    """The other way round."""

    def generate(context, builder, signature, values):
        places = _places(builder, values[1], values[2], rows.count)
        for place, row in zip(places, _unpack(builder, values[0]), strict=True):
            _write(builder, place, row)
        return context.get_dummy_value()

    return types.void(rows, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def zero_rows(typing, count):
    """A tuple of `count` zero vectors."""
    rows = types.UniTuple(vector, count.literal_value)

    def generate(context, builder, signature, values):
        return _pack(builder, [_lanes(F32, 0.0)] * rows.count)

    return rows(count), generate


@intrinsic
def dot_rows(typing, rows, k, address, stride):
    """rows[g] + k * the vector at address + g * stride."""

    def generate(context, builder, signature, values):
        rows, k, address, stride = values
        places = _places(builder, address, stride, signature.args[0].count)
        pairs = zip(places, _unpack(builder, rows), strict=True)
        return _pack(builder, [_fma(builder, k, _read(builder, p, F32V), r) for p, r in pairs])

    return rows(rows, vector, types.int64, types.int64), generate


@intrinsic
def mix_rows(typing, rows, v, address, stride):
    """rows[g] + v * the one float32 at address + g * stride."""

    def generate(context, builder, signature, values):
        rows, v, address, stride = values
        places = _places(builder, address, stride, signature.args[0].count)
        weights = [_splat(builder, _read(builder, place, F32)) for place in places]
        pairs = zip(weights, _unpack(builder, rows), strict=True)
        return _pack(builder, [_fma(builder, v, weight, row) for weight, row in pairs])

    return rows(rows, vector, types.int64, types.int64), generate


@intrinsic
def add_products(typing, rows, a, stride, b):
    """Of 8 rows of 32 columns, two vectors each: row r gets the float32 at a + r * stride times
    the 32 float32 at b. One step of a matrix product that stays in registers."""

    def generate(context, builder, signature, values):
        rows, a, stride, b = values
        columns = [_read(builder, builder.add(b, b.type(64 * i)), F32V) for i in range(2)]
        out = []
        for r, place in enumerate(_places(builder, a, stride, 8)):
            factor = _splat(builder, _read(builder, place, F32))
            for i, column in enumerate(columns):
                out.append(_fma(builder, factor, column, builder.extract_value(rows, 2 * r + i)))
        return _pack(builder, out)

    return rows(rows, types.int64, types.int64, types.int64), generate


@intrinsic
def load_block(typing, address, stride):
    """8 rows of 32 columns of float32, `stride` bytes apart, as 16 vectors."""
    rows = types.UniTuple(vector, 16)

    def generate(context, builder, signature, values):
        places = _places(builder, *values, 8)
        halves = [builder.add(p, p.type(64 * i)) for p in places for i in range(2)]
        return _pack(builder, [_read(builder, half, F32V) for half in halves])

    return rows(types.int64, types.int64), generate


@intrinsic
def store_block(typing, rows, address, stride):
    """The other way round."""

    def generate(context, builder, signature, values):
        places = _places(builder, *values[1:], 8)
        halves = [builder.add(p, p.type(64 * i)) for p in places for i in range(2)]
        for half, row in zip(halves, _unpack(builder, values[0]), strict=True):
            _write(builder, half, row)
        return context.get_dummy_value()

    return types.void(rows, types.int64, types.int64), generate


@_function(types.void, types.int64, types.int64, types.int64)
def transpose(builder, source, target, stride):
    """16 x 16 float32, contiguous at `source`, to rows `stride` bytes apart."""
    rows = [_read(builder, builder.add(source, source.type(64 * t)), F32V) for t in range(16)]
    # Blocks off the diagonal change places: of 8 x 8, then of 4 x 4 within each, and so on.
    for size in (8, 4, 2, 1):
        upper = _places_of(i + LANES - size if i & size else i for i in range(LANES))
        lower = _places_of(i + LANES if i & size else i + size for i in range(LANES))
        for t in (t for t in range(16) if not t & size):
            a, b = rows[t], rows[t + size]
            rows[t] = builder.shuffle_vector(a, b, upper)
            rows[t + size] = builder.shuffle_vector(a, b, lower)
    for place, row in zip(_places(builder, target, stride, 16), rows, strict=True):
        _write(builder, place, row)


@_function(vector, vector, types.int64, types.int64)
def hide_outside(builder, value, low, high):
    """-inf in place of the lanes that are not in [low, high)."""
    lanes = _places_of(range(LANES))
    bounds = [_splat(builder, builder.trunc(bound, I32)) for bound in (low, high)]
    inside = builder.icmp_signed(">=", lanes, bounds[0])
    inside = builder.and_(inside, builder.icmp_signed("<", lanes, bounds[1]))
    return builder.select(inside, value, _lanes(F32, float("-inf")))


@_function(vector, vector, vector)
def larger(builder, a, b):
    """Of each pair the larger; anything where one is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)
