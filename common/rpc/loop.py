"""One asyncio loop on a thread of its own, for input and output beside an engine or a service."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from common.errors import BatonError

T = TypeVar("T")


class LoopThread:
    """A daemon thread that runs one uvloop event loop until `close`.

    `run` and `call_soon` may be called from any thread. Blocking calls (`run(...).result()`)
    must never be made from the loop's own thread.
    """

    def __init__(self, name: str = "baton-io") -> None:
        self._loop = uvloop.new_event_loop()
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop itself, for objects that live on it."""
        return self._loop

    @property
    def closed(self) -> bool:
        return self._closed

    def run(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine on the loop; cancelling the future cancels its task.

        Raises BatonError when the loop was closed.
        """
        with self._lock:
            if self._closed:
                coroutine.close()
                raise BatonError(f"loop thread {self._thread.name!r} is closed; nothing runs on it")
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call_soon(self, function: Callable[..., object], *args: object) -> bool:
        """Call a function on the loop; False when the loop was closed already."""
        with self._lock:
            if self._closed:
                return False
            self._loop.call_soon_threadsafe(function, *args)
            return True

    def close(self, timeout_s: float = 5.0) -> None:
        """Cancel what runs, wait for it, stop the loop and join the thread. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._loop.call_soon_threadsafe(self._stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_exception_handler(_report)
        try:
            self._loop.run_forever()
            _cancel_all(self._loop)
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    def _stop(self) -> None:
        self._loop.stop()


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=3.0))


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # grpc.aio shares one completion queue among the loops of a process: a loop that is woken for
    # an event that another loop has taken reads an empty socket. That is not an error.
    if isinstance(context.get("exception"), BlockingIOError):
        return
    loop.default_exception_handler(context)
