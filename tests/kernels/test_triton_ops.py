"""Whole models through the Triton kernels, in the interpreter, against the reference's logits."""

import pytest
import torch

from common.engine.kernels import select_ops
from common.engine.kernels.reference import ReferenceOps
from common.engine.kernels.triton.ops import TritonOps
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
    return torch.cat([runner.forward(make_batch(rows, SIZE)) for rows in steps])


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("llama", {}),
        ("qwen3", {"kv_dtype": "fp8_e4m3", "quantization": "fp8"}),
        ("mistral_window", {"kv_dtype": "fp8_e4m3", "quantization": "fp8-block"}),
    ],
)
def test_logits_are_those_of_the_reference(arch, settings, tmp_path):
    path = make_checkpoint(arch, False, tmp_path, num_hidden_layers=1)
    expected = run("reference", path, **settings)
    actual = run("triton", path, **settings)
    # A rounding that falls the other way at e4m3 changes a value by a sixteenth.
    quantized = "quantization" in settings
    bound = 0.05 if quantized else 1e-4
    assert (actual - expected).norm() <= bound * expected.norm()
    if not quantized:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


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
