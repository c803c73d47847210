"""Sampling parameters through the whole engine: n, logprobs, penalties, resume, poisoned logits."""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton import LLM, SamplingParams
from common.engine.prompt_rows import MAX_PROMPT_ROWS
from common.engine.sequence import EngineRequest
from common.errors import BatonError, InvalidRequest, UnusableLogits
from tests.engine.rows import processed
from tests.engine.test_engine import Listener
from tests.engine.zoo import VOCAB, checkpoint, expected_logits, make_checkpoint, random_prompt

PATH = ("llama", False)
PENALTIES = {
    "frequency_penalty": 0.6,
    "presence_penalty": -0.4,
    "repetition_penalty": 1.3,
    "logit_bias": {11: 3.0, 12: -100.0},
    "bad_words": [[13], [14, 15]],
}


@pytest.fixture(scope="module")
def llm():
    with LLM(checkpoint(*PATH), threads=1, max_model_len=700, max_num_seqs=32) as loaded:
        yield loaded


def generate(llm, prompts, params):
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(given, params, use_tqdm=False)


def tokens(results):
    return [[answer.token_ids for answer in result.outputs] for result in results]


def mixed(count, max_tokens=24):
    """Every parameter somewhere, seeded."""
    rng = random.Random(5)
    found = []
    for index in range(count):
        wanted = {name: value for name, value in PENALTIES.items() if rng.random() < 0.5}
        found.append(
            SamplingParams(
                temperature=rng.choice([0.0, 0.8, 1.2]),
                top_p=rng.choice([1.0, 0.9]),
                seed=index,
                max_tokens=max_tokens,
                min_tokens=rng.choice([0, 10]),
                stop_token_ids=(20, 21, 22),
                logprobs=rng.choice([None, 4]),
                **wanted,
            )
        )
    return found


def test_mixed_requests_give_the_same_alone_together_and_after_preemption(llm):
    prompts = [random_prompt(5 + index % 40, seed=index) for index in range(32)]
    params = mixed(32)
    together = generate(llm, prompts, params)
    for index in range(0, 32, 4):
        (alone,) = generate(llm, [prompts[index]], params[index])
        assert tokens([alone]) == tokens([together[index]])
    with LLM(checkpoint(*PATH), threads=1, max_model_len=160, num_blocks=13) as small:
        assert tokens(generate(small, prompts, params)) == tokens(together)
        assert small.engine.state().counters["preemptions"] > 0


def test_greedy_tokens_are_the_argmax_of_plainly_processed_logits(llm):
    prompt = random_prompt(9, seed=3)
    params = SamplingParams(temperature=0, max_tokens=12, min_tokens=12, **PENALTIES)
    ((answer,),) = tokens(generate(llm, [prompt], params))
    for index, token in enumerate(answer):
        row = expected_logits(checkpoint(*PATH), prompt + answer[:index])[-1].double().tolist()
        values = processed(row, params, prompt, answer[:index], eos=(2,))
        assert token == max(range(VOCAB), key=values.__getitem__)


def test_logprobs_of_prompt_and_answer_are_those_of_transformers(llm):
    """Also where the prompt is found in the cache, and where it takes several steps."""
    prompts = [random_prompt(length, seed=length) for length in (1, 2, 40, MAX_PROMPT_ROWS * 2 + 9)]
    params = SamplingParams(
        temperature=1, seed=4, max_tokens=6, logprobs=5, prompt_logprobs=3, ignore_eos=True
    )
    for _ in range(2):
        results = generate(llm, prompts, params)
        for prompt, result in zip(prompts, results, strict=True):
            (answer,) = result.outputs
            whole = prompt + answer.token_ids
            wanted = expected_logits(checkpoint(*PATH), whole).log_softmax(-1)
            told = [*result.prompt_logprobs, *answer.logprobs]
            assert told[0] is None
            assert len(told) == len(whole)
            for position in range(1, len(whole)):
                check_entry(told[position], wanted[position - 1], whole[position])
                least = 3 if position < len(prompt) else 5
                assert least <= len(told[position]) <= least + 1
            own = [wanted[len(prompt) - 1 + i, t] for i, t in enumerate(answer.token_ids)]
            assert answer.cumulative_logprob == pytest.approx(float(sum(own)), abs=1e-4)


