"""Which rows of a step tell the log-probabilities of prompts, and how many at a time."""

from collections.abc import Mapping

from common.engine.sequence import Sequence

# Logits of this many prompt tokens are kept in a step: 128 MiB where the vocabulary is 128k.
MAX_PROMPT_ROWS = 256


def prompt_rows(planned: Mapping[Sequence, int]) -> tuple[range, ...]:
    """StepPlan.prompt_rows of these sequences, with so many tokens scheduled of each."""
    if not any(sequence.wants_prompt_logits for sequence in planned):
        return ()
    return tuple(
        _rows(sequence, sequence.computed, count) if sequence.wants_prompt_logits else range(0)
        for sequence, count in planned.items()
    )


def within_rows(sequence: Sequence, start: int, count: int, planned: Mapping[Sequence, int]) -> int:
    """As many of `count` tokens from `start` on as leave the step within MAX_PROMPT_ROWS."""
    if not sequence.wants_prompt_logits:
        return count
    left = MAX_PROMPT_ROWS - sum(map(len, prompt_rows(planned)))
    rows = _rows(sequence, start, count)
    return count if len(rows) <= left else max(0, rows.start + left - start)


def _rows(sequence: Sequence, start: int, count: int) -> range:
    """Positions in [start, start + count) whose logits tell of a token not told of yet."""
    first = max(start, sequence.prompt_logprobs_told)
    return range(first, max(first, min(start + count, sequence.output_start - 1)))
