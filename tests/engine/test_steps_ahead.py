"""The next step prepared before the last one's tokens are known: same tokens, same ends."""

import random

import pytest
import torch

from baton import LLM, SamplingParams
from common.engine.batch_builder import BatchBuilder
from common.engine.graphs import StaticBatch, bucket_sizes, only_decodes
from common.engine.sequence import UNKNOWN_TOKEN, Phase, Sampled
from tests.engine.pretend import PretendEngine, continuation, next_token
from tests.engine.zoo import VOCAB, checkpoint


def answers(ahead, prompts, params, **settings):
    defaults = {"threads": 1, "max_model_len": 160, "max_num_batched_tokens": 64}
    with LLM(checkpoint("llama", False), **defaults, **settings, async_scheduling=ahead) as llm:
        assumed = []
        assume = llm.engine._scheduler.assume
        llm.engine._scheduler.assume = lambda plan: (assumed.append(plan), assume(plan))
        results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        llm.engine._scheduler.check()
        counters = llm.engine.state().counters
    told = []
    for output in (result.outputs[0] for result in results):
        # Ranks: the values themselves differ in their last bits between batches.
        ranks = [{t: p.rank for t, p in step.items()} for step in output.logprobs or ()]
        told.append((output.token_ids, output.finish_reason, ranks))
    return told, len(assumed), counters


def make_requests(count, seed):
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 70))] for _ in range(count)]
    kinds = [
        {"temperature": 0},
        {"temperature": 1.2, "top_k": 20},
        {"temperature": 1, "top_p": 0.8, "logprobs": 2},
        {"temperature": 0, "stop_token_ids": tuple(range(3, VOCAB, 9))},
        {"temperature": 1, "min_tokens": 1, "stop_token_ids": tuple(range(3, VOCAB, 4))},
    ]
    params = [
        SamplingParams(seed=i, max_tokens=rng.choice([1, 2, 17, 40]), **kinds[i % len(kinds)])
        for i in range(count)
    ]
    return prompts, params


@pytest.mark.parametrize("blocks", [200, 14])
def test_tokens_and_ends_are_those_of_the_loop_that_waits(blocks):
    prompts, params = make_requests(24, seed=3)
    settings = {"num_blocks": blocks, "max_num_seqs": 8}
    expected, never, _ = answers(False, prompts, params, **settings)
    actual, assumed, counters = answers(True, prompts, params, **settings)
    assert (never, assumed > 20) == (0, True)
    assert actual == expected
    assert (counters["preemptions"] > 0) == (blocks == 14)


def test_a_request_whose_penalties_need_its_tokens_makes_the_engine_wait_for_them():
    prompts, _ = make_requests(4, seed=4)
    params = [SamplingParams(temperature=0, max_tokens=20, frequency_penalty=1.0)] * 4
    expected, _, _ = answers(False, prompts, params)
    assert answers(True, prompts, params)[:2] == (expected, 0)


# The scheduler -----------------------------------------------------------------------------


def start(engine, *prompts, **params):
    for i, prompt in enumerate(prompts):
        engine.add(f"r{i}", prompt, **params)
    return engine.scheduler.schedule(0.0)


def tokens_for(plan):
    return [
        Sampled(next_token(sequence.token_ids[: begin + count]))
        for sequence, begin, count, wanted in zip(
            plan.sequences, plan.start, plan.scheduled, plan.sampled, strict=True
        )
        if wanted
    ]


def test_a_plan_that_is_assumed_leads_to_the_next_before_its_tokens_are_known():
    engine = PretendEngine()
    first = start(engine, [1, 2, 3], max_tokens=3)
    engine.scheduler.assume(first)
    second = engine.scheduler.schedule(0.0)
    (sequence,) = second.sequences
    assert (second.start, second.scheduled, second.sampled) == ((3,), (1,), (True,))
    assert sequence.token_ids == [1, 2, 3, UNKNOWN_TOKEN]
    engine.take(engine.scheduler.update(first, tokens_for(first)))
    assert sequence.token_ids == [1, 2, 3, *continuation([1, 2, 3], 1)]
    engine.scheduler.check()


