"""What a caller asks of the sampler. Imports no torch: the gateway uses it too."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from common.errors import InvalidRequest

MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_TOKENS = 1024
MAX_BAD_WORD_CHARS = 200
MAX_CHOICES = 1024


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Names and defaults are vLLM's.

    temperature         0 is greedy; at most 2 over the network
    top_k               keep the k most likely tokens; 0 or -1 keeps all
    top_p               keep the smallest set whose probability reaches top_p, in (0, 1]
    min_p               drop tokens under min_p times the likeliest one's probability, in [0, 1]
    frequency_penalty   taken from a token's logit for each time it was generated, in [-2, 2]
    presence_penalty    taken from a token's logit once it was generated, in [-2, 2]
    repetition_penalty  divides a positive logit, multiplies a negative one, of every token of the
                        prompt and of the output, in (0, 100]; 1 does nothing
    logit_bias          {token: bias in [-100, 100]}, added to the logits
    bad_words           never generated: texts, or sequences of token ids. The last token of a
                        sequence is impossible where the output ends with those before it
    seed                randomness is a function of (seed, position); None draws a seed once
    n                   answers to one prompt; answer i has the seed `choice_seed(seed, i)`
    max_tokens          None: as many as the context holds
    min_tokens          no stop token before this many
    stop                strings that end the text (not included in it); checked on text, not here
    stop_token_ids      tokens that end the sequence, beside the model's own end-of-sequence tokens
    ignore_eos          do not stop at the model's end-of-sequence tokens
    logprobs            tell each generated token's log-probability and those of this many of the
                        likeliest tokens, 0 to 20; None: of none
    prompt_logprobs     the same for the tokens of the prompt, but the first

    Log-probabilities are those of the model: before bias, penalties, temperature and filters.

    `n`, `stop` and the texts of `bad_words` are the front's business: the engine takes one answer
    and tokens.

    Raises InvalidRequest, naming the field, for a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self._normalize()
        _check_range("temperature", self.temperature, 0.0, 2.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_int("top_k", self.top_k, -1, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _check_int("n", self.n, 1, MAX_CHOICES)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequest(
                    f"min_tokens is {self.min_tokens}, over max_tokens {self.max_tokens}",
                    field="min_tokens",
                )
        if self.seed is not None:
            _check_int("seed", self.seed, 0, 2**64 - 1)
        _check_count("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS)
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0, 2**31 - 1)
        _check_logit_bias(self.logit_bias)
        _check_bad_words(self.bad_words)

    def _normalize(self) -> None:
        """Lists to tuples, one string to a tuple of it, None to nothing."""
        for name in ("stop", "bad_words"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        words = tuple(w if isinstance(w, str) else _ids(w) for w in _items("bad_words", self))
        object.__setattr__(self, "bad_words", words)
        object.__setattr__(self, "stop", _items("stop", self))
        object.__setattr__(self, "stop_token_ids", _items("stop_token_ids", self))
        object.__setattr__(self, "logit_bias", {} if self.logit_bias is None else self.logit_bias)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalized(self) -> bool:
        """Whether tokens that were seen count."""
        return (
            self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    @property
    def processed(self) -> bool:
        """Whether the model's logits are changed before the temperature, `min_tokens` aside."""
        return self.penalized or bool(self.logit_bias) or bool(self.bad_words)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises InvalidRequest, naming the field, for a token id that the model has not."""
        fields: tuple[tuple[str, Iterable[int]], ...] = (
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", self.logit_bias),
            (
                "bad_words",
                (t for word in self.bad_words if not isinstance(word, str) for t in word),
            ),
        )
        for name, tokens in fields:
            for token in tokens:
                if token >= vocab_size:
                    raise InvalidRequest(
                        f"{name} names the token {token}; the model's ids are 0 to "
                        f"{vocab_size - 1}",
                        field=name,
                    )


def choice_seed(seed: int, index: int) -> int:
    """The seed of answer `index` of a request with this seed: their sum, modulo 2**64, so that
    answer 0 is what the request gives with n = 1, and answer i what it gives with seed + i."""
    return (seed + index) % 2**64


def _items(name: str, params: SamplingParams) -> tuple[Any, ...]:
    value = getattr(params, name)
    try:
        return tuple(value or ())
    except TypeError as error:
        raise InvalidRequest(f"{name} must be a list, got {value!r}", field=name) from error


def _ids(word: Any) -> tuple[int, ...]:
    try:
        return tuple(word)
    except TypeError as error:
        raise InvalidRequest(
            f"bad_words must hold texts or lists of token ids, got {word!r}", field="bad_words"
        ) from error


def _check_logit_bias(bias: Mapping[int, float]) -> None:
    if not isinstance(bias, Mapping):
        raise InvalidRequest(
            f"logit_bias must be a mapping of token ids, got {bias!r}", field="logit_bias"
        )
    _check_count("logit_bias", bias, MAX_LOGIT_BIAS)
    for token, value in bias.items():
        _check_int("logit_bias", token, 0, 2**31 - 1)
        _check_range("logit_bias", value, -100.0, 100.0)


def _check_bad_words(words: tuple[str | tuple[int, ...], ...]) -> None:
    _check_count("bad_words", words, MAX_BAD_WORDS)
    for word in words:
        longest = MAX_BAD_WORD_CHARS if isinstance(word, str) else MAX_BAD_WORD_TOKENS
        if not 1 <= len(word) <= longest:
            what = "characters" if isinstance(word, str) else "tokens"
            raise InvalidRequest(
                f"bad_words holds an entry of {len(word)} {what}; each must have 1 to {longest}",
                field="bad_words",
            )
        if not isinstance(word, str):
            for token in word:
                _check_int("bad_words", token, 0, 2**31 - 1)


def _check_count(name: str, values: Any, limit: int) -> None:
    if len(values) > limit:
        raise InvalidRequest(f"{name} has {len(values)} entries; at most {limit}", field=name)


def _check_range(
    name: str, value: float, low: float, high: float, *, open_low: bool = False
) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (
        not number
        or not math.isfinite(value)
        or not low <= value <= high
        or (open_low and value == low)
    ):
        bracket = "(" if open_low else "["
        raise InvalidRequest(
            f"{name} must be a number in {bracket}{low:g}, {high:g}], got {value!r}", field=name
        )


def _check_int(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(
            f"{name} must be an integer in [{low}, {high}], got {value!r}", field=name
        )
