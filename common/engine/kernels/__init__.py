"""The operations of a model step, the same signatures for every backend.

A model calls nothing but these. `reference.py` is plain torch and the oracle of the others.
"""

from typing import Any, Protocol

import torch

from common.engine.batch import Batch
from common.engine.cache import KVCache
from common.errors import ConfigError


class Ops(Protocol):
    """n is the number of tokens of the step; floats are the model's compute dtype."""

    def prepare(
        self, batch: Batch, cache: KVCache, num_heads: int, windows: tuple[int | None, ...]
    ) -> Any:
        """Once a step: what the backend derives from the batch, handed back to `write_kv` and
        `attention`. `windows` is each layer's attention window in tokens, None for all."""

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [n, in], weight [out, in], bias [out] -> [n, out]; accumulates in float32."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., d], weight [d] or [heads, d] (a weight for each head) -> like x."""

    def rope(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [n, heads, d]; cos and sin [n, 1, d] float32, sin's first half negated -> like x."""

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up [n, 2 * d], gate first -> silu(gate) * up [n, d]."""

    def write_kv(
        self, k: torch.Tensor, v: torch.Tensor, cache: KVCache, layer: int, step: Any
    ) -> None:
        """k and v [n, kv_heads, d] go to the batch's slots of the layer, quantized to the cache's
        dtype."""

    def attention(self, q: torch.Tensor, cache: KVCache, layer: int, step: Any) -> torch.Tensor:
        """q [n, heads, d] attends causally to its sequence's KV through the block table, within
        the layer's window -> [n, heads, d]. Slots past a sequence's context are never read into a
        result, whatever they hold."""


def select_ops(device: torch.device) -> Ops:
    """The backend for a device, chosen once at start."""
    from common.engine.kernels.reference import ReferenceOps

    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {str(device)!r}; set it to cpu or cuda")
    return ReferenceOps()
