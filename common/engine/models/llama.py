"""Dense decoders with rotary attention and a gated MLP: Llama, Mistral, Qwen2, Qwen3.

They differ in biases, in a norm of Q and K, and in windows, all of which ModelConfig says.
n is the tokens of a step, e hidden_size, f intermediate_size, h and g the query and KV heads,
d head_dim. Of several tensor-parallel ranks each has its part of f, h, g and the vocabulary; what
is [n, e] is whole and the same on all of them.
"""

from dataclasses import dataclass
from typing import Any

import torch

from common.engine.batch import Batch
from common.engine.cache import KVCache
from common.engine.checkpoint import Checkpoint
from common.engine.config import ModelConfig
from common.engine.kernels import Linear, Ops
from common.engine.layers import rope_table
from common.engine.parallel.group import Group
from common.engine.parallel.shard import Shard
from common.engine.quantization.read import SCALE_NAMES
from common.engine.weight import Weight
from common.engine.weights import WeightReader
from common.kv.connector import KVConnector

# Older checkpoints store these buffers; they follow from config.json.
IGNORED = ("rotary_emb.inv_freq",)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer; Q, K and V are one matrix, gate and up are one."""

    attention_norm: torch.Tensor  # [e]
    qkv: Linear  # e -> (h + 2g) * d
    qk_norm: torch.Tensor | None  # [h + g, d]
    output: Linear  # h * d -> e
    mlp_norm: torch.Tensor  # [e]
    gate_up: Linear  # e -> 2f
    down: Linear  # f -> e


class DenseDecoder:
    """One model, or one rank's part of it, on one device. `forward` is the only method used after
    construction; ranks call it together."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        ops: Ops,
        *,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard,
        group: Group,
    ) -> None:
        self.config = config
        self.ops = ops
        self.shard = shard
        self.group = group
        ignored = (*IGNORED, "lm_head.weight") if config.tie_word_embeddings else IGNORED
        ignored = ignored if config.quantization is None else (*ignored, *SCALE_NAMES)
        checkpoint.check(tensor_shapes(config), ignored)
        weights = WeightReader(checkpoint, ops, dtype, device, config.quantization)
        self.embedding = weights.tensor("model.embed_tokens.weight")  # [vocab, e]
        self.layers = [_layer(config, shard, weights, i) for i in range(config.num_layers)]
        self.norm = weights.tensor("model.norm.weight")  # [e]
        if config.tie_word_embeddings:
            rows = self.embedding[shard.vocab.start : shard.vocab.stop]
            self.head = ops.linear(Weight(rows), None)  # e -> vocab
        else:
            self.head = weights.linear("lm_head", rows=(shard.vocab,))
        cos, sin = rope_table(config.rope, config.head_dim, max_len)
        self.rope = cos.to(device), sin.to(device)

    def prepare(self, batch: Batch, cache: KVCache) -> Any:
        """What `ops` derives from the batch once for all layers."""
        heads, windows = self.shard.num_heads, self.config.layer_windows
        return self.ops.prepare(batch, cache, heads, windows, self.rope)

    def forward(self, batch: Batch, cache: KVCache, connector: KVConnector | None) -> torch.Tensor:
        """Writes the batch's KV into the cache; returns logits [num_logits, vocab], of no meaning
        on ranks other than 0."""
        config, ops, eps, group = self.config, self.ops, self.config.rms_norm_eps, self.group
        step = self.prepare(batch, cache)
        x = ops.take(self.embedding, batch.token_ids, "token_ids")  # [n, e]
        delta = None
        for index, layer in enumerate(self.layers):
            x, normed = ops.add_norm(x, delta, layer.attention_norm, eps, layer.qkv)
            qkv = layer.qkv(normed).view(len(x), -1, config.head_dim)  # [n, h + 2g, d]
            if connector is not None:
                connector.wait_for_layer_load(index)
            norm = None if layer.qk_norm is None else (layer.qk_norm, eps)
            q = ops.write_kv(qkv, cache, index, step, norm)  # [n, h, d]
            if self.shard.kv_is_shared and cache.shared:
                group.barrier()  # what is read next, another rank may have written
            if index < config.num_layers - 1:
                attended = ops.attention(q, cache, index, step).flatten(1)  # [n, h * d]
            else:
                attended, x = self._attend_last(q, x, cache, batch, step)
            delta = group.sum(layer.output(attended))
            if connector is not None:
                # Not before the sum: with it every rank has written its heads.
                connector.save_kv_layer(index)
            x, normed = ops.add_norm(x, delta, layer.mlp_norm, eps, layer.gate_up)
            delta = group.sum(layer.down(ops.silu_mul(layer.gate_up(normed), layer.down)))
        _, normed = ops.add_norm(x, delta, self.norm, eps, self.head)
        return group.gather(self.head(normed), config.vocab_size)

    def _attend_last(
        self, q: torch.Tensor, x: torch.Tensor, cache: KVCache, batch: Batch, step: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The last layer's attention [m, h * d] and x [m, e] of the rows whose logits are wanted:
        once its KV is written nothing reads the others."""
        ops, rows, index = self.ops, batch.logit_rows, self.config.num_layers - 1
        if batch.last is None and len(rows):
            q = ops.attention(q, cache, index, step)
        attended, x = (ops.take(part, rows, "logit_rows") for part in (q.flatten(1), x))
        if batch.last is not None:
            step = self.prepare(batch.last, cache)
            attended = ops.attention(attended.view(-1, *q.shape[1:]), cache, index, step).flatten(1)
        return attended, x


def _layer(config: ModelConfig, shard: Shard, weights: WeightReader, index: int) -> Layer:
    prefix = f"model.layers.{index}."
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    qkv_rows = (shard.q_rows, shard.kv_rows, shard.kv_rows)
    mlp_rows = (shard.mlp, shard.mlp)
    # What is summed over the ranks must have its bias added once.
    first = shard.rank == 0
    return Layer(
        attention_norm=weights.tensor(f"{prefix}input_layernorm.weight"),
        qkv=weights.linear(
            *(f"{attention}{part}_proj" for part in "qkv"), bias=config.qkv_bias, rows=qkv_rows
        ),
        qk_norm=_qk_norm(shard, weights, attention) if config.qk_norm else None,
        output=weights.linear(
            f"{attention}o_proj", bias=config.output_bias and first, columns=shard.q_rows
        ),
        mlp_norm=weights.tensor(f"{prefix}post_attention_layernorm.weight"),
        gate_up=weights.linear(
            f"{mlp}gate_proj", f"{mlp}up_proj", bias=config.mlp_bias, rows=mlp_rows, gated=True
        ),
        down=weights.linear(f"{mlp}down_proj", bias=config.mlp_bias and first, columns=shard.mlp),
    )


def _qk_norm(shard: Shard, weights: WeightReader, attention: str) -> torch.Tensor:
    q = weights.tensor(f"{attention}q_norm.weight").expand(shard.num_heads, -1)
    k = weights.tensor(f"{attention}k_norm.weight").expand(len(shard.kv_heads), -1)
    return torch.cat((q, k))


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the checkpoint must hold, with its shape."""
    e, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    rows = {
        "q": config.num_heads * d,
        "k": config.num_kv_heads * d,
        "v": config.num_kv_heads * d,
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, e)}
    for index in range(config.num_layers):
        attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{index}.{name}.weight"] = (e,)
        for part, count in rows.items():
            shapes[f"{attention}{part}_proj.weight"] = (count, e)
            if config.qkv_bias:
                shapes[f"{attention}{part}_proj.bias"] = (count,)
            if config.qk_norm and part != "v":
                shapes[f"{attention}{part}_norm.weight"] = (d,)
        shapes[f"{attention}o_proj.weight"] = (e, rows["q"])
        if config.output_bias:
            shapes[f"{attention}o_proj.bias"] = (e,)
        for part, shape in {"gate": (f, e), "up": (f, e), "down": (e, f)}.items():
            shapes[f"{mlp}{part}_proj.weight"] = shape
            if config.mlp_bias:
                shapes[f"{mlp}{part}_proj.bias"] = shape[:1]
    shapes["model.norm.weight"] = (e,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, e)
    return shapes
