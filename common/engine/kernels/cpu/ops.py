"""The operations of a model step on a CPU: compiled kernels, packed matrices.

What a kernel does not cover (head sizes that are no multiple of 32, FP8 matrices whose sizes are no
multiples of 16) is left to the reference.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from common.engine.batch import Batch
from common.engine.cache import TORCH_DTYPES, KVCache
from common.engine.config import ModelConfig
from common.engine.kernels import Linear
from common.engine.kernels.cpu import attention, elementwise, matmul, prefill
from common.engine.kernels.cpu.launch import KIND, TEAM_SIZE, empty, recording
from common.engine.kernels.cpu.linear import TiledLinear, best
from common.engine.kernels.cpu.matmul import CompiledLinear
from common.engine.kernels.cpu.quantized import Fp8Linear, fits
from common.engine.kernels.cpu.tape import DecodeTapes
from common.engine.kernels.reference import ReferenceOps
from common.engine.weight import Weight

# Smaller work is done sooner than a second thread has begun it.
ELEMENTS_PER_THREAD = 16384
# Element-wise work on more rows takes long enough to let other Python threads run.
MANY_ROWS = 64
HEAD_DIM_MULTIPLE = 32
# Columns of bfloat16 that are whole vectors of 64 bytes.
TAKE_MULTIPLE = 32
# A sequence with fewer queries in a step has them attend one by one.
CHUNK_QUERIES = 8
LINE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Splits:
    """Which rows attend one by one in layers with one window; see DecodeArguments."""

    items: np.ndarray
    parts: np.ndarray
    pending: np.ndarray
    num_parts: int

    def fill(self, a: attention.DecodeArguments) -> None:
        a.items, a.row_parts = self.items.ctypes.data, self.parts.ctypes.data
        a.pending = self.pending.ctypes.data


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


class CpuOps(ReferenceOps):
    """See `Ops`. Used from one thread.

    batch_invariant  what is computed for a token depends, to the bit, on the tokens before it
                     alone: not on how they were cut into steps, nor on who else was in them
    """

    def __init__(self, batch_invariant: bool = False) -> None:
        self._batch_invariant = batch_invariant
        self._all_compiled = True
        self._norm = elementwise.NormArguments()
        self._silu = elementwise.SiluArguments()
        self._scratch = np.empty(0, np.uint8)
        # A query that attends alone does so in one way, whatever the size of its chunk.
        self._chunk_queries = sys.maxsize if batch_invariant else CHUNK_QUERIES

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        if weight.activation is not None:
            linear = Fp8Linear(weight, bias) if fits(weight) else super().linear(weight, bias)
        else:
            linear = best(weight.values.dtype, matmul.fits(weight.values))(weight.values, bias)
        if isinstance(linear, CompiledLinear):
            return linear
        self._all_compiled = False
        return TiledLinear(linear, weight) if self._batch_invariant else linear

    def tapes(
        self,
        config: ModelConfig,
        forward: Callable[[Batch], torch.Tensor],
        prepare: Callable[[Batch], Any],
    ) -> DecodeTapes | None:
        """For a model all of whose matrices were packed here. None: a step of it is not made of
        compiled kernels alone, which a tape is."""
        rows = config.hidden_size, config.num_heads * config.head_dim
        possible = (
            self._all_compiled
            and not config.qk_norm
            and config.head_dim % HEAD_DIM_MULTIPLE == 0
            and all(width % TAKE_MULTIPLE == 0 for width in rows)
            and TEAM_SIZE is not None
        )
        return DecodeTapes(forward, prepare) if possible else None

    def take(self, x: torch.Tensor, rows: torch.Tensor, name: str) -> torch.Tensor:
        if recording.recorder is None:
            return x[rows]
        width = x.shape[1]
        out = empty(len(rows), width, x.dtype)
        a = elementwise.TakeArguments(x=x.data_ptr(), out=out.data_ptr(), rows=rows.data_ptr())
        a.row_bytes = width * x.element_size()
        refresh = partial(_refresh_take, name)
        elementwise.take_kernel().run(a, len(rows), 1, refresh=refresh)
        return out

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        into: Linear,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, width = x.shape
        if width % 16:
            return super().add_norm(x, delta, weight, eps, into)
        out = empty(rows, width, x.dtype)
        a = self._norm
        a.x, a.weight, a.out = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        a.delta = 0 if delta is None else delta.data_ptr()
        a.width, a.eps = width, eps
        threads = threads_for(rows * width)
        elementwise.add_norm_kernel(KIND[x.dtype]).run(a, rows, threads, long=rows > MANY_ROWS)
        return x, out

    def silu_mul(self, gate_up: torch.Tensor, into: Linear) -> torch.Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        if width % 16:
            return super().silu_mul(gate_up, into)
        out = empty(rows, width, gate_up.dtype)
        a = self._silu
        a.gate_up, a.out, a.width = gate_up.data_ptr(), out.data_ptr(), width
        threads = threads_for(4 * rows * width)
        elementwise.silu_mul_kernel(KIND[gate_up.dtype]).run(
            a, rows, threads, long=rows > MANY_ROWS
        )
        return out

    def prepare(
        self,
        batch: Batch,
        cache: KVCache,
        num_heads: int,
        windows: tuple[int | None, ...],
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> Any:
        layout, kv_heads = cache.layout, cache.num_kv_heads
        if layout.head_dim % HEAD_DIM_MULTIPLE:
            return super().prepare(batch, cache, num_heads, windows, rope)
        heads_each = num_heads // kv_heads
        group = max(g for g in range(1, attention.MAX_GROUP + 1) if heads_each % g == 0)
        lanes, threads = num_heads // group, torch.get_num_threads()
        starts = np.array(batch.query_start, dtype=np.int32)
        counts = np.diff(starts)
        sequence = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        context = batch.positions.numpy().astype(np.int32) + 1
        chunked = counts >= self._chunk_queries
        rows = np.flatnonzero(~chunked[sequence]).astype(np.int32)
        splits = {window: split(rows, context, window, lanes) for window in set(windows)}
        part_floats = lanes * group * (layout.head_dim + 16)
        parts = np.empty(max(s.num_parts for s in splits.values()) * part_floats, np.float32)
        decode_bytes = attention.scratch_bytes(group, layout.head_dim)
        prefill_bytes = prefill.scratch_bytes(group, layout.head_dim)
        scratch = self._scratch_of(threads * max(decode_bytes, prefill_bytes))
        pages = {
            "block_bytes": layout.block_bytes,
            "block_size": layout.block_size,
            "block_heads": layout.num_kv_heads,
            "kv_heads": kv_heads,
            "head_dim": layout.head_dim,
        }
        attend = {
            **pages,
            "tables": batch.block_table.data_ptr(),
            "table_width": batch.block_table.shape[1],
            "passes": heads_each // group,
            "scale": layout.head_dim**-0.5,
            "scratch": scratch,
        }
        decode = attention.DecodeArguments(
            **attend,
            row_sequence=sequence.ctypes.data,
            row_context=context.ctypes.data,
            parts=parts.ctypes.data,
            scratch_bytes=decode_bytes,
        )
        write = elementwise.WriteArguments(
            **pages,
            positions=batch.positions.data_ptr(),
            slots=batch.slot_mapping.data_ptr(),
            cos=rope[0].data_ptr(),
            sin=rope[1].data_ptr(),
            heads=num_heads,
        )
        chunks = cut_chunks(np.flatnonzero(chunked), starts, context, group)
        chunk = prefill.PrefillArguments(**attend, items=chunks.ctypes.data)
        chunk.scratch_bytes = prefill_bytes
        keep = (batch, sequence, context, rope, parts, self._scratch)
        return Step(write, decode, splits, chunk, chunks, windows, group, threads, keep)

    def _scratch_of(self, size: int) -> int:
        """The address of memory that threads write in during a call, on a line's border."""
        if len(self._scratch) < size + LINE_BYTES:
            self._scratch = np.empty(size + LINE_BYTES, np.uint8)
        return -(-self._scratch.ctypes.data // LINE_BYTES) * LINE_BYTES

    def write_kv(self, qkv: torch.Tensor, cache: KVCache, layer: int, step: Any) -> torch.Tensor:
        if not isinstance(step, Step):
            return super().write_kv(qkv, cache, layer, step)
        a, static = step.write, cache.static(layer)
        a.qkv, a.static = qkv.data_ptr(), 0 if static is None else static.data_ptr()
        a.cache, a.scales = addresses(cache, layer)
        kernel = elementwise.write_kernel(kv_kind(cache), KIND[qkv.dtype])
        rows, threads = qkv.shape[0], threads_for(2 * qkv.numel())
        kernel.run(a, rows, threads, long=rows > MANY_ROWS, refresh=_refresh_write)
        return qkv[:, : a.heads]

    def attention(self, q: torch.Tensor, cache: KVCache, layer: int, step: Any) -> torch.Tensor:
        if not isinstance(step, Step):
            return super().attention(q, cache, layer, step)
        window = step.windows[layer]
        out = empty(len(q), q.shape[1] * q.shape[2], q.dtype)
        kinds = kv_kind(cache), KIND[q.dtype], step.group
        lanes = q.shape[1] // step.group
        for a in (step.decode, step.prefill):
            a.q, a.q_stride, a.out = q.data_ptr(), q.stride(0) * q.element_size(), out.data_ptr()
            a.cache, a.scales = addresses(cache, layer)
            a.window = window or 0
        # Both are compiled by whatever comes first: a worker's first request, before it is Ready.
        chunk, single = prefill.prefill_kernel(*kinds), attention.decode_kernel(*kinds)
        if len(step.chunks):
            chunk.run(step.prefill, len(step.chunks) * lanes, step.threads)
        splits = step.splits[window]
        if len(splits.items):
            splits.fill(step.decode)
            refresh = partial(_refresh_decode, window, lanes)
            single.run(step.decode, len(splits.items) * lanes, step.threads, refresh=refresh)
        return out.view(q.shape)


def _refresh_take(name: str, a: elementwise.TakeArguments, batch: Batch, step: Step) -> None:
    a.rows = getattr(batch, name).data_ptr()


def _refresh_write(a: elementwise.WriteArguments, batch: Batch, step: Step) -> None:
    a.positions, a.slots = step.write.positions, step.write.slots


def _refresh_decode(
    window: int | None, lanes: int, a: attention.DecodeArguments, batch: Batch, step: Step
) -> None:
    now, splits = step.decode, step.splits[window]
    a.tables, a.table_width = now.tables, now.table_width
    a.row_sequence, a.row_context = now.row_sequence, now.row_context
    a.parts, a.scratch = now.parts, now.scratch
    splits.fill(a)
    a.num_items = len(splits.items) * lanes


def threads_for(elements: int) -> int:
    """Threads worth waking for element-wise work of this size."""
    return min(torch.get_num_threads(), 1 + elements // ELEMENTS_PER_THREAD)


def addresses(cache: KVCache, layer: int) -> tuple[int, int]:
    """Of the layer's payload and scales (0: none) in block 0."""
    scales = 0 if cache.scales is None else cache.scales[layer].data_ptr()
    return cache.payload[layer].data_ptr(), scales


def kv_kind(cache: KVCache) -> int:
    """simd's kind of the cache's numbers."""
    return KIND[TORCH_DTYPES[cache.layout.kv_dtype]]


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
