"""The TCP transport over real sockets."""

import asyncio
import contextlib
import os
import socket
import struct

import pytest

from common.errors import HandoffError
from common.kv.transports import tcp
from common.kv.transports.tcp import TcpTransport

pytestmark = pytest.mark.timeout(30)


class Inbox:
    """A handler that keeps what it gets; `hold` makes it wait before it answers."""

    def __init__(self, status: int = 0):
        self.frames: list[bytes] = []
        self.status = status
        self.hold: asyncio.Event | None = None

    async def __call__(self, frame: memoryview) -> int:
        self.frames.append(bytes(frame))
        if self.hold is not None:
            await self.hold.wait()
        return self.status


@pytest.fixture
async def transport():
    transport = TcpTransport()
    yield transport
    await transport.close()


@pytest.fixture
async def peer():
    """Another transport, as the other process would have."""
    transport = TcpTransport()
    yield transport
    await transport.close()


async def until(condition, seconds: float = 5.0) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not true within {seconds} s"
        await asyncio.sleep(0.005)


async def test_a_frame_arrives_whole_and_its_status_comes_back(transport, peer):
    inbox = Inbox(status=7)
    port = await peer.listen("127.0.0.1", 0, inbox)
    link = await transport.connect(f"127.0.0.1:{port}")
    payload = os.urandom(3_000_000)
    answer = await link.send(b"head", memoryview(payload))
    assert await answer == 7
    assert inbox.frames == [b"head" + payload]


async def test_frames_of_one_link_arrive_in_order(transport, peer):
    inbox = Inbox()
    port = await peer.listen("127.0.0.1", 0, inbox)
    link = await transport.connect(f"127.0.0.1:{port}")
    sent = [os.urandom(1 + i * 1000) for i in range(100)]
    answers = [await link.send(b"", frame) for frame in sent]
    assert await asyncio.gather(*answers) == [0] * 100
    assert inbox.frames == sent


async def test_many_senders_share_one_link_without_mixing_frames(transport, peer):
    inbox = Inbox()
    port = await peer.listen("127.0.0.1", 0, inbox)
    address = f"127.0.0.1:{port}"

    async def send(i: int) -> int:
        link = await transport.connect(address)
        return await (await link.send(bytes([i]), bytes([i]) * 200_000))

    assert await asyncio.gather(*(send(i) for i in range(60))) == [0] * 60
    assert sorted(inbox.frames) == [bytes([i]) * 200_001 for i in range(60)]
    assert len({id(await transport.connect(address)) for _ in range(3)}) == 1


async def test_a_sender_waits_when_the_receiver_does_not_answer(transport, peer):
    inbox = Inbox()
    inbox.hold = asyncio.Event()
    port = await peer.listen("127.0.0.1", 0, inbox)
    link = await transport.connect(f"127.0.0.1:{port}")
    answers = [await link.send(b"", b"x") for _ in range(tcp.WINDOW_FRAMES)]
    blocked = asyncio.create_task(link.send(b"", b"y"))
    await until(lambda: len(inbox.frames) == tcp.WINDOW_FRAMES)
    assert not blocked.done()
    inbox.hold.set()
    await asyncio.gather(*answers, await blocked)
    assert inbox.frames[-1] == b"y"


async def test_a_cancelled_send_does_not_spoil_the_link_for_others(transport, peer):
    inbox = Inbox()
    port = await peer.listen("127.0.0.1", 0, inbox)
    link = await transport.connect(f"127.0.0.1:{port}")
    payload = bytes(64_000_000)
    task = asyncio.create_task(link.send(b"big", payload))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await (await link.send(b"", b"after")) == 0
    assert inbox.frames[-1] == b"after"


async def test_a_peer_that_dies_fails_the_frames_in_flight_and_the_next_connect_is_new(
    transport, peer
):
    inbox = Inbox()
    inbox.hold = asyncio.Event()
    port = await peer.listen("127.0.0.1", 0, inbox)
    address = f"127.0.0.1:{port}"
    link = await transport.connect(address)
    answer = await link.send(b"", b"lost")
    await until(lambda: inbox.frames)
    await peer.close()
    with pytest.raises(HandoffError, match="broke"):
        await answer
    assert link.closed
    with pytest.raises(HandoffError):
        await link.send(b"", b"more")
    with pytest.raises(HandoffError, match="cannot connect"):
        await transport.connect(address)

    reborn, inbox = TcpTransport(), Inbox()
    await reborn.listen("127.0.0.1", port, inbox)
    again = await transport.connect(address)
    assert again is not link
    assert await (await again.send(b"", b"found")) == 0
    assert inbox.frames == [b"found"]
    await reborn.close()


async def test_a_probe_brings_the_same_bytes_back(transport, peer):
    inbox = Inbox()
    port = await peer.listen("127.0.0.1", 0, inbox)
    assert 0 < await transport.probe(f"127.0.0.1:{port}") < 5
    assert inbox.frames == []


async def test_a_probe_of_a_port_that_does_not_talk_fails(transport):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(HandoffError, match=r"did not answer a probe in 0\.2 s"):
            await transport.probe(f"127.0.0.1:{port}", timeout_s=0.2)


async def test_a_frame_over_the_limit_is_refused_on_both_sides(peer):
    inbox = Inbox()
    small = TcpTransport(max_frame_bytes=1000)
    port = await small.listen("127.0.0.1", 0, inbox)
    link = await peer.connect(f"127.0.0.1:{port}")
    answer = await link.send(b"", bytes(1001))
    with pytest.raises(HandoffError, match="broke"):
        await answer
    assert inbox.frames == []
    own = await small.connect(f"127.0.0.1:{port}")
    with pytest.raises(HandoffError, match="over the transport's 1000"):
        await own.send(b"", bytes(1001))
    await small.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        struct.pack("<4sBBHQQ", b"BTCP", 1, 1, 0, 1, 2**63),
        struct.pack("<4sBBHQQ", b"BTCP", 9, 1, 0, 1, 4),
        struct.pack("<4sBBHQQ", b"BTCP", 1, 2, 0, 1, 0),
        struct.pack("<4sBBHQQ", b"BTCP", 1, 3, 0, 1, 2**20),
    ],
    ids=["http", "huge", "version", "answer", "huge-probe"],
)
async def test_a_stranger_is_cut_off_and_others_are_served_on(transport, peer, garbage):
    inbox = Inbox()
    port = await peer.listen("127.0.0.1", 0, inbox)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(garbage)
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionResetError):  # a reset says the same
            assert await reader.read() == b""
    writer.close()
    link = await transport.connect(f"127.0.0.1:{port}")
    assert await (await link.send(b"", b"fine")) == 0
    assert inbox.frames == [b"fine"]


async def test_a_port_in_use_is_refused_with_the_remedy(transport):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HandoffError, match="choose another --data-port"):
            await transport.listen("127.0.0.1", port, Inbox())


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:0", "host:70000", "h:1x"])
async def test_a_malformed_address_is_refused(transport, address):
    with pytest.raises(HandoffError, match="not an address"):
        await transport.connect(address)
