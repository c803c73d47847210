"""Steps prepared ahead where a connector loads, saves and sends: same tokens, same blocks, and what
goes wrong in one step is not another's."""

import threading
from contextlib import contextmanager

import pytest

from common.engine.config import EngineConfig
from common.engine.engine import Engine
from common.engine.sequence import EngineRequest
from common.kv.connector import KVConnector
from common.kv.keys import chain_keys
from common.kv.wire import decode_block
from tests.engine.test_engine import PATIENCE_S, Listener, request
from tests.engine.test_steps_ahead import make_requests
from tests.engine.zoo import checkpoint, expected_greedy, random_prompt
from tests.kv.test_conformance import EXAMPLE
from tests.support.mesh import wait_until


@contextmanager
def engine_with(connector, ahead=True, **settings):
    """An engine that is not started, and what listens to it."""
    defaults = {"model": checkpoint("llama", False), "async_scheduling": ahead, "threads": 1}
    defaults |= {"max_model_len": 200, "num_blocks": 100}
    config, listener = EngineConfig(**{**defaults, **settings}), Listener()
    engine = Engine(config, connector, listener)
    try:
        yield engine, listener
    finally:
        engine.stop()
        engine._scheduler.check()
        assert engine._scheduler.idle


def right_tokens(prompt, count):
    return expected_greedy(checkpoint("llama", False), prompt, count)


def saved_by(ahead, folder, requests, **settings):
    """What each request was told, and the folder's blocks: {name: bytes}."""
    from folder_connector import FolderConnector

    with engine_with(FolderConnector(folder), ahead, **settings) as (engine, listener):
        for one in requests:
            engine.submit(one)
        engine.start()
        ends = [listener.end(one.request_id).finish_reason for one in requests]
        told = [listener.tokens(one.request_id) for one in requests]
        # The KV of a last token is nobody's business: it is not computed, or in vain.
        expected = {
            key.hex()
            for one, tokens in zip(requests, told, strict=True)
            for key in chain_keys(
                [*one.prompt_token_ids, *tokens][:-1], 16, engine.runner.fingerprint
            )
        }
        wait_until(
            lambda: len(list(folder.iterdir())) >= len(expected), PATIENCE_S, "all blocks saved"
        )
    frames = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(frames) == expected
    blocks = {name: bytes(decode_block(frame).payload) for name, frame in frames.items()}
    return told, ends, blocks


