"""What a request's parameters do to its logits before a token is chosen from them.

In vLLM's order: logit_bias, then repetition, frequency and presence penalty, then what may not be
chosen: bad words, and stop tokens before min_tokens. One tensor operation each, over the rows that
use it, on the few entries that it touches; logits of other rows are not read.

Sources of the formulas: the repetition penalty is that of CTRL (Keskar et al. 2019), the other
penalties are those of OpenAI's API.
"""

from collections.abc import Sequence as Seq

import numpy as np
import torch

from common.engine.device import move
from common.engine.sequence import Sequence

Row = tuple[int, "LogitState"]


class SeenTokens:
    """The distinct tokens of a sequence and how often each was generated."""

    def __init__(self) -> None:
        self._columns: dict[int, int] = {}
        self._table = np.zeros((2, 64), dtype=np.int64)

    def add(self, token: int, count: int) -> None:
        """Count a token `count` more times; 0 only says that it was seen."""
        column = self._columns.setdefault(token, len(self._columns))
        if column == self._table.shape[1]:
            self._table = np.concatenate((self._table, np.zeros_like(self._table)), axis=1)
        self._table[0, column] = token
        self._table[1, column] += count

    @property
    def table(self) -> np.ndarray:
        """[2, distinct tokens] int64: the tokens, and how often each was generated."""
        return self._table[:, : len(self._columns)]


class LogitState:
    """What is kept of one sequence between steps. It is a function of the parameters and the
    tokens alone: a sequence that is preempted, or resumed elsewhere, has the same.

    bias  [tokens] int64 and [tokens] float32: `logit_bias`
    seen  the tokens that penalties count: output, and the prompt for a repetition penalty
    """

    def __init__(self, sequence: Sequence) -> None:
        params = sequence.request.params
        bias = params.logit_bias
        self.params = params
        self.bias = (
            np.fromiter(bias.keys(), dtype=np.int64, count=len(bias)),
            np.fromiter(bias.values(), dtype=np.float32, count=len(bias)),
        )
        self.seen = SeenTokens()
        if params.repetition_penalty != 1.0:
            for token in sequence.token_ids[: sequence.output_start]:
                self.seen.add(token, 0)
        self._counted = sequence.output_start
        # By the token before the last one: what an output that ends so has to match.
        self._bad_endings: dict[int, list[tuple[list[int], int]]] = {}
        self._bad_tokens: list[int] = []
        for word in params.bad_words:
            *before, last = word
            if before:
                self._bad_endings.setdefault(before[-1], []).append((before, last))
            else:
                self._bad_tokens.append(last)

    def count_new(self, sequence: Sequence) -> None:
        """Take in the tokens generated since the last call."""
        for token in sequence.token_ids[self._counted :]:
            self.seen.add(token, 1)
        self._counted = len(sequence.token_ids)

    def bad_tokens(self, sequence: Sequence) -> list[int]:
        """Tokens that would complete a bad word now."""
        if not self._bad_endings or len(sequence.token_ids) <= sequence.output_start:
            return self._bad_tokens
        found = list(self._bad_tokens)
        for before, last in self._bad_endings.get(sequence.token_ids[-1], ()):
            start = len(sequence.token_ids) - len(before)
            if start >= sequence.output_start and sequence.token_ids[start:] == before:
                found.append(last)
        return found


def process(logits: torch.Tensor, sequences: Seq[Sequence], eos_token_ids: Seq[int]) -> bool:
    """Apply all that the sequences ask for; False, at no cost, where none asks for anything.

    logits         [n, vocab] float32, written
    sequences      n
    eos_token_ids  of the model, not to be chosen before min_tokens
    """
    states: list[Row] = []
    banned: list[tuple[int, Seq[int]]] = []
    for row, sequence in enumerate(sequences):
        params = sequence.request.params
        if params.processed:
            if sequence.logit_state is None:
                sequence.logit_state = LogitState(sequence)
            states.append((row, sequence.logit_state))
            if params.bad_words:
                banned.append((row, sequence.logit_state.bad_tokens(sequence)))
        if params.min_tokens > len(sequence.token_ids) - sequence.output_start:
            eos = () if params.ignore_eos else eos_token_ids
            banned.append((row, (*eos, *params.stop_token_ids)))
    if biased := [(row, state) for row, state in states if state.params.logit_bias]:
        apply_bias(logits, biased)
    if penalized := [(row, state) for row, state in states if state.params.penalized]:
        for row, state in penalized:
            state.count_new(sequences[row])
        apply_penalties(logits, penalized)
    if banned:
        ban(logits, banned)
    return bool(states or banned)


def apply_bias(logits: torch.Tensor, rows: Seq[Row]) -> None:
    """Add each row's `logit_bias`."""
    where = _indices(logits, rows, [state.bias[0] for _, state in rows])
    values = _tensor(np.concatenate([state.bias[1] for _, state in rows]), logits)
    logits[where] = logits[where] + values


def apply_penalties(logits: torch.Tensor, rows: Seq[Row]) -> None:
    """Penalize the tokens that each row has seen."""
    tables = [state.seen.table for _, state in rows]
    where = _indices(logits, rows, [table[0] for table in tables])
    counts = _tensor(np.concatenate([table[1] for table in tables]), logits).to(logits.dtype)

    def column(name: str) -> torch.Tensor:
        values = [getattr(state.params, name) for _, state in rows]
        repeated = np.repeat(np.array(values, dtype=np.float32), [t.shape[1] for t in tables])
        return _tensor(repeated, logits)

    repetition = column("repetition_penalty")
    values = logits[where]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= column("frequency_penalty") * counts
    values -= column("presence_penalty") * (counts > 0)
    logits[where] = values


def ban(logits: torch.Tensor, rows: Seq[tuple[int, Seq[int]]]) -> None:
    """Make each row's tokens impossible."""
    numbers = [row for row, tokens in rows for _ in tokens]
    tokens = [token for _, tokens in rows for token in tokens]
    both = move(torch.tensor([numbers, tokens], dtype=torch.int64), logits.device)
    logits[both[0], both[1]] = -torch.inf


def _indices(
    logits: torch.Tensor, rows: Seq[Row], tokens: Seq[np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and token of each entry, on the device of the logits."""
    numbers = np.repeat([row for row, _ in rows], [len(part) for part in tokens])
    both = _tensor(np.stack((numbers, np.concatenate(tokens))), logits)
    return both[0], both[1]


def _tensor(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return move(torch.from_numpy(values), like.device)
