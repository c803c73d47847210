"""Packed matrices multiply as float64 does, whichever candidate a machine takes."""

import math
import os
import subprocess
import sys

import pytest
import torch

from common.engine.kernels.cpu import linear, matmul, memory, tiles
from common.engine.kernels.cpu import ops as cpu_ops
from common.engine.kernels.cpu.ops import CpuOps
from common.engine.weight import Weight
from tests.support.mesh import ROOT

torch.set_num_threads(1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 11, 16, 37, 200])
@pytest.mark.parametrize("name", linear.CANDIDATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_candidate_multiplies_as_float64(dtype, name, rows, bias):
    weight, x = torch.randn(80, 96).to(dtype), torch.randn(rows, 96).to(dtype)
    added = torch.randn(80).to(dtype) if bias else None
    got = linear.CANDIDATES[name](weight, added)(x)
    want = x.double() @ weight.double().T + (added.double() if bias else 0)
    assert got.shape == (rows, 80)
    assert got.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance / 10)


def test_a_candidate_that_is_wrong_or_missing_is_not_taken(monkeypatch):
    def wrong(weight, bias):
        return lambda x: linear.plain(weight, bias)(x) * 1.1

    def missing(weight, bias):
        raise RuntimeError("not in this build")

    candidates = {"wrong": wrong, "missing": missing, "plain": linear.plain}
    monkeypatch.setattr(linear, "CANDIDATES", candidates)
    linear.best.cache_clear()
    assert linear.best(torch.float32, True) is linear.plain
    linear.best.cache_clear()


@pytest.mark.parametrize("native", {False, tiles.HAS_BFLOAT16})
def test_bfloat16_with_and_without_the_cpus_own_products(native, monkeypatch):
    monkeypatch.setattr(tiles, "HAS_BFLOAT16", native)
    weight, x = torch.randn(112, 96).bfloat16(), torch.randn(13, 96).bfloat16()
    got = matmul.CompiledLinear(weight, None)(x)
    want = x.double() @ weight.double().T
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_a_compiled_row_depend_on_that_row_alone(dtype):
    linear = matmul.CompiledLinear(torch.randn(80, 96).to(dtype), torch.randn(80))
    x = torch.randn(400, 96).to(dtype)
    alone = torch.cat([linear(row) for row in x.split(1)])
    for count in (2, 3, 7, 9, 12, 13, 17, 21, 64, 193, 400):
        assert torch.equal(linear(x[:count]), alone[:count])


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 31, 33, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_product_writes_no_further_than_its_result(dtype, columns, monkeypatch):
    guarded = torch.full((9 * columns + 64,), 7.0, dtype=dtype)
    linear, x = matmul.CompiledLinear(torch.randn(columns, 96).to(dtype), None), torch.randn(9, 96)
    want = linear(x.to(dtype))
    monkeypatch.setattr(matmul, "empty", lambda *_: guarded[: 9 * columns].view(9, columns))
    assert torch.equal(linear(x.to(dtype)), want)
    assert (guarded[9 * columns :] == 7).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("half", [16, 80, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_product_is_bitwise_the_product_and_silu_mul_of_it(dtype, half, bias):
    weight, x = torch.randn(2 * half, 96).to(dtype), torch.randn(200, 96).to(dtype)
    added = torch.randn(2 * half).to(dtype) if bias else None
    product, ops = matmul.CompiledLinear(weight, added), CpuOps()
    gated = matmul.GatedLinear(weight, added)
    for count in (0, 1, 2, 5, 13, 200):
        got = ops.silu_mul(gated(x[:count]), None)
        assert torch.equal(got, ops.silu_mul(product(x[:count]), None))


def test_a_gate_and_up_are_one_product_where_they_fit(monkeypatch):
    monkeypatch.setattr(cpu_ops, "best", lambda *_: matmul.CompiledLinear)
    for half, kind in ((48, matmul.GatedLinear), (40, matmul.CompiledLinear)):
        weight, x = torch.randn(2 * half, 96), torch.randn(7, 96)
        linear = CpuOps().gate_up(Weight(weight), None)
        assert type(linear) is kind
        gate, up = (x.double() @ weight.double().T).chunk(2, -1)
        got = CpuOps().silu_mul(linear(x), None)
        torch.testing.assert_close(got.double(), gate.sigmoid() * gate * up, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_would_share_a_place_in_a_cache_lie_apart(dtype):
    ops, width = CpuOps(), matmul.PANEL * 64
    linear = matmul.CompiledLinear(torch.randn(80, width).to(dtype), None)
    x, delta, weight = (torch.randn(*n, width).to(dtype) for n in ((100,), (100,), ()))
    _, plain = ops.add_norm(x.clone(), delta, weight, 1e-5, None)
    _, apart = ops.add_norm(x.clone(), delta, weight, 1e-5, linear)
    assert plain.is_contiguous()
    assert apart.stride(0) * dtype.itemsize % 2048 == 64
    assert torch.equal(apart, plain)
    assert torch.equal(linear(apart), linear(plain))


def test_a_nan_in_a_row_stays_in_that_row():
    x = torch.ones(3, 96)
    x[1, 4] = math.nan
    out = CpuOps().linear(Weight(torch.randn(80, 96)), None)(x)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


PRODUCTS = """
import os
import baton, torch
from common.engine.kernels.cpu.linear import OneDnnLinear
from tests.soak.flat import sample
torch.set_num_threads(1)
linear = OneDnnLinear(torch.randn(256, 256).bfloat16(), None)
def held(rows):
    for count in rows:
        linear(torch.randn(count, 256).bfloat16())
    return sample(os.getpid()).rss_bytes
print(-held(range(1, 129)) + held(range(129, 641)))
"""


def test_products_of_ever_more_numbers_of_rows_keep_a_limited_memory():
    caches = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    env = {name: value for name, value in os.environ.items() if name not in caches}
    command = [sys.executable, "-c", PRODUCTS]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    # With the libraries' own limits it is 330 MiB.
    assert int(done.stdout) < 100 * 2**20


def test_memory_for_matrices_is_zero_and_nobody_elses(monkeypatch):
    monkeypatch.setattr(memory, "CHUNK_BYTES", 2**21)
    shapes = [(3, 5), (7, 64), (1000, 1000), (1,), (2000, 1000), (64, 64)]
    parts = [memory.zeros(*shape, dtype=torch.bfloat16) for shape in shapes]
    for i, part in enumerate(parts):
        assert part.shape == shapes[i]
        assert part.data_ptr() % 64 == 0
        assert not part.any()
        part.fill_(i + 1)
    for i, part in enumerate(parts):
        assert (part == i + 1).all()
