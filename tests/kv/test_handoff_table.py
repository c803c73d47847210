"""What may be written where, and what is dropped: the handoff table without any input or output."""

import pytest

from common.errors import HandoffError
from common.kv.handoff import Accept, Drop, HandoffTable, Overdue, Verdict, WantedBlock
from common.kv.layout import KVLayout
from common.kv.wire import Block, BlockRange, Envelope, incarnation_digest

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=16, kv_dtype="fp8_e4m3")
WHOLE = BlockRange(0, 2, 0, 3)
ID = b"a" * 16
ME = incarnation_digest("me")
SILENT = "no KV came for 10 s"


def table() -> HandoffTable:
    return HandoffTable("me", LAYOUT, stall_timeout_s=10.0)


def wanted(first: int = 2, count: int = 2) -> list[WantedBlock]:
    """Blocks `first` on, for pages 100 and up; the last one has 5 tokens."""
    return [
        WantedBlock(i, 100 + i, bytes([i]) * 16, 5 if i == first + count - 1 else 16)
        for i in range(first, first + count)
    ]


def envelope(
    index: int, *, count=1, generation=1, number=0, id=ID, incarnation=ME, total=4
) -> Envelope:
    return Envelope(id, incarnation, generation, number, index, count, total)


def block(last: int, *, count=1, key=None, range=WHOLE, tokens=None, size=None) -> Block:
    """A frame's body: `count` blocks, of which `last` is the last."""
    tokens = tokens or (5 if last == 3 else 16)
    size = count * range.layer_count * LAYOUT.layer_bytes if size is None else size
    return Block(key or bytes([last]) * 16, range, tokens, memoryview(bytes(size)))


def layers(start: int, count: int = 1) -> BlockRange:
    return BlockRange(0, 2, start, count)


def taken(page: int, *, complete=False) -> Accept:
    """The answer to a frame with all layers of one block."""
    (whole,) = (w for w in wanted() if w.block_id == page)
    return Accept(ID, (page,), (whole,), complete)


def opened() -> HandoffTable:
    t = table()
    assert t.open(ID, wanted(), total=4, lease_end=60.0, now=0.0) == 1
    return t


def test_frames_go_to_the_pages_that_were_asked_for_until_all_are_in():
    t = opened()
    assert t.on_frame(envelope(3), block(3), 1.0) == taken(103)
    assert t.missing(ID) == wanted()[:1]
    assert t.on_frame(envelope(2), block(2), 2.0) == taken(102, complete=True)
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
    assert t.expire(11.0) == [Overdue(ID, 1, SILENT)]


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
    assert t.on_frame(envelope(2, generation=2), block(2), 6.0) == taken(102)


def test_blocks_of_an_earlier_attempt_stay_and_only_the_rest_is_missing():
    t = opened()
    t.on_frame(envelope(2), block(2), 1.0)
    t.retry(ID, lease_end=60.0, now=5.0)
    assert [b.index for b in t.missing(ID)] == [3]
    assert t.on_frame(envelope(2, generation=2), block(2), 6.0) == Drop(Verdict.DUPLICATE)
    assert t.on_frame(envelope(3, generation=2), block(3), 6.0) == taken(103, complete=True)


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (envelope(2), block(2, key=b"z" * 16)),
        (envelope(2), block(2, tokens=15)),
        (envelope(2), block(2, size=3 * LAYOUT.layer_bytes - 1)),
        (envelope(2), block(2, range=BlockRange(0, 1, 0, 3))),
        (envelope(2), block(2, range=BlockRange(1, 2, 0, 3))),
        (envelope(2), block(2, range=layers(1, 3))),
        (envelope(2), block(2, range=layers(0, 0))),
        (envelope(2), block(2, range=layers(65535, 65535), size=16)),
        (envelope(2, total=5), block(2)),
        (envelope(1), block(1)),
        (envelope(7), block(7)),
        (envelope(2, count=0), block(2)),
        (envelope(2, count=3), block(4, count=3)),
        (envelope(1, count=2), block(2, count=2)),
        (envelope(2, count=2**32 - 1), block(2)),
        (envelope(2, count=2), block(2, count=2)),
    ],
    ids=[
        "key",
        "tokens",
        "size",
        "heads",
        "other-heads",
        "layers",
        "no-layer",
        "far-layers",
        "total",
        "before",
        "after",
        "no-block",
        "too-many",
        "first-not-wanted",
        "endless",
        "key-of-the-first",
    ],
)
def test_a_block_that_is_not_what_was_asked_for_is_dropped(head, body):
    t = opened()
    assert t.on_frame(head, body, 1.0) == Drop(Verdict.WRONG_BLOCK)
    assert t.missing(ID) == wanted()


def test_an_attempt_that_goes_silent_is_overdue_once_and_takes_no_frame():
    t = opened()
    assert t.expire(9.9) == []
    assert t.expire(10.0) == [Overdue(ID, 1, SILENT)]
    assert t.expire(10.1) == []
    assert t.on_frame(envelope(2), block(2), 10.2) == Drop(Verdict.EXPIRED)
    t.retry(ID, lease_end=60.0, now=10.3)
    assert t.on_frame(envelope(2, generation=2), block(2), 10.4) == taken(102)


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


def test_layers_of_several_blocks_land_in_any_order_and_complete_each_block_once():
    t = opened()
    first, second = wanted()
    assert t.on_frame(
        envelope(2, count=2, number=1), block(3, count=2, range=layers(1, 2)), 1.0
    ) == Accept(ID, (102, 103), (), False)
    assert t.missing(ID) == [first, second]
    assert t.on_frame(envelope(3, number=2), block(3, range=layers(0)), 2.0) == Accept(
        ID, (103,), (second,), False
    )
    assert t.reordered == 0
    assert t.on_frame(envelope(2, number=0), block(2, range=layers(0)), 3.0) == Accept(
        ID, (102,), (first,), True
    )
    assert t.reordered == 1


def test_layers_that_landed_in_pieces_of_another_size_count_once():
    t = opened()
    t.on_frame(envelope(2), block(2, range=layers(0, 2)), 1.0)
    again = t.on_frame(envelope(2), block(2, range=layers(0)), 2.0)
    assert again == Drop(Verdict.DUPLICATE)
    more = t.on_frame(envelope(2), block(2, range=layers(1, 2)), 3.0)
    assert more == Accept(ID, (102,), (wanted()[0],), False)
    both = t.on_frame(envelope(2, count=2), block(3, count=2), 4.0)
    assert both == Accept(ID, (102, 103), (wanted()[1],), True)


def test_a_block_that_lacks_a_layer_is_missing_when_its_handoff_fails():
    t = opened()
    t.on_frame(envelope(2), block(2), 1.0)
    t.on_frame(envelope(3), block(3, range=layers(0, 2)), 1.0)
    assert t.fail(ID) == wanted()[1:]
