"""The prefill worker's end of a handoff: sends each layer's KV while the next layer computes.

Blocks that a step completes leave layer by layer; those that were there before it (found in a
cache, loaded, or left for want of room) leave whole. The engine's thread asks for a copy of what is
sent (copies.py), as its pages are then: a page that preemption or an abort gives to somebody else
is never read again, so what is sent under a key is what was computed for it. The loop has the
frames at once and waits for the bytes of each.

What is sent are blocks of the decode worker's size, under its keys; where this worker's size is
another, the copy is cut from its pages. Blocks here are the decode worker's, pages this one's.
"""

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
from opentelemetry.trace import Span

from common.engine.sequence import Phase
from common.errors import Cancelled, HandoffError
from common.kv.connector import KVCaches, KVConnector
from common.kv.connectors.delivery import Delivery, Staged
from common.kv.connectors.pages import pages_of
from common.kv.handoff import HandoffTarget
from common.kv.layout import KVLayout
from common.kv.transports import DataPlane, Transport
from common.kv.wire import BlockRange, covering_keys
from common.rpc.loop import LoopThread
from common.telemetry.tracing import Tracing, extract, fail

if TYPE_CHECKING:
    from common.engine.sequence import Sequence, StepPlan

log = structlog.get_logger("handoff")

MAX_STAGED_BYTES = 256 * 1024 * 1024
# Neighbouring layers go together up to this: a frame wakes three threads, 1 to 1.5 ms of
# processor time, and on a machine that both workers share the layers under way wait for that.
MIN_FRAME_BYTES = 2 * 1024 * 1024
# Nobody waits for a layer of a step that is not the prompt's last: more of them go together.
EARLY_FRAME_BYTES = 8 * 1024 * 1024
# More than this is split, so that the receiver checks one frame while the next is on its way.
MAX_FRAME_BYTES = 8 * 1024 * 1024
# Results that nobody came to forget; the oldest go first.
MAX_RESULTS = 4096


@dataclass(frozen=True, slots=True)
class SendResult:
    """How a request's transfer ended. `error` is None when the receiver has every block."""

    blocks_sent: int
    bytes_sent: int
    error: Exception | None = None


@dataclass(slots=True, eq=False)
class _Job:
    """One handoff. The engine's thread writes the first part, the loop the second.

    layout      of the blocks that are sent
    next_index  the first block that is not staged, nor being staged in the step under way
    frames      staged so far
    unstaged    bytes that have room and are not staged yet
    sealed      the delivery was told that there will be no more
    held        the table of pages to copy from when the sequence ended before all was copied
    finished    the engine said that the request ended
    layers_sent layers of blocks that the receiver has: num_layers of them are a block
    """

    target: HandoffTarget
    sequence: "Sequence"
    layout: KVLayout
    keys: list[bytes]
    delivery: Delivery
    next_index: int
    frames: int = 0
    unstaged: int = 0
    sealed: bool = False
    held: list[int] | None = None
    finished: bool = False

    ended: bool = False
    layers_sent: int = 0
    bytes_sent: int = 0
    span: Span | None = None

    @property
    def request_id(self) -> str:
        return self.sequence.request_id

    @property
    def all_staged(self) -> bool:
        return self.next_index >= len(self.keys)


@dataclass(slots=True, eq=False)
class _Live:
    """Blocks [first, first + count) that the step under way completes, and the pages that hold
    them: `next_layer` is the first layer that is not staged."""

    job: _Job
    first: int
    count: int
    page_ids: list[int]
    layers_at_once: int
    next_layer: int = 0


