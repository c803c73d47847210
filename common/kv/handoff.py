"""A handoff of KV, decided without input or output: what is wanted, what may be written where.

The decode worker opens a handoff for the blocks it lacks; a prefill worker sends them, some layers
of some blocks a frame. Each frame names the handoff, the decode worker's incarnation and the
attempt (generation). The table answers with the pages that the frame may be written to, or with the
reason why it is dropped. Pages are given out only while their handoff is open, so a frame that
comes late finds no page: fencing by construction. What has landed is known by layer and block, so
that a frame that comes twice, in pieces of another size or out of order counts once. Time is passed
in, in seconds of one monotonic clock.
"""

import enum
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from common.errors import HandoffError
from common.kv.layout import KVLayout
from common.kv.wire import Block, BlockRange, Envelope, incarnation_digest

# Handoffs remembered after their end, only to count late frames under the right name.
REMEMBERED_HANDOFFS = 4096


@dataclass(frozen=True, slots=True)
class PrefillCandidates:
    """What a decode worker's request says about prefill: gRPC addresses, best first, the span that
    the handoff belongs to (W3C trace context), and who is told, on the engine's thread, where the
    prompt is prefilled: `handed_over`, or why it is prefilled here."""

    addresses: tuple[str, ...]
    traceparent: str = ""
    tracestate: str = ""
    note: Callable[[str], None] = field(default=lambda why: None, compare=False)


@dataclass(frozen=True, slots=True)
class HandoffTarget:
    """What a prefill worker's request says about where its KV goes.

    id            16 bytes, the decode worker's
    incarnation   the decode worker's
    generation    attempt of this handoff
    data_address  host:port of the decode worker's data plane
    block_size    tokens in a block of the decode worker: what is sent are blocks of this size
    first_block   logical index of the first block to be sent
    lease_ms      how long the decode worker keeps the blocks for this attempt
    """

    id: bytes
    incarnation: str
    generation: int
    data_address: str
    block_size: int
    first_block: int
    lease_ms: int
    traceparent: str = ""
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class HandoffPolicy:
    """When to ask another worker for prefill, and for how long.

    min_tokens       uncached prompt tokens under which the decode worker prefills by itself
    max_tokens_ahead prompt tokens that a prefill worker may have under way when it is asked; one
                     that has more is passed over; 0: no limit
    lease_s          longest one attempt may take, in seconds; never past the request's deadline
    stall_timeout_s  longest wait for the next block of an attempt, in seconds
    max_attempts     candidates that are asked before the decode worker prefills by itself
    """

    min_tokens: int = 128
    max_tokens_ahead: int = 2048
    lease_s: float = 60.0
    stall_timeout_s: float = 10.0
    max_attempts: int = 3


class Verdict(enum.IntEnum):
    """What became of a frame; it is also the status that the sender gets."""

    ACCEPTED = 0
    DUPLICATE = 1
    AFTER_COMPLETE = 2
    CORRUPT = 3
    UNKNOWN_HANDOFF = 4
    WRONG_INCARNATION = 5
    OLD_GENERATION = 6
    WRONG_BLOCK = 7
    AFTER_ABORT = 8
    AFTER_FAILURE = 9
    EXPIRED = 10

    @classmethod
    def of(cls, status: int) -> "Verdict":
        """The verdict of a status; one that a later version made up is a refusal."""
        return cls._value2member_map_.get(status, cls.UNKNOWN_HANDOFF)  # type: ignore[return-value]

    @property
    def harmless(self) -> bool:
        """The receiver has the blocks, from this frame or another: the sender goes on."""
        return self <= Verdict.AFTER_COMPLETE


@dataclass(frozen=True, slots=True)
class WantedBlock:
    """A block that the decode worker lacks: its place in the sequence, the page it goes to, the key
    and the number of tokens that it must have."""

    index: int
    block_id: int
    key: bytes
    token_count: int


