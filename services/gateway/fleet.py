"""Membership: which workers there are, how they are, and which of them may be used."""

import asyncio
import uuid
from dataclasses import dataclass, field, replace

import grpc
import structlog

from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc
from common.rpc.channel import connect
from common.rpc.discovery import resolve
from services.gateway.session import DecodeSession
from services.gateway.worker_state import WorkerState, from_proto

log = structlog.get_logger("gateway.fleet")

RESOLVE_INTERVAL_S = 1.0
POLL_INTERVAL_S = 1.0
# A worker that is coming up is asked more often: whoever started it waits for it.
POLL_UNREADY_INTERVAL_S = 0.25
POLL_TIMEOUT_S = 2.0
# A busy worker may miss an answer; a connection that is refused counts at once.
MISSES_UNTIL_UNUSABLE = 3
MISSES_UNTIL_DROPPED = 5
FRESH_TIMEOUT_S = 1.5


@dataclass(eq=False)
class Member:
    """One replica: its channel, its last state (None: not reachable), its session if it decodes."""

    address: str
    role: str
    channel: grpc.aio.Channel
    state: WorkerState | None = None
    misses: int = 0
    session: DecodeSession | None = None
    poller: asyncio.Task[None] | None = None
    stub: worker_pb2_grpc.WorkerServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self.stub = worker_pb2_grpc.WorkerServiceStub(self.channel)

    @property
    def ready(self) -> bool:
        connected = self.session is None or self.session.connected
        return connected and self.state is not None and self.state.ready


