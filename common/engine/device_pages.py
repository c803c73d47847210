"""A GPU's pages as connectors see them. Nothing but `read` waits for a step.

What goes out is gathered on the stream of the steps, in turn with them, into memory of the device;
what comes in is spread from there in the same way. Between there and the machine's memory it goes
on streams of its own, through pinned memory that is taken once: a gather sees the steps before it
and none after, and no step waits for the bus.
"""

import collections
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch

from common.engine.device import move
from common.kv.layout import KVLayout

# Pinned memory: what goes out passes one piece of it, what comes in several, one after another.
PIECE_BYTES = 8 * 1024 * 1024
PIECES_IN = 4


class Bus(Protocol):
    """Between a device and the machine's memory. Called on the engine's thread."""

    def leave(self, rows: torch.Tensor) -> Callable[[], np.ndarray]:
        """uint8 rows, which the device may still be computing. What is returned waits for them and
        gives their bytes; any thread may call it, once."""
        ...

    def bring(self, rows: np.ndarray) -> torch.Tensor:
        """uint8 rows, copied: on the device for all that is done there after this."""
        ...


class DevicePages:
    """See common/kv/connectors/pages.py.

    data  uint8 [num_blocks, block_bytes], where it is
    """

    def __init__(self, data: torch.Tensor, layout: KVLayout, bus: Bus) -> None:
        self._layout = layout
        self._bus = bus
        # A GPU's indexing goes element by element: by eight bytes where a layer's parts allow it.
        parts = [part.stop for part in layout.layer_slices(range(1))]
        parts.append(layout.payload_bytes)
        words = not any(size % 8 for size in (*parts, layout.block_bytes))
        self._unit = 8 if words else 1
        self._data = data.view(torch.int64) if words else data

    def read(self, block_ids: Sequence[int], layers: range | None = None) -> np.ndarray:
        """As `begin`, and waits."""
        return self.begin(block_ids, layers)()

    def begin(
        self, block_ids: Sequence[int], layers: range | None = None
    ) -> Callable[[], np.ndarray]:
        at = self._rows(block_ids)
        parts = [self._data[:, part].index_select(0, at) for part in self._parts(layers)]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return self._bus.leave(rows.view(torch.uint8))

    def write(
        self, block_ids: Sequence[int], rows: np.ndarray, layers: range | None = None
    ) -> None:
        there, start = self._bus.bring(rows).view(self._data.dtype), 0
        at = self._rows(block_ids)
        for part in self._parts(layers):
            end = start + part.stop - part.start
            self._data[:, part].index_copy_(0, at, there[:, start:end])
            start = end

    def _rows(self, block_ids: Sequence[int]) -> torch.Tensor:
        return move(torch.tensor(block_ids, dtype=torch.int64), self._data.device)

    def _parts(self, layers: range | None) -> list[slice]:
        """Columns of `data`."""
        if layers is None:
            return [slice(0, self._data.shape[1])]
        slices = self._layout.layer_slices(layers)
        return [slice(part.start // self._unit, part.stop // self._unit) for part in slices]


class CudaBus:
    """A GPU's. Its pinned memory is all there ever is: what goes out waits its turn for one piece
    of it on the thread that fetches it; what comes in waits, at most, until the bus has brought
    what was `PIECES_IN` pieces before it, which no step can delay."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._fetching = threading.Lock()
        self._landing = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        # Who waits for it sleeps, and leaves its core to the engine's thread.
        self._landed = torch.cuda.Event(blocking=True)
        self._pieces = collections.deque(
            (torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
            for _ in range(PIECES_IN)
        )

    def leave(self, rows: torch.Tensor) -> Callable[[], np.ndarray]:
        computed = torch.cuda.Event()
        computed.record(torch.cuda.current_stream(self._device))
        return partial(self._fetch, rows, computed)

    def _fetch(self, rows: torch.Tensor, computed: torch.cuda.Event) -> np.ndarray:
        found = np.empty(tuple(rows.shape), np.uint8)
        there, here = rows.view(-1), found.reshape(-1)
        with self._fetching, torch.cuda.stream(self._out):
            self._out.wait_event(computed)
            for start in range(0, len(here), PIECE_BYTES):
                piece = there[start : start + PIECE_BYTES]
                landing = self._landing[: len(piece)]
                landing.copy_(piece, non_blocking=True)
                self._landed.record()
                self._landed.synchronize()
                here[start : start + len(piece)] = landing.numpy()
        return found

    def bring(self, rows: np.ndarray) -> torch.Tensor:
        steps = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._in):
            found = torch.empty(rows.shape, dtype=torch.uint8, device=self._device)
            there, here = found.view(-1), rows.reshape(-1)
            for start in range(0, len(here), PIECE_BYTES):
                part = here[start : start + PIECE_BYTES]
                memory, brought = self._pieces[0]
                self._pieces.rotate(-1)
                brought.synchronize()
                memory[: len(part)].numpy()[:] = part
                there[start : start + len(part)].copy_(memory[: len(part)], non_blocking=True)
                brought.record()
        steps.wait_stream(self._in)
        # It is the other stream's memory: not given to anybody else before the steps have read it.
        found.record_stream(steps)
        return found
