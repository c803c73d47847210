"""Rotary embedding tables: cos and sin of every position, computed once at load."""

import math

import torch

from common.engine.config import RopeConfig


def rope_table(rope: RopeConfig, head_dim: int, max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [max_len, head_dim] float32; the first half of sin is negated, so that
    turning a vector is `x * cos + roll(x, head_dim / 2) * sin`.

    In float32 throughout, because the models were trained with tables made so: at position 10,000
    a more exact angle is already 1e-3 off theirs.
    """
    frequency, gain = _frequencies(rope, head_dim)
    angle = torch.arange(max_len, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos() * gain, angle.sin() * gain
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def _frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Radians per position [head_dim / 2], and what multiplies cos and sin."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, plain, head_dim), _yarn_gain(rope)
    return plain, 1.0


def _llama3(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, those between blended by
    how many turns they make in the original context."""
    turns = rope.original_max_len / (2 * math.pi / plain)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: RopeConfig, plain: torch.Tensor, head_dim: int) -> torch.Tensor:
    """YaRN (Peng et al. 2023): a ramp over dimensions between the two that make beta_fast and
    beta_slow turns in the original context."""

    def dimension(turns: float) -> float:
        ratio = rope.original_max_len / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width is a step
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def _yarn_gain(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def gain(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return gain(rope.mscale) / gain(rope.mscale_all_dim)
    return gain(1.0)
