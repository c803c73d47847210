"""What holds for every connector, and for the loop that they run on."""

import asyncio
import inspect
import subprocess
import sys
import threading

import pytest

from common.errors import BatonError, HandoffError
from common.kv.connector import KVCaches, KVConnector
from common.kv.connectors.chain import ChainConnector
from common.kv.connectors.copies import HostCopies
from common.kv.connectors.handoff import HandoffReceiver, HandoffSender
from common.kv.connectors.store import StoreConnector
from common.kv.handoff import HandoffTarget
from common.kv.transports import TcpTransport
from common.rpc.loop import LoopThread
from tests.kv.store_process import ROOT
from tests.kv.support import BLOCK_SIZE, CARD, FINGERPRINT, LAYOUT, Worker, until

pytestmark = pytest.mark.timeout(60)


def make(kind: type[KVConnector]) -> KVConnector:
    if kind is HandoffReceiver:
        return HandoffReceiver(incarnation="d", model_card=lambda: CARD, advertise_host="127.0.0.1")
    if kind is StoreConnector:
        return StoreConnector(["127.0.0.1:1"])
    if kind is ChainConnector:
        return ChainConnector([make(StoreConnector), make(HandoffReceiver)])
    return kind()


KINDS = [KVConnector, HandoffReceiver, HandoffSender, StoreConnector, ChainConnector]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_method_has_the_signature_of_the_api(kind):
    for name, method in inspect.getmembers(KVConnector, inspect.isfunction):
        wanted = list(inspect.signature(method).parameters)
        assert list(inspect.signature(getattr(kind, name)).parameters) == wanted, name


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_requests_that_want_nothing_are_served_and_leave_nothing(kind):
    worker = Worker(make(kind))
    for i in range(3):
        worker.submit(f"r{i}", list(range(40 + i)), max_tokens=20)
    worker.submit("gone", [1] * 100)
    worker.turn()
    worker.abort("gone")
    for i in range(3):
        assert worker.run(f"r{i}").finish_reason == "length"
    assert worker.idle()
    worker.connector.shutdown()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_shutdown_ends_every_thread_that_the_connector_made(kind):
    before = set(threading.enumerate())
    connector = make(kind)
    cache = Worker(KVConnector()).cache
    connector.register_kv_caches(
        KVCaches(cache, LAYOUT, FINGERPRINT, lambda: None, HostCopies(cache, LAYOUT))
    )
    connector.shutdown()
    own = {t for t in set(threading.enumerate()) - before if t.name.startswith("baton")}
    assert own == set()


def test_the_kvstores_side_of_the_wire_imports_no_torch():
    code = "import common.kv.wire, common.kv.handoff, common.kv.transports, common.kv.keys, sys"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30).returncode == 0


def test_a_receiver_without_a_port_never_asks_for_prefill():
    from common.kv.handoff import PrefillCandidates

    worker = Worker(make(HandoffReceiver))
    worker.submit("r", [1] * 200, transfer=PrefillCandidates(("127.0.0.1:1",)))
    worker.run("r")
    assert worker.computed_tokens == 200
    worker.connector.shutdown()


def test_a_data_plane_that_cannot_be_reached_where_it_is_advertised_is_refused():
    receiver = HandoffReceiver(
        incarnation="d",
        model_card=lambda: CARD,
        advertise_host="127.0.0.2",
        data_host="127.0.0.1",
    )
    with pytest.raises(HandoffError, match="set --advertise-host"):
        receiver.listen()
    assert receiver.data_address == ""
    receiver.shutdown()


def target(address: str, **changes) -> HandoffTarget:
    fields = {"id": b"h" * 16, "incarnation": "d", "generation": 1, "first_block": 0}
    fields |= {"lease_ms": 5000, "block_size": BLOCK_SIZE, "data_address": address, **changes}
    return HandoffTarget(**fields)


class FakeReceiver:
    """A data plane that answers as it is told."""

    def __init__(self):
        self.loop = LoopThread("test-receiver")
        self.transport = TcpTransport()
        self.frames: list[bytes] = []
        self.answer = self.accept
        self.port = self.loop.run(self.transport.listen("127.0.0.1", 0, self.on_frame)).result(5)
        self.address = f"127.0.0.1:{self.port}"

    async def on_frame(self, frame: memoryview) -> int:
        self.frames.append(bytes(frame))
        return await self.answer(len(self.frames))

    async def accept(self, count: int) -> int:
        return 0

    def restart(self) -> None:
        """The process behind the port is another one."""

        async def again():
            await self.transport.close()
            self.transport = TcpTransport()
            await self.transport.listen("127.0.0.1", self.port, self.on_frame)

        self.loop.run(again()).result(5)

    def stop(self):
        self.loop.run(self.transport.close()).result(5)
        self.loop.close()


@pytest.fixture
def receiver():
    receiver = FakeReceiver()
    yield receiver
    receiver.stop()


