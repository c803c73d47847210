"""fp8_attention: e4m3 products in the attention of prompts, and where there are none."""

import pytest
import torch

from common.engine.config import EngineConfig
from common.engine.kernels.reference_e4m3 import attend_e4m3
from common.engine.runner import ModelRunner
from common.errors import ConfigError
from tests.engine import zoo
from tests.engine.driving import make_runner, prompt_logits, shuffled_blocks
from tests.kernels.paging import attention64

torch.set_num_threads(1)

PROMPT = zoo.random_prompt(150, seed=1)
CHUNKS = [70, 61, 1, 18]


def logits(path, **settings):
    settings = {"num_blocks": 20, "kv_dtype": "fp8_e4m3", **settings}
    runner = make_runner(path, **settings)
    return prompt_logits(runner, PROMPT, shuffled_blocks(runner)[:10], CHUNKS)


def relative_error(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("d", [64, 256])
def test_the_result_is_off_by_the_rounding_of_q_and_of_the_probabilities(d, window):
    generator = torch.Generator().manual_seed(d)
    q = torch.randn(40, 6, d, generator=generator)
    values = torch.randn(2, 2, 90, d, generator=generator).mul_(60).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2, 90, generator=generator) / 60
    k, v = (values.double() * scales.double().unsqueeze(-1)).unbind(0)
    first = 32
    positions = torch.arange(first + 50, first + 90)
    got = attend_e4m3(q, values, scales, positions, first, window)
    wanted = attention64(q, k.transpose(0, 1), v.transpose(0, 1), d**-0.5, window)
    assert 0.01 < relative_error(got, wanted) < 0.06


def test_what_e4m3_holds_exactly_is_exact():
    # Equal keys and V's of one scale: all probabilities are equal, and 448 in their unit.
    values = torch.randn(2, 1, 40, 64).mul_(60).to(torch.float8_e4m3fn)
    values[0] = values[0, :, :1].clone()
    scales = torch.full((2, 1, 40), 0.25)
    q = torch.full((40, 2, 64), 3.0)
    got = attend_e4m3(q, values, scales, torch.arange(40), 0, None)
    k, v = (values.double() * 0.25).unbind(0)
    wanted = attention64(q, k.transpose(0, 1), v.transpose(0, 1), 0.125, None)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "mistral_window"])
def test_the_triton_kernels_and_the_reference_agree(arch, tmp_path):
    path = zoo.make_checkpoint(arch, False, tmp_path, num_hidden_layers=2, head_dim=64)
    exact = logits(path, kernels="reference")
    wanted = logits(path, kernels="reference", fp8_attention=True)
    got = logits(path, kernels="triton", fp8_attention=True)
    # Where a sum differs in its last bits a rounding to e4m3 may fall the other way: few do.
    assert relative_error(got, wanted) < 0.25 * relative_error(wanted, exact)


def test_kv_of_other_products_has_a_key_of_its_own():
    path = zoo.checkpoint("llama", False)
    settings = {"kv_dtype": "fp8_e4m3", "kernels": "reference"}
    plain, multiplied = (
        make_runner(path, fp8_attention=e4m3, **settings).fingerprint for e4m3 in (False, True)
    )
    assert plain != multiplied


@pytest.mark.parametrize(
    ("arch", "settings", "reason"),
    [
        (
            "qwen3",
            {"kv_dtype": "bf16", "kernels": "reference"},
            "set kv_dtype to fp8_e4m3, or leave fp8_attention unset",
        ),
        ("llama", {"kernels": "triton"}, "heads of at least 32 .* this model has 16; leave it"),
        ("qwen3", {"kernels": "cpu"}, "is for GPUs.* device is 'cpu'; leave it unset, or set kern"),
        ("qwen3", {}, "is for GPUs"),
    ],
)
def test_where_there_is_no_such_product_it_is_refused_at_start(arch, settings, reason):
    settings = {"kv_dtype": "fp8_e4m3", **settings}
    with pytest.raises(ConfigError, match=reason):
        ModelRunner(EngineConfig(zoo.checkpoint(arch, False), fp8_attention=True, **settings))
