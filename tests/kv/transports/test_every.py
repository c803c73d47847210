"""What holds for every transport."""

import asyncio
import gc
import json
import os
import time

import pytest
import xxhash

from common.errors import HandoffError
from common.kv.transports.frames import MAX_FRAME_BYTES, WINDOW_FRAMES
from tests.kv.transports.support import (
    NAMES,
    End,
    Inbox,
    Process,
    ends,
    mappings,
    need,
    open_files,
    until,
)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=NAMES)
def name(request):
    need(request.param)
    return request.param


@pytest.fixture
async def pair(name):
    async with ends(name) as pair:
        yield pair


@pytest.fixture
def process():
    """Starts peers, which are gone after the test."""
    started = []

    def start(*args: str) -> Process:
        started.append(Process(*args))
        return started[-1]

    yield start
    for peer in started:
        peer.stop()


async def test_a_frame_arrives_whole_and_its_status_comes_back(pair):
    receiver, sender = pair
    inbox = Inbox(status=7)
    link = await sender.open(await receiver.listen(inbox))
    payload = os.urandom(3_000_001)
    assert await (await link.send(b"head", memoryview(payload))) == 7
    assert await (await link.send(b"", b"")) == 7
    assert await (await link.send(b"only", b"")) == 7
    assert inbox.frames == [b"head" + payload, b"", b"only"]


async def test_frames_of_one_link_arrive_in_order(pair):
    receiver, sender = pair
    inbox = Inbox()
    link = await sender.open(await receiver.listen(inbox))
    sent = [os.urandom(1 + i * 7001 % 300_000) for i in range(150)]
    answers = [await link.send(b"", frame) for frame in sent]
    assert await asyncio.gather(*answers) == [0] * len(sent)
    assert inbox.frames == sent


async def test_many_senders_on_one_link_do_not_mix_frames(pair):
    receiver, sender = pair
    inbox = Inbox()
    link = await sender.open(await receiver.listen(inbox))

    async def send(i: int) -> int:
        return await (await link.send(bytes([i]), bytes([i]) * 200_000))

    assert await asyncio.gather(*(send(i) for i in range(60))) == [0] * 60
    assert sorted(inbox.frames) == [bytes([i]) * 200_001 for i in range(60)]


async def test_two_links_to_one_receiver_do_not_mix_frames(name, pair):
    receiver, sender = pair
    other = End(name)
    inbox = Inbox()
    where = await receiver.listen(inbox)
    links = [await sender.open(where), await other.open(where)]
    for number in range(20):
        for index, link in enumerate(links):
            await link.send(bytes([index, number]), bytes([index]) * 100_000)
    await until(lambda: len(inbox.frames) == 40)
    for index in (0, 1):
        own = [frame for frame in inbox.frames if frame[0] == index]
        assert own == [bytes([index, n]) + bytes([index]) * 100_000 for n in range(20)]
    await other.close()


async def test_a_payload_may_be_reused_once_send_has_returned(pair):
    receiver, sender = pair
    inbox = Inbox()
    link = await sender.open(await receiver.listen(inbox))
    buffer = bytearray(1_000_000)
    for value in range(20):
        buffer[:] = bytes([value]) * len(buffer)
        answer = await link.send(b"", buffer)
    await answer
    assert [set(frame) for frame in inbox.frames] == [{value} for value in range(20)]


async def test_a_sender_waits_when_the_receiver_does_not_answer(pair):
    receiver, sender = pair
    inbox = Inbox()
    inbox.hold = asyncio.Event()
    link = await sender.open(await receiver.listen(inbox))
    answers = [await link.send(b"", b"x") for _ in range(WINDOW_FRAMES)]
    blocked = asyncio.create_task(link.send(b"", b"y"))
    await until(lambda: len(inbox.frames) == WINDOW_FRAMES)
    assert not blocked.done()
    inbox.hold.set()
    await asyncio.gather(*answers, await blocked)
    assert inbox.frames[-1] == b"y"


async def test_a_cancelled_send_does_not_spoil_the_link_for_others(pair):
    receiver, sender = pair
    inbox = Inbox()
    link = await sender.open(await receiver.listen(inbox))
    payload = bytes(64_000_000)
    task = asyncio.create_task(link.send(b"big", payload))
    await asyncio.sleep(0)  # it begins
    await asyncio.sleep(0)  # and writes
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await (await link.send(b"", b"after")) == 0
    assert inbox.frames[-1] == b"after"


async def test_a_test_transfer_reaches_no_handler(pair):
    receiver, sender = pair
    inbox = Inbox()
    link = await sender.open(await receiver.listen(inbox))
    assert 0 < await link.probe() < 5
    assert inbox.frames == []


async def test_a_frame_over_the_limit_is_refused_before_it_is_sent(pair):
    receiver, sender = pair
    inbox = Inbox()
    link = await sender.open(await receiver.listen(inbox))
    with pytest.raises(HandoffError, match="over the transport's"):
        await link.send(b"x" * 8192, memoryview(bytes(MAX_FRAME_BYTES)))
    assert await (await link.send(b"", b"fine")) == 0


