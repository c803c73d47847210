"""From logits to tokens. A row's token depends on its logits, parameters, seed and tokens only.

Order, as in vLLM: what changes logits (logits.py), then temperature, min-p, top-k, top-p. The
random number of a row is Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3") of its seed (the key) and position (the counter), so a sequence that is resumed elsewhere
goes on with the same tokens.
"""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from common.engine.logits import process
from common.engine.logprobs import describe, log_softmax, unusable_logits
from common.engine.sampling_params import SamplingParams
from common.engine.sequence import Sampled, Sequence, TokenLogprobs
from common.errors import BatonError, InvalidRequest

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
    def of(cls, params: Seq[SamplingParams], vocab: int, like: torch.Tensor) -> "_Settings":
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
    """Stateless but for what it keeps in `Sequence.logit_state`; one serves any number of batches.

    eos_token_ids  the model's: not chosen before min_tokens
    """

    def __init__(self, eos_token_ids: Seq[int] = ()) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> list[Sampled]:
        """One token per row, or the error that says why there is none: logits that are NaN or
        +inf, or no possible token. A row says nothing about the others.

        logits     [n, vocab]  float32, written
        sequences  n           how to choose, and what was chosen so far
        """
        # One max per row finds NaN and +inf (both win) and a row of -inf.
        given = logits.amax(dim=-1).tolist()
        raw = _RawLogprobs(logits, sequences)
        changed = process(logits, sequences, self._eos_token_ids)
        left = logits.amax(dim=-1).tolist() if changed else given
        tokens = _choose(logits, sequences, [math.isfinite(top) for top in left])
        told = raw.of(tokens)
        return [
            Sampled(token, told.get(row))
            if token is not None
            else Sampled(None, error=_unusable(sequences[row], given[row]))
            for row, token in enumerate(tokens)
        ]


class _RawLogprobs:
    """The log-probabilities of the rows that want some, taken before the logits are processed."""

    def __init__(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> None:
        wanted = [s.request.params.logprobs for s in sequences]
        self._rows = [row for row, count in enumerate(wanted) if count is not None]
        self._top = [count for count in wanted if count is not None]
        self._logprobs = log_softmax(logits[self._rows]) if self._rows else None

    def of(self, tokens: Seq[int | None]) -> dict[int, TokenLogprobs | None]:
        """By row; a row without a token has none that means anything."""
        if self._logprobs is None:
            return {}
        chosen = [tokens[row] or 0 for row in self._rows]
        return dict(zip(self._rows, describe(self._logprobs, chosen, self._top), strict=True))


def _unusable(sequence: Sequence, top: float) -> BatonError:
    """Why a row has no token; `top` is the largest of its logits before they were processed."""
    position = len(sequence.token_ids)
    if not math.isfinite(top):
        return unusable_logits(position)
    params = sequence.request.params
    asked = ["bad_words"] * bool(params.bad_words) + ["min_tokens"] * bool(params.min_tokens)
    return InvalidRequest(
        f"{' and '.join(asked) or 'the penalties'} leave no token that could be generated at "
        f"position {position}; allow at least one",
        field=asked[0] if asked else None,
    )


def _choose(
    logits: torch.Tensor, sequences: Seq[Sequence], possible: Seq[bool]
) -> list[int | None]:
    """A token for each row that has a possible one."""
    tokens: list[int | None] = [None] * len(sequences)
    params = [sequence.request.params for sequence in sequences]
    greedy = [i for i, ok in enumerate(possible) if ok and params[i].greedy]
    if greedy:
        for i, token in zip(greedy, _rows(logits, greedy).argmax(dim=-1).tolist(), strict=True):
            tokens[i] = token
    random = [i for i, ok in enumerate(possible) if ok and not params[i].greedy]
    if random:
        chosen = _sample_rows(
            _rows(logits, random),
            [params[i] for i in random],
            [uniform(sequences[i].seed, len(sequences[i].token_ids)) for i in random],
        )
        for i, token in zip(random, chosen, strict=True):
            tokens[i] = token
    return tokens


def _rows(logits: torch.Tensor, rows: Seq[int]) -> torch.Tensor:
    """These rows, copied only where they are not all of them."""
    return logits if len(rows) == len(logits) else logits[rows]


def _sample_rows(
    logits: torch.Tensor, params: Seq[SamplingParams], uniforms: Seq[float]
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
