"""What the receiver of handoffs keeps, and what its loop tells its engine's thread."""

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import Span

from common.kv.handoff import WantedBlock
from common.kv.wire import Block, Envelope

if TYPE_CHECKING:
    from common.engine.sequence import Sequence


@dataclass(slots=True)
class Transfer:
    """One handoff as the engine's thread knows it. `addresses` are the prefill workers to ask."""

    id: bytes
    sequence: "Sequence"
    addresses: tuple[str, ...]
    wanted: list[WantedBlock]
    total: int
    started: float
    attempt: int = 0
    generation: int = 0
    cached_tokens: int = 0
    call: "Future[Any] | None" = None
    span: Span | None = None

    @property
    def request_id(self) -> str:
        return self.sequence.request_id


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
