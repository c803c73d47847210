"""A worker without a model: the real scheduler and a connector over pages with known right bytes.

The "KV" of a token is a function of the tokens up to and including it, of the tenant and of the
fingerprint, so that every page can be checked against what it must hold: each step checks all that
attention would read.
"""

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from common.engine.blocks import BlockManager
from common.engine.device_pages import Bus, DevicePages
from common.engine.limits import SchedulerConfig
from common.engine.sampling_params import SamplingParams
from common.engine.scheduler import Scheduler
from common.engine.sequence import (
    UNKNOWN_TOKEN,
    EngineRequest,
    RequestOutput,
    Sampled,
    Sequence,
    StepPlan,
)
from common.kv.connector import KVCaches, KVConnector
from common.kv.connectors.copies import HostCopies
from common.kv.layout import KVLayout

BLOCK_SIZE = 16
LAYOUT = KVLayout(
    num_layers=3, num_kv_heads=2, head_dim=8, block_size=BLOCK_SIZE, kv_dtype="fp8_e4m3"
)
# K and V of each head: the bytes of a vector, and of its scale.
VECTORS = 2 * LAYOUT.num_kv_heads
VECTOR_BYTES, SCALE_BYTES = LAYOUT.head_dim, 4
FINGERPRINT = b"fingerprint-of-1"
VOCAB = 1000
# What every step chooses, but where a request is to stop.
TOKEN, EOS = 1, VOCAB - 1
# How often a worker looks after its connector though nobody woke it.
LOOK_S = 0.05

Row = tuple[Sequence, int, int]


