"""Generations to OpenAI's response objects and SSE chunks."""

import json
from typing import Any

from services.gateway.generation import Delta, Generation, Usage

DONE = b"data: [DONE]\n\n"


def sse(value: dict[str, Any]) -> bytes:
    """One server-sent event. JSON escapes line ends, so the event is one line."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class Format:
    """The objects of one response. `return_token_ids` adds the choices' token ids."""

    def __init__(
        self, generation: Generation, *, return_token_ids: bool, include_usage: bool
    ) -> None:
        self._generation = generation
        self._chat = generation.request.messages is not None
        self._echo = generation.request.echo
        self._return_token_ids = return_token_ids
        self._include_usage = include_usage

    def openings(self) -> list[dict[str, Any]]:
        """The chunks before any token: the role of each choice, or its echoed prompt."""
        choices = self._generation.choices
        if self._chat:
            opening = {"role": "assistant", "content": ""}
            return [self._chunk({"index": c.index, "delta": opening}) for c in choices]
        if not self._echo:
            return []
        texts = [(choice.index, self._generation.prompt_text(choice)) for choice in choices]
        return [self._chunk({"index": index, "text": text}) for index, text in texts]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """A delta's chunks: its text, then, in chat, the finish reason in one of its own."""
        ids = {"token_ids": list(delta.token_ids)} if self._return_token_ids else {}
        wanted = bool(delta.text or (ids and delta.token_ids))
        if not self._chat:
            if not wanted and delta.finish_reason is None:
                return []
            entry = {"index": delta.index, "text": delta.text, **ids}
            return [self._chunk(entry, delta.finish_reason)]
        found = []
        if wanted:
            entry = {"index": delta.index, "delta": {"content": delta.text}, **ids}
            found.append(self._chunk(entry))
        if delta.finish_reason is not None:
            found.append(self._chunk({"index": delta.index, "delta": {}}, delta.finish_reason))
        return found

    def closing(self) -> dict[str, Any] | None:
        """The chunk with the usage and no choices, where it was asked for."""
        if not self._include_usage:
            return None
        return {**self._head(), "choices": [], "usage": usage_json(self._generation.usage)}

    def whole(self, texts: dict[int, str]) -> dict[str, Any]:
        """The answer to a request that does not stream; `texts` by choice."""
        choices = []
        for choice in self._generation.choices:
            entry: dict[str, Any] = {"index": choice.index}
            text = texts.get(choice.index, "")
            if self._chat:
                entry["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                prompt = self._generation.prompt_text(choice) if self._echo else ""
                entry["text"] = prompt + text
            entry |= {"logprobs": None, "finish_reason": choice.finish_reason}
            if self._return_token_ids:
                entry["token_ids"] = list(choice.tokens)
            choices.append(entry)
        usage = usage_json(self._generation.usage)
        return {**self._head(streamed=False), "choices": choices, "usage": usage}

    def _head(self, *, streamed: bool = True) -> dict[str, Any]:
        kind = "text_completion"
        if self._chat:
            kind = "chat.completion.chunk" if streamed else "chat.completion"
        return {
            "id": self._generation.id,
            "object": kind,
            "created": self._generation.created_unix_s,
            "model": self._generation.request.model,
        }

    def _chunk(self, choice: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        entry = {**choice, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        return {**self._head(), "choices": [entry], **usage}
