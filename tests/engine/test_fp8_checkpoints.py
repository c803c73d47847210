"""What quantized checkpoints say of themselves is honoured or refused, never guessed."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.engine.config import EngineConfig, ModelConfig
from common.engine.runner import ModelRunner
from common.errors import CheckpointError, ConfigError
from tests.engine import emulation, published, zoo
from tests.engine.driving import make_batch, make_runner, prompt_logits, shuffled_blocks
from tests.engine.published import CHANNEL, GROUP, STATIC, TOKEN, compressed

torch.set_num_threads(1)

PROMPT = zoo.random_prompt(60, seed=11)
LLAMA = {**zoo.SHAPE, "rope_theta": 10000.0, "eps": 1e-6}
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint in each of three formats. Do not write into them."""
    base = tmp_path_factory.mktemp("fp8")
    source = zoo.checkpoint("llama", False)
    names = ("autofp8-static", "compressed-channel", "deepseek")
    return {name: published.publish(source, base / name, name) for name in names}


def copied(made, name, tmp_path):
    return shutil.copytree(made[name].path, tmp_path / "model")


def load(path, **settings):
    return ModelRunner(EngineConfig(model=path, num_blocks=8, max_model_len=64, **settings))


def edit_config(path, change):
    file = path / "config.json"
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


