"""When the loop of a receiver wakes the engine."""

import asyncio
import threading

import pytest

from common.kv.connectors import transfer
from common.kv.connectors.transfer import WAKE_BYTES, CallEnded, Corrupt, Frame, Inbox
from common.kv.wire import Block, BlockRange, Envelope
from common.rpc.loop import LoopThread

pytestmark = pytest.mark.timeout(20)
LAYERS, BLOCKS = 4, 3


@pytest.fixture
def loop():
    thread = LoopThread("test-inbox")
    yield thread
    thread.close()


@pytest.fixture
def patience(monkeypatch):
    """No frame is here for so long that it wakes the engine by that."""
    monkeypatch.setattr(transfer, "WAKE_S", 60.0)


class Woken:
    """Counts calls, from any thread."""

    def __init__(self) -> None:
        self.count = 0
        self.event = threading.Event()

    def __call__(self) -> None:
        self.count += 1
        self.event.set()


def frame(number: int, first_block: int, layer: int, size: int = 64) -> Frame:
    envelope = Envelope(
        bytes(16), bytes(16), 1, number, first_block=first_block, num_blocks=1, total=BLOCKS
    )
    block = Block(bytes(16), BlockRange(0, 1, layer, 1), 16, memoryview(bytes(size)))
    return Frame(envelope, block, asyncio.get_running_loop().create_future())


def put(loop: LoopThread, inbox: Inbox, *places: tuple[int, int, int]) -> int:
    """Put frames (first block, layer, bytes) in one go; how often the engine was woken by then."""

    async def run() -> int:
        for number, (first_block, layer, size) in enumerate(places):
            inbox.put_frame(frame(number, first_block, layer, size))
        return inbox._wake.count

    return loop.run(run()).result(5)


def test_the_last_frame_of_a_handoff_wakes_the_engine_at_once_for_all(loop, patience):
    inbox = Inbox(LAYERS, Woken())
    places = [(block, layer, 64) for layer in range(LAYERS) for block in range(BLOCKS)]
    assert put(loop, inbox, *places[:-1]) == 0
    assert put(loop, inbox, places[-1]) == 1
    assert len(inbox.take()) == LAYERS * BLOCKS
    assert inbox.take() == []


def test_frames_that_wait_for_others_in_vain_wake_it_soon(loop):
    inbox = Inbox(LAYERS, Woken())
    put(loop, inbox, (0, 0, 64), (1, 0, 64))
    assert inbox._wake.event.wait(5)
    assert inbox._wake.count == 1
    # And again, when it was woken before.
    inbox._wake.event.clear()
    put(loop, inbox, (2, 0, 64))
    assert inbox._wake.event.wait(5)
    assert len(inbox.take()) == 3


def test_many_bytes_wake_it_at_once(loop, patience):
    inbox = Inbox(LAYERS, Woken())
    assert put(loop, inbox, (0, 0, WAKE_BYTES - 1)) == 0
    assert put(loop, inbox, (0, 1, 1)) == 1


@pytest.mark.parametrize("item", [Corrupt("why"), CallEnded(bytes(16), 1, None)])
def test_what_is_no_frame_wakes_it_at_once_from_any_thread(item):
    inbox = Inbox(LAYERS, Woken())
    inbox.put(item)
    assert inbox._wake.count == 1
    assert inbox.take() == [item]
