"""The prefill worker's end of a handoff: sends each block as soon as a step has completed it.

Pages are copied on the engine's thread when the step that filled them ends, and only then go to the
loop: a page that preemption or an abort gives to somebody else is never read again, so what is sent
under a key is what was computed for it.
"""

import asyncio
import collections
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog
from opentelemetry.trace import Span

from common.engine.sequence import Phase
from common.errors import BatonError, Cancelled, HandoffError
from common.kv.connector import KVCaches, KVConnector
from common.kv.connectors.pages import copy_pages
from common.kv.handoff import HandoffTarget, Verdict
from common.kv.keys import chain_keys
from common.kv.transports import DataPlane, Link, Transport
from common.kv.wire import (
    BlockRange,
    Envelope,
    encode_block_header,
    encode_envelope,
    incarnation_digest,
    partial_block_key,
)
from common.rpc.loop import LoopThread
from common.telemetry.tracing import Tracing, extract, fail

if TYPE_CHECKING:
    from common.engine.sequence import Sequence, StepPlan

log = structlog.get_logger("handoff")

MAX_STAGED_BYTES = 256 * 1024 * 1024
# Results that nobody came to forget; the oldest go first.
MAX_RESULTS = 4096


@dataclass(frozen=True, slots=True)
class SendResult:
    """How a request's transfer ended. `error` is None when the receiver has every block."""

    blocks_sent: int
    bytes_sent: int
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class _Staged:
    """A copy of one block, on its way to the receiver."""

    index: int
    key: bytes
    token_count: int
    cached: bool
    payload: memoryview


@dataclass(slots=True, eq=False)
class _Job:
    """One handoff. The engine's thread writes the first part, the loop the second.

    held      the block table to copy from when the sequence ended before all was copied
    finished  the engine said that the request ended
    """

    target: HandoffTarget
    sequence: "Sequence"
    keys: list[bytes]
    next_index: int
    held: list[int] | None = None
    finished: bool = False

    ended: bool = False
    cancelled: bool = False
    work: "asyncio.Task[None] | None" = None
    blocks_sent: int = 0
    bytes_sent: int = 0
    # `complete`: nothing more will be staged; `stirred`: a block or an answer came.
    complete: bool = False
    staged: "collections.deque[_Staged]" = field(default_factory=collections.deque)
    stirred: asyncio.Event = field(default_factory=asyncio.Event)
    span: Span | None = None

    @property
    def request_id(self) -> str:
        return self.sequence.request_id

    @property
    def all_staged(self) -> bool:
        return self.next_index >= len(self.keys)

    def cancel(self) -> None:
        """On the loop. Counts also when the work has not begun."""
        self.cancelled = True
        if self.work is not None:
            self.work.cancel()


class _Refused(HandoffError):
    """The receiver will not take this handoff's blocks: another connection would not help."""


