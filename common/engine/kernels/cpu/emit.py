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
