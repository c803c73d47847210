"""Whole models through the Triton kernels, in the interpreter, against the reference's logits."""

from dataclasses import replace

import pytest
import torch

from common.engine.graphs import StaticBatch
from common.engine.kernels import select_ops
from common.engine.kernels.reference import ReferenceOps
from common.engine.kernels.triton.ops import TritonOps, cublas_scales_rows
from common.engine.kernels.triton.quantize import Quantized
from common.engine.quantization.scheme import Activation
from common.engine.weight import Weight
from common.errors import ConfigError
from tests.engine.driving import make_batch, make_runner, shuffled_blocks
from tests.engine.zoo import make_checkpoint, random_prompt

SIZE = 16


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.inference_mode():
        yield


def run(kernels, path, **settings):
    """Logits of two prompts, cut into a chunk and the rest, then of a step that only decodes."""
    runner = make_runner(path, kernels=kernels, num_blocks=40, **settings)
    tables = shuffled_blocks(runner)
    tables = tables[:4], tables[4:8]
    prompts = random_prompt(35, 1), random_prompt(20, 2)
    steps = [
        [(prompts[0][:21], 0, tables[0]), (prompts[1][:19], 0, tables[1])],
        [(prompts[1][19:], 19, tables[1]), (prompts[0][21:33], 21, tables[0])],
        [(prompts[0][33:34], 33, tables[0]), ([7], 20, tables[1])],
    ]
    batches = [make_batch(rows, SIZE) for rows in steps]
    # Of one layer only, which is the last: have it attend with whole chunks too.
    batches[0] = replace(batches[0], last=None)
    return torch.cat([runner.forward(batch) for batch in batches])


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("llama", {}),
        ("qwen3", {"kv_dtype": "fp8_e4m3", "quantization": "fp8"}),
        ("mistral_window", {"kv_dtype": "fp8_e4m3", "quantization": "fp8-block"}),
        ("qwen3", {}),
        ("qwen3", {"rotate_qk": True}),
        ("qwen3", {"rotate_qk": True, "kv_dtype": "fp8_e4m3"}),
    ],
)
def test_logits_are_those_of_the_reference(arch, settings, tmp_path):
    path = make_checkpoint(arch, False, tmp_path, num_hidden_layers=1)
    expected = run("reference", path, **settings)
    actual = run("triton", path, **settings)
    # A rounding that falls the other way at e4m3 changes a value by a sixteenth.
    quantized = "quantization" in settings or "kv_dtype" in settings
    bound = 0.05 if quantized else 1e-4
    assert (actual - expected).norm() <= bound * expected.norm()
    if not quantized:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_step_padded_for_a_graph_gives_the_same_logits_and_kv(tmp_path):
    path = make_checkpoint("llama", False, tmp_path, num_hidden_layers=1)
    runner = make_runner(path, kernels="triton", num_blocks=12, max_model_len=90)
    tables = [[3, 7], [5, 2]]
    prompts = random_prompt(17, 1), random_prompt(9, 2)
    starts = [(prompt, 0, table) for prompt, table in zip(prompts, tables, strict=True)]
    runner.forward(make_batch(starts, SIZE))
    batch = make_batch([([4], 17, tables[0]), ([8], 9, tables[1])], SIZE)
    before = runner.cache.clone()
    expected, written = runner.forward(batch), runner.cache.clone()
    runner.cache.copy_(before)
    static = StaticBatch(4, 6, 90, runner.device)
    static.fill(batch, 4)
    actual = runner.forward(static.of_size(4))
    # Not bitwise: torch's float32 product of four rows rounds otherwise than that of two.
    torch.testing.assert_close(actual[:2], expected, rtol=1e-5, atol=1e-5)
    # Block 0 is nobody's.
    kv, wanted = (cache[1:].view(torch.float32) for cache in (runner.cache, written))
    torch.testing.assert_close(kv, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("activation", list(Activation))
def test_a_norm_and_an_activation_hand_over_what_the_next_matrix_multiplies(activation):
    ops = TritonOps(torch.device("cpu"), multiprocessors=1)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 256, generator=generator).to(torch.float8_e4m3fn)
    shape = (1, 2) if activation is Activation.GROUP else (64, 1)
    scale = torch.rand(shape, generator=generator) + 0.5
    weight = Weight(values, scale, activation, torch.tensor(0.02))
    linear, expected = ops.linear(weight, None), ReferenceOps().linear(weight, None)
    x = torch.randn(3, 256, generator=generator)
    _, normed = ops.add_norm(x, None, torch.ones(256), 1e-5, linear)
    assert isinstance(normed, Quantized)
    plain = torch.nn.functional.rms_norm(x, (256,), None, 1e-5)
    torch.testing.assert_close(linear(normed), expected(plain), rtol=1e-4, atol=1e-3)
    gate_up = torch.randn(3, 512, generator=generator)
    handed = ops.silu_mul(gate_up, linear)
    assert isinstance(handed, Quantized)
    plain = ReferenceOps().silu_mul(gate_up, linear)
    torch.testing.assert_close(linear(handed), expected(plain), rtol=1e-4, atol=1e-3)


def test_a_backend_that_cannot_run_on_the_device_is_refused():
    assert isinstance(select_ops(torch.device("cpu"), "auto"), ReferenceOps)
    assert isinstance(select_ops(torch.device("cpu"), "triton"), TritonOps)
    with pytest.raises(ConfigError, match="set it to cpu or cuda"):
        select_ops(torch.device("meta"), "auto")


def test_torchs_e4m3_product_is_tried_before_it_is_used():
    assert cublas_scales_rows(torch.device("cpu"))
