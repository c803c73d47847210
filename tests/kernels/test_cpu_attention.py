"""Compiled attention over pages is softmax attention in float64, whatever lies in unused slots."""

import itertools
import math
from functools import partial

import pytest
import torch

from common.engine.cache import KVCache
from common.engine.kernels.cpu import attention, prefill, tiles
from common.engine.kernels.cpu.ops import CpuOps, Step
from common.engine.kernels.reference import quantize_fp8
from common.kv.layout import KVLayout
from tests.engine.driving import make_batch

torch.set_num_threads(1)

KV_DTYPES = ("float32", "bf16", "fp8_e4m3")
NUM_LAYERS, LAYER = 2, 1
ROPE = torch.ones(2048, 256), torch.zeros(2048, 256)
# What a step of several sequences looks like: tokens before the step, tokens of the step.
CONTEXTS = [
    (0, 1),
    (1, 1),
    (15, 1),
    (16, 1),
    (30, 1),
    (255, 1),
    (256, 1),
    (700, 1),
    (40, 5),
    (0, 19),
]


def filled_cache(layout: KVLayout, num_blocks: int, owned: list[list[int]], lengths: list[int]):
    """A cache of NaN but for the tokens that sequences have, and these as float64 [2, g, s, d]."""
    cache = KVCache(layout, num_blocks, torch.device("cpu"))
    cache.data.fill_(0xFF)
    generator = torch.Generator().manual_seed(layout.head_dim + layout.block_size)
    contents = []
    for table, length in zip(owned, lengths, strict=True):
        kv = torch.randn(length, 2, layout.num_kv_heads, layout.head_dim, generator=generator)
        blocks = torch.tensor(table).repeat_interleave(layout.block_size)[:length]
        offsets = torch.arange(length) % layout.block_size
        payload = cache.payload[LAYER].permute(0, 3, 1, 2, 4)
        if cache.scales is None:
            stored = kv.to(payload.dtype)
            payload[blocks, offsets] = stored
            exact = stored.double()
        else:
            values, scale = quantize_fp8(kv)
            payload[blocks, offsets] = values
            cache.scales[LAYER].permute(0, 3, 1, 2)[blocks, offsets] = scale
            exact = values.double() * scale.double().unsqueeze(-1)
        contents.append(exact.permute(1, 2, 0, 3))
    return cache, contents


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """q [n, h, d] are the last n positions of k and v [g, s, d] -> [n, h, d], float64."""
    n, heads, dim = q.shape
    k, v = (x.repeat_interleave(heads // len(x), 0) for x in (k, v))
    scores = torch.einsum("nhd,hsd->hns", q.double(), k) / math.sqrt(dim)
    key, query = torch.arange(k.shape[1]), torch.arange(k.shape[1] - n, k.shape[1])[:, None]
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("hns,hsd->nhd", weights, v)


def check(kv_dtype, head_dim, kv_heads, group, block_size, window, dtype=torch.float32):
    layout = KVLayout(NUM_LAYERS, kv_heads, head_dim, block_size, kv_dtype)
    lengths = [start + count for start, count in CONTEXTS]
    free = iter(torch.randperm(sum(map(layout.blocks_for, lengths))).add(1).tolist())
    owned = [list(itertools.islice(free, layout.blocks_for(n))) for n in lengths]
    cache, contents = filled_cache(layout, 1 + sum(map(len, owned)), owned, lengths)
    batch = make_batch(
        [([0] * n, start, table) for (start, n), table in zip(CONTEXTS, owned, strict=True)],
        block_size,
    )
    ops, heads = CpuOps(), kv_heads * group
    step = ops.prepare(batch, cache, heads, (None, window), ROPE)
    assert isinstance(step, Step)
    q = torch.randn(len(batch.token_ids), heads, head_dim).to(dtype)
    # As write_kv gives it: a part of a wider tensor.
    wide = torch.cat((q, torch.full_like(q, math.nan)), 1)[:, :heads]
    got = ops.attention(wide, cache, LAYER, step)
    again = ops.attention(wide, cache, LAYER, step)
    want = torch.cat([
        expected(part, *content, window)
        for part, content in zip(q.split([n for _, n in CONTEXTS]), contents, strict=True)
    ])  # fmt: skip
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
    assert torch.equal(got, again)


@pytest.mark.parametrize("block_size", [1, 16, 32])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_any_block_size_and_kv_dtype(kv_dtype, block_size):
    check(kv_dtype, 64, 2, 3, block_size, None)


@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 12])
def test_any_number_of_query_heads_to_a_kv_head(group):
    check("float32", 64, 2, group, 16, None)


