"""Log-probabilities that are told: of sampled tokens, and of the tokens of a prompt.

Those of the model itself: before bias, penalties, temperature and filters.
"""

from collections.abc import Sequence as Seq

import torch

from common.engine.sampling_params import MAX_LOGPROBS
from common.engine.sequence import Sequence, StepPlan, TokenLogprobs
from common.errors import BatonError


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """[n, vocab] float32. A row's result does not depend on the other rows: torch reduces each
    row of the last dimension by itself here, which logsumexp does not."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def unusable_logits(position: int) -> BatonError:
    """The model's fault, or its input's."""
    return BatonError(
        f"the model gave no usable logits (NaN or infinite) at position {position}; its weights "
        "or this input overflow the compute dtype"
    )


def describe(logprobs: torch.Tensor, tokens: Seq[int], top: Seq[int]) -> list[TokenLogprobs | None]:
    """What is told of one token in each row; None for a row that is not finite.

    logprobs  [n, vocab] float32
    tokens    n token ids
    top       n counts in [0, MAX_LOGPROBS]: how many of the likeliest tokens are told too
    """
    wanted = torch.tensor(tokens, dtype=torch.int64, device=logprobs.device).unsqueeze(1)
    own = logprobs.gather(1, wanted)
    ranks = (logprobs > own).sum(dim=-1) + 1
    values, ids = [[]] * len(tokens), [[]] * len(tokens)
    if any(top):
        # Always as many: which of two equal tokens is told is then no matter of the batch.
        best = logprobs.topk(min(MAX_LOGPROBS, logprobs.shape[-1]), dim=-1)
        values, ids = best.values.tolist(), best.indices.tolist()
    rows = zip(tokens, own.squeeze(1).tolist(), ranks.tolist(), ids, values, top, strict=True)
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
    found = iter(describe(log_softmax(logits), tokens, top))
    told: dict[Sequence, tuple[TokenLogprobs, ...] | Exception] = {}
    for sequence, rows in asked:
        part = [next(found) for _ in rows]
        whole = [entry for entry in part if entry is not None]
        bad = len(whole) < len(part)
        told[sequence] = unusable_logits(rows[part.index(None)] + 1) if bad else tuple(whole)
    return told
