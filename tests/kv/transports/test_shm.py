"""What only the shm transport promises: memory, folders, and who may share them."""

import asyncio
import contextlib
import gc
import itertools
import json
import os
import select
import socket
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import HandoffError
from common.kv.transports import shm
from common.kv.transports.arena import Arena
from common.kv.transports.frames import ANSWER, DATA, PROBE, Head
from common.kv.transports.shm import ARENA_BYTES, IN_FLIGHT_BYTES, ShmTransport, sweep
from tests.kv.transports.support import End, Inbox, Process, ends, mappings, until

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def pair():
    async with ends("shm") as pair:
        yield pair


async def test_an_offer_of_another_machine_is_refused(pair, tmp_path):
    receiver, _ = pair
    offer = await receiver.listen(Inbox())
    elsewhere = ShmTransport(tmp_path)
    with pytest.raises(HandoffError, match="not the same machine or user"):
        await elsewhere.open("127.0.0.1", offer)


async def test_a_folder_with_another_nonce_is_refused(pair):
    receiver, sender = pair
    offer = await receiver.listen(Inbox())
    with pytest.raises(HandoffError, match="holds another nonce"):
        await sender.open({**offer, "nonce": "0" * 32})


@pytest.mark.parametrize(
    "offer",
    [{}, {"folder": "/etc", "nonce": "x"}, {"folder": "../../etc", "nonce": "x"}],
    ids=["empty", "absolute", "upwards"],
)
async def test_an_offer_that_names_no_folder_of_ours_is_refused(pair, offer):
    with pytest.raises(HandoffError, match="is not an offer of shared memory"):
        await pair[1].open(offer)


async def test_a_receiver_without_a_place_for_its_folder_says_so(tmp_path):
    with pytest.raises(HandoffError, match="cannot offer shared memory in"):
        await ShmTransport(tmp_path / "gone").offer("", Inbox())


async def test_the_folder_is_private_and_gone_after_close(tmp_path):
    transport = ShmTransport(tmp_path)
    offer = await transport.offer("", Inbox())
    folder = tmp_path / offer["folder"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "nonce").stat().st_mode) == 0o600
    await transport.close()
    assert list(tmp_path.iterdir()) == []


async def test_folders_of_dead_processes_are_swept_and_those_of_live_ones_kept(tmp_path):
    peer = Process("receive", "shm", str(tmp_path))
    dead = tmp_path / json.loads(await peer.line())["folder"]
    peer.kill()
    alive = ShmTransport(tmp_path)
    kept = tmp_path / (await alive.offer("", Inbox()))["folder"]
    foreign = tmp_path / "baton-notes"
    foreign.mkdir()
    for folder in (dead, kept, foreign):
        os.utime(folder, (0, 0))
    sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {kept, foreign}
    await alive.close()


async def test_a_young_folder_without_a_lock_is_left_to_who_makes_it(tmp_path):
    young = tmp_path / "baton-0123456789abcdef"
    young.mkdir()
    sweep(tmp_path)
    assert young.exists()
    os.utime(young, (0, 0))
    sweep(tmp_path)
    assert not young.exists()


async def test_the_sender_removes_the_folder_of_a_receiver_that_was_killed(tmp_path):
    peer = Process("receive", "shm", str(tmp_path))
    sender = End("shm", ShmTransport(tmp_path))
    link = await sender.open(json.loads(await peer.line()))
    await link.probe()
    peer.kill()
    await until(lambda: sender.opened[0].closed and not list(tmp_path.iterdir()), 1.0)
    del link
    await sender.close()
    sender.opened.clear()
    gc.collect()
    assert mappings() == 0


async def test_the_memory_of_a_link_cannot_be_shrunk_by_its_peer(pair):
    receiver, _ = pair
    offer = await receiver.listen(Inbox())
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, str(shm.FOLDER / offer["folder"] / "socket"))
    await until(lambda: select.select([sock], [], [], 0)[0])
    _, (file,), _, _ = socket.recv_fds(sock, 1, 1)
    with pytest.raises(PermissionError):
        os.ftruncate(file, 0)
    os.close(file)
    sock.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"not a head at all, but long enough for one",
        Head(DATA, 0, 1, 4096, ARENA_BYTES - 4095).pack(),
        Head(PROBE, 0, 1, 1, 2**64 - 1).pack(),
        Head(DATA, 0, 1, 2**63, 0).pack(),
        Head(ANSWER, 0, 1, 0, 0).pack(),
    ],
    ids=["text", "past-the-end", "far-out", "huge", "answer"],
)
async def test_a_stranger_is_cut_off_and_others_are_served_on(pair, garbage):
    receiver, sender = pair
    inbox = Inbox()
    offer = await receiver.listen(inbox)
    path = shm.FOLDER / offer["folder"] / "socket"
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(garbage)
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionResetError):  # a reset says the same
            assert await reader.read() == b"m"
    writer.close()
    link = await sender.open(offer)
    assert await (await link.send(b"", b"fine")) == 0
    assert inbox.frames == [b"fine"]


