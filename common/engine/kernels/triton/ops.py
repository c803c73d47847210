"""A model step on a GPU: Triton kernels, and cuBLAS where it is the faster product."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import structlog
import torch
import torch.nn.functional as F

from common.engine.batch import Batch
from common.engine.cache import KVCache
from common.engine.device import move
from common.engine.kernels import Linear
from common.engine.kernels.reference_linear import StackedLinear
from common.engine.kernels.triton.activation import silu_mul
from common.engine.kernels.triton.decode_attention import decode_attention
from common.engine.kernels.triton.gemm import Workspace, choose_tiles, matmul
from common.engine.kernels.triton.hadamard import supports
from common.engine.kernels.triton.kv_write import write_kv
from common.engine.kernels.triton.norm import rms_norm
from common.engine.kernels.triton.prefill_attention import prefill_attention
from common.engine.kernels.triton.quantize import Quantized, quantize
from common.engine.kernels.triton.sampling import SamplingRows, sample
from common.engine.sampling_params import SamplingParams
from common.engine.weight import Weight

log = structlog.get_logger("kernels")

# Tokens from which cuBLAS multiplies e4m3 matrices with a scale for each row.
CUBLAS_TOKENS = 65


@dataclass(frozen=True, slots=True)
class Step:
    """context_len [sequences] and query_start [sequences - decoding + 1] int32: of the step's
    sequences, and of those after the first `decoding`, which have one query each."""

    batch: Batch
    context_len: torch.Tensor
    query_start: torch.Tensor
    decoding: int
    max_context: int
    rope: tuple[torch.Tensor, torch.Tensor]
    windows: tuple[int | None, ...]


class TritonLinear:
    """Multiplies by one matrix; takes rows as they are, or Quantized by what came before."""

    def __init__(
        self, weight: Weight, bias: torch.Tensor | None, workspace: Workspace, batch_invariant: bool
    ) -> None:
        self.weight = weight
        self.bias = bias
        self._workspace = workspace
        self._batch_invariant = batch_invariant
        out, width = weight.values.shape
        rows = weight.scale is not None and weight.scale.shape == (out, 1)
        fits = rows and weight.values.is_cuda and not (out % 16 or width % 16)
        self._cublas = fits and not batch_invariant and cublas_scales_rows(weight.values.device)

    def kernel(self, tokens: int) -> object:
        """What stands for the kernel that so many tokens are multiplied by."""
        weight = self.weight
        out, width = weight.values.shape
        if self._cublas and tokens >= CUBLAS_TOKENS:
            return None
        if weight.activation is None and not self._batch_invariant:
            return None
        tiles = choose_tiles(
            tokens, out, width, weight.activation is not None,
            self._workspace.multiprocessors, self._batch_invariant,
        )  # fmt: skip
        return weight.activation, tiles

    def __call__(self, x: torch.Tensor | Quantized) -> torch.Tensor:
        weight = self.weight
        if weight.activation is None:
            # A float32 sum of tensor cores' would not be float32.
            if not self._batch_invariant or x.dtype == torch.float32:
                return F.linear(x, weight.values, self.bias)
            return self._multiply(x)
        if not isinstance(x, Quantized):
            x = quantize(x, weight.activation, weight.input_scale)
        if self._cublas and len(x.values) >= CUBLAS_TOKENS and x.dtype == torch.bfloat16:
            return torch._scaled_mm(
                x.values,
                weight.values.t(),
                scale_a=x.scale.contiguous(),
                scale_b=weight.scale.t(),
                bias=self.bias,
                out_dtype=x.dtype,
            )
        return self._multiply(x)

    def _multiply(self, x: torch.Tensor | Quantized) -> torch.Tensor:
        return matmul(
            x,
            self.weight.values,
            self._workspace,
            scale=self.weight.scale,
            bias=self.bias,
            batch_invariant=self._batch_invariant,
        )


class TritonOps:
    """See `Ops`.

    batch_invariant  a row's result is bitwise the same whatever else is in the step: one tile for
                     every number of tokens, and one attention for a prompt and for decoding
    rotate_qk        see `write_kv`
    fp8_attention    prompts attend to an e4m3 cache by e4m3 products

    No method waits for the device. Nothing but `prepare` copies to it.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        batch_invariant: bool = False,
        rotate_qk: bool = False,
        fp8_attention: bool = False,
        multiprocessors: int | None = None,
    ) -> None:
        self._workspace = Workspace.on(device, multiprocessors)
        self._batch_invariant = batch_invariant
        self._rotate_qk = rotate_qk
        self._fp8_attention = fp8_attention
        # One of each kind: its shape and what it is quantized by.
        self._linears: dict[tuple[object, ...], TritonLinear] = {}

    def can_rotate(self, head_dim: int) -> bool:
        return supports(head_dim)

    def prompt_lengths(self, most: int) -> list[int]:
        """Numbers of tokens of a step, `most` the largest, that between them need every kernel."""
        seen: set[object] = set()
        lengths = []
        for tokens in (1, 17, 33, 65, *range(129, most, 128), most):
            needed = {linear.kernel(tokens) for linear in self._linears.values()}
            if tokens <= most and (tokens in (1, most) or needed - seen):
                lengths.append(tokens)
                seen |= needed
        return sorted(set(lengths))

    def warm_up(self, vocab: int) -> None:
        """Compiles what `choose` uses, so that nobody waits for it later."""
        logits = torch.zeros(1, vocab, device=self._workspace.arrived.device)
        for filters in ({}, {"top_k": 2}, {"top_p": 0.5}, {"top_k": 2, "top_p": 0.5}):
            self.choose(logits, [SamplingParams(**filters)], [0], [0])

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        made = TritonLinear(weight, bias, self._workspace, self._batch_invariant)
        scale = None if weight.scale is None else weight.scale.shape
        self._linears[weight.values.shape, scale, weight.activation] = made
        return made

    def gate_up(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        return self.linear(weight, bias)

    def stacked(self, parts: list[Linear]) -> Linear:
        return StackedLinear(parts)

    def prepare(
        self,
        batch: Batch,
        cache: KVCache,
        num_heads: int,
        windows: tuple[int | None, ...],
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> Step:
        starts = batch.query_start
        decoding = 0
        if not self._batch_invariant:
            while decoding < len(batch.context_len) and starts[decoding + 1] == decoding + 1:
                decoding += 1
        device = batch.token_ids.device
        context_len = batch.device_context_len
        if context_len is None:
            context_len = move(torch.tensor(batch.context_len, dtype=torch.int32), device)
        rest = torch.tensor([start - decoding for start in starts[decoding:]], dtype=torch.int32)
        return Step(
            batch=batch,
            context_len=context_len,
            # A step that only decodes may be part of a CUDA graph: nothing is copied for it.
            query_start=move(rest, device) if len(rest) > 1 else context_len,
            decoding=decoding,
            max_context=max(batch.context_len[:decoding], default=0),
            rope=rope,
            windows=windows,
        )

    def take(self, x: torch.Tensor, rows: torch.Tensor, name: str) -> torch.Tensor:
        return x[rows]

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        into: Linear,
    ) -> tuple[torch.Tensor, torch.Tensor | Quantized]:
        return x, rms_norm(x, weight, eps, delta=delta, **_form(into))

    def silu_mul(self, gate_up: torch.Tensor, into: Linear) -> torch.Tensor | Quantized:
        return silu_mul(gate_up, **_form(into))

    def write_kv(
        self,
        qkv: torch.Tensor,
        cache: KVCache,
        layer: int,
        step: Step,
        qk_norm: tuple[torch.Tensor, float] | None = None,
    ) -> torch.Tensor:
        return write_kv(
            qkv,
            step.rope,
            step.batch.positions,
            step.batch.slot_mapping,
            cache.payload[layer],
            None if cache.scales is None else cache.scales[layer],
            static=cache.static(layer),
            qk_norm=qk_norm,
            rotate=self._rotate_qk,
        )

    def attention(self, q: torch.Tensor, cache: KVCache, layer: int, step: Step) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        pages = cache.payload[layer], None if cache.scales is None else cache.scales[layer]
        table, count = step.batch.block_table, step.decoding
        how = {"scale": q.shape[-1] ** -0.5, "window": step.windows[layer]}
        if count:
            decode_attention(
                q[:count], *pages, table[:count], step.context_len[:count], step.max_context,
                out=out[:count], **how,
            )  # fmt: skip
        if count < len(table):
            prefill_attention(
                q[count:], *pages, table[count:], step.query_start, step.context_len[count:],
                fp8_products=self._fp8_attention, out=out[count:], **how,
            )  # fmt: skip
        return out

    def choose(
        self,
        logits: torch.Tensor,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        positions: Sequence[int],
    ) -> torch.Tensor:
        """As `Sampler` chooses tokens: int64 [n], -1 where there is none."""
        rows = SamplingRows.of(params, seeds, positions, logits.shape[1], logits.device)
        return sample(logits, rows)


@cache
def cublas_scales_rows(device: torch.device) -> bool:
    """Whether torch multiplies e4m3 rows with a scale each here: not every cuBLAS does."""
    ones = torch.ones(CUBLAS_TOKENS, 64, device=device).to(torch.float8_e4m3fn)
    scale = torch.full((CUBLAS_TOKENS, 1), 0.5, device=device)
    try:
        found = torch._scaled_mm(
            ones, ones[:64].t(), scale_a=scale, scale_b=scale[:64].t(), out_dtype=torch.bfloat16
        )
    except RuntimeError as error:
        log.warning("cublas_without_row_scales", reason=str(error).splitlines()[0])
        return False
    return bool((found == 64 * 0.25).all())


def _form(into: Linear) -> dict[str, object]:
    """How a Linear wants its rows; one that is none of ours quantizes for itself."""
    if not isinstance(into, TritonLinear) or into.weight.activation is None:
        return {}
    return {"activation": into.weight.activation, "input_scale": into.weight.input_scale}
