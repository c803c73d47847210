"""Logits are transformers' logits, for every architecture, block size and chunking."""

from dataclasses import replace

import pytest
import torch

from common.engine.batch import single_rows
from tests.engine import zoo
from tests.engine.driving import make_batch, make_runner, prompt_logits, shuffled_blocks

torch.set_num_threads(1)

PROMPT = zoo.random_prompt(100, seed=7)
CHUNKS = {"whole": [100], "chunked": [33, 1, 40, 26], "one_by_one": [1] * 100}
CASES = [(arch, tied) for arch in zoo.ARCHITECTURES for tied in (False, True)]
CASES += [(arch, False) for arch in zoo.ZOO if arch not in zoo.ARCHITECTURES]


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("block_size", [1, 16, 32])
@pytest.mark.parametrize(("arch", "tied"), CASES)
def test_prompt_logits_are_those_of_transformers(arch, tied, block_size, chunks):
    path = zoo.checkpoint(arch, tied)
    runner = make_runner(path, block_size=block_size)
    got = prompt_logits(runner, PROMPT, shuffled_blocks(runner), CHUNKS[chunks])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, zoo.expected_logits(path, PROMPT), atol=1e-4, rtol=0)


@pytest.mark.parametrize("arch", zoo.ZOO)
def test_the_cpu_kernels_give_the_logits_of_transformers(arch, tmp_path):
    # The zoo's heads are smaller than what the kernels serve.
    path = zoo.make_checkpoint(arch, False, tmp_path, head_dim=32)
    want = zoo.expected_logits(path, PROMPT)
    runner = make_runner(path, kernels="cpu")
    free = shuffled_blocks(runner)
    for chunks in ([100], [33, 1, 40, 26], [7] * 14 + [2]):
        table = [free.pop() for _ in range(7)]
        got = prompt_logits(runner, PROMPT, table, chunks)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("arch", ["llama", "mistral_window", "qwen3"])
@pytest.mark.parametrize("kv_dtype", ["float32", "bf16", "fp8_e4m3"])
def test_a_sequence_in_a_mixed_batch_of_32_gets_the_logits_it_gets_alone(arch, kv_dtype):
    path = zoo.checkpoint(arch, False)
    together, alone = (make_runner(path, kv_dtype=kv_dtype, num_blocks=900) for _ in range(2))
    size, free = together.layout.block_size, shuffled_blocks(together, seed=3)
    lengths = [1, 2, 15, 16, 17, 31, 64, 65, 100, 129, 200] * 3
    first, second, expected = [], [], []
    for i, length in enumerate(lengths[:32]):
        prompt, table = zoo.random_prompt(length + 9, seed=i), [free.pop() for _ in range(15)]
        # Every third sequence goes on with a chunk, the others decode one token.
        step = prompt[length:] if i % 3 == 0 else prompt[length : length + 1]
        first.append((prompt[:length], 0, table))
        second.append((step, length, table))
        both = [len(prompt[:length]), len(step)]
        expected.append(prompt_logits(alone, prompt[: sum(both)], table, both)[-1])
    together.forward(make_batch(first, size))
    got = together.forward(make_batch(second, size))
    # Matrix products of other sizes round otherwise; in a quantized cache that can tip a value on
    # the edge between two over to its neighbour.
    tolerance = {"float32": 2e-5, "bf16": 2e-3, "fp8_e4m3": 2e-2}[kv_dtype]
    torch.testing.assert_close(got, torch.stack(expected), atol=tolerance, rtol=1e-5)