async def test_a_link_over_the_limit_of_links_is_refused(pair, monkeypatch):
    monkeypatch.setattr(shm, "MAX_LINKS", 1)
    receiver, sender = pair
    offer = await receiver.listen(Inbox())
    first = await sender.open(offer)
    with pytest.raises(HandoffError, match="too many links"):
        await sender.open(offer)
    assert await first.probe() > 0


async def test_frames_wait_for_room_in_the_memory_and_are_sent_in_order(pair):
    receiver, sender = pair
    inbox = Inbox()
    inbox.hold = asyncio.Event()
    link = await sender.open(await receiver.listen(inbox))
    size = IN_FLIGHT_BYTES // 4
    sends = [asyncio.create_task(link.send(bytes([n]), bytes(size))) for n in range(6)]
    await until(lambda: len(inbox.frames) == 3)
    await asyncio.sleep(0.05)  # a fourth would come within it
    assert len(inbox.frames) == 3
    inbox.hold.set()
    answers = await asyncio.gather(*sends)
    assert await asyncio.gather(*answers) == [0] * 6
    assert [frame[0] for frame in inbox.frames] == list(range(6))


async def test_a_frame_larger_than_what_may_be_in_flight_goes_alone(pair):
    receiver, sender = pair
    inbox = Inbox()
    link = await sender.open(await receiver.listen(inbox))
    payload = os.urandom(1 << 20) * 70
    assert len(payload) > IN_FLIGHT_BYTES
    answers = [await link.send(b"", p) for p in (b"before", payload, b"after")]
    assert await asyncio.gather(*answers) == [0, 0, 0]
    assert inbox.frames == [b"before", payload, b"after"]


async def test_a_frame_outlives_its_link_while_somebody_holds_it(pair):
    receiver, sender = pair
    kept: list[memoryview] = []

    async def keep(frame: memoryview) -> int:
        kept.append(frame)
        return await asyncio.get_running_loop().create_future()

    link = await sender.open(await receiver.listen(keep))
    payload = os.urandom(100_000)
    await link.send(b"", payload)
    await until(lambda: kept)
    await link.close()
    await receiver.close()
    assert bytes(kept[0]) == payload
    kept.clear()
    del link
    sender.opened.clear()
    gc.collect()
    await until(lambda: mappings() == 0, 1.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40_000)), max_size=80))
def test_extents_never_overlap_and_all_room_comes_back(operations):
    size, limit = 256 * 1024, 192 * 1024
    arena, live = Arena(size, limit), []
    for gives, number in operations:
        if gives and live:
            arena.give(live.pop(number % len(live)))
        else:
            extent = arena.take(number)
            if extent is None:
                assert live
                continue
            assert extent[1] - extent[0] >= number
            assert extent[0] % Arena.ALIGN == 0
            live.append(extent)
        ordered = sorted(live)
        assert all(0 <= a < b <= size for a, b in ordered)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ordered))
        assert arena.used == sum(b - a for a, b in live)
        assert arena.used <= limit
    for extent in live:
        arena.give(extent)
    assert arena.take(size) == (0, size)


def test_what_was_freed_last_is_used_first():
    arena = Arena(1 << 20, 1 << 20)
    first, second = arena.take(4096), arena.take(4096)
    arena.give(first)
    assert arena.take(4096) == first
    arena.give(second)
    assert arena.take(5000)[0] == second[0]


def test_the_machine_says_why_it_has_no_shared_memory(monkeypatch, tmp_path):
    assert shm.missing() is None
    monkeypatch.setattr(shm, "FOLDER", tmp_path / "gone")
    assert "not there or not writable" in shm.missing()
