"""Dense decoders with rotary attention and a gated MLP: Llama, Mistral, Qwen2, Qwen3.

They differ in biases, in a norm of Q and K, and in windows, all of which ModelConfig says.
n is the tokens of a step, e hidden_size, f intermediate_size, h and g the query and KV heads,
d head_dim.
"""

from dataclasses import dataclass

import torch

from common.engine.batch import Batch
from common.engine.cache import KVCache
from common.engine.checkpoint import Checkpoint
from common.engine.config import ModelConfig
from common.engine.kernels import Ops
from common.engine.layers import rope_table
from common.kv.connector import KVConnector

# Older checkpoints store these buffers; they follow from config.json.
IGNORED = ("rotary_emb.inv_freq",)


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer; Q, K and V are one matrix, gate and up are one."""

    attention_norm: torch.Tensor  # [e]
    qkv: torch.Tensor  # [(h + 2g) * d, e]
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None  # [h + g, d]
    output: torch.Tensor  # [e, h * d]
    output_bias: torch.Tensor | None
    mlp_norm: torch.Tensor  # [e]
    gate_up: torch.Tensor  # [2f, e]
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor  # [e, f]
    down_bias: torch.Tensor | None


class DenseDecoder:
    """One model on one device. `forward` is the only method used after construction."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        ops: Ops,
        *,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config
        self.ops = ops
        ignored = (*IGNORED, "lm_head.weight") if config.tie_word_embeddings else IGNORED
        checkpoint.check(tensor_shapes(config), ignored)
        weights = _Weights(config, checkpoint, dtype, device)
        self.embedding = weights.read("model.embed_tokens.weight")  # [vocab, e]
        self.layers = [weights.layer(i) for i in range(config.num_layers)]
        self.norm = weights.read("model.norm.weight")  # [e]
        tied = config.tie_word_embeddings
        self.head = self.embedding if tied else weights.read("lm_head.weight")  # [vocab, e]
        cos, sin = rope_table(config.rope, config.head_dim, max_len)
        self.cos, self.sin = cos.to(device), sin.to(device)

    def forward(self, batch: Batch, cache: KVCache, connector: KVConnector | None) -> torch.Tensor:
        """Writes the batch's KV into the cache; returns logits [num_logits, vocab] float32."""
        config, ops = self.config, self.ops
        step = ops.prepare(batch, cache, config.num_heads, config.layer_windows)
        cos = self.cos[batch.positions].unsqueeze(1)  # [n, 1, d]
        sin = self.sin[batch.positions].unsqueeze(1)
        x = self.embedding[batch.token_ids]  # [n, e]
        for index, layer in enumerate(self.layers):
            q, k, v = self._project(ops.rms_norm(x, layer.attention_norm, config.rms_norm_eps),
                                    layer, cos, sin)  # fmt: skip
            if connector is not None:
                connector.wait_for_layer_load(index)
            ops.write_kv(k, v, cache, index, step)
            if connector is not None:
                connector.save_kv_layer(index)
            attended = ops.attention(q, cache, index, step).flatten(1)  # [n, h * d]
            if index == config.num_layers - 1:
                # Nothing reads the other rows any more: a chunk that samples nothing ends here.
                attended, x = attended[batch.logit_rows], x[batch.logit_rows]
            x = x + ops.linear(attended, layer.output, layer.output_bias)
            gate_up = ops.linear(
                ops.rms_norm(x, layer.mlp_norm, config.rms_norm_eps),
                layer.gate_up,
                layer.gate_up_bias,
            )  # [n, 2f]
            x = x + ops.linear(ops.silu_mul(gate_up), layer.down, layer.down_bias)
        x = ops.rms_norm(x, self.norm, config.rms_norm_eps)
        return ops.linear(x, self.head, None).float()

    def _project(
        self, x: torch.Tensor, layer: Layer, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [n, e] -> q [n, h, d], k and v [n, g, d]; q and k are turned."""
        config = self.config
        turned = config.num_heads + config.num_kv_heads
        qkv = self.ops.linear(x, layer.qkv, layer.qkv_bias)
        qkv = qkv.view(len(x), turned + config.num_kv_heads, config.head_dim)
        qk = qkv[:, :turned]
        if layer.qk_norm is not None:
            qk = self.ops.rms_norm(qk, layer.qk_norm, config.rms_norm_eps)
        qk = self.ops.rope(qk, cos, sin)
        return qk[:, : config.num_heads], qk[:, config.num_heads :], qkv[:, turned:]


class _Weights:
    """Reads tensors by their checkpoint names: the one place that knows them, with the shapes."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device

    def read(self, *names: str) -> torch.Tensor:
        """The tensors as one, stacked along their rows."""
        parts = [self.checkpoint.read(name).to(self.dtype) for name in names]
        # A copy of its own also where nothing is converted: the file may change under a mapping.
        whole = parts[0].clone() if len(parts) == 1 else torch.cat(parts)
        return whole.to(self.device)

    def layer(self, index: int) -> Layer:
        config = self.config
        attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."

        def maybe(wanted: bool, *names: str) -> torch.Tensor | None:
            return self.read(*names) if wanted else None

        return Layer(
            attention_norm=self.read(f"model.layers.{index}.input_layernorm.weight"),
            qkv=self.read(*(f"{attention}{part}_proj.weight" for part in "qkv")),
            qkv_bias=maybe(config.qkv_bias, *(f"{attention}{part}_proj.bias" for part in "qkv")),
            qk_norm=self._qk_norm(attention) if config.qk_norm else None,
            output=self.read(f"{attention}o_proj.weight"),
            output_bias=maybe(config.output_bias, f"{attention}o_proj.bias"),
            mlp_norm=self.read(f"model.layers.{index}.post_attention_layernorm.weight"),
            gate_up=self.read(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"),
            gate_up_bias=maybe(config.mlp_bias, f"{mlp}gate_proj.bias", f"{mlp}up_proj.bias"),
            down=self.read(f"{mlp}down_proj.weight"),
            down_bias=maybe(config.mlp_bias, f"{mlp}down_proj.bias"),
        )

    def _qk_norm(self, attention: str) -> torch.Tensor:
        q = self.read(f"{attention}q_norm.weight").expand(self.config.num_heads, -1)
        k = self.read(f"{attention}k_norm.weight").expand(self.config.num_kv_heads, -1)
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