class Fleet:
    """The one owner of membership.

    specs       role -> "host:port[,host:port]"; resolved again every second
    vocab_size  of the model whose tokenizer this gateway has; None: not known
    """

    def __init__(self, specs: dict[str, str], vocab_size: int | None) -> None:
        self._specs = {role: spec for role, spec in specs.items() if spec}
        self._vocab_size = vocab_size
        self._gateway_id = f"gateway-{uuid.uuid4().hex[:12]}"
        self._members: dict[tuple[str, str], Member] = {}
        self._reference: WorkerState | None = None
        self._refused: set[tuple[str, bytes, int]] = set()
        self._changed = asyncio.Event()
        self._resolver: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Resolve once, then keep on in the background."""
        await self._resolve_all()
        self._resolver = asyncio.create_task(self._keep_resolving(), name="resolver")

    async def close(self) -> None:
        if self._resolver is not None:
            self._resolver.cancel()
            await asyncio.wait({self._resolver})
        await asyncio.gather(*(self._remove(member) for member in list(self._members.values())))

    # What the rest of the gateway asks --------------------------------------------------------

    def usable(self, role: str) -> list[WorkerState]:
        """Ready workers of a role with the model that is served."""
        return [
            member.state
            for member in self._of(role)
            if member.ready and member.state is not None and self._matches(member.state)
        ]

    def session(self, address: str) -> DecodeSession | None:
        member = self._members.get(("decode", address))
        return member.session if member is not None else None

    def note_leaving(self, address: str) -> None:
        """A decode worker said that it takes nothing: not used until a poll finds it ready."""
        member = self._members.get(("decode", address))
        if member is not None and member.state is not None:
            member.state = replace(member.state, status="draining")
            self._changed.set()

    def own_requests(self) -> dict[str, int]:
        """This gateway's requests on each decode worker."""
        return {m.address: m.session.in_flight for m in self._of("decode") if m.session}

    def last_states(self) -> list[WorkerState]:
        """Every member as last polled."""
        return [member.state or _unreachable(member) for member in self._sorted()]

    @property
    def reference(self) -> WorkerState | None:
        """The worker whose model is the one served."""
        return self._reference

    def max_model_len(self, default: int) -> int:
        """What every usable decode worker can hold."""
        lengths = [state.max_model_len for state in self.usable("decode") if state.max_model_len]
        return min([default, *lengths])

    async def wait_usable(self, timeout_s: float) -> bool:
        """True as soon as a decode worker can be used."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.usable("decode"):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def wait_unusable(self) -> None:
        """Returns when no decode worker can be used any more."""
        while self.usable("decode"):
            self._changed.clear()
            await self._changed.wait()

    async def fresh_states(self) -> list[WorkerState]:
        """Every member's state as it is now; `unreachable` for one that does not answer."""
        return list(await asyncio.gather(*(self._ask(member) for member in self._sorted())))

    async def spans(self, trace_id: bytes) -> list[pb.SpanRecord]:
        """The spans of a trace that the workers hold."""

        async def ask(member: Member) -> list[pb.SpanRecord]:
            request = pb.GetTraceRequest(trace_id=trace_id)
            try:
                answer = await member.stub.GetTrace(request, timeout=FRESH_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                log.debug("trace_not_answered", worker=member.address, status=error.code().name)
                return []
            return list(answer.spans)

        answers = await asyncio.gather(*(ask(m) for m in self._sorted() if m.state is not None))
        return [span for spans in answers for span in spans]

    # Who is a member --------------------------------------------------------------------------

    async def _keep_resolving(self) -> None:
        while True:
            await asyncio.sleep(RESOLVE_INTERVAL_S)
            try:
                await self._resolve_all()
            except Exception:  # whatever it is, membership must go on
                log.exception("resolve_failed")

    async def _resolve_all(self) -> None:
        answers = await asyncio.gather(*(resolve(spec) for spec in self._specs.values()))
        for role, found in zip(self._specs, answers, strict=True):
            for address in sorted(found - {m.address for m in self._of(role)}):
                self._add(role, address)
            gone = [m for m in self._of(role) if m.address not in found and m.state is None]
            for member in gone:
                log.info("worker_left", role=role, worker=member.address)
                await self._remove(member)

    def _add(self, role: str, address: str) -> None:
        member = Member(address, role, connect(address))
        self._members[role, address] = member
        if role == "decode":
            member.session = DecodeSession(
                address,
                member.channel,
                self._gateway_id,
                welcomed=lambda state: self._take(member, from_proto(address, role, state)),
                lost=lambda: self._lose(member),
            )
            member.session.start()
        member.poller = asyncio.create_task(self._keep_polling(member), name=f"poll {address}")
        log.info("worker_found", role=role, worker=address)

    async def _remove(self, member: Member) -> None:
        self._members.pop((member.role, member.address), None)
        if member.poller is not None:
            member.poller.cancel()
            await asyncio.wait({member.poller})
        if member.session is not None:
            await member.session.close()
        await member.channel.close()

    def _of(self, role: str) -> list[Member]:
        return [member for member in self._members.values() if member.role == role]

    def _sorted(self) -> list[Member]:
        order = {"decode": 0, "prefill": 1, "kvstore": 2}
        return sorted(self._members.values(), key=lambda m: (order[m.role], m.address))

    # How they are -----------------------------------------------------------------------------

    async def _keep_polling(self, member: Member) -> None:
        while True:
            try:
                await self._poll(member)
            except Exception:  # a poller that ends would leave a stale state behind
                log.exception("poll_failed", worker=member.address)
                self._lose(member)
            await asyncio.sleep(POLL_INTERVAL_S if member.ready else POLL_UNREADY_INTERVAL_S)

    async def _poll(self, member: Member) -> None:
        try:
            answer = await member.stub.GetState(pb.GetStateRequest(), timeout=POLL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            self._miss(member, error.code())
            return
        self._take(member, from_proto(member.address, member.role, answer))

    def _miss(self, member: Member, status: grpc.StatusCode) -> None:
        member.misses += 1
        slow = status is grpc.StatusCode.DEADLINE_EXCEEDED
        if not slow or member.misses >= MISSES_UNTIL_UNUSABLE:
            self._lose(member)
        if slow and member.misses == MISSES_UNTIL_DROPPED and member.session is not None:
            member.session.drop_connection()

    def _take(self, member: Member, state: WorkerState) -> None:
        before = member.state
        member.misses = 0
        member.state = state
        if before is None or (before.status, before.incarnation) != (
            state.status,
            state.incarnation,
        ):
            log.info(
                "worker_state",
                role=member.role,
                worker=member.address,
                status=state.status,
                incarnation=state.incarnation,
            )
        self._update_reference()
        self._matches(state, report=True)
        self._changed.set()

    def _lose(self, member: Member) -> None:
        if member.state is not None:
            log.warning("worker_unreachable", role=member.role, worker=member.address)
        member.state = None
        self._update_reference()
        self._changed.set()

    async def _ask(self, member: Member) -> WorkerState:
        try:
            answer = await member.stub.GetState(pb.GetStateRequest(), timeout=FRESH_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return _unreachable(member)
        return from_proto(member.address, member.role, answer)

    # Which model ------------------------------------------------------------------------------

    def _update_reference(self) -> None:
        """The model that is served is the first ready decode worker's, while one has it."""
        ready = [m.state for m in self._of("decode") if m.state is not None and m.state.ready]
        ready = [state for state in ready if self._vocabulary_fits(state)]
        same = [
            s for s in ready if self._reference and s.fingerprint == self._reference.fingerprint
        ]
        if same or ready:
            self._reference = (same or ready)[0]

    def _vocabulary_fits(self, state: WorkerState) -> bool:
        return not (self._vocab_size and state.vocab_size) or state.vocab_size == self._vocab_size

    def _matches(self, state: WorkerState, report: bool = False) -> bool:
        if state.role == "kvstore" or not state.ready:
            return True
        if not self._vocabulary_fits(state):
            reason = f"vocabulary of {state.vocab_size}, this gateway's has {self._vocab_size}"
        elif self._reference is None or state.fingerprint == self._reference.fingerprint:
            return True
        else:
            reason = "another model, KV dtype or version"
        if report:
            self._report_refused(state, reason)
        return False

    def _report_refused(self, state: WorkerState, reason: str) -> None:
        mark = (state.incarnation or state.address, state.fingerprint, state.vocab_size)
        if mark in self._refused:
            return
        self._refused.add(mark)
        reference = self._reference
        log.error(
            "worker_refused",
            reason=reason,
            remedy="start it with the model folder and KV dtype of the others",
            worker=state.address,
            model=state.model,
            fingerprint=state.fingerprint.hex(),
            served_by=reference.address if reference else None,
            served_model=reference.model if reference else None,
            served_fingerprint=reference.fingerprint.hex() if reference else None,
        )


def _unreachable(member: Member) -> WorkerState:
    return WorkerState(address=member.address, role=member.role, status="unreachable")
