"""What only the nixl transport promises, and the traps of the library it uses. Run by test_nixl.py
in a process without ucx."""

import asyncio
import contextlib
import json
import os
import time

import pytest
import xxhash

from baton.v1.transport_pb2 import MemoryRange, NixlSender
from common.errors import HandoffError
from common.kv.transports import DEFAULT_NAMES, DataPlane, frames, nixl, plane
from common.kv.transports.door import NONCE_BYTES, knock, read_message, send_message
from common.kv.transports.frames import DATA, Head
from common.kv.transports.nixl import STAGING_BYTES, NixlTransport
from tests.kv.transports.support import Inbox, Process, cpu_seconds, ends, need, until

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def pair():
    need("nixl")
    async with ends("nixl") as pair:
        yield pair


@pytest.fixture
def by_tcp(monkeypatch):
    """UCX as between machines without RDMA: the sender's agent has to answer every read."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")


async def test_nixl_is_used_where_it_is_named_and_not_by_default(monkeypatch):
    need("nixl")
    assert "nixl" not in DEFAULT_NAMES
    monkeypatch.setattr(plane, "OPEN_S", 20.0)  # the library loads slowly on a busy machine
    receiver, sender = DataPlane(["nixl", "tcp"]), DataPlane(["nixl", "tcp"])
    inbox = Inbox()
    address = f"127.0.0.1:{await receiver.listen('127.0.0.1', 0, inbox)}"
    link = await sender.connect(address)
    assert link.transport == "nixl"
    payload = os.urandom(3_000_000)
    assert await (await link.send(b"head", payload)) == 0
    assert inbox.frames == [b"head" + payload]
    await link.close()
    assert (await sender.connect(address)).transport == "tcp"
    await sender.close()
    await receiver.close()


async def test_a_stranger_is_cut_off_before_nixl_hears_of_it(pair, monkeypatch):
    receiver, sender = pair
    offer = await receiver.listen(Inbox())
    with monkeypatch.context() as patch:
        patch.setattr(nixl, "_make", lambda: pytest.fail("an agent was made for a stranger"))
        for garbage in (os.urandom(NONCE_BYTES), b"GET / HTTP/1.1\r\n\r\n", b""):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(offer["port"]))
            writer.write(garbage)
            writer.write_eof()
            async with asyncio.timeout(5):
                with contextlib.suppress(ConnectionResetError):  # a reset says the same
                    assert await reader.read() == b""
            writer.close()
    assert await (await sender.open(offer)).probe() > 0


async def test_a_sender_with_another_nonce_is_refused(pair):
    receiver, sender = pair
    offer = await receiver.listen(Inbox())
    with pytest.raises(HandoffError, match="no nixl link to"):
        await sender.open({**offer, "nonce": "00" * NONCE_BYTES})
    with pytest.raises(HandoffError, match="nonce makes no sense"):
        await sender.open({**offer, "nonce": "zz"})


def greeting(**changed: object) -> bytes:
    """Of a sender whose metadata is not NIXL's, unless told otherwise."""
    fields = {"agent": "a", "metadata": b"nixlSerDes|nonsense"}
    fields["staging"] = MemoryRange(address=4096, length=STAGING_BYTES)
    fields |= changed
    checksum = xxhash.xxh3_64_intdigest(fields["metadata"])
    return NixlSender(**{"metadata_checksum": checksum, **fields}).SerializeToString()


async def greet(offer: dict[str, str], said: bytes) -> None:
    """Say this instead of what a sender says."""
    async with knock("nixl", "127.0.0.1", offer) as (_, sock):
        await send_message(sock, said)
        await read_message(sock, 64)


@pytest.mark.parametrize(
    "said",
    [
        b"\xff\xff",
        b"",
        greeting(),
        greeting(metadata_checksum=1),
        greeting(staging=MemoryRange(address=4096, length=1)),
        greeting(staging=MemoryRange(address=2**64 - 1, length=STAGING_BYTES)),
        bytes(nixl.MAX_GREETING_BYTES + 1),
    ],
    ids=["text", "empty", "metadata", "checksum", "short", "far-out", "huge"],
)
async def test_a_greeting_that_makes_no_sense_is_refused_and_others_are_served_on(pair, said):
    receiver, sender = pair
    inbox = Inbox()
    offer = await receiver.listen(inbox)
    with pytest.raises(HandoffError, match="no nixl link to"):
        await greet(offer, said)
    link = await sender.open(offer)
    assert await (await link.send(b"", b"fine")) == 0
    assert inbox.frames == [b"fine"]


async def test_a_sender_that_brings_the_metadata_of_another_is_refused(pair):
    receiver, sender = pair
    offer = await receiver.listen(Inbox())
    link = await sender.open(offer)
    said = NixlSender.FromString(link._agent.greeting())
    said.agent = "somebody else"
    with pytest.raises(HandoffError, match="no nixl link to"):
        await greet(offer, said.SerializeToString())
    assert await link.probe() > 0


@pytest.mark.parametrize(
    "head",
    [
        Head(DATA, 0, 9, 100, STAGING_BYTES - 99),
        Head(DATA, 0, 9, 100, 2**63),
        Head(DATA, 0, 9, 0, 0),
        Head(DATA, 0, 9, 2**63, 0),
    ],
    ids=["past-the-end", "far-out", "empty", "huge"],
)
async def test_a_frame_outside_of_the_staging_memory_ends_the_link(pair, head):
    receiver, sender = pair
    inbox = Inbox()
    link = await sender.open(await receiver.listen(inbox))
    await link._write(head)
    await until(lambda: link.closed)
    assert inbox.frames == []


