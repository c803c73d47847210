"""Plain torch, any device: the oracle of every other backend.

Decoding sequences (one query each) are gathered into padded groups of like length, one attention
call a group; longer queries take one call each.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from common.engine.batch import Batch
from common.engine.cache import NULL_BLOCK, KVCache
from common.engine.kernels import Linear
from common.engine.kernels.reference_e4m3 import attend_e4m3
from common.engine.kernels.reference_linear import BlockLinear, ScaledLinear, StackedLinear
from common.engine.quantization.fp8 import FP8, FP8_MAX, decode_256th, finite, has_nan, quotient
from common.engine.quantization.scheme import Activation
from common.engine.weight import Weight

# Decoding sequences in one group: contexts up to this many tokens, then up to twice that, ...
SMALLEST_GROUP_TOKENS = 64
# Elements of K and V gathered at once: bounds the memory of a step (float32: 64 MiB).
MAX_GATHER_ELEMENTS = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Span:
    """One attention call: b sequences with the same number of queries each, keys padded to s.

    rows    [b * queries] int64 rows of the batch, or a slice of them
    blocks  [b * s / block_size] int64, padded with the null block
    length  s
    first   position of the first key; of several sequences it means nothing
    mask    float, [b, 1, 1, s] for one query each, else [queries, s]; 0 or -inf. None: causal
    dead    sequence and key of every padded key, int64 each
    """

    rows: torch.Tensor | slice
    batch: int
    queries: int
    blocks: torch.Tensor
    length: int
    first: int
    mask: torch.Tensor | None
    dead: tuple[torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True, slots=True)
class Step:
    """block and offset [n] int64: the slot of each token. cos and sin [n, 1, d] float32: of each
    token's position. spans: by the layer's window."""

    block: torch.Tensor
    offset: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    spans: dict[int | None, list[Span]]
    windows: tuple[int | None, ...]


class ReferenceOps:
    """See `Ops`.

    fp8_attention  chunks of an e4m3 cache are attended to by e4m3 products, as on a GPU
    """

    def __init__(self, rotate_qk: bool = False, fp8_attention: bool = False) -> None:
        self._rotate_qk = rotate_qk
        self._fp8_attention = fp8_attention

    def can_rotate(self, head_dim: int) -> bool:
        return head_dim & (head_dim - 1) == 0

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        if weight.activation is Activation.GROUP:
            return BlockLinear(weight, bias)
        if weight.activation is not None:
            return ScaledLinear(weight, bias)
        return partial(F.linear, weight=weight.values, bias=bias)

    def gate_up(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        return self.linear(weight, bias)

    def stacked(self, parts: list[Linear]) -> Linear:
        return StackedLinear(parts)

    def prepare(
        self,
        batch: Batch,
        cache: KVCache,
        num_heads: int,
        windows: tuple[int | None, ...],
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> Step:
        size = cache.layout.block_size
        cos, sin = (table[batch.positions].unsqueeze(1) for table in rope)
        spans = {window: plan_spans(batch, cache, window) for window in set(windows)}
        block, offset = batch.slot_mapping // size, batch.slot_mapping % size
        return Step(block, offset, cos, sin, spans, windows)

    def take(self, x: torch.Tensor, rows: torch.Tensor, name: str) -> torch.Tensor:
        return x[rows]

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        into: Linear,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if delta is not None:
            x = x + delta
        return x, F.rms_norm(x, x.shape[-1:], weight, eps)

    def silu_mul(self, gate_up: torch.Tensor, into: Linear) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def write_kv(
        self,
        qkv: torch.Tensor,
        cache: KVCache,
        layer: int,
        step: Step,
        qk_norm: tuple[torch.Tensor, float] | None = None,
    ) -> torch.Tensor:
        kv_heads = cache.num_kv_heads
        qk = qkv[:, :-kv_heads]
        if qk_norm is not None:
            weight, eps = qk_norm
            qk = F.rms_norm(qk, qk.shape[-1:], None, eps) * weight
        turned = apply_rope(qk, step.cos, step.sin)
        if self._rotate_qk:
            turned = hadamard(turned)
        q, k, v = turned[:, :-kv_heads], turned[:, -kv_heads:], qkv[:, -kv_heads:]
        kv = torch.stack((k, v), 1)
        payload = cache.payload[layer].permute(0, 3, 1, 2, 4)
        if cache.scales is None:
            payload[step.block, step.offset] = kv.to(payload.dtype)
            return q
        values, scale = quantize_fp8(kv, cache.static(layer))
        # As bytes: torch does not index e4m3 on every device.
        payload.view(torch.uint8)[step.block, step.offset] = values.view(torch.uint8)
        cache.scales[layer].permute(0, 3, 1, 2)[step.block, step.offset] = scale
        return q

    def attention(self, q: torch.Tensor, cache: KVCache, layer: int, step: Step) -> torch.Tensor:
        window = step.windows[layer]
        spans = step.spans[window]
        if self._fp8_attention and cache.scales is not None:
            return self._attend_e4m3(q, cache, layer, spans, window)
        if len(spans) == 1 and spans[0].queries * spans[0].batch == q.shape[0]:
            return attend(q, cache, layer, spans[0])
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for span in spans:
            out[span.rows] = attend(q[span.rows], cache, layer, span)
        return out

    def _attend_e4m3(
        self, q: torch.Tensor, cache: KVCache, layer: int, spans: list[Span], window: int | None
    ) -> torch.Tensor:
        """Single queries keep their precision."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for span in spans:
            part = q[span.rows]
            if span.queries == 1:
                out[span.rows] = attend(part, cache, layer, span)
                continue
            values, scales = (
                x.flatten(2, 3)[:, :, : span.length] for x in read_codes(cache, layer, span.blocks)
            )
            end = span.first + span.length
            positions = torch.arange(end - span.queries, end, device=q.device)
            out[span.rows] = attend_e4m3(part, values, scales, positions, span.first, window)
        return out


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [n, heads, d]; cos and sin [n, 1, d] float32, sin's first half negated -> like x."""
    wide = x.float()
    turned = torch.roll(wide, x.shape[-1] // 2, -1)
    return torch.addcmul(wide * cos, turned, sin).to(x.dtype)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x [..., d], d a power of two -> x @ H_d / sqrt(d), of x's dtype; its own inverse.

    H_d is Sylvester's matrix; the fast Walsh-Hadamard transform, in float32.
    """
    wide, step = x.float(), 1
    while step < x.shape[-1]:
        low, high = wide.unflatten(-1, (-1, 2, step)).unbind(-2)
        wide = torch.stack((low + high, low - high), -2).flatten(-3)
        step *= 2
    return (wide * x.shape[-1] ** -0.5).to(x.dtype)


def quantize_fp8(
    x: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., d] -> e4m3 values [..., d] and float32 scales [...], x being about values * scale.

    scale  float32 [...] or what broadcasts to it: static scales, over which values saturate. None:
           amax / 448, so that the largest value is e4m3's largest; a zero vector has scale 0

    Infinities saturate. NaN stays NaN: the sampler must see it.
    """
    wide = finite(x)
    scale = wide.abs().amax(-1) / FP8_MAX if scale is None else scale.expand(x.shape[:-1])
    return quotient(wide, scale.unsqueeze(-1)).to(FP8), scale


def dequantize_fp8(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values e4m3 [..., d], scale float32 [...] -> [..., d]."""
    scale = scale.unsqueeze(-1)
    # torch's own cast is for what decoding by hand is not: NaN, and devices where it is as fast.
    if values.device.type != "cpu" or has_nan(values):
        return values.to(torch.float32).mul_(scale).to(dtype)
    return decode_256th(values).mul_(scale * 256).to(dtype)


def read_kv(
    cache: KVCache, layer: int, blocks: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of these blocks, each [kv_heads, blocks * block_size, head_dim] of `dtype`."""
    # index_select copies whole rows, ten times as fast as indexing, and lays heads outermost.
    if cache.scales is None:
        payload = cache.payload[layer].permute(1, 2, 0, 3, 4)
        values = payload.index_select(2, blocks).to(dtype)
    else:
        values = dequantize_fp8(*read_codes(cache, layer, blocks), dtype)
    k, v = values.flatten(2, 3).unbind(0)
    return k, v


def read_codes(
    cache: KVCache, layer: int, blocks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values [2, kv_heads, blocks, block_size, head_dim] of these blocks and their scales
    [2, kv_heads, blocks, block_size]."""
    # As bytes: torch does not index e4m3 on every device.
    codes = cache.payload[layer].view(torch.uint8).permute(1, 2, 0, 3, 4).index_select(2, blocks)
    scales = cache.scales[layer].permute(1, 2, 0, 3).index_select(2, blocks)
    return codes.view(FP8), scales


def attend(q: torch.Tensor, cache: KVCache, layer: int, span: Span) -> torch.Tensor:
    """Softmax attention of a span: q [b * queries, heads, d] -> the same shape.

    The queries of a KV head are batched over it (grouped-query attention without a copy of K
    and V for each).
    """
    count, heads, dim = q.shape
    kv_heads = cache.num_kv_heads
    k, v = read_kv(cache, layer, span.blocks, q.dtype)
    if span.queries > 1:
        grouped = q.view(count, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)
        k, v = (x[:, None, : span.length].expand(-1, heads // kv_heads, -1, -1) for x in (k, v))
        out = F.scaled_dot_product_attention(
            grouped, k, v, attn_mask=span.mask, is_causal=span.mask is None
        )
        return out.permute(2, 0, 1, 3).reshape(count, heads, dim)
    k, v = (x.view(kv_heads, span.batch, span.length, dim).transpose(0, 1) for x in (k, v))
    if span.dead is not None:
        # A masked score still meets its V with weight 0, and 0 * NaN is NaN.
        sequence, key = span.dead
        k[sequence, :, key] = 0
        v[sequence, :, key] = 0
    grouped = q.reshape(span.batch, kv_heads, heads // kv_heads, dim)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=span.mask)
    return out.reshape(count, heads, dim)


def plan_spans(batch: Batch, cache: KVCache, window: int | None) -> list[Span]:
    """The attention calls of a step for layers with this window."""
    layout = cache.layout
    per_token = 2 * cache.num_kv_heads * layout.head_dim
    groups: dict[int, list[int]] = {}
    spans: list[Span] = []
    for i, context in enumerate(batch.context_len):
        queries = batch.query_start[i + 1] - batch.query_start[i]
        if queries > 1:
            for first, last in _query_ranges(queries, context):
                spans.append(_long_span(batch, i, first, last, layout.block_size, window))
            continue
        keys = context if window is None else min(context, window)
        bucket = max(SMALLEST_GROUP_TOKENS, 1 << (keys - 1).bit_length())
        groups.setdefault(bucket, []).append(i)
    for bucket, members in sorted(groups.items()):
        most = max(1, MAX_GATHER_ELEMENTS // (bucket * per_token))
        for first in range(0, len(members), most):
            spans.append(
                _decode_span(batch, members[first : first + most], layout.block_size, window)
            )
    return spans


def _query_ranges(queries: int, context: int) -> list[tuple[int, int]]:
    """Half-open ranges of a chunk's queries, so that no mask grows past the memory limit."""
    if queries == context:
        return [(0, queries)]
    most = max(2, MAX_GATHER_ELEMENTS // context)
    return [(first, min(first + most, queries)) for first in range(0, queries, most)]


def _long_span(batch: Batch, i: int, first: int, last: int, size: int, window: int | None) -> Span:
    """Queries [first, last) of sequence i's chunk."""
    start, queries = batch.query_start[i] + first, last - first
    context = batch.context_len[i] - (batch.query_start[i + 1] - batch.query_start[i] - last)
    # Blocks wholly before the first query's window are left out.
    skipped = 0 if window is None else max(0, context - queries + 1 - window) // size
    blocks = batch.block_table[i, skipped : -(-context // size)].long()
    length = context - skipped * size
    mask = None
    if queries != length or (window is not None and window < context):
        device = batch.token_ids.device
        key = torch.arange(skipped * size, context, device=device)
        query = torch.arange(context - queries, context, device=device)[:, None]
        hidden = key > query
        if window is not None:
            hidden |= key <= query - window
        mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)
    first_key = skipped * size
    return Span(slice(start, start + queries), 1, queries, blocks, length, first_key, mask, None)


def _decode_span(batch: Batch, members: list[int], size: int, window: int | None) -> Span:
    device = batch.token_ids.device
    contexts = [batch.context_len[i] for i in members]
    skipped = [0 if window is None else max(0, context - window) // size for context in contexts]
    width = max(-(-c // size) - s for c, s in zip(contexts, skipped, strict=True))
    if window is None:
        chosen = torch.tensor(members, device=device)
        blocks = batch.block_table[:, :width][chosen].long().clamp_(min=NULL_BLOCK)
    else:
        blocks = torch.full((len(members), width), NULL_BLOCK, dtype=torch.int64, device=device)
        for row, (i, first) in enumerate(zip(members, skipped, strict=True)):
            part = batch.block_table[i, first : first + width]
            blocks[row, : len(part)] = part
        blocks.clamp_(min=NULL_BLOCK)
    bounds = torch.tensor([contexts, skipped], device=device)
    key = torch.arange(width * size, device=device) + (bounds[1] * size)[:, None]
    dead = key >= bounds[0][:, None]
    hidden = dead if window is None else dead | (key < (bounds[0] - window)[:, None])
    mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)
    rows = [batch.query_start[i] for i in members]
    contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
    return Span(
        rows=slice(rows[0], rows[0] + len(rows))
        if contiguous
        else torch.tensor(rows, device=device),
        batch=len(members),
        queries=1,
        blocks=blocks.flatten(),
        length=width * size,
        first=0,
        mask=mask[:, None, None],
        dead=dead.nonzero(as_tuple=True),
    )
