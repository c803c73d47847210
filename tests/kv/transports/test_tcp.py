"""The TCP transport over real sockets."""

import asyncio
import contextlib
import socket

import pytest

from common.errors import HandoffError
from common.kv.transports.frames import ANSWER, DATA, HEAD, MAGIC, OFFERS, PROBE, Head
from common.kv.transports.tcp import TcpTransport
from tests.kv.transports.support import Inbox, until

pytestmark = pytest.mark.timeout(30)


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


async def test_who_asks_for_one_address_shares_one_link(transport, peer):
    address = f"127.0.0.1:{await peer.listen('127.0.0.1', 0, Inbox())}"
    assert len({id(await transport.connect(address)) for _ in range(3)}) == 1


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


async def test_a_probe_of_a_port_that_does_not_talk_fails(transport):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(HandoffError, match=r"did not answer a test transfer in 0\.2 s"):
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
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        Head(DATA, 0, 1, 2**63).pack(),
        HEAD.pack(MAGIC, 9, DATA, 0, 1, 4, 0),
        Head(ANSWER, 0, 1, 0).pack(),
        Head(PROBE, 0, 1, 2**40).pack(),
        Head(OFFERS, 0, 1, 1).pack(),
        Head(77, 0, 1, 0).pack(),
    ],
    ids=["http", "huge", "version", "answer", "huge-probe", "offers-with-body", "kind"],
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
