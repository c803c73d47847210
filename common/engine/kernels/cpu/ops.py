"""The operations of a model step on a CPU: compiled kernels, packed matrices.

What a kernel does not cover (head sizes that are no multiple of 32, a part of the KV heads, static
KV scales, quantized weights) is left to the reference.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.engine.batch import Batch
from common.engine.cache import TORCH_DTYPES, KVCache
from common.engine.kernels import Linear
from common.engine.kernels.cpu import attention, elementwise
from common.engine.kernels.cpu.launch import KIND
from common.engine.kernels.cpu.linear import best
from common.engine.kernels.reference import ReferenceOps
from common.engine.weight import Weight

# Smaller work is done sooner than a second thread has begun it.
ELEMENTS_PER_THREAD = 16384
HEAD_DIM_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class Plan:
    """Who attends to what in layers with one window; see DecodeArguments."""

    items: np.ndarray
    parts: np.ndarray
    pending: np.ndarray
    num_parts: int


@dataclass(slots=True)
class Step:
    """One step's batch as the kernels read it. `keep` holds what the addresses are of."""

    write: elementwise.WriteArguments
    attend: attention.DecodeArguments
    plans: dict[int | None, Plan]
    windows: tuple[int | None, ...]
    scratch: np.ndarray
    parts: np.ndarray
    group: int
    threads: int
    keep: tuple[Any, ...]


class CpuOps(ReferenceOps):
    """See `Ops`. Used from one thread."""

    def __init__(self) -> None:
        self._norm = elementwise.NormArguments()
        self._silu = elementwise.SiluArguments()

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        if weight.activation is not None:
            return super().linear(weight, bias)
        return best(weight.values.dtype)(weight.values, bias)

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
        out = torch.empty_like(x)
        a = self._norm
        a.x, a.weight, a.out = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        a.delta = 0 if delta is None else delta.data_ptr()
        a.width, a.eps = width, eps
        elementwise.add_norm_kernel(KIND[x.dtype]).run(a, rows, threads_for(rows * width))
        return x, out

    def silu_mul(self, gate_up: torch.Tensor, into: Linear) -> torch.Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        if width % 16:
            return super().silu_mul(gate_up, into)
        out = gate_up.new_empty(rows, width)
        a = self._silu
        a.gate_up, a.out, a.width = gate_up.data_ptr(), out.data_ptr(), width
        threads = threads_for(4 * rows * width)
        elementwise.silu_mul_kernel(KIND[gate_up.dtype]).run(a, rows, threads)
        return out

    def prepare(
        self,
        batch: Batch,
        cache: KVCache,
        num_heads: int,
        windows: tuple[int | None, ...],
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> Any:
        layout = cache.layout
        narrowed = cache.num_kv_heads != layout.num_kv_heads
        if layout.head_dim % HEAD_DIM_MULTIPLE or narrowed or cache.static_scales is not None:
            return super().prepare(batch, cache, num_heads, windows, rope)
        heads_each = num_heads // layout.num_kv_heads
        group = max(g for g in range(1, attention.MAX_GROUP + 1) if heads_each % g == 0)
        passes = heads_each // group
        counts = np.diff(np.array(batch.query_start, dtype=np.int64))
        sequence = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        context = (batch.positions.numpy() + 1).astype(np.int32)
        lanes = layout.num_kv_heads * passes
        plans = {window: plan(context, window, lanes) for window in set(windows)}
        part = lanes * group * (layout.head_dim + 16)
        parts = np.empty(max(p.num_parts for p in plans.values()) * part, np.float32)
        threads = torch.get_num_threads()
        each = attention.scratch_bytes(group, layout.head_dim)
        scratch = np.empty(threads * each + 64, np.uint8)
        attend = attention.DecodeArguments(
            block_bytes=layout.block_bytes,
            block_size=layout.block_size,
            tables=batch.block_table.data_ptr(),
            table_width=batch.block_table.shape[1],
            row_sequence=sequence.ctypes.data,
            row_context=context.ctypes.data,
            parts=parts.ctypes.data,
            scratch=-(-scratch.ctypes.data // 64) * 64,
            scratch_bytes=each,
            kv_heads=layout.num_kv_heads,
            passes=passes,
            head_dim=layout.head_dim,
            scale=layout.head_dim**-0.5,
        )
        write = elementwise.WriteArguments(
            positions=batch.positions.data_ptr(),
            slots=batch.slot_mapping.data_ptr(),
            cos=rope[0].data_ptr(),
            sin=rope[1].data_ptr(),
            block_bytes=layout.block_bytes,
            block_size=layout.block_size,
            heads=num_heads,
            kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
        )
        keep = (batch, sequence, context, rope)
        return Step(write, attend, plans, windows, scratch, parts, group, threads, keep)

    def write_kv(self, qkv: torch.Tensor, cache: KVCache, layer: int, step: Any) -> torch.Tensor:
        if not isinstance(step, Step):
            return super().write_kv(qkv, cache, layer, step)
        a = step.write
        a.qkv = qkv.data_ptr()
        a.cache, a.scales = addresses(cache, layer)
        kernel = elementwise.write_kernel(
            KIND[TORCH_DTYPES[cache.layout.kv_dtype]], KIND[qkv.dtype]
        )
        kernel.run(a, len(qkv), threads_for(2 * qkv.numel()))
        return qkv[:, : a.heads]

    def attention(self, q: torch.Tensor, cache: KVCache, layer: int, step: Any) -> torch.Tensor:
        if not isinstance(step, Step):
            return super().attention(q, cache, layer, step)
        window = step.windows[layer]
        chosen, a = step.plans[window], step.attend
        out = torch.empty(q.shape, dtype=q.dtype)
        a.q, a.q_stride, a.out = q.data_ptr(), q.stride(0) * q.element_size(), out.data_ptr()
        a.cache, a.scales = addresses(cache, layer)
        a.items, a.row_parts = chosen.items.ctypes.data, chosen.parts.ctypes.data
        a.pending, a.window = chosen.pending.ctypes.data, window or 0
        kv = KIND[TORCH_DTYPES[cache.layout.kv_dtype]]
        kernel = attention.decode_kernel(kv, KIND[q.dtype], step.group)
        kernel.run(a, len(chosen.items) * a.kv_heads * a.passes, step.threads)
        return out


def threads_for(elements: int) -> int:
    """Threads worth waking for element-wise work of this size."""
    return min(torch.get_num_threads(), 1 + elements // ELEMENTS_PER_THREAD)


def addresses(cache: KVCache, layer: int) -> tuple[int, int]:
    """Of the layer's payload and scales (0: none) in block 0."""
    scales = 0 if cache.scales is None else cache.scales[layer].data_ptr()
    return cache.payload[layer].data_ptr(), scales


def plan(context: np.ndarray, window: int | None, lanes: int) -> Plan:
    """The splits of each row's context [rows] int32, every one a work item for each lane."""
    size = attention.SPLIT_TOKENS
    first = 0 * context if window is None else np.maximum(context - window, 0) // size
    splits = (context - 1) // size + 1 - first
    ends = np.cumsum(splits)
    total = int(ends[-1])
    items = np.empty((total, 2), np.int32)
    items[:, 0] = np.repeat(np.arange(len(context), dtype=np.int32), splits)
    items[:, 1] = np.arange(total, dtype=np.int32) + np.repeat(first + splits - ends, splits)
    several = np.where(splits > 1, splits, 0)
    starts = np.cumsum(several) - several
    parts = np.where(splits > 1, starts, -1).astype(np.int32)
    pending = np.repeat(splits.astype(np.int64), lanes)
    return Plan(items, parts, pending, int(several.sum()))
