"""What the receiver of handoffs keeps, and what its loop tells its engine's thread."""

import asyncio
import collections
from collections.abc import Callable
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

# A turn for one frame takes an idle engine some 0.4 ms of processor time beside the copy, which a
# prefill worker on the same machine waits for; several frames in one turn take little more.
WAKE_BYTES = 4 * 1024 * 1024
WAKE_S = 0.005


@dataclass(slots=True)
class Transfer:
    """One handoff as the engine's thread knows it.

    addresses   the prefill workers to ask
    tokens      of the prompt, from the first on, whose KV is wanted here or is here
    total       blocks of those tokens
    all_loaded  those asked so far refused because they have too much to do
    """

    id: bytes
    sequence: "Sequence"
    addresses: tuple[str, ...]
    wanted: list[WantedBlock]
    tokens: int
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


class Inbox:
    """What the loop tells the engine's thread. It is woken at once for the last frame of a handoff
    and for all that is no frame; other frames wait for company, up to WAKE_BYTES and WAKE_S.

    num_layers  of a block
    wake        has the engine's thread take what is here
    """

    def __init__(self, num_layers: int, wake: Callable[[], None]) -> None:
        self._num_layers = num_layers
        self._wake = wake
        self._items: collections.deque[Frame | Corrupt | CallEnded] = collections.deque()
        # On the loop only: bytes that came since the engine was woken, and when it will be.
        self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def put_frame(self, frame: Frame) -> None:
        """On the loop."""
        self._items.append(frame)
        self._bytes += len(frame.block.payload)
        envelope, layers = frame.envelope, frame.block.range
        ends = envelope.first_block + envelope.num_blocks >= envelope.total
        ends = ends and layers.layer_start + layers.layer_count >= self._num_layers
        if ends or self._bytes >= WAKE_BYTES:
            self._wake_now()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(WAKE_S, self._wake_now)

    def _wake_now(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._bytes, self._timer = 0, None
        self._wake()

    def put(self, item: Corrupt | CallEnded) -> None:
        """From any thread."""
        self._items.append(item)
        self._wake()

    def take(self) -> "list[Frame | Corrupt | CallEnded]":
        """What is here now, on the engine's thread: frames that keep coming wait for its next
        turn."""
        return [self._items.popleft() for _ in range(len(self._items))]
