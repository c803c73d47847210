"""Between this machine's memory and a device's, without waiting for what the device does."""

from collections.abc import Sequence

import torch


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device, whatever that is doing."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # else the copy waits for its turn
    return tensor.to(device, non_blocking=True)


class Fetched:
    """Tensors on their way to this machine's memory; they may still be computed."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        self._here: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in self._tensors):
            self._tensors = [_begin(tensor) for tensor in self._tensors]
            self._here = torch.cuda.Event()
            self._here.record()

    def wait(self) -> list[torch.Tensor]:
        """All of them, here."""
        if self._here is not None:
            self._here.synchronize()
        return self._tensors


def _begin(tensor: torch.Tensor) -> torch.Tensor:
    here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return here.copy_(tensor, non_blocking=True)
