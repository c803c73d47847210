"""The store: frames of KV blocks in memory by key, least recently used out first."""

from collections import OrderedDict
from dataclasses import dataclass, field

from common.errors import WireError
from common.kv.wire import decode_block

# What a held frame costs beside its bytes: the entry, the key, the bytes object.
ENTRY_BYTES = 256


@dataclass(slots=True)
class StoreCounters:
    """Since the process started."""

    hits: int = 0
    misses: int = 0
    stored: int = 0
    already_held: int = 0
    rejected: int = 0
    evicted: int = 0
    corrupt: int = 0


@dataclass(slots=True)
class BlockStore:
    """At most `max_bytes` of frames. Used on one loop; nothing here waits.

    A frame is verified when it comes (a damaged one is never kept) and again when it is asked for:
    memory that went bad is a miss, not an answer.
    """

    max_bytes: int
    counters: StoreCounters = field(default_factory=StoreCounters)
    used_bytes: int = 0
    _frames: OrderedDict[bytes, bytes] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._frames)

    def lookup(self, keys: list[bytes]) -> int:
        """How many keys from the first on are held; they count as used."""
        matched = 0
        for key in keys:
            if key not in self._frames:
                break
            matched += 1
        # Last key first: the start of a chain, without which its end is useless, is evicted last.
        for key in reversed(keys[:matched]):
            self._frames.move_to_end(key)
        return matched

    def get(self, key: bytes) -> bytes | None:
        """The frame of a key, verified; None is a miss."""
        frame = self._frames.get(key)
        if frame is None:
            self.counters.misses += 1
            return None
        try:
            decode_block(frame)
        except WireError:
            self._remove(key)
            self.counters.corrupt += 1
            self.counters.misses += 1
            return None
        self._frames.move_to_end(key)
        self.counters.hits += 1
        return frame

    def put(self, frame: bytes) -> str:
        """Keep a frame; returns "stored", "already_held" or "rejected" (damaged or too large)."""
        try:
            key = decode_block(frame).key
        except WireError:
            self.counters.rejected += 1
            return "rejected"
        if key in self._frames:
            self._frames.move_to_end(key)
            self.counters.already_held += 1
            return "already_held"
        cost = len(frame) + ENTRY_BYTES
        if cost > self.max_bytes:
            self.counters.rejected += 1
            return "rejected"
        while self.used_bytes + cost > self.max_bytes:
            self._remove(next(iter(self._frames)))
            self.counters.evicted += 1
        self._frames[key] = frame
        self.used_bytes += cost
        self.counters.stored += 1
        return "stored"

    def _remove(self, key: bytes) -> None:
        self.used_bytes -= len(self._frames.pop(key)) + ENTRY_BYTES
