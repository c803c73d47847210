"""Between this machine's memory and a device's, without waiting for what the device does."""

import torch


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device, whatever that is doing."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # else the copy waits for its turn
    return tensor.to(device, non_blocking=True)
