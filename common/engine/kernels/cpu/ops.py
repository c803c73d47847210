"""The operations of a model step on a CPU: compiled kernels, packed matrices.

What a kernel does not cover (head sizes that are no multiple of 32, FP8 matrices whose rows are no
multiple of 16) is left to the reference.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from common.engine.batch import Batch
from common.engine.cache import TORCH_DTYPES, KVCache
from common.engine.config import ModelConfig
from common.engine.kernels import Linear
from common.engine.kernels.cpu import attention, elementwise, matmul, prefill, simd
from common.engine.kernels.cpu.launch import KIND, TEAM_SIZE, empty, recording, spread, threads_for
from common.engine.kernels.cpu.linear import TiledLinear, best
from common.engine.kernels.cpu.matmul import CompiledLinear, Gated, GatedLinear
from common.engine.kernels.cpu.plan import Planner, Step
from common.engine.kernels.cpu.quantized import Fp8Linear, Quantized, fits
from common.engine.kernels.cpu.tape import Tapes
from common.engine.kernels.reference import ReferenceOps, hadamard
from common.engine.weight import Weight

# Element-wise work on more rows takes long enough to let other Python threads run.
MANY_ROWS = 64
HEAD_DIM_MULTIPLE = 32
# Columns of bfloat16 that are whole vectors of 64 bytes.
TAKE_MULTIPLE = 32
# A sequence with fewer queries in a step has them attend one by one.
CHUNK_QUERIES = 8
# Sylvester's matrix of 16: -1 to the number of ones in i & j.
SIGNS = hadamard(torch.eye(16)).mul_(4).numpy()


class CpuOps(ReferenceOps):
    """See `Ops`. Used from one thread.

    batch_invariant  what is computed for a token depends, to the bit, on the tokens before it
                     alone: not on how they were cut into steps, nor on who else was in them
    """

    def __init__(self, batch_invariant: bool = False, rotate_qk: bool = False) -> None:
        super().__init__(rotate_qk)
        self._batch_invariant = batch_invariant
        self._all_compiled = True
        self._norm = elementwise.NormArguments()
        self._silu = elementwise.SiluArguments()
        # A query that attends alone does so in one way, whatever the size of its chunk.
        self._planner = Planner(
            sys.maxsize if batch_invariant else CHUNK_QUERIES, SIGNS if rotate_qk else None
        )

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        if weight.activation is not None:
            linear = Fp8Linear(weight, bias) if fits(weight) else super().linear(weight, bias)
        else:
            linear = best(weight.values.dtype, matmul.fits(weight.values))(weight.values, bias)
        if isinstance(linear, CompiledLinear | Fp8Linear):
            return linear
        self._all_compiled = False
        return TiledLinear(linear, weight) if self._batch_invariant else linear

    def gate_up(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        values = weight.values
        if weight.activation is not None or not matmul.fits_gated(values):
            return self.linear(weight, bias)
        if best(values.dtype, True) is not CompiledLinear:
            return self.linear(weight, bias)
        return GatedLinear(values, bias)

    def stacked(self, parts: list[Linear]) -> Linear:
        self._all_compiled = False
        return super().stacked(parts)

    def tapes(
        self,
        config: ModelConfig,
        forward: Callable[[Batch, Any], torch.Tensor],
        prepare: Callable[[Batch], Any],
    ) -> Tapes | None:
        """For a model all of whose matrices were packed here. None: a step of it is not made of
        compiled kernels alone, which a tape is."""
        rows = config.hidden_size, config.num_heads * config.head_dim
        possible = (
            self._all_compiled
            and config.head_dim % HEAD_DIM_MULTIPLE == 0
            and all(width % TAKE_MULTIPLE == 0 for width in rows)
            and config.vocab_size >= simd.LANES
            and TEAM_SIZE is not None
        )
        return Tapes(forward, prepare) if possible else None

    def take(self, x: torch.Tensor, rows: torch.Tensor, name: str) -> torch.Tensor:
        if recording.recorder is None:
            return x[rows]
        width = x.shape[1]
        out = empty(len(rows), width, x.dtype)
        a = elementwise.TakeArguments(x=x.data_ptr(), out=out.data_ptr(), rows=rows.data_ptr())
        a.row_bytes, a.stride = width * x.element_size(), x.stride(0) * x.element_size()
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
    ) -> tuple[torch.Tensor, torch.Tensor | Quantized]:
        rows, width = x.shape
        if width % 16:
            return super().add_norm(x, delta, weight, eps, into)
        a = self._norm
        handed = _result(a, rows, width, x.dtype, into)
        a.x, a.weight = x.data_ptr(), weight.data_ptr()
        a.delta = 0 if delta is None else delta.data_ptr()
        a.width, a.eps = width, eps
        threads = threads_for(rows * width)
        elementwise.add_norm_kernel(KIND[x.dtype]).run(a, rows, threads, long=rows > MANY_ROWS)
        return x, handed

    def silu_mul(self, gate_up: torch.Tensor | Gated, into: Linear) -> torch.Tensor | Quantized:
        if isinstance(gate_up, Gated):
            return gate_up.values
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        if width % 16:
            return super().silu_mul(gate_up, into)
        a = self._silu
        handed = _result(a, rows, width, gate_up.dtype, into)
        a.gate_up, a.width = gate_up.data_ptr(), width
        threads = threads_for(4 * rows * width)
        elementwise.silu_mul_kernel(KIND[gate_up.dtype]).run(
            a, rows, threads, long=rows > MANY_ROWS
        )
        return handed

    def prepare(
        self,
        batch: Batch,
        cache: KVCache,
        num_heads: int,
        windows: tuple[int | None, ...],
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> Any:
        if cache.layout.head_dim % HEAD_DIM_MULTIPLE:
            return super().prepare(batch, cache, num_heads, windows, rope)
        step = self._planner.plan(batch, cache, num_heads, windows, rope)
        if recording.recorder is not None:
            recording.recorder.keep(step)
        return step

    def write_kv(
        self,
        qkv: torch.Tensor,
        cache: KVCache,
        layer: int,
        step: Any,
        qk_norm: tuple[torch.Tensor, float] | None = None,
    ) -> torch.Tensor:
        if not isinstance(step, Step):
            return super().write_kv(qkv, cache, layer, step, qk_norm)
        a, static = step.write, cache.static(layer)
        a.qkv, a.static = qkv.data_ptr(), 0 if static is None else static.data_ptr()
        a.norm, a.eps = (0, 0.0) if qk_norm is None else (qk_norm[0].data_ptr(), qk_norm[1])
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


def _result(
    a: elementwise.NormArguments | elementwise.SiluArguments,
    rows: int,
    width: int,
    dtype: torch.dtype,
    into: Linear,
) -> torch.Tensor | Quantized:
    """What `into` is handed, once a kernel has computed it; `a` is told where."""
    if isinstance(into, Fp8Linear):
        out, made = into.results(rows, dtype)
        into.describe(a, made)
    else:
        a.scales, a.static, a.columns = 0, 0, width
        # What else multiplies may want its rows without gaps.
        out = made = (spread if isinstance(into, CompiledLinear) else empty)(rows, width, dtype)
    a.out, a.out_stride = out.data_ptr(), out.stride(0) * dtype.itemsize
    return made


def _refresh_take(name: str, a: elementwise.TakeArguments, batch: Batch, step: Step) -> None:
    a.rows = getattr(batch, name).data_ptr()


def _refresh_write(a: elementwise.WriteArguments, batch: Batch, step: Step) -> None:
    a.positions, a.slots = step.write.positions, step.write.slots
    a.scratch = step.write.scratch


def _refresh_decode(
    window: int | None, lanes: int, a: attention.DecodeArguments, batch: Batch, step: Step
) -> None:
    now, splits = step.decode, step.splits[window]
    a.tables, a.table_width = now.tables, now.table_width
    a.row_sequence, a.row_context = now.row_sequence, now.row_context
    a.parts, a.scratch = now.parts, now.scratch
    splits.fill(a)
    a.num_items = len(splits.items) * lanes


def addresses(cache: KVCache, layer: int) -> tuple[int, int]:
    """Of the layer's payload and scales (0: none) in block 0."""
    scales = 0 if cache.scales is None else cache.scales[layer].data_ptr()
    return cache.payload[layer].data_ptr(), scales


def kv_kind(cache: KVCache) -> int:
    """simd's kind of the cache's numbers."""
    return KIND[TORCH_DTYPES[cache.layout.kv_dtype]]
