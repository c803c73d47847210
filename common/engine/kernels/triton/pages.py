"""How attention kernels read Q and the pages of K and V; decode and prefill share it.

A head's d columns are taken as two parts. e4m3 is loaded two columns at a time, as int16, so its
parts are the even and the odd columns; those of other types are the left and the right half.
"""

import torch
import triton
import triton.language as tl

from common.engine.kernels.triton.fp8 import decode_e4m3_pairs

COMPUTE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
LOG2_E = 1.4426950408889634


def compute_type(q: torch.dtype, fp8: bool) -> tl.dtype:
    """What tiles are multiplied in. float16 for e4m3 also where the model has bfloat16: a GPU
    converts to it in one instruction of two elements, and it keeps more of Q."""
    return tl.float16 if fp8 and q == torch.bfloat16 else COMPUTE[q]


def page_arguments(
    payload: torch.Tensor, scales: torch.Tensor | None
) -> tuple[torch.Tensor | int | None, ...]:
    """payload, scales and their strides (block, K or V, head, token; block, K or V, head) as
    kernels take them: e4m3 as int16, two columns an element."""
    if scales is None:
        return payload, None, *payload.stride()[:4], 0, 0, 0
    pairs = payload.view(torch.int16)
    return pairs, scales, *pairs.stride()[:4], *scales.stride()[:3]


@triton.jit
def load_queries(
    row, held, D: tl.constexpr, WIDTH: tl.constexpr, FP8: tl.constexpr, COMPUTE: tl.constexpr
):
    """Both parts [rows, WIDTH] of Q as COMPUTE, and the power of two [rows] to multiply scores by.
    row: where each head begins; held: which to read, zeros else.

    bfloat16 has float32's range and float16 has not: rows become less than 2 then.
    """
    ROWS: tl.constexpr = row.shape[0]
    if FP8:
        column = tl.arange(0, 2 * WIDTH)[None, :]
        whole = tl.load(row[:, None] + column, mask=held[:, None] & (column < D), other=0.0)
        first, second = tl.split(tl.reshape(whole, (ROWS, WIDTH, 2)))
    else:
        column = tl.arange(0, WIDTH)[None, :]
        mask = held[:, None] & (column < D // 2)
        first = tl.load(row[:, None] + column, mask=mask, other=0.0)
        second = tl.load(row[:, None] + column + D // 2, mask=mask, other=0.0)
    if first.dtype == COMPUTE or COMPUTE != tl.float16:
        factor = tl.full((ROWS,), 1.0, tl.float32)
    else:
        first, second = first.to(tl.float32), second.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
        # The exponent alone: a power of two, so that nothing is rounded.
        factor = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        factor = tl.where(factor == 0.0, 1.0, factor)
        first, second = first / factor[:, None], second / factor[:, None]
    return first.to(COMPUTE), second.to(COMPUTE), factor


@triton.jit
def store_parts(row, first, second, held, D: tl.constexpr, FP8: tl.constexpr):
    """Writes both parts [rows, WIDTH] of heads, each beginning at `row`, where held."""
    ROWS: tl.constexpr = first.shape[0]
    WIDTH: tl.constexpr = first.shape[1]
    kind = row.dtype.element_ty
    if FP8:
        column = tl.arange(0, 2 * WIDTH)[None, :]
        whole = tl.reshape(tl.join(first.to(kind), second.to(kind)), (ROWS, 2 * WIDTH))
        tl.store(row[:, None] + column, whole, mask=held[:, None] & (column < D))
    else:
        column = tl.arange(0, WIDTH)[None, :]
        mask = held[:, None] & (column < D // 2)
        tl.store(row[:, None] + column, first.to(kind), mask=mask)
        tl.store(row[:, None] + column + D // 2, second.to(kind), mask=mask)


@triton.jit
def load_parts(
    base,
    at,
    mask,
    D: tl.constexpr,
    FP8: tl.constexpr,
    COMPUTE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Both parts of rows of K or V as COMPUTE. e4m3 is read as int16, two columns an element:
    tensor cores take operands by 16 bits, and V transposed."""
    if FP8:
        return decode_e4m3_pairs(load_or_zero(base + at, mask), COMPUTE, NATIVE)
    else:
        first = load_or_zero(base + at, mask)
        return first.to(COMPUTE), load_or_zero(base + at + D // 2, mask).to(COMPUTE)


@triton.jit
def load_or_zero(pointers, mask):
    """Elements, zeros where the mask says no; mask None: all."""
    if mask is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0)


@triton.jit
def softmax_step(scores, factor, most, total):
    """A tile's part of softmax(scores * factor): its weights relative to the largest score so far,
    by what earlier sums shrink, the new largest score and total weight.

    scores [rows, keys] without base 2's factor [rows], which is positive; most and total [rows].
    Online softmax (Milakov & Gimelshein 2018) in base 2. A row may have seen no key yet.
    """
    new_most = tl.maximum(most, tl.max(scores, 1))
    base = tl.where(new_most == float("-inf"), 0.0, new_most * factor)
    shrink = tl.exp2(tl.fma(most, factor, -base))
    lowered = tl.broadcast_to(-base[:, None], scores.shape)
    weights = tl.exp2(tl.fma(scores, tl.broadcast_to(factor[:, None], scores.shape), lowered))
    return weights, shrink, new_most, total * shrink + tl.sum(weights, 1)


@triton.jit
def scale_weights(weights, v_scale, scores, unit, PEAK: tl.constexpr, MASKED: tl.constexpr):
    """weights [rows, keys] times V's scales [keys], in a unit that makes PEAK of 1 times the
    largest scale: so they stay in float16's or e4m3's range. Also by what sums in the former unit
    are multiplied, and the new unit, [rows] each.

    MASKED: the largest of what the row sees, its scores not being -inf; else of all keys. It must
    not be of what the row does not see, or the row would depend on how a chunk is cut; and a tile
    of which it sees nothing must leave the unit alone.
    """
    if MASKED:
        seen = tl.where(scores == float("-inf"), 0.0, v_scale[None, :])
        largest = tl.max(seen, 1)
    else:
        largest = tl.max(v_scale, 0)
    # A floor keeps the sums finite in the new unit: 2**-100.
    inverse = PEAK / tl.where(largest > 0.0, tl.maximum(largest, 7.888609052210118e-31), 1.0)
    changed = largest + tl.zeros_like(unit) > 0.0  # [rows]
    new = tl.where(changed, 1.0 / inverse, unit)
    if MASKED:
        weights *= v_scale[None, :] * inverse[:, None]
    else:
        weights *= (v_scale * inverse)[None, :]
    return weights, tl.where(changed, unit * inverse, 1.0), new
