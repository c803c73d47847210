import math
import random

import pytest
import torch

from common.engine.sampler import CANDIDATES, Sampler, philox, uniform
from common.engine.sampling_params import SamplingParams
from common.errors import InvalidRequest
from tests.engine.rows import row, tokens_of

VOCAB = 50


def logits_of(rows, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCAB, generator=generator) * scale


def expected_token(row, params, draw):
    """One row with Python's floats and lists: filters in vLLM's order, then the inverse CDF over
    the tokens that are left, by id."""
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
    kept.sort()
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
    positions = [1 + index for index in range(200)]
    rows = logits.double().tolist()
    sequences = [row(params, [0] * positions[i], seed=seeds[i]) for i in range(200)]
    tokens = tokens_of(Sampler().sample(logits, sequences))
    assert tokens == [
        expected_token(rows[i], params, uniform(seeds[i], positions[i])) for i in range(200)
    ]


@pytest.mark.parametrize("shape", ["peaked", "flat", "equal"])
def test_a_big_vocabulary_gives_the_same_whether_a_few_tokens_decide_or_all(shape):
    """Also where many logits are equal, as rounded ones are."""
    generator = torch.Generator().manual_seed(3)
    logits = (
        torch.randn(60, 1000, generator=generator) * {"peaked": 6, "flat": 0.2, "equal": 1}[shape]
    )
    logits = logits.round() if shape == "equal" else logits
    rng = random.Random(4)
    params = [
        SamplingParams(
            temperature=rng.choice([0.3, 1.0]),
            top_k=rng.choice([0, 1, 7, CANDIDATES, CANDIDATES + 1, 700]),
            top_p=rng.choice([1.0, 0.999, 0.9, 0.2]),
            min_p=rng.choice([0.0, 0.01]),
        )
        for _ in range(60)
    ]
    sequences = [row(p, [0] * (1 + i), seed=i) for i, p in enumerate(params)]
    rows = logits.double().tolist()
    tokens = tokens_of(Sampler().sample(logits.clone(), sequences))
    assert tokens == [
        expected_token(rows[i], params[i], uniform(i, 1 + i)) for i in range(len(params))
    ]
    for i in range(0, 60, 7):
        alone = Sampler().sample(logits[i : i + 1].clone(), [sequences[i]])
        assert tokens_of(alone) == [tokens[i]]


def test_frequencies_follow_the_probabilities():
    logits = torch.tensor([[0.0, math.log(2), math.log(3), -torch.inf]]).repeat(2000, 1)
    sequences = [row(SamplingParams(temperature=1), [0], seed=i) for i in range(2000)]
    tokens = tokens_of(Sampler().sample(logits, sequences))
    shares = [tokens.count(token) / 2000 for token in range(4)]
    assert shares == pytest.approx([1 / 6, 2 / 6, 3 / 6, 0], abs=0.03)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_ends_in_an_error_and_spoils_no_other(bad):
    params = [
        SamplingParams(temperature=temperature, frequency_penalty=1.0, logprobs=2)
        for temperature in (0, 1, 0, 1)
    ]
    sequences = [row(p, [1, 2], [3, 3], seed=i) for i, p in enumerate(params)]
    good = Sampler().sample(logits_of(4), sequences)
    logits = logits_of(4)
    logits[2, 10] = bad
    logits[3, 0] = bad
    found = Sampler().sample(logits, sequences)
    assert found[:2] == good[:2]
    assert [result.token for result in found[2:]] == [None, None]
    assert all("position 4" in str(result.error) for result in found[2:])


def test_a_row_without_a_possible_token_has_none():
    (result,) = Sampler().sample(torch.full((1, VOCAB), -torch.inf), [row(SamplingParams())])
    assert result.token is None
    assert "no usable logits" in str(result.error)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_request_that_bans_every_token_ends_in_an_error_that_names_the_cause(temperature):
    everything = SamplingParams(
        temperature=temperature, bad_words=tuple((token,) for token in range(VOCAB))
    )
    free = SamplingParams(temperature=temperature)
    sequences = [row(everything), row(free)]
    banned, other = Sampler().sample(logits_of(2), sequences)
    assert isinstance(banned.error, InvalidRequest)
    assert banned.error.field == "bad_words"
    assert other == Sampler().sample(logits_of(2)[1:], [row(free)])[0]
    assert other.token is not None
