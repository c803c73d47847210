"""How the data plane chooses, over real links between real ends."""

import asyncio
import os

import pytest

from common.errors import ConfigError, HandoffError
from common.kv.transports import DataPlane, TcpTransport, parse_names, plane
from common.kv.transports.shm import ShmTransport
from tests.kv.transports.support import Inbox, Process, mappings, until

pytestmark = pytest.mark.timeout(60)


def plane_of(*names: str, shm: ShmTransport | None = None) -> DataPlane:
    """shm and tcp unless told otherwise; `shm` may be another one than the real."""
    made = DataPlane(names or ("shm", "tcp"))
    if shm is not None:
        made._sides["shm"] = shm
    return made


class Ends:
    """A receiver and a sender; `address` is the receiver's."""

    def __init__(self, receiver: DataPlane | TcpTransport, sender: DataPlane):
        self.receiver, self.sender = receiver, sender
        self.inbox = Inbox()
        self.address = ""

    async def __aenter__(self):
        self.address = f"127.0.0.1:{await self.receiver.listen('127.0.0.1', 0, self.inbox)}"
        return self

    async def __aexit__(self, *_):
        await self.sender.close()
        await self.receiver.close()

    async def restart(self, receiver: DataPlane) -> None:
        """Another process behind the same address."""
        port = int(self.address.rpartition(":")[2])
        await self.receiver.close()
        self.receiver = receiver
        await self.receiver.listen("127.0.0.1", port, self.inbox)

    async def send(self, payload: bytes = b"x") -> str:
        """Send one frame; the transport it took."""
        link = await self.sender.connect(self.address)
        assert await (await link.send(b"", payload)) == 0
        assert self.inbox.frames.pop() == payload
        assert self.sender.links() == {self.address: link.transport}
        return link.transport


class Flaky(ShmTransport):
    """Shared memory whose links work in tests `good` times more, and bring changed bytes after."""

    good = 0

    async def open(self, host, offer):
        link = await super().open(host, offer)
        if self.good == 0:
            carry = link._carry

            async def spoil(kind, sequence, header, body):
                await carry(kind, sequence, header, memoryview(os.urandom(len(body))))

            link._carry = spoil
        else:
            self.good -= 1
        return link


async def test_on_one_machine_shared_memory_is_chosen():
    async with Ends(DataPlane(), DataPlane()) as ends:
        assert await ends.send() == "shm"
        assert await ends.sender.connect(ends.address) is await ends.sender.connect(ends.address)
        assert ends.receiver.take_events() == {
            "transport_frames_received_shm": 1,
            "transport_bytes_received_shm": 1,
        }
        assert ends.receiver.take_events() == {}
    assert mappings() == 0


async def test_a_sender_that_does_not_see_the_nonce_takes_tcp(tmp_path):
    async with Ends(plane_of(), plane_of(shm=ShmTransport(tmp_path))) as ends:
        assert await ends.send() == "tcp"
        assert ends.sender.take_events() == {"transport_failed_shm": 1}


async def test_a_receiver_that_has_only_tcp_gets_tcp():
    async with Ends(TcpTransport(), plane_of()) as ends:
        assert await ends.send() == "tcp"


async def test_a_receiver_that_cannot_offer_shared_memory_still_listens(tmp_path):
    async with Ends(plane_of(shm=ShmTransport(tmp_path / "no")), plane_of()) as ends:
        assert await ends.send() == "tcp"


async def test_the_setting_restricts_what_is_used():
    async with Ends(plane_of(), plane_of("tcp")) as ends:
        assert await ends.send() == "tcp"
    async with Ends(plane_of("tcp"), plane_of("shm")) as ends:
        with pytest.raises(HandoffError, match=r"no transport to .* works: shm: not offered"):
            await ends.sender.connect(ends.address)


async def test_the_setting_gives_the_order():
    async with Ends(plane_of(), plane_of("tcp", "shm")) as ends:
        assert await ends.send() == "tcp"


async def test_a_transport_that_changes_bytes_fails_its_test_and_is_not_used():
    async with Ends(plane_of(), plane_of(shm=Flaky())) as ends:
        assert await ends.send() == "tcp"
        assert ends.sender.take_events() == {"transport_failed_shm": 1}
    assert mappings() == 0


async def test_a_link_that_breaks_is_replaced_by_the_next_transport():
    async with Ends(plane_of(), plane_of()) as ends:
        assert await ends.send() == "shm"
        await (await ends.sender.connect(ends.address)).close()
        assert ends.sender.links() == {}
        assert await ends.send() == "tcp"
        assert await ends.send() == "tcp"


async def test_a_better_transport_is_tried_again_after_a_pause_beside_the_traffic(monkeypatch):
    monkeypatch.setattr(plane, "FIRST_PAUSE_S", 0.05)
    async with Ends(plane_of(), plane_of()) as ends:
        assert await ends.send() == "shm"
        await (await ends.sender.connect(ends.address)).close()
        assert await ends.send() == "tcp"
        await asyncio.sleep(0.06)  # the pause
        lower = await ends.sender.connect(ends.address)
        await until(lambda: ends.sender.links() == {ends.address: "shm"})
        assert await ends.send() == "shm"
        assert await (await lower.send(b"", b"y")) == 0