def check_entry(told, wanted, token):
    assert next(iter(told)) == token
    for other, entry in told.items():
        assert entry.logprob == pytest.approx(float(wanted[other]), abs=1e-4)
        assert entry.rank == 1 + int((wanted > wanted[other]).sum())
        assert entry.decoded_token is None


def test_prompt_logprobs_survive_chunks_and_preemption_and_are_told_once():
    prompts = [random_prompt(60 + index, seed=index) for index in range(5)]
    params = SamplingParams(temperature=0, max_tokens=40, prompt_logprobs=1, ignore_eos=True)
    settings = {"threads": 1, "max_model_len": 160, "enable_prefix_caching": False}
    with LLM(checkpoint(*PATH), **settings) as roomy:
        wanted = generate(roomy, prompts, params)
    with LLM(checkpoint(*PATH), num_blocks=15, max_num_batched_tokens=17, **settings) as small:
        found = generate(small, prompts, params)
        assert small.engine.state().counters["preemptions"] > 0
    for one, other in zip(found, wanted, strict=True):
        assert one.outputs == other.outputs
        assert [e and list(e) for e in one.prompt_logprobs] == [
            e and list(e) for e in other.prompt_logprobs
        ]


def test_n_answers_are_those_of_their_seeds_and_compute_the_prompt_once(llm):
    prompt = random_prompt(100, seed=77)
    params = SamplingParams(temperature=1, seed=2**64 - 2, n=4, max_tokens=10, ignore_eos=True)
    before = llm.engine.state().counters["prefix_hit_tokens"]
    (result,) = generate(llm, [prompt], params)
    assert llm.engine.state().counters["prefix_hit_tokens"] - before == 3 * 96
    assert [answer.index for answer in result.outputs] == [0, 1, 2, 3]
    assert len({tuple(answer.token_ids) for answer in result.outputs}) == 4
    for index, seed in enumerate((2**64 - 2, 2**64 - 1, 0, 1)):
        one = SamplingParams(temperature=1, seed=seed, max_tokens=10, ignore_eos=True)
        assert tokens(generate(llm, [prompt], one)) == [[result.outputs[index].token_ids]]


def test_answers_of_one_call_have_seeds_of_their_own():
    params = SamplingParams(temperature=1, n=2, max_tokens=10, ignore_eos=True)
    with LLM(checkpoint(*PATH), threads=1, max_model_len=100, seed=7) as seeded:
        first = tokens(generate(seeded, [[5, 6]] * 3, params))
        assert tokens(generate(seeded, [[5, 6]] * 3, params)) == first
        assert len({tuple(answer) for answers in first for answer in answers}) == 6


def test_the_engine_never_holds_more_than_runs_and_a_few(llm, monkeypatch):
    held = []
    submit = llm.engine.submit
    monkeypatch.setattr(
        llm.engine, "submit", lambda r: (submit(r), held.append(llm.engine.num_live))
    )
    params = SamplingParams(temperature=0, max_tokens=1)
    assert len(generate(llm, [[5 + index % 100] for index in range(400)], params)) == 400
    assert max(held) <= 32 + 16


# Resumed on another worker ---------------------------------------------------------------------


@pytest.mark.parametrize("done", [1, 7, 15])
def test_a_resumed_request_goes_on_as_if_undisturbed(llm, done):
    prompts = [random_prompt(20, seed=index) for index in range(12)]
    for prompt, params in zip(prompts, mixed(12, max_tokens=16), strict=True):
        (whole,) = generate(llm, [prompt], params)
        answer = whole.outputs[0]
        if len(answer.token_ids) <= done:
            continue
        rest = resume(llm, prompt, answer.token_ids[:done], params)
        assert [t for output in rest for t in output.token_ids] == answer.token_ids[done:]
        assert rest[-1].finish_reason == answer.finish_reason


