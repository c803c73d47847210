"""Workers without a model (baton.conformance), and a prefill worker made of one."""

import asyncio
import random
import secrets
import threading
import time
from collections.abc import Callable

from baton.conformance.driven import (
    BLOCK_SIZE,
    FINGERPRINT,
    LAYOUT,
    VECTOR_BYTES,
    kv_of,
)
from baton.conformance.driven import DrivenWorker as Worker
from baton.v1 import worker_pb2, worker_pb2_grpc
from common.kv.connector import KVConnector
from common.kv.connectors.handoff import HandoffSender
from common.kv.handoff import HandoffTarget
from common.rpc.loop import LoopThread
from common.rpc.server import RpcServer
from services.prefill.meetings import Meetings


def card_of(block_size: int) -> worker_pb2.ModelCard:
    return worker_pb2.ModelCard(
        name="none",
        block_size=block_size,
        block_bytes=LAYOUT.with_block_size(block_size).block_bytes,
        fingerprint=FINGERPRINT,
    )


CARD = card_of(BLOCK_SIZE)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(length)]


def until(condition: Callable[[], object], seconds: float = 10.0) -> object:
    """The condition's first true value; AssertionError when there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.002)  # what other threads do is told to nobody
    raise AssertionError(f"not true within {seconds} s: {condition}")


class PrefillWorker(worker_pb2_grpc.PrefillServiceServicer):
    """A prefill worker of its own thread and sockets; `spoil` may change or refuse a call."""

    def __init__(
        self, connector_around: Callable[[HandoffSender], KVConnector] | None = None, **kw
    ):
        self.sender = HandoffSender()
        around = connector_around or (lambda sender: sender)
        self.worker = Worker(around(self.sender), **kw)
        self.meetings = Meetings(lambda: self.card, self._probe)
        self.card = card_of(self.worker.block_size)
        self.calls: list[worker_pb2.PrefillRequest] = []
        self.metadata: list[dict] = []
        self.cancelled = 0
        self.spoil: Callable | None = None
        self._inbox: list = []
        self._lock = threading.Lock()
        self._stopping = False
        self._loop = LoopThread("test-prefill")
        self._loop.run(self._start()).result(10)
        self._engine = threading.Thread(target=self._turns, daemon=True)
        self._engine.start()

    async def _start(self):
        self._server = RpcServer("127.0.0.1", 0)
        self._server.add(
            self, worker_pb2_grpc.add_PrefillServiceServicer_to_server, "baton.v1.PrefillService"
        )
        self.address = f"127.0.0.1:{await self._server.start()}"

    async def _probe(self, address):
        return await asyncio.wrap_future(self.sender._loop.run(self.sender.probe(address)))

    async def Meet(self, request, context):
        await self.meetings.meet(request)
        return worker_pb2.MeetResponse(worker_id="prefill", incarnation="p")

    async def Prefill(self, request, context):
        met = self.meetings.met(request.handoff.incarnation)
        self.calls.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        try:
            if self.spoil is not None:
                spoiled = await self.spoil(request)
                if isinstance(spoiled, worker_pb2.PrefillResponse):
                    return spoiled
                request = spoiled or request
            request_id = f"{request.request_id}/{secrets.token_hex(2)}"
            sent = self.sender.completion(request_id)
            with self._lock:
                self._inbox.append((met, request_id, request))
            self.worker.woken.set()
            result = await asyncio.wrap_future(sent)
            if result.error is not None:
                raise result.error
            self.sender.forget(request_id)
            return worker_pb2.PrefillResponse(
                blocks_sent=result.blocks_sent, bytes_sent=result.bytes_sent
            )
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def _turns(self):
        while not self._stopping:
            with self._lock:
                inbox, self._inbox = self._inbox, []
            for met, request_id, request in inbox:
                h = request.handoff
                self.worker.submit(
                    request_id,
                    list(request.token_ids),
                    tenant=request.tenant,
                    prefill_tokens=request.num_tokens,
                    transfer=HandoffTarget(
                        h.id,
                        h.incarnation,
                        h.generation,
                        met.data_address,
                        met.block_size,
                        request.first_block,
                        h.lease_ms,
                    ),
                )
            try:
                busy = self.worker.turn()
            except RuntimeError as error:  # a test broke the step: its requests end, as in Engine
                busy = [self.worker.scheduler.abort(r, error) for r in self._live()]
            if not busy:
                self.worker.woken.wait(0.02)
                self.worker.woken.clear()

    def _live(self) -> list[str]:
        return self.worker.scheduler.request_ids()

    def stop(self):
        """Die: the server first, then the engine and the links."""
        if self._stopping:
            return
        self._loop.run(self._server.stop(0)).result(10)
        self._stopping = True
        self._engine.join(10)
        self.sender.shutdown()
        self.worker.copies.close()
        self._loop.close()


__all__ = [
    "BLOCK_SIZE",
    "CARD",
    "FINGERPRINT",
    "LAYOUT",
    "VECTOR_BYTES",
    "PrefillWorker",
    "Worker",
    "card_of",
    "kv_of",
    "until",
]
