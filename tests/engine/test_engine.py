import threading
import time

import pytest
import torch

from common.engine.config import EngineConfig
from common.engine.engine import Engine
from common.engine.sampling_params import SamplingParams
from common.engine.sequence import EngineRequest
from common.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from common.kv.connector import KVConnector
from tests.engine.zoo import VOCAB, checkpoint, expected_greedy
from tests.support.mesh import wait_until

PATIENCE_S = 20.0


def request(request_id, prompt=(5, 6, 7), *, deadline=None, prefill=None, **params):
    defaults = {"temperature": 0, "max_tokens": 10, "ignore_eos": True}
    return EngineRequest(
        request_id,
        list(prompt),
        SamplingParams(**{**defaults, **params}),
        deadline=deadline,
        prefill_tokens=prefill,
        trace=f"trace of {request_id}",
    )


class Listener:
    """Collects what on_step tells; waits on conditions with a deadline."""

    def __init__(self):
        self.changed = threading.Condition()
        self.outputs = []
        self.gate = None

    def __call__(self, outputs):
        if self.gate is not None:
            self.gate.wait(PATIENCE_S)
        with self.changed:
            self.outputs += outputs
            self.changed.notify_all()

    def of(self, request_id):
        return [output for output in self.outputs if output.request_id == request_id]

    def tokens(self, request_id):
        return [token for output in self.of(request_id) for token in output.token_ids]

    def end(self, request_id):
        """The last output of a request, once it is told."""
        with self.changed:
            ended = self.changed.wait_for(lambda: self._end(request_id), PATIENCE_S)
            assert ended, f"{request_id} did not end"
            return ended

    def _end(self, request_id):
        return next((o for o in self.of(request_id) if o.finish_reason is not None), None)

    def some(self, request_id):
        with self.changed:
            assert self.changed.wait_for(lambda: self.of(request_id), PATIENCE_S)


@pytest.fixture(params=[False, True], ids=["waits", "ahead"])
def start(request):
    """Starts engines that wait for each step, and engines that prepare the next one meanwhile."""
    engines, ahead = [], request.param

    def start(connector=None, begin=True, **settings):
        defaults = {"threads": 1, "max_model_len": 1000, "num_blocks": 100}
        defaults["async_scheduling"] = ahead
        config = EngineConfig(checkpoint("llama", False), **{**defaults, **settings})
        listener = Listener()
        engine = Engine(config, connector, listener)
        engines.append(engine)
        if begin:
            engine.start()
        return engine, listener

    yield start
    for engine in engines:
        engine.stop()
        assert engine._scheduler.idle
        engine._scheduler.check()


def used_blocks_reach_zero(engine):
    wait_until(lambda: not engine.state().blocks_used, PATIENCE_S, "no block is used")


def test_outputs_carry_the_tokens_the_end_and_the_trace(start):
    engine, listener = start()
    engine.submit(request("a"))
    end = listener.end("a")
    assert listener.tokens("a") == expected_greedy(checkpoint("llama", False), [5, 6, 7], 10)
    assert (end.finish_reason, end.trace, end.computed_tokens) == ("length", "trace of a", 3)
    state = engine.state()
    assert (state.running, state.waiting, state.blocks_used) == (0, 0, 0)
    assert state.counters["generated_tokens"] == 10
    assert state.counters["requests_finished"] == 1
    assert engine.num_live == 0


def test_the_context_is_filled_when_no_max_tokens_is_given(start):
    engine, listener = start(max_model_len=40)
    engine.submit(request("a", max_tokens=None))
    assert listener.end("a").finish_reason == "length"
    assert len(listener.tokens("a")) == 37


def test_mistakes_are_refused_at_once(start):
    engine, _ = start()
    for bad, message in (
        (request("a", [VOCAB]), "ids are 0 to"),
        (request("a", []), "no token"),
        (request("a", [1] * 1000), "context of 1000"),
    ):
        with pytest.raises(InvalidRequest, match=message) as caught:
            engine.submit(bad)
        assert caught.value.field == "prompt"
    assert engine.num_live == 0


