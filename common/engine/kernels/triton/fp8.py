"""e4m3 (sign, 4 bits of exponent with bias 7, 3 of mantissa) in and out of kernels.

FP8 tensors are passed to kernels as uint8, so that loads and stores are plain bytes. `NATIVE`
says how to convert: True for the GPU's own instructions, False for integer arithmetic, which is
what Triton's interpreter needs (its encoder is wrong near powers of two and its NaN is 480). Both
give the same bytes, except that the GPU drops the sign of NaN.
"""

import triton
import triton.language as tl
from triton import knobs

# Whether kernels compile for a GPU; Triton decides the same way, when a kernel is defined.
NATIVE_FP8 = not knobs.runtime.interpret

FP8_MAX = tl.constexpr(448.0)


@triton.jit
def encode_e4m3(x, NATIVE: tl.constexpr):
    """x float32 of any shape -> uint8, e4m3 rounded to nearest even; beyond 448 saturates to it,
    infinities too; NaN stays NaN."""
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Dropping 20 of 23 mantissa bits: add half of what the last kept bit is worth, less one where
    # that bit is even. 960 = (127 - 7) << 3 moves the exponent from float32's bias to e4m3's.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    # Below 2**-6 steps are 2**-9, which is float32's step at 2**14: the addition rounds.
    shifted = size.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, subnormal, tl.minimum(normal, 0x7E))
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode_e4m3(code, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """code uint8 of any shape -> DTYPE (float16, bfloat16 or float32), all of which hold every
    e4m3 value exactly; NaN stays NaN. The interpreter cannot do bfloat16."""
    if NATIVE:
        return code.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    # Exponent and mantissa moved to float32's places; 2**120: the biases are 7 and 127.
    wide = code.to(tl.int32)
    size = ((wide & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    size = tl.where((wide & 0x7F) == 0x7F, float("nan"), size)
    return tl.where(wide >= 0x80, -size, size).to(DTYPE)


@triton.jit
def decode_e4m3_pairs(pair, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """pair int16 of any shape, two e4m3 values each -> the low bytes and the high bytes as DTYPE,
    as `decode_e4m3`. One byte permutation and two conversions give four float16 on a GPU."""
    if NATIVE and DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted;
            .reg .b16 low, high;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {low, high}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }""",
            "=r,=r,r",
            [pair],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        low = decode_e4m3((pair & 0xFF).to(tl.uint8), DTYPE, NATIVE)
        return low, decode_e4m3(((pair >> 8) & 0xFF).to(tl.uint8), DTYPE, NATIVE)


@triton.jit
def fp8_scale(x, valid):
    """x float32 [rows, d], valid bool [rows, d] -> amax / 448 of each row's valid part [rows].

    An infinity counts as the largest finite float32, a NaN makes the scale NaN.
    """
    size = tl.minimum(tl.where(valid, tl.abs(x), 0.0), 3.4028234663852886e38)
    # max drops NaN on a GPU.
    nan = tl.max((valid & (x != x)).to(tl.int32), 1)
    return tl.where(nan > 0, float("nan"), tl.math.div_rn(tl.max(size, 1), FP8_MAX))


@triton.jit
def quantize_e4m3(x, scale, NATIVE: tl.constexpr):
    """x float32 [rows, d], scale float32 [rows] -> uint8 [rows, d], x being about e4m3 * scale.

    The same bytes as `quantize_fp8` in reference.py: a scale of 0 divides by 1, infinities
    saturate, and the division rounds correctly (Triton's `/` does not).
    """
    limit = 3.4028234663852886e38
    x = tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))
    divisor = tl.where(scale == 0.0, 1.0, scale)
    return encode_e4m3(tl.math.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape)), NATIVE)
