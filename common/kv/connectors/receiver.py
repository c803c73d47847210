"""The decode worker's end of a handoff: asks for prefill, checks what comes, writes the pages.

Two threads meet here. The loop (a LoopThread) receives frames and calls prefill workers; the
engine's thread owns the table and the pages. What the loop learns goes into an inbox, and the
engine's turn empties it: a page is written only on the engine's thread and only while its handoff
is open.
"""

import asyncio
import collections
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from baton.v1 import worker_pb2
from common.errors import BatonError, HandoffError, Overloaded, WireError
from common.kv.connector import KVCaches, KVConnector
from common.kv.connectors.pages import write_layers
from common.kv.connectors.peers import Peers
from common.kv.connectors.prefill_call import GrpcPrefill, PrefillClient
from common.kv.connectors.transfer import CallEnded, Corrupt, Frame, Inbox, Transfer
from common.kv.handoff import (
    Accept,
    HandoffPolicy,
    HandoffTable,
    PrefillCandidates,
    Verdict,
    WantedBlock,
)
from common.kv.transports import DataPlane, Transport
from common.kv.wire import ENVELOPE_VERSION, covering_keys, decode_handoff_frame
from common.rpc.discovery import join_address
from common.rpc.loop import LoopThread
from common.telemetry.tracing import Tracing, fail

if TYPE_CHECKING:
    from common.engine.sequence import Sequence, StepPlan

T = TypeVar("T")
log = structlog.get_logger("handoff")

# How often the engine is woken to look at leases while handoffs are open.
TICK_S = 0.25
# What the call of a handoff that is complete gets to end by itself.
LANDED_GRACE_S = 1.0


