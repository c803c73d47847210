"""FP8 products of the compiled kernels: exact where they can be, a row's bits its own."""

import math

import pytest
import torch

from common.engine.kernels.cpu import e4m3, quantized
from common.engine.kernels.cpu.ops import CpuOps
from common.engine.quantization.fp8 import quantize_input, quantize_weight, spread
from common.engine.quantization.scheme import SCHEMES, Activation
from common.engine.weight import Weight

torch.set_num_threads(1)

DTYPES = (torch.float32, torch.bfloat16)
# Of a CPU's own products, and of every other's; in a test both run on this one.
WAYS = sorted({False, e4m3.NATIVE})
STATIC = torch.tensor(0.003)


def matrix(rows, columns, scheme="fp8", static=False):
    generator = torch.Generator().manual_seed(rows)
    weight = quantize_weight(torch.randn(rows, columns, generator=generator), SCHEMES[scheme])
    return Weight(weight.values, weight.scale, Activation.TENSOR, STATIC) if static else weight


WEIGHTS = {
    "fp8": lambda rows, columns: matrix(rows, columns),
    "block": lambda rows, columns: matrix(rows, columns, "fp8-block"),
    "static": lambda rows, columns: matrix(rows, columns, static=True),
}


@pytest.fixture(params=WAYS, ids=lambda native: "native" if native else "any CPU")
def native(request, monkeypatch):
    monkeypatch.setattr(e4m3, "NATIVE", request.param)


@pytest.mark.parametrize("rows", [1, 3, 4, 9, 40])
def test_every_weight_byte_is_multiplied_as_its_value(native, rows):
    every = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
    every = torch.cat((every, every[:2]))
    # Each row begins with another one: every byte comes at every place of a step.
    codes = torch.stack([every.roll(i) for i in range(80)]).view(torch.float8_e4m3fn)
    weight = Weight(codes, torch.ones(80, 1), Activation.TENSOR, torch.ones(()))
    linear = CpuOps().linear(weight, None)
    for start in range(0, 256, rows):
        picked = torch.arange(start, start + rows) % 256
        x = torch.zeros(rows, 256).scatter_(1, picked[:, None], 1.0)
        assert torch.equal(linear(x), codes.float().T[picked])


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 13, 31, 200])
def test_products_are_those_of_float64_within_the_rounding_of_a_float32_sum(
    native, kind, dtype, rows
):
    weight = WEIGHTS[kind](80, 336)
    x = torch.randn(rows, 336, generator=torch.Generator().manual_seed(rows)).to(dtype)
    bias = torch.randn(80).to(dtype)
    got = CpuOps().linear(weight, bias)(x).double()
    values, scale = quantize_input(x, weight.activation, weight.input_scale)
    a = (values.double() * scale.double()).flatten(1)[:, :336]
    b = weight.values.double()
    b = b * (spread(weight.scale, 80, 336) if kind == "block" else weight.scale).double()
    want = a @ b.T + bias.double()
    bound = 340 * 2.0**-24 * (a.abs() @ b.abs().T + bias.double().abs())
    if dtype is torch.bfloat16:
        bound += want.abs() * 2.0**-8
    assert ((got - want).abs() <= bound).all()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_a_row_depend_on_that_row_alone(native, dtype, kind):
    linear = CpuOps().linear(WEIGHTS[kind](80, 336), torch.randn(80))
    x = torch.randn(400, 336).to(dtype)
    alone = torch.cat([linear(row) for row in x.split(1)])
    for count in (2, 3, 7, 9, 16, 17, 193, 205, 400):
        assert torch.equal(linear(x[:count]), alone[:count])


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 31, 33, 80])
@pytest.mark.parametrize("rows", [9, 21])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_writes_no_further_than_its_result(dtype, rows, columns, monkeypatch):
    guarded = torch.full((rows * columns + 64,), 7.0, dtype=dtype)
    linear = CpuOps().linear(matrix(columns, 96), None)
    x = linear.quantize(torch.randn(rows, 96).to(dtype))
    want = linear(x)
    result = guarded[: rows * columns].view(rows, columns)
    monkeypatch.setattr(quantized, "empty", lambda *_: result)
    assert torch.equal(linear(x), want)
    assert (guarded[rows * columns :] == 7).all()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_input_is_quantized_to_the_bits_of_the_reference(dtype, kind):
    sizes = torch.tensor([0.0, 1e-42, 1e-38, 1e-20, 1e-3, 1.0, 3e5, 3e38])[:, None]
    x = torch.randn(8, 336).clamp(-1, 1) * sizes
    x = torch.cat((x, torch.randn(40, 336)))
    x[8, :4] = torch.tensor([math.inf, -math.inf, 0.0, -0.0])
    x[9, 7] = math.nan
    x[10, :8] = torch.tensor([448.0, 440, 432, 433, 0.0146, 0.00097, 17, -19])
    x = x.to(dtype)
    weight = WEIGHTS[kind](16, 336)
    got = CpuOps().linear(weight, None).quantize(x)
    values, scale = quantize_input(x, weight.activation, weight.input_scale)
    values = values.flatten(1)[:, :336]
    torch.testing.assert_close(got.values.float(), values, rtol=0, atol=0, equal_nan=True)
    scale = scale.view(-1, got.scales.shape[1]).expand_as(got.scales)
    torch.testing.assert_close(got.scales, scale, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("width", [336, 1024])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_activations_hand_over_what_quantizing_their_result_would(dtype, kind, width):
    ops = CpuOps()
    linear = ops.linear(WEIGHTS[kind](64, width), None)
    x, delta, norm = (torch.randn(*s).to(dtype) for s in ((9, width), (9, width), (width,)))
    _, plain = ops.add_norm(x.clone(), delta, norm, 1e-5, None)
    _, handed = ops.add_norm(x.clone(), delta, norm, 1e-5, linear)
    gate_up = torch.randn(9, 2 * width).to(dtype)
    pairs = [(plain, handed), (ops.silu_mul(gate_up, None), ops.silu_mul(gate_up, linear))]
    for plain, handed in pairs:
        want = linear.quantize(plain)
        assert torch.equal(handed.values, want.values)
        assert torch.equal(handed.scales, want.scales)
        assert torch.equal(linear(handed), linear(plain))


def test_a_matrix_takes_a_byte_a_weight():
    linear = CpuOps().linear(matrix(512, 1024), None)
    kept = [x for x in vars(linear).values() if isinstance(x, torch.Tensor)]
    assert sum(x.nbytes for x in kept) < 1.02 * 512 * 1024
