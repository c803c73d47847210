"""What the attention and KV kernels need to know of a step: which queries attend one by one, which
as chunks, and in which pieces."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.engine.batch import Batch
from common.engine.cache import KVCache
from common.engine.kernels.cpu import attention, elementwise, prefill

LINE_BYTES = 64


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


@dataclass(frozen=True, slots=True)
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
    """Plans the steps of one model, one at a time.

    chunk_queries  a sequence with fewer queries in a step has them attend one by one
    signs          what Q and K are rotated by (see WriteArguments); None: they are not
    """

    def __init__(self, chunk_queries: int, signs: np.ndarray | None) -> None:
        self._chunk_queries = chunk_queries
        self._signs = signs
        self._shapes: Shapes | None = None
        self._scratch = np.empty(0, np.uint8)
        self._counting = np.empty(0, np.int32)
        # By window: what the last decode step's splits follow from, and those.
        self._decode_splits: dict[int | None, tuple[bytes, Splits]] = {}

    def plan(
        self,
        batch: Batch,
        cache: KVCache,
        num_heads: int,
        windows: tuple[int | None, ...],
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> Step:
        """See Ops.prepare."""
        shapes = self._shapes_of(cache, num_heads, rope)
        context = batch.positions.numpy().astype(np.int32) + 1
        if len(context) == len(batch.context_len):
            sequence = rows = self._count(len(context))
            chunks = np.empty((0, 4), np.int32)
            splits = {w: self._splits_again(w, rows, context) for w in set(windows)}
        else:
            starts = np.array(batch.query_start, dtype=np.int32)
            counts = np.diff(starts)
            sequence = np.repeat(self._count(len(counts)), counts)
            chunked = counts >= self._chunk_queries
            rows = np.flatnonzero(~chunked[sequence]).astype(np.int32)
            chunks = cut_chunks(np.flatnonzero(chunked), starts, context, shapes.group)
            splits = {w: split(rows, context, w, shapes.lanes) for w in set(windows)}
        part_floats = shapes.num_heads * (cache.layout.head_dim + 16)
        parts = np.empty(max(s.num_parts for s in splits.values()) * part_floats, np.float32)
        threads = torch.get_num_threads()
        scratch = self._scratch_of(threads)
        write, decode, chunk = (
            type(a).from_buffer_copy(a) for a in (shapes.write, shapes.decode, shapes.prefill)
        )
        write.positions, write.slots = batch.positions.data_ptr(), batch.slot_mapping.data_ptr()
        write.signs = 0 if self._signs is None else address(self._signs)
        write.scratch, write.scratch_bytes = scratch, decode.scratch_bytes
        for a in (decode, chunk):
            a.tables, a.table_width = batch.block_table.data_ptr(), batch.block_table.shape[1]
            a.scratch = scratch
        decode.row_sequence, decode.row_context = address(sequence), address(context)
        decode.parts, chunk.items = address(parts), address(chunks)
        keep = (batch, sequence, context, rope, parts, self._scratch)
        return Step(write, decode, splits, chunk, chunks, windows, shapes.group, threads, keep)

    def _shapes_of(
        self, cache: KVCache, num_heads: int, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> Shapes:
        shapes = self._shapes
        if (
            shapes is None
            or shapes.cache is not cache
            or shapes.num_heads != num_heads
            or shapes.rope is not rope
        ):
            shapes = self._shapes = Shapes.of(cache, num_heads, rope)
            self._decode_splits.clear()
        return shapes

    def _splits_again(self, window: int | None, rows: np.ndarray, context: np.ndarray) -> Splits:
        """Those of the step before where they are the same, as they mostly are."""
        cuts = (context - 1) // attention.SPLIT_TOKENS
        key = cuts.tobytes()
        if window is not None:
            key += (np.maximum(context - window, 0) // attention.SPLIT_TOKENS).tobytes()
        known = self._decode_splits.get(window)
        if known is None or known[0] != key:
            known = key, split(rows, context, window, self._shapes.lanes)
            self._decode_splits[window] = known
        return known[1]

    def _count(self, most: int) -> np.ndarray:
        """0 to most - 1."""
        if len(self._counting) < most:
            self._counting = np.arange(2 * most, dtype=np.int32)
        return self._counting[:most]

    def _scratch_of(self, threads: int) -> int:
        """The address of memory that threads write in during a call, on a line's border."""
        each = max(self._shapes.decode.scratch_bytes, self._shapes.prefill.scratch_bytes)
        if len(self._scratch) < threads * each + LINE_BYTES:
            self._scratch = np.empty(threads * each + LINE_BYTES, np.uint8)
        return -(-address(self._scratch) // LINE_BYTES) * LINE_BYTES


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
