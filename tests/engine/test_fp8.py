"""FP8 products are those of the format's definition, however a checkpoint was published."""

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.engine.kernels.cpu.ops import CpuOps
from common.engine.kernels.reference import ReferenceOps
from common.engine.quantization.fp8 import decode, quantize_weight, round_to_fp8
from common.engine.quantization.scheme import SCHEMES, Activation, Scheme, WeightScale
from common.engine.weight import Weight, fuse
from tests.engine import emulation, published, zoo
from tests.engine.driving import make_runner, prompt_logits, shuffled_blocks

torch.set_num_threads(1)

EPS = 2.0**-24  # of float32: half the distance from 1 to the next number
PROMPT = zoo.random_prompt(60, seed=11)
LLAMA = {**zoo.SHAPE, "rope_theta": 10000.0, "eps": 1e-6}


def test_rounding_goes_to_the_nearest_value_and_ties_to_the_even_one():
    values = [float(emulation.e4m3_value(b)) for b in range(127)]
    edges = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    points = np.array(values + edges, dtype=np.float32)
    near = [np.nextafter(points, np.float32(side), dtype=np.float32) for side in (0, 1e9)]
    x = np.concatenate((points, *near)).clip(0, 448)
    x = np.concatenate((x, -x))
    got = round_to_fp8(torch.from_numpy(x)).tolist()
    for value, rounded in zip(x.tolist(), got, strict=True):
        want = emulation.e4m3_value(emulation.e4m3_byte(Fraction(value)))
        assert rounded == float(want)
    assert round_to_fp8(torch.tensor([torch.nan])).isnan().all()


def test_every_weight_byte_decodes_to_its_value():
    every = torch.arange(256, dtype=torch.uint8)
    every = every[(every & 0x7F) != 0x7F]
    got = decode(every.view(torch.float8_e4m3fn)).tolist()
    assert got == [float(emulation.e4m3_value(byte)) for byte in every.tolist()]


# Tokens, inputs, outputs: for kernels of few and of many tokens, and what no kernel takes.
SHAPES = [(1, 128, 128), (3, 320, 208), (8, 96, 15), (5, 300, 200), (33, 1040, 96)]
CASES = [(scale, kind) for scale in ("tensor", "channel") for kind in ("tensor", "token")]


