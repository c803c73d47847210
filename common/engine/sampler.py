"""From logits to tokens. A row's token depends on its logits, parameters, seed and tokens only.

Order, as in vLLM: what changes logits (logits.py), then temperature, min-p, top-k, top-p. The
random number of a row is Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3") of its seed (the key) and position (the counter), so a sequence that is resumed elsewhere
goes on with the same tokens.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from common.engine.device import Fetched, move
from common.engine.inference import in_inference_mode
from common.engine.logits import process
from common.engine.logprobs import describe, log_softmax, measure, unusable_logits
from common.engine.sampling_params import SamplingParams
from common.engine.sequence import Sampled, Sequence, TokenLogprobs
from common.errors import BatonError, InvalidRequest

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
NO_TOKEN = -1

# Logits that are worked on at a time, and tokens that top-k and top-p look at before all of them.
CHUNK = 2**19
CANDIDATES = 128


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


# logits [n, vocab], parameters, seeds and positions -> tokens int64 [n], -1 where there is none.
Choose = Callable[[torch.Tensor, Seq[SamplingParams], Seq[int], Seq[int]], torch.Tensor]


class Sampler:
    """Stateless but for what it keeps in `Sequence.logit_state`; one serves any number of batches.

    eos_token_ids  the model's: not chosen before min_tokens
    choose         chooses on the logits' device without waiting for it; None: what is below does
    """

    def __init__(self, eos_token_ids: Seq[int] = (), choose: Choose | None = None) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._choose_there = choose

    def sample(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> list[Sampled]:
        """One token per row, or the error that says why there is none: logits that are NaN or
        +inf, or no possible token. A row says nothing about the others.

        logits     [n, vocab]  float32, written
        sequences  n           how to choose, and what was chosen so far
        """
        return self.draw(logits, sequences).results()

    @in_inference_mode
    def draw(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> "Draw":
        """As `sample`, whose results the device may still be computing."""
        raw = _RawLogprobs(logits, sequences)
        if self._choose_there is None:
            given = best = _likeliest(logits)
            if process(logits, sequences, self._eos_token_ids):
                best = _likeliest(logits)
            tokens: torch.Tensor | list[int] = _choose(logits, sequences, best)
            return Draw(tokens, sequences, [top for top, _ in given], raw)
        # One max per row finds NaN and +inf (both win) and a row of -inf.
        given = logits.amax(dim=-1)
        process(logits, sequences, self._eos_token_ids)
        tokens = self._choose_there(
            logits,
            [sequence.request.params for sequence in sequences],
            [sequence.seed for sequence in sequences],
            [len(sequence.token_ids) for sequence in sequences],
        )
        return Draw(tokens, sequences, given, raw)


class Draw:
    """Tokens that are being chosen, or were.

    tokens  int64 [n], where they are chosen, or a list; -1 for a row without a token
    """

    def __init__(
        self,
        tokens: torch.Tensor | list[int],
        sequences: Seq[Sequence],
        given: torch.Tensor | list[float],
        raw: "_RawLogprobs",
    ) -> None:
        self.tokens = tokens
        self._sequences = sequences
        self._given = given
        self._raw = raw
        # Later the sequences may be longer.
        self._positions = [len(sequence.token_ids) for sequence in sequences]
        # All that is told of this step goes out now: asked for later it would be behind the next.
        chosen = [tokens, given] if isinstance(tokens, torch.Tensor) else []
        self._fetched = Fetched([*chosen, *raw.measure(tokens)])

    def results(self) -> list[Sampled]:
        """One a row, when they are there."""
        found, given, measured = self.tokens, self._given, self._fetched.wait()
        if isinstance(found, torch.Tensor):
            found, given, *measured = measured
            found, given = found.tolist(), given.tolist()
        tokens = [None if token == NO_TOKEN else token for token in found]
        told = self._raw.told(tokens, measured)
        return [
            Sampled(token, told.get(row)) if token is not None else self._failed(row, given[row])
            for row, token in enumerate(tokens)
        ]

    def _failed(self, row: int, top: float) -> Sampled:
        return Sampled(None, error=_unusable(self._sequences[row], self._positions[row], top))


class _RawLogprobs:
    """The log-probabilities of the rows that want some, taken before the logits are processed."""

    def __init__(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> None:
        wanted = [s.request.params.logprobs for s in sequences]
        self._rows = [row for row, count in enumerate(wanted) if count is not None]
        self._top = [count for count in wanted if count is not None]
        if self._rows:
            self._at = move(torch.tensor(self._rows), logits.device)
            self._logprobs = log_softmax(logits[self._at])

    def measure(self, tokens: torch.Tensor | list[int]) -> list[torch.Tensor]:
        """Of the tokens chosen, where the logits are; a row without a token has none that means
        anything."""
        if not self._rows:
            return []
        chosen = torch.as_tensor(tokens, device=self._at.device)[self._at].clamp(min=0)
        return measure(self._logprobs, chosen, self._top)

    def told(
        self, tokens: Seq[int | None], measured: Seq[torch.Tensor]
    ) -> dict[int, TokenLogprobs | None]:
        """By row, of what `measure` gave."""
        if not self._rows:
            return {}
        chosen = [tokens[row] or 0 for row in self._rows]
        return dict(zip(self._rows, describe(measured, chosen, self._top), strict=True))


def _unusable(sequence: Sequence, position: int, top: float) -> BatonError:
    """Why a row has no token; `top` is the largest of its logits before they were processed."""
    if not math.isfinite(top):
        return unusable_logits(position)
    params = sequence.request.params
    asked = ["bad_words"] * bool(params.bad_words) + ["min_tokens"] * bool(params.min_tokens)
    return InvalidRequest(
        f"{' and '.join(asked) or 'the penalties'} leave no token that could be generated at "
        f"position {position}; allow at least one",
        field=asked[0] if asked else None,
    )


def _likeliest(logits: torch.Tensor) -> list[tuple[float, int]]:
    """The largest logit of each row, and the first token that has it. NaN and +inf are the largest
    where there are any, -inf where there is nothing else."""
    if not logits.is_cpu:
        tops, best = logits.max(dim=-1)
        return list(zip(tops.tolist(), best.tolist(), strict=True))
    rows = logits.numpy()  # whose argmax takes a fifth of the time of torch's
    return [
        (rows.item(row, token), token) for row, token in enumerate(rows.argmax(axis=1).tolist())
    ]


def _choose(
    logits: torch.Tensor, sequences: Seq[Sequence], best: Seq[tuple[float, int]]
) -> list[int]:
    """A token for each row that has a possible one, NO_TOKEN for the others; `best` is
    _likeliest's."""
    tokens, random = [NO_TOKEN] * len(sequences), []
    for row, (top, token) in enumerate(best):
        if not math.isfinite(top):
            continue
        if sequences[row].request.params.greedy:
            tokens[row] = token
        else:
            random.append(row)
    if random:
        chosen = _sample_rows(
            logits if len(random) == len(logits) else logits[random],
            [sequences[i].request.params for i in random],
            [uniform(sequences[i].seed, len(sequences[i].token_ids)) for i in random],
        )
        for i, token in zip(random, chosen, strict=True):
            tokens[i] = token
    return tokens


