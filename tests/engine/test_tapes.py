"""A recorded decode step gives the bits of a step that runs kernel by kernel."""

from dataclasses import replace

import pytest
import torch

from common.engine.kernels.cpu import linear, tape
from common.engine.kernels.cpu.ops import CpuOps
from common.engine.sampling_params import SamplingParams
from common.engine.sequence import EngineRequest, Sequence, StepPlan
from common.kv.connector import KVConnector
from tests.engine import zoo
from tests.engine.driving import make_batch, make_runner, prompt_logits, shuffled_blocks

CASES = {
    "float32": ("llama", {"dtype": "float32"}),
    "bfloat16": ("llama_bias", {"dtype": "bfloat16"}),
    "windows": ("qwen2_window", {"dtype": "bfloat16"}),
    "qk norm": ("qwen3", {"dtype": "bfloat16"}),
    "rotated": ("llama", {"dtype": "bfloat16", "kv_dtype": "fp8_e4m3", "rotate_qk": True}),
    "fp8 kv": ("llama", {"dtype": "bfloat16", "kv_dtype": "fp8_e4m3"}),
    "fp8": ("qwen2", {"dtype": "bfloat16", "quantization": "fp8"}),
    "fp8 blocks": ("llama_bias", {"dtype": "bfloat16", "quantization": "fp8-block"}),
    "fp8 float32": ("llama", {"dtype": "float32", "quantization": "fp8"}),
    "batch invariant": ("llama", {"dtype": "bfloat16", "batch_invariant": True}),
}


@pytest.fixture(autouse=True)
def no_other_products(monkeypatch):
    """Which products a machine finds fastest, in a noisy moment too, is no matter here."""
    monkeypatch.setattr(linear, "CANDIDATES", {"compiled": linear.CompiledLinear})
    linear.best.cache_clear()
    yield
    linear.best.cache_clear()


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    arch, settings = CASES[request.param]
    # Gate and up are one matrix of whole blocks.
    path = zoo.make_checkpoint(
        arch, False, tmp_path_factory.mktemp("tapes"), head_dim=64, intermediate_size=256
    )
    return path, {**settings, "max_model_len": 1024, "num_blocks": 600, "threads": 2}


def fresh(runner, rows):
    """A batch whose tensors nothing else has or had."""
    return make_batch(rows, runner.layout.block_size)


def built(runner, rows):
    """One as the engine's are, where the last one was."""
    request = EngineRequest("r", [0], SamplingParams())
    sequences = tuple(
        Sequence(request, [0] * start + ids, 0, block_table=table) for ids, start, table in rows
    )
    starts, ones = tuple(start for _, start, _ in rows), (1,) * len(rows)
    return runner.build_batch(StepPlan(0, sequences, starts, ones, sampled=(True,) * len(rows)))


