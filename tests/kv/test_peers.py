"""Prefill workers are met before they are asked: by real calls, with real test transfers."""

import time

import pytest

from baton.cli.ports import any_free
from baton.v1 import worker_pb2
from common.errors import InvalidRequest, Unavailable
from common.kv.connectors.peers import PASS_OVER_S, Peer, Peers
from common.kv.connectors.prefill_call import GrpcPrefill
from common.kv.transports import DataPlane
from common.kv.wire import ENVELOPE_VERSION
from common.rpc.loop import LoopThread
from tests.kv.support import CARD, PrefillWorker, until

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def prefill():
    worker = PrefillWorker()
    yield worker
    worker.stop()


@pytest.fixture
def loop():
    loop = LoopThread("test-peers")
    yield loop
    loop.close()


@pytest.fixture
def data_address(loop):
    plane = DataPlane()

    async def drop(frame):
        return 4

    port = loop.run(plane.listen("127.0.0.1", 0, drop)).result(5)
    yield f"127.0.0.1:{port}"
    loop.run(plane.close()).result(5)


@pytest.fixture
def peers(loop, data_address):
    def introduce():
        return worker_pb2.MeetRequest(
            worker_id="d",
            incarnation="decode-1",
            data_address=data_address,
            model=CARD,
            frame_version=ENVELOPE_VERSION,
        )

    peers = Peers(GrpcPrefill(), introduce)
    yield peers
    loop.run(peers.close()).result(5)


def statuses(peers: Peers) -> dict[str, str]:
    return {peer.address: peer.status for peer in peers.describe()}


def test_a_worker_that_fits_is_met_by_a_test_transfer(loop, peers, prefill):
    loop.run(peers.meet(prefill.address)).result(10)
    assert statuses(peers) == {prefill.address: "met"}
    (met,) = prefill.meetings.describe()
    assert (met.status, met.incarnation) == ("met", "decode-1")
    assert met.test_transfer_ms > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 24),
        ("block_size", 2048),
        ("kv_dtype", "bf16"),
        ("block_bytes", 7),
        ("fingerprint", b"other"),
    ],
)
def test_a_worker_that_does_not_fit_is_refused_with_both_values_and_passed_over(
    loop, peers, prefill, field, value
):
    prefill.card = worker_pb2.ModelCard()
    prefill.card.CopyFrom(CARD)
    setattr(prefill.card, field, value)
    with pytest.raises(InvalidRequest) as caught:
        loop.run(peers.meet(prefill.address)).result(10)
    for each in (value, getattr(CARD, field)):
        assert (each.hex() if isinstance(each, bytes) else str(each)) in str(caught.value)
    assert caught.value.code == "model_mismatch"
    assert statuses(peers) == {prefill.address: "refused"}
    assert peers.in_order([prefill.address, "other:1"]) == ("other:1",)


def test_a_worker_whose_test_transfer_fails_is_not_met(loop, peers, prefill, data_address):
    refuse = Peers(GrpcPrefill(), lambda: peers._introduce())
    introduction = peers._introduce()
    introduction.data_address = f"127.0.0.1:{any_free()}"
    refuse._introduce = lambda: introduction
    with pytest.raises(Exception, match="cannot connect"):
        loop.run(refuse.meet(prefill.address)).result(10)
    assert statuses(refuse) == {prefill.address: "unreachable"}
    assert [peer.status for peer in prefill.meetings.describe()] == ["unreachable"]
    loop.run(refuse.close()).result(5)


def test_who_does_not_answer_comes_last_for_a_while(loop, peers, prefill):
    gone = f"127.0.0.1:{any_free()}"
    with pytest.raises(Unavailable):
        loop.run(peers.meet(gone)).result(10)
    assert peers.in_order([gone, prefill.address]) == (prefill.address, gone)
    long_ago = time.monotonic() - PASS_OVER_S
    peers._peers[gone] = Peer(gone, "unreachable", long_ago)
    assert peers.in_order([gone, prefill.address]) == (gone, prefill.address)


def test_a_prefill_worker_that_forgot_the_decode_worker_is_met_again_and_asked_again(
    loop, peers, prefill
):
    async def answer(request):
        return worker_pb2.PrefillResponse(blocks_sent=3)

    prefill.spoil = answer
    handoff = worker_pb2.Handoff(id=bytes(16), incarnation="decode-1", lease_ms=5000)
    request = worker_pb2.PrefillRequest(request_id="r", handoff=handoff)
    for _ in range(2):
        response = loop.run(peers.prefill(prefill.address, request, 5.0, ())).result(10)
        assert response.blocks_sent == 3
        prefill.meetings._met.clear()  # as after its restart
    assert len(prefill.calls) == 2


def test_the_first_meeting_waits_for_a_worker_to_come_up_and_gives_up_in_time(loop, peers):
    port = any_free()
    spec = f"127.0.0.1:{port}"
    started = time.monotonic()
    assert loop.run(peers.meet_first(spec, 0.6)).result(10) is False
    assert 0.6 <= time.monotonic() - started < 3
    assert loop.run(peers.meet_first("", 30)).result(10) is False  # alone, at once


def test_the_first_meeting_does_not_wait_for_one_that_does_not_fit(loop, peers, prefill):
    prefill.card = worker_pb2.ModelCard(block_size=1)
    assert loop.run(peers.meet_first(prefill.address, 30)).result(10) is False


def test_peers_are_met_in_the_background_as_they_come(loop, peers, prefill):
    loop.run(peers.keep_meeting(prefill.address))
    until(lambda: statuses(peers).get(prefill.address) == "met")