def resume(llm, prompt, output, params):
    listener = Listener()
    request = EngineRequest("r", prompt + output, params, output_tokens=len(output))
    llm.engine._on_step, before = listener, llm.engine._on_step
    try:
        llm.engine.submit(request)
        listener.end("r")
    finally:
        llm.engine._on_step = before
    return listener.of("r")


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (EngineRequest("r", [5, 6], SamplingParams(), output_tokens=2), "output_tokens"),
        (EngineRequest("r", [5] * 20, SamplingParams(), output_tokens=16), "output_tokens"),
        (EngineRequest("r", [5], SamplingParams(logit_bias={VOCAB: 1.0})), "logit_bias"),
        (EngineRequest("r", [5], SamplingParams(bad_words=[[1, VOCAB]])), "bad_words"),
        (EngineRequest("r", [5], SamplingParams(bad_words="text")), "bad_words"),
        (EngineRequest("r", [5], SamplingParams(n=2)), "n"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_engine_cannot_do_is_refused_by_field(llm, given, field):
    with pytest.raises(InvalidRequest) as caught:
        llm.engine.submit(given)
    assert caught.value.field == field


# Logits that are no numbers --------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """Whoever reads token 50 gets NaN for logits."""
    path = make_checkpoint("llama", False, tmp_path_factory.mktemp("poisoned"))
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][50] = torch.nan
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with LLM(path, threads=1, max_model_len=100) as loaded:
        yield loaded


def test_an_answer_that_fails_costs_a_call_no_other(poisoned):
    good = [random_prompt(12, seed=seed) for seed in (1, 2)]
    params = SamplingParams(temperature=1, seed=1, n=2, max_tokens=8, logit_bias={50: -100.0})
    wanted = tokens(generate(poisoned, good, params))
    # Of two answers the second waits for the first one's token, which never comes.
    banning = SamplingParams(bad_words=[[token] for token in range(VOCAB)])
    prompts, asked = [good[0], [7, 50], good[0], good[1]], [params, params, banning, params]
    first, nan, banned, last = generate(poisoned, prompts, asked)
    assert tokens([first, last]) == wanted
    assert all(answer.error is None for answer in (*first.outputs, *last.outputs))
    assert [answer.finish_reason for answer in (*nan.outputs, *banned.outputs)] == ["error"] * 3
    assert all(isinstance(answer.error, UnusableLogits) for answer in nan.outputs)
    assert isinstance(banned.outputs[0].error, InvalidRequest)


@pytest.mark.parametrize("more", [{}, {"logprobs": 1, "prompt_logprobs": 1}, PENALTIES], ids=str)
def test_nan_logits_end_that_request_with_an_error_and_no_other(poisoned, more):
    good = random_prompt(12, seed=1)
    more = {**more, "logit_bias": {50: -100.0}}
    params = SamplingParams(temperature=1, seed=1, max_tokens=8, ignore_eos=True, **more)
    wanted = tokens(generate(poisoned, [good], params))[0][0]
    listener = Listener()
    poisoned.engine._on_step, before = listener, poisoned.engine._on_step
    try:
        for name, prompt in {"bad": [7, 50, 8], "good": good, "late": [9, 50]}.items():
            poisoned.engine.submit(EngineRequest(name, prompt, params))
        ends = {name: listener.end(name) for name in ("bad", "good", "late")}
    finally:
        poisoned.engine._on_step = before
    assert listener.tokens("good") == wanted
    for name in ("bad", "late"):
        assert ends[name].finish_reason == "error"
        assert isinstance(ends[name].error, BatonError)
        assert "no usable logits" in str(ends[name].error)
    assert poisoned.engine.state().healthy
