"""Generations to OpenAI's response objects and SSE chunks."""

import json
from collections.abc import Sequence
from typing import Any

from common.engine.sequence import TokenLogprobs
from services.gateway.generation import Choice, Delta, Generation, Usage
from services.gateway.openai_logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs

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
    """The objects of one response.

    return_token_ids  add the choices' token ids
    prompt_logprobs   how many of the likeliest tokens to tell for each of the prompt; None: nothing
    """

    def __init__(
        self,
        generation: Generation,
        *,
        return_token_ids: bool,
        include_usage: bool,
        prompt_logprobs: int | None,
    ) -> None:
        self._generation = generation
        self._chat = generation.request.messages is not None
        self._echo = generation.request.echo
        self._prompt_logprobs = prompt_logprobs
        self._top = generation.request.sampling.logprobs
        self._tokenizer = generation.tokenizer
        self._pieces = [
            CompletionLogprobs(self._top or 0, self._tokenizer) for _ in generation.choices
        ]
        # Choices whose echo is still to come: the log-probabilities of a prompt are there when its
        # first token is.
        self._to_echo = {c.index for c in generation.choices} if self._echo else set()
        self._return_token_ids = return_token_ids
        self._include_usage = include_usage

    def openings(self) -> list[dict[str, Any]]:
        """The chunks before any token: the role of each choice of a chat."""
        if not self._chat:
            return []
        opening = {"role": "assistant", "content": ""}
        choices = self._generation.choices
        return [self._chunk({"index": c.index, "delta": opening}) for c in choices]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """A delta's chunks: the echoed prompt before a choice's first, its text, then, in chat, the
        finish reason in one of its own."""
        ids = {"token_ids": list(delta.token_ids)} if self._return_token_ids else {}
        wanted = bool(delta.text or delta.logprobs or (ids and delta.token_ids))
        found = []
        if delta.index in self._to_echo:
            self._to_echo.remove(delta.index)
            text, told = self._echoed(self._generation.choices[delta.index])
            found.append(self._chunk({"index": delta.index, "text": text}, logprobs=told))
        logprobs = self._logprobs(delta.index, delta.logprobs) if delta.logprobs else None
        if not self._chat:
            if wanted or delta.finish_reason is not None:
                entry = {"index": delta.index, "text": delta.text, **ids}
                found.append(self._chunk(entry, delta.finish_reason, logprobs))
            return found
        if wanted:
            entry = {"index": delta.index, "delta": {"content": delta.text}, **ids}
            found.append(self._chunk(entry, logprobs=logprobs))
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
            text, echoed = texts.get(choice.index, ""), None
            if self._chat:
                entry["message"] = {"role": "assistant", "content": text, "refusal": None}
            elif self._echo:
                prompt, echoed = self._echoed(choice)
                entry["text"] = prompt + text
            else:
                entry["text"] = text
            logprobs = self._logprobs(choice.index, choice.logprobs)
            if echoed is not None and logprobs is not None:
                logprobs = {name: echoed[name] + logprobs[name] for name in logprobs}
            entry |= {"logprobs": logprobs, "finish_reason": choice.finish_reason}
            if self._return_token_ids:
                entry["token_ids"] = list(choice.tokens)
            if self._prompt_logprobs is not None and not self._chat:
                entry["prompt_logprobs"] = self._of_prompt(choice)
            choices.append(entry)
        usage = usage_json(self._generation.usage)
        whole = {**self._head(streamed=False), "choices": choices, "usage": usage}
        if self._prompt_logprobs is not None and self._chat:
            whole["prompt_logprobs"] = self._of_prompt(self._generation.choices[0])
        return whole

    def _logprobs(self, index: int, told: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """Of a choice's next tokens; None where nobody asked."""
        if self._top is None:
            return None
        if self._chat:
            return chat_logprobs(told, self._top, self._tokenizer)
        return self._pieces[index].piece(told)

    def _echoed(self, choice: Choice) -> tuple[str, dict[str, Any] | None]:
        """The prompt's text, and its log-probabilities where those of the answer are wanted."""
        text = self._generation.prompt_text(choice)
        if self._top is None:
            return text, None
        told = self._generation.prompt_logprobs(choice)
        return text, self._pieces[choice.index].prompt(choice.prompt, told, len(text))

    def _of_prompt(self, choice: Choice) -> list[dict[str, Any] | None]:
        told = self._generation.prompt_logprobs(choice)
        return prompt_logprobs(told, self._prompt_logprobs or 0, self._tokenizer)

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

    def _chunk(
        self,
        choice: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        entry = {**choice, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        return {**self._head(), "choices": [entry], **usage}
