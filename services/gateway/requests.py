"""What both fronts ask of generate.py, and the limits that hold for both."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.engine.sampling_params import SamplingParams
from common.errors import InvalidRequest

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
MAX_N = 8
MAX_PROMPTS = 32
MAX_STOP = 16
MAX_STOP_CHARS = 1024
MAX_MESSAGES = 4096
# OpenAI's default for /v1/completions; a chat's answer may fill the context.
COMPLETION_MAX_TOKENS = 16

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A chat (`messages`) or a completion (`prompts`), checked for all that needs no model.

    n             choices for each prompt; choice i of a prompt is sampled with seed + i
    echo          the prompt's text comes before the completion's
    prompt_alone  the completion is empty: its one token is left out
    """

    model: str
    sampling: SamplingParams
    messages: tuple[dict[str, str], ...] | None = None
    prompts: tuple[Prompt, ...] = ()
    n: int = 1
    echo: bool = False
    prompt_alone: bool = False

    def __post_init__(self) -> None:
        if not self.model:
            raise InvalidRequest("model is missing; name the model to ask", field="model")
        if not 1 <= self.n <= MAX_N:
            raise InvalidRequest(f"n must be an integer in [1, {MAX_N}], got {self.n}", field="n")
        if self.messages is None:
            _check_prompts(self.prompts)
        else:
            _check_messages(self.messages)
        _check_stop(self.sampling.stop)


def _check_prompts(prompts: Sequence[Prompt]) -> None:
    if not prompts:
        raise InvalidRequest("prompt is empty; give text or token ids", field="prompt")
    if len(prompts) > MAX_PROMPTS:
        raise InvalidRequest(
            f"prompt has {len(prompts)} prompts; at most {MAX_PROMPTS} in one request",
            field="prompt",
        )
    for index, prompt in enumerate(prompts):
        name = "prompt" if len(prompts) == 1 else f"prompt[{index}]"
        if not prompt:
            raise InvalidRequest(f"{name} is empty; give text or token ids", field=name)


def _check_messages(messages: Sequence[dict[str, str]]) -> None:
    if not messages:
        raise InvalidRequest("messages is empty; give at least one message", field="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(
            f"messages has {len(messages)} entries; at most {MAX_MESSAGES}", field="messages"
        )
    for index, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise InvalidRequest(
                f"messages[{index}].role is {message['role'][:64]!r}; it must be one of "
                f"{', '.join(sorted(ROLES))}",
                field=f"messages[{index}].role",
            )


def _check_stop(stop: Sequence[str]) -> None:
    if len(stop) > MAX_STOP:
        raise InvalidRequest(f"stop has {len(stop)} strings; at most {MAX_STOP}", field="stop")
    for text in stop:
        if not 0 < len(text) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"stop holds a string of {len(text)} characters; each must have 1 to "
                f"{MAX_STOP_CHARS}",
                field="stop",
            )
