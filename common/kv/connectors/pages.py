"""Bytes into pages and out of them; on the engine's thread only."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from common.kv.layout import KVLayout


class FarPages(Protocol):
    """Pages that are not a tensor in this machine's memory: a GPU's, or those of ranks that keep
    their heads to themselves.

    rows  uint8 [blocks, bytes] of some layers, all of them where `layers` is None: of each block
          its payload, then its scales
    """

    def read(self, block_ids: Sequence[int], layers: range | None = None) -> np.ndarray: ...

    def write(
        self, block_ids: Sequence[int], rows: np.ndarray, layers: range | None = None
    ) -> None: ...


@runtime_checkable
class LatePages(FarPages, Protocol):
    """Far pages whose bytes need not be waited for where they are asked for."""

    def begin(
        self, block_ids: Sequence[int], layers: range | None = None
    ) -> Callable[[], np.ndarray]:
        """What is in the pages after the steps that were started, whatever is written there later.
        What is returned waits for it; any thread may call it, once."""
        ...


# What `cache` is below: uint8 [num_blocks, block_bytes] in this machine's memory, or what stands
# for it.
Pages = torch.Tensor | FarPages


def write_page(cache: Pages, block_id: int, payload: memoryview) -> None:
    """Copy a block's bytes into its page."""
    row = np.frombuffer(payload, np.uint8)
    if isinstance(cache, torch.Tensor):
        cache.numpy()[block_id] = row
    else:
        cache.write([block_id], row[None])


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
        end = start + part.stop - part.start
        # numpy copies rows whole; torch's indexing goes byte by byte, 20 times slower.
        cache.numpy()[list(block_ids), part] = rows[:, start:end]
        start = end


def copy_pages(cache: Pages, block_ids: list[int]) -> list[memoryview]:
    """Copies of pages as bytes. Waits for a GPU; `HostCopies` does not."""
    return page_views(read_rows(cache, None, block_ids, None))


def copy_layers(cache: Pages, layout: KVLayout, block_ids: list[int], layers: range) -> memoryview:
    """A copy of some layers of some blocks: [len(block_ids), len(layers) * layer_bytes] bytes, of
    each block its payload, then its scales. Waits for a GPU; `HostCopies` does not."""
    return as_bytes(read_rows(cache, layout, block_ids, layers))


def read_rows(
    cache: Pages, layout: KVLayout | None, block_ids: list[int], layers: range | None
) -> np.ndarray:
    """As FarPages.read, for all pages; all layers need no layout."""
    if not isinstance(cache, torch.Tensor):
        return cache.read(block_ids, layers)
    if layers is None:
        return cache.numpy()[block_ids]
    parts = [cache.numpy()[block_ids, part] for part in layout.layer_slices(layers)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def as_bytes(rows: np.ndarray) -> memoryview:
    """All rows, one after another."""
    return memoryview(rows).cast("B")


def page_views(rows: np.ndarray) -> list[memoryview]:
    """Each row by itself."""
    return [memoryview(row) for row in rows]


def pages_of(layout: KVLayout, to: KVLayout, first: int, count: int) -> slice:
    """Where in a sequence's table of pages, of `layout`, the KV of its blocks
    [first, first + count) of layout `to` is; the last of these may go beyond the table."""
    size = to.block_size
    return slice(first * size // layout.block_size, layout.blocks_for((first + count) * size))


def cut_blocks(
    pages: np.ndarray, layout: KVLayout, to: KVLayout, first: int, count: int, layers: range
) -> memoryview:
    """Some layers of a sequence's blocks [first, first + count) of layout `to`, cut from pages of
    another block size, as `copy_layers` gives them from pages of that size.

    pages  the rows of the pages that `pages_of` names, as many as there are; what they lack is zero

    One block size divides the other, and their smaller one is what is moved: `units` of a page,
    `to_units` of a block.
    """
    unit = min(layout.block_size, to.block_size)
    units, to_units = layout.block_size // unit, to.block_size // unit
    vectors = len(layers) * 2 * layout.num_kv_heads
    skip = first * to_units % units
    at = np.arange(skip, min(skip + count * to_units, len(pages) * units))
    to_at, start, parts = at - skip, 0, []
    for part in layout.layer_slices(layers):
        end = start + part.stop - part.start
        rows = pages[:, start:end].reshape(len(pages), vectors, units, -1)
        blocks = np.zeros((count, vectors, to_units, rows.shape[3]), np.uint8)
        blocks[to_at // to_units, :, to_at % to_units] = rows[at // units, :, at % units]
        parts.append(blocks.reshape(count, -1))
        start = end
    return as_bytes(np.concatenate(parts, axis=1))
