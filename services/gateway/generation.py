"""One request's choices while decode workers generate them: submit, follow, recover, detokenize."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import structlog
from tokenizers import Tokenizer

from baton.v1 import common_pb2, worker_pb2
from common.engine.sequence import TokenLogprobs
from common.errors import BatonError, Cancelled, DeadlineExceeded, Leaving, Overloaded, Unavailable
from common.rpc.errors import from_proto
from common.rpc.sampling import logprobs_from_proto, params_to_proto
from common.telemetry.tracing import inject
from common.text.detokenizer import IncrementalDecoder
from services.gateway.requests import GenerateRequest
from services.gateway.router import Route
from services.gateway.scope import RequestScope
from services.gateway.session import Event

if TYPE_CHECKING:
    from services.gateway.generate import Generator

log = structlog.get_logger("gateway")

# How long a request waits where no worker is ready, or its own was lost and no other one is.
WORKER_WAIT_S = 5.0
WORKER_RETRY_S = 0.05

_REASONS = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_CANCELLED: "cancelled",
    common_pb2.FINISH_REASON_ERROR: "error",
}


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of one choice. `finish_reason` (stop or length) is set on its last one;
    `logprobs`, where asked for, are those of `token_ids`."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(slots=True, eq=False)
class Choice:
    """One sequence: `keys` are its prompt's, by block size; `tokens` is what its worker gave so
    far, `address` the worker that has it. `attempts` are its submissions after the first, `losses`
    those of them that were not planned. `others` of the same prompt wait for its first token, as
    they begin with the KV of its prompt; `prompt_logprobs` are told of the first choice of a prompt
    only."""

    index: int
    prompt: list[int]
    keys: dict[int, list[bytes]]
    seed: int
    max_tokens: int
    decoder: IncrementalDecoder | None
    tokens: list[int] = field(default_factory=list)
    request_id: str = ""
    address: str = ""
    fingerprint: bytes = b""
    attempts: int = 0
    losses: int = 0
    avoid: set[str] = field(default_factory=set)
    cached_tokens: int | None = None
    finish_reason: str | None = None
    last_token_s: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    others: list["Choice"] = field(default_factory=list)

    def take(self, ids: Sequence[int], ended: bool) -> str:
        """Count tokens, up to the one that completes a stop string; the text that is now safe."""
        if self.decoder is None:
            self.tokens += ids
            return ""
        pieces = []
        for token in ids:
            self.tokens.append(token)
            pieces.append(self.decoder.push((token,)))
            if self.decoder.stopped is not None:
                break
        if ended:
            pieces.append(self.decoder.flush())
        return "".join(pieces)

    @property
    def stopped(self) -> bool:
        return self.decoder is not None and self.decoder.stopped is not None


class Generation:
    """The choices of one request while they are generated."""

    def __init__(
        self,
        generator: "Generator",
        request: GenerateRequest,
        scope: RequestScope,
        choices: list[Choice],
        num_prompts: int,
    ) -> None:
        self.request = request
        self.created_unix_s = int(time.time())
        self.choices = choices
        self._generator = generator
        self._scope = scope
        self._num_prompts = num_prompts
        self._events: asyncio.Queue[tuple[Choice, str, Event]] = asyncio.Queue()
        self._ready: deque[Delta] = deque()
        self._first_token_s: float | None = None
        hidden = () if request.sampling.ignore_eos else generator.model.eos_token_ids
        self._stop_ids = frozenset(hidden) | frozenset(request.sampling.stop_token_ids)

    @property
    def id(self) -> str:
        prefix = "cmpl" if self.request.messages is None else "chatcmpl"
        return f"{prefix}-{self._scope.unique_id}"

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._generator.encoder.tokenizer

    @property
    def usage(self) -> Usage:
        first = [c for c in self.choices if c.index % self.request.n == 0]
        return Usage(
            prompt_tokens=sum(len(c.prompt) for c in first),
            completion_tokens=sum(len(c.tokens) for c in self.choices),
            cached_tokens=sum(min(c.cached_tokens or 0, len(c.prompt)) for c in first),
        )

    def prompt_text(self, choice: Choice) -> str:
        """What `echo` puts before the completion."""
        prompt = self.request.prompts[choice.index // self.request.n]
        return prompt if isinstance(prompt, str) else self._generator.encoder.decode(prompt)

    def prompt_logprobs(self, choice: Choice) -> list[TokenLogprobs]:
        """Of the choice's prompt, from its second token on; complete with the first token."""
        return self.choices[choice.index - choice.index % self.request.n].prompt_logprobs

    async def submit_all(self) -> None:
        """A prompt's choices after the first wait for its first token where a prefix can be found:
        it is then computed, or handed over, once. They also wait for what it tells of the prompt.

        Raises Overloaded when every worker is full, Unavailable when none comes for a while.
        """
        n = self.request.n
        for start in range(0, len(self.choices), n):
            first, *others = self.choices[start : start + n]
            await self._submit_soon(first)
            if any(first.keys.values()) or self.request.sampling.prompt_logprobs is not None:
                first.others = others
            else:
                for choice in others:
                    await self._submit_soon(choice)

    async def wait_first(self) -> None:
        """Returns when there is a delta: from here on the answer is a success, so far."""
        if not self._ready and self._open:
            self._ready.append(await self._next())

    async def deltas(self) -> AsyncIterator[Delta]:
        """What is new, choices interleaved, until all ended. Raises BatonError."""
        while self._ready or self._open:
            yield self._ready.popleft() if self._ready else await self._next()

    def close(self) -> None:
        """Cancel what still runs."""
        for choice in self.choices:
            if choice.finish_reason is None:
                self._cancel(choice)
        usage = self.usage
        for name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
            self._scope.span.set_attribute(name, getattr(usage, name))
        self._scope.span.set_attribute("attempts", max(c.attempts for c in self.choices))
        seconds = time.monotonic() - self._scope.started_s
        reasons = [choice.finish_reason for choice in self.choices]
        tenant = self._scope.tenant
        self._generator.metrics.generation_ended(usage, reasons, seconds, tenant)
        log.info(
            "request_ended",
            request=self._scope.request_id,
            route=self._scope.route,
            tenant=tenant,
            trace_id=self._scope.headers()["x-trace-id"],
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            finish_reasons=reasons,
            ms=round(seconds * 1000, 2),
        )

    @property
    def _open(self) -> bool:
        return any(choice.finish_reason is None for choice in self.choices)

    # To the workers ---------------------------------------------------------------------------

    def _submit(self, choice: Choice) -> None:
        """Route and hand over. Raises Unavailable or Overloaded when nobody takes it."""
        generator = self._generator
        start_ns = time.time_ns()
        route = generator.route(choice)
        session = generator.fleet.session(route.decode.address)
        if session is None:
            raise Unavailable(f"decode worker {route.decode.address} just left; try again")
        choice.request_id = f"{self._scope.unique_id}-{choice.index}-{choice.attempts}"
        choice.address = route.decode.address
        choice.fingerprint = route.decode.fingerprint
        request_id = choice.request_id
        session.submit(
            self._message(choice, route),
            lambda event: self._events.put_nowait((choice, request_id, event)),
        )
        for worker in (route.decode, *route.prefill[:1]):
            generator.index.record(choice.keys.get(worker.block_size, ()), worker.address)
        generator.tracing.record(
            "gateway.route",
            self._scope.context,
            start_ns,
            time.time_ns(),
            attributes={
                "worker": route.decode.address,
                "prefill_candidates": ",".join(route.candidates),
                "prompt_tokens": len(choice.prompt),
                "expected_cached_tokens": route.matched_tokens,
                "attempt": choice.attempts,
            },
        )

    async def _submit_soon(self, choice: Choice) -> None:
        """Between two workers of a restart there may be a moment with none."""
        try:
            self._submit(choice)
        except Unavailable as error:
            await self._submit_again(choice, error)

    def _message(self, choice: Choice, route: Route) -> worker_pb2.Submit:
        params = replace(self.request.sampling, seed=choice.seed, max_tokens=choice.max_tokens)
        if choice.tokens or choice.index % self.request.n:  # were told, or are by the first choice
            params = replace(params, prompt_logprobs=None)
        else:
            choice.prompt_logprobs = []
        traceparent, tracestate = inject(self._scope.context)
        return worker_pb2.Submit(
            request_id=choice.request_id,
            token_ids=choice.prompt + choice.tokens,
            output_tokens=len(choice.tokens),
            sampling=params_to_proto(params),
            tenant=self._scope.tenant,
            remaining_ms=max(1, min(2**32 - 1, int(self._scope.remaining_s * 1000))),
            # A prompt whose logits are wanted is computed where it decodes.
            prefill_candidates=route.candidates if params.prompt_logprobs is None else (),
            traceparent=traceparent,
            tracestate=tracestate,
        )

    def _cancel(self, choice: Choice) -> None:
        session = self._generator.fleet.session(choice.address)
        if session is not None and choice.request_id:
            session.cancel(choice.request_id)

    # From the workers -------------------------------------------------------------------------

    async def _next(self) -> Delta:
        while True:
            choice, request_id, event = await self._next_event()
            if choice.finish_reason is not None or request_id != choice.request_id:
                continue  # said before this choice was stopped or moved
            delta = await self._follow(choice, event)
            if delta is not None and (delta.token_ids or delta.text or delta.finish_reason):
                return delta

    async def _follow(self, choice: Choice, event: Event) -> Delta | None:
        if isinstance(event, Unavailable):
            return await self._recover(choice, event)
        error = _error_of(event)
        if error is not None:
            return await self._recover(choice, error)
        delta = self._take(choice, event)
        if choice.tokens or choice.finish_reason is not None:
            await self._submit_others(choice)
        return delta

    async def _submit_others(self, choice: Choice) -> None:
        others, choice.others = choice.others, []
        for other in others:
            try:
                self._submit(other)
            except (Unavailable, Overloaded) as error:
                await self._submit_again(other, error)

    async def _next_event(self) -> tuple[Choice, str, Event]:
        if not self._events.empty():
            return self._events.get_nowait()
        try:
            async with asyncio.timeout(max(0.0, self._scope.remaining_s)):
                return await self._events.get()
        except TimeoutError as error:
            raise _out_of_time() from error

    def _take(self, choice: Choice, event: worker_pb2.TokenDelta) -> Delta:
        if choice.cached_tokens is None and event.HasField("cached_tokens"):
            choice.cached_tokens = event.cached_tokens
        ids = [] if self.request.prompt_alone else list(event.token_ids)
        reason = _REASONS.get(event.finish_reason)
        if self.request.prompt_alone and reason is not None:
            reason = "length"  # whatever the token was
        # A token that ends the sequence is counted, but it is no text.
        ending = ids[-1:] if reason == "stop" and ids and ids[-1] in self._stop_ids else []
        before = len(choice.tokens)
        text = choice.take(ids[: len(ids) - len(ending)], ended=reason is not None)
        if choice.stopped:
            if reason is None:
                self._cancel(choice)
            reason = "stop"
        else:
            choice.tokens += ending
        choice.finish_reason = reason
        new = tuple(choice.tokens[before:])
        told = tuple(logprobs_from_proto(event.logprobs[: len(new)]))
        choice.logprobs += told
        choice.prompt_logprobs += logprobs_from_proto(event.prompt_logprobs)
        self._observe(choice, len(new))
        return Delta(choice.index, text, new, reason, told)

    def _observe(self, choice: Choice, count: int) -> None:
        if not count:
            return
        now = time.monotonic()
        metrics = self._generator.metrics
        if self._first_token_s is None:
            self._first_token_s = now
            metrics.first_token(now - self._scope.started_s)
        if choice.last_token_s:
            metrics.next_tokens(now - choice.last_token_s, count)
        choice.last_token_s = now

    async def _recover(self, choice: Choice, error: BatonError) -> Delta | None:
        """Go on elsewhere after a lost worker, or after one that turned out to be full; the last
        delta where nothing was left to generate.

        Raises the error where going on is not possible.
        """
        fleet = self._generator.fleet
        full = isinstance(error, Overloaded) and not choice.tokens
        lost = isinstance(error, Unavailable)
        if isinstance(error, Leaving):
            fleet.note_leaving(choice.address)
        elif not (full or lost) or choice.losses >= self._generator.max_resumes:
            raise error
        else:
            choice.losses += 1
        choice.avoid.add(choice.address)
        if full and all(w.address in choice.avoid for w in fleet.usable("decode")):
            raise error
        choice.attempts += 1
        self._generator.metrics.resumed(mid_stream=bool(choice.tokens))
        if len(choice.tokens) >= choice.max_tokens:  # lost between the last token and saying so
            choice.finish_reason = "length"
            text = choice.decoder.flush() if choice.decoder is not None else ""
            return Delta(choice.index, text, (), "length")
        await self._submit_again(choice, error)
        return None

    async def _submit_again(self, choice: Choice, error: BatonError) -> None:
        end = time.monotonic() + min(WORKER_WAIT_S, max(0.0, self._scope.remaining_s))
        while True:
            await self._generator.fleet.wait_usable(max(0.0, end - time.monotonic()))
            try:
                self._submit(choice)
            except (Unavailable, Overloaded):
                if time.monotonic() >= end:
                    raise error from None
                await asyncio.sleep(WORKER_RETRY_S)
            else:
                return


def _error_of(event: worker_pb2.TokenDelta) -> BatonError | None:
    if event.HasField("error"):
        return from_proto(event.error)
    if event.finish_reason == common_pb2.FINISH_REASON_CANCELLED:
        return Cancelled("the decode worker cancelled the request")
    if event.finish_reason == common_pb2.FINISH_REASON_ERROR:
        return BatonError("the decode worker failed the request and did not say why")
    return None


def _out_of_time() -> DeadlineExceeded:
    return DeadlineExceeded("the request's time ran out before its answer was complete")
