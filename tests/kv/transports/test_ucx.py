"""What only the ucx transport promises, and the traps of the library it uses."""

import asyncio
import contextlib
import json
import os
import time

import pytest

from common.errors import HandoffError
from common.kv.transports import DataPlane, plane
from common.kv.transports.door import NONCE_BYTES
from common.kv.transports.ucx import UcxTransport, missing
from tests.kv.transports.support import Inbox, Process, cpu_seconds, ends, need, python

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def pair():
    need("ucx")
    async with ends("ucx") as pair:
        yield pair


def test_importing_the_transports_does_not_load_ucx():
    code = "import common.kv.transports, sys; sys.exit('ucxx' in sys.modules)"
    assert python(code).returncode == 0


def test_without_the_package_ucx_is_not_offered_and_the_log_says_why():
    code = (
        "import sys; sys.modules['ucxx'] = None\n"
        "import importlib.util as u; u.find_spec = lambda name: None\n"
        "from common.kv.transports import DataPlane; print(list(DataPlane()._sides))"
    )
    done = python(code)
    assert done.stdout.splitlines()[-1] == "['shm']"
    assert "transport_unavailable" in done.stdout
    assert "ucxx-cu12" in done.stdout


async def test_between_machines_ucx_is_chosen_before_tcp(monkeypatch):
    need("ucx")
    monkeypatch.setattr(plane, "OPEN_S", 20.0)  # the library loads slowly on a busy machine
    receiver, sender = DataPlane(), DataPlane(["ucx", "tcp"])
    address = f"127.0.0.1:{await receiver.listen('127.0.0.1', 0, Inbox())}"
    link = await sender.connect(address)
    assert link.transport == "ucx"
    await link.close()
    assert (await sender.connect(address)).transport == "tcp"
    await sender.close()
    await receiver.close()


async def test_a_stranger_is_cut_off_before_ucx_hears_of_it(pair):
    receiver, sender = pair
    offer = await receiver.listen(Inbox())
    for garbage in (os.urandom(NONCE_BYTES), b"GET / HTTP/1.1\r\n\r\n", b""):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(offer["port"]))
        writer.write(garbage)
        writer.write_eof()
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionResetError):  # a reset says the same
                assert await reader.read() == b""
        writer.close()
    assert receiver.transport._ucx is None
    assert await (await sender.open(offer)).probe() > 0


async def test_a_sender_with_another_nonce_is_refused(pair):
    receiver, sender = pair
    offer = await receiver.listen(Inbox())
    with pytest.raises(HandoffError, match="no ucx link to"):
        await sender.open({**offer, "nonce": "00" * NONCE_BYTES})
    with pytest.raises(HandoffError, match="nonce makes no sense"):
        await sender.open({**offer, "nonce": "zz"})


async def test_a_transfer_is_not_held_up_by_missing_events(pair):
    """Blocking progress as the library does it can wait a second for an event that never comes."""
    receiver, sender = pair
    link = await sender.open(await receiver.listen(Inbox()))
    await link.probe()
    slowest = 0.0
    for size in (100_000, 1_000_000, 4_000_000) * 10:
        started = time.monotonic()
        await (await link.send(b"", bytes(size)))
        slowest = max(slowest, time.monotonic() - started)
        await asyncio.sleep(0.01)  # both sides go to sleep
    assert slowest < 0.9


async def test_waiting_for_an_answer_does_not_spin(pair):
    """The library's own wait, without its futures, is a loop that takes a whole core."""
    receiver, sender = pair
    inbox = Inbox()
    inbox.hold = asyncio.Event()
    link = await sender.open(await receiver.listen(inbox))
    await link.probe()
    answer = await link.send(b"", bytes(1_000_000))
    before = cpu_seconds()
    await asyncio.sleep(1.0)  # the time that is measured
    assert cpu_seconds() - before < 0.2
    inbox.hold.set()
    assert await answer == 0


async def test_a_receiver_that_is_stopped_costs_the_sender_no_core():
    need("ucx")
    peer = Process("receive", "ucx")
    sender = UcxTransport()
    link = await sender.open("127.0.0.1", json.loads(await peer.line()))
    await link.probe()
    peer.stop_running()
    send = asyncio.create_task(link.send(b"1234", bytes(30_000_000)))
    await asyncio.sleep(0.2)  # what was on its way
    before = cpu_seconds()
    await asyncio.sleep(1.0)  # the time that is measured
    assert cpu_seconds() - before < 0.3
    assert not send.done()
    peer.go_on()
    assert await (await send) == 0
    await link.close()
    await sender.close()
    peer.stop()


def test_a_process_forked_from_one_that_used_ucx_is_told_so_and_takes_tcp():
    need("ucx")
    done = python(
        "import asyncio, os, sys\n"
        "from common.kv.transports import DataPlane, plane\n"
        "plane.OPEN_S = 20.0\n"
        "from tests.kv.transports.support import Inbox\n"
        "async def used():\n"
        "    receiver, sender = DataPlane(), DataPlane(['ucx', 'tcp'])\n"
        "    port = await receiver.listen('127.0.0.1', 0, Inbox())\n"
        "    link = await sender.connect(f'127.0.0.1:{port}')\n"
        "    assert await (await link.send(b'', bytes(1_000_000))) == 0\n"
        "    await sender.close()\n"
        "    await receiver.close()\n"
        "    return link.transport\n"
        "assert asyncio.run(used()) == 'ucx'\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if asyncio.run(used()) == 'tcp' else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loaded before this process was forked" in done.stdout


async def test_links_are_made_and_closed_again_and_again(pair):
    receiver, sender = pair
    inbox = Inbox()
    offer = await receiver.listen(inbox)
    for number in range(8):
        link = await sender.open(offer)
        assert await (await link.send(b"", bytes([number]) * 100_000)) == 0
        await link.close()
    assert [frame[0] for frame in inbox.frames] == list(range(8))


def test_the_machine_says_whether_it_has_the_package():
    assert missing() is None or "ucxx-cu12" in missing()
