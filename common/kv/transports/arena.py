"""Which parts of a range of bytes are taken. First fit: what was used last is used again, and is
still in the processor's cache."""

import asyncio
import bisect
import contextlib

from common.errors import HandoffError

# Past this a sender gives the receiver a moment to catch up, so that what is in flight stays in
# the processors' cache, where copies are faster by half.
HOT_BYTES = 8 * 1024 * 1024
PACE_S = 0.001


class Arena:
    """Extents of [0, size), aligned to ALIGN bytes.

    soft_limit  bytes that may be taken at once, unless one extent alone is larger
    """

    ALIGN = 4096

    def __init__(self, size: int, soft_limit: int) -> None:
        self._free: list[tuple[int, int]] = [(0, size)]  # start, end; sorted, never adjacent
        self._soft_limit = soft_limit
        self._used = 0

    @property
    def used(self) -> int:
        """Bytes taken."""
        return self._used

    def take(self, size: int) -> tuple[int, int] | None:
        """An extent [start, end) of at least `size` bytes, None when there is no room now."""
        size = -(-max(size, 1) // self.ALIGN) * self.ALIGN
        if self._used and self._used + size > self._soft_limit:
            return None
        for index, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[index : index + 1] = [(start + size, end)] if end - start > size else []
                self._used += size
                return start, start + size
        return None

    def give(self, extent: tuple[int, int]) -> None:
        """Free an extent that `take` gave, once."""
        start, end = extent
        self._used -= end - start
        index = bisect.bisect(self._free, extent)
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, end))


class Room:
    """Extents for the frames that a link has in flight, given in the order of asking. Used on one
    loop.

    size, soft_limit  as of Arena
    """

    def __init__(self, size: int, soft_limit: int) -> None:
        self._arena = Arena(size, soft_limit)
        self._asking = asyncio.Lock()
        self._extents: dict[int, tuple[int, int]] = {}
        self._freed = asyncio.Event()
        self._closed = False

    async def take(self, sequence: int, size: int) -> int:
        """Wait for room for frame `sequence`; where it starts. Raises HandoffError once closed."""
        async with self._asking:
            if self._arena.used > HOT_BYTES:
                self._freed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PACE_S):
                        await self._freed.wait()
            while (extent := self._arena.take(size)) is None and not self._closed:
                self._freed.clear()
                await self._freed.wait()
        if extent is None:
            raise HandoffError("the link broke before there was room")
        self._extents[sequence] = extent
        return extent[0]

    def give(self, sequence: int) -> None:
        """Frame `sequence` was answered; nothing happens if it took no room."""
        if extent := self._extents.pop(sequence, None):
            self._arena.give(extent)
            self._freed.set()

    def close(self) -> None:
        """Whoever waits for room gets HandoffError."""
        self._closed = True
        self._freed.set()
