"""The e4m3 helpers of the Triton kernels, over every kind of value, against torch's own casts."""

import pytest
import torch
import triton
import triton.language as tl

from common.engine.kernels.reference import quantize_fp8
from common.engine.kernels.triton.fp8 import (
    NATIVE_FP8,
    decode_e4m3,
    encode_e4m3,
    fp8_scale,
    quantize_e4m3,
)


@triton.jit
def encode_kernel(x, out, n, BLOCK: tl.constexpr, NATIVE: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(out + i, encode_e4m3(value, NATIVE), mask=i < n)


@triton.jit
def decode_kernel(code, out, BLOCK: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, decode_e4m3(tl.load(code + i), DTYPE, NATIVE))


@triton.jit
def quantize_kernel(x, out, scale, D, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                    NATIVE: tl.constexpr):  # fmt: skip
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    valid = tl.broadcast_to((column < D)[None, :], (ROWS, BLOCK))
    at = row[:, None] * D + column[None, :]
    value = tl.load(x + at, mask=valid, other=1e30)
    s = fp8_scale(value, valid)
    tl.store(scale + row, s)
    tl.store(out + at, quantize_e4m3(value, s, NATIVE), mask=valid)


def encode(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=torch.uint8)
    encode_kernel[(triton.cdiv(len(x), 2**16),)](x, out, len(x), BLOCK=2**16, NATIVE=NATIVE_FP8)
    return out


def all_bf16() -> torch.Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def dense_float32() -> torch.Tensor:
    """Every tie and code with its neighbours in float32, every power of two, and random bits."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    points = torch.cat((codes, (codes[1:] + codes[:-1]) / 2)).float()
    powers = torch.ldexp(torch.ones(277), torch.arange(-149, 128))
    points = torch.cat((points, powers, torch.tensor([464.0, 480.0])))
    bits = points.view(torch.int32)
    near = torch.cat([bits + step for step in range(-3, 4)]).clamp_(min=0)
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (2**18,), generator=generator).to(torch.int32)
    # Of the random bits most are far outside of e4m3; these are not.
    inside = torch.randn(2**18, generator=generator).mul_(0.02).exp_()
    inside = inside * torch.ldexp(torch.ones(2**18), torch.arange(2**18) % 22 - 12)
    positive = torch.cat((near, inside.view(torch.int32)))
    return torch.cat((positive, positive | -(2**31), random)).view(torch.float32)


@pytest.mark.parametrize("values", [all_bf16, dense_float32])
def test_encoding_equals_the_cast_of_torch_saturated_at_448(values):
    x = values()
    code = encode(x)
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(code[~x.isnan()], expected[~x.isnan()])
    assert ((code[x.isnan()] & 0x7F) == 0x7F).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_decoding_is_exact_for_every_code_and_keeps_nan(dtype):
    code = torch.arange(256).to(torch.uint8)
    out = torch.empty(256, dtype=dtype)
    kind = tl.float16 if dtype == torch.float16 else tl.float32
    decode_kernel[(1,)](code, out, BLOCK=256, DTYPE=kind, NATIVE=NATIVE_FP8)
    expected = code.view(torch.float8_e4m3fn).to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@pytest.mark.parametrize("dim", [64, 96])
def test_quantized_rows_have_the_bytes_and_scales_of_the_reference(dim):
    x = torch.randn(16, dim, generator=torch.Generator().manual_seed(dim))
    x *= torch.ldexp(torch.ones(16), torch.arange(16) * 8 - 64)[:, None]
    x[3] = 0
    x[4, 5] = torch.inf
    x[5, 6] = -torch.inf
    x[6, 7] = torch.nan
    x[7, :2] = torch.tensor([torch.nan, torch.inf])
    code, scale = torch.zeros(16, dim, dtype=torch.uint8), torch.zeros(16)
    quantize_kernel[(1,)](x, code, scale, dim, ROWS=16, BLOCK=128, NATIVE=NATIVE_FP8)
    values, expected = quantize_fp8(x)
    torch.testing.assert_close(scale, expected, rtol=0, atol=0, equal_nan=True)
    nan = values.float().isnan()
    assert torch.equal((code & 0x7F) == 0x7F, nan)
    assert torch.equal(code[~nan], values.view(torch.uint8)[~nan])
