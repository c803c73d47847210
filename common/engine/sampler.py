"""From logits to tokens. A row's token depends on its logits, parameters, seed and position only.

Order of the filters, as in vLLM: temperature, min-p, top-k, top-p. The random number of a row is
Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of its seed (the
key) and position (the counter), so a sequence that is resumed elsewhere goes on with the same
tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.engine.sampling_params import SamplingParams

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox 4x32-10: four random 32-bit words of a counter and a key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of a token, with 53 bits.

    seed      in [0, 2**64)
    position  index of the sampled token in its sequence
    """
    counter = (position & _MASK, position >> 32 & _MASK, 0, 0)
    high, low, _, _ = philox(counter, (seed & _MASK, seed >> 32 & _MASK))
    return ((high << 32 | low) >> 11) * 2.0**-53


@dataclass(frozen=True, slots=True)
class _Settings:
    """One tensor per setting, a value per row, [n, 1]."""

    temperature: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab: int, like: torch.Tensor) -> "_Settings":
        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)

        top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
        return cls(
            temperature=column([p.temperature for p in params]),
            min_p=column([p.min_p for p in params]),
            top_k=torch.tensor(top_k, device=like.device).unsqueeze(1),
            top_p=column([p.top_p for p in params]),
        )


class Sampler:
    """Stateless; the same object may serve any number of batches."""

    def sample(
        self,
        logits: torch.Tensor,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        positions: Sequence[int],
        banned: Sequence[Sequence[int]] | None = None,
    ) -> list[int | None]:
        """One token per row; None for a row whose logits are not usable (NaN, +inf, or all
        tokens impossible), which says nothing about the others.

        logits     [n, vocab]  float32, not written
        params     n           how to choose
        seeds      n           in [0, 2**64)
        positions  n           index in its sequence of the token to be chosen
        banned     n           tokens that may not be chosen (min_tokens); None: none
        """
        if banned is not None and any(banned):
            logits = _without(logits, banned)
        # One max per row finds NaN and +inf (both win) and a row of -inf.
        usable = torch.isfinite(logits.amax(dim=-1)).tolist()
        tokens: list[int | None] = [None] * len(params)
        greedy = [i for i, ok in enumerate(usable) if ok and params[i].greedy]
        if greedy:
            for i, token in zip(greedy, logits[greedy].argmax(dim=-1).tolist(), strict=True):
                tokens[i] = token
        random = [i for i, ok in enumerate(usable) if ok and not params[i].greedy]
        if random:
            chosen = _sample_rows(
                logits[random],
                [params[i] for i in random],
                [uniform(seeds[i], positions[i]) for i in random],
            )
            for i, token in zip(random, chosen, strict=True):
                tokens[i] = token
        return tokens


def _without(logits: torch.Tensor, banned: Sequence[Sequence[int]]) -> torch.Tensor:
    logits = logits.clone()
    for row, tokens in enumerate(banned):
        if tokens:
            logits[row, list(tokens)] = -torch.inf
    return logits


def _sample_rows(
    logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> list[int]:
    """One token per row by the inverse of the filtered distribution's cumulative sum.

    logits [n, vocab], finite maximum; uniforms n numbers in [0, 1)
    """
    # float64: sums over a big vocabulary are then exact enough not to depend on the batch.
    ordered, tokens = torch.sort(logits.double(), dim=-1, descending=True, stable=True)
    settings = _Settings.of(params, logits.shape[-1], ordered)
    weights = filtered_weights(ordered, settings)
    totals = weights.cumsum(dim=-1)
    draw = torch.tensor(uniforms, dtype=totals.dtype, device=totals.device).unsqueeze(1)
    rank = torch.searchsorted(totals, draw * totals[:, -1:], right=True)
    # Rounding may carry the draw to the very end: the last token kept is meant.
    last = (weights > 0).sum(dim=-1, keepdim=True) - 1
    return tokens.gather(1, torch.minimum(rank, last)).squeeze(1).tolist()


def filtered_weights(ordered: torch.Tensor, settings: _Settings) -> torch.Tensor:
    """Unnormalized probabilities of the tokens that pass all filters, 0 for the others.

    ordered  [n, vocab] float64, logits in descending order
    """
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    weights = ((ordered - ordered[:, :1]) / settings.temperature).exp()
    # The likeliest token's weight is 1, so min-p is a bound on the weight itself.
    keep = weights >= settings.min_p
    keep &= torch.arange(ordered.shape[1], device=ordered.device) < settings.top_k
    weights = torch.where(keep, weights, 0.0)
    before = weights.cumsum(dim=-1) - weights
    # top_p 1 keeps all, whatever rounding says.
    inside = (before < settings.top_p * weights.sum(dim=-1, keepdim=True)) | (settings.top_p >= 1)
    inside[:, 0] = True
    return torch.where(inside, weights, 0.0)
