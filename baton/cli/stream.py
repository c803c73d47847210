"""A client of the gateway's HTTP API: one streamed answer, and how fast it came."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from baton.cli.locate import KEY_VARIABLES, key_headers
from common.errors import BatonError, Unauthenticated, Unavailable

CONNECT_S = 5.0
# Between two events of a stream; a long prompt on a slow machine is silent for a while.
SILENCE_S = 300.0
DATA = "data:"
DONE = "[DONE]"


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast one answer came. tokens_per_s counts from the first token on; None below two."""

    ttft_s: float
    total_s: float
    prompt_tokens: int
    output_tokens: int
    finish_reason: str | None = None

    @property
    def tokens_per_s(self) -> float | None:
        decoding_s = self.total_s - self.ttft_s
        if self.output_tokens < 2 or decoding_s <= 0:
            return None
        return (self.output_tokens - 1) / decoding_s

    def __str__(self) -> str:
        rate = self.tokens_per_s
        shown = "" if rate is None else f", {rate:.1f} tokens/s"
        return f"TTFT {self.ttft_s * 1000:.0f} ms{shown}, {self.output_tokens} tokens"


class Endpoint:
    """An OpenAI endpoint at `url` (without /v1), asked with `key` where there is one."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url
        timeout = httpx.Timeout(SILENCE_S, connect=CONNECT_S)
        # A proxy of the environment is for other hosts than the one that was named.
        self._http = httpx.Client(
            base_url=url, timeout=timeout, trust_env=False, headers=key_headers(key)
        )

    def close(self) -> None:
        self._http.close()

    def first_model(self) -> str:
        """The first model served. Raises Unavailable, with a remedy, when nothing answers."""
        models = self._json(self._http.build_request("GET", "/v1/models"))["data"]
        if not models:
            raise Unavailable(f"{self.url} serves no model")
        return str(models[0]["id"])

    def stream(
        self, path: str, body: Mapping[str, Any], on_text: Callable[[str], None]
    ) -> tuple[str, Speed]:
        """POST `body` to `path`, calling on_text for each piece; the whole text and the speed.

        Raises BatonError with the server's message when it refuses or breaks off.
        """
        asked = dict(body) | {"stream": True, "stream_options": {"include_usage": True}}
        began = time.monotonic()
        first: float | None = None
        pieces: list[str] = []
        usage: Mapping[str, Any] = {}
        reason: str | None = None
        request = self._http.build_request("POST", path, json=asked)
        response = self._send(request, stream=True)
        try:
            for event in _events(response):
                usage = event.get("usage") or usage
                text, ended_by = _choice(event)
                reason = ended_by or reason
                if text:
                    first = first or time.monotonic()
                    pieces.append(text)
                    on_text(text)
        except httpx.TransportError as error:
            raise Unavailable(f"{self.url} broke off the answer: {error}") from error
        finally:
            response.close()
        ended = time.monotonic()
        speed = Speed(
            ttft_s=(first or ended) - began,
            total_s=ended - began,
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            output_tokens=int(usage.get("completion_tokens", len(pieces))),
            finish_reason=reason,
        )
        return "".join(pieces), speed

    def _json(self, request: httpx.Request) -> dict[str, Any]:
        response = self._send(request)
        try:
            return response.json()
        except ValueError as error:
            raise Unavailable(f"{request.url} did not answer with JSON; is it Baton?") from error

    def _send(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        try:
            response = self._http.send(request, stream=stream)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unavailable(
                f"nothing answers at {self.url} ({error}); start the mesh with `baton up` or "
                "`make up`, or name another endpoint with --url"
            ) from error
        except httpx.TransportError as error:
            raise Unavailable(f"{self.url}: {error}") from error
        if response.status_code != 200:
            response.read()
            reason = f"HTTP {response.status_code}: {_reason(response)}"
            if response.status_code == 401:
                raise Unauthenticated(f"{reason} (here: --api-key or {KEY_VARIABLES[0]})")
            raise BatonError(reason)
        return response


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, up to [DONE]."""
    for line in response.iter_lines():
        if not line.startswith(DATA):
            continue
        data = line[len(DATA) :].strip()
        if data == DONE:
            return
        event = json.loads(data)
        if "error" in event:
            raise BatonError(str(event["error"].get("message", event["error"])))
        yield event
    raise Unavailable("the stream ended before its [DONE]")


def _choice(event: Mapping[str, Any]) -> tuple[str, str | None]:
    """The piece of text and the finish reason that an event brings."""
    choice = (event.get("choices") or [{}])[0]
    text = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
    return text, choice.get("finish_reason")


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:500] or "no reason given"
