"""Blocks whose KV heads are spread over the ranks, each rank's in memory of its own.

So it is on GPUs. Connectors, on rank 0, read and write whole blocks in the machine's memory all the
same: the ranks map a file of memory with a room for each of them, and by rank 0's order (a Move)
every rank copies its heads of the blocks between its cache and its room. Orders go the way of the
steps and in order with them. Ranks that hold the same KV head are all written to; the first of them
is read.

A room holds the payload of the order's layers, [blocks, layers, k|v, heads, token, head_dim], then,
where the KV dtype has them, their scales, [blocks, layers, k|v, heads, token].
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import structlog
import torch

from common.engine.cache import KVCache
from common.engine.parallel.ranks import Ranks
from common.engine.parallel.shard import Shard
from common.engine.parallel.wire import Move
from common.kv.layout import KVLayout

log = structlog.get_logger("ranks")

# What the rooms of all ranks hold of whole blocks; where more move, it is in several orders.
ROOMS_BYTES = 64 * 1024 * 1024


def room_bytes(layout: KVLayout, share: KVLayout) -> int:
    """Of a rank's room, for one whole block at least; whole pages of memory.

    layout, share  of whole blocks, and of a rank's part of them
    """
    size = max(1, ROOMS_BYTES // layout.block_bytes) * share.block_bytes
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def map_rooms(fd: int, ranks: int) -> np.ndarray:
    """The rooms in a file of memory, [ranks, room_bytes] uint8."""
    return np.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), np.uint8).reshape(ranks, -1)


class Room:
    """A rank's own room, and its cache.

    cache  of this rank's heads alone
    room   [room_bytes] uint8, of memory that rank 0 maps too
    """

    def __init__(self, cache: KVCache, room: np.ndarray) -> None:
        self._cache = cache
        self._bytes = torch.from_numpy(room)
        self._pinned = cache.data.is_cuda and _pin(self._bytes)

    def move(self, order: Move) -> None:
        """Returns when it is done, after the steps that were run before."""
        data, ids, start = self._cache.data, list(order.block_ids), 0
        for part in self._cache.layout.layer_slices(order.layers):
            size = len(ids) * (part.stop - part.start)
            rows = self._bytes[start : start + size].view(len(ids), -1)
            start += size
            if data.device.type == "cpu":
                # numpy copies rows whole; torch's indexing goes byte by byte, 20 times slower.
                if order.into_cache:
                    data.numpy()[ids, part] = rows.numpy()
                else:
                    rows.numpy()[:] = data.numpy()[ids, part]
            elif order.into_cache:
                data[ids, part] = rows.to(data.device, non_blocking=True)
            else:
                rows.copy_(data[ids, part], non_blocking=True)
        if data.is_cuda:
            torch.cuda.current_stream(data.device).synchronize()

    def close(self) -> None:
        """Before the room's memory is given back."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
            self._pinned = False


def _pin(memory: torch.Tensor) -> bool:
    """Let the GPU's copy engines read and write it by themselves; without it copies are right, but
    slower."""
    error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if error:
        log.warning("room_not_pinned", bytes=memory.numel(), cuda_error=error)
    return error == 0


class SpreadBlocks:
    """Rank 0's view: whole blocks (see common/kv/connectors/pages.py). Used between steps, on the
    thread that runs them; its methods raise Unavailable when a rank is gone.

    layout  of whole blocks
    shards  of all ranks
    rooms   [ranks, room_bytes] uint8
    """

    def __init__(
        self, layout: KVLayout, shards: list[Shard], rooms: np.ndarray, ranks: Ranks, own: Room
    ) -> None:
        self._layout = layout
        self._share = replace(layout, num_kv_heads=len(shards[0].kv_heads))
        self._shards = shards
        self._rooms = rooms
        self._ranks = ranks
        self._own = own

    def read(self, block_ids: Sequence[int], layers: range | None = None) -> np.ndarray:
        """A copy of some layers, all by default, of some blocks: [blocks, layers * layer_bytes],
        of each its payload, then its scales."""
        layers = layers if layers is not None else range(self._layout.num_layers)
        rows = np.empty((len(block_ids), len(layers) * self._layout.layer_bytes), np.uint8)
        for some in self._orders(len(block_ids), layers):
            self._move(Move(False, layers, block_ids[some]))
            for shard, whole, room in self._views(rows[some], layers):
                if shard.writes_kv:
                    whole[:] = room
        return rows

    def write(
        self, block_ids: Sequence[int], rows: np.ndarray, layers: range | None = None
    ) -> None:
        """Put what `read` gave into blocks."""
        layers = layers if layers is not None else range(self._layout.num_layers)
        for some in self._orders(len(block_ids), layers):
            for _, whole, room in self._views(rows[some], layers):
                room[:] = whole
            self._move(Move(True, layers, block_ids[some]))

    def _orders(self, count: int, layers: range) -> Iterator[slice]:
        """Which of `count` blocks go together: as many as there is room for."""
        at_once = self._rooms.shape[1] // (len(layers) * self._share.layer_bytes)
        return (slice(start, start + at_once) for start in range(0, count, at_once))

    def _views(
        self, rows: np.ndarray, layers: range
    ) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """Each rank's heads in whole blocks and in its room, both [blocks, layers * 2, heads,
        bytes], of the payload, then of the scales."""
        vectors, column, start = (len(rows), 2 * len(layers)), 0, 0
        for part in self._layout.layer_slices(layers):
            width = part.stop - part.start
            # Splits an axis of contiguous bytes: a view, never a copy.
            whole = rows[:, column : column + width].reshape(
                *vectors, self._layout.num_kv_heads, -1
            )
            size = len(rows) * width // self._layout.num_kv_heads * self._share.num_kv_heads
            for shard, room in zip(self._shards, self._rooms, strict=True):
                own = shard.kv_heads
                part_of_room = room[start : start + size].reshape(*vectors, len(own), -1)
                yield shard, whole[:, :, own.start : own.stop], part_of_room
            column, start = column + width, start + size

    def _move(self, order: Move) -> None:
        self._ranks.send(order)
        with self._ranks.explained("blocks could not be moved between the ranks"):
            self._own.move(order)
            self._ranks.wait_moved()
