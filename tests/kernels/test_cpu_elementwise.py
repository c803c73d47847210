"""Compiled norms, activations, rotary positions and KV writes, against plain torch."""

import math

import pytest
import torch

from common.engine.cache import KVCache
from common.engine.kernels.cpu import elementwise
from common.engine.kernels.cpu.launch import KIND
from common.engine.kernels.cpu.ops import CpuOps, Step
from common.engine.kernels.reference import ReferenceOps
from common.kv.layout import KVLayout
from tests.engine.driving import make_batch

torch.set_num_threads(1)

REFERENCE = ReferenceOps()
DTYPES = (torch.float32, torch.bfloat16)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize("width", [16, 768, 40])
@pytest.mark.parametrize("rows", [1, 33, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_and_its_norm_are_those_of_float64(dtype, rows, width):
    x, delta, weight = (
        torch.randn(*shape).to(dtype) for shape in ((rows, width),) * 2 + ((width,),)
    )
    for given in (None, delta):
        total = x if given is None else x + given
        wide = total.double()
        want = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        new, normed = CpuOps().add_norm(x.clone(), given, weight, 1e-5, None)
        assert torch.equal(new, total)
        close(normed.double(), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_is_that_of_float64(dtype):
    x = torch.randn(7, 96).to(dtype) * 10
    x[0, :5] = torch.tensor([200.0, -200.0, 0.0, 90.0, -90.0])
    gate, up = x.double().chunk(2, -1)
    close(CpuOps().silu_mul(x, None).double(), gate.sigmoid() * gate * up, dtype)


@pytest.mark.parametrize("width", [16, 17, 100, 4096, 4099, 12300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widened_rows_are_those_that_were_given_and_no_more(dtype, width):
    x = torch.randn(3, width).to(dtype)
    x[1, -1], x[2, 0] = math.nan, -math.inf
    out = torch.full((3 * width + 16,), 7.0)
    a = elementwise.WidenArguments(x=x.data_ptr(), out=out.data_ptr(), width=width)
    items = 3 * -(-width // elementwise.WIDEN_COLUMNS)
    elementwise.widen_kernel(KIND[dtype]).run(a, items, 2)
    assert torch.equal(out[: 3 * width].view(torch.int32), x.float().view(-1).view(torch.int32))
    assert (out[3 * width :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_not_swallowed(dtype):
    x = torch.ones(2, 64).to(dtype)
    x[0, 3] = math.nan
    _, normed = CpuOps().add_norm(x.clone(), None, torch.ones(64).to(dtype), 1e-5, None)
    assert normed[0].isnan().all()
    assert normed[1].isfinite().all()
    assert CpuOps().silu_mul(x, None).isnan().sum() == 1
    x[0, 3] = math.inf
    assert CpuOps().silu_mul(x, None)[0, 3].isinf()


def written(ops, cache, qkv, batch, rope, qk_norm=None):
    step = ops.prepare(
        batch, cache, qkv.shape[1] - 2 * cache.layout.num_kv_heads, (None,) * 2, rope
    )
    assert isinstance(step, Step) == isinstance(ops, CpuOps)
    return ops.write_kv(qkv.clone(), cache, 1, step, qk_norm)


def random_rope(head_dim):
    angle = torch.randn(96, head_dim // 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("kv_dtype", ["float32", "bf16", "fp8_e4m3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_turned_keys_and_values_land_where_the_reference_puts_them(dtype, kv_dtype, head_dim):
    layout = KVLayout(2, 2, head_dim, 8, kv_dtype)
    rows = [([0] * 80, 3, [5, 1, *range(7, 16)]), ([0], 20, [2, 6, 4])]
    batch = make_batch(rows, 8)
    rope = random_rope(head_dim)
    qkv = torch.randn(81, 6 + 4, head_dim).to(dtype)
    caches = [KVCache(layout, 16, torch.device("cpu")) for _ in range(2)]
    want, got = (
        written(ops, cache, qkv, batch, rope)
        for ops, cache in zip((REFERENCE, CpuOps()), caches, strict=True)
    )
    close(got.float(), want.float(), dtype)
    (want, got), values = (cache.payload[1].float() for cache in caches), (slice(None), 1)
    # Values are not turned: their bits must agree.
    assert torch.equal(got[values], want[values])
    if kv_dtype != "fp8_e4m3":
        close(got, want, dtype)
        return
    want, got = (cache.scales[1] for cache in caches)
    assert torch.equal(got[values], want[values])
    close(got, want, torch.float32)


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_q_and_k_are_normed_turned_and_rotated_as_in_float64(dtype, rotate, head_dim):
    cache = KVCache(KVLayout(2, 2, head_dim, 8, "float32"), 7, torch.device("cpu"))
    batch = make_batch([([0] * 11, 3, [5, 1]), ([0], 20, [2, 6, 4])], 8)
    cos, sin = random_rope(head_dim)
    qkv = torch.randn(12, 6 + 4, head_dim).mul_(3).to(dtype)
    weight = (torch.rand(8, head_dim) + 0.5).to(dtype)
    got = written(CpuOps(rotate_qk=rotate), cache, qkv, batch, (cos, sin), (weight, 1e-5))

    x = qkv[:, :8].double()
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    at = [table[batch.positions].unsqueeze(1).double() for table in (cos, sin)]
    x = x * at[0] + torch.roll(x, head_dim // 2, -1) * at[1]
    if rotate:
        signs = [[(-1.0) ** (i & j).bit_count() for j in range(head_dim)] for i in range(head_dim)]
        x = x @ torch.tensor(signs).double() / head_dim**0.5
    close(got.double(), x[:, :6], dtype)
    block, offset = batch.slot_mapping // 8, batch.slot_mapping % 8
    k, v = cache.payload[1][block, :, :, offset].double().unbind(1)
    close(k, x[:, 6:], dtype)
    assert torch.equal(v, qkv[:, 8:].double())


def test_fp8_bytes_and_scales_are_bitwise_the_reference_quantizers():
    sizes = torch.tensor([0.0, 1e-42, 1e-38, 1e-20, 1e-3, 1.0, 3e5, 3e38])[:, None, None]
    v = torch.randn(8, 1, 64).clamp(-1, 1) * sizes
    v = torch.cat((v, torch.randn(40, 1, 64)))
    v[8, 0, :4] = torch.tensor([math.inf, -math.inf, 0.0, -0.0])
    v[9, 0, 7] = math.nan
    v[10, 0, :8] = torch.tensor([448.0, 440, 432, 433, 0.0146, 0.00097, 17, -19])
    qkv = torch.cat((torch.randn(48, 2, 64), v), 1)
    layout = KVLayout(2, 1, 64, 16, "fp8_e4m3")
    batch = make_batch([([0] * 48, 0, [1, 2, 3])], 16)
    rope = torch.ones(64, 64), torch.zeros(64, 64)
    want, got = (KVCache(layout, 4, torch.device("cpu")) for _ in range(2))
    written(REFERENCE, want, qkv, batch, rope)
    written(CpuOps(), got, qkv, batch, rope)
    assert torch.equal(got.scales[1].isnan(), want.scales[1].isnan())
    finite = ~want.scales[1].isnan()
    assert torch.equal(got.scales[1][finite], want.scales[1][finite])
    same = got.payload[1].view(torch.uint8) == want.payload[1].view(torch.uint8)
    assert same[finite].all()
    assert got.payload[1].float()[~finite].isnan().all()
