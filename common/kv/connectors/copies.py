"""Copies of pages that leave a worker. A GPU's come when the step that wrote them is over and the
bus has brought them: a thread waits for that, the engine's never does."""

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import numpy as np
import structlog

from common.errors import BatonError
from common.kv.connectors.pages import (
    LatePages,
    Pages,
    as_bytes,
    cut_blocks,
    page_views,
    read_rows,
)
from common.kv.layout import KVLayout

T = TypeVar("T")
log = structlog.get_logger("copies")

# At the end, for copies under way; longer is a device that does not answer.
CLOSE_S = 10.0


class HostCopies:
    """The copies of one worker, one after another, in the order in which they are asked for.

    A copy is of what its pages hold after the steps that were started, whatever is written there
    later: they may be given away at once. It is asked for on the engine's thread and comes as a
    Future, done already where pages are in this machine's memory. What is raised meanwhile is for
    the engine (a rank is gone); a copy that fails later has a BatonError and harms no other.
    Cancelling does nothing: a copy under way holds its bytes until it is done, and its callbacks
    run then, on the thread of the copies. Whoever asks bounds what it has under way.

    cache, layout  the worker's pages
    """

    def __init__(self, cache: Pages, layout: KVLayout) -> None:
        self._cache = cache
        self._layout = layout
        self._late = cache if isinstance(cache, LatePages) else None
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def pages(self, block_ids: list[int]) -> Future[list[memoryview]]:
        """Whole pages, as `copy_pages` gives them."""
        return self._start(block_ids, None, page_views)

    def layers(self, block_ids: list[int], layers: range) -> Future[memoryview]:
        """As `copy_layers` gives them."""
        return self._start(block_ids, layers, as_bytes)

    def blocks(
        self, page_ids: list[int], to: KVLayout, first: int, count: int, layers: range
    ) -> Future[memoryview]:
        """Blocks of another size, as `cut_blocks` cuts them from these pages."""
        cut = partial(
            cut_blocks, layout=self._layout, to=to, first=first, count=count, layers=layers
        )
        return self._start(page_ids, layers, cut)

    def close(self) -> None:
        """Wait for the copies under way and end the thread. None may be asked for any more."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(CLOSE_S)

    def _start(
        self, block_ids: list[int], layers: range | None, shape: Callable[[np.ndarray], T]
    ) -> Future[T]:
        copy: Future[T] = Future()
        copy.set_running_or_notify_cancel()
        if self._late is None:
            copy.set_result(shape(read_rows(self._cache, self._layout, block_ids, layers)))
            return copy
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait, name="baton-copies", daemon=True)
            self._thread.start()
        fetch = self._late.begin(block_ids, layers)
        self._queue.put(partial(_finish, copy, lambda: shape(fetch())))
        return copy

    def _wait(self) -> None:
        while (finish := self._queue.get()) is not None:
            finish()
            # What the device holds for a copy is not held until the next one.
            del finish


async def arrived(copy: Future[T]) -> T:
    """A copy's bytes, on a loop. Raises BatonError for one that failed."""
    return copy.result() if copy.done() else await asyncio.wrap_future(copy)


def _finish(copy: Future[T], fetch: Callable[[], T]) -> None:
    try:
        found = fetch()
    except Exception as error:
        log.exception("copy_failed")
        failure = BatonError("KV could not be copied from the device; the worker's log says why")
        failure.__cause__ = error
        copy.set_exception(failure)
    else:
        copy.set_result(found)
