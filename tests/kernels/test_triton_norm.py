"""RMSNorm and SiLU * up by Triton kernels, against float64."""

import pytest
import torch

from common.engine.kernels.triton.activation import silu_mul
from common.engine.kernels.triton.norm import rms_norm
from common.engine.quantization.scheme import Activation
from tests.kernels.test_triton_quantize import assert_same, random_rows

EPS = 1e-5
FUSED = [Activation.TENSOR, Activation.TOKEN, Activation.GROUP]
ROUNDING = {torch.float16: 2**-10, torch.float32: 2e-6}


def norm64(x, weight):
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def assert_rounded(actual, exact):
    """Within one rounding of the dtype of the exact value."""
    error = (actual.double() - exact).abs()
    assert (error <= exact.abs() * ROUNDING[actual.dtype] + 1e-7).all()


def weight_of(*shape, dtype=torch.float16):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(9)) + 0.5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 96), (3, 128), (5, 1000), (2, 4096)])
def test_the_norm_is_float64s_rounded_once(shape, dtype):
    x, weight = random_rows(*shape, dtype), weight_of(shape[1], dtype=dtype)
    before = x.clone()
    assert_rounded(rms_norm(x, weight, EPS), norm64(x, weight))
    assert torch.equal(x, before)


def test_the_sum_with_the_residual_is_rounded_as_written_and_then_normed():
    x, delta, weight = random_rows(5, 200), random_rows(5, 200, seed=1), weight_of(200)
    total = x + delta
    normed = rms_norm(x, weight, EPS, delta=delta)
    assert torch.equal(x, total)
    assert_rounded(normed, norm64(total, weight))


@pytest.mark.parametrize("activation", FUSED)
@pytest.mark.parametrize("d", [128, 200, 1024])
def test_quantizing_within_the_norm_gives_what_quantizing_after_it_gives(activation, d):
    x, delta, weight = random_rows(3, d), random_rows(3, d, seed=1), weight_of(d)
    input_scale = torch.tensor(0.02) if activation is Activation.TENSOR else None
    plain = rms_norm(x.clone(), weight, EPS, delta=delta)
    fused = rms_norm(x, weight, EPS, delta=delta, activation=activation, input_scale=input_scale)
    assert_same(fused, plain, activation, input_scale)


def silu64(gate_up):
    gate, up = gate_up.double().chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 96), (3, 128), (2, 5000)])
def test_the_activation_is_float64s_rounded_once(shape, dtype):
    n, d = shape
    gate_up = torch.randn(n, 2 * d, generator=torch.Generator().manual_seed(2)).mul_(4).to(dtype)
    assert_rounded(silu_mul(gate_up), silu64(gate_up))


@pytest.mark.parametrize("activation", FUSED)
@pytest.mark.parametrize("d", [112, 5000])
def test_quantizing_within_the_activation_gives_what_quantizing_after_it_gives(activation, d):
    gate_up = torch.randn(3, 2 * d, generator=torch.Generator().manual_seed(3)).half()
    input_scale = torch.tensor(0.01) if activation is Activation.TENSOR else None
    fused = silu_mul(gate_up, activation=activation, input_scale=input_scale)
    assert_same(fused, silu_mul(gate_up), activation, input_scale)


def test_a_rows_result_does_not_depend_on_the_other_rows():
    x, weight = random_rows(9, 300), weight_of(300)
    together = rms_norm(x, weight, EPS, activation=Activation.GROUP)
    for i in range(9):
        alone = rms_norm(x[i : i + 1].clone(), weight, EPS, activation=Activation.GROUP)
        assert torch.equal(alone.values.view(torch.uint8)[0], together.values.view(torch.uint8)[i])
        assert torch.equal(alone.scale[0], together.scale[i])
