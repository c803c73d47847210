"""What `LLM` returns, under vLLM's names."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from common.engine.sequence import TokenLogprobs
from common.errors import BatonError
from common.text.vocabulary import token_text


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's natural log-probability, its rank (1 is the likeliest), and its text, None where
    the model has no tokenizer. Half a character's text is U+FFFD."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(slots=True)
class CompletionOutput:
    """One answer. `stop_reason` is the stop string or the token of stop_token_ids that ended it,
    None for the model's own end-of-sequence token; `finish_reason` is stop, length or, where
    `error` says why nothing follows, error. `logprobs` has an entry for each of token_ids: the
    token itself and the likeliest ones; None unless asked for, as `cumulative_logprob`, the sum
    over token_ids."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    error: BatonError | None = None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its answers. `prompt` is None when token ids were given; `prompt_logprobs`, when
    asked for, has an entry for each of prompt_token_ids, None for the first."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    num_cached_tokens: int = 0
    finished: bool = True
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


def logprob_dict(told: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """By token: the one that was told of, then the likeliest, best first."""

    def text(token: int) -> str | None:
        return None if tokenizer is None else token_text(tokenizer, token)

    found = {told.token_id: Logprob(told.logprob, told.rank, text(told.token_id))}
    best: Iterable[tuple[int, float]] = zip(told.top_ids, told.top_logprobs, strict=True)
    for rank, (token, logprob) in enumerate(best, 1):
        found.setdefault(token, Logprob(logprob, rank, text(token)))
    return found