def decode(runner, counts, steps, batch_of=built):
    """Logits of steps of so many sequences each, whose contexts have 1 to 700 tokens."""
    size, free = runner.layout.block_size, shuffled_blocks(runner)
    lengths = [1 + 233 * i % 700 for i in range(max(counts))]
    tables = [[free.pop() for _ in range(-(-(n + 64) // size))] for n in lengths]
    for i, (length, table) in enumerate(zip(lengths, tables, strict=True)):
        prompt_logits(runner, zoo.random_prompt(length, seed=i), table, [length])
    out = []
    for step in range(steps):
        for count in counts:
            # Every second time not the same sequences in the same rows.
            chosen = [(i + step // 2) % len(lengths) for i in range(count)]
            rows = [([7 + i], lengths[i], tables[i]) for i in chosen]
            out.append(runner.forward(batch_of(runner, rows)))
            for i in chosen:
                lengths[i] += 1
    return out


def test_recorded_steps_are_bitwise_those_that_run_kernel_by_kernel(case, monkeypatch):
    path, settings = case
    runner = make_runner(path, **settings)
    assert runner._graphs is not None
    got = decode(runner, (1, 3, 8), steps=6)
    moved = decode(make_runner(path, **settings), (1, 3, 8), steps=6, batch_of=fresh)
    monkeypatch.setattr(CpuOps, "tapes", lambda *_, **__: None)
    want = decode(make_runner(path, **settings), (1, 3, 8), steps=6, batch_of=fresh)
    for a, b, c in zip(got, moved, want, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c)


def test_logits_of_a_step_outlive_the_next_one(case):
    path, settings = case
    runner = make_runner(path, **settings)
    first, *_ = got = decode(runner, (2,), steps=2)
    kept = first.clone()
    decode(runner, (2, 5), steps=2)
    assert torch.equal(got[0], kept)


def chunks(runner, connector=None):
    """Logits of steps with chunks of several prompts, beside sequences that decode."""
    size, free = runner.layout.block_size, shuffled_blocks(runner)
    tables = [[free.pop() for _ in range(40)] for _ in range(4)]
    prompts = [zoo.random_prompt(n, seed=n) for n in (333, 70, 1, 90)]
    cuts = [(0, 130, 131, 333), (0, 60, 61, 70), (0, 1, 1, 1), (0, 5, 9, 90)]
    out = []
    for step in range(3):
        rows = [
            (prompt[cut[step] : cut[step + 1]], cut[step], table)
            for prompt, cut, table in zip(prompts, cuts, tables, strict=True)
            if cut[step] < cut[step + 1]
        ]
        batch = make_batch(rows, size)
        if step == 0:  # a chunk that samples nothing
            nothing = torch.empty(0, dtype=torch.int64)
            batch = replace(batch, logit_rows=nothing, last=None)
        out.append(runner.forward(batch, connector))
    return out


class Layers(KVConnector):
    """Notes what it hears, and the KV that is there then."""

    def __init__(self, runner):
        self.runner, self.heard = runner, []

    def wait_for_layer_load(self, layer):
        self.heard.append(("wait", layer, self.sum_of(layer)))

    def save_kv_layer(self, layer):
        self.heard.append(("save", layer, self.sum_of(layer)))

    def sum_of(self, layer):
        return self.runner._cache.payload[layer].view(torch.uint8).sum().item()


def test_recorded_chunks_are_bitwise_those_that_run_kernel_by_kernel(case, monkeypatch):
    path, settings = case
    runner = make_runner(path, **settings)
    runs = [chunks(runner) for _ in range(2)]
    monkeypatch.setattr(CpuOps, "tapes", lambda *_, **__: None)
    want = chunks(make_runner(path, **settings))
    for got in runs:
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_a_connector_hears_of_each_layer_when_its_kv_is_there(case, monkeypatch):
    path, settings = case
    heard = []
    for recorded in (True, False):
        if not recorded:
            monkeypatch.setattr(CpuOps, "tapes", lambda *_, **__: None)
        runner = make_runner(path, **settings)
        connector = Layers(runner)
        out = chunks(runner, connector)
        heard.append((connector.heard, out))
    (one, logits), (other, expected) = heard
    assert len(one) > 12
    assert one == other
    assert all(map(torch.equal, logits, expected))


@pytest.mark.parametrize("patience", [0, 1, tape.PATIENCE])
def test_more_threads_than_cores_wait_for_each_other(case, patience, monkeypatch):
    """Threads that sleep at once are woken; none passes a barrier early."""
    path, settings = case
    monkeypatch.setattr(tape, "PATIENCE", patience)
    alone = decode(make_runner(path, **{**settings, "threads": 1}), (1, 3), steps=8)
    crowd = decode(make_runner(path, **{**settings, "threads": 7}), (1, 3), steps=8)
    for a, b in zip(alone, crowd, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("shape", "quantization"),
    [
        ({"head_dim": 24}, None),
        ({"head_dim": 64, "intermediate_size": 120}, "fp8"),
        # Its gate and up cannot be one matrix.
        ({"head_dim": 64, "intermediate_size": 112}, "fp8-block"),
    ],
)
def test_what_is_no_compiled_kernel_is_not_recorded(shape, quantization, tmp_path):
    path = zoo.make_checkpoint("llama", False, tmp_path, **shape)
    runner = make_runner(path, dtype="bfloat16", quantization=quantization)
    assert runner._graphs is None
