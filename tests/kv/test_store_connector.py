"""Prompts whose blocks a kvstore has, and what happens when it is slow, wrong or gone."""

import asyncio
import time

import pytest

from baton.v1 import kvstore_pb2
from common.kv.connectors import store_client
from common.kv.connectors.store import StoreConnector, StoreSettings
from common.kv.wire import BlockRange, encode_block
from tests.kv.fake_store import FakeStore
from tests.kv.store_process import StoreProcess
from tests.kv.support import LAYOUT, Worker, prompt_of, until

pytestmark = pytest.mark.timeout(60)
PATIENT = StoreSettings(lookup_timeout_s=5.0)


@pytest.fixture(scope="module")
def store():
    with StoreProcess() as process:
        yield process


@pytest.fixture
def worker_of():
    """Makes workers, closes their connectors."""
    made = []

    def make(*addresses: str, settings: StoreSettings = PATIENT, **kwargs) -> Worker:
        made.append(Worker(StoreConnector(addresses, settings=settings), **kwargs))
        return made[-1]

    yield make
    for worker in made:
        worker.connector.shutdown()


@pytest.fixture
def fake():
    fake = FakeStore()
    yield fake
    fake.stop()


def fill(worker: Worker, fake: FakeStore, prompt: list[int]) -> None:
    """Have the store hold the prompt's blocks."""
    worker.submit("fill", prompt)
    worker.run("fill")
    until(lambda: len(fake._store) == len(prompt) // 16)


def test_blocks_that_one_worker_computed_another_loads(store, worker_of):
    first, second = worker_of(store.address), worker_of(store.address)
    prompt = prompt_of(200, seed=1)
    sequence = first.submit("a", prompt)
    first.run("a")
    until(lambda: store.lookup(*sequence.block_keys[:12]) == 12)
    second.submit("b", prompt)
    output = second.run("b")
    assert output.cached_tokens == 192
    assert second.computed_tokens == 8
    assert second.idle()
    events = second.connector.take_events()
    assert events["store_blocks_found"] == events["store_blocks_loaded"] == 12


def test_a_prompt_of_whole_blocks_still_computes_its_last_token(store, worker_of):
    first, second = worker_of(store.address), worker_of(store.address)
    prompt = prompt_of(64, seed=2)
    sequence = first.submit("a", prompt)
    first.run("a")
    until(lambda: store.lookup(*sequence.block_keys[:4]) == 4)
    second.submit("b", prompt)
    second.run("b")
    assert second.computed_tokens == 16


def test_blocks_that_were_generated_are_saved_too(store, worker_of):
    worker = worker_of(store.address)
    sequence = worker.submit("a", prompt_of(20, seed=3), max_tokens=45)
    worker.run("a")
    assert len(sequence.block_keys) == 4
    until(lambda: store.lookup(*sequence.block_keys) == 4)


def test_a_block_is_sent_once(fake, worker_of):
    worker, other = worker_of(fake.address), worker_of(fake.address)
    prompt = prompt_of(100, seed=4)
    fill(worker, fake, prompt)
    other.submit("a", [*prompt[:96], 1, 2, 3])
    other.run("a")
    worker.submit("b", [*prompt, 5])
    worker.run("b")
    time.sleep(0.1)
    assert fake._store.counters.already_held == 0


def test_tenants_share_nothing(store, worker_of):
    first, second = worker_of(store.address), worker_of(store.address)
    prompt = prompt_of(100, seed=5)
    sequence = first.submit("a", prompt, tenant="one")
    first.run("a")
    until(lambda: store.lookup(*sequence.block_keys[:6]) == 6)
    second.submit("b", prompt, tenant="two")
    assert second.run("b").cached_tokens == 0


def test_workers_of_different_block_sizes_keep_their_blocks_apart(store, worker_of):
    prompt = prompt_of(100, seed=6)
    for size in (16, 32, 8):
        first, second = (worker_of(store.address, block_size=size) for _ in range(2))
        sequence, blocks = first.submit("a", prompt), 100 // size
        assert first.run("a").cached_tokens == 0
        until(lambda s=sequence, n=blocks: store.lookup(*s.block_keys[:n]) == n)
        second.submit("b", prompt)
        assert second.run("b").cached_tokens == blocks * size


def test_a_dead_store_is_a_miss_and_then_costs_nothing(worker_of):
    with StoreProcess() as process:
        worker = worker_of(process.address)
        worker.submit("a", prompt_of(100, seed=6))
        worker.run("a")
        process.kill()
        worker.submit("b", prompt_of(100, seed=7))
        assert worker.run("b").finish_reason == "length"
        began = time.monotonic()
        for i in range(20):
            worker.submit(f"c{i}", prompt_of(100, seed=8 + i))
            worker.run(f"c{i}")
        assert time.monotonic() - began < 5
        events = worker.connector.take_events()
        assert events["store_lookups_skipped"] >= 19
        assert events["store_saves_dropped"] > 0


def test_a_store_that_comes_back_is_used_again(worker_of, monkeypatch):
    monkeypatch.setattr(store_client, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(store_client, "LONGEST_PAUSE_S", 0.05)
    with StoreProcess() as process:
        worker = worker_of(process.address)
        worker.submit("a", prompt_of(100, seed=40))
        worker.run("a")
        process.kill()
    worker.submit("b", prompt_of(100, seed=41))
    worker.run("b")
    with StoreProcess(port=process.port) as again:
        numbers = iter(range(1000))

        def saved() -> bool:
            i = next(numbers)
            sequence = worker.submit(f"c{i}", prompt_of(100, seed=100 + i))
            worker.run(f"c{i}")
            return again.lookup(sequence.block_keys[0]) == 1

        until(saved, 15)


def test_a_store_that_comes_back_under_another_address_is_found(worker_of, monkeypatch):
    monkeypatch.setattr(store_client, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(store_client, "LONGEST_PAUSE_S", 0.05)
    where, asked = {"127.0.0.1"}, []

    async def resolve(spec: str) -> set[str]:  # a name server of this test's own
        asked.append(spec)
        return {f"{host}:{spec.rpartition(':')[2]}" for host in where}

    monkeypatch.setattr(store_client, "resolve", resolve)
    with StoreProcess() as process:
        worker = worker_of(f"store.test:{process.port}")
        sequence = worker.submit("a", prompt_of(100, seed=42))
        worker.run("a")
        until(lambda: process.lookup(*sequence.block_keys[:6]) == 6)
        assert len(asked) == 1
        process.kill()
    with StoreProcess(host="127.0.0.2", port=process.port) as again:
        where.clear()  # the name leads nowhere for a while
        worker.submit("b", prompt_of(100, seed=43))
        worker.run("b")
        where.add("127.0.0.2")
        numbers = iter(range(1000))

        def saved() -> bool:
            i = next(numbers)
            sequence = worker.submit(f"c{i}", prompt_of(100, seed=200 + i))
            worker.run(f"c{i}")
            return again.lookup(sequence.block_keys[0]) == 1

        until(saved, 15)
        worker.connector.take_events()
        found = len(asked)
        worker.submit("d", prompt_of(100, seed=44))
        worker.run("d")
        assert len(asked) == found  # a store that answers is not looked for
        assert worker.connector.take_events()["store_lookups"] == 1


def test_a_slow_lookup_is_a_miss_in_time(fake, worker_of):
    async def slow(request):
        await asyncio.sleep(30)

    fake.on_lookup = slow
    worker = worker_of(fake.address, settings=StoreSettings(lookup_timeout_s=0.25))
    began = time.monotonic()
    worker.submit("a", prompt_of(100, seed=9))
    assert worker.run("a").finish_reason == "length"
    assert 0.2 < time.monotonic() - began < 2
    assert worker.computed_tokens == 100


def test_a_store_that_has_less_than_it_said_costs_only_the_rest(fake, worker_of):
    prompt = prompt_of(200, seed=10)
    fill(worker_of(fake.address), fake, prompt)
    served = []

    async def stop_after_three(response):
        served.append(response)
        return response if len(served) <= 3 else None

    fake.on_get = stop_after_three
    worker = worker_of(fake.address)
    worker.submit("a", prompt)
    output = worker.run("a")
    assert output.cached_tokens == 48
    assert worker.computed_tokens == 152
    assert worker.connector.take_events()["store_blocks_lost"] == 9


def flip(frame: bytes) -> bytes:
    damaged = bytearray(frame)
    damaged[-5] ^= 8
    return bytes(damaged)


@pytest.mark.parametrize(
    "spoil",
    [
        flip,
        lambda frame: frame[:-1],
        lambda frame: b"",
        lambda frame: encode_block(
            b"x" * 16, BlockRange.whole(LAYOUT), 16, frame[-LAYOUT.block_bytes :]
        ),
        lambda frame: encode_block(
            frame[8:24], BlockRange(0, 1, 0, 2), 16, frame[-LAYOUT.block_bytes :]
        ),
        lambda frame: encode_block(
            frame[8:24], BlockRange.whole(LAYOUT), 15, frame[-LAYOUT.block_bytes :]
        ),
        lambda frame: encode_block(frame[8:24], BlockRange.whole(LAYOUT), 16, b"short"),
    ],
    ids=["bit", "truncated", "empty", "key", "range", "tokens", "size"],
)
def test_a_block_that_is_not_what_was_asked_for_is_computed_instead(fake, worker_of, spoil):
    prompt = prompt_of(100, seed=11)
    fill(worker_of(fake.address), fake, prompt)

    async def spoiled(response):
        return kvstore_pb2.GetBlocksResponse(frame=spoil(response.frame))

    fake.on_get = spoiled
    worker = worker_of(fake.address)
    worker.submit("a", prompt, max_tokens=20)
    worker.run("a")  # every step checks every byte that attention reads
    assert worker.computed_tokens == 119


def test_a_load_that_stalls_ends_in_time(fake, worker_of):
    prompt = prompt_of(100, seed=12)
    fill(worker_of(fake.address), fake, prompt)

    async def stall(response):
        await asyncio.sleep(30)

    fake.on_get = stall
    worker = worker_of(
        fake.address, settings=StoreSettings(lookup_timeout_s=5.0, load_timeout_s=0.3)
    )
    worker.submit("a", prompt)
    worker.run("a", 5)
    assert worker.computed_tokens == 100
    assert worker.idle()


def test_an_abort_while_loading_frees_the_blocks_and_late_ones_touch_no_page(fake, worker_of):
    prompt = prompt_of(100, seed=13)
    fill(worker_of(fake.address), fake, prompt)
    asked, release = [], asyncio.Event()

    async def hold(response):
        asked.append(response)
        await release.wait()
        return response

    fake.on_get = hold
    worker = worker_of(fake.address)
    worker.submit("a", prompt)
    worker.turns_until(lambda: asked)
    assert worker.blocks.num_used == 6
    worker.abort("a")
    assert worker.idle()
    fake.loop.call_soon(release.set)
    worker.submit("b", prompt_of(150, seed=14), max_tokens=20)
    worker.run("b")


def test_blocks_that_had_arrived_when_their_request_was_aborted_touch_no_page(fake, worker_of):
    prompt = prompt_of(100, seed=16)
    fill(worker_of(fake.address), fake, prompt)
    worker = worker_of(fake.address)
    worker.submit("a", prompt)
    worker.turns_until(lambda: worker.connector._loads)
    until(lambda: len(worker.connector._inbox) == 7)  # six blocks and the end
    worker.abort("a")
    worker.cache.fill_(170)
    worker.turn()
    assert bool((worker.cache == 170).all())
    assert worker.connector.take_events()["store_blocks_late"] == 6


def test_saves_that_find_no_room_are_dropped_and_counted(fake, worker_of):
    async def stall():
        await asyncio.sleep(2)

    fake.on_put = stall
    settings = StoreSettings(lookup_timeout_s=5.0, max_saving_bytes=4 * LAYOUT.block_bytes)
    worker = worker_of(fake.address, settings=settings)
    worker.submit("a", prompt_of(320, seed=15))
    worker.run("a")
    assert worker.connector.take_events()["store_saves_dropped"] == 16


def test_a_worker_that_ends_saves_what_still_waits_to_be_saved(fake, worker_of):
    async def stall():
        await asyncio.sleep(0.3)

    fake.on_put = stall
    worker = worker_of(fake.address)
    worker.submit("a", prompt_of(160, seed=16))
    worker.run("a")
    worker.connector.shutdown()
    assert len(fake._store) == 10


def test_a_chain_stays_on_one_of_several_stores(worker_of):
    fakes = [FakeStore() for _ in range(3)]
    addresses = [fake.address for fake in fakes]
    worker = worker_of(*addresses, num_blocks=512)
    for i in range(12):
        worker.submit(f"r{i}", prompt_of(64, seed=50 + i))
        worker.run(f"r{i}")
    until(lambda: sum(len(fake._store) for fake in fakes) == 48)
    assert all(len(fake._store) % 4 == 0 for fake in fakes)
    other = worker_of(*reversed(addresses))
    other.submit("x", prompt_of(64, seed=50))
    assert other.run("x").cached_tokens == 48
    for fake in fakes:
        fake.stop()
