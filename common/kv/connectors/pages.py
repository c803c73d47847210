"""Bytes into pages and out of them; on the engine's thread only."""

import torch


def write_page(cache: torch.Tensor, block_id: int, payload: memoryview) -> None:
    """Copy a block's bytes into its page. cache: uint8 [num_blocks, block_bytes], written."""
    # frombuffer wants a buffer that could be written, whether or not anybody does.
    writable = bytearray(payload) if payload.readonly else payload
    cache[block_id].copy_(torch.frombuffer(writable, dtype=torch.uint8))


def copy_pages(cache: torch.Tensor, block_ids: list[int]) -> list[memoryview]:
    """Copies of pages as bytes. cache: uint8 [num_blocks, block_bytes], read."""
    pages = cache[block_ids].cpu().numpy()
    return [memoryview(page) for page in pages]
