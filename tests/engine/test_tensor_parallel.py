"""Several ranks compute what one process computes, and none of them outlives another."""

import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from baton import LLM, SamplingParams
from common.engine.config import ModelConfig
from common.engine.parallel import group
from common.engine.parallel.shard import Shard
from common.engine.quantization.fp8 import quantize_weight
from common.engine.quantization.scheme import SCHEMES, Activation
from common.engine.weight import cut
from common.errors import CheckpointError, ConfigError, Unavailable
from tests.engine import published, zoo
from tests.engine.driving import make_batch, make_runner, prompt_logits
from tests.support.mesh import wait_until
from tests.support.ranks import alive, ranks_of

torch.set_num_threads(1)

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
LENGTHS = (1, 2, 16, 17, 70)
FOUR_KV = {"num_attention_heads": 8, "num_key_value_heads": 4}
TWO_KV = {"num_attention_heads": 8}
DEATH_S = 5.0


def make_llm(path, size, **settings):
    return LLM(path, max_model_len=160, threads=1, tensor_parallel_size=size, **settings)


def given(prompts):
    return [{"prompt_token_ids": prompt} for prompt in prompts]


# What ranks compute ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "arch", "tied", "shape"),
    [
        (2, "llama", True, {}),
        (2, "mistral_window", False, {}),
        (2, "qwen3", False, {}),
        (4, "llama_bias", False, FOUR_KV),
        (4, "qwen2", True, TWO_KV),  # each KV head is read by two ranks, written by one
    ],
)
def test_greedy_tokens_of_several_ranks_are_those_of_transformers(
    size, arch, tied, shape, tmp_path
):
    path = zoo.make_checkpoint(arch, tied, tmp_path / "model", **shape)
    prompts = [zoo.random_prompt(length, seed=length) for length in LENGTHS]
    # Chunks of 20 tokens: most steps compute part of a prompt and sample nothing of it.
    with make_llm(path, size, max_num_batched_tokens=20) as llm:
        assert len(ranks_of(os.getpid())) == size - 1
        results = llm.generate(given(prompts), GREEDY)
        (again,) = llm.generate(given(prompts[-1:]), GREEDY)
    got = [result.outputs[0].token_ids for result in results]
    assert got == [zoo.expected_greedy(path, prompt, 64) for prompt in prompts]
    assert again.outputs[0].token_ids == got[-1]
    assert again.num_cached_tokens == 64
    assert ranks_of(os.getpid()) == []


@pytest.mark.parametrize(("size", "shape"), [(2, {}), (4, TWO_KV)])
def test_blocks_and_their_keys_are_the_same_whatever_the_number_of_ranks(size, shape, tmp_path):
    path = zoo.make_checkpoint("llama", False, tmp_path / "model", **shape)
    prompt, table = zoo.random_prompt(60, seed=1), [7, 2, 9, 4]
    alone = make_runner(path, num_blocks=20)
    ranks = make_runner(path, num_blocks=20, tensor_parallel=size)
    try:
        logits = prompt_logits(ranks, prompt, table, [17, 1, 42])
        torch.testing.assert_close(logits, zoo.expected_logits(path, prompt), atol=1e-4, rtol=0)
        prompt_logits(alone, prompt, table, [17, 1, 42])
        assert ranks.fingerprint == alone.fingerprint
        assert ranks.layout == alone.layout
        # All 60 tokens of all heads, and nothing but them: the rest is NaN as before. The null
        # block is where a rank leaves what another one writes.
        got, want = (r.cache[1:].view(torch.float32) for r in (ranks, alone))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0, equal_nan=True)
    finally:
        ranks.close()


def test_a_step_without_logits_ends_when_every_rank_has_written_its_heads(tmp_path):
    """A connector reads the pages right after the step, sampled or not."""
    path = zoo.make_checkpoint("llama", False, tmp_path / "model", num_hidden_layers=1)
    ranks = make_runner(path, num_blocks=20, tensor_parallel=2)
    (pid,) = ranks_of(os.getpid())
    batch = make_batch([(zoo.random_prompt(16, seed=1), 0, [3])], 16)
    late = threading.Timer(0.3, os.kill, (pid, signal.SIGCONT))
    try:
        os.kill(pid, signal.SIGSTOP)
        late.start()
        ranks.forward(replace(batch, logit_rows=batch.logit_rows[:0], last=None))
        assert not ranks.cache[3].view(torch.float32).isnan().any()
    finally:
        late.join()
        ranks.close()


@pytest.mark.parametrize("name", ["autofp8-static", "deepseek"])
def test_ranks_share_the_matrices_of_a_quantized_checkpoint(name, tmp_path):
    shape = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}
    source = zoo.make_checkpoint(
        "llama", False, tmp_path / "float", intermediate_size=384, num_hidden_layers=2, **shape
    )
    path = published.publish(source, tmp_path / "model", name).path
    prompt, table = zoo.random_prompt(60, seed=1), [7, 2, 9, 4]
    alone = make_runner(path, num_blocks=20, kv_dtype="fp8_e4m3")
    ranks = make_runner(path, num_blocks=20, kv_dtype="fp8_e4m3", tensor_parallel=2)
    try:
        want = prompt_logits(alone, prompt, table, [17, 1, 42])
        error = (prompt_logits(ranks, prompt, table, [17, 1, 42]) - want).abs()
    finally:
        ranks.close()
    # Sums in another order may tip a value on the edge between two quantized ones.
    effect = (want - zoo.expected_logits(source, prompt)).abs()
    assert error.max() < effect.max() / 20
    assert error.median() < effect.median() / 1000


