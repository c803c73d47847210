"""Memory in pages of 2 MiB: of a model's matrices there are too many pages of 4 KiB for a core to
know where each lies, and finding out takes as long as an eighth of the reading."""

import mmap
import threading
from contextlib import suppress

import torch

PAGE_BYTES = 2**21
CHUNK_BYTES = 32 * PAGE_BYTES
LINE_BYTES = 64

_lock = threading.Lock()
_rest = torch.empty(0, dtype=torch.uint8)


def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """For what stays: like torch.zeros, next to what was asked for before, on a line's border, and
    in large pages where the system has them. Memory is given back when all of a chunk is gone."""
    global _rest
    size = torch.Size(shape).numel() * dtype.itemsize
    room = -(-size // LINE_BYTES) * LINE_BYTES
    with _lock:
        if room > len(_rest):
            _rest = _chunk(max(CHUNK_BYTES, room))
        mine, _rest = _rest[:size], _rest[room:]
    return mine.view(dtype).view(shape)


def _chunk(size: int) -> torch.Tensor:
    # Whole pages, or the last would be of 4 KiB.
    size = -(-size // PAGE_BYTES) * PAGE_BYTES
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # not Linux, or a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
