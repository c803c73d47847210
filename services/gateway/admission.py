"""How many requests are served, how many may wait, and who is turned away."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator

from common.errors import DeadlineExceeded, Overloaded


class Admission:
    """A bounded number in flight and a bounded first-come first-served queue before it.

    max_in_flight  requests served at one time
    max_queue      requests that wait; one more raises Overloaded
    """

    def __init__(self, max_in_flight: int, max_queue: int) -> None:
        self.max_in_flight = max_in_flight
        self.max_queue = max_queue
        self.in_flight = 0
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    @contextlib.asynccontextmanager
    async def admit(self, deadline: float) -> AsyncIterator[None]:
        """Hold one place; `deadline` is time.monotonic() seconds.

        Raises Overloaded or DeadlineExceeded.
        """
        if self.in_flight < self.max_in_flight and not self._waiters:
            self.in_flight += 1
        else:
            await self._wait(deadline)
        try:
            yield
        finally:
            self._release()

    async def _wait(self, deadline: float) -> None:
        if len(self._waiters) >= self.max_queue:
            raise Overloaded(
                f"{self.in_flight} requests are being served and {self.waiting} wait, which is "
                "the limit; try again later"
            )
        place = asyncio.get_running_loop().create_future()
        self._waiters.append(place)
        try:
            await asyncio.wait_for(asyncio.shield(place), max(0.0, deadline - time.monotonic()))
        except BaseException as error:
            self._leave(place)
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("the request's time ran out while it was queued") from error
            raise

    def _leave(self, place: asyncio.Future[None]) -> None:
        if place.done():  # the place was handed over in the very moment of giving up
            self._release()
        else:
            self._waiters.remove(place)

    def _release(self) -> None:
        """Give the place to the first who waits, or free it."""
        if self._waiters:
            self._waiters.popleft().set_result(None)
            return
        self.in_flight -= 1
