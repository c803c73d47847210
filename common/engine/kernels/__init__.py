"""The operations of a model step, the same signatures for every backend.

A model calls nothing but these. `reference.py` is plain torch and the oracle of the others.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import structlog
import torch

from common.engine.batch import Batch
from common.engine.cache import KVCache
from common.engine.weight import Weight
from common.errors import ConfigError

log = structlog.get_logger("kernels")

# x [n, in], or what the `into` of a norm or activation made of it -> [n, out] of x's dtype.
Linear = Callable[[Any], torch.Tensor]
# Head sizes that models have and a Hadamard matrix of Sylvester's, for messages.
ROTATED_SIZES = (16, 32, 64, 128, 256, 512)
# Columns that a tensor core's e4m3 product takes at least.
LEAST_E4M3 = 32


class Ops(Protocol):
    """n is the number of tokens of the step; floats are the model's compute dtype.

    `into` names the Linear that reads a result: a backend may hand it over in the form that this
    Linear multiplies fastest (quantized, say). Nothing else may read such a result.
    """

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        """Once at load: packs a matrix for this machine. The Linear multiplies by it, accumulates
        in float32 and adds the bias [out]."""

    def gate_up(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        """The same for rows of a gate and, after them, as many `up`. Nothing but `silu_mul` may
        read its results, which need not be tensors."""

    def stacked(self, parts: list[Linear]) -> Linear:
        """Once at load: Linears of one input as one, their outputs after each other; for matrices
        that no single Linear can hold (`weight.fuse`)."""

    def prepare(
        self,
        batch: Batch,
        cache: KVCache,
        num_heads: int,
        windows: tuple[int | None, ...],
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> Any:
        """Once a step: what the backend derives from the batch, handed back to `write_kv` and
        `attention`. `windows` is each layer's attention window in tokens, None for all; `rope` is
        `rope_table`'s cos and sin."""

    def take(self, x: torch.Tensor, rows: torch.Tensor, name: str) -> torch.Tensor:
        """The rows [m] int64 of x [n, d] -> [m, d]; `name` is what they are called in the batch."""

    def can_rotate(self, head_dim: int) -> bool:
        """Whether it can rotate q and k of heads of this size."""

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        into: Linear,
    ) -> tuple[torch.Tensor, Any]:
        """x and delta [n, d] -> their sum (x itself without a delta), and its RMSNorm for `into`.
        May overwrite x."""

    def silu_mul(self, gate_up: Any, into: Linear) -> Any:
        """gate_up [n, 2 * d], gate first, or a result of `gate_up` -> silu(gate) * up [n, d] for
        `into`."""

    def write_kv(
        self,
        qkv: torch.Tensor,
        cache: KVCache,
        layer: int,
        step: Any,
        qk_norm: tuple[torch.Tensor, float] | None = None,
    ) -> torch.Tensor:
        """qkv [n, heads + 2 * kv_heads, d], in this order: turns q and k by their positions, puts
        k and v into the batch's slots of the layer, quantized to the cache's dtype; returns q
        [n, heads, d]. May overwrite qkv.

        qk_norm    weight [heads + kv_heads, d] and eps of an RMSNorm of q and k before the turn
        rotate_qk  which a backend is made with: q and k are multiplied by H_d / sqrt(d) after the
                   turn, a Hadamard matrix (QuaRot, Ashkboos et al. 2024). q k^T stays as it is, and
                   k loses the outliers that its quantization would be scaled by
        """

    def attention(self, q: torch.Tensor, cache: KVCache, layer: int, step: Any) -> torch.Tensor:
        """q [n, heads, d] attends causally to its sequence's KV through the block table, within
        the layer's window -> [n, heads, d]. Slots past a sequence's context are never read into a
        result, whatever they hold."""