async def test_a_transport_that_keeps_failing_is_left_alone_for_longer_and_longer(monkeypatch):
    monkeypatch.setattr(plane, "FIRST_PAUSE_S", 0.01)
    flaky = Flaky()
    async with Ends(plane_of(), plane_of(shm=flaky)) as ends:
        assert await ends.send() == "tcp"
        peer = ends.sender._peers[ends.address]
        pauses = [peer.pauses_s["shm"]]
        for _ in range(3):
            await asyncio.sleep(pauses[-1] + 0.01)  # the pause
            await ends.sender.connect(ends.address)
            await until(lambda: peer.pauses_s["shm"] > pauses[-1])
            pauses.append(peer.pauses_s["shm"])
            assert await ends.send() == "tcp"
        assert pauses == pytest.approx([0.01, 0.02, 0.04, 0.08])


async def test_another_process_behind_the_address_starts_with_a_clean_record():
    async with Ends(plane_of(), plane_of()) as ends:
        assert await ends.send() == "shm"
        await (await ends.sender.connect(ends.address)).close()
        assert await ends.send() == "tcp"
        await ends.restart(plane_of())
        await until(lambda: ends.sender.links() == {})
        assert await ends.send() == "shm"


async def test_a_peer_that_is_gone_is_an_error_and_found_again_when_it_is_back():
    async with Ends(plane_of(), plane_of()) as ends:
        assert await ends.send() == "shm"
        await ends.receiver.close()
        await until(lambda: ends.sender.links() == {})
        with pytest.raises(HandoffError, match="cannot connect"):
            await ends.sender.connect(ends.address)
        await ends.restart(plane_of())
        assert await ends.send() == "shm"


async def test_a_peer_killed_and_started_again_under_its_address_is_used_again():
    peer = Process("receive", "plane")
    sender = plane_of()
    address = (await peer.line()).strip('"')
    link = await sender.connect(address)
    assert link.transport == "shm"
    answer = await link.send(b"hold", bytes(1000))
    await peer.line()
    peer.kill()
    with pytest.raises(HandoffError, match="broke"):
        await answer
    reborn = Process("receive", "plane", address.rpartition(":")[2])
    assert (await reborn.line()).strip('"') == address
    link = await sender.connect(address)
    assert link.transport == "shm"
    assert await (await link.send(b"new ", b"")) == 0
    await sender.close()
    reborn.stop()


async def test_a_test_transfer_goes_over_the_link_that_data_takes():
    async with Ends(plane_of(), plane_of()) as ends:
        assert 0 < await ends.sender.probe(ends.address) < 5
        assert ends.sender.links() == {ends.address: "shm"}
        link = await ends.sender.connect(ends.address)
        assert await ends.sender.probe(ends.address) > 0
        assert await ends.sender.connect(ends.address) is link
        assert ends.inbox.frames == []


async def test_a_transport_that_does_not_open_in_time_is_passed_over(monkeypatch):
    class Slow(ShmTransport):
        async def open(self, host, offer):
            await asyncio.Event().wait()

    monkeypatch.setattr(plane, "OPEN_S", 0.1)
    async with Ends(plane_of(), plane_of(shm=Slow())) as ends:
        assert await ends.send() == "tcp"
        assert ends.sender.take_events() == {"transport_failed_shm": 1}


async def test_many_who_ask_at_once_share_one_link():
    async with Ends(plane_of(), plane_of()) as ends:
        links = await asyncio.gather(*(ends.sender.connect(ends.address) for _ in range(20)))
        assert len({id(link) for link in links}) == 1


@pytest.mark.parametrize(
    "told", [b"no json", b"[]", b'{"offers": 3}', b'{"offers": {"shm": 3}}', b"\xff"]
)
async def test_offers_that_make_no_sense_are_an_error_and_no_crash(told):
    receiver, sender = TcpTransport(), plane_of()
    address = f"127.0.0.1:{await receiver.listen('127.0.0.1', 0, Inbox(), told)}"
    with pytest.raises(HandoffError, match="offers cannot be read"):
        await sender.connect(address)
    await sender.close()
    await receiver.close()


async def test_offers_of_a_later_version_are_left_out():
    told = b'{"instance": "i", "offers": {"teleport": {"to": "x"}, "shm": {"folder": 3}}}'
    receiver, sender = TcpTransport(), plane_of()
    address = f"127.0.0.1:{await receiver.listen('127.0.0.1', 0, Inbox(), told)}"
    assert (await sender.connect(address)).transport == "tcp"
    await sender.close()
    await receiver.close()


def test_the_setting_is_read_in_order_and_checked():
    assert parse_names("shm, tcp") == ("shm", "tcp")
    assert parse_names("tcp") == ("tcp",)
    for wrong in ("", "tcp,tcp", "tcp,carrier-pigeon", ","):
        with pytest.raises(ConfigError, match="list some of shm"):
            parse_names(wrong)
