"""Processors and log-probabilities against plain implementations, a row at a time, in float64."""

import math
import random

import pytest
import torch

from common.engine.logits import process
from common.engine.sampler import Sampler
from common.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from tests.engine.rows import processed, row

VOCAB = 60
EOS = (7, 9)


def logits_of(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCAB, generator=generator) * 4


def some_tokens(rng, most):
    return [rng.randrange(20) for _ in range(rng.randrange(most))]


def mixed_params(rng):
    """Any combination of everything, most of them unset in most rows."""

    def maybe(value, default):
        return value if rng.random() < 0.4 else default

    return SamplingParams(
        temperature=rng.choice([0, 0, 0.7, 1.0, 1.5]),
        top_k=maybe(rng.choice([1, 3, 10]), 0),
        top_p=maybe(rng.choice([0.3, 0.9]), 1.0),
        min_p=maybe(0.05, 0.0),
        max_tokens=100,
        min_tokens=maybe(rng.randrange(12), 0),
        stop_token_ids=maybe((3, 4), ()),
        ignore_eos=rng.random() < 0.5,
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(rng.choice([0.6, 1.1, 1.8]), 1.0),
        logit_bias=maybe({rng.randrange(VOCAB): rng.uniform(-100, 100) for _ in range(4)}, {}),
        bad_words=maybe(((5,), (1, 2), (rng.randrange(20), rng.randrange(20), 6)), ()),
        logprobs=maybe(rng.randrange(MAX_LOGPROBS + 1), None),
    )


def mixed_rows(count, seed):
    rng = random.Random(seed)
    return [
        row(
            mixed_params(rng),
            [1, *some_tokens(rng, 20)],
            some_tokens(rng, 20),
            seed=rng.getrandbits(64),
        )
        for _ in range(count)
    ]


def again(sequence):
    """The same sequence, with nothing remembered of earlier steps."""
    return row(
        sequence.request.params,
        sequence.request.prompt_token_ids,
        sequence.output_token_ids,
        seed=sequence.seed,
    )


ONE_EACH = {
    "frequency": {"frequency_penalty": 0.7},
    "negative frequency": {"frequency_penalty": -1.3},
    "presence": {"presence_penalty": 1.9},
    "repetition": {"repetition_penalty": 1.7},
    "repetition under 1": {"repetition_penalty": 0.5},
    "bias": {"logit_bias": {3: 99.5, 17: -100.0, 0: 0.25}},
    "bad token": {"bad_words": [[5], [11]]},
    "bad words": {"bad_words": [[3, 4, 5], [2, 5, 6], [5, 8], [4, 9]]},
    "min tokens": {"min_tokens": 30, "max_tokens": 50, "stop_token_ids": [2]},
    "min tokens without eos": {"min_tokens": 30, "max_tokens": 50, "ignore_eos": True},
}


@pytest.mark.parametrize("fields", ONE_EACH.values(), ids=ONE_EACH.keys())
def test_each_processor_is_its_plain_definition_and_leaves_other_rows_alone(fields):
    params = SamplingParams(**fields)
    shapes = [([1, 2, 3], []), ([3, 3, 5], [3, 4]), ([1], [5, 5, 2, 5, 5]), ([9, 3, 4], [2, 5])]
    sequences = [row(params, prompt, output) for prompt, output in shapes]
    sequences.insert(2, row(SamplingParams(), [1], [5, 5]))
    logits = logits_of(5)
    wanted = logits.double().tolist()
    for index, (prompt, output) in zip((0, 1, 3, 4), shapes, strict=True):
        wanted[index] = processed(wanted[index], params, prompt, output, EOS)
    assert process(logits, sequences, EOS)
    assert torch.allclose(logits.double(), torch.tensor(wanted, dtype=torch.float64), atol=1e-5)
    assert torch.equal(logits[2], logits_of(5)[2])


@pytest.mark.parametrize("seed", range(4))
def test_all_processors_together_are_their_plain_definitions(seed):
    sequences = mixed_rows(48, seed)
    logits = logits_of(48, seed)
    wanted = [
        processed(values, s.request.params, s.request.prompt_token_ids, s.output_token_ids, EOS)
        for values, s in zip(logits.double().tolist(), sequences, strict=True)
    ]
    process(logits, sequences, EOS)
    assert torch.allclose(logits.double(), torch.tensor(wanted, dtype=torch.float64), atol=1e-4)


def test_what_nobody_asked_for_is_not_done():
    logits = logits_of(3)
    before = logits.clone()
    assert not process(logits, [row(SamplingParams(temperature=0.5, top_k=3))] * 3, EOS)
    assert torch.equal(logits, before)


def test_what_is_kept_between_steps_is_what_a_new_start_finds():
    sequences = mixed_rows(16, seed=9)
    rng = random.Random(3)
    for step in range(70):
        for sequence in sequences:
            sequence.token_ids.append(rng.randrange(VOCAB))
        logits, fresh = logits_of(16, step), logits_of(16, step)
        process(logits, sequences, EOS)
        process(fresh, [again(s) for s in sequences], EOS)
        assert torch.equal(logits, fresh)


@pytest.mark.parametrize("seed", range(3))
def test_a_row_gives_the_same_alone_and_in_a_batch_of_32_mixed_ones(seed):
    sequences = mixed_rows(32, seed)
    together = Sampler(EOS).sample(logits_of(32, seed), sequences)
    for index, sequence in enumerate(sequences):
        logits = logits_of(32, seed)[index : index + 1]
        (alone,) = Sampler(EOS).sample(logits, [again(sequence)])
        assert alone == together[index]


def test_logprobs_are_those_of_the_unprocessed_logits():
    params = SamplingParams(
        temperature=0, logprobs=5, logit_bias={4: 100.0}, presence_penalty=2.0, bad_words=[[8]]
    )
    logits = logits_of(3)
    raw = logits.double().tolist()
    found = Sampler().sample(logits, [row(params, [1], [2, 3])] * 3)
    for values, result in zip(raw, found, strict=True):
        total = math.log(math.fsum(math.exp(value) for value in values))
        wanted = [value - total for value in values]
        order = sorted(range(VOCAB), key=lambda token: -wanted[token])
        told = result.logprobs
        assert result.token == told.token_id == 4
        assert told.logprob == pytest.approx(wanted[4], abs=1e-5)
        assert told.rank == 1 + order.index(4)
        assert list(told.top_ids) == order[:5]
        assert told.top_logprobs == pytest.approx([wanted[t] for t in order[:5]], abs=1e-5)


def test_logprobs_are_told_to_those_who_ask_only():
    asks = [None, 0, 3, 20]
    sequences = [row(SamplingParams(temperature=1, logprobs=count)) for count in asks]
    found = Sampler().sample(logits_of(4), sequences)
    assert found[0].logprobs is None
    assert [len(result.logprobs.top_ids) for result in found[1:]] == [0, 3, 20]
