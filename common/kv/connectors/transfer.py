"""What the receiver of handoffs keeps, and what its loop tells its engine's thread."""

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import Span

from common.kv.connectors.prefill_call import Metadata
from common.kv.handoff import WantedBlock
from common.kv.wire import Block, Envelope
from common.telemetry.tracing import Tracing, context_of, extract, inject

if TYPE_CHECKING:
    from common.engine.sequence import Sequence


@dataclass(slots=True)
class Transfer:
    """One handoff as the engine's thread knows it.

    addresses   the prefill workers to ask
    all_loaded  those asked so far refused because they have too much to do
    """

    id: bytes
    sequence: "Sequence"
    addresses: tuple[str, ...]
    wanted: list[WantedBlock]
    total: int
    started: float
    attempt: int = 0
    generation: int = 0
    cached_tokens: int = 0
    all_loaded: bool = True
    call: "Future[Any] | None" = None
    span: Span | None = None

    @property
    def request_id(self) -> str:
        return self.sequence.request_id

    def start_span(self, tracing: Tracing | None) -> None:
        if tracing is None:
            return
        candidates = self.sequence.request.transfer
        self.span = tracing.start(
            "decode.handoff",
            extract(candidates.traceparent, candidates.tracestate),
            attributes={
                "request.id": self.request_id,
                "handoff.id": self.id.hex(),
                "handoff.blocks": len(self.wanted),
            },
        )

    def metadata(self) -> Metadata:
        """W3C trace context for the call: this handoff's span, else the request's."""
        candidates = self.sequence.request.transfer
        parent, state = candidates.traceparent, candidates.tracestate
        if self.span is not None:
            parent, state = inject(context_of(self.span))
        pairs = (("traceparent", parent), ("tracestate", state))
        return tuple((name, value) for name, value in pairs if value)


@dataclass(frozen=True, slots=True)
class Frame:
    """A verified frame; `verdict` is what its sender waits for."""

    envelope: Envelope
    block: Block
    verdict: "asyncio.Future[int]"


@dataclass(frozen=True, slots=True)
class Corrupt:
    """A frame that could not be decoded."""

    reason: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """A call to a prefill worker is over, well when `error` is None."""

    handoff_id: bytes
    generation: int
    error: BaseException | None
