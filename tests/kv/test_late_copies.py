"""A device whose copies come late, out of the engine's turns: over real sockets and to a real store
go the bytes that the pages held, no turn waits for them, and one that fails harms no other."""

import threading

import pytest

from baton.conformance.late import LateBus
from common.kv.connectors.handoff import HandoffReceiver
from common.kv.connectors.store import StoreConnector, StoreSettings
from common.kv.handoff import HandoffPolicy, PrefillCandidates
from tests.kv.fake_store import FakeStore
from tests.kv.support import CARD, LAYOUT, PrefillWorker, Worker, prompt_of, until

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("one_layer_a_frame")]


@pytest.fixture
def bus():
    bus = LateBus()
    yield bus
    bus.open.set()


@pytest.fixture
def decode():
    connector = HandoffReceiver(
        incarnation="decode-1",
        model_card=lambda: CARD,
        advertise_host="127.0.0.1",
        data_host="127.0.0.1",
        policy=HandoffPolicy(min_tokens=8, lease_s=20.0, stall_timeout_s=20.0),
    )
    connector.listen()
    # What comes in is a device's too.
    worker = Worker(connector, num_blocks=256, bus=LateBus())
    yield worker
    worker.close()


@pytest.fixture
def prefill_of(bus):
    """Makes prefill workers with little room whose pages are behind the bus."""
    made = []

    def make(**fields):
        made.append(PrefillWorker(bus=bus, **{"num_blocks": 24, **fields}))
        return made[-1]

    yield make
    bus.open.set()
    for worker in made:
        worker.stop()


def ask(decode: Worker, prefill: PrefillWorker, count: int, length: int = 200) -> None:
    for i in range(count):
        prompt = prompt_of(length, seed=i)
        decode.submit(f"r{i}", prompt, transfer=PrefillCandidates((prefill.address,)))


# Handing over --------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True])
def test_steps_go_on_while_no_copy_has_come_and_pages_given_away_are_sent_as_they_were(
    bus, prefill_of, decode, ahead
):
    prefill = prefill_of(ahead=ahead)
    bus.open.clear()
    ask(decode, prefill, 4)  # 52 blocks in turn in 23 pages
    worker = prefill.worker
    decode.turns_until(lambda: worker.computed_tokens == 4 * 199 and worker.scheduler.idle)
    assert worker.blocks.num_used == 0
    assert prefill.sender._staged_bytes == 52 * LAYOUT.block_bytes
    assert "handoff_blocks_received" not in decode.connector.take_events()
    worker.cache.fill_(0xFF)
    bus.open.set()
    for i in range(4):
        decode.run(f"r{i}")  # its step checks every byte that attention reads
    assert decode.computed_tokens == 4
    until(lambda: prefill.sender._staged_bytes == 0)
    assert (bus.left, bus.waited) == (4 * 4 * LAYOUT.num_layers, 0)


