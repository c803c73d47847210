"""One handoff on its way out: staged frames, their link, the answers. On the loop only."""

import asyncio
import collections
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import structlog

from common.errors import BatonError, Cancelled, HandoffError
from common.kv.connectors.copies import arrived
from common.kv.handoff import HandoffTarget, Verdict
from common.kv.transports import Link, Transport
from common.kv.wire import (
    BlockRange,
    Envelope,
    encode_block_header,
    encode_envelope,
    incarnation_digest,
)

log = structlog.get_logger("handoff")


@dataclass(frozen=True, slots=True)
class Staged:
    """A copy of some layers of some neighbouring blocks, on its way to the receiver.

    number       of the frame in its attempt
    key          the last block's
    token_count  the last block's; those before it are full
    cached       the KV was there before this request
    size         bytes of the payload
    payload      may not be here yet
    """

    number: int
    first_block: int
    num_blocks: int
    range: BlockRange
    key: bytes
    token_count: int
    cached: bool
    size: int
    payload: Future[memoryview]


class _Refused(HandoffError):
    """The receiver will not take this handoff's blocks: another connection would not help."""


class Delivery:
    """Sends what is put, in order, until it is told that this was all and everything is answered.

    total       logical blocks that the handoff's tokens cover
    on_settled  called with each frame that the receiver has
    """

    def __init__(
        self,
        target: HandoffTarget,
        total: int,
        transport: Transport,
        on_settled: Callable[[Staged], None],
    ) -> None:
        self._target = target
        self._total = total
        self._transport = transport
        self._on_settled = on_settled
        self._waiting: collections.deque[Staged] = collections.deque()
        self._unanswered: collections.deque[Staged] = collections.deque()
        self._complete = False
        self._cancelled = False
        self._ended = False
        # A frame or an answer came.
        self._stirred = asyncio.Event()
        self._work: asyncio.Task[None] | None = None

    def put(self, staged: Staged | None) -> bool:
        """A frame to be sent; None when there will be no more. False: the handoff is over."""
        if self._ended:
            return False
        if staged is None:
            self._complete = True
        else:
            self._waiting.append(staged)
        self._stirred.set()
        return True

    def cancel(self) -> None:
        """Stop sending. Counts also before `run` began."""
        self._cancelled = True
        if self._work is not None:
            self._work.cancel()

    async def run(self) -> Exception | None:
        """Until the end, well (None) or not, but no longer than the lease."""
        self._work = asyncio.create_task(self._deliver())
        if self._cancelled:
            self._work.cancel()
        error: Exception | None = None
        try:
            async with asyncio.timeout(self._target.lease_ms / 1000):
                await self._work
        except TimeoutError:
            error = HandoffError(f"the lease of {self._target.lease_ms} ms ended")
        except BatonError as failure:
            error = failure
        except asyncio.CancelledError:
            error = Cancelled("the request ended before its KV was sent")
        except Exception as crash:
            log.exception("handoff_crashed", handoff=self._target.id.hex())
            error = crash
        self._ended = True
        return error

    def unsettled(self) -> list[Staged]:
        """Frames that were put, and of which nobody said that the receiver has them."""
        return [*self._unanswered, *self._waiting]

    async def _deliver(self) -> None:
        """Send until all is answered; a link that breaks is made anew once."""
        for last in (False, True):
            try:
                await self._deliver_once()
                return
            except _Refused:
                raise
            except HandoffError as error:
                if last:
                    raise
                address = self._target.data_address
                log.info("handoff_link_broke", address=address, error=str(error))

    async def _deliver_once(self) -> None:
        link = await self._transport.connect(self._target.data_address)
        answers: collections.deque[asyncio.Future[int]] = collections.deque()
        to_resend = collections.deque(self._unanswered)
        while to_resend or self._waiting or answers or not self._complete:
            self._stirred.clear()
            while answers and answers[0].done():
                # Off the list only once it is settled: an answer that failed is sent again.
                self._settle(self._unanswered[0], answers[0])
                self._unanswered.popleft()
                answers.popleft()
            if to_resend:
                staged = to_resend.popleft()
            elif self._waiting:
                staged = self._waiting.popleft()
                self._unanswered.append(staged)
            else:
                if answers or not self._complete:
                    await self._stirred.wait()
                continue
            answer = await self._send(link, staged)
            answer.add_done_callback(lambda _: self._stirred.set())
            answers.append(answer)

    async def _send(self, link: Link, staged: Staged) -> "asyncio.Future[int]":
        target = self._target
        envelope = Envelope(
            handoff_id=target.id,
            incarnation=incarnation_digest(target.incarnation),
            generation=target.generation,
            number=staged.number,
            first_block=staged.first_block,
            num_blocks=staged.num_blocks,
            total=self._total,
            cached=staged.cached,
        )
        payload = await arrived(staged.payload)
        header = encode_block_header(staged.key, staged.range, staged.token_count, payload)
        return await link.send(encode_envelope(envelope) + header, payload)

    def _settle(self, staged: Staged, answer: "asyncio.Future[int]") -> None:
        """Take the answer to a frame. Raises when it was refused or its link broke."""
        verdict = Verdict.of(answer.result())
        if not verdict.harmless:
            raise _Refused(
                f"{self._target.data_address} refused block {staged.first_block} of handoff "
                f"{self._target.id.hex()}, attempt {self._target.generation}: "
                f"{verdict.name.lower()}"
            )
        self._on_settled(staged)
