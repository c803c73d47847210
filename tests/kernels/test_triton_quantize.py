"""Quantization by Triton kernels against `quantize_fp8` of the reference."""

import pytest
import torch

from common.engine.kernels.reference import quantize_fp8
from common.engine.kernels.triton.quantize import GROUP, quantize, quantize_blocks, row_tiles
from common.engine.quantization.scheme import Activation
from common.errors import ConfigError

SHAPES = [(1, 64), (3, 128), (5, 200), (2, 4100), (7, 96)]


def random_rows(n, d, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    return (x * torch.exp(torch.randn(n, 1, generator=generator) * 3)).to(dtype)


def groups_of(x):
    """[n, d] -> float32 [n, groups, 128], padded with zeros."""
    n, d = x.shape
    groups = -(-d // GROUP)
    padded = torch.zeros(n, groups * GROUP)
    padded[:, :d] = x.float()
    return padded.view(n, groups, GROUP)


def expected(x, activation, input_scale=None):
    """Values as bytes [n, d] and scales."""
    n, d = x.shape
    if activation is Activation.TOKEN:
        values, scale = quantize_fp8(x)
        return values.view(torch.uint8), scale.view(n, 1)
    if activation is Activation.GROUP:
        values, scale = quantize_fp8(groups_of(x))
        return values.view(n, -1)[:, :d].contiguous().view(torch.uint8), scale
    values = (x.float() / input_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values.view(torch.uint8), input_scale.expand(n, 1)


def assert_same(result, x, activation, input_scale=None):
    values, scale = expected(x, activation, input_scale)
    torch.testing.assert_close(result.scale, scale.contiguous(), rtol=0, atol=0, equal_nan=True)
    code = result.values.view(torch.uint8)
    nan = (values & 0x7F) == 0x7F
    assert torch.equal((code & 0x7F) == 0x7F, nan)
    assert torch.equal(code[~nan], values[~nan])


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_quantize_to_the_bytes_and_scales_of_the_reference(activation, shape, dtype):
    x = random_rows(*shape, dtype)
    input_scale = torch.tensor(0.037) if activation is Activation.TENSOR else None
    assert_same(quantize(x, activation, input_scale), x, activation, input_scale)


@pytest.mark.parametrize("activation", [Activation.TOKEN, Activation.GROUP])
def test_zero_infinite_and_nan_rows_quantize_as_in_the_reference(activation):
    x = random_rows(6, 300, torch.float32)
    x[0] = 0
    x[1, 7] = torch.inf
    x[2, 290] = -torch.inf
    x[3, 130] = torch.nan
    x[4, 5] = 3e38
    assert_same(quantize(x, activation), x, activation)


def test_rows_of_a_wider_tensor_are_quantized_in_place_without_a_copy():
    wide = random_rows(4, 512)
    x = wide[:, 128:384]
    assert_same(quantize(x, Activation.GROUP), x, Activation.GROUP)


def test_no_rows_give_no_rows():
    result = quantize(torch.empty(0, 256, dtype=torch.float16), Activation.TOKEN)
    assert result.values.shape == (0, 256)
    assert result.scale.shape == (0, 1)


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (130, 257), (256, 96)])
def test_blocks_of_128_by_128_quantize_to_the_bytes_and_scales_of_the_reference(shape):
    x = random_rows(*shape)
    values, scale = quantize_blocks(x)
    rows, d = shape
    assert scale.shape == (-(-rows // 128), -(-d // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128))
            block = x[part]
            want, want_scale = quantize_fp8(block.reshape(1, -1))
            assert scale[i, j] == want_scale
            got = values[part].contiguous().view(torch.uint8)
            assert torch.equal(got, want.view(block.shape).view(torch.uint8))


def test_how_a_row_is_cut_depends_on_its_length_alone_and_too_long_a_row_is_refused():
    assert row_tiles(14336, Activation.TOKEN) == (16384, 1, 16)
    assert row_tiles(14336, Activation.GROUP) == (4096, 4, 4)
    with pytest.raises(ConfigError, match="40000 elements"):
        row_tiles(40000, Activation.TOKEN)
