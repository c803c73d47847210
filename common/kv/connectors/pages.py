"""Bytes into pages and out of them; on the engine's thread only. What is on a GPU goes through
pinned host memory, which its copy engines read and write by themselves."""

import numpy as np
import torch

from common.kv.layout import KVLayout


def write_page(cache: torch.Tensor, block_id: int, payload: memoryview) -> None:
    """Copy a block's bytes into its page. cache: uint8 [num_blocks, block_bytes], written."""
    # frombuffer wants a buffer that could be written, whether or not anybody does.
    writable = bytearray(payload) if payload.readonly else payload
    cache[block_id].copy_(_for_device(torch.frombuffer(writable, dtype=torch.uint8), cache.device))


def copy_pages(cache: torch.Tensor, block_ids: list[int]) -> list[memoryview]:
    """Copies of pages as bytes. cache: uint8 [num_blocks, block_bytes], read."""
    return [memoryview(page) for page in _rows(cache, block_ids, slice(None))]


def copy_layers(
    cache: torch.Tensor, layout: KVLayout, block_ids: list[int], layers: range
) -> memoryview:
    """A copy of some layers of some blocks: [len(block_ids), len(layers) * layer_bytes] bytes, of
    each block its payload, then its scales. cache: uint8 [num_blocks, block_bytes], read."""
    parts = [_rows(cache, block_ids, part) for part in layout.layer_slices(layers)]
    rows = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    return memoryview(rows).cast("B")


def pages_of(layout: KVLayout, to: KVLayout, first: int, count: int) -> slice:
    """Where in a sequence's table of pages, of `layout`, the KV of its blocks
    [first, first + count) of layout `to` is; the last of these may go beyond the table."""
    size = to.block_size
    return slice(first * size // layout.block_size, layout.blocks_for((first + count) * size))


def copy_blocks(
    cache: torch.Tensor,
    layout: KVLayout,
    page_ids: list[int],
    to: KVLayout,
    first: int,
    count: int,
    layers: range,
) -> memoryview:
    """A copy of some layers of a sequence's blocks [first, first + count) of layout `to`, cut from
    pages of another block size, as `copy_layers` gives it from pages of that size.

    cache     uint8 [num_blocks, block_bytes], read
    page_ids  the pages that `pages_of` names, as many as there are; what they lack is zero

    One block size divides the other, and their smaller one is what is moved: `units` of a page,
    `to_units` of a block.
    """
    unit = min(layout.block_size, to.block_size)
    units, to_units = layout.block_size // unit, to.block_size // unit
    vectors = len(layers) * 2 * layout.num_kv_heads
    skip = first * to_units % units
    at = np.arange(skip, min(skip + count * to_units, len(page_ids) * units))
    to_at = at - skip
    parts = []
    for part in layout.layer_slices(layers):
        rows = _rows(cache, page_ids, part).reshape(len(page_ids), vectors, units, -1)
        blocks = np.zeros((count, vectors, to_units, rows.shape[3]), np.uint8)
        blocks[to_at // to_units, :, to_at % to_units] = rows[at // units, :, at % units]
        parts.append(blocks.reshape(count, -1))
    return memoryview(np.concatenate(parts, axis=1)).cast("B")


def write_layers(
    cache: torch.Tensor,
    layout: KVLayout,
    block_ids: tuple[int, ...],
    layers: range,
    payload: memoryview,
) -> None:
    """Put what `copy_layers` gave into pages. cache: uint8 [num_blocks, block_bytes], written."""
    rows = np.frombuffer(payload, np.uint8).reshape(len(block_ids), -1)
    start = 0
    for part in layout.layer_slices(layers):
        columns = rows[:, start : start + part.stop - part.start]
        start += columns.shape[1]
        if cache.device.type == "cpu":
            # numpy copies rows whole; torch's indexing goes byte by byte, 20 times slower.
            cache.numpy()[list(block_ids), part] = columns
        else:
            host = torch.from_numpy(columns.copy())
            cache[list(block_ids), part] = _for_device(host, cache.device)


def _rows(cache: torch.Tensor, block_ids: list[int], part: slice) -> np.ndarray:
    if cache.device.type == "cpu":
        return cache.numpy()[block_ids, part]
    rows = cache[block_ids, part]
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
    return host.copy_(rows).numpy()


def _for_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