def _sample_rows(
    logits: torch.Tensor, params: Seq[SamplingParams], uniforms: Seq[float]
) -> list[int]:
    """One token per row: of the tokens that pass the row's filters, in the order of their ids, the
    one where the cumulative sum of their probabilities passes the row's random number.

    logits [n, vocab] float32, finite maximum; uniforms n numbers in [0, 1)
    """
    vocab = logits.shape[-1]
    tokens = [0] * len(params)
    wide = [i for i, p in enumerate(params) if not _is_sorted(p, vocab)]
    narrow = [i for i, p in enumerate(params) if _is_sorted(p, vocab)]
    # Few rows at a time: what is made of them stays in the cache.
    size = max(1, CHUNK // vocab)
    for rows, sample in ((wide, _sample_all), (narrow, _sample_likeliest)):
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            settings = _Settings.of([params[i] for i in part], [uniforms[i] for i in part], logits)
            for i, token in zip(part, sample(logits[part], settings), strict=True):
                tokens[i] = token
    return tokens


def _is_sorted(params: SamplingParams, vocab: int) -> bool:
    """Whether the filters depend on the order of the logits."""
    return 0 < params.top_k < vocab or params.top_p < 1.0


@dataclass(frozen=True, slots=True)
class _Settings:
    """A value per row, [n, 1], float64."""

    temperature: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    uniform: torch.Tensor

    @classmethod
    def of(
        cls, params: Seq[SamplingParams], uniforms: Seq[float], logits: torch.Tensor
    ) -> "_Settings":
        vocab = logits.shape[-1]
        columns = torch.tensor(
            [
                [p.temperature for p in params],
                [p.min_p for p in params],
                [p.top_k if 0 < p.top_k < vocab else vocab for p in params],
                [p.top_p for p in params],
                uniforms,
            ],
            dtype=torch.float64,
            device=logits.device,
        ).unsqueeze(2)
        return cls(*columns)

    def rows(self, rows: torch.Tensor) -> "_Settings":
        """Those of some rows."""
        return _Settings(
            self.temperature[rows],
            self.min_p[rows],
            self.top_k[rows],
            self.top_p[rows],
            self.uniform[rows],
        )

    def weights(self, logits: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        """Unnormalized probabilities of the tokens that min_p keeps, 0 for the others; the
        likeliest token's, whose logit is `top` [n, 1], is 1.

        float64: sums over a big vocabulary are then exact enough not to depend on the batch.
        """
        # Subtracting the maximum first keeps a tiny temperature from overflowing.
        weights = logits.double().sub_(top).div_(self.temperature).exp_()
        return weights.masked_fill_(weights < self.min_p, 0.0)


def _sample_all(logits: torch.Tensor, settings: _Settings) -> list[int]:
    """Rows whose filters need no order."""
    weights = settings.weights(logits, logits.amax(dim=-1, keepdim=True))
    return _draw(weights, settings).tolist()


def _sample_likeliest(logits: torch.Tensor, settings: _Settings) -> list[int]:
    """Rows with top-k or top-p: by their likeliest tokens, and by all of them where those do not
    decide."""
    tokens, decided = _sample_among(logits, settings, min(CANDIDATES, logits.shape[-1]))
    if not decided.all():
        rest = (~decided).nonzero().squeeze(1)
        tokens[rest], _ = _sample_among(logits[rest], settings.rows(rest), logits.shape[-1])
    return tokens.tolist()


def _sample_among(
    logits: torch.Tensor, settings: _Settings, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token of each row's `count` likeliest, [n], and whether all that pass its filters are
    surely among those, [n]."""
    vocab = logits.shape[-1]
    values, ids = logits.topk(count, dim=-1)
    # Equal logits in the order of their ids, which topk does not promise.
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    weights = settings.weights(values, values[:, :1])
    first = torch.arange(count, device=logits.device) < settings.top_k
    weights.masked_fill_(~first, 0.0)
    sums = weights.cumsum(dim=-1)
    totals = sums[:, -1:]
    if count < vocab and bool((settings.top_k > count).any()):
        # A running sum, as above: its rounding does not depend on the batch.
        everything = settings.weights(logits, values[:, :1]).cumsum(dim=-1)[:, -1:]
        totals = torch.where(settings.top_k > count, everything, totals)
    # top_p 1 keeps all, whatever rounding says.
    inside = (sums - weights < settings.top_p * totals) | (settings.top_p >= 1)
    inside[:, 0] = True
    weights.masked_fill_(~inside, 0.0)
    last = (weights > 0).sum(dim=-1, keepdim=True) - 1
    # Of a top_k between, the total is not known either.
    decided = (values.gather(1, last) > values[:, -1:]) & (
        (settings.top_k <= count) | (settings.top_k == vocab)
    )
    if count == vocab:
        decided = torch.ones_like(decided)
    ids, order = ids.sort(dim=-1)
    chosen = _draw(weights.gather(1, order), settings)
    return ids.gather(1, chosen.unsqueeze(1)).squeeze(1), decided.squeeze(1)


def _draw(weights: torch.Tensor, settings: _Settings) -> torch.Tensor:
    """The column of each row where the cumulative sum passes the random number, [n].

    weights [n, m] float64
    """
    sums = weights.cumsum(dim=-1)
    totals = sums[:, -1:].contiguous()
    chosen = torch.searchsorted(sums, settings.uniform * totals, right=True)
    # Rounding may carry the draw to the very end: the last token that passed is meant.
    last = torch.searchsorted(sums, totals)
    return torch.minimum(chosen, last).squeeze(1)
