"""A decode step as a tape: every kernel that it runs, recorded once and then run with one call.

Between the kernels of a step there is Python, and a team of threads that is woken and sent to
sleep a hundred times; with few sequences this takes as long as the kernels do, and with a chunk of
512 tokens a twentieth. A tape has the team woken once: all go through the same kernels, and wait
for each other after each.

The first step of a batch size is recorded as the model runs: its kernels note their arguments in
place of computing, and what they compute in is taken from a pool that later steps find again. A
later step of that size refreshes what differs: where its tokens and pages lie, and in which pieces
they are read. Mostly nothing does, since batches are built in memory that stays.

Steps with chunks are hardly ever alike: such a tape is recorded, run and forgotten. Python that
records does not wait for kernels in between, which push it out of the caches.
"""

import bisect
import ctypes
import operator
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray

from common.engine.batch import Batch
from common.engine.graphs import only_decodes
from common.engine.kernels.cpu import elementwise, launch, simd
from common.engine.kernels.cpu.launch import KIND, Kernel, Refresh, compile_kernel, fields
from common.kv.connector import KVConnector

# Decoding more sequences at once takes so long that what lies between its kernels is no matter.
MOST_ROWS = 64
LINE_BYTES = 64
# With more tokens, memory that is kept for a tape would be much, and what it spares is not.
MOST_TOKENS = 1024
# Linux: of x86-64, of its futexes that one process uses alone.
FUTEX, FUTEX_WAIT, FUTEX_WAKE, EVERYBODY = 202, 128, 129, 2**31 - 1
# Tens of microseconds.
PATIENCE = 2000


class TapeArguments(ctypes.Structure):
    """Addresses.

    entries     [num_items, 2] int64: a kernel and its arguments
    patience    looks at whether the others have come, before a thread goes to sleep
    team        omp_get_num_threads
    system      syscall
    meeting     [3] int64, all 0 before a run: how often a thread was done with a kernel, the
                kernels that all are done with, the threads that sleep
    """

    _fields_ = fields("entries patience team system meeting")


@simd.part
def wait_for_all(meeting, number, threads, patience, system):
    """Until all threads are done with kernel `number`: a barrier that sleeps (Drepper 2011, Futexes
    are tricky) where others need the cores, as it takes long then."""
    done, sleepers = meeting + 8, meeting + 16
    if simd.fetch_add(meeting, 1) + 1 == (number + 1) * threads:
        simd.fetch_add(done, 1)
        if simd.load_shared(sleepers) > 0:
            simd.system_call(system, FUTEX, done, FUTEX_WAKE, EVERYBODY)
        return
    while simd.load_shared(done) <= number:
        if patience > 0:
            simd.pause()
            patience -= 1
            continue
        simd.fetch_add(sleepers, 1)
        # Returns at once where `done` is not `number` any more.
        simd.system_call(system, FUTEX, done, FUTEX_WAIT, number)
        simd.fetch_add(sleepers, -1)


@simd.part
def rewind(arguments):
    """For the next run of a kernel that all have left."""
    simd.put_int64(arguments, 0)
    simd.put_int64(arguments + 8, 0)


@cache
def tape_kernel() -> Kernel:
    def tape(address):
        a = carray(address, 1)[0]
        counters = simd.address_of(address)
        thread = simd.fetch_add(counters + 8, 1)
        threads = simd.call_int(a.team)
        for i in range(a.num_items):
            entry = a.entries + 16 * i
            simd.call_kernel(simd.scalar_int64(entry), simd.scalar_int64(entry + 8))
            wait_for_all(a.meeting, i, threads, a.patience, a.system)
            if thread == 0:
                rewind(simd.scalar_int64(entry + 8))

    return compile_kernel(tape, TapeArguments)


class Pool:
    """Memory for what the kernels of a tape compute: that of a tensor which is gone is given out
    again, as its reader comes earlier on the tape than who writes there next."""

    def __init__(self) -> None:
        self._chunks: list[np.ndarray] = []  # the smallest first
        self._free = sys.getrefcount(np.empty(1)) + 1

    def empty(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, width]. For few sizes of rows, so that steps use each other's."""
        room = max(MOST_ROWS, 1 << max(0, rows - 1).bit_length())
        whole = torch.from_numpy(self._chunk(room * width * dtype.itemsize + LINE_BYTES))
        start, size = -whole.data_ptr() % LINE_BYTES, rows * width * dtype.itemsize
        return whole[start : start + size].view(dtype).view(rows, width)

    def _chunk(self, size: int) -> np.ndarray:
        chunks = self._chunks
        for i in range(len(chunks)):
            # A tensor of its memory refers to a chunk.
            if chunks[i].nbytes >= size and sys.getrefcount(chunks[i]) == self._free:
                return chunks[i]
        chunk = np.empty(size, np.uint8)
        bisect.insort(chunks, chunk, key=lambda chunk: chunk.nbytes)
        return chunk


