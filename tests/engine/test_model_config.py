"""config.json in the spellings of all years, and settings that cannot work."""

import json
import subprocess
import sys

import pytest

from common.engine.config import EngineConfig, ModelConfig, RopeConfig
from common.engine.runner import ModelRunner, compute_dtype
from common.errors import CheckpointError, ConfigError
from tests.engine import zoo

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


def parse(tmp_path, **changes):
    raw = {key: value for key, value in {**LLAMA, **changes}.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return ModelConfig.from_folder(tmp_path)


def test_old_and_new_spellings_of_rope_and_dtype_mean_the_same(tmp_path):
    old = parse(
        tmp_path,
        rope_theta=500000.0,
        rope_scaling={"rope_type": "llama3", **LLAMA3},
        torch_dtype="bfloat16",
    )
    new = parse(
        tmp_path,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3},
        dtype="bfloat16",
    )
    assert old == new
    assert old.torch_dtype == "bfloat16"
    assert old.rope == RopeConfig(500000.0, "llama3", 8.0, 1024, 1.0, 4.0)


def test_the_oldest_spelling_of_linear_scaling_is_read(tmp_path):
    config = parse(tmp_path, rope_scaling={"type": "linear", "factor": 4.0})
    assert config.rope == RopeConfig(10000.0, "linear", 4.0)


def test_left_out_fields_follow_from_the_others(tmp_path):
    config = parse(tmp_path, num_key_value_heads=...)
    assert (config.num_kv_heads, config.head_dim, config.torch_dtype) == (4, 16, "float32")
    assert config.rope == RopeConfig()
    assert config.layer_windows == (None,) * 4
    assert config.eos_token_ids == ()


def test_end_of_sequence_tokens_come_from_both_files(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    assert parse(tmp_path, eos_token_id=5).eos_token_ids == (5, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert parse(tmp_path, eos_token_id=[5, 6]).eos_token_ids == (5, 6, 9)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is 'x'"):
        parse(tmp_path)


def test_sliding_windows_are_honoured_only_where_the_config_turns_them_on(tmp_path):
    def windows(arch, **changes):
        return parse(tmp_path, architectures=[arch], **changes).layer_windows

    assert windows("MistralForCausalLM", sliding_window=32) == (32,) * 4
    assert windows("MistralForCausalLM", sliding_window=None) == (None,) * 4
    assert windows("Qwen2ForCausalLM", sliding_window=32, use_sliding_window=False) == (None,) * 4
    on = {"sliding_window": 32, "use_sliding_window": True}
    assert windows("Qwen2ForCausalLM", max_window_layers=3, **on) == (None, None, None, 32)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert windows("Qwen3ForCausalLM", layer_types=kinds, **on) == (32, None, 32, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["GPT2LMHeadModel"]),
        ("architectures", []),
        ("architectures", None),
        ("architectures", [["LlamaForCausalLM"]]),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", "4"),
        ("num_hidden_layers", True),
        ("hidden_size", ...),
        ("hidden_size", 66),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("vocab_size", -1),
        ("max_position_embeddings", 2**40),
        ("rms_norm_eps", 0),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", "yes"),
        ("torch_dtype", "int8"),
        ("eos_token_id", -3),
        ("eos_token_id", [[2]]),
        ("rope_theta", -1.0),
        ("rope_scaling", "llama3"),
        ("rope_scaling", {"rope_type": "longrope", "factor": 2.0}),
        ("rope_scaling", {"rope_type": ["llama3"]}),
        ("rope_scaling", {"rope_type": "linear"}),
        ("rope_scaling", {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"quant_method": "gptq"}),
    ],
)
def test_a_config_that_cannot_be_served_is_refused_by_file_and_field(tmp_path, field, value):
    with pytest.raises(CheckpointError) as caught:
        parse(tmp_path, **{field: value})
    assert str(tmp_path / "config.json") in str(caught.value)
    assert field in str(caught.value)


def test_a_config_that_is_no_object_or_absurdly_big_is_refused(tmp_path):
    file = tmp_path / "config.json"
    for text in ("[]", "3", "", "[" * 100_000, '"' + "x" * 5_000_000 + '"', "\ud800"):
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(CheckpointError, match=r"config\.json"):
            ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("block_size", -16),
        ("block_size", 0),
        ("block_size", 16.0),
        ("kv_dtype", "int3"),
        ("dtype", "float16"),
        ("max_model_len", 0),
        ("num_blocks", 1),
        ("kv_cache_bytes", -1),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("max_waiting", -1),
        ("threads", 0),
        ("prefix_caching", 1),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name_value_and_remedy(setting, value):
    with pytest.raises(ConfigError, match=f"^{setting} is {value!r}; set it to"):
        EngineConfig(model="somewhere", **{setting: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 1025}, "max_model_len is 1025, over the 1024 positions .* set it to"),
        ({"max_model_len": 512, "num_blocks": 20}, "num_blocks to 33 or more"),
        ({"max_model_len": 512, "kv_cache_bytes": 1000}, r"set kv_cache_bytes to \d+"),
        ({"kv_cache_bytes": 1000}, r"set kv_cache_bytes to \d+"),
        ({"num_blocks": 2**31 - 1}, "does not fit on cpu .* lower kv_cache_bytes"),
        ({"device": "tpu9000"}, "device is 'tpu9000'; set it to cpu or cuda"),
        ({"device": "meta"}, "device is 'meta'; set it to cpu or cuda"),
    ],
)
def test_settings_that_the_model_or_memory_cannot_meet_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ModelRunner(EngineConfig(model=zoo.checkpoint("llama", False), **settings))


def test_the_cache_is_no_bigger_than_its_sequences_can_use_and_bounds_their_length():
    path = zoo.checkpoint("llama", False)
    small = ModelRunner(EngineConfig(model=path, max_num_seqs=2, max_model_len=100))
    assert small.num_blocks == 1 + 2 * 7
    assert small.cache.shape == (15, small.layout.block_bytes)
    assert not small.cache.any()
    whole = ModelRunner(EngineConfig(model=path, max_num_seqs=1))
    assert whole.max_model_len == zoo.MAX_LEN
    # Not asked for a length, the runner takes the one that the cache holds.
    assert ModelRunner(EngineConfig(model=path, num_blocks=11)).max_model_len == 160


def test_auto_dtype_is_float32_up_to_a_gibibyte_and_the_checkpoints_beyond(tmp_path):
    small = parse(tmp_path, torch_dtype="bfloat16")
    large = parse(tmp_path, torch_dtype="bfloat16", vocab_size=4_000_000)
    auto, forced = EngineConfig(model=tmp_path), EngineConfig(model=tmp_path, dtype="bfloat16")
    assert [compute_dtype(auto, c) for c in (small, large)] == ["float32", "bfloat16"]
    assert compute_dtype(forced, small) == "bfloat16"
    assert compute_dtype(auto, parse(tmp_path, vocab_size=4_000_000)) == "float32"


def test_reading_a_model_config_imports_no_torch():
    code = "import sys, common.engine.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