# What each rank holds ----------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_part_of_a_quantized_matrix_has_the_scales_of_its_place(scheme):
    weight = torch.randn(300, 520, generator=torch.Generator().manual_seed(1))
    whole = quantize_weight(weight, scheme)
    for rows, columns in ((range(128, 300), range(384)), (range(256), None), (None, None)):
        got = dense(cut(whole, "a.proj", rows, columns))
        want = dense(whole)[rows.start if rows else 0 : rows.stop if rows else 300]
        assert torch.equal(got, want[:, : columns.stop] if columns else want)


def dense(weight):
    """What it means: values times scales."""
    scale = weight.scale
    if weight.activation is Activation.GROUP:
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        scale = scale[: weight.values.shape[0], : weight.values.shape[1]]
    return weight.values.float() * scale


def test_a_cut_through_a_block_with_one_scale_is_refused():
    weight = quantize_weight(torch.ones(256, 256), SCHEMES["fp8-block"])
    for rows, columns in ((range(64, 256), None), (range(64), None), (None, range(100, 200))):
        with pytest.raises(ConfigError, match=r"a.proj: .*set tensor_parallel lower"):
            cut(weight, "a.proj", rows, columns)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """ModelConfigs by (heads, KV heads, intermediate size)."""
    base = ModelConfig.from_folder(zoo.checkpoint("llama", False))

    def of(heads, kv_heads, mlp=112):
        return replace(base, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=mlp)

    return of


@pytest.mark.parametrize("intermediate", [8, 112, 1024, 11008])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [(8, 8, 1), (8, 8, 8), (8, 4, 2), (8, 2, 4), (8, 2, 8), (8, 1, 4), (32, 8, 8), (6, 2, 6)],
)
def test_every_part_of_a_model_is_on_one_rank_and_kv_heads_go_with_their_queries(
    shapes, heads, kv_heads, size, intermediate
):
    model = shapes(heads, kv_heads, intermediate)
    shards = [Shard.of(model, rank, size) for rank in range(size)]
    for part, total in (("mlp", intermediate), ("vocab", zoo.VOCAB), ("q_rows", heads * 16)):
        assert [i for shard in shards for i in getattr(shard, part)] == list(range(total))
    assert [h for shard in shards if shard.writes_kv for h in shard.kv_heads] == list(
        range(kv_heads)
    )
    first = 0
    for shard in shards:
        read = {head * kv_heads // heads for head in range(first, first + shard.num_heads)}
        assert read == set(shard.kv_heads)
        assert list(shard.kv_rows) == [16 * h + i for h in shard.kv_heads for i in range(16)]
        first += shard.num_heads
    assert first == heads
    if intermediate >= 128 * size:
        assert all(shard.mlp.start % 128 == 0 for shard in shards)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "fitting"),
    [
        (6, 2, 4, "1, 2, 6"),
        (8, 4, 3, "1, 2, 4, 8"),
        (12, 3, 2, "1, 3, 6, 12"),
        (4, 4, 8, "1, 2, 4"),
    ],
)
def test_heads_that_the_ranks_cannot_share_are_refused_with_what_they_can(
    shapes, heads, kv_heads, size, fitting
):
    with pytest.raises(
        ConfigError, match=rf"tensor_parallel is {size}.*set it to one of {fitting}$"
    ):
        Shard.of(shapes(heads, kv_heads), 0, size)


def test_what_cannot_be_loaded_is_refused_and_leaves_no_rank(tmp_path):
    folder = shutil.copytree(zoo.checkpoint("llama", False), tmp_path / "model")
    with pytest.raises(ConfigError, match="tensor_parallel is 4"):
        make_llm(folder, 4)
    with pytest.raises(ConfigError, match="tensor_parallel is 0"):
        make_llm(folder, 0)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        make_llm(folder, 2)
    assert ranks_of(os.getpid()) == []


# How they end ------------------------------------------------------------------------------


def test_a_rank_that_is_killed_ends_every_request_with_its_name_within_seconds():
    prompt = zoo.random_prompt(20, seed=1)
    long = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
    with LLM(zoo.checkpoint("llama", False), tensor_parallel_size=2, threads=1) as llm:
        (pid,) = ranks_of(os.getpid())

        def tokens():
            return llm.engine.state().counters["generated_tokens"]

        def kill_when_busy():
            wait_until(lambda: tokens() > 10, 20, "tokens")
            os.kill(pid, signal.SIGKILL)
            return time.monotonic()

        with ThreadPoolExecutor() as pool:
            killed = pool.submit(kill_when_busy)
            with pytest.raises(Unavailable, match=rf"rank 1 \(pid {pid}\) was killed by SIGKILL"):
                llm.generate(given([prompt] * 3), long)
            assert time.monotonic() - killed.result() < DEATH_S
        assert not llm.engine.state().healthy
        with pytest.raises(Unavailable, match="rank 1"):
            llm.generate(given([prompt]), long)
    assert not alive(pid)


def test_a_rank_that_is_stuck_ends_every_request_when_its_time_is_over(monkeypatch):
    monkeypatch.setattr(group, "TIMEOUT", timedelta(seconds=2))
    with make_llm(zoo.checkpoint("llama", False), 2) as llm:
        (pid,) = ranks_of(os.getpid())
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(Unavailable, match="rank 0 broke off a step"):
            llm.generate(given([[5, 6, 7]]), GREEDY)
        assert time.monotonic() - began < 2 + DEATH_S
    assert not alive(pid)
