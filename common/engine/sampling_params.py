"""What a caller asks of the sampler. Imports no torch: the gateway uses it too."""

import math
from dataclasses import dataclass

from common.errors import InvalidRequest

MAX_STOP_TOKENS = 64


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Names and defaults are vLLM's.

    temperature      0 is greedy; at most 2 over the network
    top_k            keep the k most likely tokens; 0 or -1 keeps all
    top_p            keep the smallest set whose probability reaches top_p, in (0, 1]
    min_p            drop tokens under min_p times the likeliest one's probability, in [0, 1]
    seed             randomness is a function of (seed, position); None draws a seed once
    max_tokens       None: as many as the context holds
    min_tokens       no stop token before this many
    stop             strings that end the text (not included in it); checked on text, not here
    stop_token_ids   tokens that end the sequence, beside the model's own end-of-sequence tokens
    ignore_eos       do not stop at the model's end-of-sequence tokens

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

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        _check_range("temperature", self.temperature, 0.0, 2.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_int("top_k", self.top_k, -1, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequest(
                    f"min_tokens is {self.min_tokens}, over max_tokens {self.max_tokens}",
                    field="min_tokens",
                )
        if self.seed is not None:
            _check_int("seed", self.seed, 0, 2**64 - 1)
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise InvalidRequest(
                f"stop_token_ids has {len(self.stop_token_ids)} entries; at most {MAX_STOP_TOKENS}",
                field="stop_token_ids",
            )
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0, 2**31 - 1)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


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
