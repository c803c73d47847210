"""rotate_qk: the same attention from a K that FP8 holds better, where Q and K have outliers."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.engine.config import EngineConfig
from common.engine.kernels.reference import hadamard
from common.engine.runner import ModelRunner
from common.errors import ConfigError
from tests.engine import zoo
from tests.engine.driving import make_runner, prompt_logits, shuffled_blocks

torch.set_num_threads(1)

PROMPT = zoo.random_prompt(150, seed=1)
CHUNKS = [110] + [1] * 40


def logits(path, **settings):
    runner = make_runner(path, **settings)
    return prompt_logits(runner, PROMPT, shuffled_blocks(runner)[:10], CHUNKS)


def relative_error(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.fixture(scope="module")
def outliers(tmp_path_factory):
    """Of each head of Q and K two channels are twelve times as large as the others."""
    path = tmp_path_factory.mktemp("outliers")
    zoo.make_checkpoint("llama", False, path, head_dim=64)
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = tensor.mul_(0.5).view(-1, 64, tensor.shape[1])
            rows[:, :2] *= 12
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("d", [1, 2, 16, 64, 512])
def test_the_transform_is_a_product_with_sylvesters_matrix(d):
    x = torch.randn(3, 5, d, generator=torch.Generator().manual_seed(d))
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(d)] for i in range(d)]
    matrix = torch.tensor(signs, dtype=torch.float64) / d**0.5
    torch.testing.assert_close(hadamard(x).double(), x.double() @ matrix, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])  # head sizes 16 and 32
def test_with_kv_that_is_not_quantized_logits_are_those_of_transformers(arch, kernels):
    path = zoo.checkpoint(arch, False)
    got = logits(path, kernels=kernels, rotate_qk=True)
    torch.testing.assert_close(got, zoo.expected_logits(path, PROMPT), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_outliers_cost_fp8_kv_less_of_its_accuracy(outliers, kernels):
    exact = zoo.expected_logits(outliers, PROMPT)
    plain, rotated = (
        relative_error(logits(outliers, kernels=kernels, kv_dtype="fp8_e4m3", rotate_qk=r), exact)
        for r in (False, True)
    )
    assert rotated < 0.8 * plain


def test_ranks_rotate_their_own_heads(outliers):
    one = logits(outliers, rotate_qk=True)
    two = make_runner(outliers, rotate_qk=True, num_blocks=30, tensor_parallel=2)
    try:
        got = prompt_logits(two, PROMPT, shuffled_blocks(two)[:10], CHUNKS)
    finally:
        two.close()
    torch.testing.assert_close(got, one, rtol=1e-4, atol=1e-4)


def test_rotated_kv_has_a_key_of_its_own():
    path = zoo.checkpoint("llama", False)
    plain, rotated = (make_runner(path, rotate_qk=r).fingerprint for r in (False, True))
    assert plain != rotated


def test_heads_that_have_no_hadamard_matrix_are_refused_at_start(tmp_path):
    zoo.make_checkpoint("llama", False, tmp_path, head_dim=48)
    with pytest.raises(ConfigError, match=r"a head size that is .* has 48; leave it unset"):
        ModelRunner(EngineConfig(tmp_path, rotate_qk=True))
    with pytest.raises(ConfigError, match=r"these kernels: 32, 64, 128, 256.* this model has 16"):
        ModelRunner(EngineConfig(zoo.checkpoint("llama", False), rotate_qk=True, kernels="triton"))
