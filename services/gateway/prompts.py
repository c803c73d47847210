"""Text and messages to token ids.

Text inside a message that spells a control token (`<|end|>`) stays text: a caller must not be able
to close its own turn and open one of another role. Such strings are replaced by unguessable marks
before the chat template runs, and the marks' places are filled afterwards with tokens that were
encoded without looking for control tokens. A message without such strings, which is all but every
message, is encoded as one piece with the template around it, exactly as the model's own tokenizer
does it. The prompt of /v1/completions is the caller's from end to end: there, control tokens count.
"""

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from common.errors import CheckpointError, InvalidRequest
from common.text.template import ChatTemplate

# Private-use characters around a mark's random name: a template passes them through untouched.
_MARK_OPEN, _MARK_CLOSE = "\ue000", "\ue001"

Message = Mapping[str, str]


class PromptEncoder:
    """The tokenizer and chat template of a model folder; either may be missing.

    Methods may take a while for long text: call them off the event loop. Safe from any thread.
    """

    def __init__(self, folder: Path) -> None:
        self.tokenizer = _load_tokenizer(folder)
        self.template = ChatTemplate.from_folder(folder) if self.tokenizer is not None else None
        self._plain = _load_tokenizer(folder)
        if self.tokenizer is None or self._plain is None:
            self._controls: tuple[str, ...] = ()
            self._control_pattern = None
            return
        self._plain.encode_special_tokens = True
        added = self.tokenizer.get_added_tokens_decoder().values()
        specials = {token.content for token in added if token.special and token.content}
        self._controls = tuple(sorted(specials, key=len, reverse=True))
        alternatives = "|".join(re.escape(text) for text in self._controls)
        self._control_pattern = re.compile(alternatives) if alternatives else None

    def encode_text(self, text: str) -> list[int]:
        """A completion's prompt, with the tokens that the tokenizer adds by itself."""
        return self._need_tokenizer("prompt").encode(text).ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """A chat's prompt up to where the assistant's answer begins.

        Raises InvalidRequest where the model has no template, or its template refuses.
        """
        tokenizer = self._need_tokenizer("messages")
        plain = self._plain or tokenizer
        if self.template is None:
            raise InvalidRequest(
                "messages: this model has no chat template; use /v1/completions with a prompt",
                field="messages",
            )
        masked, marks = self._mask(messages)
        rendered = self.template.render(masked, add_generation_prompt=True)
        ids: list[int] = []
        for piece, is_content in _split(rendered, marks):
            encoder = plain if is_content else tokenizer
            ids += encoder.encode(piece, add_special_tokens=ChatTemplate.add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a prompt given as token ids; '' where the model has no tokenizer."""
        return self.tokenizer.decode(list(ids)) if self.tokenizer is not None else ""

    def _need_tokenizer(self, field: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(
                f"{field}: this model's folder has no tokenizer.json; send the prompt as token ids "
                "to /v1/completions",
                field=field,
            )
        return self.tokenizer

    def _mask(self, messages: Sequence[Message]) -> tuple[list[dict[str, str]], dict[str, str]]:
        """The messages with control strings replaced, and what each mark stands for."""
        marks: dict[str, str] = {}
        nonce = secrets.token_hex(8)

        def mark(text: str) -> str:
            name = f"{_MARK_OPEN}{nonce}{len(marks)}{_MARK_CLOSE}"
            marks[name] = text
            return name

        def mask(text: str) -> str:
            if self._control_pattern is None:
                return text
            text = self._control_pattern.sub(lambda found: mark(found.group()), text)
            cut = self._control_start(text)
            return text[:cut] + mark(text[cut:]) if cut < len(text) else text

        masked = [
            {key: value if key == "role" else mask(value) for key, value in message.items()}
            for message in messages
        ]
        return masked, marks

    def _control_start(self, text: str) -> int:
        """Where the text's end may be the beginning of a control string that the next message, or
        the template, would complete; its length when there is no such end."""
        longest = max(len(control) for control in self._controls) - 1
        for cut in range(max(0, len(text) - longest), len(text)):
            if any(control.startswith(text[cut:]) for control in self._controls):
                return cut
        return len(text)


def _split(rendered: str, marks: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    """The pieces of the text in order; True for those that stand for a mark."""
    if not marks:
        yield rendered, False
        return
    pattern = re.compile("(" + "|".join(re.escape(name) for name in marks) + ")")
    for piece in pattern.split(rendered):
        if piece:
            yield marks.get(piece, piece), piece in marks


def _load_tokenizer(folder: Path) -> Tokenizer | None:
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong
        raise CheckpointError(
            f"{path}: not a tokenizer ({error}); download the file again"
        ) from error
    # A file may ask for truncation or padding, which is for training: a prompt is never cut.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
