"""A Llama in float64 numpy and an FP8 quantizer in whole numbers: what a quantized cache must give.

Shares nothing with the code under test.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

E4M3_MAX = 448


def e4m3_value(byte: int) -> Fraction | None:
    """What the byte means: sign, 4 bits of exponent with bias 7, 3 of mantissa; None for NaN."""
    sign, exponent, mantissa = -1 if byte >> 7 else 1, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return None
    if exponent == 0:
        return sign * Fraction(mantissa, 2**9)
    return sign * Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7)


def e4m3_byte(value: Fraction) -> int:
    """The nearest e4m3 value's byte, ties to the even mantissa, saturating; 0 keeps no sign."""
    size = min(abs(value), Fraction(E4M3_MAX))
    below = max(b for b in range(127) if e4m3_value(b) <= size)
    above = min(below + 1, 126)
    low, high = size - e4m3_value(below), e4m3_value(above) - size
    up = high < low or (high == low and below % 2 == 1)
    byte = above if up else below
    return byte | 0x80 if value < 0 else byte


def round_bf16(x: np.ndarray) -> np.ndarray:
    """To 8 significant bits, ties to even."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8)


def round_fp8(x: np.ndarray) -> np.ndarray:
    """Quantized to e4m3 with the scale amax / 448 of each vector (last axis), and back."""
    scale = np.abs(x).max(-1, keepdims=True) / E4M3_MAX
    return nearest_e4m3(x / np.where(scale == 0, 1, scale)) * scale


def nearest_e4m3(y: np.ndarray) -> np.ndarray:
    """The nearest e4m3 values, ties to the even mantissa, saturating; float64."""
    # Between 2**e and 2**(e+1) e4m3 values are 2**(e-3) apart, under 2**-6 they are 2**-9 apart.
    _, exponent = np.frexp(y)
    step = np.ldexp(1.0, np.maximum(exponent - 1, -6) - 3)
    return np.clip(np.rint(y / step) * step, -E4M3_MAX, E4M3_MAX)


def llama_logits(
    path: Path,
    config: dict,
    tokens: list[int],
    keep: Callable[[np.ndarray], np.ndarray],
    multiply: Callable[[str, np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Logits [tokens, vocab] float64; K (turned) and V go through `keep` before attention, and the
    layers' matrices are applied by `multiply(module, x)` where it is given."""
    weights = {k: v.astype(np.float64) for k, v in load_file(path / "model.safetensors").items()}
    if multiply is None:

        def multiply(module: str, x: np.ndarray) -> np.ndarray:
            return x @ weights[f"{module}.weight"].T

    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    dim, count = config["head_dim"], len(tokens)
    angle = np.outer(
        np.arange(count), config["rope_theta"] ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    )

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["eps"]) * weights[name]

    def turn(x: np.ndarray) -> np.ndarray:
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)

    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}."
        y = norm(x, f"{name}input_layernorm.weight")
        q, k, v = (multiply(f"{name}self_attn.{p}_proj", y).reshape(count, -1, dim) for p in "qkv")
        q, k, v = turn(q), keep(turn(k)), keep(v)
        out = np.zeros((count, heads, dim))
        for h in range(heads):
            g = h * groups // heads
            score = q[:, h] @ k[:, g].T / math.sqrt(dim)
            score[np.triu_indices(count, 1)] = -np.inf
            weight = np.exp(score - score.max(-1, keepdims=True))
            out[:, h] = weight / weight.sum(-1, keepdims=True) @ v[:, g]
        x = x + multiply(f"{name}self_attn.o_proj", out.reshape(count, -1))
        y = norm(x, f"{name}post_attention_layernorm.weight")
        gate, up = multiply(f"{name}mlp.gate_proj", y), multiply(f"{name}mlp.up_proj", y)
        x = x + multiply(f"{name}mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
    return norm(x, "model.norm.weight") @ weights["lm_head.weight"].T