async def test_a_frame_on_one_that_is_not_answered_ends_the_link(pair):
    receiver, sender = pair
    inbox = Inbox()
    inbox.hold = asyncio.Event()
    link = await sender.open(await receiver.listen(inbox))
    answer = await link.send(b"", bytes(200_000))
    await until(lambda: inbox.frames)
    await link._write(Head(DATA, 0, 9, 100, 199_000))
    with pytest.raises(HandoffError, match="broke"):
        await answer
    assert len(inbox.frames) == 1


async def test_a_frame_may_take_the_place_of_one_whose_answer_is_only_just_out(pair, monkeypatch):
    receiver, sender = pair
    inbox = Inbox()
    link = await sender.open(await receiver.listen(inbox))
    await link.probe()
    send_all = frames.send_all

    async def slowly(loop, sock, head, body=b""):
        await send_all(loop, sock, head, body)
        await asyncio.sleep(0.05)  # slowly

    monkeypatch.setattr(frames, "send_all", slowly)
    for number in range(3):
        assert await (await link.send(bytes([number]), bytes(200_000))) == 0
    assert [frame[0] for frame in inbox.frames] == [0, 1, 2]


async def test_a_frame_whose_sender_has_left_is_not_handled(pair, monkeypatch):
    """UCX may have copied it from memory that the sender had let go of."""
    receiver, sender = pair
    inbox = Inbox()
    link = await sender.open(await receiver.listen(inbox))
    await link.probe()
    read, reads = nixl._Agent.read, []

    def late(agent, start, length):
        done = asyncio.get_running_loop().create_future()
        reads.append((done, read(agent, start, length)))
        return done

    monkeypatch.setattr(nixl._Agent, "read", late)
    await link.send(b"", bytes(1_000_000))
    await until(lambda: reads)
    await reads[0][1]
    link._fail("it leaves")  # and the receiver has not looked at its connection yet
    reads[0][0].set_result(None)
    await until(lambda: len(receiver.transport._door) == 0)
    assert inbox.frames == []


async def test_frames_wait_for_room_in_the_staging_memory_and_are_sent_in_order(pair):
    receiver, sender = pair
    inbox = Inbox()
    inbox.hold = asyncio.Event()
    link = await sender.open(await receiver.listen(inbox))
    size = STAGING_BYTES // 4
    sends = [asyncio.create_task(link.send(bytes([n]), bytes(size))) for n in range(6)]
    await until(lambda: len(inbox.frames) == 3)
    assert not any(send.done() for send in sends[3:])
    inbox.hold.set()
    answers = await asyncio.gather(*sends)
    assert await asyncio.gather(*answers) == [0] * 6
    assert [frame[0] for frame in inbox.frames] == list(range(6))


async def test_a_frame_larger_than_the_staging_memory_comes_by_the_connection(pair):
    receiver, sender = pair
    inbox = Inbox()
    link = await sender.open(await receiver.listen(inbox))
    payload = os.urandom(1 << 20) * 66
    assert len(payload) > STAGING_BYTES
    between = os.urandom(500_000)
    answers = [await link.send(b"", p) for p in (b"before", payload, between, b"after")]
    assert await asyncio.gather(*answers) == [0] * 4
    assert inbox.frames == [b"before", payload, between, b"after"]


async def test_reads_that_the_sender_has_to_answer_arrive_intact_and_soon(by_tcp, pair):
    receiver, sender = pair
    inbox = Inbox()
    link = await sender.open(await receiver.listen(inbox))
    await link.probe()
    slowest = 0.0
    for size in (100_000, 1_000_000, 4_000_000) * 5:
        payload = os.urandom(size)
        started = time.monotonic()
        await (await link.send(b"", payload))
        slowest = max(slowest, time.monotonic() - started)
        assert inbox.frames.pop() == payload
        await asyncio.sleep(0.01)  # both sides go to sleep
    assert slowest < 0.9


async def test_waiting_for_an_answer_does_not_spin(by_tcp, pair):
    receiver, sender = pair
    inbox = Inbox()
    inbox.hold = asyncio.Event()
    link = await sender.open(await receiver.listen(inbox))
    await link.probe()
    answer = await link.send(b"", bytes(1_000_000))
    await until(lambda: inbox.frames)
    before = cpu_seconds()
    await asyncio.sleep(1.0)  # the time that is measured
    assert cpu_seconds() - before < 0.1
    inbox.hold.set()
    assert await answer == 0


async def test_a_sender_that_is_stopped_costs_the_receiver_no_core(by_tcp, pair):
    receiver, _ = pair
    inbox = Inbox()
    peer = Process("send", "nixl", json.dumps(await receiver.listen(inbox)), "60", "20000000")
    assert await peer.line() == "sending"
    await until(lambda: inbox.frames)
    peer.stop_running()
    await asyncio.sleep(0.3)  # what was on its way
    held, before = len(inbox.frames), cpu_seconds()
    await asyncio.sleep(1.0)  # the time that is measured
    assert cpu_seconds() - before < 0.2
    assert len(inbox.frames) == held < 60
    peer.go_on()
    assert await peer.line() == "sent"
    assert [frame[:4] for frame in inbox.frames] == [n.to_bytes(4, "big") for n in range(60)]
    peer.stop()


async def test_a_receiver_that_is_stopped_costs_the_sender_no_core(by_tcp):
    need("nixl")
    peer = Process("receive", "nixl")
    sender = NixlTransport()
    link = await sender.open("127.0.0.1", json.loads(await peer.line()))
    await link.probe()
    peer.stop_running()
    answer = await link.send(b"1234", bytes(30_000_000))
    await asyncio.sleep(0.2)  # what was on its way
    before = cpu_seconds()
    await asyncio.sleep(1.0)  # the time that is measured
    assert cpu_seconds() - before < 0.2
    assert not answer.done()
    peer.go_on()
    assert await answer == 0
    await link.close()
    await sender.close()
    peer.stop()
