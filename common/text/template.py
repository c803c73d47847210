"""A model folder's chat template, rendered in a sandbox the way Hugging Face's tokenizers do it."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.errors import CheckpointError, InvalidRequest

# A template is a page of text; anything much longer is not one.
MAX_TEMPLATE_CHARS = 1 << 20


class ChatTemplate:
    """Messages to the prompt's text.

    source      Jinja2 text
    bos_token   what `{{ bos_token }}` stands for; '' when the model has none
    eos_token   likewise

    The rendered text is the whole prompt, beginning-of-sequence token included where the model
    wants one: encode it with `add_special_tokens=ChatTemplate.add_special_tokens`.
    """

    add_special_tokens = False

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template is not valid Jinja2: {error}") from error

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ChatTemplate | None":
        """The folder's template: `chat_template.jinja`, else `chat_template` of
        `tokenizer_config.json`; None when it has neither. Raises CheckpointError."""
        folder = Path(folder)
        config = _tokenizer_config(folder)
        source = _read_source(folder, config)
        if source is None:
            return None
        try:
            return cls(
                source,
                bos_token=_token_text(config.get("bos_token")),
                eos_token=_token_text(config.get("eos_token")),
            )
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt's text. `variables` are handed to the template as they are.
        Raises InvalidRequest (field "messages") when the template refuses the messages."""
        names: dict[str, Any] = {
            **variables,
            "messages": [dict(message) for message in messages],
            "tools": [dict(tool) for tool in tools] if tools else None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
        }
        try:
            return self._template.render(names)
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"messages do not fit the model's chat template: {error}", field="messages"
            ) from error
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            # A template written for other shapes of messages fails like any program.
            raise InvalidRequest(
                f"messages do not fit the model's chat template: {type(error).__name__}: {error}",
                field="messages",
            ) from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which would change the prompt.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds a {type(config).__name__}, not an object")
    return config


def _read_source(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: not readable as text: {error}") from error
    else:
        path = folder / "tokenizer_config.json"
        source = _default_template(config.get("chat_template"), path)
    if source is not None and len(source) > MAX_TEMPLATE_CHARS:
        raise CheckpointError(
            f"{path}: the chat template has {len(source)} characters, over {MAX_TEMPLATE_CHARS}"
        )
    return source


def _default_template(entry: Any, path: Path) -> str | None:
    """The entry is a text, or a list of named ones of which `default` is for chat."""
    if isinstance(entry, list):
        named = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
        entry = named.get("default")
    if entry is not None and not isinstance(entry, str):
        raise CheckpointError(f"{path}: chat_template is a {type(entry).__name__}, not a text")
    return entry


def _token_text(entry: Any) -> str:
    """A token in tokenizer_config.json is a text or an object with `content`; null is none."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else ""
