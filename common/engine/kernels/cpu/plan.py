"""What the attention and KV kernels need to know of a step: which queries attend one by one, which
as chunks, and in which pieces."""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.engine.batch import Batch
from common.engine.cache import KVCache
from common.engine.kernels.cpu import attention, elementwise, prefill

LINE_BYTES = 64
NO_CHUNKS = np.empty((0, 4), np.int32)


@dataclass(frozen=True, slots=True)
class Splits:
    """Which rows attend one by one in layers with one window; see DecodeArguments."""

    items: np.ndarray
    parts: np.ndarray
    pending: np.ndarray
    num_parts: int

    def fill(self, a: attention.DecodeArguments) -> None:
        a.items, a.row_parts = address(self.items), address(self.parts)
        a.pending = address(self.pending)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One step's batch as the kernels read it. `keep` holds what the addresses are of."""

    write: elementwise.WriteArguments
    decode: attention.DecodeArguments
    splits: dict[int | None, Splits]
    prefill: prefill.PrefillArguments
    chunks: np.ndarray
    windows: tuple[int | None, ...]
    group: int
    threads: int
    keep: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Shapes:
    """What is the same in all steps of a model with one cache."""

    cache: KVCache
    num_heads: int
    rope: tuple[torch.Tensor, torch.Tensor]
    group: int
    lanes: int
    write: elementwise.WriteArguments
    decode: attention.DecodeArguments
    prefill: prefill.PrefillArguments

    @staticmethod
    def of(cache: KVCache, num_heads: int, rope: tuple[torch.Tensor, torch.Tensor]) -> "Shapes":
        layout, heads_each = cache.layout, num_heads // cache.num_kv_heads
        group = max(g for g in range(1, attention.MAX_GROUP + 1) if heads_each % g == 0)
        pages = {
            "block_bytes": layout.block_bytes,
            "block_size": layout.block_size,
            "block_heads": layout.num_kv_heads,
            "kv_heads": cache.num_kv_heads,
            "head_dim": layout.head_dim,
        }
        attend = {**pages, "passes": heads_each // group, "scale": layout.head_dim**-0.5}
        sizes = group, layout.head_dim
        tables = {"cos": rope[0].data_ptr(), "sin": rope[1].data_ptr()}
        return Shapes(
            cache=cache,
            num_heads=num_heads,
            rope=rope,
            group=group,
            lanes=num_heads // group,
            write=elementwise.WriteArguments(**pages, **tables, heads=num_heads),
            decode=attention.DecodeArguments(
                **attend, scratch_bytes=attention.scratch_bytes(*sizes)
            ),
            prefill=prefill.PrefillArguments(**attend, scratch_bytes=prefill.scratch_bytes(*sizes)),
        )


class Planner:
    """Plans the steps of one model, one at a time: one of single tokens holds until the next such
    is planned, which is the same where only the numbers at its addresses differ.

    chunk_queries  a sequence with fewer queries in a step has them attend one by one
    signs          what Q and K are rotated by (see WriteArguments); None: they are not
    """

    def __init__(self, chunk_queries: int, signs: np.ndarray | None) -> None:
        self._chunk_queries = chunk_queries
        self._signs = signs
        self._shapes: Shapes | None = None
        self._scratch = np.empty(0, np.uint8)
        self._parts = np.empty(0, np.float32)
        self._counting = np.empty(0, np.int32)
        self._context = np.empty(0, np.int32)
        # By window: what the last decode step's splits follow from, and those.
        self._decode_splits: dict[int | None, tuple[list[int], Splits]] = {}
        # By number of sequences: what the last such step's arguments follow from, and it.
        self._decode_steps: dict[int, tuple[tuple[Any, ...], Step]] = {}

    def plan(
        self,
        batch: Batch,
        cache: KVCache,
        num_heads: int,
        windows: tuple[int | None, ...],
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> Step:
        """See Ops.prepare."""
        self._shapes_of(cache, num_heads, rope)
        if len(batch.token_ids) == len(batch.context_len):
            return self._decode_step(batch, windows)
        context = batch.positions.numpy().astype(np.int32) + 1
        starts = np.array(batch.query_start, dtype=np.int32)
        counts = np.diff(starts)
        sequence = np.repeat(self._count(len(counts)), counts)
        chunked = counts >= self._chunk_queries
        rows = np.flatnonzero(~chunked[sequence]).astype(np.int32)
        chunks = cut_chunks(np.flatnonzero(chunked), starts, context, self._shapes.group)
        splits = {w: split(rows, context, w, self._shapes.lanes) for w in set(windows)}
        return self._step(batch, sequence, context, splits, chunks, windows)

    def _decode_step(self, batch: Batch, windows: tuple[int | None, ...]) -> Step:
        """The last step of this size again, where all that it says still holds."""
        count = len(batch.context_len)
        if len(self._context) < count:
            self._context = np.empty(2 * count, np.int32)
        struct.pack_into(f"{count}i", self._context, 0, *batch.context_len)
        splits = {w: self._splits_again(w, batch.context_len) for w in set(windows)}
        tensors = batch.positions, batch.slot_mapping, batch.block_table
        memory = self._context, self._count(count).base, *self._memory_for(splits)
        # All of these the step holds, so that no other gets their place.
        key = tuple(map(id, (*tensors, *memory, *splits.values())))
        known = self._decode_steps.get(count)
        if known is None or known[0] != (key, windows, torch.get_num_threads()):
            step = self._step(
                batch, self._count(count), self._context[:count], splits, NO_CHUNKS, windows
            )
            known = self._decode_steps[count] = (key, windows, step.threads), step
        return known[1]

    def _step(
        self,
        batch: Batch,
        sequence: np.ndarray,
        context: np.ndarray,
        splits: dict[int | None, Splits],
        chunks: np.ndarray,
        windows: tuple[int | None, ...],
    ) -> Step:
        """sequence and context [num_tokens] int32: of each row."""
        shapes = self._shapes
        scratch, parts = self._memory_for(splits)
        write, decode, chunk = (
            type(a).from_buffer_copy(a) for a in (shapes.write, shapes.decode, shapes.prefill)
        )
        write.positions, write.slots = batch.positions.data_ptr(), batch.slot_mapping.data_ptr()
        write.signs = 0 if self._signs is None else address(self._signs)
        write.scratch_bytes = decode.scratch_bytes
        for a in (write, decode, chunk):
            a.scratch = -(-address(scratch) // LINE_BYTES) * LINE_BYTES
        for a in (decode, chunk):
            a.tables, a.table_width = batch.block_table.data_ptr(), batch.block_table.stride(0)
        decode.row_sequence, decode.row_context = address(sequence), address(context)
        decode.parts, chunk.items = address(parts), address(chunks)
        keep = (batch, sequence, context, shapes.rope, parts, scratch)
        threads = torch.get_num_threads()
        return Step(write, decode, splits, chunk, chunks, windows, shapes.group, threads, keep)

    def _shapes_of(
        self, cache: KVCache, num_heads: int, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        shapes = self._shapes
        if (
            shapes is None
            or shapes.cache is not cache
            or shapes.num_heads != num_heads
            or shapes.rope is not rope
        ):
            self._shapes = Shapes.of(cache, num_heads, rope)
            self._decode_splits.clear()
            self._decode_steps.clear()

    def _splits_again(self, window: int | None, context: tuple[int, ...]) -> Splits:
        """Those of the step before where they are the same, as they mostly are."""
        size = attention.SPLIT_TOKENS
        key = [(tokens - 1) // size for tokens in context]
        if window is not None:
            key += [max(tokens - window, 0) // size for tokens in context]
        known = self._decode_splits.get(window)
        if known is None or known[0] != key:
            rows = self._count(len(context))
            known = key, split(rows, self._context[: len(context)], window, self._shapes.lanes)
            self._decode_splits[window] = known
        return known[1]

    def _count(self, most: int) -> np.ndarray:
        """0 to most - 1."""
        if len(self._counting) < most:
            self._counting = np.arange(2 * most, dtype=np.int32)
        return self._counting[:most]

    def _memory_for(self, splits: dict[int | None, Splits]) -> tuple[np.ndarray, np.ndarray]:
        """What threads write in during a call, from a line's border on, and the parts of splits."""
        shapes = self._shapes
        each = max(shapes.decode.scratch_bytes, shapes.prefill.scratch_bytes)
        size = torch.get_num_threads() * each + LINE_BYTES
        if len(self._scratch) < size:
            self._scratch = np.empty(size, np.uint8)
        most = max(s.num_parts for s in splits.values())
        size = most * shapes.num_heads * (shapes.cache.layout.head_dim + 16)
        if len(self._parts) < size:
            self._parts = np.empty(2 * size, np.float32)
        return self._scratch, self._parts


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def split(rows: np.ndarray, context: np.ndarray, window: int | None, lanes: int) -> Splits:
    """The splits of the contexts of these rows [n] int32, every one a work item for each lane.
    context [num_tokens] int32: of all rows."""
    size, own = attention.SPLIT_TOKENS, context[rows]
    first = 0 * own if window is None else np.maximum(own - window, 0) // size
    count = (own - 1) // size + 1 - first
    ends = np.cumsum(count, dtype=np.int32)
    total = int(ends[-1]) if len(ends) else 0
    items = np.empty((total, 2), np.int32)
    items[:, 0] = np.repeat(rows, count)
    items[:, 1] = np.arange(total, dtype=np.int32) + np.repeat(first + count - ends, count)
    several = np.where(count > 1, count, 0)
    parts = np.empty(len(context), np.int32)
    parts[rows] = np.where(count > 1, np.cumsum(several) - several, -1)
    pending = np.empty((len(context), lanes), np.int64)
    pending[rows] = count[:, None]
    return Splits(items, parts, pending, int(several.sum()))


def cut_chunks(
    sequences: np.ndarray, starts: np.ndarray, context: np.ndarray, group: int
) -> np.ndarray:
    """The items of PrefillArguments for these sequences [n], [items, 4] int32; starts is
    Batch.query_start. What sees most comes first, so that no thread is left alone with it."""
    size = prefill.queries_of_item(group)
    items = [
        (i, row, min(size, starts[i + 1] - row), context[row] - 1)
        for i in sequences
        for row in range(starts[i], starts[i + 1], size)
    ]
    items.sort(key=lambda item: -item[3])
    return np.array(items, dtype=np.int32).reshape(-1, 4)
