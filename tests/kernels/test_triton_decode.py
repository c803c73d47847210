"""Paged decode attention against the textbook's attention in float64."""

import pytest
import torch

from common.engine.kernels.triton import decode_attention as decode
from common.engine.kernels.triton.decode_attention import decode_attention
from tests.kernels.paging import FLOAT, FP8, HALF, attention64, fill, gather


def check(contexts, heads, kv_heads, d, block_size, kv, dtype, window=None, rtol=None) -> None:
    pages, table = fill(contexts, kv_heads, d, block_size, kv, seed=d + heads)
    q = torch.randn(len(contexts), heads, d, generator=torch.Generator().manual_seed(7)).to(dtype)
    out = decode_attention(
        q, pages.payload, pages.scales, table, torch.tensor(contexts, dtype=torch.int32),
        max(contexts), scale=d**-0.5, window=window,
    )  # fmt: skip
    assert out.dtype == dtype
    tolerance = rtol or {HALF: 3e-3, FLOAT: 1e-5}[dtype]
    for i, context in enumerate(contexts):
        count = -(-context // block_size)
        k, v = gather(pages, table[i, :count].tolist(), context)
        expected = attention64(q[i : i + 1], k, v, d**-0.5, window)[0]
        error = (out[i].double() - expected).norm() / expected.norm()
        assert error < tolerance, f"sequence {i} of {context} tokens is off by {error}"


@pytest.mark.parametrize("kv", [HALF, FP8])
@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8])
def test_groups_and_head_sizes(group, d, kv):
    check([1, 19], group, 1, d, 16, kv, HALF)


@pytest.mark.parametrize("kv", [HALF, FP8])
@pytest.mark.parametrize("block_size", [1, 16, 32])
def test_contexts_at_the_edges_of_blocks_tiles_and_splits(block_size, kv):
    contexts = [1, 15, 16, 17, 32, 33, 128, 129, 256, 257, 513]
    check(contexts, 2, 1, 64, block_size, kv, HALF)


@pytest.mark.parametrize("kv", [FLOAT, FP8, HALF])
def test_float32_queries_compute_in_float32(kv):
    check([5, 70, 260], 4, 2, 64, 16, kv, FLOAT)


@pytest.mark.parametrize("kv", [HALF, FP8])
@pytest.mark.parametrize("window", [1, 16, 50, 300, 1000])
def test_a_window_hides_what_is_before_it(window, kv):
    check([1, 40, 64, 65, 330, 700], 2, 1, 64, 16, kv, HALF, window=window)


def test_blocks_before_the_window_may_be_anybodys(monkeypatch):
    pages, table = fill([100], 1, 64, 16, HALF, seed=0)
    q = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(1)).to(HALF)
    context = torch.tensor([100], dtype=torch.int32)
    args = (q, pages.payload, None)
    before = decode_attention(*args, table, context, 100, scale=0.125, window=30)
    pages.payload[table[0, :4]] = torch.nan  # tokens 0 to 63; the window begins at 70
    pages.payload[table[0, 4], :, :, :6] = torch.nan
    table[0, :4] = -1
    assert torch.equal(decode_attention(*args, table, context, 100, scale=0.125, window=30), before)


def test_contexts_of_more_splits_than_are_merged_get_longer_ones(monkeypatch):
    monkeypatch.setattr(decode, "MAX_SPLITS", 4)
    monkeypatch.setattr(decode, "SPLIT_TOKENS", 128)
    check([1, 512, 513, 900], 2, 1, 64, 16, HALF, HALF)


def test_a_sequence_gets_the_same_bits_alone_in_a_batch_and_under_a_larger_bound():
    contexts = [300, 1, 600, 16]
    pages, table = fill(contexts, 1, 64, 16, FP8, seed=3)
    q = torch.randn(4, 4, 64, generator=torch.Generator().manual_seed(4)).to(HALF)
    length = torch.tensor(contexts, dtype=torch.int32)
    args = (pages.payload, pages.scales)
    together = decode_attention(q, *args, table, length, 4096, scale=0.125)
    for i, context in enumerate(contexts):
        alone = decode_attention(
            q[i : i + 1], *args, table[i : i + 1], length[i : i + 1], context, scale=0.125
        )
        assert torch.equal(alone[0], together[i])


def test_a_padding_row_of_no_context_gives_zeros_and_touches_no_page():
    pages, table = fill([40], 1, 64, 16, FP8, seed=5)
    table = torch.cat((table, torch.full_like(table, -1)))
    q = torch.randn(2, 4, 64).to(HALF)
    for bound in (40, 2000):
        out = decode_attention(
            q, pages.payload, pages.scales, table, torch.tensor([40, 0], dtype=torch.int32),
            bound, scale=0.125,
        )  # fmt: skip
        assert not out[0].isnan().any()
        assert torch.equal(out[1], torch.zeros_like(out[1]))


def test_nan_within_the_context_reaches_its_sequence_and_no_other():
    pages, table = fill([40, 40], 1, 64, 16, HALF, seed=6)
    pages.payload[table[1, 1], 0, 0, 3, 5] = torch.nan
    q = torch.randn(2, 4, 64).to(HALF)
    lengths = torch.tensor([40, 40], dtype=torch.int32)
    out = decode_attention(q, pages.payload, None, table, lengths, 40, scale=0.125)
    assert not out[0].isnan().any()
    assert out[1].isnan().all()


def test_queries_beyond_the_range_of_float16_are_computed_all_the_same(monkeypatch):
    monkeypatch.setattr(decode, "compute_type", lambda q, fp8: decode.tl.float16)
    pages, table = fill([33], 2, 64, 16, FP8, seed=8)
    q = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(9))
    lengths = torch.tensor([33], dtype=torch.int32)
    args = (pages.payload, pages.scales, table, lengths, 33)
    q[0, 2] = 0
    plain = decode_attention(q, *args, scale=0.125)
    large = decode_attention(q * 2.0**20, *args, scale=0.125 * 2.0**-20)
    assert torch.equal(plain, large)


def test_q_may_be_a_part_of_a_larger_tensor():
    pages, table = fill([20, 3], 2, 64, 16, FP8, seed=10)
    qkv = torch.randn(2, 8, 64).to(HALF)
    lengths = torch.tensor([20, 3], dtype=torch.int32)
    args = (pages.payload, pages.scales, table, lengths, 20)
    whole = decode_attention(qkv[:, :4].contiguous(), *args, scale=0.125)
    assert torch.equal(decode_attention(qkv[:, :4], *args, scale=0.125), whole)


def test_v_of_every_magnitude_and_of_zeros_adds_up():
    pages, table = fill([600], 1, 64, 16, FP8, seed=11)
    blocks = table[0, :38].long()
    for first, factor in ((0, 100.0), (8, 0.0), (16, 1e-20), (24, 1.0), (32, 1e-3)):
        pages.scales[blocks[first : first + 8], 1] *= factor
    q = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(12)).to(HALF)
    k, v = gather(pages, table[0, :38].tolist(), 600)
    for context in (130, 400, 600):
        length = torch.tensor([context], dtype=torch.int32)
        args = (pages.payload, pages.scales, table, length, context)
        for window in (None, 300):
            out = decode_attention(q, *args, scale=0.125, window=window).double()
            expected = attention64(q, k[:context], v[:context], 0.125, window)
            torch.testing.assert_close(out, expected, rtol=5e-3, atol=1e-3 * expected.abs().max())