@pytest.mark.parametrize("head_dim", [32, 96, 128, 256])
@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8_e4m3"])
def test_any_head_size(kv_dtype, head_dim):
    check(kv_dtype, head_dim, 1, 4, 16, None)


@pytest.mark.parametrize("window", [1, 17, 64, 300])
def test_a_window_hides_what_is_older(window):
    check("bf16", 64, 2, 2, 16, window)


@pytest.mark.parametrize("native", {False, tiles.HAS_BFLOAT16})
@pytest.mark.parametrize(
    ("head_dim", "group", "block_size", "window"),
    [(64, 3, 16, None), (64, 8, 1, 17), (96, 1, 16, 300), (128, 5, 32, None), (256, 4, 16, 64)],
)
def test_bfloat16_queries_and_kv(native, head_dim, group, block_size, window, monkeypatch):
    for module, name in ((prefill, "prefill_kernel"), (attention, "decode_kernel")):
        kernel = partial(getattr(module, name), native=native)
        monkeypatch.setattr(module, name, kernel)
    check("bf16", head_dim, 2, group, block_size, window, torch.bfloat16)


def test_bfloat16_queries_of_fp8_kv():
    check("fp8_e4m3", 64, 4, 3, 16, None, torch.bfloat16)


def test_a_nan_in_a_visible_token_reaches_the_result_of_its_row_only():
    layout = KVLayout(NUM_LAYERS, 1, 64, 16, "float32")
    cache, _ = filled_cache(layout, 7, [[1, 2], [3, 4]], [20, 20])
    cache.payload[LAYER][2, 0, 0, 3, 5] = math.nan
    batch = make_batch([([0], 19, [1, 2]), ([0], 19, [3, 4])], 16)
    step = CpuOps().prepare(batch, cache, 2, (None, None), ROPE)
    out = CpuOps().attention(torch.randn(2, 2, 64), cache, LAYER, step)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_the_row_of_a_sequence_is_bitwise_the_same_alone_and_in_a_batch_and_in_a_chunk():
    layout = KVLayout(NUM_LAYERS, 2, 64, 16, "fp8_e4m3")
    lengths = [700, 31, 300]
    owned = [list(range(1, 45)), [45, 46], list(range(47, 66))]
    cache, _ = filled_cache(layout, 66, owned, lengths)
    q = torch.randn(3, 6, 64)
    rows = [([0], n - 1, table) for n, table in zip(lengths, owned, strict=True)]

    def run(q, rows):
        ops = CpuOps(batch_invariant=True)
        step = ops.prepare(make_batch(rows, 16), cache, 6, (None, None), ROPE)
        return ops.attention(q, cache, LAYER, step)

    together = run(q, rows)
    for i, row in enumerate(rows):
        assert torch.equal(run(q[i : i + 1], [row])[0], together[i])
    chunk = torch.cat((torch.randn(9, 6, 64), q[:1]))
    assert torch.equal(run(chunk, [([0] * 10, 690, owned[0])])[-1], together[0])


@pytest.mark.parametrize(
    ("kv_dtype", "dtype", "window"),
    [("bf16", torch.bfloat16, None), ("bf16", torch.bfloat16, 70), ("fp8_e4m3", torch.float32, 9)],
)
def test_the_rows_of_a_chunk_are_bitwise_the_same_however_a_prompt_is_cut(kv_dtype, dtype, window):
    layout = KVLayout(NUM_LAYERS, 2, 64, 16, kv_dtype)
    table = list(range(1, 24))
    cache, _ = filled_cache(layout, 24, [table], [350])
    q = torch.randn(350, 6, 64).to(dtype)

    def run(*ends):
        parts = []
        for start, end in itertools.pairwise((0, *ends)):
            batch = make_batch([([0] * (end - start), start, table)], 16)
            step = CpuOps().prepare(batch, cache, 6, (None, window), ROPE)
            parts.append(CpuOps().attention(q[start:end], cache, LAYER, step))
        return torch.cat(parts)

    whole = run(350)
    assert torch.equal(run(8, 75, 203, 350), whole)
    assert torch.equal(run(64, 350), whole)