class HandoffSender(KVConnector):
    """Pushes the KV of requests whose `transfer` is a HandoffTarget to their decode worker.

    loop              shared with other connectors; one of its own when None
    max_staged_bytes  copies that may wait to be sent; what exceeds it stays in its pages until
                      there is room
    on_failure        called on the loop with (request id, error) when a transfer breaks
    transport         how frames travel; every transport there is when None
    tracing           where `prefill.transfer` spans go; none are made when None
    """

    def __init__(
        self,
        *,
        loop: LoopThread | None = None,
        max_staged_bytes: int = MAX_STAGED_BYTES,
        on_failure: Callable[[str, Exception], None] | None = None,
        transport: Transport | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._owns_loop = loop is None
        self._loop = loop or LoopThread("baton-handoff")
        self._max_staged_bytes = max_staged_bytes
        self._on_failure = on_failure
        self._transport: Transport = transport or DataPlane()
        self._tracing = tracing
        self._caches: KVCaches | None = None
        self._jobs: dict[str, _Job] = {}
        self._step: list[tuple[_Job, int]] = []
        self._ended: collections.deque[_Job] = collections.deque()
        self._events: collections.Counter[str] = collections.Counter()
        # Shared by the engine's thread, the loop and the service: all below.
        self._lock = threading.Lock()
        self._staged_bytes = 0
        self._results: collections.OrderedDict[str, Future[SendResult]] = collections.OrderedDict()

    # For the service, from any thread -----------------------------------------------------

    def completion(self, request_id: str) -> "Future[SendResult]":
        """Resolves when the request's transfer ended, well or not. Ask before submitting."""
        with self._lock:
            future = self._results.get(request_id)
            if future is None:
                future = self._results[request_id] = Future()
                if len(self._results) > MAX_RESULTS:
                    self._results.popitem(last=False)
            return future

    def result(self, request_id: str) -> SendResult | None:
        """The result, when there is one already."""
        with self._lock:
            future = self._results.get(request_id)
        return future.result() if future is not None and future.done() else None

    def forget(self, request_id: str) -> None:
        """The request's call is over: stop its transfer if it still runs, drop its result."""
        with self._lock:
            self._results.pop(request_id, None)
        job = self._jobs.get(request_id)
        if job is not None:
            self._cancel(job)

    # Scheduler side -----------------------------------------------------------------------

    def build_connector_meta(self, plan: "StepPlan | None") -> Any:
        self._step = []
        if plan is None:
            return None
        for sequence, start, scheduled in zip(
            plan.sequences, plan.start, plan.scheduled, strict=True
        ):
            if isinstance(sequence.request.transfer, HandoffTarget):
                self._step.append((self._job(sequence), start + scheduled))
        return None

    def wait_for_save(self) -> None:
        step, self._step = self._step, []
        for job, computed in step:
            self._stage(job, job.sequence.block_table, computed)

    def request_finished(self, sequence: "Sequence", block_ids: list[int]) -> bool:
        if not isinstance(sequence.request.transfer, HandoffTarget):
            return False
        job = self._jobs.get(sequence.request_id)
        job = job if job is not None and job.sequence is sequence else None
        computed = sequence.computed >= sequence.target
        if job is None and not computed:
            self._resolve(sequence.request_id, SendResult(0, 0, Cancelled("it was aborted")))
            return False
        job = job or self._job(sequence)
        aborted = job.finished or not computed
        job.finished, job.held = True, None
        if aborted:
            self._cancel(job)
        else:
            self._stage(job, block_ids, sequence.target)
            if not job.all_staged and not job.ended:
                job.held = list(block_ids)
        self._drop_if_over(job)
        return job.held is not None

    def take_events(self) -> dict[str, int]:
        self._events.update(self._transport.take_events())
        events, self._events = dict(self._events), collections.Counter()
        return events

    def open_handoffs(self) -> int:
        return sum(not job.ended for job in self._jobs.values())

    # Worker side --------------------------------------------------------------------------

    def register_kv_caches(self, caches: KVCaches) -> None:
        self._caches = caches

    def get_finished(self, finished_request_ids: set[str]) -> tuple[set[str], set[str]]:
        done: set[str] = set()
        while self._ended:
            job = self._ended.popleft()
            self._drop_if_over(job)
            if job.held is not None:
                job.held = None
                done.add(job.request_id)
            self._events["handoff_blocks_sent"] += job.blocks_sent
            self._events["handoff_bytes_sent"] += job.bytes_sent
        for job in self._jobs.values():
            if job.ended:
                continue
            if job.held is not None:
                self._stage(job, job.held, job.sequence.target)
                if job.all_staged:
                    job.held = None
                    done.add(job.request_id)
            elif job.sequence.phase is Phase.RUNNING:
                self._stage(job, job.sequence.block_table, job.sequence.computed)
        return done, set()

    def shutdown(self) -> None:
        for job in list(self._jobs.values()):
            self._cancel(job)
        if not self._loop.closed:
            self._loop.run(self._transport.close()).result(timeout=10.0)
        if self._owns_loop:
            self._loop.close()

    def links(self) -> dict[str, str]:
        """The transport in use to each data address. From any thread."""
        return self._transport.links()

    async def probe(self, address: str) -> float:
        """A real test transfer to a decode worker's data plane; seconds. Runs on the loop."""
        return await self._transport.probe(address)

    # Staging, on the engine's thread ------------------------------------------------------

    def _job(self, sequence: "Sequence") -> _Job:
        """The handoff of a sequence, begun at first sight."""
        job = self._jobs.get(sequence.request_id)
        if job is not None and job.sequence is sequence:
            return job
        if job is not None:
            self._cancel(job)
        target: HandoffTarget = sequence.request.transfer
        job = _Job(target, sequence, self._keys(sequence), target.first_block)
        self._jobs[sequence.request_id] = job
        self.completion(sequence.request_id)
        if self._tracing is not None:
            job.span = self._tracing.start(
                "prefill.transfer",
                extract(target.traceparent, target.tracestate),
                attributes={"request.id": job.request_id, "handoff.id": target.id.hex()},
            )
        self._loop.run(self._run(job))
        if job.all_staged:
            self._loop.call_soon(self._put, job, None)
        return job

    def _keys(self, sequence: "Sequence") -> list[bytes]:
        """Keys of all blocks that the target's tokens cover, the partial last one included."""
        caches = self._need_caches()
        size = caches.layout.block_size
        tokens, tenant = sequence.token_ids[: sequence.target], sequence.request.tenant
        full = len(tokens) // size * size
        keys = chain_keys(tokens[:full], size, caches.fingerprint, tenant)
        if full == len(tokens):
            return list(keys)
        parent = keys[-1] if keys else None
        return [*keys, partial_block_key(parent, tokens[full:], caches.fingerprint, tenant)]

    def _stage(self, job: _Job, block_ids: list[int], computed: int) -> None:
        """Copy the blocks that `computed` tokens complete and that were not copied before."""
        layout, target = self._need_caches().layout, job.sequence.target
        ready = len(job.keys) if computed >= target else computed // layout.block_size
        count = self._reserve(ready - job.next_index)
        if count <= 0 or job.ended:
            self._unreserve(max(0, count))
            return
        first = job.next_index
        job.next_index += count
        pages = copy_pages(self._need_caches().cache, block_ids[first : first + count])
        for index, page in enumerate(pages, first):
            tokens = min(layout.block_size, target - index * layout.block_size)
            cached = (index + 1) * layout.block_size <= job.sequence.cached_tokens
            staged = _Staged(index, job.keys[index], tokens, cached, page)
            self._loop.call_soon(self._put, job, staged)
        if job.all_staged:
            self._loop.call_soon(self._put, job, None)

    def _reserve(self, wanted: int) -> int:
        """Of `wanted` blocks, how many may be copied now: one at least when none waits."""
        size = self._need_caches().layout.block_bytes
        with self._lock:
            room = (self._max_staged_bytes - self._staged_bytes) // size
            if self._staged_bytes == 0:
                room = max(1, room)
            count = max(0, min(wanted, room))
            self._staged_bytes += count * size
            return count

    def _unreserve(self, blocks: int) -> None:
        with self._lock:
            self._staged_bytes -= blocks * self._need_caches().layout.block_bytes

    def _cancel(self, job: _Job) -> None:
        self._loop.call_soon(job.cancel)

    def _drop_if_over(self, job: _Job) -> None:
        """Forget a job once its transfer ended and the engine knows no more of its request."""
        if job.ended and job.finished and self._jobs.get(job.request_id) is job:
            del self._jobs[job.request_id]

    def _need_caches(self) -> KVCaches:
        if self._caches is None:
            raise HandoffError("the connector was used before register_kv_caches")
        return self._caches

    # Sending, on the loop -----------------------------------------------------------------

    def _put(self, job: _Job, staged: _Staged | None) -> None:
        """A block to be sent; None when there will be no more."""
        if staged is None:
            job.complete = True
        elif job.ended:
            self._unreserve(1)
        else:
            job.staged.append(staged)
        job.stirred.set()

    async def _run(self, job: _Job) -> None:
        error: Exception | None = None
        unanswered: collections.deque[_Staged] = collections.deque()
        job.work = asyncio.create_task(self._deliver(job, unanswered))
        if job.cancelled:
            job.work.cancel()
        try:
            async with asyncio.timeout(job.target.lease_ms / 1000):
                await job.work
        except TimeoutError:
            error = HandoffError(f"the lease of {job.target.lease_ms} ms ended")
        except BatonError as failure:
            error = failure
        except asyncio.CancelledError:
            error = Cancelled("the request ended before its KV was sent")
        except Exception as crash:
            log.exception("handoff_crashed", handoff=job.target.id.hex())
            error = crash
        self._unreserve(len(unanswered) + len(job.staged))
        job.staged.clear()
        self._finish(job, error)

    async def _deliver(self, job: _Job, unanswered: "collections.deque[_Staged]") -> None:
        """Send until all is answered; a link that breaks is made anew once."""
        for last in (False, True):
            try:
                await self._deliver_once(job, unanswered)
                return
            except _Refused:
                raise
            except HandoffError as error:
                if last:
                    raise
                log.info("handoff_link_broke", address=job.target.data_address, error=str(error))

    async def _deliver_once(self, job: _Job, unanswered: "collections.deque[_Staged]") -> None:
        link = await self._transport.connect(job.target.data_address)
        answers: collections.deque[asyncio.Future[int]] = collections.deque()
        to_resend = collections.deque(unanswered)
        while to_resend or job.staged or answers or not job.complete:
            job.stirred.clear()
            while answers and answers[0].done():
                # Off the list only once it is settled: an answer that failed is sent again.
                self._settle(job, unanswered[0], answers[0])
                unanswered.popleft()
                answers.popleft()
                self._unreserve(1)
            if to_resend:
                staged = to_resend.popleft()
            elif job.staged:
                staged = job.staged.popleft()
                unanswered.append(staged)
            else:
                if answers or not job.complete:
                    await job.stirred.wait()
                continue
            answer = await self._send(job, link, staged)
            answer.add_done_callback(lambda _: job.stirred.set())
            answers.append(answer)

    async def _send(self, job: _Job, link: Link, staged: _Staged) -> "asyncio.Future[int]":
        target = job.target
        envelope = Envelope(
            handoff_id=target.id,
            incarnation=incarnation_digest(target.incarnation),
            generation=target.generation,
            block_index=staged.index,
            total=len(job.keys),
            cached=staged.cached,
        )
        whole = BlockRange.whole(self._need_caches().layout)
        header = encode_block_header(staged.key, whole, staged.token_count, staged.payload)
        return await link.send(encode_envelope(envelope) + header, staged.payload)

    def _settle(self, job: _Job, staged: _Staged, answer: "asyncio.Future[int]") -> None:
        """Take the answer to a block. Raises when it was refused or its link broke."""
        verdict = Verdict.of(answer.result())
        if not verdict.harmless:
            raise _Refused(
                f"{job.target.data_address} refused block {staged.index} of handoff "
                f"{job.target.id.hex()}, attempt {job.target.generation}: {verdict.name.lower()}"
            )
        job.blocks_sent += 1
        job.bytes_sent += len(staged.payload)
        if not job.all_staged:
            self._need_caches().wake()

    def _finish(self, job: _Job, error: Exception | None) -> None:
        job.ended = True
        if job.span is not None:
            job.span.set_attribute("handoff.blocks", job.blocks_sent)
            job.span.set_attribute("handoff.bytes", job.bytes_sent)
            if error is not None:
                fail(job.span, str(error))
            job.span.end()
        log.info(
            "handoff_failed" if error else "handoff_sent",
            handoff=job.target.id.hex(),
            request=job.request_id,
            blocks=job.blocks_sent,
            bytes=job.bytes_sent,
            error=str(error) if error else None,
        )
        self._resolve(job.request_id, SendResult(job.blocks_sent, job.bytes_sent, error))
        self._ended.append(job)
        self._need_caches().wake()
        if error is not None and self._on_failure is not None:
            self._on_failure(job.request_id, error)

    def _resolve(self, request_id: str, result: SendResult) -> None:
        with self._lock:
            future = self._results.get(request_id)
        if future is not None and not future.done():
            # The service may cancel its future at this very moment.
            with contextlib.suppress(InvalidStateError):
                future.set_result(result)
