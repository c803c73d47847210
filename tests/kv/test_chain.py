"""The store first, a handoff for the rest."""

import asyncio
import contextlib

import pytest

from common.errors import Unavailable
from common.kv.connector import KVConnector
from common.kv.connectors.chain import ChainConnector
from common.kv.connectors.handoff import HandoffReceiver
from common.kv.connectors.store import StoreConnector, StoreSettings
from common.kv.handoff import HandoffPolicy, PrefillCandidates
from common.rpc.loop import LoopThread
from tests.kv.fake_store import FakeStore
from tests.kv.store_process import StoreProcess
from tests.kv.support import CARD, PrefillWorker, Worker, prompt_of, until

pytestmark = pytest.mark.timeout(60)
PATIENT = StoreSettings(lookup_timeout_s=5.0)


@pytest.fixture(scope="module")
def store():
    with StoreProcess() as process:
        yield process


@pytest.fixture
def loop():
    """One loop for all connectors, as a service has."""
    loop = LoopThread("test-kv")
    yield loop
    loop.close()


@contextlib.contextmanager
def deciding(loop, store: str):
    """A decode worker with this store."""
    receiver = HandoffReceiver(
        incarnation="decode-1",
        model_card=lambda: CARD,
        advertise_host="127.0.0.1",
        data_host="127.0.0.1",
        policy=HandoffPolicy(min_tokens=8),
        loop=loop,
    )
    receiver.listen()
    chain = ChainConnector([StoreConnector([store], loop=loop, settings=PATIENT), receiver])
    yield Worker(chain)
    chain.shutdown()


@pytest.fixture
def decode(store, loop):
    with deciding(loop, store.address) as worker:
        yield worker


@pytest.fixture
def prefill(store):
    worker = PrefillWorker(
        lambda sender: ChainConnector([StoreConnector([store.address], settings=PATIENT), sender])
    )
    yield worker
    worker.stop()


def test_what_the_store_lacks_comes_by_handoff(store, prefill, decode):
    prompt = prompt_of(300, seed=1)
    other = Worker(StoreConnector([store.address], settings=PATIENT))
    sequence = other.submit("first", prompt[:160])
    other.run("first")
    until(lambda: store.lookup(*sequence.block_keys[:10]) == 10)
    decode.submit("r", prompt, transfer=PrefillCandidates((prefill.address,)))
    output = decode.run("r")
    assert decode.computed_tokens == 1
    assert prefill.calls[0].first_block == 10
    # The prefill worker has its first 160 tokens from the store too, but sends none of them.
    assert output.cached_tokens == 160
    assert prefill.worker.computed_tokens == 299 - 160
    assert decode.idle()
    other.connector.shutdown()


def test_what_the_prefill_worker_computes_goes_to_the_store_for_all(store, prefill, decode):
    prompt = prompt_of(200, seed=2)
    sequence = decode.submit("r", prompt, transfer=PrefillCandidates((prefill.address,)))
    assert decode.run("r").cached_tokens == 0
    until(lambda: store.lookup(*sequence.block_keys[:12]) == 12)
    other = Worker(StoreConnector([store.address], settings=PATIENT))
    other.submit("again", prompt)
    assert other.run("again").cached_tokens == 192
    other.connector.shutdown()


def test_when_the_handoff_fails_the_blocks_of_the_store_stay(store, decode):
    prompt = prompt_of(200, seed=3)
    other = Worker(StoreConnector([store.address], settings=PATIENT))
    sequence = other.submit("first", prompt[:100])
    other.run("first")
    until(lambda: store.lookup(*sequence.block_keys[:6]) == 6)
    decode.submit("r", prompt, transfer=PrefillCandidates(("127.0.0.1:1",)))
    output = decode.run("r")
    assert output.cached_tokens == 96
    assert decode.computed_tokens == 104
    other.connector.shutdown()


class WithinTheStep(KVConnector):
    """Loads 32 tokens within a step, as a connector may; all of it fails."""

    def get_num_new_matched_tokens(self, sequence, num_computed_tokens):
        return 32, False

    def register_kv_caches(self, caches):
        self.cache, self.failed = caches.cache, set()

    def update_state_after_alloc(self, sequence, block_ids, num_external_tokens):
        if num_external_tokens:
            self.failed = set(block_ids[:2])
            self.cache[block_ids[:2]] = 255

    def get_block_ids_with_load_errors(self):
        failed, self.failed = self.failed, set()
        return failed


