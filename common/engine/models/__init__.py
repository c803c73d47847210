"""The model registry: the class in a checkpoint's `architectures` -> what runs it here."""

from typing import Any, Protocol

import torch

from common.engine.batch import Batch
from common.engine.cache import KVCache
from common.engine.checkpoint import Checkpoint
from common.engine.config import ModelConfig
from common.engine.kernels import Ops
from common.engine.models.llama import DenseDecoder
from common.engine.parallel.group import Group
from common.engine.parallel.shard import Shard
from common.errors import CheckpointError
from common.kv.connector import KVConnector


class Model(Protocol):
    """What the runner needs of a model."""

    def prepare(self, batch: Batch, cache: KVCache) -> Any:
        """What a step's kernels read, beside the batch itself."""

    def forward(self, batch: Batch, cache: KVCache, connector: KVConnector | None) -> torch.Tensor:
        """Writes the batch's KV; returns logits [num_logits, vocab]."""


MODELS: dict[str, type[DenseDecoder]] = {
    "LlamaForCausalLM": DenseDecoder,
    "MistralForCausalLM": DenseDecoder,
    "Qwen2ForCausalLM": DenseDecoder,
    "Qwen3ForCausalLM": DenseDecoder,
}


def load_model(
    config: ModelConfig,
    checkpoint: Checkpoint,
    ops: Ops,
    *,
    max_len: int,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard,
    group: Group,
) -> Model:
    """Checks the checkpoint's tensors against the config, then builds the shard's part of the model
    from them."""
    model = MODELS.get(config.architecture)
    if model is None:
        raise CheckpointError(
            f"{checkpoint.folder}: architecture {config.architecture!r} is not served; "
            f"this version serves {', '.join(sorted(MODELS))}"
        )
    return model(
        config,
        checkpoint,
        ops,
        max_len=max_len,
        dtype=dtype,
        device=device,
        shard=shard,
        group=group,
    )