def check_batch_invariant(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raises ConfigError for what computes results that would depend on the rest of a step."""
    if device.type == "cuda" and dtype == torch.float32:
        raise ConfigError(
            "batch_invariant needs dtype bfloat16 on a GPU, whose float32 products are a library's "
            "that chooses another order of sums for another number of tokens, dtype is float32; "
            "set it to bfloat16, or leave batch_invariant unset"
        )
    if device.type != "cpu":
        return
    from common.engine.kernels.cpu.ops import HEAD_DIM_MULTIPLE  # Numba, which GPUs do without

    if head_dim % HEAD_DIM_MULTIPLE:
        raise ConfigError(
            f"batch_invariant needs a head size that is a multiple of {HEAD_DIM_MULTIPLE}, this "
            f"model has {head_dim}; leave it unset"
        )


def check_rotate_qk(ops: Ops, head_dim: int, static_scales: bool) -> None:
    """Raises ConfigError for a model whose Q and K this backend cannot rotate."""
    if static_scales:
        raise ConfigError(
            "rotate_qk is set, but the checkpoint brings static scales of a K that is not rotated; "
            "leave rotate_qk unset, or serve a checkpoint without them (quantized without static "
            "KV scales)"
        )
    if not ops.can_rotate(head_dim):
        sizes = ", ".join(str(size) for size in ROTATED_SIZES if ops.can_rotate(size))
        raise ConfigError(
            f"rotate_qk needs a head size that is a power of two (these kernels: {sizes}), this "
            f"model has {head_dim}; leave it unset"
        )


def check_fp8_attention(ops: Ops, head_dim: int, fp8_kv: bool) -> None:
    """Raises ConfigError for a model or a cache whose attention has no e4m3 products."""
    from common.engine.kernels.reference import ReferenceOps

    if not fp8_kv:
        raise ConfigError(
            "fp8_attention multiplies Q and the probabilities with K and V that are e4m3; set "
            "kv_dtype to fp8_e4m3, or leave fp8_attention unset"
        )
    if head_dim < LEAST_E4M3 and not isinstance(ops, ReferenceOps):
        raise ConfigError(
            f"fp8_attention needs heads of at least {LEAST_E4M3} elements, what an e4m3 product "
            f"sums up at a time, this model has {head_dim}; leave it unset"
        )


def select_ops(
    device: torch.device,
    kernels: str,
    batch_invariant: bool = False,
    rotate_qk: bool = False,
    fp8_attention: bool = False,
) -> Ops:
    """The backend for a device, chosen once at start; arguments as in EngineConfig.

    Raises ConfigError for kernels that this machine cannot run.
    """
    from common.engine.kernels.reference import ReferenceOps

    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {str(device)!r}; set it to cpu or cuda")
    if batch_invariant and kernels == "reference":
        raise ConfigError(
            "batch_invariant needs the CPU or the Triton kernels, kernels is 'reference'; set it "
            "to auto, or leave batch_invariant unset"
        )
    if kernels == "triton" or (kernels == "auto" and device.type == "cuda"):
        return _triton_ops(device, batch_invariant, rotate_qk, fp8_attention)
    if kernels == "reference" or device.type != "cpu":
        return ReferenceOps(rotate_qk, fp8_attention)
    if fp8_attention:
        raise ConfigError(
            "fp8_attention is for GPUs, whose e4m3 products are twice as fast, device is 'cpu'; "
            "leave it unset, or set kernels to reference to see what it does to the results"
        )
    trouble = cpu_kernels_trouble()
    if trouble is None:
        from common.engine.kernels.cpu.ops import CpuOps

        return CpuOps(batch_invariant, rotate_qk)
    if kernels == "cpu" or batch_invariant:
        raise ConfigError(f"the CPU kernels are asked for, but {trouble}")
    log.warning("reference_kernels", reason=trouble)
    return ReferenceOps(rotate_qk)


def cpu_kernels_trouble() -> str | None:
    """Why the compiled kernels cannot run on this machine; None: they can."""
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed (pip install 'baton[worker]')"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "this CPU has no AVX2"
    return None


def _triton_ops(
    device: torch.device, batch_invariant: bool, rotate_qk: bool, fp8_attention: bool
) -> Ops:
    """For a GPU, or a CPU under Triton's interpreter. Never the reference instead: on a GPU it is
    so slow that this must be somebody's choice."""
    trouble = triton_kernels_trouble(device)
    if trouble is not None:
        raise ConfigError(
            f"the Triton kernels cannot run on device {str(device)!r}: {trouble}; set kernels to "
            "reference"
        )
    from common.engine.kernels.triton.ops import TritonOps

    return TritonOps(
        device,
        batch_invariant=batch_invariant,
        rotate_qk=rotate_qk,
        fp8_attention=fp8_attention,
        multiprocessors=1 if device.type == "cpu" else None,
    )


def triton_kernels_trouble(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on this device; None: they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'baton[triton]')"
    from common.engine.kernels.triton.fp8 import NATIVE_FP8

    if device.type != "cuda":
        return "it is no GPU" if NATIVE_FP8 else None
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {major}.{minor}, they need 9.0 (Hopper)"
    return None
