"""The KV cache of a worker: one uint8 tensor of blocks, and typed views of it."""

import mmap
import os

import torch

from common.errors import ConfigError
from common.kv.layout import KVLayout

TORCH_DTYPES = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
}
# The padding block: in nobody's table, so whatever padding points at is never somebody's KV.
NULL_BLOCK = 0


class KVCache:
    """Blocks in the format of common/kv/layout.py, and what kernels see of them.

    data        [num_blocks, block_bytes]                                   uint8
    payload[l]  [num_blocks, 2, num_kv_heads, block_size, head_dim] of layer l, the KV dtype
    scales[l]   [num_blocks, 2, num_kv_heads, block_size] of layer l, float32; None where the dtype
                has none
    All are views of `data`: bytes that land there are what attention reads.

    static_scales  None, or the checkpoint's own scales [layers, 2, kv_heads] float32: new K and V
                   are quantized by them (over 448 of them they saturate), not by their largest
                   value. They are written beside the values like the others, so that the block's
                   format and those who read it know of no difference.

    kv_heads  the heads that payload and scales show, all of them by default: ranks that share a
              cache each see their own. Blocks have all heads, whoever looks
    fd        a file of memory of the cache's size, zero, to be `data`; None: memory of its own
    shared    whether other ranks may have it as theirs too: there is an fd
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        device: torch.device,
        *,
        static_scales: torch.Tensor | None = None,
        kv_heads: range | None = None,
        fd: int | None = None,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.shared = fd is not None
        heads = range(layout.num_kv_heads) if kv_heads is None else kv_heads
        self.num_kv_heads = len(heads)
        self.static_scales = static_scales
        if static_scales is not None:
            # Kernels take the scales of a layer as [2, kv_heads] in one piece.
            own = static_scales[:, :, heads.start : heads.stop]
            self.static_scales = own.contiguous().to(device)
        self.data = _zeros(num_blocks * layout.block_bytes, device, fd).view(num_blocks, -1)
        shape = (num_blocks, layout.num_layers, 2, layout.num_kv_heads, layout.block_size)
        payload = self.data[:, : layout.payload_bytes].view(TORCH_DTYPES[layout.kv_dtype])
        payload = payload.view(*shape, layout.head_dim)
        self.payload = payload[:, :, :, heads.start : heads.stop].unbind(1)
        self.scales: tuple[torch.Tensor, ...] | None = None
        if layout.scale_elements:
            scales = self.data[:, layout.payload_bytes :].view(torch.float32).view(shape)
            self.scales = scales[:, :, :, heads.start : heads.stop].unbind(1)

    def static(self, layer: int) -> torch.Tensor | None:
        """The layer's static scales [2, kv_heads]; None where the largest value gives them."""
        return None if self.static_scales is None else self.static_scales[layer]


def shared_memory(size: int) -> int:
    """A file of `size` zero bytes that exists in memory only; its descriptor."""
    fd = os.memfd_create("baton")
    os.truncate(fd, size)
    return fd


def _zeros(size: int, device: torch.device, fd: int | None) -> torch.Tensor:
    try:
        if device.type != "cpu":
            return torch.zeros(size, dtype=torch.uint8, device=device)
        # Anonymous memory is zero and costs nothing until touched, unlike torch.zeros, so that a
        # big cache does not slow the start of a worker that uses little of it. The system may
        # promise more than it has, hence the look at what it has.
        if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise MemoryError("more than this machine's memory")
        # Private where nobody shares it: a page that is touched first costs half as much then.
        flags = mmap.MAP_SHARED if fd is not None else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1 if fd is None else fd, size, flags=flags)
        return torch.frombuffer(memory, dtype=torch.uint8)
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        raise ConfigError(
            f"the KV cache of {size} bytes does not fit on {device} ({error}); "
            "lower kv_cache_bytes, num_blocks, max_num_seqs or max_model_len"
        ) from error
