"""From the tensors of a checkpoint to what a model holds: converted, fused, packed."""

import torch

from common.engine.checkpoint import Checkpoint
from common.engine.kernels import Linear, Ops
from common.engine.quantization.read import read_plain, read_weight
from common.engine.quantization.scheme import Quantization
from common.engine.weight import Weight, fuse


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

    def tensor(self, *names: str) -> torch.Tensor:
        """The tensors as one of the compute dtype, stacked along their rows."""
        parts = [read_plain(self.checkpoint, name).to(self.dtype) for name in names]
        # A copy of its own also where nothing is converted: the file may change under a mapping.
        whole = parts[0].clone() if len(parts) == 1 else torch.cat(parts)
        return whole.to(self.device)

    def linear(self, *modules: str, bias: bool = False) -> Linear:
        """One Linear of these modules' matrices, stacked along their rows."""
        weights = [self.weight(module) for module in modules]
        whole = fuse(weights)
        added = self.tensor(*(f"{module}.bias" for module in modules)) if bias else None
        if whole is not None:
            return self.ops.linear(whole.to(self.device), added)
        rows = [len(weight.values) for weight in weights]
        biases = [None] * len(rows) if added is None else list(added.split(rows))
        return StackedLinear(
            [
                self.ops.linear(weight.to(self.device), part)
                for weight, part in zip(weights, biases, strict=True)
            ]
        )

    def weight(self, module: str) -> Weight:
        """The module's matrix, float values in the compute dtype."""
        weight = read_weight(self.checkpoint, module, self.quantization)
        if weight.activation is not None:
            return weight
        return Weight(weight.values.to(self.dtype, copy=True))


class StackedLinear:
    """Linears of one input whose outputs follow each other: for matrices that no single Linear can
    hold (`fuse`)."""

    def __init__(self, parts: list[Linear]) -> None:
        self.parts = parts

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], -1)
