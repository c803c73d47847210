"""Turns Q and K, quantizes K and V and writes them to their pages: one kernel a layer."""

import torch
import triton
import triton.language as tl

from common.engine.kernels.triton.fp8 import NATIVE_FP8, fp8_scale, quantize_e4m3
from common.engine.kernels.triton.hadamard import rotate_halves, supports
from common.errors import ConfigError

# Rows of one head each in a tile: the least that a matrix product takes. More would leave a
# decode step of few tokens with too few thread blocks.
ROWS = 16


def write_kv(
    qkv: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    slots: torch.Tensor,
    payload: torch.Tensor,
    scales: torch.Tensor | None,
    *,
    static: torch.Tensor | None = None,
    qk_norm: tuple[torch.Tensor, float] | None = None,
    rotate: bool = False,
) -> torch.Tensor:
    """RoPE of Q and K, then K and V to the slots of the step's tokens, in one pass over qkv.

    qkv        [n, heads + 2 * kv_heads, d] float16, bfloat16 or float32, contiguous; Q's part is
               overwritten
    rope       cos and sin [max_len, d] float32, as `rope_table` makes them
    positions  [n] int64
    slots      [n] int64, block * block_size + offset; a token of a negative slot writes no KV
    payload    [num_blocks, 2, kv_heads, block_size, d], a layer of the cache, written
    scales     [num_blocks, 2, kv_heads, block_size] float32, written; None unless payload is e4m3
    static     [2, kv_heads] float32, K's and V's scales from the checkpoint, over 448 of which
               values saturate; None: each token and head has a scale of amax / 448
    qk_norm    weight [heads + kv_heads, d] of an RMSNorm of Q and K before the turn, and its eps
    rotate     Q and K are multiplied by H_d / sqrt(d) after the turn (QuaRot, Ashkboos et al.
               2024), which leaves Q K^T as it is and K without outliers. K in the cache is then
               another K: `rotate` must be part of the fingerprint of the KV.
    returns    Q [n, heads, d], a view of qkv

    Bytes and scales of e4m3 equal those of `quantize_fp8` in reference.py. Every step rounds to
    qkv's dtype, as separate operations do.
    Raises ConfigError where `rotate` meets heads that are not 32, 64, 128 or 256.
    """
    n, total, d = qkv.shape
    kv_heads, block_size = payload.shape[2], payload.shape[3]
    heads = total - 2 * kv_heads
    if rotate and not supports(d):
        raise ConfigError(
            f"heads of {d} elements cannot be rotated; switch the rotation of Q and K off"
        )
    weight, eps = qk_norm or (None, 0.0)
    grid = (triton.cdiv(n * total, ROWS),)
    if n:
        # No fused multiply-add but where the code says so: fusing rounds otherwise than torch.
        write_kv_kernel[grid](
            qkv, weight, *rope, positions, slots,
            payload if scales is None else payload.view(torch.uint8), scales, static,
            n * total, eps, *payload.stride()[:4], *((0,) * 3 if scales is None
                                                     else scales.stride()[:3]),
            HEADS=heads, KV_HEADS=kv_heads, D=d, BLOCK_SIZE=block_size, ROWS=ROWS,
            HALF=triton.next_power_of_2(d // 2), ROTATE=rotate, NATIVE=NATIVE_FP8,
            num_warps=8 if rotate else 4, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return qkv[:, :heads]


# Not compiled anew where a step's numbers lie otherwise in memory, or for other numbers of rows.
@triton.jit(
    do_not_specialize=["rows"], do_not_specialize_on_alignment=["positions", "slots", "static"]
)
def write_kv_kernel(
    qkv,
    norm,
    cos,
    sin,
    positions,
    slots,
    payload,
    scales,
    static,
    rows,
    eps,
    stride_block,
    stride_kv,
    stride_head,
    stride_token,
    scale_block,
    scale_kv,
    scale_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    ROTATE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    TOTAL: tl.constexpr = HEADS + 2 * KV_HEADS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    token, head = row // TOTAL, row % TOTAL
    is_v = head >= HEADS + KV_HEADS
    column = tl.arange(0, HALF)[None, :]
    inside = alive[:, None] & (column < D // 2)
    at = row[:, None].to(tl.int64) * D + column
    left = tl.load(qkv + at, mask=inside, other=0.0)
    right = tl.load(qkv + at + D // 2, mask=inside, other=0.0)

    turned = inside & (is_v == 0)[:, None]
    turned_left, turned_right = left, right
    if norm is not None:
        turned_left, turned_right = rms_norm(
            left, right, norm + head[:, None] * D + column, turned, eps, D
        )
    position = tl.load(positions + token, mask=alive, other=0)
    turned_left, turned_right = rope(
        turned_left, turned_right, cos, sin, position[:, None] * D + column, turned, D
    )
    if ROTATE:
        whole_left, whole_right = rotate_halves(turned_left, turned_right, HALF)
        turned_left = whole_left.to(left.dtype)
        turned_right = whole_right.to(left.dtype)
    left = tl.where(is_v[:, None], left, turned_left)
    right = tl.where(is_v[:, None], right, turned_right)

    is_q = inside & (head < HEADS)[:, None]
    tl.store(qkv + at, left, mask=is_q)
    tl.store(qkv + at + D // 2, right, mask=is_q)

    slot = tl.load(slots + token, mask=alive, other=-1)
    stored = alive & (head >= HEADS) & (slot >= 0)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    which = is_v.to(tl.int32)
    kv_head = head - HEADS - which * KV_HEADS
    to = block * stride_block + which * stride_kv + kv_head * stride_head + offset * stride_token
    to = to[:, None] + column
    if scales is None:
        kind = payload.dtype.element_ty
        tl.store(payload + to, left.to(kind), mask=inside & stored[:, None])
        tl.store(payload + to + D // 2, right.to(kind), mask=inside & stored[:, None])
    else:
        left, right = left.to(tl.float32), right.to(tl.float32)
        if static is None:
            scale = tl.maximum(
                fp8_scale(left, inside), fp8_scale(right, inside), tl.PropagateNan.ALL
            )
        else:
            scale = tl.load(static + which * KV_HEADS + kv_head, mask=stored, other=1.0)
        code = quantize_e4m3(left, scale, NATIVE)
        tl.store(payload + to, code, mask=inside & stored[:, None])
        code = quantize_e4m3(right, scale, NATIVE)
        tl.store(payload + to + D // 2, code, mask=inside & stored[:, None])
        to = block * scale_block + which * scale_kv + kv_head * scale_head + offset
        tl.store(scales + to, scale, mask=stored)


@triton.jit
def rms_norm(left, right, weight, mask, eps, D: tl.constexpr):
    """RMSNorm of rows given as halves; `weight` points at the left half's weights. Rounded to the
    rows' dtype before and after the weight."""
    kind = left.dtype
    wide_left, wide_right = left.to(tl.float32), right.to(tl.float32)
    square = tl.sum(wide_left * wide_left, 1) + tl.sum(wide_right * wide_right, 1)
    root = tl.math.rsqrt(square / D + eps)[:, None]
    left_weight = tl.load(weight, mask=mask, other=0.0)
    right_weight = tl.load(weight + D // 2, mask=mask, other=0.0)
    return (wide_left * root).to(kind) * left_weight, (wide_right * root).to(kind) * right_weight


@triton.jit
def rope(left, right, cos, sin, at, mask, D: tl.constexpr):
    """Rows given as halves, turned by the angles at `at`; sin's left half is negated."""
    kind = left.dtype
    left, right = left.to(tl.float32), right.to(tl.float32)
    left_cos = tl.load(cos + at, mask=mask, other=0.0)
    left_sin = tl.load(sin + at, mask=mask, other=0.0)
    right_cos = tl.load(cos + at + D // 2, mask=mask, other=0.0)
    right_sin = tl.load(sin + at + D // 2, mask=mask, other=0.0)
    # Fused as torch's addcmul fuses.
    new_left = tl.fma(right, left_sin, left * left_cos)
    new_right = tl.fma(left, right_sin, right * right_cos)
    return new_left.to(kind), new_right.to(kind)