@pytest.fixture
def sender():
    failures = []
    sender = HandoffSender(on_failure=lambda *failure: failures.append(failure))
    sender.failures = failures
    yield sender
    sender.shutdown()


def send(sender: HandoffSender, target: HandoffTarget, request_id: str = "r", tokens: int = 100):
    """Compute `tokens` tokens on a worker of its own and wait for the transfer's result."""
    worker = Worker(sender)
    future = sender.completion(request_id)
    worker.submit(request_id, [7] * tokens, prefill_tokens=tokens, transfer=target)
    worker.turns_until(future.done)
    worker.turns_until(worker.idle)
    return future.result()


def test_a_sender_counts_blocks_and_bytes(sender, receiver):
    result = send(sender, target(receiver.address))
    assert (result.blocks_sent, result.bytes_sent) == (7, 7 * LAYOUT.block_bytes)
    assert result.error is None
    assert sender.result("r") == result
    sender.forget("r")
    assert sender.result("r") is None


def test_a_link_whose_peer_was_replaced_is_made_anew(sender, receiver):
    send(sender, target(receiver.address), "a")
    receiver.restart()
    result = send(sender, target(receiver.address), "b")
    assert result.error is None
    assert result.blocks_sent == 7
    assert len(receiver.frames) == 4


def test_a_receiver_that_is_gone_is_an_error_of_the_transfer(sender):
    result = send(sender, target("127.0.0.1:1"))
    assert isinstance(result.error, HandoffError)
    assert result.blocks_sent == 0
    assert [request_id for request_id, _ in sender.failures] == ["r"]


def test_a_refusal_ends_the_transfer_and_names_the_reason(sender, receiver):
    async def refuse(count):
        return 8

    receiver.answer = refuse
    result = send(sender, target(receiver.address))
    assert "after_abort" in str(result.error)


def test_a_status_that_nobody_knows_is_a_refusal(sender, receiver):
    async def refuse(count):
        return 999

    receiver.answer = refuse
    assert "unknown_handoff" in str(send(sender, target(receiver.address)).error)


def test_a_receiver_that_never_answers_costs_no_more_than_the_lease(sender, receiver):
    async def never(count):
        await asyncio.Event().wait()

    receiver.answer = never
    result = send(sender, target(receiver.address, lease_ms=300))
    assert "the lease of 300 ms ended" in str(result.error)
    assert sender._staged_bytes == 0


def test_an_abort_ends_the_transfer_and_frees_the_blocks(sender, receiver):
    async def never(count):
        await asyncio.Event().wait()

    receiver.answer = never
    worker = Worker(sender, step_tokens=16)
    future = sender.completion("r")
    worker.submit("r", [7] * 500, prefill_tokens=500, transfer=target(receiver.address))
    worker.turns_until(lambda: receiver.frames)
    worker.abort("r")
    assert worker.blocks.num_used == 0
    assert future.result(5).error is not None
    worker.turns_until(worker.idle)
    assert sender._staged_bytes == 0


def test_forgetting_a_request_stops_its_transfer(sender, receiver):
    async def never(count):
        await asyncio.Event().wait()

    receiver.answer = never
    worker = Worker(sender)
    worker.submit("r", [7] * 100, prefill_tokens=100, transfer=target(receiver.address))
    worker.turns_until(lambda: receiver.frames)
    sender.forget("r")
    worker.turns_until(worker.idle)


def test_a_transfer_that_broke_is_not_begun_again_when_the_prompt_ends(sender, receiver):
    async def refuse(count):
        return 8

    receiver.answer = refuse
    worker = Worker(sender, step_tokens=16)
    future = sender.completion("r")
    worker.submit("r", [7] * 200, prefill_tokens=200, transfer=target(receiver.address))
    worker.turns_until(future.done)
    # The link's probe is answered after the frames that were on their way.
    sender._loop.run(sender.probe(receiver.address)).result(10)
    frames = len(receiver.frames)
    worker.run("r")
    worker.turns_until(worker.idle)
    sender._loop.run(sender.probe(receiver.address)).result(10)
    assert len(receiver.frames) == frames


def test_a_loop_thread_runs_coroutines_and_cancels_what_is_left_at_its_end():
    loop, ended = LoopThread("test"), []

    async def double(x):
        return 2 * x

    async def forever():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    assert loop.run(double(4)).result(5) == 8
    left = loop.run(forever())
    loop.run(double(1)).result(5)
    loop.close()
    loop.close()
    assert ended == [True]
    assert left.cancelled()
    assert loop.closed
    assert loop.call_soon(print) is False
    with pytest.raises(BatonError, match="closed"):
        loop.run(double(1))


def test_cancelling_a_future_of_a_loop_thread_cancels_its_task():
    loop, events = LoopThread("test"), []

    async def forever():
        events.append("began")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            events.append("cancelled")
            raise

    future = loop.run(forever())
    until(lambda: events)
    future.cancel()
    until(lambda: events == ["began", "cancelled"])
    loop.close()
