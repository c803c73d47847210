"""Writes a safetensors file tensor by tensor: its memory is that of one tensor."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch

from common.errors import BatonError

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A new file with room for these tensors, which are then written in any order; a context
    manager. Leaving it with a tensor unwritten raises BatonError."""

    def __init__(self, path: Path, slots: Mapping[str, Slot]) -> None:
        self._slots = slots
        self._offsets: dict[str, int] = {}
        # Larger elements first, as the format's own writer sorts them: all stay aligned.
        offset, header = 0, {"__metadata__": {"format": "pt"}}
        for name in sorted(slots, key=lambda name: (-slots[name].dtype.itemsize, name)):
            slot = slots[name]
            header[name] = {
                "dtype": DTYPE_NAMES[slot.dtype],
                "shape": list(slot.shape),
                "data_offsets": [offset, offset + slot.nbytes],
            }
            self._offsets[name] = offset
            offset += slot.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._start = 8 + len(encoded)
        self._file = path.open("xb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        self._left = set(slots)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Raises BatonError for a tensor that is not as announced, or written before."""
        if self._slots.get(name) != Slot(tensor.dtype, tuple(tensor.shape)):
            raise BatonError(
                f"{self._file.name}: no slot for {name!r}, {tensor.dtype} {tuple(tensor.shape)}"
            )
        self._left.remove(name)
        self._file.seek(self._start + self._offsets[name])
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None and self._left:
            raise BatonError(f"{self._file.name}: {sorted(self._left)} were not written")