class HandoffReceiver(KVConnector):
    """Has a prefill worker fill the blocks of a prompt that this decode worker lacks.

    incarnation     this process's, new at each start
    worker_id       its name for people
    version         of Baton, told to peers
    model_card      called when the first prefill worker is met: the engine has loaded by then
    advertise_host  the host under which prefill workers reach this one
    data_host, data_port  where frames are accepted; port 0 takes any free one
    policy          when to ask and for how long
    prefill         the calls to prefill workers; gRPC when None
    loop            shared with other connectors; one of its own when None
    transport       how frames travel; every transport there is when None
    tracing         where `decode.handoff` spans go; none are made when None

    `listen` must be called before a sequence asks. When every candidate fails, the blocks that did
    not land are reported as load errors and the engine computes them itself.
    """

    def __init__(
        self,
        *,
        incarnation: str,
        model_card: Callable[[], worker_pb2.ModelCard],
        advertise_host: str,
        worker_id: str = "decode",
        version: str = "",
        data_host: str = "0.0.0.0",
        data_port: int = 0,
        policy: HandoffPolicy | None = None,
        loop: LoopThread | None = None,
        prefill: PrefillClient | None = None,
        transport: Transport | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._incarnation = incarnation
        self._worker_id = worker_id
        self._version = version
        self._model_card = model_card
        self._advertise_host = advertise_host
        self._data_host = data_host
        self._data_port = data_port
        self._policy = policy or HandoffPolicy()
        self._owns_loop = loop is None
        self._loop = loop or LoopThread("baton-handoff")
        self.peers = Peers(prefill or GrpcPrefill(), self._introduction)
        self._transport: Transport = transport or DataPlane()
        self._tracing = tracing
        self._caches: KVCaches | None = None
        self._table: HandoffTable | None = None
        self._address = ""
        # Requests whose candidates all failed: nobody is asked for them again.
        self._failed: set[str] = set()
        # Why a sequence that asked is prefilled here, until it is admitted; empty: it is not.
        self._here: dict[str, str] = {}
        self._to_start: list[Transfer] = []
        self._transfers: dict[bytes, Transfer] = {}
        self._by_request: dict[str, Transfer] = {}
        self._inbox: Inbox | None = None
        self._done: set[str] = set()
        self._cached_tokens: dict[str, int] = {}
        self._failed_blocks: set[int] = set()
        self._events: collections.Counter[str] = collections.Counter()

    def listen(self) -> str:
        """Accept frames; returns host:port of the data plane. Blocks for some milliseconds.

        A test transfer to the advertised address proves that frames come in there. Raises
        HandoffError when the port cannot be bound or the transfer fails.
        """
        port = self._loop.run(
            self._transport.listen(self._data_host, self._data_port, self._on_frame)
        ).result(timeout=10.0)
        address = join_address(self._advertise_host, port)
        try:
            self._loop.run(self._test(address)).result(timeout=20.0)
        except HandoffError as error:
            raise HandoffError(
                f"no test transfer to {address}, where prefill workers are told to send KV: "
                f"{error}; set --advertise-host to a name or address of this machine"
            ) from error
        self._address = address
        self._loop.run(self._tick())
        return address

    async def _test(self, address: str) -> None:
        link = await self._transport.connect(address)
        await link.probe()
        await link.close()

    @property
    def data_address(self) -> str:
        """host:port of the data plane; empty before `listen`."""
        return self._address

    # On the loop --------------------------------------------------------------------------

    async def _on_frame(self, frame: memoryview) -> int:
        """Verify a frame here, off the engine's thread; the engine decides where it goes."""
        inbox = self._inbox
        if inbox is None:
            return Verdict.UNKNOWN_HANDOFF
        try:
            envelope, block = decode_handoff_frame(frame)
        except WireError as error:
            inbox.put(Corrupt(str(error)))
            return Verdict.CORRUPT
        verdict = asyncio.get_running_loop().create_future()
        inbox.put_frame(Frame(envelope, block, verdict))
        return await verdict

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            if self._transfers and self._caches is not None:
                self._caches.wake()

    # Scheduler side -----------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, sequence: "Sequence", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        request = sequence.request
        if (
            not isinstance(request.transfer, PrefillCandidates)
            or request.prefill_tokens is not None
        ):
            return 0, False
        lacking = sequence.prompt_len - 1 - num_computed_tokens
        why = self._why_here(sequence, lacking)
        self._here[sequence.request_id] = why
        return (0, False) if why else (lacking, True)

    def _why_here(self, sequence: "Sequence", lacking: int) -> str:
        """Why the prompt is prefilled here; empty when a prefill worker is to be asked."""
        addresses = sequence.request.transfer.addresses
        if not addresses or not self._address:
            return "no_candidates"
        if sequence.request_id in self._failed:
            return "handoff_failed"
        if lacking < max(1, self._policy.min_tokens):
            return "few_uncached_tokens"
        return "" if self.peers.in_order(addresses) else "no_candidate_fits"

    def update_state_after_alloc(
        self, sequence: "Sequence", block_ids: list[int], num_external_tokens: int
    ) -> None:
        why = self._here.pop(sequence.request_id, None)
        if num_external_tokens == 0:
            if why is not None and sequence.request_id not in self._failed:
                self._say(sequence, why or "loaded_elsewhere")
            return
        caches = self._need_caches()
        size = caches.layout.block_size
        # Less than the prompt where blocks lack: asked for what the store failed to load.
        tokens = min(sequence.prompt_len - 1, len(block_ids) * size)
        first = (tokens - num_external_tokens) // size
        transfer = Transfer(
            id=secrets.token_bytes(16),
            sequence=sequence,
            addresses=self.peers.in_order(sequence.request.transfer.addresses),
            wanted=self._wanted(sequence, block_ids, first, tokens),
            tokens=tokens,
            total=caches.layout.blocks_for(tokens),
            started=time.monotonic(),
        )
        self._by_request[sequence.request_id] = transfer
        self._to_start.append(transfer)

    def _say(self, sequence: "Sequence", why: str) -> None:
        """Tell where the prompt is prefilled, to the request's trace and the counters."""
        self._events[f"prefill_{why}"] += 1
        sequence.request.transfer.note(why)

    def num_cached_tokens(self, sequence: "Sequence", num_loaded_tokens: int) -> int:
        cached = self._cached_tokens.pop(sequence.request_id, 0)
        return min(cached, num_loaded_tokens)

    def _wanted(
        self, sequence: "Sequence", block_ids: list[int], first_block: int, num_tokens: int
    ) -> list[WantedBlock]:
        """The blocks from `first_block` on that the prompt's first `num_tokens` cover."""
        caches = self._need_caches()
        size = caches.layout.block_size
        tokens = sequence.request.prompt_token_ids[:num_tokens]
        keys = covering_keys(tokens, size, caches.fingerprint, sequence.request.tenant)
        return [
            WantedBlock(i, block_ids[i], keys[i], min(size, len(tokens) - i * size))
            for i in range(first_block, len(keys))
        ]

    def build_connector_meta(self, plan: "StepPlan | None") -> Any:
        starting, self._to_start = self._to_start, []
        return starting

    def start_load_kv(self, meta: Any) -> None:
        for transfer in meta or ():
            if self._by_request.get(transfer.request_id) is transfer:
                self._begin(transfer)

    def request_finished(self, sequence: "Sequence", block_ids: list[int]) -> bool:
        self._failed.discard(sequence.request_id)
        self._here.pop(sequence.request_id, None)
        self._done.discard(sequence.request_id)
        self._cached_tokens.pop(sequence.request_id, None)
        transfer = self._by_request.get(sequence.request_id)
        if transfer is not None and transfer.sequence is sequence:
            self._need_table().abort(transfer.id)
            self._events["handoffs_aborted"] += 1
            self._say(sequence, "ended_before_it_came")
            self._release(transfer, "the request ended before its blocks came")
        return False

    def take_events(self) -> dict[str, int]:
        table = self._table
        if table is not None:
            for verdict, count in table.dropped.items():
                self._events[f"frames_dropped_{verdict.name.lower()}"] += count
            self._events["frames_reordered"] += table.reordered
            table.dropped.clear()
            table.reordered = 0
        self._events.update(self._transport.take_events())
        events, self._events = dict(+self._events), collections.Counter()
        return events

    def open_handoffs(self) -> int:
        return len(self._by_request)

    # Worker side --------------------------------------------------------------------------

    def register_kv_caches(self, caches: KVCaches) -> None:
        self._table = HandoffTable(self._incarnation, caches.layout, self._policy.stall_timeout_s)
        self._caches = caches
        self._inbox = Inbox(caches.layout.num_layers, caches.wake)

    def get_finished(self, finished_request_ids: set[str]) -> tuple[set[str], set[str]]:
        verdicts: list[tuple[asyncio.Future[int], int]] = []
        for item in _registered(self._inbox).take():
            match item:
                case Frame() as frame:
                    verdicts.append((frame.verdict, self._land(frame)))
                case Corrupt(reason):
                    self._need_table().drop(Verdict.CORRUPT)
                    log.warning("handoff_frame_corrupt", error=reason)
                case CallEnded(handoff_id, generation, error):
                    self._on_call_ended(handoff_id, generation, error)
        if verdicts:
            self._loop.call_soon(_answer, verdicts)
        self._expire()
        done, self._done = self._done, set()
        return set(), done

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def shutdown(self) -> None:
        for transfer in list(self._by_request.values()):
            self._release(transfer, "the worker shuts down")
        if not self._loop.closed:
            self._loop.run(self._close()).result(timeout=10.0)
        if self._owns_loop:
            self._loop.close()

    async def _close(self) -> None:
        await self._transport.close()
        await self.peers.close()

    # Attempts, on the engine's thread -------------------------------------------------------

    def _begin(self, transfer: Transfer) -> None:
        """Start the handoff's next attempt, or give up when no time is left for it."""
        table, now = self._need_table(), time.monotonic()
        deadline = transfer.sequence.request.deadline
        lease_s = self._policy.lease_s
        if deadline is not None:
            lease_s = min(lease_s, deadline - now)
        if lease_s <= 0:
            self._give_up(transfer, "no time is left before the request's deadline")
            return
        if transfer.generation == 0:
            self._transfers[transfer.id] = transfer
            transfer.start_span(self._tracing)
            transfer.generation = table.open(
                transfer.id, transfer.wanted, transfer.total, now + lease_s, now
            )
        else:
            transfer.generation = table.retry(transfer.id, now + lease_s, now)
        address = transfer.addresses[transfer.attempt]
        first_block = table.missing(transfer.id)[0].index
        request = self._request(transfer, first_block, lease_s)
        call = self.peers.prefill(address, request, lease_s, transfer.metadata())
        transfer.call = self._loop.run(call)
        transfer.call.add_done_callback(partial(self._call_ended, transfer.id, transfer.generation))

    def _request(
        self, transfer: Transfer, first_block: int, lease_s: float
    ) -> worker_pb2.PrefillRequest:
        request = transfer.sequence.request
        return worker_pb2.PrefillRequest(
            request_id=request.request_id,
            handoff=worker_pb2.Handoff(
                id=transfer.id,
                incarnation=self._incarnation,
                generation=transfer.generation,
                lease_ms=max(1, int(lease_s * 1000)),
            ),
            token_ids=request.prompt_token_ids,
            num_tokens=transfer.tokens,
            first_block=first_block,
            tenant=request.tenant,
            max_tokens_ahead=self._policy.max_tokens_ahead,
        )

    def _introduction(self) -> worker_pb2.MeetRequest:
        return worker_pb2.MeetRequest(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            data_address=self._address,
            model=self._model_card(),
            frame_version=ENVELOPE_VERSION,
            version=self._version,
        )

    def _call_ended(self, handoff_id: bytes, generation: int, call: "Future[Any]") -> None:
        """On the loop, or on the thread that cancelled the call."""
        error = HandoffError("the call was cancelled") if call.cancelled() else call.exception()
        _registered(self._inbox).put(CallEnded(handoff_id, generation, error))

    def _on_call_ended(
        self, handoff_id: bytes, generation: int, error: BaseException | None
    ) -> None:
        transfer = self._transfers.get(handoff_id)
        if transfer is None or transfer.generation != generation:
            return
        if error is None:
            transfer.all_loaded = False
            # Frames are answered before the call is: what is missing now was never sent.
            missing = len(self._need_table().missing(handoff_id))
            self._next_attempt(transfer, f"the call ended well but {missing} blocks never came")
        else:
            transfer.all_loaded = transfer.all_loaded and isinstance(error, Overloaded)
            if not isinstance(error, BatonError):
                log.error("handoff_call_crashed", handoff=handoff_id.hex(), exc_info=error)
            self._next_attempt(transfer, str(error) or type(error).__name__)

    def _expire(self) -> None:
        if not self._transfers:
            return
        for overdue in self._need_table().expire(time.monotonic()):
            transfer = self._transfers[overdue.handoff_id]
            transfer.all_loaded = False
            self._next_attempt(transfer, overdue.reason)

    def _next_attempt(self, transfer: Transfer, reason: str) -> None:
        addresses = transfer.addresses
        log.warning(
            "handoff_attempt_failed",
            handoff=transfer.id.hex(),
            request=transfer.request_id,
            prefill=addresses[transfer.attempt],
            generation=transfer.generation,
            error=reason,
        )
        self._events["handoff_attempts_failed"] += 1
        if transfer.call is not None:
            transfer.call.cancel()
        transfer.attempt += 1
        if transfer.attempt < min(len(addresses), self._policy.max_attempts):
            self._begin(transfer)
        else:
            self._give_up(transfer, reason)

    def _give_up(self, transfer: Transfer, reason: str) -> None:
        missing = self._need_table().fail(transfer.id) or transfer.wanted
        self._failed_blocks.update(block.block_id for block in missing)
        self._done.add(transfer.request_id)
        self._failed.add(transfer.request_id)
        self._events["handoffs_failed"] += 1
        self._say(transfer.sequence, "pool_loaded" if transfer.all_loaded else "handoff_failed")
        self._release(transfer, reason)

    def _land(self, frame: Frame) -> Verdict:
        decision = self._need_table().on_frame(frame.envelope, frame.block, time.monotonic())
        if not isinstance(decision, Accept):
            return decision.verdict
        caches, part = self._need_caches(), frame.block.range
        layers = range(part.layer_start, part.layer_start + part.layer_count)
        write_layers(caches.cache, caches.layout, decision.block_ids, layers, frame.block.payload)
        self._events["handoff_blocks_received"] += len(decision.completed)
        self._events["handoff_bytes_received"] += len(frame.block.payload)
        transfer = self._transfers[decision.handoff_id]
        if frame.envelope.cached:
            transfer.cached_tokens += sum(block.token_count for block in decision.completed)
        if decision.complete:
            self._done.add(transfer.request_id)
            self._cached_tokens[transfer.request_id] = transfer.cached_tokens
            self._events["handoffs_completed"] += 1
            self._say(transfer.sequence, "handed_over")
            self._release(transfer, None)
        return Verdict.ACCEPTED

    def _release(self, transfer: Transfer, error: str | None) -> None:
        """Forget a handoff that ended; its call is cancelled unless it soon ends by itself."""
        self._transfers.pop(transfer.id, None)
        self._by_request.pop(transfer.request_id, None)
        if transfer.call is not None and error is None:
            # A frame that was not needed any more may be on its way still, or lost.
            self._loop.call_soon(_cancel_later, transfer.call)
        elif transfer.call is not None:
            transfer.call.cancel()
        if transfer.span is not None:
            transfer.span.set_attribute("handoff.attempts", transfer.generation)
            if error is not None:
                fail(transfer.span, error)
            transfer.span.end()
        log.info(
            "handoff_ended" if error else "handoff_landed",
            handoff=transfer.id.hex(),
            request=transfer.request_id,
            blocks=len(transfer.wanted),
            ms=round((time.monotonic() - transfer.started) * 1000, 2),
            error=error,
        )

    # Small helpers ------------------------------------------------------------------------

    def _need_caches(self) -> KVCaches:
        return _registered(self._caches)

    def _need_table(self) -> HandoffTable:
        return _registered(self._table)


def _registered(part: T | None) -> T:
    if part is None:
        raise HandoffError("the connector was used before register_kv_caches")
    return part


def _cancel_later(call: "Future[Any]") -> None:
    asyncio.get_running_loop().call_later(LANDED_GRACE_S, call.cancel)


def _answer(verdicts: list[tuple["asyncio.Future[int]", int]]) -> None:
    """On the loop: tell each sender what became of its frame."""
    for verdict, status in verdicts:
        if not verdict.done():
            verdict.set_result(status)
