"""Bytes into pages and out of them; on the engine's thread only. What is on a GPU goes through
pinned host memory, which its copy engines read and write by themselves."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from common.kv.layout import KVLayout


class SpreadPages(Protocol):
    """Pages that no tensor holds whole: those of ranks that keep their heads to themselves.

    rows  uint8 [blocks, bytes] of some layers, all of them where `layers` is None: of each block
          its payload, then its scales
    """

    def read(self, block_ids: Sequence[int], layers: range | None = None) -> np.ndarray: ...

    def write(
        self, block_ids: Sequence[int], rows: np.ndarray, layers: range | None = None
    ) -> None: ...


# What `cache` is below: uint8 [num_blocks, block_bytes], or what stands for it.
Pages = torch.Tensor | SpreadPages


def write_page(cache: Pages, block_id: int, payload: memoryview) -> None:
    """Copy a block's bytes into its page."""
    if not isinstance(cache, torch.Tensor):
        cache.write([block_id], np.frombuffer(payload, np.uint8)[None])
        return
    # frombuffer wants a buffer that could be written, whether or not anybody does.
    writable = bytearray(payload) if payload.readonly else payload
    cache[block_id].copy_(_for_device(torch.frombuffer(writable, dtype=torch.uint8), cache.device))


def copy_pages(cache: Pages, block_ids: list[int]) -> list[memoryview]:
    """Copies of pages as bytes."""
    whole = isinstance(cache, torch.Tensor)
    rows = _rows(cache, block_ids, slice(None)) if whole else cache.read(block_ids)
    return [memoryview(page) for page in rows]


def copy_layers(cache: Pages, layout: KVLayout, block_ids: list[int], layers: range) -> memoryview:
    """A copy of some layers of some blocks: [len(block_ids), len(layers) * layer_bytes] bytes, of
    each block its payload, then its scales."""
    return memoryview(_layer_rows(cache, layout, block_ids, layers)).cast("B")


def pages_of(layout: KVLayout, to: KVLayout, first: int, count: int) -> slice:
    """Where in a sequence's table of pages, of `layout`, the KV of its blocks
    [first, first + count) of layout `to` is; the last of these may go beyond the table."""
    size = to.block_size
    return slice(first * size // layout.block_size, layout.blocks_for((first + count) * size))


def copy_blocks(
    cache: Pages,
    layout: KVLayout,
    page_ids: list[int],
    to: KVLayout,
    first: int,
    count: int,
    layers: range,
) -> memoryview:
    """A copy of some layers of a sequence's blocks [first, first + count) of layout `to`, cut from
    pages of another block size, as `copy_layers` gives it from pages of that size.

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
    pages, start, parts = _layer_rows(cache, layout, page_ids, layers), 0, []
    for part in layout.layer_slices(layers):
        end = start + part.stop - part.start
        rows = pages[:, start:end].reshape(len(page_ids), vectors, units, -1)
        blocks = np.zeros((count, vectors, to_units, rows.shape[3]), np.uint8)
        blocks[to_at // to_units, :, to_at % to_units] = rows[at // units, :, at % units]
        parts.append(blocks.reshape(count, -1))
        start = end
    return memoryview(np.concatenate(parts, axis=1)).cast("B")


def write_layers(
    cache: Pages,
    layout: KVLayout,
    block_ids: tuple[int, ...],
    layers: range,
    payload: memoryview,
) -> None:
    """Put what `copy_layers` gave into pages."""
    rows = np.frombuffer(payload, np.uint8).reshape(len(block_ids), -1)
    if not isinstance(cache, torch.Tensor):
        cache.write(block_ids, rows, layers)
        return
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


def _layer_rows(cache: Pages, layout: KVLayout, block_ids: list[int], layers: range) -> np.ndarray:
    if not isinstance(cache, torch.Tensor):
        return cache.read(block_ids, layers)
    parts = [_rows(cache, block_ids, part) for part in layout.layer_slices(layers)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


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