async def test_a_handler_that_crashes_ends_the_link_and_not_the_receiver(pair):
    receiver, sender = pair

    async def crash(frame: memoryview) -> int:
        raise ValueError("a defect")

    where = await receiver.listen(crash)
    link = await sender.open(where)
    with pytest.raises(HandoffError, match="broke"):
        await (await link.send(b"", b"x"))
    sender.opened.clear()
    again = await sender.open(where)
    assert not again.closed
    assert await again.probe() > 0


async def test_a_link_closed_by_the_sender_fails_its_frames_and_frees_the_receiver(pair):
    receiver, sender = pair
    inbox = Inbox()
    inbox.hold = asyncio.Event()
    link = await sender.open(await receiver.listen(inbox))
    answer = await link.send(b"", b"lost")
    await until(lambda: inbox.frames)
    await link.close()
    assert link.closed
    with pytest.raises(HandoffError, match="broke"):
        await answer
    with pytest.raises(HandoffError, match="broke"):
        await link.send(b"", b"more")


async def test_frames_from_another_process_arrive_intact(process, pair):
    receiver, _ = pair
    inbox = Inbox()
    where = await receiver.listen(inbox)
    peer = process("send", receiver.name, json.dumps(where), "20", "1500000")
    assert await peer.line() == "sending"
    assert await peer.line() == "sent"
    assert [frame[:4] for frame in inbox.frames] == [n.to_bytes(4, "big") for n in range(20)]
    assert {len(frame) for frame in inbox.frames} == {1_500_004}
    assert len({frame[4:] for frame in inbox.frames}) == 1


async def test_a_receiver_in_another_process_gets_what_was_sent(process, name):
    peer = process("receive", name)
    sender = End(name)
    link = await sender.open(json.loads(await peer.line()))
    for size in (0, 1, 4096, 2_000_000):
        payload = os.urandom(size)
        await (await link.send(b"12345678", payload))
        checksum = xxhash.xxh3_64_hexdigest(b"12345678" + payload)
        assert await peer.line() == f"{8 + size} {checksum}"
    await sender.close()


async def test_a_receiver_killed_with_frames_in_flight_is_seen_at_once(process, name):
    peer = process("receive", name)
    sender = End(name)
    link = await sender.open(json.loads(await peer.line()))
    answer = await link.send(b"hold", os.urandom(1_000_000))
    await peer.line()
    started = time.monotonic()
    peer.popen.kill()
    with pytest.raises(HandoffError, match="broke"):
        await answer
    assert time.monotonic() - started < 1.0
    with pytest.raises(HandoffError):
        await link.send(b"", b"more")
    await sender.close()


async def test_a_sender_killed_while_it_sends_leaves_nothing_behind(process, name):
    before = None
    receiver = End(name)
    inbox = Inbox()
    where = await receiver.listen(inbox)
    for _ in range(2):
        peer = process("send", name, json.dumps(where), "1000000", "3000000")
        assert await peer.line() == "sending"
        await until(lambda: len(inbox.frames) > 3)
        peer.kill()
        inbox.frames.clear()
        await asyncio.sleep(0)  # frames are let go of
        if before is None:
            # The first link may have loaded what stays loaded.
            await until(lambda: _quiet(receiver), 1.0)
            before = open_files()
    started = time.monotonic()
    await until(lambda: _quiet(receiver) and open_files() == before, 1.5)
    assert time.monotonic() - started < 1.0
    gc.collect()
    assert mappings() == 0
    assert len({len(frame) for frame in inbox.frames} - {3_000_004}) == 0
    await receiver.close()


def _quiet(receiver: End) -> bool:
    """No link is served."""
    transport = receiver.transport
    if receiver.name == "tcp":
        return len(transport._tasks) == 1  # the one that accepts links
    return len(transport._serving if receiver.name == "shm" else transport._door) == 0


async def test_everything_is_given_back_on_close(name):
    async with ends(name) as (receiver, sender):  # what stays loaded is loaded now
        await (await sender.open(await receiver.listen(Inbox()))).probe()
    del receiver, sender
    gc.collect()
    await asyncio.sleep(0.05)  # what asyncio closes later is closed
    before = open_files()
    async with ends(name) as (receiver, sender):
        link = await sender.open(await receiver.listen(Inbox()))
        for _ in range(10):
            await (await link.send(b"", bytes(500_000)))
    del link, receiver, sender
    gc.collect()
    await until(lambda: open_files() == before)
    assert mappings() == 0


async def test_an_idle_link_takes_next_to_no_processor_time(process, name):
    peer = process("idle", name, "2.0")
    # 2 % of a core would be 0.04 s; the bound leaves room for a busy machine.
    assert float(await peer.line()) < 0.06