def test_a_full_engine_refuses_and_later_takes_again(start):
    engine, listener = start(begin=False, max_num_seqs=1, max_waiting=1)
    engine.submit(request("a"))
    engine.submit(request("b"))
    assert engine.state().waiting == 2
    with pytest.raises(Overloaded):
        engine.submit(request("c"))
    with pytest.raises(InvalidRequest, match="in use"):
        engine.submit(request("a"))
    engine.start()
    listener.end("b")
    engine.submit(request("c"))
    listener.end("c")


def test_an_abort_ends_a_request_and_frees_its_blocks(start):
    engine, listener = start()
    engine.submit(request("a", max_tokens=900))
    listener.some("a")
    engine.abort("a")
    engine.abort("unknown")
    assert listener.end("a").finish_reason == "cancelled"
    assert engine.state().blocks_used == 0


def test_a_deadline_wakes_a_sleeping_engine(start):
    class NeverLoads(KVConnector):
        def get_num_new_matched_tokens(self, sequence, num_computed_tokens):
            return 2, True

    engine, listener = start(NeverLoads())
    began = time.monotonic()
    engine.submit(request("a", deadline=began + 0.2))
    end = listener.end("a")
    assert isinstance(end.error, DeadlineExceeded)
    assert 0.2 <= time.monotonic() - began < 5
    assert engine.state().blocks_used == 0


def test_an_idle_engine_does_not_turn(start):
    class Counting(KVConnector):
        turns = 0

        def get_finished(self, finished_request_ids):
            self.turns += 1
            return set(), set()

    connector = Counting()
    engine, listener = start(connector)
    engine.submit(request("a"))
    listener.end("a")
    engine.submit(request("b"))
    listener.end("b")
    turns = connector.turns
    woken = threading.Event()
    connector.get_finished = lambda ids: (woken.set(), (set(), set()))[1]
    # An idle engine would have to turn by itself to set the event.
    woken.wait(0.3)
    assert connector.turns <= turns + 1
    woken.clear()
    assert not woken.wait(0.2)
    engine.wake()
    assert woken.wait(PATIENCE_S)


def test_a_load_that_ends_wakes_the_sequence(start):
    class Loads(KVConnector):
        def __init__(self):
            self.loaded, self.began = set(), threading.Event()

        def register_kv_caches(self, caches):
            self.caches = caches

        def get_num_new_matched_tokens(self, sequence, num_computed_tokens):
            return 2, True

        def update_state_after_alloc(self, sequence, block_ids, num_external_tokens):
            self.blocks = block_ids
            self.began.set()

        def get_block_ids_with_load_errors(self):
            return set(self.blocks) if self.loaded else set()

        def get_finished(self, finished_request_ids):
            return set(), self.loaded

    connector = Loads()
    engine, listener = start(connector)
    engine.submit(request("a"))
    assert connector.began.wait(PATIENCE_S)
    connector.loaded = {"a"}  # it failed: the engine computes the tokens itself
    connector.caches.wake()
    listener.end("a")
    assert listener.tokens("a") == expected_greedy(checkpoint("llama", False), [5, 6, 7], 10)
    assert engine.state().counters["load_errors"] == 1


def test_a_step_that_breaks_ends_its_requests_and_the_engine_lives(start):
    engine, listener = start()
    forward, broken = engine.runner.forward, []

    def break_once(batch, connector=None):
        if not broken:
            broken.append(batch)
            raise RuntimeError("the device fell over")
        return forward(batch, connector)

    engine.runner.forward = break_once
    engine.submit(request("a"))
    end = listener.end("a")
    assert end.finish_reason == "error"
    assert "the device fell over" in str(end.error.__cause__)
    assert "the device fell over" not in str(end.error)  # which reaches clients
    engine.submit(request("b"))
    assert listener.end("b").finish_reason == "length"
    assert engine.state().healthy
    assert engine.state().blocks_used == 0