class Tape:
    """Kernels with their arguments, in their order."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.empty = pool.empty
        self._kernels: list[Kernel] = []
        self._arguments: list[ctypes.Structure] = []
        self._refreshed: list[tuple[ctypes.Structure, Refresh]] = []
        self._last: tuple[object, ...] = (None, None, None)
        self._meeting = (ctypes.c_int64 * 3)()
        self._kept: list[object] = []

    def keep(self, held: object) -> None:
        """What holds the memory that kernels will read."""
        self._kept.append(held)

    def add(
        self, kernel: Kernel, arguments: ctypes.Structure, items: int, refresh: Refresh | None
    ) -> None:
        """Used by Kernel.run."""
        copy = type(arguments).from_buffer_copy(arguments)
        copy.num_items, copy.next_item, copy.next_thread = items, 0, 0
        self._kernels.append(kernel)
        self._arguments.append(copy)
        if refresh is not None:
            self._refreshed.append((copy, refresh))

    def finish(self, output: torch.Tensor) -> None:
        """Nothing more comes; `output` [rows, width], of `empty`, is the step's result."""
        rows, width = self._shape = tuple(output.shape)
        # The address alone, so that other tapes may compute in its memory too.
        a = elementwise.WidenArguments(x=output.data_ptr(), width=width)
        items = rows * -(-width // elementwise.WIDEN_COLUMNS)
        self.add(elementwise.widen_kernel(KIND[output.dtype]), a, items, None)
        self._arrange()

    def flush(self) -> None:
        """Runs what was added since the last time, and forgets it."""
        if self._kernels:
            self._arrange()
            self._go()
            self._kernels, self._arguments, self._refreshed = [], [], []

    def _arrange(self) -> None:
        pairs = zip(self._kernels, self._arguments, strict=True)
        entries = [(kernel.address, ctypes.addressof(a)) for kernel, a in pairs]
        self._entries = np.array(entries, np.int64)
        a = self._run = TapeArguments()
        a.entries, a.num_items = self._entries.ctypes.data, len(entries)
        a.patience, a.team, a.system = PATIENCE, launch.TEAM_SIZE, launch.SYSTEM_CALL
        a.meeting = ctypes.addressof(self._meeting)

    def run(self, batch: Batch, step: object) -> torch.Tensor:
        """The step's result [rows, width] float32."""
        now = step, batch.token_ids, batch.logit_rows
        if any(map(operator.is_not, now, self._last)):
            for arguments, refresh in self._refreshed:
                refresh(arguments, batch, step)
            self._last = now
        result = torch.empty(self._shape)
        self._arguments[-1].out = result.data_ptr()
        self._go()
        return result

    def _go(self) -> None:
        self._meeting[:] = (0, 0, 0)
        self._run.next_thread = 0
        tape_kernel().run_team(self._run, torch.get_num_threads())


class _Between:
    """Tells a connector of a layer when what is on the tape by then has been run."""

    def __init__(self, tape: Tape, connector: KVConnector) -> None:
        self._tape, self._connector = tape, connector

    def wait_for_layer_load(self, layer: int) -> None:
        self._tape.flush()
        self._connector.wait_for_layer_load(layer)

    def save_kv_layer(self, layer: int) -> None:
        self._tape.flush()
        self._connector.save_kv_layer(layer)


class Tapes:
    """A tape for each size of batch that only decodes, and one for the moment for any other.

    forward  a model's, which tells the connector of each layer, if there is one: runs its kernels,
             and nothing else
    prepare  what a model has made of a batch before its first layer
    """

    def __init__(
        self,
        forward: Callable[[Batch, Any], torch.Tensor],
        prepare: Callable[[Batch], object],
    ) -> None:
        self._forward, self._prepare = forward, prepare
        self._pool, self._chunk_pool = Pool(), Pool()
        self._tapes: dict[int, Tape] = {}

    def room_for(self, batch: Batch) -> bool:
        return only_decodes(batch) and len(batch.context_len) <= MOST_ROWS

    def run(self, batch: Batch) -> torch.Tensor:
        """Logits [num_logits, vocab] float32 of a batch with room."""
        count = len(batch.context_len)
        step = self._prepare(batch)
        if count not in self._tapes:
            tape = Tape(self._pool)
            tape.finish(self._record(tape, batch, None))
            self._tapes[count] = tape
        return self._tapes[count].run(batch, step)

    def run_once(self, batch: Batch, connector: KVConnector | None) -> torch.Tensor:
        """The same of any batch; the connector is told of each layer when it is done."""
        if len(batch.token_ids) > MOST_TOKENS:
            return self._forward(batch, connector).to(torch.float32)
        tape = Tape(self._chunk_pool)
        between = None if connector is None else _Between(tape, connector)
        logits = self._record(tape, batch, between)
        tape.flush()
        return logits.to(torch.float32, copy=True)

    def _record(self, tape: Tape, batch: Batch, connector: Any) -> torch.Tensor:
        launch.recording.recorder = tape
        try:
            return self._forward(batch, connector)
        finally:
            launch.recording.recorder = None
