"""Ranks that hold their KV heads in memory of their own, as on GPUs: what they compute is what one
process computes, and what connectors read and write are whole blocks all the same."""

import functools
import os
import signal
import threading
import time
from concurrent.futures import Future
from datetime import timedelta

import numpy as np
import pytest
import torch

import baton.llm
from baton import LLM, SamplingParams
from common.engine.config import EngineConfig
from common.engine.parallel import group, ranks, rooms
from common.engine.runner import ModelRunner
from common.errors import ConfigError, Unavailable
from common.kv.connectors import pages
from common.kv.connectors.copies import HostCopies
from tests.engine import zoo
from tests.engine.driving import make_batch, make_runner, prompt_logits
from tests.support.ranks import alive, ranks_of

torch.set_num_threads(1)

GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
TWO_KV = {"num_attention_heads": 8}
TABLE = [7, 2, 9, 4]
DEATH_S = 5.0


def private_ranks(path, size, **settings):
    settings = {"num_blocks": 20, **settings}
    return make_runner(path, tensor_parallel=size, private_kv=True, **settings)


@pytest.fixture(scope="module")
def two_kv(tmp_path_factory):
    return zoo.make_checkpoint("llama", False, tmp_path_factory.mktemp("zoo") / "model", **TWO_KV)


# What ranks compute ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "arch", "tied", "shape"),
    [
        (2, "mistral_window", False, {}),
        (4, "qwen2", True, TWO_KV),  # each KV head is on two ranks
    ],
)
def test_greedy_tokens_of_ranks_with_caches_of_their_own_are_those_of_transformers(
    size, arch, tied, shape, tmp_path, monkeypatch
):
    config = functools.partial(EngineConfig, private_kv=True)
    monkeypatch.setattr(baton.llm, "EngineConfig", config)
    path = zoo.make_checkpoint(arch, tied, tmp_path / "model", **shape)
    prompts = [zoo.random_prompt(length, seed=length) for length in (1, 16, 17, 70)]
    asks = [{"prompt_token_ids": prompt} for prompt in prompts]
    settings = {"max_model_len": 160, "threads": 1, "max_num_batched_tokens": 20}
    with LLM(path, tensor_parallel_size=size, **settings) as llm:
        assert isinstance(llm.engine.runner.cache, rooms.SpreadBlocks)
        results = llm.generate(asks, GREEDY)
        (again,) = llm.generate(asks[-1:], GREEDY)
    got = [result.outputs[0].token_ids for result in results]
    assert got == [zoo.expected_greedy(path, prompt, 32) for prompt in prompts]
    assert again.outputs[0].token_ids == got[-1]
    assert again.num_cached_tokens == 64
    assert ranks_of(os.getpid()) == []


# What connectors see -----------------------------------------------------------------------


def test_ranks_compute_and_attend_to_the_blocks_of_one_process(two_kv):
    """Of four, two and two of which hold the same KV head: what they computed is read whole, and
    what was written whole they find."""
    one, other = zoo.random_prompt(60, seed=1), zoo.random_prompt(60, seed=2)
    table = [11, 13, 15, 17]
    alone, spread = make_runner(two_kv, num_blocks=20), private_ranks(two_kv, 4)
    try:
        logits = prompt_logits(spread, one, TABLE, [17, 1, 42])
        computed = torch.from_numpy(spread.cache.read(range(1, 20)))
        prompt_logits(alone, other[:48], table, [48])
        for block, page in zip(table[:3], pages.copy_pages(alone.cache, table[:3]), strict=True):
            pages.write_page(spread.cache, block, page)
        rest = spread.forward(make_batch([(other[48:], 48, table)], 16, all_rows=True))
        assert (spread.fingerprint, spread.layout) == (alone.fingerprint, alone.layout)
    finally:
        spread.close()
    torch.testing.assert_close(logits, zoo.expected_logits(two_kv, one), atol=1e-4, rtol=0)
    torch.testing.assert_close(rest, zoo.expected_logits(two_kv, other)[48:], atol=1e-4, rtol=0)
    alone.cache.fill_(0xFF)
    prompt_logits(alone, one, TABLE, [17, 1, 42])
    # What no token was written to is NaN, as it was made.
    got, want = (rows.view(torch.float32) for rows in (computed, alone.cache[1:]))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0, equal_nan=True)


