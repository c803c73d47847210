"""Memory that input may hold, shared fairly by those who wait for it."""

import asyncio
import collections


class ByteBudget:
    """Bytes that may be held; takers are served in order. Used on one loop."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    async def take(self, amount: int) -> None:
        """Wait until `amount` bytes are free, then hold them; it must not exceed the limit."""
        if not self._waiting and amount <= self._free:
            self._free -= amount
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(amount)
            raise

    def give(self, amount: int) -> None:
        """Give back what `take` held."""
        self._free += amount
        while self._waiting:
            wanted, turn = self._waiting[0]
            if not turn.done():
                if wanted > self._free:
                    return
                self._free -= wanted
                turn.set_result(None)
            self._waiting.popleft()