def kv_of(token_ids: list[int], tenant: str = "", fingerprint: bytes = FINGERPRINT) -> np.ndarray:
    """The right bytes of the last token's KV: [num_layers, VECTORS, VECTOR_BYTES + SCALE_BYTES]."""
    tokens = b"".join(t.to_bytes(4, "little") for t in token_ids)
    digest = hashlib.shake_128(tokens + fingerprint + tenant.encode())
    row = np.frombuffer(digest.digest(LAYOUT.block_bytes // BLOCK_SIZE), np.uint8)
    return row.reshape(LAYOUT.num_layers, VECTORS, -1)


@dataclass
class DrivenWorker:
    """An engine's turn, driven by hand. Raises AssertionError when a step would read wrong KV.

    step_tokens      most tokens of a step
    ahead            begin a step before the one before it has landed, as the engine does where it
                     steps ahead
    block_size       tokens in a page, all else as in LAYOUT
    bus              None, or the pages are a device's, behind this bus
    computed_tokens  so far
    on_turn          called after each turn
    on_layer         called within a step after save_kv_layer
    """

    connector: KVConnector
    num_blocks: int = 64
    step_tokens: int = 64
    ahead: bool = False
    fingerprint: bytes = FINGERPRINT
    block_size: int = BLOCK_SIZE
    bus: Bus | None = None
    outputs: dict[str, list[RequestOutput]] = field(default_factory=dict)
    computed_tokens: int = 0
    on_turn: Callable[["DrivenWorker"], None] | None = None
    on_layer: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        layout = LAYOUT.with_block_size(self.block_size)
        self.cache = torch.zeros(self.num_blocks, layout.block_bytes, dtype=torch.uint8)
        data = self.cache.numpy()
        shape = (self.num_blocks, layout.num_layers, VECTORS, self.block_size)
        self.vectors = data[:, : layout.payload_bytes].reshape(*shape, VECTOR_BYTES)
        self.scales = data[:, layout.payload_bytes :].reshape(*shape, SCALE_BYTES)
        self.woken = threading.Event()
        self.blocks = BlockManager(self.num_blocks)
        config = SchedulerConfig(
            block_size=self.block_size,
            max_model_len=4096,
            vocab_size=VOCAB,
            max_num_batched_tokens=self.step_tokens,
            fingerprint=self.fingerprint,
            eos_token_ids=(EOS,),
        )
        self._stops: dict[str, int] = {}
        self._flight: StepPlan | None = None
        pages = self.cache if self.bus is None else DevicePages(self.cache, layout, self.bus)
        self.copies = HostCopies(pages, layout)
        self.connector.register_kv_caches(
            KVCaches(pages, layout, self.fingerprint, self.woken.set, self.copies)
        )
        self.scheduler = Scheduler(config, self.blocks, self.connector)

    def submit(
        self,
        request_id: str,
        prompt: list[int],
        *,
        max_tokens: int = 1,
        stops_after: int = 0,
        transfer: Any = None,
        **fields: Any,
    ) -> Sequence:
        """Queue a request, which nobody foresees to stop after `stops_after` tokens, 0 for never;
        `fields` are EngineRequest's."""
        self._stops[request_id] = len(prompt) + stops_after
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        request = EngineRequest(request_id, prompt, params, transfer=transfer, **fields)
        return self.scheduler.add(request, 0, time.monotonic())

    def turn(self) -> bool:
        """One turn as the engine makes it. False: there was nothing to do."""
        flight, self._flight = self._flight, None
        plan = self.scheduler.schedule(time.monotonic())
        meta = self.connector.build_connector_meta(plan if plan.sequences else None)
        self.connector.start_load_kv(meta)
        self._begin(plan)
        if flight is not None:
            self._land(flight)
        if plan.sequences:
            self.connector.wait_for_save()
            if self.ahead and not plan.loading:
                self.scheduler.assume(plan)
                self._flight = plan
            else:
                self._land(plan)
        self._keep(self.scheduler.take_outputs())
        self.scheduler.check()
        if self.on_turn is not None:
            self.on_turn(self)
        return flight is not None or bool(plan.sequences)

    def _begin(self, plan: StepPlan) -> None:
        rows = _rows(plan)
        for layer in range(LAYOUT.num_layers if rows else 0):
            self.connector.wait_for_layer_load(layer)
            self._compute(rows, layer)
            self.connector.save_kv_layer(layer)
            if self.on_layer is not None:
                self.on_layer(layer)
        self.computed_tokens += plan.num_tokens
        # What is loaded within a step is told to be bad only when it lands.
        for sequence, start, _ in rows if not plan.loading else ():
            self._check_past(sequence, start)

    def _land(self, plan: StepPlan) -> None:
        failed: set[int] = set()
        if plan.loading:
            failed = self.connector.get_block_ids_with_load_errors()
            for sequence, start, _ in _rows(plan):
                if not failed.intersection(sequence.block_table):
                    self._check_past(sequence, start)
        sampled = [
            Sampled(EOS if start + count + 1 == self._stops[sequence.request_id] else TOKEN)
            for (sequence, start, count), wanted in zip(_rows(plan), plan.sampled, strict=True)
            if wanted
        ]
        self._keep(self.scheduler.update(plan, sampled, failed))

    def run(self, request_id: str, seconds: float = 10.0, *, woken: bool = False) -> RequestOutput:
        """Turns until the request ended; its last output.

        woken  look after the connector only when it calls `wake`, as the engine does
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            outputs = self.outputs.get(request_id, [])
            if outputs and outputs[-1].finish_reason is not None:
                return outputs[-1]
            if not self.turn():
                self.woken.wait(seconds if woken else LOOK_S)
                self.woken.clear()
        raise AssertionError(f"{request_id} did not end within {seconds} s")

    def turns_until(self, condition: Callable[[], object], seconds: float = 10.0) -> None:
        """Turns until the condition is true; AssertionError after the deadline."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not true within {seconds} s"
            if not self.turn():
                self.woken.wait(LOOK_S)
                self.woken.clear()

    def abort(self, request_id: str) -> None:
        """End a request between two turns."""
        self.scheduler.abort(request_id)
        self._keep(self.scheduler.take_outputs())

    def close(self) -> None:
        """Shut the connector down, as the engine does."""
        self.connector.shutdown()
        self.copies.close()

    def idle(self) -> bool:
        """Nothing is held: no request, no block, no transfer."""
        return (
            self.scheduler.idle
            and self.blocks.num_used == 0
            and self.connector.open_handoffs() == 0
        )

    def row(self, block_table: list[int], position: int) -> tuple[np.ndarray, np.ndarray]:
        """Where a token's vectors are, and their scales: [num_layers, VECTORS, bytes] each."""
        page, token = block_table[position // self.block_size], position % self.block_size
        return self.vectors[page, :, :, token], self.scales[page, :, :, token]

    def _keep(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)

    def _kv_of(self, sequence: Sequence, position: int) -> np.ndarray:
        tokens = sequence.token_ids[: position + 1]
        # The step knows what the one before it chose.
        tokens = [TOKEN if token == UNKNOWN_TOKEN else token for token in tokens]
        return kv_of(tokens, sequence.request.tenant, self.fingerprint)

    def _compute(self, rows: list[Row], layer: int) -> None:
        for sequence, start, count in rows:
            for position in range(start, start + count):
                found, scales = self.row(sequence.block_table, position)
                right = self._kv_of(sequence, position)[layer]
                found[layer], scales[layer] = right[:, :VECTOR_BYTES], right[:, VECTOR_BYTES:]

    def _check_past(self, sequence: Sequence, length: int) -> None:
        """What attention would read: every token before `length` has its right KV."""
        for position in range(length):
            found = np.concatenate(self.row(sequence.block_table, position), axis=2)
            assert np.array_equal(found, self._kv_of(sequence, position)), (
                f"{sequence.request_id}: wrong KV at position {position}"
            )


def _rows(plan: StepPlan) -> list[Row]:
    return list(zip(plan.sequences, plan.start, plan.scheduled, strict=True))