def test_kv_whose_load_within_the_step_failed_is_neither_used_nor_sent_nor_saved(store, decode):
    prefill = PrefillWorker(
        lambda sender: ChainConnector(
            [WithinTheStep(), StoreConnector([store.address], settings=PATIENT), sender]
        )
    )
    prompt = prompt_of(100, seed=8)
    decode.submit("r", prompt, transfer=PrefillCandidates((prefill.address,)))
    decode.run("r")  # each step checks what it reads
    assert decode.computed_tokens == 1
    until(prefill.worker.idle)
    decode.scheduler.blocks.forget()
    decode.submit("again", prompt)
    decode.run("again")
    prefill.stop()


def test_members_that_load_between_steps_and_within_one_are_not_mixed():
    later = Scripted(32)
    worker = Worker(ChainConnector([WithinTheStep(), later]))
    worker.submit("r", prompt_of(100, seed=9))
    assert worker.run("r").finish_reason == "length"
    assert later.given[0][1] == 0


class Scripted(KVConnector):
    """A member that loads as many tokens as it is told, and is done when it is told."""

    def __init__(self, tokens: int | None):
        self.tokens = tokens
        self.done: set[str] = set()
        self.failed: set[int] = set()
        self.asked: list[int] = []
        self.given: list[tuple[list[int], int]] = []
        self.finished: list[str] = []

    def get_num_new_matched_tokens(self, sequence, num_computed_tokens):
        self.asked.append(num_computed_tokens)
        return self.tokens, bool(self.tokens)

    def update_state_after_alloc(self, sequence, block_ids, num_external_tokens):
        self.given.append((block_ids, num_external_tokens))

    def get_finished(self, finished_request_ids):
        done, self.done = self.done, set()
        return set(), done

    def get_block_ids_with_load_errors(self):
        failed, self.failed = self.failed, set()
        return failed

    def request_finished(self, sequence, block_ids):
        self.finished.append(sequence.request_id)
        return False


def test_each_member_is_asked_from_where_those_before_it_end():
    a, b = Scripted(32), Scripted(20)
    worker = Worker(ChainConnector([a, b]))
    worker.submit("r", prompt_of(100, seed=4))
    worker.turn()
    assert (a.asked, b.asked) == ([0], [32])
    (a_blocks, a_tokens), (b_blocks, b_tokens) = a.given[0], b.given[0]
    assert (len(a_blocks), a_tokens, len(b_blocks), b_tokens) == (2, 32, 4, 20)
    assert b_blocks[:2] == a_blocks


def test_a_sequence_waits_until_every_member_is_done_and_errors_come_with_it():
    a, b = Scripted(32), Scripted(32)
    worker = Worker(ChainConnector([a, b]))
    sequence = worker.submit("r", prompt_of(100, seed=5))
    worker.turn()
    a.failed, a.done = {sequence.block_table[1]}, {"r"}
    worker.turn()
    assert worker.scheduler.num_loading == 1
    b.done, b.tokens = {"r"}, 0
    # Neither wrote a page here: only what is computed may be read.
    for page in sequence.block_table[:1]:
        worker.cache[page] = 0
    worker._check_past = lambda sequence, length: None
    worker.run("r")
    assert worker.computed_tokens == 100 - 16


def test_what_one_member_failed_to_load_another_is_asked_for_once():
    a, b = Scripted(0), Scripted(64)
    worker = Worker(ChainConnector([a, b]))
    sequence = worker.submit("r", prompt_of(100, seed=5))
    worker.turn()
    blocks = list(sequence.block_table)
    b.failed, b.done, a.tokens = {blocks[1], blocks[3]}, {"r"}, None
    worker.turn()  # `a` does not know yet
    assert worker.scheduler.num_loading == 1
    a.tokens = 32
    worker.turn()
    assert a.asked == [0, 16, 16]
    assert a.given[-1] == (blocks[:3], 32)
    a.failed, a.done = {blocks[2]}, {"r"}
    worker._check_past = lambda sequence, length: None  # nobody wrote a page
    worker.run("r")
    assert worker.computed_tokens == 100 - 32
    assert worker.connector.take_events() == {"loads_tried_again": 1}
    assert b.asked == [0]