@dataclass(frozen=True, slots=True)
class Accept:
    """Write the frame's payload to pages `block_ids`.

    completed  blocks of which all layers are there now, and were not before
    complete   no block of the handoff is missing any more
    """

    handoff_id: bytes
    block_ids: tuple[int, ...]
    completed: tuple[WantedBlock, ...]
    complete: bool


@dataclass(frozen=True, slots=True)
class Drop:
    """Write nothing."""

    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Overdue:
    """An attempt that ran out of lease or went silent; the handoff stays open until it is closed
    or tried again, and takes no frame meanwhile."""

    handoff_id: bytes
    generation: int
    reason: str


@dataclass(slots=True)
class _Open:
    """An open handoff. `wanted` and `landed` (a bit for each layer) go by logical block index;
    `left` blocks lack a layer; `highest` is the last frame's number in this attempt."""

    generation: int
    total: int
    wanted: dict[int, WantedBlock]
    landed: dict[int, int]
    left: int
    lease_end: float
    last_frame: float
    overdue: bool = False
    highest: int = -1

    def missing(self, all_layers: int) -> list[WantedBlock]:
        return [self.wanted[i] for i in sorted(self.wanted) if self.landed[i] != all_layers]


class HandoffTable:
    """The live handoffs of one decode worker. Used from one thread.

    incarnation      this process's; a frame for an earlier process is dropped
    layout           of the worker's blocks
    stall_timeout_s  longest wait for a frame that brings something

    `dropped` counts frames by verdict; `reordered` those that were taken though a later one of
    the same attempt had come before them.
    """

    def __init__(self, incarnation: str, layout: KVLayout, stall_timeout_s: float) -> None:
        self._incarnation = incarnation_digest(incarnation)
        self._layout = layout
        self._all_layers = (1 << layout.num_layers) - 1
        self._stall_timeout_s = stall_timeout_s
        self._open: dict[bytes, _Open] = {}
        self._ended: OrderedDict[bytes, Verdict] = OrderedDict()
        self.dropped: dict[Verdict, int] = {}
        self.reordered = 0

    def __len__(self) -> int:
        return len(self._open)

    def open(
        self, handoff_id: bytes, wanted: list[WantedBlock], total: int, lease_end: float, now: float
    ) -> int:
        """Begin a handoff's first attempt; returns its generation.

        total  blocks that the handoff's tokens cover, those not wanted included
        """
        if handoff_id in self._open or handoff_id in self._ended:
            raise HandoffError(f"handoff {handoff_id.hex()} was opened before; ids are used once")
        if not wanted:
            raise HandoffError(f"handoff {handoff_id.hex()} wants no block")
        blocks = {block.index: block for block in wanted}
        landed = dict.fromkeys(blocks, 0)
        self._open[handoff_id] = _Open(1, total, blocks, landed, len(blocks), lease_end, now)
        return 1

    def retry(self, handoff_id: bytes, lease_end: float, now: float) -> int:
        """Begin the next attempt; frames of earlier ones are dropped from now on."""
        entry = self._open[handoff_id]
        entry.generation += 1
        entry.lease_end, entry.last_frame, entry.overdue = lease_end, now, False
        entry.highest = -1
        return entry.generation

    def on_frame(self, envelope: Envelope, block: Block, now: float) -> Accept | Drop:
        """Decide about one whole frame. The caller writes the pages before all else."""
        entry = self._open.get(envelope.handoff_id)
        verdict = self._judge(envelope, block, entry, now)
        if verdict is not Verdict.ACCEPTED or entry is None:
            return self.drop(verdict)
        entry.last_frame = now
        self.reordered += envelope.number < entry.highest
        entry.highest = max(entry.highest, envelope.number)
        layers = _bits(block.range)
        completed = []
        for index in _indices(envelope):
            before = entry.landed[index]
            entry.landed[index] = before | layers
            if before != self._all_layers == before | layers:
                completed.append(entry.wanted[index])
        entry.left -= len(completed)
        complete = entry.left == 0
        if complete:
            self._end(envelope.handoff_id, Verdict.AFTER_COMPLETE)
        pages = tuple(entry.wanted[index].block_id for index in _indices(envelope))
        return Accept(envelope.handoff_id, pages, tuple(completed), complete)

    def _judge(self, envelope: Envelope, block: Block, entry: _Open | None, now: float) -> Verdict:
        if envelope.incarnation != self._incarnation:
            return Verdict.WRONG_INCARNATION
        if entry is None:
            return self._ended.get(envelope.handoff_id, Verdict.UNKNOWN_HANDOFF)
        if envelope.generation != entry.generation:
            return Verdict.OLD_GENERATION
        if entry.overdue or now >= entry.lease_end:
            return Verdict.EXPIRED
        if not self._matches(envelope, block, entry):
            return Verdict.WRONG_BLOCK
        layers = _bits(block.range)
        if all(entry.landed[index] & layers == layers for index in _indices(envelope)):
            return Verdict.DUPLICATE
        return Verdict.ACCEPTED

    def _matches(self, envelope: Envelope, block: Block, entry: _Open) -> bool:
        """Whether the frame holds whole layers of blocks that are wanted, of the right tokens."""
        range_, layout = block.range, self._layout
        # Each index of a frame must be wanted, so more blocks than that need not be looked at.
        if not 0 < envelope.num_blocks <= len(entry.wanted) or envelope.total != entry.total:
            return False
        if not all(index in entry.wanted for index in _indices(envelope)):
            return False
        last = entry.wanted[envelope.first_block + envelope.num_blocks - 1]
        return (
            (block.key, block.token_count) == (last.key, last.token_count)
            and (range_.head_start, range_.head_count) == (0, layout.num_kv_heads)
            and range_.layer_count > 0
            and range_.layer_start + range_.layer_count <= layout.num_layers
            and len(block.payload) == envelope.num_blocks * range_.layer_count * layout.layer_bytes
        )

    def drop(self, verdict: Verdict) -> Drop:
        """Count a frame that is not used, also one that could not even be decoded."""
        self.dropped[verdict] = self.dropped.get(verdict, 0) + 1
        return Drop(verdict)

    def missing(self, handoff_id: bytes) -> list[WantedBlock]:
        """Blocks that lack a layer, in the order of the sequence; none once the handoff ended."""
        entry = self._open.get(handoff_id)
        return [] if entry is None else entry.missing(self._all_layers)

    def fail(self, handoff_id: bytes) -> list[WantedBlock]:
        """Give up; returns the blocks that lack a layer."""
        missing = self.missing(handoff_id)
        self._end(handoff_id, Verdict.AFTER_FAILURE)
        return missing

    def abort(self, handoff_id: bytes) -> bool:
        """The sequence is gone and its pages with it. False when the handoff had ended."""
        return self._end(handoff_id, Verdict.AFTER_ABORT)

    def expire(self, now: float) -> list[Overdue]:
        """Attempts whose lease ended or that went silent since the last call."""
        overdue = []
        for handoff_id, entry in self._open.items():
            if entry.overdue:
                continue
            reason = ""
            if now >= entry.lease_end:
                reason = "its lease ended"
            elif now - entry.last_frame >= self._stall_timeout_s:
                reason = f"no KV came for {self._stall_timeout_s:g} s"
            if reason:
                entry.overdue = True
                overdue.append(Overdue(handoff_id, entry.generation, reason))
        return overdue

    def _end(self, handoff_id: bytes, late_frames_are: Verdict) -> bool:
        if self._open.pop(handoff_id, None) is None:
            return False
        self._ended[handoff_id] = late_frames_are
        if len(self._ended) > REMEMBERED_HANDOFFS:
            self._ended.popitem(last=False)
        return True


def _indices(envelope: Envelope) -> range:
    return range(envelope.first_block, envelope.first_block + envelope.num_blocks)


def _bits(part: BlockRange) -> int:
    """One bit for each layer of the range."""
    return ((1 << part.layer_count) - 1) << part.layer_start
