"""The scheduler with connectors: blocks that are loaded and sent between and within steps."""

import random

import pytest

from common.kv.connector import KVConnector
from tests.engine.pretend import EOS, PretendEngine, all_free, continuation, tokens


class PretendConnector(KVConnector):
    """Loads what it is told to, when it is told to."""

    def __init__(self, external=0, between_steps=True, keeps=False):
        self.external = external  # tokens of a prompt that it has, None: not known yet
        self.between_steps = between_steps
        self.keeps = keeps
        self.engine = None
        self.loads = {}
        self.loaded = set()
        self.sent = set()
        self.failed = set()
        self.allocs = []
        self.ended = []

    def register_kv_caches(self, caches):
        self.engine = caches

    def get_num_new_matched_tokens(self, sequence, num_computed_tokens):
        if self.external is None:
            return None, True
        return max(0, self.external - num_computed_tokens), self.between_steps

    def update_state_after_alloc(self, sequence, block_ids, num_external_tokens):
        self.allocs.append((sequence.request_id, list(block_ids), num_external_tokens))
        if num_external_tokens:
            self.loads[sequence.request_id] = (sequence, list(block_ids), num_external_tokens)

    def land(self, request_id, failed_index=None):
        """The load ends: KV is there up to the block of this index, garbage after it."""
        sequence, block_ids, _ = self.loads.pop(request_id)
        size = self.engine.config.block_size
        for index, block in enumerate(block_ids):
            for offset in range(size):
                position = index * size + offset
                prefix = tuple(sequence.token_ids[: position + 1])
                bad = failed_index is not None and index >= failed_index
                self.engine.pages[block, offset] = "garbage" if bad else prefix
        if failed_index is not None:
            self.failed.add(block_ids[failed_index])
        self.loaded.add(request_id)

    def get_finished(self, finished_request_ids):
        sent, self.sent = self.sent, set()
        loaded, self.loaded = self.loaded, set()
        return sent, loaded

    def get_block_ids_with_load_errors(self):
        failed, self.failed = self.failed, set()
        return failed

    def request_finished(self, sequence, block_ids):
        self.ended.append(sequence.request_id)
        self.loads.pop(sequence.request_id, None)
        return self.keeps and self.ended.count(sequence.request_id) == 1


def test_a_loading_sequence_waits_without_holding_up_the_next():
    connector = PretendConnector(external=15)
    engine = PretendEngine(connector=connector)
    engine.add("a", tokens(16), max_tokens=3)
    assert engine.step().sequences == ()
    assert engine.scheduler.num_loading == 1
    assert connector.allocs == [("a", engine.scheduler._sequences["a"].block_table, 15)]
    connector.external = 0
    engine.add("b", tokens(7, 1), max_tokens=3)
    assert [s.request_id for s in engine.step().sequences] == ["b"]
    connector.land("a")
    plan = engine.step()
    assert dict(zip((s.request_id for s in plan.sequences), plan.start, strict=True)) == {
        "a": 15,
        "b": 7,
    }
    engine.run()
    assert engine.tokens["a"] == continuation(tokens(16), 3)
    assert engine.scheduler.counters["loaded_tokens"] == 15
    assert engine.ends["a"].cached_tokens == 15
    assert all_free(engine)


def test_loaded_blocks_are_found_by_the_next_request():
    connector = PretendConnector(external=15)
    engine = PretendEngine(connector=connector)
    engine.add("a", tokens(16), max_tokens=1)
    engine.step()
    connector.land("a")
    engine.run()
    connector.external = 0
    engine.add("b", tokens(16), max_tokens=1)
    assert engine.step().start == (12,)


def test_blocks_are_not_found_before_their_load_is_verified():
    connector = PretendConnector(external=15)
    engine = PretendEngine(connector=connector)
    engine.add("a", tokens(16), max_tokens=1)
    engine.step()
    connector.external = 0
    engine.add("b", tokens(16), max_tokens=1)
    assert engine.step().start == (0,)


@pytest.mark.parametrize("failed_index", [0, 2, 3])
def test_a_failed_load_is_recomputed_from_the_first_failed_block(failed_index):
    connector = PretendConnector(external=15)
    engine = PretendEngine(connector=connector)
    engine.add("a", tokens(16), max_tokens=3)
    engine.step()
    connector.land("a", failed_index)
    assert engine.step().start == (failed_index * 4,)
    engine.run()
    assert engine.tokens["a"] == continuation(tokens(16), 3)
    assert engine.scheduler.counters["load_errors"] == 1
    assert engine.ends["a"].cached_tokens == failed_index * 4
    assert all_free(engine)


def test_an_offer_of_the_whole_prompt_leaves_the_last_token():
    connector = PretendConnector(external=16)
    engine = PretendEngine(connector=connector)
    engine.add("a", tokens(16), max_tokens=2)
    engine.step()
    connector.land("a")
    assert engine.step().start == (15,)


