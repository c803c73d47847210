import random

import pytest

from common.errors import DeadlineExceeded, InvalidRequest, Overloaded
from common.kv.connector import KVConnector
from tests.engine.pretend import EOS, PretendEngine, continuation, next_token


def tokens(count, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(900) for _ in range(count)]


def all_free(engine):
    engine.scheduler.check()
    return engine.blocks.num_used == 0


# Batching --------------------------------------------------------------------------------


def test_a_prompt_over_the_budget_is_computed_in_chunks():
    engine = PretendEngine(max_num_batched_tokens=10)
    engine.add("a", tokens(25), max_tokens=2)
    plans = [engine.step() for _ in range(4)]
    assert [p.scheduled for p in plans] == [(10,), (10,), (5,), (1,)]
    assert [p.start for p in plans] == [(0,), (10,), (20,), (25,)]
    assert [p.sampled for p in plans] == [(False,), (False,), (True,), (True,)]
    assert engine.tokens["a"] == continuation(tokens(25), 2)
    assert all_free(engine)


def test_tokens_of_running_sequences_go_before_prompts():
    engine = PretendEngine(max_num_batched_tokens=8)
    engine.add("a", tokens(4), max_tokens=20)
    engine.step()
    engine.add("b", tokens(30, 1), max_tokens=20)
    plan = engine.step()
    assert [s.request_id for s in plan.sequences] == ["a", "b"]
    assert plan.scheduled == (1, 7)


def test_first_come_first_served_within_max_num_seqs():
    engine = PretendEngine(max_num_seqs=2)
    for name in "abc":
        engine.add(name, tokens(3), max_tokens=3)
    plan = engine.step()
    assert [s.request_id for s in plan.sequences] == ["a", "b"]
    engine.run()
    assert list(engine.ends) == ["a", "b", "c"]


def test_ends_are_stop_for_stop_tokens_and_length_for_limits():
    answer = continuation(tokens(5), 9)
    engine = PretendEngine(max_model_len=12)
    engine.add("length", tokens(5), max_tokens=3)
    engine.add("context", tokens(5), max_tokens=None)
    engine.add("stop", tokens(5), max_tokens=9, stop_token_ids=(answer[2],))
    engine.run()
    assert engine.tokens == {"length": answer[:3], "context": answer[:7], "stop": answer[:3]}
    reasons = {name: output.finish_reason for name, output in engine.ends.items()}
    assert reasons == {"length": "length", "context": "length", "stop": "stop"}
    assert all_free(engine)


def test_the_end_of_sequence_token_is_told_and_can_be_ignored():
    engine = PretendEngine(model=lambda ids: EOS if len(ids) == 6 else next_token(ids))
    engine.add("a", tokens(4))
    engine.add("b", tokens(4), ignore_eos=True, max_tokens=5)
    engine.run()
    assert engine.tokens["a"][-1] == EOS
    assert len(engine.tokens["a"]) == 3
    assert engine.ends["a"].finish_reason == "stop"
    assert len(engine.tokens["b"]) == 5


def test_unusable_logits_end_one_request_only():
    engine = PretendEngine(model=lambda ids: None if ids[0] == 1 else next_token(ids))
    engine.add("bad", [1, 2, 3])
    engine.add("good", [2, 2, 3])
    engine.run()
    assert engine.ends["bad"].finish_reason == "error"
    assert "logits" in str(engine.ends["bad"].error)
    assert engine.tokens["good"] == continuation([2, 2, 3], 8)
    assert all_free(engine)


# Prefix cache ----------------------------------------------------------------------------


def test_a_known_prefix_is_not_computed_again_but_its_last_token_is():
    engine = PretendEngine()
    engine.add("a", tokens(16), max_tokens=1)
    engine.run()
    engine.add("b", tokens(16), max_tokens=1)
    plan = engine.step()
    assert (plan.start, plan.scheduled) == ((12,), (4,))
    assert engine.ends["b"].cached_tokens == 12
    assert engine.scheduler.counters["prefix_hit_tokens"] == 12
    assert engine.tokens["b"] == engine.tokens["a"]


def test_running_sequences_share_their_full_blocks():
    engine = PretendEngine()
    engine.add("a", tokens(17), max_tokens=20)
    engine.step()
    engine.add("b", tokens(17), max_tokens=20)
    engine.step()
    assert engine.blocks.num_used == 5 + 1
    engine.run()
    assert all_free(engine)


def test_equal_prompts_in_one_step_are_both_computed():
    engine = PretendEngine()
    engine.add("a", tokens(8), max_tokens=5)
    engine.add("b", tokens(8), max_tokens=5)
    assert engine.step().scheduled == (8, 8)
    engine.run()
    assert engine.tokens["a"] == engine.tokens["b"]
    assert all_free(engine)


def test_tenants_share_no_prefix():
    engine = PretendEngine()
    engine.add("a", tokens(16), tenant="one", max_tokens=1)
    engine.run()
    engine.add("b", tokens(16), tenant="two", max_tokens=1)
    assert engine.step().start == (0,)


