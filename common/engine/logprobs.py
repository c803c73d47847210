"""Log-probabilities that are told: of sampled tokens, and of the tokens of a prompt.

Those of the model itself: before bias, penalties, temperature and filters.
"""

from collections.abc import Sequence as Seq

import torch

from common.engine.device import Fetched, move
from common.engine.sampling_params import MAX_LOGPROBS
from common.engine.sequence import Sequence, StepPlan, TokenLogprobs
from common.errors import UnusableLogits


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """[n, vocab] float32. A row's result does not depend on the other rows: torch reduces each
    row of the last dimension by itself here, which logsumexp does not."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def unusable_logits(position: int) -> UnusableLogits:
    """What a request is told that ends at this position."""
    return UnusableLogits(
        f"the model gave no usable logits (NaN or infinite) at position {position}; its weights "
        "or this input overflow the compute dtype"
    )


def measure(logprobs: torch.Tensor, tokens: torch.Tensor, top: Seq[int]) -> list[torch.Tensor]:
    """What `describe` tells of one token in each row, where the log-probabilities are.

    logprobs  [n, vocab] float32
    tokens    [n] int64, in the vocabulary
    top       n counts in [0, MAX_LOGPROBS]: how many of the likeliest tokens are told too
    """
    own = logprobs.gather(1, tokens.unsqueeze(1))
    ranks = (logprobs > own).sum(dim=-1) + 1
    if not any(top):
        return [own.squeeze(1), ranks]
    # Always as many: which of two equal tokens is told is then no matter of the batch.
    best = logprobs.topk(min(MAX_LOGPROBS, logprobs.shape[-1]), dim=-1)
    return [own.squeeze(1), ranks, best.indices, best.values]


def describe(
    measured: Seq[torch.Tensor], tokens: Seq[int], top: Seq[int]
) -> list[TokenLogprobs | None]:
    """What is told of one token in each row; None for a row that is not finite.

    measured  of these tokens, in this machine's memory
    """
    own, ranks, *best = (tensor.tolist() for tensor in measured)
    ids, values = best or ([[]] * len(tokens), [[]] * len(tokens))
    rows = zip(tokens, own, ranks, ids, values, top, strict=True)
    return [
        TokenLogprobs(token, logprob, rank, tuple(row_ids[:count]), tuple(row_values[:count]))
        if logprob == logprob  # not NaN
        else None
        for token, logprob, rank, row_ids, row_values, count in rows
    ]


@torch.inference_mode()
def prompt_logprobs(
    logits: torch.Tensor, plan: StepPlan
) -> dict[Sequence, tuple[TokenLogprobs, ...] | Exception]:
    """What the step tells of prompts, or an error for a sequence whose logits are not finite.

    logits  [rows of plan.prompt_rows, vocab] float32
    """
    asked = [(s, r) for s, r in zip(plan.sequences, plan.prompt_rows, strict=False) if r]
    if not asked:
        return {}
    tokens = [sequence.token_ids[position + 1] for sequence, rows in asked for position in rows]
    top = [sequence.request.params.prompt_logprobs or 0 for sequence, rows in asked for _ in rows]
    logprobs = log_softmax(logits)
    measured = measure(logprobs, move(torch.tensor(tokens), logprobs.device), top)
    found = iter(describe(Fetched(measured).wait(), tokens, top))
    told: dict[Sequence, tuple[TokenLogprobs, ...] | Exception] = {}
    for sequence, rows in asked:
        part = [next(found) for _ in rows]
        whole = [entry for entry in part if entry is not None]
        bad = len(whole) < len(part)
        told[sequence] = unusable_logits(rows[part.index(None)] + 1) if bad else tuple(whole)
    return told
