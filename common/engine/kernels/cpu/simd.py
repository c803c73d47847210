"""Vectors of 16 float32 for Numba, as LLVM knows them: the registers of AVX-512, pairs of AVX2's.

Numba turns a plain loop into vector code only when it feels like it; these functions say what is
meant. Addresses are integers, elements lie next to each other and need no alignment. No function
assumes that numbers are finite.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload

from common.engine.kernels.cpu import emit
from common.engine.kernels.cpu.emit import LANES, vector

INT64 = ir.IntType(64)
NAN_BITS = 0x7FC00000
EXP2_LOW = -125.0
# Of the polynomial for 2**r, |r| <= 1/2, whose largest relative error is least (Remez): 1e-7.
EXP2_FACTORS = (1.326472614891827e-3, 9.671512991189957e-3, 5.550733581185341e-2)
EXP2_FACTORS += (2.4022242426872253e-1, 6.931470036506653e-1, 1.0)

# Memory ------------------------------------------------------------------------------------


@emit.function(vector, types.int64)
def load_float32(builder, address):
    """16 float32."""
    return emit.read(builder, address, emit.F32V)


@emit.function(vector, types.int64)
def load_bfloat16(builder, address):
    """16 bfloat16: the upper halves of float32."""
    bits = builder.zext(emit.read(builder, address, emit.I16V), emit.I32V)
    return builder.bitcast(builder.shl(bits, emit.lanes(emit.I32, 16)), emit.F32V)


@emit.function(vector, types.int64)
def load_e4m3(builder, address):
    """16 float8_e4m3fn: exponent and mantissa moved to float32's place are 2**-120 of the value,
    the biases being 7 and 127; subnormals come out right by themselves."""
    bits = builder.zext(emit.read(builder, address, emit.I8V), emit.I32V)
    size = builder.and_(bits, emit.lanes(emit.I32, 0x7F))
    sign = builder.shl(builder.and_(bits, emit.lanes(emit.I32, 0x80)), emit.lanes(emit.I32, 24))
    moved = builder.or_(builder.shl(size, emit.lanes(emit.I32, 20)), sign)
    value = builder.fmul(builder.bitcast(moved, emit.F32V), emit.lanes(emit.F32, 2.0**120))
    nan = builder.icmp_unsigned("==", size, emit.lanes(emit.I32, 0x7F))
    return builder.select(nan, builder.bitcast(emit.lanes(emit.I32, NAN_BITS), emit.F32V), value)


@emit.function(types.void, types.int64, vector)
def store_float32(builder, address, value):
    """16 float32."""
    emit.write(builder, address, value)


@emit.function(types.void, types.int64, vector)
def store_bfloat16(builder, address, value):
    """16 bfloat16, rounded to nearest, ties to even."""
    emit.write(builder, address, builder.trunc(emit.bfloat16_bits(builder, value), emit.I16V))


@emit.function(types.void, types.int64, vector)
def store_e4m3(builder, address, value):
    """16 float8_e4m3fn of values within +-448, rounded to nearest, ties to even; NaN stays NaN."""
    bits = builder.bitcast(value, emit.I32V)
    sign = builder.lshr(
        builder.and_(bits, emit.lanes(emit.I32, 0x80000000)), emit.lanes(emit.I32, 24)
    )
    size = builder.and_(bits, emit.lanes(emit.I32, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, emit.lanes(emit.I32, 20)), emit.lanes(emit.I32, 1))
    rounded = builder.add(builder.add(size, emit.lanes(emit.I32, 0x7FFFF)), odd)
    normal = builder.sub(
        builder.lshr(rounded, emit.lanes(emit.I32, 20)), emit.lanes(emit.I32, 120 << 3)
    )
    # At 2**14 neighbouring float32 are 2**-9 apart, as e4m3's subnormals are.
    shifted = builder.fadd(builder.bitcast(size, emit.F32V), emit.lanes(emit.F32, 2.0**14))
    small = builder.sub(builder.bitcast(shifted, emit.I32V), emit.lanes(emit.I32, 0x46800000))
    is_small = builder.icmp_unsigned("<", size, emit.lanes(emit.I32, 0x3C800000))  # 2**-6
    byte = builder.select(is_small, small, normal)
    nan = builder.icmp_unsigned(">", size, emit.lanes(emit.I32, 0x7F800000))
    byte = builder.or_(builder.select(nan, emit.lanes(emit.I32, 0x7F), byte), sign)
    emit.write(builder, address, builder.trunc(byte, emit.I8V))


@emit.function(types.float32, types.int64)
def scalar_float32(builder, address):
    """One float32."""
    return emit.read(builder, address, emit.F32)


@emit.function(types.void, types.int64, types.float32)
def put_float32(builder, address, value):
    """One float32."""
    emit.write(builder, address, value)


@emit.function(types.int64, types.int64)
def scalar_int64(builder, address):
    """One int64."""
    return emit.read(builder, address, INT64)


@emit.function(types.int64, types.int64)
def scalar_int32(builder, address):
    """One int32."""
    return builder.sext(emit.read(builder, address, emit.I32), INT64)


@intrinsic
def address_of(typing, pointer):
    """A pointer as the number that the functions here take."""

    def generate(context, builder, signature, values):
        return builder.ptrtoint(values[0], INT64)

    return types.int64(pointer), generate


@emit.function(types.void, types.int64)
def prefetch(builder, address):
    """Has the cache fetch the line of 64 bytes; any address will do."""
    pointer = emit.pointer(builder, address, emit.I8)
    emit.call(
        builder, "llvm.prefetch.p0", ir.VoidType(), pointer, emit.I32(0), emit.I32(3), emit.I32(1)
    )


@emit.function(types.int64, types.int64, types.int64)
def fetch_add(builder, address, value):
    """Adds to an int64 that threads share; what it was before."""
    pointer = emit.pointer(builder, address, INT64)
    return builder.atomic_rmw("add", pointer, value, "seq_cst")


@emit.function(types.int64, types.int64)
def load_shared(builder, address):
    """An int64 that other threads change."""
    return builder.load_atomic(emit.pointer(builder, address, INT64), "acquire", 8)


@emit.function(types.void, types.int64, types.int64)
def put_int64(builder, address, value):
    """One int64."""
    emit.write(builder, address, value)


# Other code --------------------------------------------------------------------------------


@intrinsic
def pause(typing):
    """Tells the core that this thread waits for another."""

    def generate(context, builder, signature, values):
        emit.call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), generate


@emit.function(types.int64, types.int64)
def call_int(builder, function):
    """What an int function(void) at this address returns."""
    kind = ir.FunctionType(emit.I32, [])
    return builder.sext(builder.call(emit.pointer(builder, function, kind), []), INT64)


@intrinsic
def system_call(typing, function, number, address, action, value):
    """syscall(number, address, action, value, NULL), `function` being its address."""

    def generate(context, builder, signature, values):
        kind = ir.FunctionType(INT64, [INT64] * 5)
        function = emit.pointer(builder, values[0], kind)
        return builder.call(function, [*values[1:], INT64(0)])

    return types.int64(*[types.int64] * 5), generate


@emit.function(types.void, types.int64, types.int64)
def call_kernel(builder, function, arguments):
    """Calls a void function(void *) at this address."""
    argument = emit.pointer(builder, arguments, emit.I8)
    kind = ir.FunctionType(ir.VoidType(), [argument.type])
    builder.call(emit.pointer(builder, function, kind), [argument])


# Arithmetic --------------------------------------------------------------------------------


@emit.function(vector, types.float32)
def splat(builder, value):
    """The same number 16 times."""
    return emit.splat(builder, value)


@emit.function(vector, vector, vector)
def add(builder, a, b):
    """a + b."""
    return builder.fadd(a, b)


@emit.function(vector, vector, vector)
def mul(builder, a, b):
    """a * b."""
    return builder.fmul(a, b)


@emit.function(vector, vector, vector)
def div(builder, a, b):
    """a / b."""
    return builder.fdiv(a, b)


@emit.function(vector, vector, vector, vector)
def fma(builder, a, b, c):
    """a * b + c, rounded once."""
    return emit.fma(builder, a, b, c)


@emit.function(vector, vector)
def round_bfloat16(builder, value):
    """To the nearest bfloat16."""
    return emit.round_bfloat16(builder, value)


@emit.function(vector, vector, types.float32)
def clamp(builder, value, limit):
    """Into [-limit, limit]; NaN stays NaN."""
    high = emit.splat(builder, limit)
    low = builder.fsub(emit.lanes(emit.F32, -0.0), high)
    value = builder.select(builder.fcmp_ordered(">", value, high), high, value)
    return builder.select(builder.fcmp_ordered("<", value, low), low, value)


@emit.function(vector, vector, vector)
def larger_size(builder, a, b):
    """max(|a|, |b|): compared as whole numbers, where NaN is more than all."""
    a, b = (
        builder.and_(builder.bitcast(x, emit.I32V), emit.lanes(emit.I32, 0x7FFFFFFF))
        for x in (a, b)
    )
    return builder.bitcast(builder.select(builder.icmp_unsigned(">", a, b), a, b), emit.F32V)


@emit.function(types.float32, vector)
def largest_size(builder, value):
    """The largest of the absolute values; NaN if there is one."""
    bits = builder.and_(builder.bitcast(value, emit.I32V), emit.lanes(emit.I32, 0x7FFFFFFF))
    return builder.bitcast(
        emit.call(builder, "llvm.vector.reduce.umax.v16i32", emit.I32, bits), emit.F32
    )


@emit.function(types.float32, vector)
def first(builder, value):
    """The first of the 16."""
    return builder.extract_element(value, emit.I32(0))


@emit.function(types.float32, vector)
def total(builder, value):
    """The sum of the 16, always in the same order."""
    return emit.total(builder, value)


@emit.function(types.float32, vector)
def largest(builder, value):
    """The largest of the 16; anything when there is a NaN."""
    for half in (8, 4, 2, 1):
        turned = builder.shuffle_vector(value, value, emit.places_of(range(half, half + LANES)))
        value = builder.select(builder.fcmp_ordered(">", value, turned), value, turned)
    return builder.extract_element(value, emit.I32(0))


@emit.function(vector, types.int64, types.int64)
def load_first(builder, address, count):
    """The first `count` float32 of 16, zeros in place of the rest, which are not read."""
    mask, pointer = emit.first_lanes(builder, count), emit.pointer(builder, address, emit.F32V)
    name = "llvm.masked.load.v16f32.p0"
    return emit.call(
        builder, name, emit.F32V, pointer, emit.I32(4), mask, emit.lanes(emit.F32, 0.0)
    )


@emit.function(vector, vector, vector, vector, vector)
def where_less(builder, a, b, value, other):
    """`value` in the lanes where a < b, `other` in the rest."""
    return builder.select(builder.fcmp_ordered("<", a, b), value, other)


@emit.function(vector, vector, vector)
def larger(builder, a, b):
    """Of each pair the larger; anything where one is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@emit.function(vector, vector)
