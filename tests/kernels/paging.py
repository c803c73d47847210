"""What the attention kernels' tests share: caches in the block format, and attention in float64."""

from dataclasses import dataclass

import torch

from common.engine.cache import KVCache
from common.engine.kernels.reference import quantize_fp8
from common.kv.layout import KVLayout

FP8, HALF, FLOAT = torch.float8_e4m3fn, torch.float16, torch.float32
LAYER = 1  # of two: what kernels read and write is strided within a block


@dataclass(frozen=True, slots=True)
class Pages:
    """One layer of a cache, as KVCache has it. payload e4m3 with scales, or floats without."""

    payload: torch.Tensor
    scales: torch.Tensor | None


def make_pages(blocks: int, kv_heads: int, block_size: int, d: int, dtype: torch.dtype) -> Pages:
    """Zeros of a dtype the cache has, or of float16, which it has not but the interpreter can."""
    if dtype == torch.float16:
        whole = torch.zeros(blocks, 2, 2, kv_heads, block_size, d, dtype=dtype)
        return Pages(whole[:, LAYER], None)
    kind = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8_e4m3"}
    layout = KVLayout(2, kv_heads, d, block_size, kind[dtype])
    cache = KVCache(layout, blocks, torch.device("cpu"))
    return Pages(cache.payload[LAYER], None if cache.scales is None else cache.scales[LAYER])


def poison(pages: Pages) -> None:
    """NaN everywhere: what no test writes must not be read."""
    if pages.scales is None:
        pages.payload.fill_(torch.nan)
    else:
        pages.payload.view(torch.uint8).fill_(0x7F)
        pages.scales.fill_(torch.nan)


def fill(contexts, kv_heads, d, block_size, kv, seed) -> tuple[Pages, torch.Tensor]:
    """Poisoned pages in a shuffled order, with the KV of contexts; and the block table."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-context // block_size) for context in contexts]
    pages = make_pages(2 + sum(counts), kv_heads, block_size, d, kv)
    poison(pages)
    order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
    table = torch.full((len(contexts), max(1, *counts) + 2), -1, dtype=torch.int32)
    for i, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        mine, order = order[:count], order[count:]
        table[i, :count] = torch.tensor(mine, dtype=torch.int32)
        x = torch.randn(context, 2, kv_heads, d, generator=generator)
        # Magnitudes from token to token, as scales meet them.
        x *= torch.exp2(torch.randint(-4, 3, (context, 1, kv_heads, 1), generator=generator))
        values, scale = quantize_fp8(x) if kv == FP8 else (x.to(kv), None)
        block = torch.tensor(mine).repeat_interleave(block_size)[:context]
        offset = torch.arange(context) % block_size
        pages.payload.permute(0, 3, 1, 2, 4)[block, offset] = values
        if scale is not None:
            pages.scales.permute(0, 3, 1, 2)[block, offset] = scale
    return pages, table


def gather(pages: Pages, table: list[int], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a sequence's first tokens, each [tokens, kv_heads, d] float64."""
    whole = pages.payload[table].double()  # [blocks, 2, kv_heads, block_size, d]
    if pages.scales is not None:
        whole = whole * pages.scales[table].double().unsqueeze(-1)
    k, v = whole.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :tokens].unbind(0)
    return k, v


def attention64(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """q [queries, heads, d], k and v [tokens, kv_heads, d]; the queries are the last tokens. The
    textbook's softmax(Q K^T) V in float64."""
    queries, heads, _ = q.shape
    tokens, kv_heads, _ = k.shape
    k, v = (x.double().repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    key = torch.arange(tokens)
    query = torch.arange(tokens - queries, tokens)[:, None]
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
