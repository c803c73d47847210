import pytest

from common.errors import DeadlineExceeded, InvalidRequest, Overloaded
from tests.engine.pretend import EOS, PretendEngine, all_free, continuation, next_token, tokens

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