def exp(builder, x):
    """e**x, see emit.exp."""
    return emit.exp(builder, x)


@emit.function(vector, vector, vector)
def silu_mul(builder, gate, up):
    """silu(gate) * up."""
    return emit.silu_mul(builder, gate, up)


@emit.function(vector, vector)
def exp2(builder, x):
    """2**x of numbers <= 0 to 2 units in the last place, 1 for 0, 0 below EXP2_LOW; NaN stays NaN.

    x = n + r with |r| <= 1/2, a polynomial for 2**r, and n as an exponent.
    """
    low = builder.fcmp_ordered("<", x, emit.lanes(emit.F32, EXP2_LOW))
    magic = emit.lanes(emit.F32, 1.5 * 2.0**23)  # as in exp
    shifted = builder.fadd(x, magic)
    r = builder.fsub(x, builder.fsub(shifted, magic))
    p = emit.lanes(emit.F32, EXP2_FACTORS[0])
    for factor in EXP2_FACTORS[1:]:
        p = emit.fma(builder, p, r, emit.lanes(emit.F32, factor))
    exponent = builder.shl(builder.bitcast(shifted, emit.I32V), emit.lanes(emit.I32, 23))
    power = builder.add(exponent, emit.lanes(emit.I32, 127 << 23))
    out = builder.fmul(p, builder.bitcast(power, emit.F32V))
    return builder.select(low, emit.lanes(emit.F32, 0.0), out)


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