def test_a_sequence_whose_unknown_token_is_its_last_is_not_planned_again():
    engine = PretendEngine()
    first = start(engine, [1, 2, 3], max_tokens=1)
    engine.scheduler.assume(first)
    assert engine.scheduler.schedule(0.0).sequences == ()
    engine.take(engine.scheduler.update(first, tokens_for(first)))
    assert engine.ends["r0"].finish_reason == "length"
    assert engine.scheduler.idle


def test_what_a_step_gave_a_sequence_that_had_ended_is_dropped():
    engine = PretendEngine()
    first = start(engine, [1, 2, 3], [4, 5], max_tokens=9)
    engine.scheduler.assume(first)
    second = engine.scheduler.schedule(0.0)
    results = tokens_for(first)
    stopped = Sampled(None, error=RuntimeError("no logits"))
    engine.take(engine.scheduler.update(first, [stopped, results[1]]))
    engine.scheduler.assume(second)
    third = engine.scheduler.schedule(0.0)
    assert [s.request_id for s in third.sequences] == ["r1"]
    engine.take(engine.scheduler.update(second, [Sampled(7), Sampled(8)]))
    assert engine.tokens["r0"] == []
    assert engine.tokens["r1"][-1] == 8
    engine.scheduler.check()


def test_an_abort_while_its_step_runs_leaves_no_unknown_token_behind():
    engine = PretendEngine()
    first = start(engine, [1, 2, 3])
    (sequence,) = first.sequences
    engine.scheduler.assume(first)
    engine.scheduler.schedule(0.0)
    assert engine.scheduler.abort("r0")
    assert (sequence.token_ids, sequence.phase) == ([1, 2, 3], Phase.FINISHED)
    engine.take(engine.scheduler.update(first, tokens_for(first)))
    assert engine.scheduler.idle
    engine.scheduler.check()


def test_a_deadline_tells_how_many_tokens_were_generated_not_how_many_are_under_way():
    engine = PretendEngine()
    first = start(engine, [1, 2, 3], max_tokens=9, deadline=1.0)
    engine.scheduler.assume(first)
    engine.scheduler.schedule(0.0)
    engine.take(engine.scheduler.update(first, tokens_for(first)))
    second = engine.scheduler.schedule(0.0)
    engine.scheduler.assume(second)
    engine.scheduler.schedule(1.0)
    engine.take(engine.scheduler.take_outputs())
    assert "with 1 tokens generated" in str(engine.ends["r0"].error)
    assert len(engine.tokens["r0"]) == 1


# CUDA graphs: what they read ---------------------------------------------------------------


def test_every_batch_has_a_bucket_not_much_larger_than_itself():
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(6) == [1, 2, 4, 6]
    assert bucket_sizes(100) == [1, 2, 4, 8, 16, 32, 64, 96, 100]
    assert bucket_sizes(64) == [1, 2, 4, 8, 16, 32, 64]


def test_a_filled_batch_is_the_one_built_and_its_other_rows_are_nobodys():
    engine = PretendEngine()
    plan = start(engine, [1, 2, 3], [4, 5, 6, 7, 8, 9], [10], max_tokens=9)
    builder = BatchBuilder(4, torch.device("cpu"))
    built = builder.build(plan)
    assert not only_decodes(built)
    engine.take(engine.scheduler.update(plan, tokens_for(plan)))
    built = builder.build(engine.scheduler.schedule(0.0))
    assert only_decodes(built)
    static = StaticBatch(8, 16, 64, torch.device("cpu"))
    for stale in (static._integers, static._context_len):
        stale.fill_(77)
    static.fill(built, 4)
    filled = static.of_size(4)
    for name in ("token_ids", "positions", "slot_mapping", "logit_rows"):
        assert torch.equal(getattr(filled, name)[:3], getattr(built, name)), name
    assert filled.device_context_len.tolist() == [*built.context_len, 0]
    width = built.block_table.shape[1]
    assert torch.equal(filled.block_table[:3, :width], built.block_table)
    assert (filled.token_ids[3], filled.positions[3], filled.slot_mapping[3]) == (0, 0, 0)
    assert filled.query_start == (0, 1, 2, 3, 4)
    # The addresses are what a graph has captured.
    assert static.of_size(4).token_ids.data_ptr() == filled.token_ids.data_ptr()
