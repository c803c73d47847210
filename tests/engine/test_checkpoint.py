"""Whole checkpoints load, others are refused with the file and the remedy in the message."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.engine.config import EngineConfig
from common.engine.runner import ModelRunner
from common.errors import CheckpointError
from tests.engine import zoo
from tests.engine.driving import make_runner, prompt_logits, shuffled_blocks

torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path):
    """A copy of a checkpoint, to be damaged."""
    return shutil.copytree(zoo.checkpoint("llama", False), tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    zoo.oracle(zoo.checkpoint("llama", False)).save_pretrained(
        tmp_path / "sharded", max_shard_size="100KB"
    )
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def load(path):
    return ModelRunner(EngineConfig(model=path, num_blocks=8, max_model_len=64))


def edit_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def edit_json(path, change):
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_several_shards_serve_like_one_file(sharded):
    prompt = zoo.random_prompt(40, seed=2)
    runner = make_runner(sharded)
    got = prompt_logits(runner, prompt, shuffled_blocks(runner), [40])
    want = zoo.expected_logits(zoo.checkpoint("llama", False), prompt)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_are_computed_in_float32_when_small(folder, dtype):
    def halve(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)

    edit_tensors(folder, halve)
    edit_json(folder / "config.json", lambda raw: raw.update(dtype=str(dtype).split(".")[1]))
    prompt = zoo.random_prompt(40, seed=2)
    runner = make_runner(folder)
    got = prompt_logits(runner, prompt, shuffled_blocks(runner), [40])
    want = zoo.expected_logits(folder, prompt)  # the oracle, too, computes in float32
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_a_tied_checkpoint_may_hold_the_head_as_well(tmp_path):
    folder = shutil.copytree(zoo.checkpoint("llama", True), tmp_path / "model")
    edit_tensors(
        folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    load(folder)


def test_rotary_buffers_of_older_checkpoints_are_ignored(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda t: t.update({name: torch.ones(8)}))
    load(folder)


def test_one_changed_weight_changes_the_fingerprint(folder):
    before = load(folder).fingerprint
    assert len(before) == 16
    assert before == load(zoo.checkpoint("llama", False)).fingerprint
    edit_tensors(folder, lambda t: t["model.norm.weight"].view(-1)[3].add_(2**-10))
    assert load(folder).fingerprint != before


def test_kv_dtype_and_rope_settings_change_the_fingerprint(folder):
    config = EngineConfig(model=folder, num_blocks=8, max_model_len=64)
    prints = {load(folder).fingerprint}
    for kv_dtype in ("bf16", "fp8_e4m3"):
        changed = EngineConfig(model=folder, num_blocks=8, max_model_len=64, kv_dtype=kv_dtype)
        prints.add(ModelRunner(changed).fingerprint)
    edit_json(folder / "config.json", lambda raw: raw["rope_parameters"].update(rope_theta=10001.0))
    prints.add(ModelRunner(config).fingerprint)
    assert len(prints) == 4


def _no_folder(path):
    shutil.rmtree(path)


def _no_config(path):
    (path / "config.json").unlink()


def _broken_config(path):
    (path / "config.json").write_text('{"architectures": [')


def _no_weights(path):
    (path / "model.safetensors").unlink()


def _pickle_only(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _cut_data(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _cut_header(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:60])


def _empty_file(path):
    (path / "model.safetensors").write_bytes(b"")


def _header_not_json(path):
    file = path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 16) + b"no json at all!!" + bytes(64))


def _huge_header(path):
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + bytes(64))


def _missing_tensor(path):
    edit_tensors(path, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def _extra_tensor(path):
    edit_tensors(
        path, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)})
    )


def _misshaped_tensor(path):
    edit_tensors(path, lambda t: t.update({"model.norm.weight": torch.ones(95)}))


def _integer_tensor(path):
    edit_tensors(path, lambda t: t.update({"model.norm.weight": torch.ones(96, dtype=torch.int8)}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_no_folder, ("no such folder", "give the path")),
        (_no_config, ("config.json", "download")),
        (_broken_config, ("config.json", "not valid JSON")),
        (_no_weights, ("model.safetensors", "complete the download")),
        (_pickle_only, ("pytorch_model.bin", "pickle", "convert")),
        (_cut_data, ("model.safetensors", "truncated", "download")),
        (_cut_header, ("model.safetensors", "truncated", "download")),
        (_empty_file, ("model.safetensors", "truncated", "download")),
        (_header_not_json, ("model.safetensors", "not JSON", "download")),
        (_huge_header, ("model.safetensors", "too short")),
        (_missing_tensor, ("model.layers.1.mlp.up_proj.weight", "another model")),
        (_extra_tensor, ("q_norm", "model.safetensors", "another model")),
        (_misshaped_tensor, ("model.norm.weight", "(95,)", "(96,)", "another model")),
        (_integer_tensor, ("model.norm.weight", "I8", "unquantized")),
    ],
)
def test_a_damaged_folder_is_refused_with_file_and_remedy(folder, damage, named):
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    for part in (str(folder), *named):
        assert part in str(caught.value)


def test_a_missing_shard_is_named(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"{gone.name}: missing"):
        load(sharded)


def test_a_truncated_shard_is_named(sharded):
    cut = sorted(sharded.glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{cut.name}: truncated"):
        load(sharded)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        "F32",
        {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [96], "data_offsets": [-8, 376]},
        {"dtype": "F32", "shape": [96], "data_offsets": [4, 388]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64]},
    ],
)
def test_a_header_that_lies_is_refused(folder, entry):
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"] = entry
    changed = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + length :])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    "weight_map",
    [None, [], {}, {"a": "../other.safetensors"}, {"a": "x.bin"}, {"a": ["b"]}, {"a": 3}],
)
def test_an_index_that_names_no_shards_of_the_folder_is_refused(sharded, weight_map):
    index = sharded / "model.safetensors.index.json"
    edit_json(index, lambda raw: raw.update(weight_map=weight_map))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load(sharded)


def test_an_index_of_another_download_is_refused(sharded):
    def swap(raw):
        names = sorted(set(raw["weight_map"].values()))
        raw["weight_map"]["model.norm.weight"] = names[0]

    assert load(sharded)
    edit_json(sharded / "model.safetensors.index.json", swap)
    with pytest.raises(CheckpointError, match="different downloads"):
        load(sharded)