def test_a_connector_that_does_not_know_yet_is_asked_again():
    connector = PretendConnector(external=None)
    engine = PretendEngine(connector=connector)
    engine.add("a", tokens(16), max_tokens=2)
    assert engine.step().sequences == ()
    assert engine.scheduler.num_waiting == 1
    connector.external = 0
    assert engine.step().scheduled == (16,)


def test_an_aborted_load_frees_its_blocks_and_a_late_end_is_ignored():
    connector = PretendConnector(external=15)
    engine = PretendEngine(connector=connector)
    engine.add("a", tokens(16))
    engine.step()
    connector.loaded.add("a")
    engine.scheduler.abort("a")
    engine.step()
    assert connector.ended == ["a"]
    assert engine.scheduler.idle
    assert all_free(engine)


def test_a_block_that_failed_for_one_who_is_gone_has_not_failed_for_the_next():
    connector = PretendConnector(external=15)
    engine = PretendEngine(connector=connector, num_blocks=6, prefix_caching=False)
    blocks = []
    for name in "ab":
        engine.add(name, tokens(16), max_tokens=1)
        engine.step()
        blocks.append(set(connector.loads[name][1]))
        if name == "a":
            connector.failed = set(blocks[0])
            engine.step()
            engine.scheduler.abort("a")
    assert blocks[0] & blocks[1]
    connector.land("b")
    engine.run()
    assert engine.tokens["b"] == continuation(tokens(16), 1)
    assert engine.scheduler.counters["load_errors"] == 0


def test_a_deadline_ends_a_load():
    connector = PretendConnector(external=15)
    engine = PretendEngine(connector=connector)
    engine.add("a", tokens(16), deadline=1.0)
    engine.step()
    engine.now = 1.0
    engine.step()
    assert "while loading" in str(engine.ends["a"].error)
    assert all_free(engine)


def load_within_steps(engine, connector, failed_index=None):
    """Loads end between the plan and the forward pass, as wait_for_layer_load would have it."""
    schedule = engine.scheduler.schedule

    def schedule_and_load(now):
        plan = schedule(now)
        for request_id in list(connector.loads):
            connector.land(request_id, failed_index)
        connector.loaded.clear()
        return plan

    engine.scheduler.schedule = schedule_and_load


def test_a_load_within_the_step_counts_at_once():
    connector = PretendConnector(external=12, between_steps=False)
    engine = PretendEngine(connector=connector)
    load_within_steps(engine, connector)
    engine.add("a", tokens(16), max_tokens=2)
    assert engine.step().start == (12,)
    engine.run()
    assert engine.tokens["a"] == continuation(tokens(16), 2)
    assert engine.scheduler.counters["loaded_tokens"] == 12


def test_a_step_whose_load_failed_is_void_for_that_sequence_only():
    connector = PretendConnector(between_steps=False)
    external = {"a": 12, "b": 0}
    connector.get_num_new_matched_tokens = lambda s, n: (external[s.request_id], False)
    engine = PretendEngine(connector=connector)
    load_within_steps(engine, connector, failed_index=1)
    engine.add("a", tokens(16), max_tokens=2)
    engine.add("b", tokens(9, 1), max_tokens=2)
    assert engine.step().start == (12, 0)
    assert engine.tokens == {"b": continuation(tokens(9, 1), 1)}
    plan = engine.step()
    assert {s.request_id: start for s, start in zip(plan.sequences, plan.start, strict=True)} == {
        "b": 9,
        "a": 4,
    }
    engine.run()
    assert engine.tokens["a"] == continuation(tokens(16), 2)
    assert all_free(engine)


def test_a_prefill_request_ends_without_a_token():
    engine = PretendEngine()
    engine.add("a", tokens(16), prefill=15)
    plan = engine.step()
    assert (plan.scheduled, plan.sampled) == ((15,), (False,))
    output = engine.ends["a"]
    assert (output.finish_reason, output.token_ids, output.computed_tokens) == ("prefilled", (), 15)
    assert all_free(engine)


def test_a_prefill_request_that_is_known_whole_ends_without_a_step():
    engine = PretendEngine()
    engine.add("a", tokens(17), prefill=16)
    engine.run()
    engine.add("b", tokens(17), prefill=16)
    assert engine.step().sequences == ()
    output = engine.ends["b"]
    assert (output.finish_reason, output.cached_tokens, output.computed_tokens) == (
        "prefilled",
        16,
        0,
    )
    assert all_free(engine)


