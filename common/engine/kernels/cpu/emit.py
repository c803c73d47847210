"""LLVM code for vectors of 16 float32: what the functions of `simd` and `tiles` are made of."""

from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

LANES = 16
F32, I32, I16, I8 = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8)
F32V, I32V = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
I16V, I8V = ir.VectorType(I16, LANES), ir.VectorType(I8, LANES)
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


def function(returns: types.Type, *arguments: types.Type) -> Callable[[Callable], Callable]:
    """An intrinsic of fixed types from a function (builder, *values) -> value of LLVM."""

    def decorate(body: Callable) -> Callable:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            out = body(builder, *values)
            return context.get_dummy_value() if out is None else out

        # Numba counts the parameters of a typing function, hence one for each number of them.
        typings = {
            1: lambda typing, a: (returns(*arguments), generate),
            2: lambda typing, a, b: (returns(*arguments), generate),
            3: lambda typing, a, b, c: (returns(*arguments), generate),
            4: lambda typing, a, b, c, d: (returns(*arguments), generate),
        }
        typing = typings[len(arguments)]
        typing.__name__ = typing.__qualname__ = body.__name__
        typing.__doc__ = body.__doc__
        return intrinsic(typing)

    return decorate


def lanes(element: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, LANES), [value] * LANES)


def call(builder: ir.IRBuilder, name: str, returns: ir.Type, *values: Any, flags: Any = ()) -> Any:
    kind = ir.FunctionType(returns, [value.type for value in values])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, values, fastmath=flags)


def pointer(builder: ir.IRBuilder, address: Any, element: ir.Type) -> Any:
    return builder.inttoptr(address, element.as_pointer())


def read(builder: ir.IRBuilder, address: Any, element: ir.Type) -> Any:
    load = builder.load(pointer(builder, address, element))
    load.align = 1
    return load


def write(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    builder.store(value, pointer(builder, address, value.type), align=1)


def splat(builder: ir.IRBuilder, value: Any) -> Any:
    nothing = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    start = builder.insert_element(nothing, value, I32(0))
    return builder.shuffle_vector(start, start, ir.Constant(I32V, [0] * LANES))


def total(builder: ir.IRBuilder, value: Any) -> Any:
    start = ir.Constant(F32, -0.0)
    return call(builder, "llvm.vector.reduce.fadd.v16f32", F32, start, value, flags=("reassoc",))


def fma(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    return call(builder, "llvm.fma.v16f32", F32V, a, b, c)


def bfloat16_bits(builder: ir.IRBuilder, value: Any) -> Any:
    """[16] i32 that hold bfloat16."""
    bits = builder.bitcast(value, I32V)
    odd = builder.and_(builder.lshr(bits, lanes(I32, 16)), lanes(I32, 1))
    rounded = builder.add(builder.add(bits, lanes(I32, 0x7FFF)), odd)
    nan = builder.fcmp_unordered("uno", value, value)
    kept = builder.select(nan, builder.or_(bits, lanes(I32, 0x400000)), rounded)
    return builder.lshr(kept, lanes(I32, 16))


def round_bfloat16(builder: ir.IRBuilder, value: Any) -> Any:
    return builder.bitcast(builder.shl(bfloat16_bits(builder, value), lanes(I32, 16)), F32V)


def exp(builder: ir.IRBuilder, x: Any) -> Any:
    """e**x to 2 units in the last place, 0 below EXP_LOW, e**EXP_HIGH above; NaN stays NaN.

    x = n * log(2) + r with |r| <= log(2) / 2, log(2) in two parts (Cody & Waite 1980), a
    polynomial for e**r, and n added to the exponent.
    """
    high = builder.fcmp_ordered(">", x, lanes(F32, EXP_HIGH))
    x = builder.select(high, lanes(F32, EXP_HIGH), x)
    low = builder.fcmp_ordered("<", x, lanes(F32, EXP_LOW))
    x = builder.select(low, lanes(F32, EXP_LOW), x)
    # Adding 1.5 * 2**23 rounds to a whole number, which is then found in the low bits.
    magic = lanes(F32, 1.5 * 2.0**23)
    shifted = fma(builder, x, lanes(F32, 1.4426950408889634), magic)
    n = builder.fsub(shifted, magic)
    r = fma(builder, n, lanes(F32, -0.693145751953125), x)
    r = fma(builder, n, lanes(F32, -1.428606765330187e-06), r)
    p = lanes(F32, 1 / 720)
    for factor in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        p = fma(builder, p, r, lanes(F32, factor))
    exponent = builder.shl(builder.bitcast(shifted, I32V), lanes(I32, 23))
    power = builder.add(exponent, lanes(I32, 127 << 23))
    out = builder.fmul(p, builder.bitcast(power, F32V))
    return builder.select(low, lanes(F32, 0.0), out)


def silu_mul(builder: ir.IRBuilder, gate: Any, up: Any) -> Any:
    """gate / (1 + e**-gate) * up."""
    below = exp(builder, builder.fmul(gate, lanes(F32, -1.0)))
    return builder.fmul(builder.fdiv(gate, builder.fadd(lanes(F32, 1.0), below)), up)


def places_of(lanes: Iterable[int]) -> ir.Constant:
    return ir.Constant(I32V, list(lanes))


def first_lanes(builder: ir.IRBuilder, count: Any) -> Any:
    count = splat(builder, builder.trunc(count, I32))
    return builder.icmp_signed("<", places_of(range(LANES)), count)


def unpack(builder: ir.IRBuilder, group: Any) -> list[Any]:
    return [builder.extract_value(group, g) for g in range(group.type.count)]


def pack(builder: ir.IRBuilder, values: list[Any]) -> Any:
    out = ir.Constant(ir.ArrayType(F32V, len(values)), ir.Undefined)
    for g, value in enumerate(values):
        out = builder.insert_value(out, value, g)
    return out


def places(builder: ir.IRBuilder, address: Any, stride: Any, count: int) -> list[Any]:
    return [builder.add(address, builder.mul(stride, stride.type(g))) for g in range(count)]