class HandoffSender(KVConnector):
    """Pushes the KV of requests whose `transfer` is a HandoffTarget to their decode worker.

    loop              shared with other connectors; one of its own when None
    max_staged_bytes  copies under way or waiting to be sent; what exceeds it stays in its pages
                      until there is room
    on_failure        called on the loop with (request id, error) when a transfer breaks
    transport         how frames travel; every transport there is when None
    tracing           where `prefill.transfer` spans go; none are made when None
    layer_wise        False: send only when the whole prompt is computed
    """

    def __init__(
        self,
        *,
        loop: LoopThread | None = None,
        max_staged_bytes: int = MAX_STAGED_BYTES,
        on_failure: Callable[[str, Exception], None] | None = None,
        transport: Transport | None = None,
        tracing: Tracing | None = None,
        layer_wise: bool = True,
    ) -> None:
        self._layer_wise = layer_wise
        self._owns_loop = loop is None
        self._loop = loop or LoopThread("baton-handoff")
        self._max_staged_bytes = max_staged_bytes
        self._on_failure = on_failure
        self._transport: Transport = transport or DataPlane()
        self._tracing = tracing
        self._caches: KVCaches | None = None
        self._jobs: dict[str, _Job] = {}
        self._live: list[_Live] = []
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
        self._drop_live()
        if plan is None or not self._layer_wise:
            return None
        for sequence, start, scheduled in zip(
            plan.sequences, plan.start, plan.scheduled, strict=True
        ):
            wanted = isinstance(sequence.request.transfer, HandoffTarget)
            # What another connector loads within the step is verified at its end: sent later.
            if wanted and sequence.request_id not in plan.loading:
                job = self._job(sequence)
                self._stage(job, sequence.block_table, start)
                self._go_live(job, start + scheduled)
        return None

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

    def save_kv_layer(self, layer: int) -> None:
        for live in self._live:
            if layer + 1 - live.next_layer >= live.layers_at_once:
                self._stage_live(live, layer + 1)

    def wait_for_save(self) -> None:
        live, self._live = self._live, []
        for blocks in live:
            self._stage_live(blocks, self._need_caches().layout.num_layers)
            self._seal(blocks.job)

    def get_finished(self, finished_request_ids: set[str]) -> tuple[set[str], set[str]]:
        done: set[str] = set()
        num_layers = self._need_caches().layout.num_layers
        while self._ended:
            job = self._ended.popleft()
            # Where a step broke, or a copy could not even be asked for.
            self._unreserve(job.unstaged)
            job.unstaged = 0
            self._drop_if_over(job)
            if job.held is not None:
                job.held = None
                done.add(job.request_id)
            self._events["handoff_blocks_sent"] += job.layers_sent // num_layers
            self._events["handoff_bytes_sent"] += job.bytes_sent
            self._events["handoff_frames_sent"] += job.frames
        for job in self._jobs.values():
            if job.ended:
                continue
            if job.held is not None:
                self._stage(job, job.held, job.sequence.target)
                if job.all_staged:
                    job.held = None
                    done.add(job.request_id)
            elif self._layer_wise and job.sequence.phase is Phase.RUNNING:
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
        caches = self._need_caches()
        layout = caches.layout.with_block_size(target.block_size)
        keys = covering_keys(
            sequence.token_ids[: sequence.target],
            layout.block_size,
            caches.fingerprint,
            sequence.request.tenant,
        )
        delivery = Delivery(target, len(keys), self._transport, lambda s: self._settled(job, s))
        job = _Job(target, sequence, layout, keys, delivery, target.first_block)
        self._jobs[sequence.request_id] = job
        self.completion(sequence.request_id)
        if self._tracing is not None:
            job.span = self._tracing.start(
                "prefill.transfer",
                extract(target.traceparent, target.tracestate),
                attributes={"request.id": job.request_id, "handoff.id": target.id.hex()},
            )
        self._loop.run(self._run(job))
        self._seal(job)
        return job

    def _stage(self, job: _Job, block_ids: list[int], computed: int) -> None:
        """Copy the blocks that `computed` tokens complete and that were not copied before."""
        layout = self._need_caches().layout
        first, count = self._claim(job, computed)
        # Blocks that a cache held are told apart from those computed for this request.
        cached = job.sequence.cached_tokens // job.layout.block_size
        middle = min(max(first, cached), first + count)
        layers = range(layout.num_layers)
        for start, end in ((first, middle), (middle, first + count)):
            ids = block_ids[pages_of(layout, job.layout, start, end - start)]
            self._stage_layers(job, start, end - start, ids, layers, end <= cached)
        self._seal(job)

    def _go_live(self, job: _Job, computed: int) -> None:
        """Have the blocks that this step completes copied layer by layer."""
        layout = self._need_caches().layout
        first, count = self._claim(job, computed)
        if count:
            ids = job.sequence.block_table[pages_of(layout, job.layout, first, count)]
            size = MIN_FRAME_BYTES if computed >= job.sequence.target else EARLY_FRAME_BYTES
            at_once = -(-size // (count * job.layout.layer_bytes))
            self._live.append(_Live(job, first, count, ids, at_once))

    def _claim(self, job: _Job, computed: int) -> tuple[int, int]:
        """The next blocks that `computed` tokens complete, as many as there is room for: the first
        one's index, and how many. They count as staged from now on."""
        ready = len(job.keys)
        if computed < job.sequence.target:
            ready = computed // job.layout.block_size
        first = job.next_index
        count = 0 if job.ended else self._reserve(ready - first, job.layout.block_bytes)
        job.next_index += count
        job.unstaged += count * job.layout.block_bytes
        return first, count

    def _stage_live(self, live: _Live, end: int) -> None:
        """Copy the layers up to `end` that were not copied before."""
        layers, live.next_layer = range(live.next_layer, end), end
        self._stage_layers(live.job, live.first, live.count, live.page_ids, layers, cached=False)

    def _stage_layers(
        self, job: _Job, first: int, count: int, page_ids: list[int], layers: range, cached: bool
    ) -> None:
        """Copy layers of blocks and hand them to the loop, in frames of MAX_FRAME_BYTES at most."""
        layout, target = job.layout, job.sequence.target
        for blocks, part in _pieces(count, layers, layout.layer_bytes):
            last = first + blocks.stop - 1
            staged = Staged(
                number=job.frames,
                first_block=first + blocks.start,
                num_blocks=len(blocks),
                range=BlockRange(0, layout.num_kv_heads, part.start, len(part)),
                key=job.keys[last],
                token_count=min(layout.block_size, target - last * layout.block_size),
                cached=cached,
                size=len(blocks) * len(part) * layout.layer_bytes,
                payload=self._copy(layout, first, page_ids, blocks, part),
            )
            job.frames += 1
            job.unstaged -= staged.size
            self._loop.call_soon(self._put, job, staged)

    def _copy(
        self, to: KVLayout, first: int, page_ids: list[int], blocks: range, layers: range
    ) -> "Future[memoryview]":
        """Layers of some of the blocks from `first` on, which begin in the first of the pages."""
        caches = self._need_caches()
        if to == caches.layout:
            return caches.copies.layers(page_ids[blocks.start : blocks.stop], layers)
        start, count = first + blocks.start, len(blocks)
        pages = pages_of(caches.layout, to, start, count)
        skip = pages_of(caches.layout, to, first, count).start
        ids = page_ids[pages.start - skip : pages.stop - skip]
        return caches.copies.blocks(ids, to, start, count, layers)

    def _seal(self, job: _Job) -> None:
        """Tell the delivery once that all was staged."""
        if job.all_staged and not job.sealed and not any(live.job is job for live in self._live):
            job.sealed = True
            self._loop.call_soon(job.delivery.put, None)

    def _drop_live(self) -> None:
        """A step that broke: what it did not stage is not staged any more."""
        live, self._live = self._live, []
        for blocks in live:
            self._cancel(blocks.job)

    def _reserve(self, wanted: int, size: int) -> int:
        """Of `wanted` blocks of `size` bytes, how many may be copied now: one at least when none
        waits."""
        with self._lock:
            room = (self._max_staged_bytes - self._staged_bytes) // size
            if self._staged_bytes == 0:
                room = max(1, room)
            count = max(0, min(wanted, room))
            self._staged_bytes += count * size
            return count

    def _unreserve(self, size: int) -> None:
        with self._lock:
            self._staged_bytes -= size

    def _cancel(self, job: _Job) -> None:
        self._loop.call_soon(job.delivery.cancel)

    def _drop_if_over(self, job: _Job) -> None:
        """Forget a job once its transfer ended and the engine knows no more of its request."""
        if job.ended and job.finished and self._jobs.get(job.request_id) is job:
            del self._jobs[job.request_id]

    def _need_caches(self) -> KVCaches:
        if self._caches is None:
            raise HandoffError("the connector was used before register_kv_caches")
        return self._caches

    # Sending, on the loop -----------------------------------------------------------------

    def _put(self, job: _Job, staged: Staged) -> None:
        if not job.delivery.put(staged):
            self._drop(staged)

    def _drop(self, staged: Staged) -> None:
        """Give back the room of what is not sent: it is taken until the copy is done."""

        def give_back(_: object) -> None:
            self._unreserve(staged.size)
            self._need_caches().wake()

        staged.payload.add_done_callback(give_back)

    def _settled(self, job: _Job, staged: Staged) -> None:
        self._unreserve(staged.size)
        job.layers_sent += staged.num_blocks * staged.range.layer_count
        job.bytes_sent += staged.size
        if not job.all_staged:
            self._need_caches().wake()

    async def _run(self, job: _Job) -> None:
        error = await job.delivery.run()
        for staged in job.delivery.unsettled():
            self._drop(staged)
        job.ended = True
        blocks = job.layers_sent // self._need_caches().layout.num_layers
        if job.span is not None:
            job.span.set_attribute("handoff.blocks", blocks)
            job.span.set_attribute("handoff.bytes", job.bytes_sent)
            job.span.set_attribute("handoff.frames", job.frames)
            if error is not None:
                fail(job.span, str(error))
            job.span.end()
        log.info(
            "handoff_failed" if error else "handoff_sent",
            handoff=job.target.id.hex(),
            request=job.request_id,
            blocks=blocks,
            bytes=job.bytes_sent,
            frames=job.frames,
            error=str(error) if error else None,
        )
        self._resolve(job.request_id, SendResult(blocks, job.bytes_sent, error))
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


def _pieces(num_blocks: int, layers: range, layer_bytes: int) -> Iterator[tuple[range, range]]:
    """Blocks and layers of frames that hold all of them, each MAX_FRAME_BYTES at most where one
    layer of one block is no more."""
    layers_at_once = max(1, MAX_FRAME_BYTES // layer_bytes)
    for layer in range(layers.start, layers.stop, layers_at_once):
        part = range(layer, min(layer + layers_at_once, layers.stop))
        blocks_at_once = max(1, MAX_FRAME_BYTES // (len(part) * layer_bytes))
        for block in range(0, num_blocks, blocks_at_once):
            yield range(block, min(block + blocks_at_once, num_blocks)), part