def test_a_member_that_offers_more_than_there_are_blocks_for_is_asked_for_those():
    a, b = Scripted(64), Scripted(0)
    worker = Worker(ChainConnector([a, b]))
    sequence = worker.submit("r", prompt_of(100, seed=5))
    worker.turn()
    blocks = list(sequence.block_table)
    a.failed, a.done, b.tokens = {blocks[1]}, {"r"}, 83
    worker.turn()
    assert b.given[-1] == (blocks[:4], 48)
    b.done = {"r"}
    worker._check_past = lambda sequence, length: None  # nobody wrote a page
    worker.run("r")
    assert worker.computed_tokens == 100 - 64


@pytest.mark.parametrize("held", [200, 100], ids=["all-in-the-store", "a-part-of-it"])
def test_what_the_store_lost_on_the_way_comes_by_handoff(loop, prefill, held):
    """The second candidate sends it, the first being gone."""
    prompt, fake, gone = prompt_of(200, seed=11), FakeStore(), PrefillWorker()
    filling = Worker(StoreConnector([fake.address], settings=PATIENT))
    filling.submit("fill", prompt[:held])
    filling.run("fill")
    until(lambda: len(fake._store) == held // 16)
    served = []

    async def stop_after_three(response):
        served.append(response)
        return response if len(served) <= 3 else None

    fake.on_get = stop_after_three
    with deciding(loop, fake.address) as decode:
        decode.submit("meet", prompt_of(50, 12), transfer=PrefillCandidates((gone.address,)))
        decode.run("meet")
        gone.stop()
        before = decode.computed_tokens
        decode.submit("r", prompt, transfer=PrefillCandidates((gone.address, prefill.address)))
        decode.run("r")
        # With all in the store there are blocks for its 192 tokens, and the handoff fills those.
        assert decode.computed_tokens - before == (8 if held == 200 else 1)
        again = prefill.calls[-1]
        assert (again.first_block, again.num_tokens) == (3, 192 if held == 200 else 199)
        assert decode.connector.take_events()["loads_tried_again"] == 1
        assert decode.idle()
    filling.connector.shutdown()
    fake.stop()


def test_what_neither_the_store_nor_a_prefill_worker_brings_is_computed(loop):
    prompt, fake = prompt_of(200, seed=13), FakeStore()
    filling = Worker(StoreConnector([fake.address], settings=PATIENT))
    filling.submit("fill", prompt)
    filling.run("fill")
    until(lambda: len(fake._store) == 12)

    async def damaged(response):
        response.frame = response.frame[:-1] + bytes([response.frame[-1] ^ 1])
        return response

    fake.on_get = damaged
    with deciding(loop, fake.address) as decode:
        decode.submit("r", prompt, transfer=PrefillCandidates(("127.0.0.1:1",)))
        decode.run("r")
        assert decode.computed_tokens == 200
        assert decode.idle()
    filling.connector.shutdown()
    fake.stop()


def test_what_no_prefill_worker_could_send_the_store_has_by_then(store, decode):
    """The store gets it between the two questions, as from the prefill worker that then died."""
    prompt = prompt_of(200, seed=10)
    saving = Worker(StoreConnector([store.address], settings=PATIENT))
    dying = PrefillWorker()

    async def save_and_die(request):
        sequence = saving.submit("first", prompt)
        saving.run("first")
        await asyncio.to_thread(until, lambda: store.lookup(*sequence.block_keys[:12]) == 12)
        raise Unavailable("the prefill worker dies")

    dying.spoil = save_and_die
    decode.submit("r", prompt, transfer=PrefillCandidates((dying.address,)))
    output = decode.run("r")
    assert decode.computed_tokens == 200 - 192
    assert output.cached_tokens == 192
    events = decode.connector.take_events()
    assert (events["loads_tried_again"], events["prefill_handoff_failed"]) == (1, 1)
    assert decode.idle()
    saving.connector.shutdown()
    dying.stop()


def test_one_member_that_does_not_know_yet_makes_the_sequence_wait():
    a, b = Scripted(None), Scripted(0)
    worker = Worker(ChainConnector([a, b]))
    worker.submit("r", prompt_of(50, seed=6))
    worker.turn()
    assert worker.scheduler.num_waiting == 1
    assert b.asked == []
    a.tokens = 0
    worker.run("r")
    assert b.asked == [0]


def test_every_member_hears_of_the_end_of_a_request():
    a, b = Scripted(32), Scripted(0)
    worker = Worker(ChainConnector([a, b]))
    worker.submit("r", prompt_of(50, seed=7))
    worker.turn()
    worker.abort("r")
    assert a.finished == b.finished == ["r"]
    a.done = {"r"}
    worker.turn()
    assert worker.idle()
