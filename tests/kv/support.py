"""A worker without a model: the real scheduler and connectors over pages with known right bytes.

The "KV" of a token is a function of the tokens up to and including it, computed here in one line,
so that every page can be checked against what it must hold. Half of the heads of a layer are
written only after the connector was told of the layer, as with two ranks.
"""

import asyncio
import hashlib
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from baton.v1 import worker_pb2, worker_pb2_grpc
from common.engine.blocks import BlockManager
from common.engine.limits import SchedulerConfig
from common.engine.sampling_params import SamplingParams
from common.engine.scheduler import Scheduler
from common.engine.sequence import EngineRequest, RequestOutput, Sampled, Sequence, StepPlan
from common.kv.connector import KVCaches, KVConnector
from common.kv.connectors.handoff import HandoffSender
from common.kv.handoff import HandoffTarget
from common.kv.layout import KVLayout
from common.rpc.loop import LoopThread
from common.rpc.server import RpcServer
from services.prefill.meetings import Meetings

BLOCK_SIZE = 16
LAYOUT = KVLayout(
    num_layers=3, num_kv_heads=2, head_dim=8, block_size=BLOCK_SIZE, kv_dtype="fp8_e4m3"
)
# K and V of each head: the bytes of a vector, and of its scale.
VECTORS = 2 * LAYOUT.num_kv_heads
VECTOR_BYTES, SCALE_BYTES = LAYOUT.head_dim, 4
FINGERPRINT = b"fingerprint-of-1"
CARD = worker_pb2.ModelCard(
    name="none", block_size=BLOCK_SIZE, block_bytes=LAYOUT.block_bytes, fingerprint=FINGERPRINT
)