def test_decoding_sequences_keep_their_order_when_grouped_by_length():
    path = zoo.checkpoint("llama", False)
    runner = make_runner(path)
    free = shuffled_blocks(runner)
    prompts = [zoo.random_prompt(n, seed=n) for n in (120, 3, 70, 3, 200, 66)]
    tables = [[free.pop() for _ in range(13)] for _ in prompts]
    rows = list(zip(prompts, tables, strict=True))
    runner.forward(make_batch([(p[:-1], 0, t) for p, t in rows], 16))
    got = runner.forward(make_batch([(p[-1:], len(p) - 1, t) for p, t in rows], 16))
    want = torch.stack([zoo.expected_logits(path, p)[-1] for p in prompts])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_groups_over_the_memory_limit_are_split_without_changing_results(monkeypatch):
    from common.engine.kernels import reference

    path = zoo.checkpoint("llama", False)
    results = []
    for limit in (reference.MAX_GATHER_ELEMENTS, 1):
        monkeypatch.setattr(reference, "MAX_GATHER_ELEMENTS", limit)
        runner = make_runner(path)
        tables = [[i * 4 + j + 1 for j in range(4)] for i in range(8)]
        prompts = [zoo.random_prompt(40, seed=i) for i in range(8)]
        rows = list(zip(prompts, tables, strict=True))
        runner.forward(make_batch([(p[:-1], 0, t) for p, t in rows], 16))
        batch = make_batch([(p[-1:], 39, t) for p, t in rows], 16)
        assert len(reference.plan_spans(batch, runner._cache, None)) == (8 if limit == 1 else 1)
        results.append(runner.forward(batch))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=0)


def test_long_chunks_are_split_to_bound_their_masks_without_changing_results(monkeypatch):
    from common.engine.kernels import reference

    path = zoo.checkpoint("mistral_window", False)
    monkeypatch.setattr(reference, "MAX_GATHER_ELEMENTS", 400)
    runner = make_runner(path)
    table = shuffled_blocks(runner)
    prompt_logits(runner, PROMPT[:20], table, [20])
    batch = make_batch([(PROMPT[20:], 20, table[:7])], 16, all_rows=True)
    assert len(reference.plan_spans(batch, runner._cache, 19)) == 20
    want = zoo.expected_logits(path, PROMPT)[20:]
    torch.testing.assert_close(runner.forward(batch), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("arch", zoo.ZOO)
def test_the_rows_that_the_last_layer_attends_with_have_the_logits_of_transformers(
    arch, kernels, tmp_path
):
    """Rows of a prompt's middle among them, as those of its log-probabilities are."""
    path = zoo.make_checkpoint(arch, False, tmp_path, head_dim=32)
    runner = make_runner(path, kernels=kernels)
    free = shuffled_blocks(runner)
    prompts = [zoo.random_prompt(n, seed=n) for n in (90, 1, 9, 70)]
    tables = [[free.pop() for _ in range(6)] for _ in prompts]
    runner.forward(make_batch([(p[:40], 0, t) for p, t in zip(prompts, tables, strict=True)], 16))
    rows = [(prompts[0][40:], 40, tables[0]), (prompts[3][40:], 40, tables[3])]
    batch = replace(make_batch(rows, 16), logit_rows=torch.tensor([49, 79, 3, 4, 5]))
    batch = replace(batch, last=single_rows(batch))
    assert len(batch.last.token_ids) == 5
    one, other = (zoo.expected_logits(path, prompts[i]) for i in (0, 3))
    want = torch.stack((one[89], other[69], one[43], one[44], one[45]))
    torch.testing.assert_close(runner.forward(batch), want, atol=1e-4, rtol=0)


def test_logits_are_given_for_the_rows_asked_for_and_none_without():
    path = zoo.checkpoint("qwen2", True)
    runner = make_runner(path)
    batch = make_batch([(PROMPT, 0, list(range(1, 8)))], 16)
    assert runner.forward(batch).shape == (1, zoo.VOCAB)
    silent = make_batch([(PROMPT, 0, list(range(8, 15)))], 16)
    silent = replace(silent, logit_rows=torch.empty(0, dtype=torch.int64), last=None)
    assert runner.forward(silent).shape == (0, zoo.VOCAB)
    # The KV of the silent prompt is whole all the same, its last layer's too.
    for layer in runner._cache.payload:
        torch.testing.assert_close(layer[1:7], layer[8:14], atol=1e-5, rtol=0)


def test_bfloat16_compute_stays_near_float32_and_logits_are_float32():
    path = zoo.checkpoint("llama", False)
    runner = make_runner(path, dtype="bfloat16")
    assert runner.layout.kv_dtype == "bf16"
    got = prompt_logits(runner, PROMPT, shuffled_blocks(runner), [60, 1, 39])
    want = zoo.expected_logits(path, PROMPT)
    assert got.dtype == torch.float32
    assert (got - want).norm() < 0.05 * want.norm()
