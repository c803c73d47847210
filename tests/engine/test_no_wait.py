"""Nothing on the engine's thread waits for a device between two steps (no_wait.py)."""

import os
import subprocess
import sys

import pytest
import torch

from common.engine.batch_builder import BatchBuilder
from common.engine.device_pages import DevicePages
from common.engine.graphs import StaticBatch
from common.engine.kernels.triton.sampling import SamplingRows
from common.engine.runner import take_tokens
from common.engine.sampler import Sampler
from common.engine.sampling_params import SamplingParams
from common.engine.sequence import UNKNOWN_TOKEN, EngineRequest, Sequence, StepPlan
from common.kv.layout import KVLayout
from tests.engine.no_wait import DEVICE, Waits, refused_waits

VOCAB = 300


@pytest.fixture
def refuse_waits():
    with refused_waits():
        yield


def sequence(index: int, **params) -> Sequence:
    prompt = list(range(3, 40 + index))
    request = EngineRequest(f"r{index}", prompt, SamplingParams(**params))
    made = Sequence(request, list(prompt), seed=index, block_table=list(range(1, 9)))
    made.computed = len(prompt) - 1
    return made


KINDS = [
    {"temperature": 0},
    {"temperature": 1, "top_k": 5},
    {"temperature": 1, "top_p": 0.5, "min_p": 0.1},
    {"temperature": 0, "logprobs": 3},
    {"temperature": 1, "logprobs": 0},
    {"temperature": 0, "min_tokens": 4, "stop_token_ids": (7, 8)},
    {"temperature": 0, "logit_bias": {3: 1.0, 9: -2.0}},
    {"temperature": 0, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    {"temperature": 0, "repetition_penalty": 1.2},
    {"temperature": 0, "bad_words": ((5,), (6, 7))},
]


def choose(logits, params, seeds, positions):
    """What TritonOps does before its kernels, which need a GPU or an interpreter."""
    rows = SamplingRows.of(params, seeds, positions, logits.shape[1], logits.device)
    assert rows.reals.device == rows.whole.device == DEVICE
    return torch.empty(len(logits), dtype=torch.int64, device=DEVICE)


def drawn(kinds):
    logits = torch.empty(len(kinds), VOCAB, device=DEVICE)
    sequences = [sequence(i, **params) for i, params in enumerate(kinds)]
    return sequences, Sampler([2], choose).draw(logits, sequences)


@pytest.mark.parametrize("kinds", [KINDS, *([kind] for kind in KINDS)], ids=str)
def test_choosing_tokens_waits_for_nothing_whatever_is_asked(kinds, refuse_waits):
    assert drawn(kinds)[1].tokens.device == DEVICE


def test_a_batch_with_tokens_of_the_step_before_and_one_for_a_graph(refuse_waits):
    sequences, draw = drawn(KINDS)
    builder = BatchBuilder(16, DEVICE)
    for tokens in (1, 5):  # steps that only decode, and steps with chunks
        for one in sequences:
            one.token_ids.append(UNKNOWN_TOKEN)
        count = len(sequences)
        plan = StepPlan(
            step=1,
            sequences=tuple(sequences),
            start=tuple(len(one.token_ids) - tokens for one in sequences),
            scheduled=(tokens,) * count,
            sampled=(True,) * count,
        )
        batch = builder.build(plan)
        take_tokens(batch, plan, sequences, draw.tokens)
        assert batch.token_ids.device == batch.block_table.device == DEVICE
        if tokens == 1:
            StaticBatch(16, 8, 100, DEVICE).fill(batch, 16)


def test_copies_out_of_pages_and_into_them(refuse_waits):
    class Bus:
        def leave(self, rows):
            assert rows.device == DEVICE
            return rows

        def bring(self, rows):
            return torch.empty(rows.shape, dtype=torch.uint8, device=DEVICE)

    layout = KVLayout(3, 2, 8, 16, "fp8_e4m3")
    data = torch.empty(20, layout.block_bytes, dtype=torch.uint8, device=DEVICE)
    pages = DevicePages(data, layout, Bus())
    for layers in (None, range(1, 3)):
        rows = pages.begin([3, 9], layers)
        pages.write([4, 2], torch.empty(rows.shape, dtype=torch.uint8).numpy(), layers)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[[0, 1]],
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.index_put_((torch.tensor([0, 1]),), x[:2]),
        lambda x: x[:2].copy_(torch.zeros(2)),
        lambda x: torch.zeros(2).to(DEVICE),
        lambda x: torch.tensor([1.0, 2.0], device=DEVICE),
        lambda x: torch.as_tensor([1.0, 2.0], device="meta"),
        lambda x: x.__setitem__((slice(None), [0, 1]), 1.0),
        lambda x: x.cpu(),
        bool,
    ],
)
def test_what_waits_is_refused(waits, refuse_waits):
    with pytest.raises((Waits, NotImplementedError, RuntimeError)):
        waits(torch.empty(4, device=DEVICE))


def test_no_step_of_a_model_waits():
    # A process of its own: in this one Triton interprets.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.waits", "none", "fp8", "fp8-block"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["40 steps"] * 3
