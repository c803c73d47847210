"""Small random-weight checkpoints made with transformers, and its answers about them.

transformers is the oracle: it makes the checkpoint and computes the expected logits and tokens.
"""

import tempfile
from functools import cache
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

VOCAB = 199
MAX_LEN = 1024
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_LEN,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

# name -> config class, model class, what differs from SHAPE
ZOO = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama2": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 6}),
    "llama31": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "llama_linear": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LINEAR_ROPE}),
    "llama_yarn": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": YARN_ROPE}),
    "llama_bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral_window": (MistralConfig, MistralForCausalLM, {"sliding_window": 19}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2_window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
}
# The architectures the project promises; the others are variants.
ARCHITECTURES = ("llama", "llama31", "mistral", "qwen2", "qwen3")


def make_checkpoint(arch: str, tied: bool, path: Path, **overrides) -> Path:
    """Writes a float32 checkpoint of this zoo entry into `path` and returns it.

    The weights are a function of (arch, tied, overrides); biases and norm weights are random too,
    so that leaving one out shows.
    """
    config_class, model_class, changes = ZOO[arch]
    torch.manual_seed(sorted(ZOO).index(arch) * 2 + tied)
    settings = {**SHAPE, **changes, "tie_word_embeddings": tied, "dtype": "float32", **overrides}
    model = model_class(config_class(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
                if name == "model.norm.weight":
                    # With tied embeddings a token would else be its own likeliest successor.
                    parameter[::2] *= -1
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 0.08 if "embed" not in name else 0.5)
    model.save_pretrained(path)
    return path


@cache
def checkpoint(arch: str, tied: bool) -> Path:
    """As `make_checkpoint`, in a folder made once a test run. Do not write into it."""
    return make_checkpoint(arch, tied, Path(_folder().name) / f"{arch}-{'tied' if tied else 'own'}")


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="baton-zoo-")


@cache
def oracle(path: Path) -> PreTrainedModel:
    """transformers' model of a folder, float32, eager attention."""
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.inference_mode()
def expected_logits(path: Path, token_ids: list[int]) -> torch.Tensor:
    """Logits [tokens, vocab] float32 of a prompt."""
    return oracle(path)(torch.tensor([token_ids])).logits[0].float()


@torch.inference_mode()
def expected_greedy(path: Path, token_ids: list[int], count: int) -> list[int]:
    """The next `count` tokens, each the argmax, end-of-sequence tokens taken as any other."""
    tokens = list(token_ids)
    model = oracle(path)
    past = None
    fresh = tokens
    for _ in range(count):
        out = model(torch.tensor([fresh]), past_key_values=past, use_cache=True)
        past = out.past_key_values
        fresh = [int(out.logits[0, -1].argmax())]
        tokens += fresh
    return tokens[len(token_ids) :]


def random_prompt(length: int, seed: int, vocab: int = VOCAB) -> list[int]:
    """Token ids that are no special token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (length,), generator=generator).tolist()