@pytest.mark.parametrize("blocks", [100, 18])
def test_a_connector_saves_the_blocks_that_it_saves_in_the_loop_that_waits(
    blocks, tmp_path, monkeypatch
):
    """Every full block of computed tokens, under its own tokens, with its own bytes, and nothing of
    a step that was in vain."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    requests = [
        EngineRequest(f"r{i}", prompt, params)
        for i, (prompt, params) in enumerate(zip(*make_requests(16, seed=5), strict=True))
    ]
    settings = {"num_blocks": blocks, "max_num_seqs": 8, "batch_invariant": True}
    settings["model"] = checkpoint("qwen3", False)  # whose head size --batch-invariant takes
    expected = saved_by(False, tmp_path / "waits", requests, **settings)
    assert saved_by(True, tmp_path / "ahead", requests, **settings) == expected


class LoadsWithin(KVConnector):
    """Says that it loads 32 tokens of the request `loads` within the step, and fails."""

    def __init__(self):
        self.failed = set()
        self.steps = 0

    def register_kv_caches(self, caches):
        self.caches = caches

    def get_num_new_matched_tokens(self, sequence, num_computed_tokens):
        return (32 if sequence.request_id == "loads" else 0), False

    def update_state_after_alloc(self, sequence, block_ids, num_external_tokens):
        self.blocks = block_ids if num_external_tokens else []

    def build_connector_meta(self, plan):
        return plan is not None and plan.loading

    def start_load_kv(self, meta):
        if meta:
            self.caches.cache[self.blocks] = 0xFF
            self.failed = set(self.blocks)

    def get_block_ids_with_load_errors(self):
        failed, self.failed = self.failed, set()
        return failed


def test_a_load_that_fails_within_a_step_is_that_steps_and_not_the_one_before_its():
    long, prompt = random_prompt(20, 1), random_prompt(60, 2)
    with engine_with(LoadsWithin()) as (engine, listener):
        on_step = engine._on_step

        def then_load(outputs):
            on_step(outputs)
            if len(listener.tokens("runs")) == 10:
                engine.submit(request("loads", prompt))

        engine._on_step = then_load
        engine.submit(request("runs", long, max_tokens=60))
        engine.start()
        listener.end("runs")
        listener.end("loads")
        assert listener.tokens("loads") == right_tokens(prompt, 10)
        assert listener.tokens("runs") == right_tokens(long, 60)
        counters = engine.state().counters
        assert (counters["load_errors"], counters["loaded_tokens"]) == (1, 0)


def break_once(owner, name, when):
    """Have the call of `owner.name` for which `when(number)` is true raise, once."""
    inner, calls = getattr(owner, name), []

    def call(*args):
        calls.append(args)
        if when(len(calls)):
            raise RuntimeError("the device fell over")
        return inner(*args)

    setattr(owner, name, call)


class Nothing(KVConnector):
    pass


def test_a_step_that_breaks_ends_its_own_requests_and_the_one_before_it_still_lands():
    with engine_with(Nothing()) as (engine, listener):
        break_once(engine.runner, "forward", lambda number: number == 4)
        engine.submit(request("last", max_tokens=3))  # its third token is under way then
        engine.submit(request("goes on", [9, 8], max_tokens=50))
        engine.start()
        assert listener.end("last").finish_reason == "length"
        assert listener.tokens("last") == right_tokens([5, 6, 7], 3)
        assert listener.end("goes on").finish_reason == "error"
        # Its third token would come after its end.
        assert listener.tokens("goes on") == right_tokens([9, 8], 2)
        engine.submit(request("next"))
        assert listener.end("next").finish_reason == "length"
        state = engine.state()
        assert (state.healthy, state.blocks_used, state.counters["step_failures"]) == (True, 0, 1)


def test_a_step_that_breaks_when_it_lands_ends_its_requests_and_not_those_that_came_later():
    with engine_with(Nothing(), max_num_batched_tokens=20) as (engine, listener):
        break_once(engine._scheduler, "update", lambda number: number == 3)
        engine.submit(request("early", max_tokens=50))
        on_step = engine._on_step

        def then_submit(outputs):
            on_step(outputs)
            if len(listener.outputs) == 2:  # the third step is under way, the fourth is next
                engine.submit(request("late", [9, 8]))

        engine._on_step = then_submit
        engine.start()
        assert listener.end("early").finish_reason == "error"
        assert listener.end("late").finish_reason == "length"
        assert listener.tokens("early") == right_tokens([5, 6, 7], 2)
        assert listener.tokens("late") == right_tokens([9, 8], 10)
        assert engine.state().blocks_used == 0


def test_an_abort_and_a_stop_with_a_step_under_way_tell_no_token_twice_and_none_that_is_unknown():
    with engine_with(Nothing()) as (engine, listener):
        engine.submit(request("gone", max_tokens=190))
        engine.submit(request("stays", [9, 8], max_tokens=190))
        on_step = engine._on_step

        def then_abort(outputs):
            on_step(outputs)
            if len(listener.tokens("gone")) == 7:
                engine.abort("gone")
            if len(listener.tokens("stays")) == 30:
                threading.Thread(target=engine.stop).start()

        engine._on_step = then_abort
        engine.start()
        for name, prompt in (("gone", [5, 6, 7]), ("stays", [9, 8])):
            assert listener.end(name).finish_reason == "cancelled"
            tokens = listener.tokens(name)
            assert tokens == right_tokens(prompt, len(tokens))
        assert len(listener.tokens("gone")) == 7
    assert engine.state().blocks_used == 0


def test_who_waits_for_room_is_served_though_nothing_is_told_of_the_one_that_made_it():
    """A prefilled request is told of when its KV was sent; its place in a step is free before."""

    class NeverSent(KVConnector):
        def __init__(self):
            self.ended, self.both = [], threading.Event()

        def request_finished(self, sequence, block_ids):
            self.ended.append(sequence.request_id)
            if len(self.ended) == 2:
                self.both.set()
            return self.ended.count(sequence.request_id) == 1

    connector = NeverSent()
    with engine_with(connector, max_num_seqs=1) as (engine, _):
        engine.submit(request("a", range(3, 40), prefill=36))
        engine.submit(request("b", range(3, 40), prefill=36, seed=1))
        engine.start()
        assert connector.both.wait(PATIENCE_S)
        assert connector.ended == ["a", "b"]
