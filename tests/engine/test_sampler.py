import math
import random

import pytest
import torch

from common.engine.sampler import Sampler, philox, uniform
from common.engine.sampling_params import SamplingParams

VOCAB = 50


def logits_of(rows, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCAB, generator=generator) * scale


def expected_token(row, params, draw):
    """One row with Python's floats and lists: filters in vLLM's order, then the inverse CDF."""
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    if params.greedy:
        return order[0]
    top = row[order[0]]
    pairs = [(token, math.exp((row[token] - top) / params.temperature)) for token in order]
    pairs = [(token, weight) for token, weight in pairs if weight >= params.min_p]
    if params.top_k > 0:
        pairs = pairs[: params.top_k]
    total = math.fsum(weight for _, weight in pairs)
    kept, before = [], 0.0
    for token, weight in pairs:
        if kept and params.top_p < 1 and before >= params.top_p * total:
            break
        kept.append((token, weight))
        before += weight
    goal, reached = draw * math.fsum(weight for _, weight in kept), 0.0
    for token, weight in kept:
        reached += weight
        if goal < reached:
            return token
    return kept[-1][0]


# Random123's known answers for philox4x32-10.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, words):
    assert philox(counter, key) == words


def test_random_numbers_are_uniform_and_differ_by_seed_and_position():
    draws = [uniform(seed, position) for seed in range(50) for position in range(50)]
    assert len(set(draws)) == len(draws)
    assert all(0 <= draw < 1 for draw in draws)
    assert abs(sum(draws) / len(draws) - 0.5) < 0.02
    assert uniform(2**64 - 1, 2**31) != uniform(2**32 - 1, 2**31)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1),
        SamplingParams(temperature=0.3),
        SamplingParams(temperature=1e-6),
        SamplingParams(temperature=2, top_k=5),
        SamplingParams(temperature=1.5, top_p=0.7),
        SamplingParams(temperature=1.2, min_p=0.1),
        SamplingParams(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02),
        SamplingParams(temperature=1, top_k=1),
        SamplingParams(temperature=1, top_p=1e-9),
        SamplingParams(temperature=1, min_p=1),
        SamplingParams(temperature=1, top_k=10**6),
        SamplingParams(temperature=1, top_k=-1),
    ],
    ids=str,
)
def test_tokens_are_those_of_a_plain_implementation(params):
    logits = logits_of(200)
    seeds = [7 * row for row in range(200)]
    positions = list(range(200))
    tokens = Sampler().sample(logits, [params] * 200, seeds, positions)
    rows = logits.double().tolist()
    assert tokens == [
        expected_token(rows[i], params, uniform(seeds[i], positions[i])) for i in range(200)
    ]


def test_a_rows_token_does_not_depend_on_the_other_rows():
    rng = random.Random(1)
    rows = 64
    logits = logits_of(rows, seed=2)
    params = [
        SamplingParams(
            temperature=rng.choice([0, 0.5, 1.0, 1.7]),
            top_k=rng.choice([0, 3, 10]),
            top_p=rng.choice([1.0, 0.8, 0.3]),
            min_p=rng.choice([0.0, 0.05]),
        )
        for _ in range(rows)
    ]
    seeds = [rng.getrandbits(64) for _ in range(rows)]
    positions = [rng.randrange(1000) for _ in range(rows)]
    sampler = Sampler()
    together = sampler.sample(logits, params, seeds, positions)
    for i in range(rows):
        alone = sampler.sample(logits[i : i + 1], [params[i]], [seeds[i]], [positions[i]])
        assert alone == [together[i]]


def test_frequencies_follow_the_probabilities():
    logits = torch.tensor([[0.0, math.log(2), math.log(3), -torch.inf]]).repeat(6000, 1)
    params = [SamplingParams(temperature=1)] * 6000
    tokens = Sampler().sample(logits, params, [11] * 6000, list(range(6000)))
    shares = [tokens.count(token) / 6000 for token in range(4)]
    assert shares == pytest.approx([1 / 6, 2 / 6, 3 / 6, 0], abs=0.02)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_spoils_no_other(bad):
    logits = logits_of(4)
    params = [SamplingParams(temperature=t) for t in (0, 1, 0, 1)]
    good = Sampler().sample(logits, params, [1, 2, 3, 4], [5, 6, 7, 8])
    logits[2, 10] = bad
    logits[3, 0] = bad
    assert Sampler().sample(logits, params, [1, 2, 3, 4], [5, 6, 7, 8]) == [*good[:2], None, None]


def test_a_row_without_a_possible_token_has_none():
    logits = torch.full((1, VOCAB), -torch.inf)
    assert Sampler().sample(logits, [SamplingParams()], [0], [0]) == [None]


@pytest.mark.parametrize("temperature", [0, 1])
def test_banned_tokens_are_not_chosen_and_the_logits_are_not_written(temperature):
    logits = torch.tensor([[9.0, 8.0, 1.0], [9.0, 8.0, 1.0]])
    before = logits.clone()
    params = [SamplingParams(temperature=temperature, top_k=1)] * 2
    tokens = Sampler().sample(logits, params, [1, 1], [1, 1], [(0,), ()])
    assert tokens == [1, 0]
    assert torch.equal(logits, before)