def test_answers_are_found_as_prefixes_too():
    engine = PretendEngine()
    engine.add("a", tokens(6), max_tokens=8)
    engine.run()
    engine.add("b", tokens(6) + engine.tokens["a"], max_tokens=1)
    assert engine.step().start == (12,)


# Preemption and limits -------------------------------------------------------------------


def test_preemption_takes_the_youngest_and_changes_no_token():
    engine = PretendEngine(num_blocks=9)
    for number, name in enumerate("abc"):
        engine.add(name, tokens(5, number), max_tokens=18)
    engine.run()
    assert engine.scheduler.counters["preemptions"] > 0
    assert next(iter(engine.ends)) == "a"
    for number, name in enumerate("abc"):
        assert engine.tokens[name] == continuation(tokens(5, number), 18)
    assert all_free(engine)


def test_a_request_that_fits_alone_is_served_even_when_it_fills_the_cache():
    engine = PretendEngine(num_blocks=7)  # 24 tokens of KV
    engine.add("a", tokens(5), max_tokens=20)
    engine.add("b", tokens(20, 1), max_tokens=5)
    engine.add("c", tokens(1, 2), max_tokens=None)
    engine.run()
    assert [len(engine.tokens[name]) for name in "abc"] == [20, 5, 24]
    assert all_free(engine)


def test_a_request_that_could_never_fit_is_refused_with_the_numbers():
    engine = PretendEngine(num_blocks=7)
    with pytest.raises(InvalidRequest, match=r"KV for 25 tokens.*6 blocks of 4 holds 24"):
        engine.add("a", tokens(6), max_tokens=20)
    with pytest.raises(InvalidRequest, match="holds 24"):
        engine.add("a", tokens(25), max_tokens=None)
    assert engine.scheduler.idle


@pytest.mark.parametrize(
    ("prompt", "settings", "message", "field"),
    [
        ([], {}, "no token", "prompt"),
        ([1000], {}, "is 1000; the model's ids are 0 to 999", "prompt"),
        ([5, -1], {}, "token 1 of the prompt is -1", "prompt"),
        ([1.5], {}, "not an integer", "prompt"),
        ([1] * 200, {}, "has 200 tokens; the model's context of 200", "prompt"),
        ([1], {"stop_token_ids": (1000,)}, "stop_token_ids names the token 1000", "stop_token_ids"),
        ([1], {"prefill": 2}, "prefill_tokens is 2", "prefill_tokens"),
    ],
)
def test_what_cannot_be_served_is_refused_by_field(prompt, settings, message, field):
    engine = PretendEngine()
    with pytest.raises(InvalidRequest, match=message) as caught:
        engine.add("a", prompt, **settings)
    assert caught.value.field == field
    assert engine.scheduler.idle


def test_the_queue_is_bounded():
    engine = PretendEngine(max_num_seqs=2, max_waiting=1)
    for name in "abc":
        engine.add(name, [1])
    with pytest.raises(Overloaded):
        engine.add("d", [1])
    engine.run()
    engine.add("d", [1])


def test_a_live_request_id_is_refused():
    engine = PretendEngine()
    engine.add("a", [1])
    with pytest.raises(InvalidRequest, match="in use"):
        engine.add("a", [1])


# Aborts and deadlines --------------------------------------------------------------------


def test_an_aborted_request_frees_its_blocks_wherever_it_is():
    engine = PretendEngine(max_num_seqs=1)
    engine.add("running", tokens(9))
    engine.add("waiting", tokens(9))
    engine.step()
    assert engine.scheduler.abort("running")
    assert engine.scheduler.abort("waiting")
    assert not engine.scheduler.abort("running")
    engine.take(engine.scheduler.take_outputs())
    assert {o.finish_reason for o in engine.ends.values()} == {"cancelled"}
    assert engine.scheduler.counters["aborted"] == 2
    assert engine.scheduler.idle
    assert all_free(engine)


def test_a_deadline_ends_running_and_waiting_requests():
    engine = PretendEngine(max_num_seqs=1)
    engine.add("running", tokens(9), max_tokens=50, deadline=5.0)
    engine.add("waiting", tokens(9), deadline=3.0)
    engine.add("patient", tokens(9))
    engine.step()
    assert engine.scheduler.next_deadline() == 3.0
    engine.now = 4.0
    engine.step()
    assert isinstance(engine.ends["waiting"].error, DeadlineExceeded)
    assert engine.scheduler.next_deadline() == 5.0
    engine.now = 5.0
    engine.run()
    assert "while running" in str(engine.ends["running"].error)
    assert engine.ends["patient"].finish_reason == "length"
    assert engine.scheduler.counters["deadline_exceeded"] == 2
    assert all_free(engine)


# Connectors ------------------------------------------------------------------------------


class PretendConnector(KVConnector):
    """Loads what it is told to, when it is told to."""

    def __init__(self, external=0, between_steps=True, keeps=False, partial=True):
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
