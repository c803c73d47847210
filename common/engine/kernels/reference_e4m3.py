"""Attention whose products are e4m3, in plain torch: the oracle of the Triton kernel's.

FlashAttention-3's FP8 (Shah et al. 2024): Q has a scale a row, K and V are the cache's bytes, and
the probabilities of a tile of keys, times V's scales, become e4m3 in a unit of the tile's own, in
which 448 is what the largest scale gives the likeliest key so far.
"""

import torch

from common.engine.quantization.fp8 import FP8_MAX, quantize_rows, round_to_fp8

# A floor of V's largest scale: sums stay finite in its unit.
LEAST_SCALE = 2.0**-100


def tile_keys(d: int) -> int:
    """Keys whose probabilities share a unit."""
    return 64 if d <= 128 else 32


def attend_e4m3(
    q: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    positions: torch.Tensor,
    first: int,
    window: int | None,
) -> torch.Tensor:
    """softmax(q K^T / sqrt(d)) V, causal -> [n, heads, d] of q's dtype.

    q          [n, heads, d]
    values     [2, kv_heads, keys, d] e4m3, of K and V
    scales     [2, kv_heads, keys] float32
    positions  [n] int64, of the queries in their sequence
    first      position of the first key
    window     tokens each query attends to, the last ones; None for all
    """
    n, heads, d = q.shape
    kv_heads, keys = scales.shape[1:]
    codes, q_scale = quantize_rows(q.reshape(n, kv_heads, heads // kv_heads, d).permute(1, 2, 0, 3))
    k, v = values.float().unsqueeze(2)  # [kv_heads, 1, keys, d] each
    k_scale, v_scale = scales[:, :, None, None]
    key = first + torch.arange(keys, device=q.device)
    hidden = key > positions[:, None]
    if window is not None:
        hidden |= key <= positions[:, None] - window
    scores = codes @ k.transpose(-1, -2) * k_scale * (q_scale * d**-0.5)
    scores = scores.masked_fill(hidden, -torch.inf)
    v_scale = torch.where(hidden, 0.0, v_scale)  # what a row does not see sets no unit

    most = scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    total, unit, sums = torch.zeros_like(most), torch.ones_like(most), torch.zeros_like(codes)
    tile = tile_keys(d)
    for start in range(first // tile * tile, first + keys, tile):
        part = slice(max(0, start - first), min(keys, start - first + tile))
        new_most = torch.maximum(most, scores[..., part].amax(-1, keepdim=True))
        base = new_most.masked_fill(new_most == -torch.inf, 0.0)
        weights, shrink = (scores[..., part] - base).exp(), (most - base).exp()
        largest = v_scale[..., part].amax(-1, keepdim=True)
        inverse = FP8_MAX / largest.clamp(min=LEAST_SCALE)
        changed = largest > 0
        scaled = round_to_fp8(weights * v_scale[..., part] * inverse)
        sums = sums * shrink * torch.where(changed, unit * inverse, 1.0) + scaled @ v[..., part, :]
        unit = torch.where(changed, 1 / inverse, unit)
        most, total = new_most, total * shrink + weights.sum(-1, keepdim=True)
    out = sums * (unit / total)
    return out.permute(2, 0, 1, 3).reshape(n, heads, d).to(q.dtype)
