"""From the tensors of a checkpoint to what a model holds: converted, fused, packed."""

from collections.abc import Sequence

import torch

from common.engine.checkpoint import Checkpoint
from common.engine.kernels import Linear, Ops
from common.engine.quantization.read import read_plain, read_weight
from common.engine.quantization.scheme import Quantization
from common.engine.weight import Weight, cut, fuse


class WeightReader:
    """Reads for one model on one device; the model names the tensors."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.ops = ops
        self.dtype = dtype
        self.device = device
        self.quantization = quantization or Quantization((), ())

    def tensor(
        self, *names: str, rows: Sequence[range] = (), columns: range | None = None
    ) -> torch.Tensor:
        """The tensors as one of the compute dtype, stacked along their rows.

        rows     of each tensor, the ones to take; none given: all
        columns  the ones to take; None: all
        """
        parts = [read_plain(self.checkpoint, name) for name in names]
        if rows:
            pairs = zip(parts, rows, strict=True)
            parts = [part[wanted.start : wanted.stop] for part, wanted in pairs]
        if columns is not None:
            parts = [part[:, columns.start : columns.stop] for part in parts]
        parts = [part.to(self.dtype) for part in parts]
        # A copy of its own also where nothing is converted: the file may change under a mapping.
        whole = torch.cat(parts)
        return whole.to(self.device)

    def linear(
        self,
        *modules: str,
        bias: bool = False,
        rows: Sequence[range] = (),
        columns: range | None = None,
        gated: bool = False,
    ) -> Linear:
        """One Linear of these modules' matrices, stacked along their rows. rows and columns as in
        `tensor`; a bias has rows only; gated: as Ops.gate_up. Raises ConfigError where they cut
        through a block scale."""
        wanted = rows or [None] * len(modules)
        weights = [self.weight(m, r, columns) for m, r in zip(modules, wanted, strict=True)]
        whole = fuse(weights)
        added = self.tensor(*(f"{m}.bias" for m in modules), rows=rows) if bias else None
        if whole is not None:
            make = self.ops.gate_up if gated else self.ops.linear
            return make(whole.to(self.device), added)
        counts = [len(weight.values) for weight in weights]
        biases = [None] * len(counts) if added is None else list(added.split(counts))
        parts = zip(weights, biases, strict=True)
        return self.ops.stacked([self.ops.linear(w.to(self.device), added) for w, added in parts])

    def weight(
        self, module: str, rows: range | None = None, columns: range | None = None
    ) -> Weight:
        """The module's matrix or the part of it, float values in the compute dtype."""
        weight = read_weight(self.checkpoint, module, self.quantization)
        weight = cut(weight, module, rows, columns)
        if weight.activation is not None:
            return weight
        return Weight(weight.values.to(self.dtype, copy=True))