def test_a_prefill_request_is_told_of_only_when_its_kv_was_sent():
    connector = PretendConnector(keeps=True)
    engine = PretendEngine(connector=connector)
    engine.add("a", tokens(16), prefill=15)
    engine.step()
    engine.step()
    assert engine.ends == {}
    assert engine.blocks.num_used == 4
    assert not engine.scheduler.idle
    connector.sent.add("a")
    engine.step()
    assert engine.ends["a"].finish_reason == "prefilled"
    assert engine.scheduler.idle
    assert all_free(engine)


def test_an_ordinary_request_is_told_of_at_once_and_its_blocks_stay_until_they_are_sent():
    connector = PretendConnector(keeps=True)
    engine = PretendEngine(connector=connector)
    engine.add("a", tokens(6), max_tokens=1)
    engine.step()
    assert engine.ends["a"].finish_reason == "length"
    assert engine.blocks.num_used == 2
    connector.sent.add("a")
    engine.step()
    assert all_free(engine)


@pytest.mark.parametrize("how", ["abort", "deadline"])
def test_sending_can_be_given_up(how):
    connector = PretendConnector(keeps=True)
    engine = PretendEngine(connector=connector)
    engine.add("a", tokens(16), prefill=15, deadline=9.0)
    engine.step()
    if how == "abort":
        engine.scheduler.abort("a")
    engine.now = 9.0
    engine.step()
    assert engine.ends["a"].finish_reason == ("cancelled" if how == "abort" else "error")
    assert connector.ended == ["a", "a"]
    assert engine.scheduler.idle
    assert all_free(engine)


def test_a_connector_that_fails_at_the_end_of_a_request_keeps_no_blocks():
    connector = PretendConnector()
    connector.request_finished = lambda sequence, block_ids: 1 / 0
    engine = PretendEngine(connector=connector)
    engine.add("a", tokens(6), max_tokens=1)
    engine.step()
    assert engine.ends["a"].finish_reason == "length"
    assert all_free(engine)


# Everything at once ----------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True], ids=["waits", "ahead"])
@pytest.mark.parametrize("seed", range(12))
def test_any_mix_of_requests_gives_the_right_tokens_and_leaves_no_block(seed, ahead):
    """Random prompts with common prefixes, few blocks, loads that come late or fail, aborts, stops
    that nobody foresees. What a connector loads it writes at once, a step when it lands."""
    rng = random.Random(seed)
    connector = PretendConnector()
    connector.get_num_new_matched_tokens = lambda s, n: rng.choice(
        [(0, False), (None, True), (max(0, rng.choice([8, 16, s.prompt_len - 1]) - n), True)]
    )
    engine = PretendEngine(
        num_blocks=rng.choice([20, 30, 80]),
        connector=connector,
        max_num_seqs=rng.choice([2, 5, 8]),
        max_num_batched_tokens=rng.choice([3, 8, 32]),
        block_size=rng.choice([1, 3, 4]),
        max_model_len=19,
        ahead=ahead,
    )
    roots = [tokens(12, 100 + i) for i in range(3)]
    wanted, aborted = {}, set()
    for _ in range(3000):
        if len(wanted) < 60 and rng.random() < 0.3:
            root = rng.choice(roots)
            prompt = root[: rng.randint(1, 12)] + tokens(rng.randint(0, 3), rng.randrange(5))
            count, name = rng.randint(1, 4), f"r{len(wanted)}"
            expected = continuation(prompt, count)
            stop = rng.choice([EOS, *expected])
            wanted[name] = expected[: expected.index(stop) + 1] if stop in expected else expected
            engine.add(name, prompt, max_tokens=count, stop_token_ids=(stop,))
        for name in list(connector.loads):
            if rng.random() < 0.3:
                # Blocks shared with others are not loaded: fail within this load only.
                _, table, external = connector.loads[name]
                covered = -(-external // engine.config.block_size)
                first = len(table) - covered
                index = rng.choice([None, None, rng.randrange(first, len(table))])
                land_only(connector, name, first, index)
        if wanted and rng.random() < 0.03:
            name = rng.choice(list(wanted))
            if engine.scheduler.abort(name):
                aborted.add(name)
                engine.take(engine.scheduler.take_outputs())
        engine.step()
        if len(wanted) == 60 and engine.scheduler.idle:
            break
    assert engine.scheduler.idle, "stuck"
    for name, expected in wanted.items():
        told = engine.tokens.get(name, [])
        if name in aborted:
            assert engine.ends[name].finish_reason == "cancelled"
            assert told == expected[: len(told)]
        else:
            assert told == expected
    assert all_free(engine)


def land_only(connector, request_id, first, failed_index):
    """As `land`, but writes the loaded blocks only: those before belong to others too."""
    pages = dict(connector.engine.pages)
    _, block_ids, _ = connector.loads[request_id]
    connector.land(request_id, failed_index)
    for slot in list(connector.engine.pages):
        if slot[0] in block_ids[:first] and slot in pages:
            connector.engine.pages[slot] = pages[slot]
