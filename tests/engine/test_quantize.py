"""`baton quantize` writes whole folders in published formats, or nothing."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from baton.cli.quantize import main
from baton.eval.run import BUNDLED_MODEL
from common.engine.config import EngineConfig
from common.engine.quantization import write
from common.engine.quantization.calibrate import calibrate
from common.engine.quantization.tensor_file import Slot, TensorFile
from common.engine.runner import ModelRunner
from common.errors import BatonError, CheckpointError, ConfigError
from tests.engine import emulation, zoo
from tests.engine.driving import make_batch

torch.set_num_threads(1)

PROMPT = zoo.random_prompt(40, seed=4)
SHAPE = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8}


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """A checkpoint whose fused matrices have whole blocks."""
    path = tmp_path_factory.mktemp("aligned") / "model"
    return zoo.make_checkpoint("llama", False, path, **SHAPE, intermediate_size=256)


def logits(path, **settings):
    runner = ModelRunner(EngineConfig(model=path, num_blocks=8, max_model_len=64, **settings))
    return runner.forward(make_batch([(PROMPT, 0, [1, 2, 3])], 16, all_rows=True))


@pytest.mark.parametrize(("scheme", "same"), [("fp8-dynamic", "fp8"), ("fp8-block", "fp8-block")])
@pytest.mark.parametrize("arch", ["aligned", "qwen2"])
def test_what_is_written_serves_like_what_is_quantized_on_load(
    aligned, arch, scheme, same, tmp_path
):
    source = aligned if arch == "aligned" else zoo.checkpoint(arch, True)
    main([str(source), str(tmp_path / "out"), "--scheme", scheme])
    assert torch.equal(logits(tmp_path / "out"), logits(source, quantization=same))


def test_the_bundled_model_is_written_with_all_that_belongs_to_it(tmp_path, capsys):
    main([str(BUNDLED_MODEL), str(tmp_path / "a" / "out"), "--scheme", "fp8-dynamic"])
    out = tmp_path / "a" / "out"
    assert "4.1 MiB of weights, 7.4 MiB before" in capsys.readouterr().out
    for path in BUNDLED_MODEL.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (out / path.name).read_bytes() == path.read_bytes()
    before = json.loads((BUNDLED_MODEL / "config.json").read_text())
    after = json.loads((out / "config.json").read_text())
    assert after.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert after == before
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "fp8-block"])
def test_weights_and_scales_mean_the_original_rounded_to_e4m3(scheme, tmp_path):
    source = zoo.checkpoint("qwen3", False)
    main([str(source), str(tmp_path / "out"), "--scheme", scheme])
    original, written = (load_file(p / "model.safetensors") for p in (source, tmp_path / "out"))
    for name, tensor in original.items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(written.pop(name), tensor)
            continue
        end = "weight_scale_inv" if scheme == "fp8-block" else "weight_scale"
        values = written.pop(name).double().numpy()
        scale = written.pop(name.removesuffix("weight") + end).numpy()
        if scheme == "fp8-block":
            assert scale.shape == tuple(-(-n // 128) for n in tensor.shape)
            scale = scale.repeat(128, 0).repeat(128, 1)[: len(tensor), : tensor.shape[1]]
        else:
            assert scale.shape == (len(tensor), 1)
        want = emulation.nearest_e4m3((tensor.numpy() / scale).astype(np.float64))
        assert (values == want).all()
    assert not written


def test_shards_stay_shards_and_each_file_opens(tmp_path):
    source = tmp_path / "sharded"
    zoo.oracle(zoo.checkpoint("llama", False)).save_pretrained(source, max_shard_size="100KB")
    main([str(source), str(tmp_path / "out"), "--scheme", "fp8-dynamic"])
    names = sorted(p.name for p in source.glob("*.safetensors"))
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == names
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name in names:
        with safe_open(tmp_path / "out" / name, "pt") as file:
            assert set(file.keys()) == {k for k, f in index["weight_map"].items() if f == name}
    whole = zoo.checkpoint("llama", False)
    assert torch.equal(logits(tmp_path / "out"), logits(whole, quantization="fp8"))


# Calibration -----------------------------------------------------------------------------


def _largest_inputs(source, prompts):
    """By transformers: the largest input of each projection, and output of v_proj."""
    inputs, values = {}, {}
    model = zoo.oracle(source)

    def watch(name):
        def hook(module, args, output):
            inputs[name] = max(inputs.get(name, 0.0), args[0].abs().max().item())
            values[name] = max(values.get(name, 0.0), output.abs().max().item())

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if name.endswith("_proj")
    ]
    with torch.inference_mode():
        for prompt in prompts:
            model(torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    return inputs, values


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_calibration_finds_the_largest_inputs_that_transformers_sees(arch):
    source = zoo.checkpoint(arch, False)
    prompts = [zoo.random_prompt(n, seed=n) for n in (1, 40, 17)]
    found = calibrate(source, prompts, kv=True)
    inputs, values = _largest_inputs(source, prompts)
    assert set(found.inputs) == set(inputs)
    for name, largest in inputs.items():
        assert found.inputs[name] == pytest.approx(largest / 448, rel=1e-4)
    for layer, (k, v) in enumerate(found.kv):
        stem = f"model.layers.{layer}.self_attn."
        assert v == pytest.approx(values[f"{stem}v_proj"] / 448, rel=1e-4)
        assert k > 0


def test_a_static_checkpoint_holds_what_calibration_found_and_serves(tmp_path):
    text = tmp_path / "prompts.jsonl"
    lines = [
        {"text": "river=4821"},
        {"prompt": "Reverse the words: apple table"},
        {"messages": [{"role": "user", "content": "river=4821. What is river?"}]},
    ]
    text.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    out = tmp_path / "out"
    flags = ["--calibration", str(text), "--kv-cache-dtype", "fp8_e4m3"]
    main([str(BUNDLED_MODEL), str(out), "--scheme", "fp8-static", *flags])
    tensors = load_file(out / "model.safetensors")
    for part in ("q", "v"):
        assert tensors[f"model.layers.2.self_attn.{part}_proj.input_scale"].shape == (1,)
    assert torch.equal(
        tensors["model.layers.2.self_attn.q_proj.input_scale"],
        tensors["model.layers.2.self_attn.k_proj.input_scale"],
    )
    runner = ModelRunner(EngineConfig(model=out, num_blocks=8, max_model_len=64))
    assert runner.layout.kv_dtype == "fp8_e4m3"
    want = tensors["model.layers.3.self_attn.v_scale"].item()
    assert runner._cache.static_scales[3, 1, 0].item() == want


# Refusals --------------------------------------------------------------------------------


def test_a_folder_with_content_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="out exists and is not empty; name a new folder"):
        main([str(BUNDLED_MODEL), str(tmp_path / "out"), "--scheme", "fp8-block"])
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    main([str(zoo.checkpoint("llama", True)), str(tmp_path / "out"), "--scheme", "fp8-block"])
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    source = shutil.copytree(zoo.checkpoint("llama", False), tmp_path / "model")
    file = source / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [48, 2]
    changed = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + length :])
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        main([str(source), str(tmp_path / "out"), "--scheme", "fp8-block"])
    file.write_bytes(raw)

    def full(path, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write.shutil, "copyfile", full)
    (source / "LICENSE").write_text("free")
    with pytest.raises(ConfigError, match="No space left"):
        main([str(source), str(tmp_path / "out"), "--scheme", "fp8-block"])
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_quantized_checkpoint_is_refused(tmp_path):
    main([str(zoo.checkpoint("llama", True)), str(tmp_path / "a"), "--scheme", "fp8-block"])
    with pytest.raises(ConfigError, match="a is quantized already; give the checkpoint"):
        main([str(tmp_path / "a"), str(tmp_path / "b"), "--scheme", "fp8-dynamic"])
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--scheme", "fp8-static"], "fp8-static needs --calibration FILE"),
        (["--scheme", "fp8-block", "--kv-cache-dtype", "fp8_e4m3"], "needs --calibration FILE"),
        (["--scheme", "fp8-dynamic", "--calibration", "x.txt"], "of no use to fp8-dynamic"),
    ],
)
def test_calibration_is_asked_for_where_it_is_needed_and_only_there(tmp_path, flags, named):
    with pytest.raises(ConfigError, match=named):
        main([str(BUNDLED_MODEL), str(tmp_path / "out"), *flags])


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("none.txt", None, "cannot be read"),
        ("a.txt", b"", "has no prompt"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
        ("a.jsonl", b'{"text": "fine"}\n\n{"text"', "line 3"),
        ("a.jsonl", b"[1]", "line 1: not a JSON object"),
        ("a.jsonl", b'{"question": 1}', "neither 'text' nor"),
        ("a.jsonl", b'{"messages": [3]}', "neither 'text' nor"),
        ("a.jsonl", b'{"text": ""}', "calibration prompt is empty"),
    ],
)
def test_a_calibration_file_that_cannot_serve_is_refused_by_name(tmp_path, name, content, named):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    flags = ["--scheme", "fp8-static", "--calibration", str(tmp_path / name)]
    with pytest.raises(ConfigError, match=named):
        main([str(BUNDLED_MODEL), str(tmp_path / "out"), *flags])


def test_a_tensor_file_takes_what_was_announced_and_all_of_it(tmp_path):
    slots = {"a": Slot(torch.float32, (2,)), "b": Slot(torch.float8_e4m3fn, (3,))}
    file = TensorFile(tmp_path / "x", slots)
    file.write("a", torch.ones(2))
    for name, tensor in (("b", torch.ones(3)), ("c", torch.ones(2)), ("a", torch.ones(3))):
        with pytest.raises(BatonError, match=f"no slot for '{name}'"):
            file.write(name, tensor)
    with pytest.raises(BatonError, match=r"\['b'\] were not written"):
        file.__exit__(None, None, None)
