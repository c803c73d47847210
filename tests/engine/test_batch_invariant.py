"""With batch_invariant, logits are the same to the bit however tokens were put into steps."""

import pytest
import torch

from baton.llm import LLM, SamplingParams
from common.engine.config import EngineConfig
from common.engine.kernels import check_batch_invariant, select_ops
from common.engine.runner import ModelRunner
from common.errors import ConfigError
from tests.engine import zoo
from tests.engine.driving import make_batch, make_runner, prompt_logits, shuffled_blocks

torch.set_num_threads(1)

PROMPT = zoo.random_prompt(300, seed=5)


@pytest.fixture(
    scope="module",
    params=[
        ("llama", {"dtype": "bfloat16"}),
        ("qwen3", {"dtype": "float32"}),
        ("llama", {"dtype": "float32", "quantization": "fp8"}),
        ("llama", {"dtype": "bfloat16", "quantization": "fp8-block"}),
    ],
    ids=["bfloat16", "float32", "fp8", "fp8-block"],
)
def case(request, tmp_path_factory):
    arch, numerics = request.param
    # Wide enough for a library to cut its products into blocks.
    path = tmp_path_factory.mktemp(arch)
    zoo.make_checkpoint(arch, False, path, head_dim=64, hidden_size=384, intermediate_size=512)
    return path, numerics


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8_e4m3"])
def test_logits_are_bitwise_those_of_a_request_alone(case, kv_dtype):
    path, numerics = case
    settings = {**numerics, "kv_dtype": kv_dtype, "max_model_len": 512, "num_blocks": 1500}
    runner = make_runner(path, batch_invariant=True, **settings)
    size, free = runner.layout.block_size, shuffled_blocks(runner)
    table = [free.pop() for _ in range(20)]
    whole = prompt_logits(runner, PROMPT, table, [300])
    for chunks in ([300], [7, 1, 120, 172], [299, 1], [256] + [1] * 44):
        other = [free.pop() for _ in range(20)]
        assert torch.equal(prompt_logits(runner, PROMPT, other, chunks), whole)
    # One token after a prefix that is there already, beside 63 others of all lengths.
    rows = [([PROMPT[299]], 299, table)]
    for i in range(63):
        length, own = 1 + 4 * i, [free.pop() for _ in range(16)]
        prompt_logits(runner, zoo.random_prompt(length, seed=i), own, [length])
        rows.insert(i % 7, (zoo.random_prompt(1 + i % 3, seed=i), length, own))
    place = next(i for i, row in enumerate(rows) if row[2] is table)
    got = runner.forward(make_batch(rows, size))
    assert torch.equal(got[place], whole[-1])


def test_tokens_and_logprobs_of_a_batch_are_bitwise_those_of_requests_alone(case):
    path, numerics = case
    prompts = [{"prompt_token_ids": zoo.random_prompt(3 + 9 * i, seed=i)} for i in range(12)]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=3)

    def logprobs(llm, asked):
        outputs = llm.generate(asked, params, use_tqdm=False)
        return [
            [{token: x.logprob for token, x in step.items()} for step in o.outputs[0].logprobs]
            for o in outputs
        ]

    settings = {**numerics, "max_model_len": 256, "threads": 1, "batch_invariant": True}
    llm = LLM(path, **settings)
    together = logprobs(llm, prompts)
    # Few blocks: sequences are preempted and computed again. No prefix is found again.
    tight = LLM(path, **settings, num_blocks=24, max_num_batched_tokens=33)
    assert logprobs(tight, prompts) == together
    assert tight.engine.state().counters["preemptions"] > 0
    for prompt, want in zip(prompts, together, strict=True):
        assert logprobs(llm, [prompt]) == [want]


def test_kv_of_other_numerics_has_another_key(case):
    path, numerics = case
    one, other = (make_runner(path, **numerics, batch_invariant=b) for b in (False, True))
    assert one.fingerprint != other.fingerprint


def test_what_cannot_be_batch_invariant_is_refused_at_start():
    with pytest.raises(ConfigError, match="batch_invariant needs the CPU or the Triton"):
        select_ops(torch.device("cpu"), "reference", batch_invariant=True)
    with pytest.raises(ConfigError, match="head size"):
        ModelRunner(EngineConfig(zoo.checkpoint("llama", False), batch_invariant=True))
    gpu = torch.device("cuda")
    with pytest.raises(ConfigError, match="dtype is float32; set it to bfloat16"):
        check_batch_invariant(gpu, torch.float32, 128)
    check_batch_invariant(gpu, torch.bfloat16, 100)


def test_sums_over_four_ranks_do_not_depend_on_the_batch(tmp_path):
    """Cut into parts for the ranks, a sum's order would depend on its place among the rows."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    path = zoo.make_checkpoint("llama", False, tmp_path / "model", hidden_size=384, **shape)
    settings = {"dtype": "bfloat16", "num_blocks": 60, "max_model_len": 256}
    runner = make_runner(path, batch_invariant=True, tensor_parallel=4, **settings)
    try:
        prompt, free = PROMPT[:70], shuffled_blocks(runner)
        tables = [[free.pop() for _ in range(5)] for _ in range(3)]
        whole = prompt_logits(runner, prompt, tables[0], [70])
        for table, chunks in zip(tables[1:], ([7, 1, 62], [69, 1]), strict=True):
            assert torch.equal(prompt_logits(runner, prompt, table, chunks), whole)
    finally:
        runner.close()