def test_steps_that_break_in_a_row_are_told_as_bad_health(start):
    engine, listener = start()
    forward = engine.runner.forward
    engine.runner.forward = lambda batch, connector=None: 1 / 0
    for name in "abc":
        engine.submit(request(name))
        listener.end(name)
    assert not engine.state().healthy
    assert engine.state().counters["step_failures"] == 3
    engine.runner.forward = forward
    engine.submit(request("d"))
    listener.end("d")
    assert engine.state().healthy


def test_a_connector_that_breaks_ends_requests_but_not_the_engine(start):
    class Breaks(KVConnector):
        bad = True

        def get_num_new_matched_tokens(self, sequence, num_computed_tokens):
            if self.bad:
                raise RuntimeError("no such store")
            return 0, False

    connector = Breaks()
    engine, listener = start(connector)
    engine.submit(request("a"))
    assert "no such store" in str(listener.end("a").error.__cause__)
    connector.bad = False
    engine.submit(request("b"))
    assert listener.end("b").finish_reason == "length"


def test_unusable_logits_end_one_request_of_a_batch(start):
    engine, listener = start(begin=False)
    forward = engine.runner.forward

    def spoil_first(batch, connector=None):
        logits = forward(batch, connector).clone()
        logits[0] = torch.nan
        return logits

    engine.runner.forward = spoil_first
    engine.submit(request("a", max_tokens=1))
    engine.submit(request("b", max_tokens=1))
    engine.start()
    assert "no usable logits" in str(listener.end("a").error)
    assert listener.end("b").finish_reason == "length"


def test_a_listener_that_raises_does_not_end_the_engine(start):
    engine, listener = start()
    on_step, engine._on_step = engine._on_step, lambda outputs: 1 / 0
    engine.submit(request("a", max_tokens=1))
    with engine._condition:
        assert engine._condition.wait_for(lambda: not engine._live, PATIENCE_S)
    engine._on_step = on_step
    engine.submit(request("b"))
    assert listener.end("b").finish_reason == "length"


def test_a_draining_engine_finishes_what_it_has(start):
    engine, listener = start(begin=False)
    engine.submit(request("a"))
    engine.drain()
    with pytest.raises(Unavailable, match="draining"):
        engine.submit(request("b"))
    engine.start()
    assert listener.end("a").finish_reason == "length"


def test_a_stop_serves_until_its_deadline_then_cancels(start):
    engine, listener = start()
    engine.submit(request("short", max_tokens=3))
    engine.stop(deadline_s=PATIENCE_S)
    assert listener.end("short").finish_reason == "length"

    engine, listener = start()
    engine.submit(request("long", max_tokens=900))
    listener.some("long")
    engine.stop(deadline_s=0.0)
    assert listener.end("long").finish_reason in ("cancelled", "length")
    assert engine.state().blocks_used == 0


def test_a_connector_is_shut_down_once(start):
    class Closing(KVConnector):
        closed = 0

        def shutdown(self):
            self.closed += 1

    connector = Closing()
    engine, _ = start(connector)
    engine.stop()
    engine.stop()
    assert connector.closed == 1


def test_a_prefill_request_computes_kv_and_samples_nothing(start):
    engine, listener = start()
    engine.submit(request("a", range(3, 40), prefill=36))
    end = listener.end("a")
    assert (end.finish_reason, end.token_ids, end.computed_tokens) == ("prefilled", (), 36)
    engine.submit(request("b", range(3, 40), prefill=36))
    assert listener.end("b").cached_tokens == 32
    assert engine.state().counters["generated_tokens"] == 0


def test_many_threads_may_submit_and_abort(start):
    engine, listener = start()

    def work(name):
        for i in range(10):
            engine.submit(request(f"{name}{i}", [5, i + 3], max_tokens=20))
            if i % 2:
                engine.abort(f"{name}{i}")

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reasons = [listener.end(f"{name}{i}").finish_reason for name in "abcd" for i in range(10)]
    assert set(reasons) <= {"length", "cancelled"}
    assert reasons.count("length") >= 20
    assert engine.state().blocks_used == 0
