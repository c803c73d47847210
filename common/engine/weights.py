"""From the tensors of a checkpoint to what a model holds: converted, fused, packed."""

import torch

from common.engine.checkpoint import Checkpoint
from common.engine.kernels import Linear, Ops
from common.engine.weight import Weight


class WeightReader:
    """Reads for one model on one device; the model names the tensors."""

    def __init__(
        self, checkpoint: Checkpoint, ops: Ops, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.checkpoint = checkpoint
        self.ops = ops
        self.dtype = dtype
        self.device = device

    def tensor(self, *names: str) -> torch.Tensor:
        """The tensors as one of the compute dtype, stacked along their rows."""
        parts = [self.checkpoint.read(name).to(self.dtype) for name in names]
        # A copy of its own also where nothing is converted: the file may change under a mapping.
        whole = parts[0].clone() if len(parts) == 1 else torch.cat(parts)
        return whole.to(self.device)

    def linear(self, *modules: str, bias: bool = False) -> Linear:
        """One Linear of these modules' matrices, stacked along their rows."""
        weight = Weight(self.tensor(*(f"{module}.weight" for module in modules)))
        added = self.tensor(*(f"{module}.bias" for module in modules)) if bias else None
        return self.ops.linear(weight, added)