def kv_of(token_ids: list[int]) -> np.ndarray:
    """The right bytes of the last token's KV: [num_layers, VECTORS, VECTOR_BYTES + SCALE_BYTES]."""
    digest = hashlib.shake_128(b"".join(t.to_bytes(4, "little") for t in token_ids))
    row = np.frombuffer(digest.digest(LAYOUT.block_bytes // BLOCK_SIZE), np.uint8)
    return row.reshape(LAYOUT.num_layers, VECTORS, -1)


def until(condition: Callable[[], object], seconds: float = 10.0) -> object:
    """The condition's first true value; AssertionError when there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.002)
    raise AssertionError(f"not true within {seconds} s: {condition}")


@dataclass
class Worker:
    """An engine's turn, driven by hand."""

    connector: KVConnector
    num_blocks: int = 64
    step_tokens: int = 64
    outputs: dict[str, list[RequestOutput]] = field(default_factory=dict)
    computed_tokens: int = 0
    on_turn: Callable[["Worker"], None] | None = None
    on_layer: Callable[[int], None] | None = None

    def __post_init__(self):
        self.cache = torch.zeros(self.num_blocks, LAYOUT.block_bytes, dtype=torch.uint8)
        data, shape = self.cache.numpy(), (self.num_blocks, LAYOUT.num_layers, VECTORS, BLOCK_SIZE)
        self.vectors = data[:, : LAYOUT.payload_bytes].reshape(*shape, VECTOR_BYTES)
        self.scales = data[:, LAYOUT.payload_bytes :].reshape(*shape, SCALE_BYTES)
        self.woken = threading.Event()
        self.blocks = BlockManager(self.num_blocks)
        config = SchedulerConfig(
            block_size=BLOCK_SIZE,
            max_model_len=4096,
            vocab_size=1000,
            max_num_batched_tokens=self.step_tokens,
            fingerprint=FINGERPRINT,
        )
        self.connector.register_kv_caches(KVCaches(self.cache, LAYOUT, FINGERPRINT, self.woken.set))
        self.scheduler = Scheduler(config, self.blocks, self.connector)

    def submit(
        self, request_id: str, prompt: list[int], *, max_tokens=1, transfer=None, **kwargs
    ) -> Sequence:
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        request = EngineRequest(request_id, prompt, params, transfer=transfer, **kwargs)
        return self.scheduler.add(request, 0, time.monotonic())

    def turn(self) -> StepPlan:
        """One turn as the engine makes it."""
        plan = self.scheduler.schedule(time.monotonic())
        meta = self.connector.build_connector_meta(plan if plan.sequences else None)
        self.connector.start_load_kv(meta)
        if plan.sequences:
            rows = list(zip(plan.sequences, plan.start, plan.scheduled, strict=True))
            for sequence, start, count in rows:
                if sequence.request_id not in plan.loading:
                    self._check_past(sequence, start)
                self.computed_tokens += count
            for layer in range(LAYOUT.num_layers):
                self._compute(rows, layer, range(VECTORS // 2))
                self.connector.save_kv_layer(layer)
                if self.on_layer is not None:
                    self.on_layer(layer)
                self._compute(rows, layer, range(VECTORS // 2, VECTORS))
            self.connector.wait_for_save()
            failed = self.connector.get_block_ids_with_load_errors()
            self._keep(self.scheduler.update(plan, [Sampled(1)] * sum(plan.sampled), failed))
        else:
            self._keep(self.scheduler.take_outputs())
        self.scheduler.check()
        if self.on_turn is not None:
            self.on_turn(self)
        return plan

    def run(self, request_id: str, seconds: float = 10.0) -> RequestOutput:
        """Turns until the request ended; its last output."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            outputs = self.outputs.get(request_id, [])
            if outputs and outputs[-1].finish_reason is not None:
                return outputs[-1]
            if not self.turn().sequences:
                self.woken.wait(0.05)
                self.woken.clear()
        raise AssertionError(f"{request_id} did not end within {seconds} s")

    def turns_until(self, condition: Callable[[], object], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not true within {seconds} s"
            if not self.turn().sequences:
                self.woken.wait(0.02)
                self.woken.clear()

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)
        self._keep(self.scheduler.take_outputs())

    def _keep(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)

    def _compute(self, rows, layer: int, vectors: range) -> None:
        for sequence, start, count in rows:
            for position in range(start, start + count):
                found, scales = self.row(sequence.block_table, position)
                right = kv_of(sequence.token_ids[: position + 1])[layer, vectors]
                found[layer, vectors] = right[:, :VECTOR_BYTES]
                scales[layer, vectors] = right[:, VECTOR_BYTES:]

    def _check_past(self, sequence: Sequence, length: int) -> None:
        """What attention would read: every token before `length` has its right KV."""
        for position in range(length):
            found = np.concatenate(self.row(sequence.block_table, position), axis=2)
            assert np.array_equal(found, kv_of(sequence.token_ids[: position + 1])), (
                f"{sequence.request_id}: wrong KV at position {position}"
            )

    def row(self, block_table: list[int], position: int) -> tuple[np.ndarray, np.ndarray]:
        """Where a token's vectors are, and their scales: [num_layers, VECTORS, bytes] each."""
        page, token = block_table[position // BLOCK_SIZE], position % BLOCK_SIZE
        return self.vectors[page, :, :, token], self.scales[page, :, :, token]

    def idle(self) -> bool:
        return (
            self.scheduler.idle
            and self.blocks.num_used == 0
            and self.connector.open_handoffs() == 0
        )


class PrefillWorker(worker_pb2_grpc.PrefillServiceServicer):
    """A prefill worker of its own thread and sockets; `spoil` may change or refuse a call."""

    def __init__(
        self, connector_around: Callable[[HandoffSender], KVConnector] | None = None, **kw
    ):
        self.sender = HandoffSender()
        around = connector_around or (lambda sender: sender)
        self.worker = Worker(around(self.sender), **kw)
        self.meetings = Meetings(lambda: self.card, self._probe)
        self.card = CARD
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
                self._inbox.append((met.data_address, request_id, request))
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
            for data_address, request_id, request in inbox:
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
                        data_address,
                        request.first_block,
                        h.lease_ms,
                    ),
                )
            try:
                busy = self.worker.turn().sequences
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
        self._loop.close()


__all__ = ["CARD", "LAYOUT", "PrefillWorker", "Worker", "kv_of", "until"]