@pytest.mark.parametrize("ops", [ReferenceOps(), CpuOps()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "activation"), [*CASES, ("block", "group")])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_the_definitions_within_the_rounding_of_a_float32_sum(
    ops, dtype, scale, activation, shape
):
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator)
    x = (x * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
    if rows > 1:
        x[1] = 0
    matrix = torch.randn(outputs, inputs, generator=generator)
    weight = quantize_weight(matrix, Scheme(WeightScale(scale), Activation(activation)))
    static = None
    if activation == "tensor":
        static = x.float().abs().amax() / 500  # some saturate
        weight = Weight(weight.values, weight.scale, weight.activation, static)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    got = ops.linear(weight, bias)(x)
    assert got.dtype == dtype

    # Scales and quotients are float32, as the hardware's; all else is exact.
    wide, group = x.float().numpy(), 128 if activation == "group" else inputs
    a = np.empty(x.shape)
    for start in range(0, inputs, group):
        part = wide[:, start : start + group]
        size = np.abs(part).max(1, keepdims=True) / np.float32(448)
        size = size if static is None else static.numpy()
        y = part / np.where(size == 0, np.float32(1), size)
        a[:, start : start + group] = emulation.nearest_e4m3(y.astype(np.float64)) * size
    spread = weight.scale.double().numpy()
    if scale == "block":
        spread = spread.repeat(128, 0)[:outputs].repeat(128, 1)[:, :inputs]
    b = weight.values.double().numpy() * spread
    want = a @ b.T + bias.double().numpy()
    bound = (inputs + 4) * EPS * (np.abs(a) @ np.abs(b).T + np.abs(bias.double().numpy()))
    if dtype is torch.bfloat16:
        bound += np.abs(want) * 2.0**-8
    assert (np.abs(got.double().numpy() - want) <= bound).all()


def test_a_quantized_weight_is_the_nearest_and_zeros_have_a_positive_scale():
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(130, 140, generator=generator)
    matrix[:128, :128] = 0
    for scheme in SCHEMES.values():
        weight = quantize_weight(matrix, scheme)
        assert (weight.scale > 0).all()
        assert weight.values.shape == matrix.shape
        scale = weight.scale.numpy()
        if scheme.weight is WeightScale.BLOCK:
            assert scale.shape == (2, 2)
            scale = scale.repeat(128, 0)[:130].repeat(128, 1)[:, :140]
        quotient = (matrix.numpy() / scale).astype(np.float64)
        assert (weight.values.double().numpy() == emulation.nearest_e4m3(quotient)).all()
        assert np.abs(weight.values.double().numpy()[128:]).max() == 448


@pytest.mark.parametrize("ops", [ReferenceOps(), CpuOps()])
@pytest.mark.parametrize("rows", [4, 12, 20])
def test_nan_and_infinity_in_an_input_show_in_their_rows_alone(ops, rows):
    matrix = torch.randn(128, 128, generator=torch.Generator().manual_seed(2))
    x = torch.ones(rows, 128)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    for scheme in SCHEMES.values():
        out = ops.linear(quantize_weight(matrix, scheme), None)(x)
        assert out[1].isnan().all()
        assert not out[2].isfinite().all()
        assert out[[0, 3]].isfinite().all()


def test_matrices_are_fused_only_where_one_product_has_their_scales():
    def part(rows, scheme):
        return quantize_weight(torch.ones(rows, 256), scheme)

    row, block = SCHEMES["fp8"], SCHEMES["fp8-block"]
    assert fuse([part(96, row), part(32, row)]).scale.shape == (128, 1)
    assert fuse([part(256, block), part(100, block)]).scale.shape == (3, 2)
    assert fuse([part(100, block), part(256, block)]) is None
    assert fuse([part(128, block), part(128, row)]) is None
    assert fuse([Weight(torch.ones(2, 256)), part(128, row)]) is None
    static = [
        Weight(w.values, w.scale, Activation.TENSOR, torch.tensor(s))
        for w, s in ((part(4, row), 0.5), (part(4, row), 0.75), (part(4, row), 0.25))
    ]
    assert fuse(static).input_scale == 0.75


@pytest.mark.parametrize("name", published.FORMATS)
def test_a_published_checkpoint_gives_the_logits_of_a_float64_emulation(name, tmp_path):
    source = zoo.checkpoint("llama", False)
    made = published.publish(source, tmp_path / "model", name)
    if published.FORMATS[name].inputs == "static":
        published.fuse_input_scales(made)
    runner = make_runner(made.path)
    got = prompt_logits(runner, PROMPT, shuffled_blocks(runner), [17, 1, 42]).double().numpy()
    want = emulation.llama_logits(source, LLAMA, PROMPT, lambda x: x, made.multiply)
    plain = emulation.llama_logits(source, LLAMA, PROMPT, lambda x: x)
    # An activation on the edge between two e4m3 values may fall either way in float32; it changes
    # the tokens that follow, by less than quantizing does. All before it agree.
    error = np.abs(got - want).max(1)
    effect = np.abs(want - plain).max()
    assert effect > 1e-2
    assert (error < 1e-5).mean() > 0.4
    assert error.max() < effect


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "mistral"])
def test_other_architectures_serve_quantized_and_partly_ignored_checkpoints(arch, tmp_path):
    source = zoo.checkpoint(arch, True)
    skip = "model.layers.1.self_attn.k_proj"
    made = published.publish(source, tmp_path / "model", "compressed-channel", skip=(skip,))
    edit_quantization(made.path, lambda q: q.update(ignore=["lm_head", skip]))
    runner = make_runner(made.path)
    got = prompt_logits(runner, PROMPT, shuffled_blocks(runner), [60])
    want = zoo.expected_logits(source, PROMPT)
    assert 0 < (got - want).norm() < 0.2 * want.norm()


def edit_quantization(path, change):
    raw = json.loads((path / "config.json").read_text())
    change(raw["quantization_config"])
    (path / "config.json").write_text(json.dumps(raw))


def edit_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
