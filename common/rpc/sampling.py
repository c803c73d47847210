"""Sampling parameters and log-probabilities to and from their messages."""

from collections.abc import Iterable

from baton.v1 import common_pb2 as pb
from common.engine.sampling_params import SamplingParams
from common.engine.sequence import TokenLogprobs

_INTEGERS = (
    "top_k",
    "seed",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
)
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)


def params_from_proto(
    message: pb.SamplingParams,
    *,
    default_max_tokens: int | None,
    stop: Iterable[str] = (),
    bad_words: Iterable[str] = (),
) -> SamplingParams:
    """Unset fields take SamplingParams' defaults, max_tokens the one given.

    Raises InvalidRequest, naming the field, for a value out of range.
    """
    given = {name: getattr(message, name) for name in _INTEGERS if message.HasField(name)}
    for name in _FLOATS:
        if message.HasField(name):
            given[name] = _float(getattr(message, name))
    given.setdefault("max_tokens", default_max_tokens)
    return SamplingParams(
        **given,
        stop=tuple(stop),
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias={token: _float(bias) for token, bias in message.logit_bias.items()},
        bad_words=(*bad_words, *(tuple(word.token_ids) for word in message.bad_words)),
    )


def params_to_proto(params: SamplingParams) -> pb.SamplingParams:
    """All fields set but those that are None. `stop`, `n` and texts in `bad_words` are not of this
    message."""
    given = {name: getattr(params, name) for name in (*_INTEGERS, *_FLOATS)}
    given["top_k"] = max(0, params.top_k)
    return pb.SamplingParams(
        **given,
        stop_token_ids=params.stop_token_ids,
        logit_bias=dict(params.logit_bias),
        bad_words=[
            pb.TokenSequence(token_ids=word)
            for word in params.bad_words
            if not isinstance(word, str)
        ],
    )


def logprobs_to_proto(told: Iterable[TokenLogprobs]) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(
            token_id=one.token_id,
            logprob=one.logprob,
            rank=one.rank,
            top_ids=one.top_ids,
            top_logprobs=one.top_logprobs,
        )
        for one in told
    ]


def logprobs_from_proto(messages: Iterable[pb.TokenLogprobs]) -> list[TokenLogprobs]:
    return [
        TokenLogprobs(m.token_id, m.logprob, m.rank, tuple(m.top_ids), tuple(m.top_logprobs))
        for m in messages
    ]


def _float(value: float) -> float:
    """Floats travel as float32; seven digits give back the number that was meant, so that the same
    request gives the same tokens offline."""
    return float(f"{value:.7g}")
