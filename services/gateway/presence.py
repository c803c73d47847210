"""What a gateway says of itself, and what still runs on it: so that it can leave unnoticed."""

import asyncio
import contextlib
from collections.abc import Iterator


class Presence:
    """Shared by both fronts.

    ready    a decode worker can be used, or could a moment ago: requests wait that long for one
    leaving  told to end: /ready and health say so, and what comes nevertheless is served
    """

    def __init__(self) -> None:
        self.ready = False
        self.leaving = False
        self._busy = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Around a request, from its arrival to its answer."""
        self._busy += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._busy -= 1
            if not self._busy:
                self._idle.set()

    async def wait_idle(self, timeout_s: float) -> int:
        """Wait until every request is answered; how many are not, where that takes longer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return self._busy