def edit_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def parse(tmp_path, quantization):
    raw = json.loads((zoo.checkpoint("llama", False) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": quantization}))
    return ModelConfig.from_folder(tmp_path).quantization


def test_modules_are_ignored_by_name_by_end_and_by_pattern(tmp_path):
    ignore = ["lm_head", "re:.*layers\\.0\\..*", "model.layers.1.mlp.down_proj"]
    found = parse(tmp_path, compressed(CHANNEL, TOKEN, ignore=ignore))
    assert found.scheme("lm_head") is None
    assert found.scheme("model.layers.0.self_attn.q_proj") is None
    assert found.scheme("model.layers.1.mlp.down_proj") is None
    assert found.scheme("model.layers.11.mlp.down_proj") is not None
    fp8 = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.1", "o_proj"]}
    found = parse(tmp_path, fp8)
    assert found.scheme("model.layers.1.mlp.up_proj") is None
    assert found.scheme("model.layers.2.self_attn.o_proj") is None
    assert found.scheme("model.layers.10.mlp.up_proj") is not None
    assert found.scheme("lm_head") is None


def test_the_config_of_a_published_llama_is_read(tmp_path):
    # As llm-compressor wrote it, everything that says nothing included.
    empty = {"actorder": None, "block_structure": None, "group_size": None, "observer_kwargs": {}}
    config = compressed(
        {**CHANNEL, **empty, "observer": "minmax"},
        {**TOKEN, **empty, "observer": None},
        global_compression_ratio=1.24,
        quantization_status="frozen",
        sparsity_config={"format": "dense", "global_sparsity": 0.14, "targets": []},
        transform_config={},
        version="0.12.3",
    )
    config["config_groups"]["group_0"].update(output_activations=None, format="float-quantized")
    scheme = parse(tmp_path, config).scheme("model.layers.0.mlp.up_proj")
    assert (scheme.weight, scheme.activation) == ("channel", "token")


def test_groups_give_their_modules_their_schemes(tmp_path):
    config = compressed(CHANNEL, TOKEN)
    config["config_groups"] = {
        "attention": {
            "targets": ["re:.*self_attn\\.[qkvo]_proj$"],
            "weights": STATIC,
            "input_activations": STATIC,
        },
        "mlp": {
            "targets": ["re:.*mlp.*"],
            "weights": {**STATIC, "strategy": "block", "block_structure": [128, 128]},
            "input_activations": GROUP,
        },
    }
    found = parse(tmp_path, config)
    assert found.scheme("model.layers.0.self_attn.k_proj").activation == "tensor"
    assert found.scheme("model.layers.0.mlp.up_proj").weight == "block"
    assert found.scheme("model.layers.0.other") is None


def _with(config, *path_and_value):
    *path, value = path_and_value
    config = inner = copy.deepcopy(config)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return config


CT = compressed(CHANNEL, TOKEN)
G0 = ("config_groups", "group_0")
FP8 = {"quant_method": "fp8"}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("fp8", "quantization_config is 'fp8'"),
        ({}, "quant_method is None"),
        ({"quant_method": "awq", "bits": 4}, "quant_method is 'awq'"),
        ({"quant_method": ["fp8"]}, "quant_method"),
        ({**FP8, "activation_scheme": "none"}, "activation_scheme is 'none'"),
        ({**FP8, "fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({**FP8, "scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0'"),
        ({**FP8, "weight_block_size": [64, 64]}, r"weight_block_size is \[64, 64\]"),
        ({**FP8, "weight_block_size": 128}, "weight_block_size is 128"),
        (
            {**FP8, "weight_block_size": [128, 128], "activation_scheme": "static"},
            "with static activations",
        ),
        ({**FP8, "modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'"),
        ({**FP8, "modules_to_convert": ["model.embed_tokens"]}, "modules_to_convert"),
        (_with(CT, "format", "pack-quantized"), "format is 'pack-quantized'"),
        (_with(CT, "sparsity_config", {"format": "sparse-24-bitmask"}), "sparsity_config"),
        (_with(CT, "transform_config", {"config_groups": {"a": 1}}), "transform_config"),
        (_with(CT, "ignore", ["re:("]), "ignore"),
        (_with(CT, "ignore", [3]), "ignore"),
        (_with(CT, "config_groups", []), "config_groups"),
        (_with(CT, *G0, None), "group_0"),
        (_with(CT, *G0, "weights", None), "group_0.weights is None"),
        (_with(CT, *G0, "input_activations", None), "weights alone are quantized"),
        (_with(CT, *G0, "output_activations", STATIC), "output_activations"),
        (_with(CT, *G0, "format", "nvfp4-pack-quantized"), "group_0.format"),
        (_with(CT, *G0, "weights", "num_bits", 4), "weights.num_bits is 4"),
        (_with(CT, *G0, "weights", "type", "int"), "weights.type is 'int'"),
        (_with(CT, *G0, "weights", "symmetric", False), "weights.symmetric is False"),
        (_with(CT, *G0, "weights", "strategy", "group"), "weights.strategy is 'group'"),
        (_with(CT, *G0, "weights", "dynamic", True), "weights.dynamic is True"),
        (_with(CT, *G0, "input_activations", "type", "int"), "input_activations.type"),
        (_with(CT, *G0, "input_activations", "dynamic", "local"), "input_activations.dynamic"),
        (_with(CT, *G0, "input_activations", "dynamic", False), "input_activations.strategy"),
        (_with(CT, *G0, "input_activations", "strategy", "group"), "input_activations.strategy"),
        (_with(CT, *G0, "weights", {**STATIC, "strategy": "block"}), "block_structure is None"),
        (_with(CT, "kv_cache_scheme", {**STATIC, "num_bits": 4}), "kv_cache_scheme.num_bits"),
        (_with(CT, "kv_cache_scheme", {**TOKEN}), "kv_cache_scheme.strategy"),
    ],
)
def test_a_scheme_that_is_not_served_is_refused_by_file_and_field(tmp_path, config, named):
    with pytest.raises(CheckpointError, match=named) as caught:
        parse(tmp_path, config)
    assert str(tmp_path / "config.json") in str(caught.value)


def _set(name, value):
    def change(tensors):
        tensors[name] = value(tensors[name]) if callable(value) else value

    return change


def _nan_byte(weight):
    weight.view(torch.uint8)[3, 5] = 0xFF
    return weight


SCALE, BLOCKS = f"{Q}.weight_scale", f"{Q}.weight_scale_inv"


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("compressed-channel", lambda t: t.pop(SCALE), (SCALE, "is missing", "download")),
        ("autofp8-static", lambda t: t.pop(f"{Q}.input_scale"), (f"{Q}.input_scale", "missing")),
        ("deepseek", lambda t: t.pop(BLOCKS), ("is missing",)),
        ("autofp8-static", _set(SCALE, torch.tensor(0.0)), (SCALE, "holds 0.0", "positive")),
        ("autofp8-static", _set(SCALE, torch.tensor(-0.5)), (SCALE, "holds -0.5")),
        ("autofp8-static", _set(SCALE, torch.tensor(torch.inf)), (SCALE, "holds inf")),
        ("autofp8-static", _set(f"{Q}.input_scale", torch.tensor(torch.nan)), ("holds nan",)),
        ("compressed-channel", _set(SCALE, lambda s: s.index_fill(0, torch.tensor(7), -1.0)),
         (SCALE, "holds -1.0", "baton quantize")),
        ("compressed-channel", _set(SCALE, torch.ones(95, 1)), (SCALE, "(95, 1)", "(96, 1)")),
        ("compressed-channel", _set(SCALE, torch.tensor(1.0)), (SCALE, "()", "(96, 1)")),
        ("autofp8-static", _set(SCALE, torch.ones(3)), (SCALE, "(3,)")),
        ("deepseek", _set(BLOCKS, torch.ones(96, 1)), (BLOCKS, "(96, 1)", "(1, 1)")),
        ("deepseek", _set(BLOCKS, torch.ones(1, 1).to(torch.float8_e4m3fn)), ("float8_e4m3fn",)),
        ("deepseek", _set(f"{Q}.weight", _nan_byte), (f"{Q}.weight", "NaN", "download")),
        ("deepseek", _set(f"{Q}.weight", lambda w: w.bfloat16()), (f"{Q}.weight", "bfloat16")),
        ("deepseek", _set(f"{Q}.weight", lambda w: w.to(torch.float8_e5m2)), ("F8_E5M2", "e4m3")),
        ("deepseek", _set("model.norm.weight", lambda w: w.to(torch.float8_e4m3fn)),
         ("model.norm.weight", "FP8")),
    ],
)  # fmt: skip
def test_unsound_tensors_are_refused_by_name_value_and_remedy(made, tmp_path, name, change, named):
    path = copied(made, name, tmp_path)
    edit_tensors(path, change)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    for part in (str(path), *named):
        assert part in str(caught.value)


def test_fp8_weights_without_a_word_in_config_json_are_refused(made, tmp_path):
    path = copied(made, "deepseek", tmp_path)
    edit_config(path, lambda raw: raw.pop("quantization_config"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .* (FP8|no place)"):
        load(path)


def test_scales_in_half_precision_and_as_vectors_are_read(made, tmp_path):
    path = copied(made, "compressed-channel", tmp_path)
    whole = load(path)

    def halve(tensors):
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name] = tensors[name].bfloat16().float()

    edit_tensors(path, halve)
    want = load(path)

    def flatten(tensors):
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name] = tensors[name].bfloat16().view(-1)

    edit_tensors(path, flatten)
    got = load(path)
    batch = make_batch([(PROMPT[:20], 0, [1, 2])], 16)
    assert torch.equal(got.forward(batch), want.forward(batch))
    assert not torch.equal(got.forward(batch), whole.forward(batch))


# Static KV scales ------------------------------------------------------------------------


KV_NAMES = {
    "k_scale": ("k_scale", "v_scale"),
    "output_scale": ("k_proj.output_scale", "v_proj.output_scale"),
    "kv_scale": ("kv_scale", "kv_scale"),
}


def add_kv_scales(path, names=("k_scale", "v_scale"), layers=range(3)):
    """Different for each layer; the smaller ones make values saturate. Returns [layer][k|v]."""
    scales = [[0.004 * (layer + 1), 0.002 * (layer + 1)] for layer in range(3)]

    def change(tensors):
        for layer in layers:
            for name, scale in zip(names, scales[layer], strict=True):
                tensor = torch.tensor([scale])
                tensors.setdefault(f"model.layers.{layer}.self_attn.{name}", tensor)

    edit_tensors(path, change)
    if names[0] == names[1]:
        scales = [[k, k] for k, _ in scales]
    return scales


# The wider head is one that compiled kernels take.
@pytest.mark.parametrize(("spelling", "dim"), [*((name, 16) for name in KV_NAMES), ("k_scale", 32)])
def test_kv_is_quantized_by_the_checkpoints_own_scales(tmp_path, spelling, dim):
    path = zoo.make_checkpoint("llama", False, tmp_path / "model", head_dim=dim)
    only_kv = compressed(CHANNEL, TOKEN, config_groups={}, kv_cache_scheme=STATIC)
    edit_config(path, lambda raw: raw.update(quantization_config=only_kv))
    scales = add_kv_scales(path, KV_NAMES[spelling])
    runner = make_runner(path)
    got = prompt_logits(runner, PROMPT, shuffled_blocks(runner), [17, 43]).double().numpy()
    block = runner._cache.payload[0][shuffled_blocks(runner)[0]]
    assert block.float().abs().max() == 448  # some saturate
    for layer in range(3):
        stored = runner._cache.scales[layer][shuffled_blocks(runner)[0]]
        for side in (0, 1):
            assert stored[side].unique().tolist() == [np.float32(scales[layer][side])]

    order = iter([s for layer in scales for s in layer])  # k and v of each layer, in turn

    def keep(x):
        scale = float(np.float32(next(order)))
        return emulation.nearest_e4m3(x / scale) * scale

    config = {**LLAMA, "head_dim": dim}
    want = emulation.llama_logits(path, config, PROMPT, keep)
    # Values on the edge between two may fall either way, as everywhere.
    error = np.abs(got - want).max(1)
    plain = emulation.llama_logits(path, config, PROMPT, lambda x: x)
    assert (error < 1e-5).mean() > 0.4
    assert error.max() < np.abs(plain - want).max() / 8


def test_ranks_quantize_their_heads_of_kv_by_the_checkpoints_own_scales(tmp_path):
    path = zoo.make_checkpoint("llama", False, tmp_path / "model", head_dim=32)
    only_kv = compressed(CHANNEL, TOKEN, config_groups={}, kv_cache_scheme=STATIC)
    edit_config(path, lambda raw: raw.update(quantization_config=only_kv))
    add_kv_scales(path)
    alone = make_runner(path, num_blocks=20)
    table, pages = [7, 2, 9, 4], []
    for private in (False, True):
        ranks = make_runner(path, num_blocks=20, tensor_parallel=2, private_kv=private)
        try:
            prompt_logits(ranks, PROMPT, table, [17, 43])
            pages.append(ranks.cache.read(table[:3]) if private else ranks.cache[table[:3]].numpy())
        finally:
            ranks.close()
    prompt_logits(alone, PROMPT, table, [17, 43])
    want = alone.cache[table[:3]].numpy()
    for got in pages:
        # Values on the edge between two may fall either way.
        assert (got != want).mean() < 0.01
        assert np.array_equal(*(rows[:, alone.layout.payload_bytes :] for rows in (got, want)))


def test_a_checkpoint_that_asks_for_fp8_kv_gets_it_unless_told_otherwise(made, tmp_path):
    path = copied(made, "compressed-channel", tmp_path)
    edit_config(path, lambda raw: raw["quantization_config"].update(kv_cache_scheme=STATIC))
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_scale' is missing"):
        load(path)
    add_kv_scales(path)
    asked = load(path)
    assert asked.layout.kv_dtype == "fp8_e4m3"
    assert asked._cache.static_scales.shape == (3, 2, 2)
    assert load(path, kv_dtype="bf16").layout.kv_dtype == "bf16"
    with pytest.raises(ConfigError, match="static scales of a K that is not rotated; leave rotate"):
        load(path, rotate_qk=True)
    assert load(path, kv_dtype="bf16", rotate_qk=True).layout.kv_dtype == "bf16"


def test_kv_scales_of_some_layers_only_are_refused(made, tmp_path):
    path = copied(made, "autofp8-static", tmp_path)
    add_kv_scales(path, layers=[0, 2])
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_scale' is missing"):
        load(path)


# Quantized on load -----------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["fp8", "fp8-block"])
def test_quantizing_on_load_changes_the_kv_and_its_fingerprint(scheme):
    path = zoo.checkpoint("qwen2", False)
    plain, quantized = load(path), load(path, quantization=scheme)
    assert plain.fingerprint != quantized.fingerprint
    batch = make_batch([(PROMPT[:20], 0, [1, 2])], 16)
    got, want = quantized.forward(batch), plain.forward(batch)
    assert 0 < (got - want).norm() < 0.1 * want.norm()


def test_the_two_schemes_on_load_have_fingerprints_of_their_own():
    path = zoo.checkpoint("llama", True)
    prints = {load(path, quantization=s).fingerprint for s in (None, "fp8", "fp8-block")}
    assert len(prints) == 3


def test_an_edited_activation_scheme_changes_the_fingerprint(made, tmp_path):
    path = copied(made, "autofp8-static", tmp_path)
    before = load(path).fingerprint
    edit_config(path, lambda raw: raw["quantization_config"].update(activation_scheme="dynamic"))
    assert load(path).fingerprint != before


def test_a_quantized_checkpoint_is_not_quantized_again(made):
    with pytest.raises(ConfigError, match=r"quantization is 'fp8', but .* already; leave"):
        load(made["deepseek"].path, quantization="fp8")


def test_an_unknown_quantization_is_refused_by_name_value_and_remedy():
    with pytest.raises(ConfigError, match=r"^quantization is 'int4'; set it to one of fp8, fp8-b"):
        EngineConfig(model="somewhere", quantization="int4")
