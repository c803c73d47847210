"""The device sampler against the sampler that sorts (itself tested against plain Python)."""

import random

import pytest
import torch
import triton
import triton.language as tl

from common.engine.kernels.triton import sampling
from common.engine.kernels.triton.sampling import UNUSABLE, SamplingRows, sample
from common.engine.sampler import Sampler, uniform
from common.engine.sampling_params import SamplingParams
from tests.engine.rows import row

CPU = torch.device("cpu")


def expected_tokens(logits, params, seeds, positions):
    """Of the sampler that sorts. A position is all it reads of a sequence's tokens."""
    rows = [
        row(p, prompt=range(position), seed=seed)
        for p, seed, position in zip(params, seeds, positions, strict=True)
    ]
    return [sampled.token for sampled in Sampler().sample(logits.clone(), rows)]


def tokens_of(logits, params, seeds, positions):
    rows = SamplingRows.of(params, seeds, positions, logits.shape[1], CPU)
    return sample(logits, rows).tolist()


def logits_of(rows, vocab, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * scale


# The interpreter takes some 10 ms for each row, pass and filter that any row has: few rows a call.
@pytest.mark.parametrize(
    "params",
    [
        [{}, {"temperature": 1e-6}, {"temperature": 1.2, "min_p": 0.1}, {"min_p": 1}],
        [{"temperature": 2, "top_k": 5}, {"top_k": 1}],
        [{"temperature": 1.5, "top_p": 0.7}, {"top_p": 1e-9}],
        [{"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02}, {"temperature": 0}],
    ],
    ids=["plain", "top_k", "top_p", "all"],
)
def test_tokens_are_those_of_the_sampler_that_sorts(params):
    params = [SamplingParams(**{"temperature": 1, **settings}) for settings in params]
    count = len(params)
    # Few different values: rows have ties at the cut and at the token drawn.
    logits = (logits_of(count, 50) * 2).round() / 2
    seeds = [2**63 + 7 * row for row in range(count)]
    positions = [3 * row for row in range(count)]
    expected = expected_tokens(logits, params, seeds, positions)
    assert tokens_of(logits, params, seeds, positions) == expected


def test_rows_over_several_chunks_are_as_the_sampler_that_sorts(monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 64)
    rng = random.Random(1)
    count = 3
    logits = (logits_of(count, 100, seed=2) * 2).round() / 2
    logits[2, :70] = -torch.inf
    params = [SamplingParams(temperature=1 + 0.2 * i, top_k=5 + 20 * i) for i in range(count)]
    seeds = [rng.getrandbits(64) for _ in range(count)]
    positions = [rng.randrange(2**12) for _ in range(count)]
    expected = expected_tokens(logits, params, seeds, positions)
    assert tokens_of(logits, params, seeds, positions) == expected


def test_the_first_of_equally_likely_tokens_is_the_greedy_one(monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 16)
    logits = torch.zeros(2, 40)
    logits[0, 7] = -0.0
    logits[1, 19] = logits[1, 33] = 2.5
    assert tokens_of(logits, [SamplingParams(temperature=0)] * 2, [0, 0], [0, 0]) == [0, 19]


@pytest.mark.parametrize(("bad", "temperature"), [(torch.nan, 1), (torch.nan, 0), (torch.inf, 0)])
def test_a_row_that_is_not_finite_spoils_no_other(bad, temperature):
    logits = logits_of(4, 50)
    params = [SamplingParams(temperature=temperature)] * 4
    good = expected_tokens(logits, params, [1, 2, 3, 4], [5, 6, 7, 8])
    logits[2, 10] = bad
    logits[3] = -torch.inf
    assert tokens_of(logits, params, [1, 2, 3, 4], [5, 6, 7, 8]) == [*good[:2], UNUSABLE, UNUSABLE]


def test_the_random_number_of_any_seed_and_position_is_the_samplers():
    @triton.jit
    def draw_kernel(seed, position, out):
        tl.store(out, sampling.uniform_of(tl.load(seed), tl.load(position)))

    for seed, position in ((0, 0), (2**64 - 1, 2**33 + 5), (2**63, 1), (12345678901234567, 99)):
        out = torch.zeros(1, dtype=torch.float64)
        signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
        draw_kernel[(1,)](signed, torch.tensor([position]), out)
        assert out.item() == uniform(seed, position)


def test_logits_are_not_written_and_may_be_rows_of_a_wider_tensor():
    wide = logits_of(2, 80)
    before, logits = wide.clone(), wide[:, :50]
    params = [SamplingParams(temperature=1)] * 2
    expected = expected_tokens(logits, params, [1, 2], [4, 5])
    assert tokens_of(logits, params, [1, 2], [4, 5]) == expected
    assert torch.equal(wide, before)