@pytest.mark.parametrize("size", [8, 32])
def test_late_copies_are_cut_for_blocks_of_another_size(bus, prefill_of, decode, size):
    prefill = prefill_of(block_size=size, num_blocks=384 // size)
    bus.open.clear()
    ask(decode, prefill, 3)
    decode.turns_until(lambda: prefill.worker.computed_tokens == 3 * 199)
    until(lambda: prefill.worker.scheduler.idle)
    prefill.worker.cache.fill_(0xFF)
    bus.open.set()
    for i in range(3):
        decode.run(f"r{i}")
    assert decode.computed_tokens == 3
    assert bus.waited == 0


def test_copies_under_way_take_room_and_what_finds_none_stays_in_its_pages(bus, prefill_of, decode):
    prefill = prefill_of()
    prefill.sender._max_staged_bytes = 3 * LAYOUT.block_bytes
    bus.open.clear()
    ask(decode, prefill, 1)
    decode.turns_until(lambda: prefill.worker.computed_tokens == 199)
    assert prefill.sender._staged_bytes == 3 * LAYOUT.block_bytes
    assert prefill.worker.blocks.num_used == 13
    bus.open.set()
    decode.run("r0")
    assert decode.computed_tokens == 1
    until(prefill.worker.idle)
    until(lambda: prefill.sender._staged_bytes == 0)


def test_a_copy_that_fails_ends_its_own_handoff_and_no_other(bus, prefill_of, decode):
    prefill = prefill_of()
    bus.open.clear()
    ask(decode, prefill, 3)
    decode.turns_until(lambda: prefill.worker.computed_tokens == 3 * 199)
    bus.breaks = 1
    bus.open.set()
    for i in range(3):
        assert decode.run(f"r{i}").finish_reason == "length"
    events = decode.connector.take_events()
    assert (events["handoffs_failed"], events["handoffs_completed"]) == (1, 2)
    assert decode.computed_tokens == 200 + 2
    until(prefill.worker.idle)
    until(lambda: prefill.sender._staged_bytes == 0)


def test_copies_that_cannot_even_be_asked_for_take_no_room(bus, prefill_of, decode):
    """The device has no memory for what a step's second layer would gather."""
    prefill = prefill_of()
    leave = bus.leave

    def full(rows):
        if bus.left == 1:
            bus.leave = leave
            raise RuntimeError("out of memory")
        return leave(rows)

    bus.leave = full
    ask(decode, prefill, 1)
    decode.run("r0")
    assert decode.computed_tokens == 200
    until(prefill.worker.idle)
    until(lambda: prefill.sender._staged_bytes == 0)
    decode.submit("next", prompt_of(200, seed=9), transfer=PrefillCandidates((prefill.address,)))
    decode.run("next")
    assert decode.computed_tokens == 200 + 1


def test_an_abort_while_copies_are_under_way_gives_their_room_back_when_they_are_done(
    bus, prefill_of, decode
):
    prefill = prefill_of(num_blocks=40)
    prefill.sender._max_staged_bytes = 3 * LAYOUT.block_bytes
    bus.open.clear()
    ask(decode, prefill, 2)
    # The first request's copies have taken all room, the second one's blocks wait in their pages.
    decode.turns_until(lambda: prefill.worker.computed_tokens == 2 * 199)
    left = bus.left
    decode.abort("r0")
    prefill.sender.forget(next(name for name in prefill.sender._jobs if name.startswith("r0")))
    until(lambda: prefill.worker.blocks.num_used == 13)
    assert (prefill.sender._staged_bytes, bus.left) == (3 * LAYOUT.block_bytes, left)
    bus.open.set()
    decode.run("r1")
    assert decode.computed_tokens == 1
    until(prefill.worker.idle)
    until(lambda: prefill.sender._staged_bytes == 0)


# Saving --------------------------------------------------------------------------------------


@pytest.fixture
def fake():
    fake = FakeStore()
    yield fake
    fake.stop()


@pytest.fixture
def saves(bus, fake):
    """Makes workers that save to the store, with pages behind the bus."""
    made = []

    def make(**settings):
        chosen = StoreSettings(lookup_timeout_s=5.0, **settings)
        made.append(Worker(StoreConnector([fake.address], settings=chosen), bus=bus))
        return made[-1]

    yield make
    bus.open.set()
    for worker in made:
        worker.close()


def test_blocks_are_saved_as_they_were_when_no_step_waited_for_their_copies(bus, fake, saves):
    worker, prompt = saves(), prompt_of(200)
    bus.open.clear()
    worker.submit("a", prompt, max_tokens=20)
    worker.run("a")
    assert worker.idle()
    assert len(fake._store) == 0
    worker.cache.fill_(0xFF)
    worker.blocks.forget()
    bus.open.set()
    until(lambda: len(fake._store) == 13)
    second = saves()
    second.submit("b", prompt)
    assert second.run("b").cached_tokens == 192  # its step checked every byte
    assert second.computed_tokens == 8
    assert bus.waited == 0


def test_saves_that_find_no_room_beside_copies_under_way_are_dropped_and_counted(bus, fake, saves):
    worker = saves(max_saving_bytes=4 * LAYOUT.block_bytes)
    bus.open.clear()
    worker.submit("a", prompt_of(320))
    worker.run("a")
    assert worker.connector.take_events()["store_saves_dropped"] == 16
    bus.open.set()
    until(lambda: len(fake._store) == 4)
    until(lambda: worker.connector._saving_in == worker.connector._saving_out)


def test_blocks_whose_copy_failed_are_dropped_counted_and_saved_another_time(bus, fake, saves):
    worker, prompt, events = saves(), prompt_of(64), {}
    bus.breaks = 1

    def dropped():
        worker.turn()
        for name, count in worker.connector.take_events().items():
            events[name] = events.get(name, 0) + count
        return events.get("store_saves_dropped")

    worker.submit("a", prompt)
    worker.run("a")
    assert until(dropped) == 4
    assert len(fake._store) == 0
    worker.blocks.forget()
    worker.submit("b", prompt)
    worker.run("b")
    until(lambda: len(fake._store) == 4)


def test_a_worker_that_ends_saves_what_is_still_copied_and_ends_the_thread(bus, fake, saves):
    worker = saves()
    bus.open.clear()
    worker.submit("a", prompt_of(160))
    worker.run("a")
    opener = threading.Timer(0.1, bus.open.set)
    opener.start()
    worker.close()
    opener.join()
    assert len(fake._store) == 10
    assert not worker.copies._thread.is_alive()
