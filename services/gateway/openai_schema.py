"""OpenAI's request bodies to GenerateRequest.

Fields that would change the answer but are not served are refused by name. Other fields that are
not known here are ignored, as clients send vendors' own.
"""

from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from common.errors import InvalidRequest
from services.gateway.requests import (
    COMPLETION_MAX_TOKENS,
    MAX_N,
    MAX_PROMPTS,
    GenerateRequest,
    Prompt,
)

MAX_TIMEOUT_S = 86_400.0

# Fields that are not served, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"], []),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "prompt_embeds": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "include_stop_str_in_output": (False,),
}

# Fields that are SamplingParams' own.
_PLAIN = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "min_tokens",
    "ignore_eos",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "prompt_logprobs",
)

Tokens = Annotated[int, Field(ge=1, le=2**31 - 1)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class _Body(BaseModel):
    """What chat and completion have in common. Null is as good as absent."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str = Field(min_length=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: Tokens | None = None
    min_tokens: int | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Any = None
    bad_words: Any = None
    prompt_logprobs: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options is not None and self.stream_options.include_usage)

    def sampling(self, default_max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Unset fields take SamplingParams' defaults. Raises InvalidRequest."""
        given = {name: getattr(self, name) for name in _PLAIN if getattr(self, name) is not None}
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest(
                "prompt_logprobs is not given in a stream; leave out stream, or ask "
                "/v1/completions for echo and logprobs",
                field="prompt_logprobs",
            )
        return SamplingParams(
            **given,
            max_tokens=self.max_tokens or default_max_tokens,
            stop=_parse_stop(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=_parse_logit_bias(self.logit_bias),
            bad_words=_parse_bad_words(self.bad_words),
            logprobs=logprobs,
        )


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def to_request(self) -> GenerateRequest:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest(
                "top_logprobs needs logprobs; set logprobs to true", field="top_logprobs"
            )
        told = (self.top_logprobs or 0) if self.logprobs else None
        sampling = self.sampling(self.max_completion_tokens, told)
        messages = tuple(_parse_message(i, message) for i, message in enumerate(self.messages))
        return GenerateRequest(self.model, sampling, messages=messages, n=self.n or 1)


class CompletionBody(_Body):
    """POST /v1/completions."""

    prompt: Any = None
    echo: bool | None = None
    logprobs: int | None = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None

    def to_request(self) -> GenerateRequest:
        # A prompt alone is scored in a step that gives a token too, which nobody is told of.
        prompt_alone = self.max_tokens == 0
        if prompt_alone and not self.echo:
            raise InvalidRequest(
                "max_tokens is 0, which leaves an empty answer; ask for at least 1, or set echo to "
                "have the prompt back, with logprobs those of its tokens",
                field="max_tokens",
            )
        sampling = self.sampling(1 if prompt_alone else COMPLETION_MAX_TOKENS, self.logprobs)
        if self.echo and self.logprobs is not None:
            wanted = max(self.logprobs, self.prompt_logprobs or 0)
            sampling = replace(sampling, prompt_logprobs=wanted)
        return GenerateRequest(
            self.model,
            sampling,
            prompts=_parse_prompts(self.prompt),
            n=self.n or 1,
            echo=bool(self.echo),
            prompt_alone=prompt_alone,
        )


def parse_chat(body: dict[str, Any]) -> ChatBody:
    """Raises InvalidRequest naming the first field that does not fit."""
    refuse_unsupported(body)
    try:
        return ChatBody.model_validate(body)
    except ValidationError as error:
        raise _first_problem(error) from error


def parse_completion(body: dict[str, Any]) -> CompletionBody:
    """Raises InvalidRequest naming the first field that does not fit."""
    refuse_unsupported(body)
    try:
        return CompletionBody.model_validate(body)
    except ValidationError as error:
        raise _first_problem(error) from error


def refuse_unsupported(body: dict[str, Any]) -> None:
    for name in UNSUPPORTED.keys() & body.keys():
        value = body[name]
        if value is not None and not any(_same(value, idle) for idle in UNSUPPORTED[name]):
            raise InvalidRequest(
                f"{name} is not supported by this server; leave it out",
                field=name,
                code="unsupported_parameter",
            )


def _same(value: Any, idle: Any) -> bool:
    """Equal, where 0 is not False."""
    return value == idle and isinstance(value, bool) == isinstance(idle, bool)


def _first_problem(error: ValidationError) -> InvalidRequest:
    problem = error.errors(include_url=False)[0]
    field = _path(problem["loc"])
    if problem["type"] == "missing":
        return InvalidRequest(f"{field} is missing", field=field)
    return InvalidRequest(f"{field}: {problem['msg']}", field=field)


def _path(location: tuple[str | int, ...]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else str(part)
    return path or "body"


def _parse_stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise InvalidRequest("stop must be a string or a list of strings", field="stop")


def _parse_logit_bias(value: Any) -> dict[int, float]:
    """JSON's keys are strings."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(
            "logit_bias must be an object from token ids to numbers", field="logit_bias"
        )
    found = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest(
                f"logit_bias has the key {key[:64]!r}, which is no token id", field="logit_bias"
            )
        found[int(key)] = bias
    return found


def _parse_bad_words(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Texts, or lists of token ids."""
    if value is None:
        return ()
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, (str, list)) for word in words):
        raise InvalidRequest(
            "bad_words must be a list of strings or of lists of token ids", field="bad_words"
        )
    return tuple(word if isinstance(word, str) else tuple(word) for word in words)


def _parse_message(index: int, message: dict[str, Any]) -> dict[str, str]:
    where = f"messages[{index}]"
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise InvalidRequest(
                f"{where}.{name} is not supported by this server; leave it out",
                field=f"{where}.{name}",
                code="unsupported_parameter",
            )
    parsed = {"role": _text(f"{where}.role", message.get("role"))}
    parsed["content"] = _content(f"{where}.content", message.get("content"))
    if message.get("name") is not None:
        parsed["name"] = _text(f"{where}.name", message["name"])
    return parsed


def _content(where: str, value: Any) -> str:
    """A string, or the texts of a list of text parts joined."""
    if not isinstance(value, list):
        return _text(where, value)
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict):
            raise InvalidRequest(f"{where}[{index}] must be an object", field=f"{where}[{index}]")
        if part.get("type") != "text":
            kind = str(part.get("type"))[:64]
            raise InvalidRequest(
                f"{where}[{index}].type is {kind!r}; this model takes only text",
                field=f"{where}[{index}].type",
            )
        texts.append(_text(f"{where}[{index}].text", part.get("text")))
    return "".join(texts)


def _text(where: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    problem = "is missing" if value is None else f"must be a string, got {type(value).__name__}"
    raise InvalidRequest(f"{where} {problem}", field=where)


def _parse_prompts(value: Any) -> tuple[Prompt, ...]:
    if value is None:
        raise InvalidRequest("prompt is missing; give text or token ids", field="prompt")
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise InvalidRequest(
            "prompt must be a string, a list of token ids, or a list of either", field="prompt"
        )
    if value and all(type(item) is int for item in value):
        return (tuple(value),)
    if len(value) > MAX_PROMPTS and any(isinstance(item, (str, list)) for item in value):
        raise InvalidRequest(
            f"prompt has {len(value)} prompts; at most {MAX_PROMPTS} in one request", field="prompt"
        )
    return tuple(_parse_one_prompt(f"prompt[{i}]", item) for i, item in enumerate(value))


def _parse_one_prompt(where: str, value: Any) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(item) is int for item in value):
        return tuple(value)
    raise InvalidRequest(f"{where} must be a string, a token id or a list of them", field=where)
