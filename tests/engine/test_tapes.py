"""A recorded decode step gives the bits of a step that runs kernel by kernel."""

import pytest
import torch

from common.engine.kernels.cpu import tape
from common.engine.kernels.cpu.ops import CpuOps
from tests.engine import zoo
from tests.engine.driving import make_batch, make_runner, prompt_logits, shuffled_blocks

CASES = {
    "float32": ("llama", {"dtype": "float32"}),
    "bfloat16": ("llama_bias", {"dtype": "bfloat16"}),
    "windows": ("qwen2_window", {"dtype": "bfloat16"}),
    "qk norm": ("qwen3", {"dtype": "bfloat16"}),
    "rotated": ("llama", {"dtype": "bfloat16", "kv_dtype": "fp8_e4m3", "rotate_qk": True}),
    "fp8 kv": ("llama", {"dtype": "bfloat16", "kv_dtype": "fp8_e4m3"}),
    "batch invariant": ("llama", {"dtype": "bfloat16", "batch_invariant": True}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    arch, settings = CASES[request.param]
    path = zoo.make_checkpoint(arch, False, tmp_path_factory.mktemp("tapes"), head_dim=64)
    return path, {**settings, "max_model_len": 1024, "num_blocks": 600, "threads": 2}


def decode(runner, counts, steps):
    """Logits of steps of so many sequences each, whose contexts have 1 to 700 tokens."""
    size, free = runner.layout.block_size, shuffled_blocks(runner)
    lengths = [1 + 233 * i % 700 for i in range(max(counts))]
    tables = [[free.pop() for _ in range(-(-(n + 64) // size))] for n in lengths]
    for i, (length, table) in enumerate(zip(lengths, tables, strict=True)):
        prompt_logits(runner, zoo.random_prompt(length, seed=i), table, [length])
    out = []
    for step in range(steps):
        for count in counts:
            # Not the same sequences in the same rows.
            chosen = [(i + step) % len(lengths) for i in range(count)]
            rows = [([7 + i], lengths[i], tables[i]) for i in chosen]
            out.append(runner.forward(make_batch(rows, size)))
            for i in chosen:
                lengths[i] += 1
    return out


def test_recorded_steps_are_bitwise_those_that_run_kernel_by_kernel(case, monkeypatch):
    path, settings = case
    runner = make_runner(path, **settings)
    assert runner._graphs is not None
    got = decode(runner, (1, 3, 8), steps=4)
    monkeypatch.setattr(CpuOps, "tapes", lambda *_, **__: None)
    want = decode(make_runner(path, **settings), (1, 3, 8), steps=4)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_logits_of_a_step_outlive_the_next_one(case):
    path, settings = case
    runner = make_runner(path, **settings)
    first, *_ = got = decode(runner, (2,), steps=2)
    kept = first.clone()
    decode(runner, (2, 5), steps=2)
    assert torch.equal(got[0], kept)


@pytest.mark.parametrize("patience", [0, 1, tape.PATIENCE])
def test_more_threads_than_cores_wait_for_each_other(case, patience, monkeypatch):
    """Threads that sleep at once are woken; none passes a barrier early."""
    path, settings = case
    monkeypatch.setattr(tape, "PATIENCE", patience)
    alone = decode(make_runner(path, **{**settings, "threads": 1}), (1, 3), steps=8)
    crowd = decode(make_runner(path, **{**settings, "threads": 7}), (1, 3), steps=8)
    for a, b in zip(alone, crowd, strict=True):
        assert torch.equal(a, b)


def test_what_is_no_compiled_kernel_is_not_recorded(tmp_path):
    odd = zoo.make_checkpoint("llama", False, tmp_path / "odd", head_dim=24)
    assert make_runner(odd, dtype="bfloat16")._graphs is None
    fp8 = zoo.make_checkpoint("llama", False, tmp_path / "fp8", head_dim=64)
    assert make_runner(fp8, dtype="bfloat16", quantization="fp8")._graphs is None