def test_every_copy_of_spread_blocks_is_that_of_blocks_in_one_place(two_kv, monkeypatch):
    # Room for two blocks or so: most copies take several orders.
    monkeypatch.setattr(rooms, "ROOMS_BYTES", 4096)
    spread = private_ranks(two_kv, 2, kv_dtype="fp8_e4m3", block_size=8, num_blocks=40)
    layout = spread.layout
    whole = torch.full((40, layout.block_bytes), 0xFF, dtype=torch.uint8)
    ids, some = [3, 11, 5, 19], range(1, 3)
    try:
        for cache in (whole, spread.cache):
            rng = np.random.default_rng(1)
            for block in ids:
                pages.write_page(cache, block, memoryview(rng.bytes(layout.block_bytes)))
            payload = rng.bytes(3 * len(some) * layout.layer_bytes)
            pages.write_layers(cache, layout, (4, 3, 8), some, memoryview(payload))
        assert np.array_equal(spread.cache.read(range(40)), whole.numpy())
        assert pages.copy_pages(spread.cache, ids) == pages.copy_pages(whole, ids)
        for layers in (some, range(3)):
            assert pages.copy_layers(spread.cache, layout, ids, layers) == pages.copy_layers(
                whole, layout, ids, layers
            )
            # The second of a sequence's blocks of 16 tokens, out of its pages of 8.
            cut = ids[2:], layout.with_block_size(16), 1, 1, layers
            one, other = (HostCopies(cache, layout).blocks(*cut) for cache in (spread.cache, whole))
            assert one.result(0) == other.result(0)
    finally:
        spread.close()


# How they end ------------------------------------------------------------------------------


def test_a_rank_that_dies_while_blocks_move_is_named(two_kv):
    spread = private_ranks(two_kv, 2)
    (pid,) = ranks_of(os.getpid())
    os.kill(pid, signal.SIGSTOP)  # it does not answer, and then it cannot
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    began = time.monotonic()
    try:
        for _ in range(2):
            with pytest.raises(Unavailable, match=rf"rank 1 \(pid {pid}\) was killed by SIGKILL"):
                spread.cache.read([1])
    finally:
        spread.close()
    assert time.monotonic() - began < DEATH_S


def test_a_rank_that_is_stuck_while_blocks_move_is_given_up(two_kv, monkeypatch):
    monkeypatch.setattr(ranks, "SEND_S", 1.0)
    spread = private_ranks(two_kv, 2)
    (pid,) = ranks_of(os.getpid())
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        with pytest.raises(Unavailable, match="blocks could not be moved between the ranks"):
            spread.cache.write([1], np.zeros((1, spread.layout.block_bytes), np.uint8))
    finally:
        spread.close()
    assert time.monotonic() - began < 1 + DEATH_S
    assert not alive(pid)


def test_nobody_waits_for_a_meeting_that_a_dead_rank_cannot_come_to(two_kv, monkeypatch):
    """NCCL's never returns then."""

    def connect(self):
        os.kill(ranks_of(os.getpid())[0], signal.SIGKILL)
        threading.Event().wait()

    monkeypatch.setattr(ModelRunner, "connect", connect)
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"rank 1 \(pid \d+\) was killed by SIGKILL"):
        private_ranks(two_kv, 2)
    assert time.monotonic() - began < 30
    assert ranks_of(os.getpid()) == []


def test_the_end_of_a_step_is_not_waited_for_when_a_rank_is_gone(monkeypatch):
    failure = Future()
    left = iter([False, False, True])
    group.poll(lambda: next(left), failure)
    assert next(left, None) is None
    monkeypatch.setattr(group, "TIMEOUT", timedelta(seconds=0.1))
    with pytest.raises(TimeoutError):
        group.poll(lambda: False, failure)
    failure.set_result(Unavailable("rank 3 is gone"))
    for done in (False, True):
        with pytest.raises(Unavailable, match="rank 3"):
            group.poll(lambda done=done: done, failure)


# Where they may be -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "gpus", "nccl", "said"),
    [
        ("cuda", 2, True, "tensor_parallel is 4 .*torch sees 2 GPUs; .*set tensor_parallel to 2"),
        ("cuda", 1, True, "torch sees 1 GPU; .*set tensor_parallel to 1 or less"),
        ("cuda:1", 8, True, "'cuda:1'; the ranks take cuda:0 to cuda:3.*set device to cuda"),
        ("cuda", 8, False, "without NCCL.*set tensor_parallel to 1"),
        ("meta", 8, True, "'meta'; ranks run on cpu or cuda"),
    ],
)
def test_devices_that_ranks_cannot_be_on_are_refused_with_the_remedy(device, gpus, nccl, said):
    with pytest.raises(ConfigError, match=said):
        group.check_devices(4, torch.device(device), gpus, nccl)


def test_devices_that_ranks_can_be_on_are_not_refused():
    group.check_devices(4, torch.device("cuda"), 4, nccl=True)
    group.check_devices(4, torch.device("cpu"), 0, nccl=False)
