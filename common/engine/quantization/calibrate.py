"""Static scales from prompts: the largest inputs that an unquantized model's matrices meet."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from common.engine.batch import Batch
from common.engine.cache import KVCache
from common.engine.checkpoint import Checkpoint
from common.engine.config import EngineConfig, ModelConfig
from common.engine.kernels import Linear
from common.engine.kernels.reference import ReferenceOps, Step
from common.engine.models import load_model
from common.engine.parallel.group import Group
from common.engine.parallel.shard import Shard
from common.engine.quantization.fp8 import FP8_MAX
from common.engine.quantization.write import Calibration, quantized_modules
from common.engine.runner import TORCH_DTYPES, compute_dtype
from common.engine.weight import Weight
from common.errors import ConfigError, InvalidRequest
from common.kv.layout import KVLayout
from common.text.template import ChatTemplate

# More tell little: published checkpoints are calibrated with 128 to 512 prompts of 2048 tokens.
MAX_PROMPTS = 512
MAX_TOKENS = 2048
BLOCK_SIZE = 16
# The Linear of a layer that has this matrix in it.
HOLDERS = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "output",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "down_proj": "down",
}


class RecordingLinear:
    """A Linear that remembers the largest size of its inputs."""

    def __init__(self, inner: Linear) -> None:
        self.inner = inner
        self.largest = 0.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.largest = max(self.largest, x.abs().amax().item())
        return self.inner(x)


class RecordingOps(ReferenceOps):
    """The reference, with Linears that record and the largest K and V of each layer."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.kv = [[0.0, 0.0] for _ in range(num_layers)]

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        return RecordingLinear(super().linear(weight, bias))

    def write_kv(
        self,
        qkv: torch.Tensor,
        cache: KVCache,
        layer: int,
        step: Step,
        qk_norm: tuple[torch.Tensor, float] | None = None,
    ) -> torch.Tensor:
        q = super().write_kv(qkv, cache, layer, step, qk_norm)
        written = cache.payload[layer].permute(0, 3, 1, 2, 4)[step.block, step.offset]
        for side in (0, 1):
            largest = written[:, side].abs().amax().item()
            self.kv[layer][side] = max(self.kv[layer][side], largest)
        return q


@torch.inference_mode()
def calibrate(model: Path, prompts: Sequence[Sequence[int]], *, kv: bool) -> Calibration:
    """Runs the prompts (token ids) through the unquantized model, which must fit in memory.

    Raises ConfigError when a scale would be zero or no number.
    """
    config = ModelConfig.from_folder(model)
    device = torch.device("cpu")
    dtype = compute_dtype(EngineConfig(model=model), config)
    max_len = min(MAX_TOKENS, config.max_position_embeddings)
    ops = RecordingOps(config.num_layers)
    with Checkpoint(model) as checkpoint:
        decoder = load_model(
            config,
            checkpoint,
            ops,
            max_len=max_len,
            dtype=TORCH_DTYPES[dtype],
            device=device,
            shard=Shard.of(config, 0, 1),
            group=Group(0, 1, device),
        )
    # Every row passes the last layer, but nobody reads its logits.
    decoder.head = lambda x: x[:, :1]
    layout = KVLayout(
        config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE, kv_dtype="float32"
    )
    cache = KVCache(layout, 1 + layout.blocks_for(max_len), device)
    for prompt in prompts[:MAX_PROMPTS]:
        decoder.forward(_batch(prompt[:max_len], config), cache, None)
    inputs = {}
    for module in quantized_modules(config):
        _, _, layer, _, name = module.split(".")
        largest = getattr(decoder.layers[int(layer)], HOLDERS[name]).largest
        inputs[module] = _scale(largest, module)
    scales = [
        (_scale(k, f"K of layer {layer}"), _scale(v, f"V of layer {layer}"))
        for layer, (k, v) in enumerate(ops.kv)
    ]
    return Calibration(inputs, scales if kv else [])


def _scale(largest: float, name: str) -> float:
    if not 0 < largest < float("inf"):
        raise ConfigError(
            f"the calibration prompts give {name} a largest value of {largest}; use prompts like "
            "those that the model will be asked"
        )
    return largest / FP8_MAX


def _batch(prompt: Sequence[int], config: ModelConfig) -> Batch:
    """A whole prompt in one step, in blocks 1, 2, ..."""
    count = len(prompt)
    if not count or not all(0 <= token < config.vocab_size for token in prompt):
        raise ConfigError(
            "a calibration prompt is empty or has tokens that the model has not; does its "
            "tokenizer.json belong to it?"
        )
    positions = torch.arange(count)
    blocks = -(-count // BLOCK_SIZE)
    return Batch(
        token_ids=torch.tensor(prompt),
        positions=positions,
        slot_mapping=positions + BLOCK_SIZE,
        query_start=(0, count),
        context_len=(count,),
        block_table=torch.arange(1, blocks + 1, dtype=torch.int32)[None],
        logit_rows=positions,
    )


def read_prompts(path: Path, model: Path) -> list[list[int]]:
    """The prompts of a calibration file as token ids of the model's tokenizer.

    A .jsonl file has an object a line, with "text", "prompt" or "messages" (which need the model's
    chat template); any other file has a prompt a line. Raises ConfigError, naming file and line.
    """
    if not (model / "tokenizer.json").is_file():
        raise ConfigError(f"{model} has no tokenizer.json, which calibration needs")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    template = ChatTemplate.from_folder(model)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); give a text or .jsonl file"
        ) from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rendered, text = (False, line) if path.suffix != ".jsonl" else _entry(line, template)
        except (ValueError, InvalidRequest) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        prompts.append(tokenizer.encode(text, add_special_tokens=not rendered).ids)
    if not prompts:
        raise ConfigError(f"{path} has no prompt; give one a line")
    return prompts


def _entry(line: str, template: ChatTemplate | None) -> tuple[bool, str]:
    """Whether the chat template made it, and the prompt. Raises ValueError or InvalidRequest."""
    entry = json.loads(line)
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    messages = entry.get("messages")
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        if template is None:
            raise ValueError("has 'messages', and the model has no chat template; give 'text'")
        return True, template.render(messages, add_generation_prompt=False)
    text = entry.get("text", entry.get("prompt"))
    if not isinstance(text, str):
        raise ValueError("has neither 'text' nor 'prompt' nor 'messages'")
    return False, text
