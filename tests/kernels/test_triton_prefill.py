"""Paged prefill attention against the textbook's attention in float64."""

import pytest
import torch

from common.engine.kernels.triton.prefill_attention import prefill_attention
from tests.kernels.paging import FLOAT, FP8, HALF, attention64, fill, gather


def run(pages, table, queries, contexts, q, **options) -> torch.Tensor:
    start = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    return prefill_attention(
        q, pages.payload, pages.scales, table, start,
        torch.tensor(contexts, dtype=torch.int32), scale=q.shape[2] ** -0.5, **options,
    )  # fmt: skip


def check(
    queries, contexts, heads, kv_heads, d, block_size, kv, dtype,
    window=None, tolerance=None, **options,
) -> None:  # fmt: skip
    pages, table = fill(contexts, kv_heads, d, block_size, kv, seed=d + heads)
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(sum(queries), heads, d, generator=generator).to(dtype)
    out = run(pages, table, queries, contexts, q, window=window, **options)
    assert out.dtype == dtype
    limit = tolerance or {HALF: 3e-3, FLOAT: 1e-5}[dtype]
    start = 0
    for i, (count, context) in enumerate(zip(queries, contexts, strict=True)):
        blocks = table[i, : -(-context // block_size)].tolist()
        k, v = gather(pages, blocks, context)
        expected = attention64(q[start : start + count], k, v, d**-0.5, window)
        error = (out[start : start + count].double() - expected).norm() / expected.norm()
        assert error < limit, f"sequence {i}, {count} of {context} tokens, is off by {error}"
        start += count


@pytest.mark.parametrize("kv", [HALF, FP8])
@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8])
def test_groups_and_head_sizes(group, d, kv):
    check([1, 19], [1, 50], group, 1, d, 16, kv, HALF)


@pytest.mark.parametrize("kv", [HALF, FP8])
@pytest.mark.parametrize("block_size", [1, 16, 32])
def test_whole_prompts_chunks_after_a_prefix_and_single_queries_share_a_step(block_size, kv):
    queries = [1, 15, 16, 33, 1, 65, 130]
    contexts = [1, 15, 32, 33, 64, 130, 201]
    check(queries, contexts, 2, 1, 64, block_size, kv, HALF)


@pytest.mark.parametrize("kv", [FLOAT, FP8, HALF])
def test_float32_queries_compute_in_float32(kv):
    check([5, 3, 20], [5, 70, 50], 4, 2, 64, 16, kv, FLOAT)


@pytest.mark.parametrize("kv", [HALF, FP8])
@pytest.mark.parametrize("window", [1, 16, 50, 100, 1000])
def test_a_window_hides_what_is_before_it(window, kv):
    check([1, 40, 64, 90], [1, 40, 129, 150], 2, 1, 64, 16, kv, HALF, window=window)


@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("window", [None, 20])
def test_fp8_products_are_off_by_e4m3s_rounding_alone(group, d, window):
    # Q and the probabilities have 3 bits of mantissa: up to 1/16 off, on average a third of it.
    check(
        [1, 19, 33], [1, 150, 33], group, 1, d, 16, FP8, HALF,
        window=window, tolerance=0.06, fp8_products=True,
    )  # fmt: skip


def test_fp8_products_are_exact_where_q_and_the_probabilities_are():
    # Equal keys, so that the probabilities are equal and 448 times them is e4m3's largest.
    pages, table = fill([40], 1, 64, 16, FP8, seed=1)
    pages.payload[:, 0] = pages.payload[table[0, 0], 0, 0, 0].clone()
    pages.scales[:, 0] = pages.scales[table[0, 0], 0, 0, 0].clone()
    pages.scales[:, 1] = 0.25
    q = torch.full((40, 2, 64), 3.0, dtype=HALF)
    out = run(pages, table, [40], [40], q, fp8_products=True)
    k, v = gather(pages, table[0, :3].tolist(), 40)
    expected = attention64(q, k, v, 0.125, None)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)


def test_pages_wholly_before_the_window_may_be_anybodys():
    pages, table = fill([200], 1, 64, 16, HALF, seed=0)
    q = torch.randn(70, 2, 64, generator=torch.Generator().manual_seed(1)).to(HALF)
    before = run(pages, table, [70], [200], q, window=2)
    pages.payload[table[0, :8]] = torch.nan  # tokens 0 to 127; the first window begins at 129
    table[0, :8] = -1
    assert torch.equal(run(pages, table, [70], [200], q, window=2), before)


@pytest.mark.parametrize("kv", [HALF, FP8])
@pytest.mark.parametrize("window", [None, 60])
def test_a_row_has_the_same_bits_however_the_chunk_is_cut_and_whatever_the_batch(kv, window):
    pages, table = fill([200, 40], 2, 64, 16, kv, seed=3)
    q = torch.randn(240, 4, 64, generator=torch.Generator().manual_seed(4)).to(HALF)
    whole = run(pages, table, [200, 40], [200, 40], q, window=window)
    first = 0
    # Cuts at tiles of 64 queries, and ends anywhere: the interpreter's products are numpy's, which
    # round a row by its place in the tile.
    for last in (64, 128, 150):
        part = run(pages, table[:1], [last - first], [last], q[first:last], window=window)
        assert torch.equal(part, whole[first:last])
        first = last


def test_sequences_without_queries_and_rows_without_a_sequence_are_left_alone():
    pages, table = fill([20, 9, 30], 1, 64, 16, FP8, seed=5)
    q = torch.randn(40, 2, 64, generator=torch.Generator().manual_seed(6)).to(HALF)
    out = torch.full_like(q, 7.0)
    run(pages, table, [20, 0, 10], [20, 9, 30], q, out=out)
    assert torch.equal(out[30:], torch.full_like(out[30:], 7.0))
    alone = run(pages, table[2:], [10], [30], q[20:30])
    assert torch.equal(out[20:30], alone)


def test_nan_within_the_context_reaches_the_rows_that_see_it_and_no_other():
    pages, table = fill([40], 1, 64, 16, HALF, seed=6)
    pages.payload[table[0, 1], 0, 0, 3, 5] = torch.nan  # token 19
    q = torch.randn(40, 4, 64).to(HALF)
    out = run(pages, table, [40], [40], q)
    assert out[19:].isnan().all()
    assert not out[:19].isnan().any()


@pytest.mark.parametrize("fp8_products", [False, True])
def test_v_of_every_magnitude_and_of_zeros_adds_up(fp8_products):
    pages, table = fill([230], 1, 64, 16, FP8, seed=11)
    for first, factor in ((0, 100.0), (4, 0.0), (8, 1e-20), (11, 1.0)):
        pages.scales[table[0, first : first + 4].long(), 1] *= factor
    q = torch.randn(230, 2, 64, generator=torch.Generator().manual_seed(12)).to(HALF)
    k, v = gather(pages, table[0, :15].tolist(), 230)
    for window in (None, 40):
        out = run(pages, table, [230], [230], q, window=window, fp8_products=fp8_products)
        expected = attention64(q, k, v, 0.125, window)
        error = (out.double() - expected).norm(dim=(1, 2))
        if fp8_products:  # Q's rounding moves single rows further
            assert error.norm() < 0.08 * expected.norm()
        else:
            assert (error <= 3e-3 * expected.norm(dim=(1, 2)) + 1e-7).all()
