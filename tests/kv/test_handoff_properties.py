"""The handoff table against a model that remembers everything: which cells (layers of blocks)
landed, which attempt is under way, and which pages belong to whom."""

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.kv.handoff import Accept, HandoffTable, Verdict, WantedBlock
from common.kv.layout import KVLayout
from common.kv.wire import Block, BlockRange, Envelope, incarnation_digest

LAYOUT = KVLayout(num_layers=3, num_kv_heads=1, head_dim=4, block_size=4, kv_dtype="fp8_e4m3")
LAYERS = LAYOUT.num_layers
STALL_S, LEASE_S = 10.0, 25.0
ME, BEFORE = incarnation_digest("me"), incarnation_digest("me, before")


@dataclass
class Known:
    """What the model knows of a handoff."""

    id: bytes
    first: int
    total: int
    pages: dict[int, int]
    generation: int = 1
    lease_end: float = 0.0
    heard: float = 0.0
    overdue: bool = False
    ended: Verdict | None = None
    cells: set[tuple[int, int]] = field(default_factory=set)

    def key(self, index: int) -> bytes:
        return self.id[:8] + index.to_bytes(8, "little")

    def tokens(self, index: int) -> int:
        return 3 if index == self.total - 1 else 4

    def missing(self) -> list[int]:
        blocks = range(self.first, self.total)
        return [b for b in blocks if any((b, layer) not in self.cells for layer in range(LAYERS))]


class HandoffMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.table = HandoffTable("me", LAYOUT, STALL_S)
        self.now = 100.0
        self.all: list[Known] = []
        self.owner: dict[int, bytes] = {}  # page -> the handoff that may write it
        self.dropped = dict.fromkeys(Verdict, 0)
        self.next_page = 1

    def open_ones(self) -> list[Known]:
        return [known for known in self.all if known.ended is None]

    def end(self, known: Known, verdict: Verdict) -> None:
        known.ended = verdict
        for page in known.pages.values():
            del self.owner[page]

    @rule(first=st.integers(0, 2), count=st.integers(1, 3), lease=st.floats(1, LEASE_S))
    def open(self, first, count, lease):
        known = Known(len(self.all).to_bytes(16, "big"), first, first + count, {})
        for index in range(first, first + count):
            known.pages[index] = self.next_page
            self.owner[self.next_page] = known.id
            self.next_page += 1
        known.lease_end, known.heard = self.now + lease, self.now
        wanted = [
            WantedBlock(i, page, known.key(i), known.tokens(i)) for i, page in known.pages.items()
        ]
        self.all.append(known)
        assert self.table.open(known.id, wanted, known.total, known.lease_end, self.now) == 1

    @precondition(lambda self: self.all)
    @rule(
        data=st.data(),
        part=st.tuples(st.integers(0, LAYERS - 1), st.integers(1, LAYERS)),
        first=st.integers(0, 4),
        count=st.integers(1, 3),
        older=st.integers(0, 1),
        wrong=st.sampled_from([None] * 8 + ["key", "tokens", "total", "size", "heads", "process"]),
    )
    def any_frame(self, data, part, first, count, older, wrong):
        known = data.draw(st.sampled_from(self.all))
        self.send(known, part, first, count, older, wrong)

    @precondition(lambda self: self.open_ones())
    @rule(data=st.data(), start=st.integers(0, LAYERS - 1))
    def fitting_frame(self, data, start):
        known = data.draw(st.sampled_from(self.open_ones()))
        first = data.draw(st.integers(known.first, known.total - 1))
        count = data.draw(st.integers(1, known.total - first))
        self.send(known, (start, data.draw(st.integers(1, LAYERS - start))), first, count)

    def send(self, known, part, first, count, older=0, wrong=None):
        start, length = part
        last = first + count - 1
        size = count * length * LAYOUT.layer_bytes + (wrong == "size")
        envelope = Envelope(
            known.id,
            BEFORE if wrong == "process" else ME,
            known.generation - older,
            0,
            first,
            count,
            known.total + (wrong == "total"),
        )
        block = Block(
            b"k" * 16 if wrong == "key" else known.key(last),
            BlockRange(0, 1 + (wrong == "heads"), start, length),
            known.tokens(last) - (wrong == "tokens"),
            memoryview(bytes(size)),
        )
        fits = (
            start + length <= LAYERS
            and known.first <= first
            and last < known.total
            and wrong is None
        )
        cells = {(b, n) for b in range(first, last + 1) for n in range(start, start + length)}
        expected = self.judge(known, older, wrong, fits, cells)
        before = set(known.missing())
        answer = self.table.on_frame(envelope, block, self.now)
        if expected is not Verdict.ACCEPTED:
            assert not isinstance(answer, Accept)
            assert answer.verdict is expected
            self.dropped[expected] += 1
            return
        assert isinstance(answer, Accept)
        # Fencing: only pages that belong to this very handoff now.
        assert all(self.owner[page] == known.id for page in answer.block_ids)
        assert answer.block_ids == tuple(known.pages[b] for b in range(first, last + 1))
        known.cells |= cells
        known.heard = self.now
        assert {b.index for b in answer.completed} == before - set(known.missing())
        assert answer.complete == (not known.missing())
        if answer.complete:
            self.end(known, Verdict.AFTER_COMPLETE)

    def judge(self, known, older, wrong, fits, cells) -> Verdict:
        if wrong == "process":
            return Verdict.WRONG_INCARNATION
        if known.ended is not None:
            return known.ended
        if older:
            return Verdict.OLD_GENERATION
        if known.overdue or self.now >= known.lease_end:
            return Verdict.EXPIRED
        if not fits:
            return Verdict.WRONG_BLOCK
        return Verdict.DUPLICATE if cells <= known.cells else Verdict.ACCEPTED

    @rule(seconds=st.floats(0.1, 8))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def expire(self):
        late = {
            (known.id, known.generation)
            for known in self.open_ones()
            if not known.overdue
            and (self.now >= known.lease_end or self.now - known.heard >= STALL_S)
        }
        assert {(o.handoff_id, o.generation) for o in self.table.expire(self.now)} == late
        for known in self.open_ones():
            known.overdue = known.overdue or (known.id, known.generation) in late

    @precondition(lambda self: self.open_ones())
    @rule(data=st.data(), lease=st.floats(1, LEASE_S))
    def retry(self, data, lease):
        known = data.draw(st.sampled_from(self.open_ones()))
        known.generation += 1
        known.lease_end, known.heard, known.overdue = self.now + lease, self.now, False
        assert self.table.retry(known.id, known.lease_end, self.now) == known.generation

    @precondition(lambda self: self.all)
    @rule(data=st.data(), how=st.sampled_from(["abort", "fail"]))
    def give_up(self, data, how):
        known = data.draw(st.sampled_from(self.all))
        was_open = known.ended is None
        if how == "abort":
            assert self.table.abort(known.id) == was_open
        else:
            lost = [block.index for block in self.table.fail(known.id)]
            assert lost == (known.missing() if was_open else [])
        if was_open:
            self.end(known, Verdict.AFTER_ABORT if how == "abort" else Verdict.AFTER_FAILURE)

    @invariant()
    def agrees(self):
        assert len(self.table) == len(self.open_ones())
        assert self.table.dropped == {v: n for v, n in self.dropped.items() if n}
        for known in self.open_ones():
            assert [block.index for block in self.table.missing(known.id)] == known.missing()


TestHandoffTable = HandoffMachine.TestCase
TestHandoffTable.settings = settings(
    max_examples=80,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
