"""What may be written where, and what is dropped: the handoff table without any input or output."""

import pytest

from common.errors import HandoffError
from common.kv.handoff import Accept, Drop, HandoffTable, Overdue, Verdict, WantedBlock
from common.kv.wire import Block, BlockRange, Envelope, incarnation_digest

WHOLE = BlockRange(0, 2, 0, 3)
ID = b"a" * 16
ME = incarnation_digest("me")


def table() -> HandoffTable:
    return HandoffTable("me", WHOLE, payload_bytes=8, stall_timeout_s=10.0)


def wanted(first: int = 2, count: int = 2) -> list[WantedBlock]:
    """Blocks `first` on, for pages 100 and up; the last one has 5 tokens."""
    return [
        WantedBlock(i, 100 + i, bytes([i]) * 16, 5 if i == first + count - 1 else 16)
        for i in range(first, first + count)
    ]


def envelope(index: int, *, generation=1, id=ID, incarnation=ME, total=4) -> Envelope:
    return Envelope(id, incarnation, generation, index, total)


def block(index: int, *, key=None, range=WHOLE, tokens=None, payload=b"12345678") -> Block:
    tokens = tokens or (5 if index == 3 else 16)
    return Block(key or bytes([index]) * 16, range, tokens, memoryview(payload))


def opened() -> HandoffTable:
    t = table()
    assert t.open(ID, wanted(), total=4, lease_end=60.0, now=0.0) == 1
    return t


def test_frames_go_to_the_pages_that_were_asked_for_until_all_are_in():
    t = opened()
    assert t.on_frame(envelope(3), block(3), 1.0) == Accept(ID, 103, complete=False)
    assert t.missing(ID) == wanted()[:1]
    assert t.on_frame(envelope(2), block(2), 2.0) == Accept(ID, 102, complete=True)
    assert len(t) == 0
    assert t.dropped == {}


def test_a_late_frame_of_an_aborted_handoff_is_dropped():
    t = opened()
    assert t.abort(ID)
    assert t.on_frame(envelope(2), block(2), 1.0) == Drop(Verdict.AFTER_ABORT)
    assert t.dropped == {Verdict.AFTER_ABORT: 1}


def test_a_late_frame_of_a_complete_handoff_is_dropped():
    t = opened()
    t.on_frame(envelope(2), block(2), 1.0)
    t.on_frame(envelope(3), block(3), 1.0)
    assert t.on_frame(envelope(3), block(3), 1.0) == Drop(Verdict.AFTER_COMPLETE)


def test_a_late_frame_of_a_failed_handoff_is_dropped():
    t = opened()
    t.on_frame(envelope(2), block(2), 1.0)
    assert [b.index for b in t.fail(ID)] == [3]
    assert t.on_frame(envelope(3), block(3), 1.0) == Drop(Verdict.AFTER_FAILURE)


def test_a_duplicate_is_dropped_and_does_not_count_as_progress():
    t = opened()
    t.on_frame(envelope(2), block(2), 1.0)
    assert t.on_frame(envelope(2), block(2), 8.0) == Drop(Verdict.DUPLICATE)
    assert t.expire(11.0) == [Overdue(ID, 1, "no block came for 10 s")]


def test_a_frame_of_an_unknown_handoff_is_dropped():
    t = opened()
    assert t.on_frame(envelope(2, id=b"b" * 16), block(2), 1.0) == Drop(Verdict.UNKNOWN_HANDOFF)


def test_a_frame_for_an_earlier_process_is_dropped():
    t = opened()
    frame = envelope(2, incarnation=incarnation_digest("me, before the restart"))
    assert t.on_frame(frame, block(2), 1.0) == Drop(Verdict.WRONG_INCARNATION)


def test_a_frame_of_an_earlier_or_a_later_attempt_is_dropped():
    t = opened()
    assert t.retry(ID, lease_end=60.0, now=5.0) == 2
    assert t.on_frame(envelope(2, generation=1), block(2), 6.0) == Drop(Verdict.OLD_GENERATION)
    assert t.on_frame(envelope(2, generation=3), block(2), 6.0) == Drop(Verdict.OLD_GENERATION)
    assert t.on_frame(envelope(2, generation=2), block(2), 6.0) == Accept(ID, 102, False)


def test_blocks_of_an_earlier_attempt_stay_and_only_the_rest_is_missing():
    t = opened()
    t.on_frame(envelope(2), block(2), 1.0)
    t.retry(ID, lease_end=60.0, now=5.0)
    assert [b.index for b in t.missing(ID)] == [3]
    assert t.on_frame(envelope(2, generation=2), block(2), 6.0) == Drop(Verdict.DUPLICATE)
    assert t.on_frame(envelope(3, generation=2), block(3), 6.0) == Accept(ID, 103, True)


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (envelope(2), block(2, key=b"z" * 16)),
        (envelope(2), block(2, tokens=15)),
        (envelope(2), block(2, payload=b"1234567")),
        (envelope(2), block(2, range=BlockRange(0, 1, 0, 3))),
        (envelope(2), block(2, range=BlockRange(0, 2, 1, 2))),
        (envelope(2, total=5), block(2)),
        (envelope(1), block(1)),
        (envelope(7), block(7)),
    ],
    ids=["key", "tokens", "size", "heads", "layers", "total", "before", "after"],
)
def test_a_block_that_is_not_what_was_asked_for_is_dropped(head, body):
    t = opened()
    assert t.on_frame(head, body, 1.0) == Drop(Verdict.WRONG_BLOCK)
    assert t.missing(ID) == wanted()


def test_an_attempt_that_goes_silent_is_overdue_once_and_takes_no_frame():
    t = opened()
    assert t.expire(9.9) == []
    assert t.expire(10.0) == [Overdue(ID, 1, "no block came for 10 s")]
    assert t.expire(10.1) == []
    assert t.on_frame(envelope(2), block(2), 10.2) == Drop(Verdict.EXPIRED)
    t.retry(ID, lease_end=60.0, now=10.3)
    assert t.on_frame(envelope(2, generation=2), block(2), 10.4) == Accept(ID, 102, False)


def test_a_lease_ends_even_when_blocks_keep_coming():
    t = table()
    t.open(ID, wanted(0, 8), total=8, lease_end=6.0, now=0.0)
    for i in range(6):
        assert isinstance(t.on_frame(envelope(i, total=8), block(i, tokens=16), i), Accept)
    assert t.on_frame(envelope(6, total=8), block(6), 6.0) == Drop(Verdict.EXPIRED)
    assert t.expire(6.0) == [Overdue(ID, 1, "its lease ended")]


def test_an_id_is_used_once():
    t = opened()
    with pytest.raises(HandoffError, match="ids are used once"):
        t.open(ID, wanted(), 4, 60.0, 0.0)
    t.abort(ID)
    with pytest.raises(HandoffError, match="ids are used once"):
        t.open(ID, wanted(), 4, 60.0, 0.0)


def test_ending_twice_changes_nothing():
    t = opened()
    assert t.abort(ID)
    assert not t.abort(ID)
    assert t.fail(ID) == []
    assert t.on_frame(envelope(2), block(2), 1.0) == Drop(Verdict.AFTER_ABORT)


def test_a_sender_goes_on_only_where_the_receiver_has_the_block():
    harmless = {v for v in Verdict if v.harmless}
    assert harmless == {Verdict.ACCEPTED, Verdict.DUPLICATE, Verdict.AFTER_COMPLETE}
