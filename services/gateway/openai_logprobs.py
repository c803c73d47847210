"""Log-probabilities in OpenAI's shapes, and in vLLM's for prompts."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer

from common.engine.sequence import TokenLogprobs
from common.text.vocabulary import special_tokens, token_bytes, token_text

# JSON has no -inf.
MIN_LOGPROB = -9999.0


def chat_logprobs(
    told: Iterable[TokenLogprobs], top: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """`logprobs` of a chat choice. A token that is part of a character has U+FFFD for text and its
    own bytes in `bytes`."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        if tokenizer is None:
            return {"token": f"token_id:{token}", "logprob": _number(logprob), "bytes": None}
        return {
            "token": token_text(tokenizer, token),
            "logprob": _number(logprob),
            "bytes": list(token_bytes(tokenizer, token)),
        }

    content = []
    for one in told:
        best = list(zip(one.top_ids, one.top_logprobs, strict=True))[:top]
        top_logprobs = [entry(token, logprob) for token, logprob in best]
        content.append({**entry(one.token_id, one.logprob), "top_logprobs": top_logprobs})
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """`logprobs` of the choices of completions, piece by piece: offsets go on from one piece to the
    next. One for each choice.

    top    how many of the likeliest tokens are told; the token itself is always among them
    """

    def __init__(self, top: int, tokenizer: Tokenizer | None) -> None:
        self._top = top
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def prompt(
        self, token_ids: Sequence[int], told: Sequence[TokenLogprobs], chars: int
    ) -> dict[str, Any]:
        """The echoed prompt, whose text has this many characters. Its first token has none."""
        pieces = self.piece(told, token_ids[:1])
        self._offset = chars
        self._utf8.reset()
        return pieces

    def piece(self, told: Iterable[TokenLogprobs], before: Sequence[int] = ()) -> dict[str, Any]:
        """The next tokens, those of `before` without a log-probability."""
        found: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        entries: list[tuple[int, TokenLogprobs | None]] = [(token, None) for token in before]
        entries += [(one.token_id, one) for one in told]
        for token, one in entries:
            found["tokens"].append(self._text(token))
            found["text_offset"].append(self._offset)
            found["token_logprobs"].append(_number(one.logprob) if one else None)
            found["top_logprobs"].append(self._best(one) if one else None)
            self._offset += self._chars(token)
        return found

    def _best(self, one: TokenLogprobs) -> dict[str, float]:
        best = list(zip(one.top_ids, one.top_logprobs, strict=True))[: self._top]
        named = {self._text(token): _number(logprob) for token, logprob in best}
        named.setdefault(self._text(one.token_id), _number(one.logprob))
        return named

    def _text(self, token: int) -> str:
        """What a token is called here: its text, or as OpenAI has it, its bytes where they are not
        whole characters, so that two of them differ."""
        if self._tokenizer is None:
            return f"token_id:{token}"
        spelled = token_bytes(self._tokenizer, token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def _chars(self, token: int) -> int:
        """Characters that the text has more of with this token."""
        if self._tokenizer is None or token in special_tokens(self._tokenizer):
            return 0
        return len(self._utf8.decode(token_bytes(self._tokenizer, token)))


def prompt_logprobs(
    told: Iterable[TokenLogprobs], top: int, tokenizer: Tokenizer | None
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: by token id, and null for the first token."""

    def entry(token: int, logprob: float, rank: int) -> dict[str, Any]:
        text = None if tokenizer is None else token_text(tokenizer, token)
        return {"logprob": _number(logprob), "rank": rank, "decoded_token": text}

    found: list[dict[str, Any] | None] = [None]
    for one in told:
        entries = {str(one.token_id): entry(one.token_id, one.logprob, one.rank)}
        best = list(zip(one.top_ids, one.top_logprobs, strict=True))[:top]
        for rank, (token, logprob) in enumerate(best, 1):
            entries.setdefault(str(token), entry(token, logprob, rank))
        found.append(entries)
    return found


def _number(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
