"""Which parts of a range of bytes are taken. First fit: what was used last is used again, and is
still in the processor's cache."""

import bisect


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
