"""The model and its KV cache on one device: loads a checkpoint, runs one step at a time."""

import json
import os
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any

import torch
from torch.distributed import is_nccl_available

from common.engine.batch import Batch
from common.engine.batch_builder import BatchBuilder, on_device
from common.engine.cache import KVCache, shared_memory
from common.engine.checkpoint import Checkpoint
from common.engine.config import EngineConfig, ModelConfig
from common.engine.device import move
from common.engine.device_pages import CudaBus, DevicePages
from common.engine.graphs import DecodeGraphs, StaticBatch, bucket_sizes, warm_up
from common.engine.inference import in_inference_mode
from common.engine.kernels import (
    check_batch_invariant,
    check_fp8_attention,
    check_rotate_qk,
    select_ops,
)
from common.engine.kernels.reference import ReferenceOps
from common.engine.models import load_model
from common.engine.parallel.group import Group, check_devices
from common.engine.parallel.ranks import Ranks
from common.engine.parallel.rooms import Room, SpreadBlocks, map_rooms, room_bytes
from common.engine.parallel.shard import Shard
from common.engine.parallel.wire import Move
from common.engine.quantization.read import read_kv_scales
from common.engine.quantization.scheme import on_load
from common.engine.sampler import Choose
from common.engine.sequence import UNKNOWN_TOKEN, Sequence, StepPlan
from common.errors import BatonError, ConfigError
from common.kv.connector import KVConnector
from common.kv.connectors.pages import Pages
from common.kv.layout import LAYOUT_VERSION, KVLayout

# `dtype=auto` on a CPU: float32 weights up to here, where they are quick enough and most exact.
AUTO_FLOAT32_BYTES = 2**30
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KV_DTYPE_OF = {"float32": "float32", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a runner stands among the ranks of a worker, and the files of memory they share.

    shared_fd   the KV cache of all ranks or, where each has its own, the rooms through which
                blocks move (parallel/rooms.py)
    meeting_fd  as in Group.connect
    """

    rank: int
    shared_fd: int
    meeting_fd: int


class ModelRunner:
    """Loads in the constructor; raises CheckpointError or ConfigError for what cannot be served.

    With tensor_parallel over 1 it starts the other ranks, whose runners have a `place`; each step
    then runs on all of them. On a CPU all ranks map one cache, on GPUs each has a cache of its
    heads: what connectors read and write on rank 0 is whole blocks all the same.

    model_config   the checkpoint's ModelConfig
    layout         KVLayout of the cache's blocks
    fingerprint    16 bytes: whose KV this is (weights and quantization, KV dtype, layout, rope)
    num_blocks     blocks in the cache; block 0 is the null block, never allocated
    cache          the pages, for connectors
    max_model_len  most tokens of one sequence
    device         torch.device
    failure        resolved, on any thread, with the reason why no step can run any more
    """

    def __init__(self, config: EngineConfig, place: Place | None = None) -> None:
        self.device = _device(config, place.rank if place else 0)
        self.config = config = config if place else _share_threads(config)
        if place is not None and self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        # No GPU sees another's cache as its own.
        private = config.private_kv or self.device.type == "cuda"
        self._private = private and config.tensor_parallel > 1
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.model_config = model = model_config(config)
        dtype = compute_dtype(config, model)
        self.layout = KVLayout(
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            block_size=config.block_size,
            kv_dtype=kv_dtype(config, model, dtype),
        )
        self.num_blocks, self.max_model_len = plan_cache(config, model, self.layout)
        self.shard = Shard.of(model, place.rank if place else 0, config.tensor_parallel)
        # What is sent to other ranks is not on a device yet.
        built_on = self.device if self.shard.size == 1 else torch.device("cpu")
        self._batches = BatchBuilder(config.block_size, built_on)
        self.failure: Future[BatonError] = Future()
        self._ranks: Ranks | None = None
        self._place = place
        in_order = config.batch_invariant
        self._group = Group(self.shard.rank, self.shard.size, self.device, in_order=in_order)
        self._room: Room | None = None
        try:
            if self.shard.size > 1 and place is None:
                self._start_ranks()
            self._load(TORCH_DTYPES[dtype])
            if self._ranks is not None:
                self._ranks.wait_loaded()
                with self._ranks.explained("the ranks did not meet"):
                    self._ranks.wait_for(self.connect)
        except BaseException:
            self.close()
            raise

    def _start_ranks(self) -> None:
        config = replace(self.config, num_blocks=self.num_blocks, max_model_len=self.max_model_len)
        size = self.num_blocks * self.layout.block_bytes
        if self._private:
            size = self.shard.size * room_bytes(self.layout, self._own_layout)
        self._place = Place(0, shared_memory(size), shared_memory(0))
        self._ranks = Ranks(config, self._place.shared_fd, self._place.meeting_fd)
        self.failure = self._ranks.failure
        self.failure.add_done_callback(lambda _, group=self._group: group.abort())

    def _load(self, dtype: torch.dtype) -> None:
        model = self.model_config
        config = self.config
        self._ops = select_ops(
            self.device,
            config.kernels,
            config.batch_invariant,
            config.rotate_qk,
            config.fp8_attention,
        )
        if config.fp8_attention:
            check_fp8_attention(self._ops, model.head_dim, self.layout.scale_elements > 0)
        if config.batch_invariant:
            check_batch_invariant(self.device, dtype, model.head_dim)
        with Checkpoint(config.model) as checkpoint:
            static_scales = read_kv_scales(checkpoint, model)
            if config.rotate_qk:
                static = static_scales is not None and self.layout.scale_elements > 0
                check_rotate_qk(self._ops, model.head_dim, static)
            self._model = load_model(
                model,
                checkpoint,
                self._ops,
                max_len=self.max_model_len,
                dtype=dtype,
                device=self.device,
                shard=self.shard,
                group=self._group,
            )
            # Only rank 0 gives keys to blocks; hashing all weights on each would be in vain.
            digest = checkpoint.digest() if self.shard.rank == 0 else b""
        self.fingerprint = fingerprint(
            digest,
            model,
            self.layout,
            batch_invariant=config.batch_invariant,
            rotate_qk=config.rotate_qk,
            fp8_attention=config.fp8_attention,
        )
        self._cache = self._make_cache(static_scales)
        self.cache = self._pages()
        self._graphs = self._tapes() if self.device.type == "cpu" else self._capture()

    @property
    def _own_layout(self) -> KVLayout:
        """Of this rank's part of the blocks."""
        return replace(self.layout, num_kv_heads=len(self.shard.kv_heads))

    def _make_cache(self, static_scales: torch.Tensor | None) -> KVCache:
        heads, blocks, device = self.shard.kv_heads, self.num_blocks, self.device
        if self._private:
            if static_scales is not None:
                static_scales = static_scales[:, :, heads.start : heads.stop]
            return KVCache(self._own_layout, blocks, device, static_scales=static_scales)
        fd = self._place.shared_fd if self._place else None
        scales = static_scales
        return KVCache(self.layout, blocks, device, static_scales=scales, kv_heads=heads, fd=fd)

    def _pages(self) -> Pages:
        """The cache for connectors."""
        if self._private:
            return self._join_rooms()
        if self.device.type == "cuda":
            return DevicePages(self._cache.data, self.layout, CudaBus(self.device))
        return self._cache.data

    def _join_rooms(self) -> Pages:
        size = self.shard.size
        rooms = map_rooms(self._place.shared_fd, size)
        self._room = Room(self._cache, rooms[self.shard.rank])
        if self._ranks is None:
            return self._cache.data
        shards = [Shard.of(self.model_config, rank, size) for rank in range(size)]
        return SpreadBlocks(self.layout, shards, rooms, self._ranks, self._room)

    def _tapes(self) -> Any:
        """The backend's way to run a step with one call, if it has one for this model."""
        tapes = getattr(self._ops, "tapes", None)
        if tapes is None or self.shard.size > 1:
            return None
        return tapes(
            self.model_config,
            forward=lambda batch, connector: self._model.forward(batch, self._cache, connector),
            prepare=lambda batch: self._model.prepare(batch, self._cache),
        )

    @torch.inference_mode()
    def _capture(self) -> DecodeGraphs | None:
        """Compiles all kernels, and makes graphs of decoding. The reference has none: its attention
        looks at the lengths of the sequences. Nor have several ranks: the sums between them are not
        captured."""
        if isinstance(self._ops, ReferenceOps):
            return None
        config, layout = self.config, self.layout

        def forward(batch: Batch) -> torch.Tensor:
            return self._model.forward(batch, self._cache, None)

        lengths = self._ops.prompt_lengths(config.max_num_batched_tokens)
        warm_up(forward, lengths, self.max_model_len, layout.block_size, self.device)
        vocab = self.model_config.vocab_size
        self._ops.warm_up(vocab)
        if self.shard.size > 1:
            return None
        if config.batch_invariant:
            return None  # decoding is then attention of prompts, which reads lengths on the host
        width = layout.blocks_for(self.max_model_len)
        static = StaticBatch(config.max_num_seqs, width, self.max_model_len, self.device)
        logits = torch.empty(config.max_num_seqs, vocab, device=self.device)
        return DecodeGraphs(forward, static, bucket_sizes(config.max_num_seqs), logits)

    @property
    def choose(self) -> Choose | None:
        """The backend's way to choose tokens where the logits are, if it has one."""
        return getattr(self._ops, "choose", None)

    @property
    def steps_ahead(self) -> bool:
        """Whether the next step is prepared while this one runs. Never on several GPUs: tokens
        that only rank 0's device knows are none that it could send."""
        if self.shard.size > 1 and self.device.type == "cuda":
            return False
        wanted = self.config.async_scheduling
        return self.device.type == "cuda" if wanted is None else wanted

    def connect(self) -> None:
        """Meet the other ranks, when all have loaded; before the first step."""
        if self._place is not None:
            self._group.connect(self._place.meeting_fd)

    def close(self) -> None:
        """End the other ranks; no step can run afterwards. Does nothing where there are none."""
        if self._ranks is not None:
            self._ranks.close()
            self._group.close()
        if self._room is not None and not self.failure.done():
            # Else the driver may wait for a dead rank here; the process is to end anyway.
            self._room.close()
        if self._place is not None:
            os.close(self._place.shared_fd)
            os.close(self._place.meeting_fd)
            self._place = None

    @in_inference_mode
    def forward(self, batch: Batch, connector: KVConnector | None = None) -> torch.Tensor:
        """Runs a step: writes the KV of the batch's tokens, returns the logits of its
        `logit_rows`, [num_logits, vocab] float32. The connector is told of each layer.

        Raises Unavailable when another rank is gone.
        """
        if not self.shard.writes_kv and not self._private:
            # Another rank writes the head that this one shares.
            batch = replace(batch, slot_mapping=torch.zeros_like(batch.slot_mapping))
        if self._graphs is not None and self._graphs.room_for(batch):
            return self._replay(batch, connector)
        if self._graphs is not None and self.device.type == "cpu":
            return self._graphs.run_once(batch, connector)
        if self._ranks is None:
            batch = on_device(batch, self.device)
            return self._model.forward(batch, self._cache, connector).float()
        layers = range(self.layout.num_layers) if connector is not None else ()
        for layer in layers:
            # The other ranks have no connector to wait for.
            connector.wait_for_layer_load(layer)
        self._ranks.send(batch)
        # No rank could move blocks within a step: each waits there for all others.
        within = None if self._private else connector
        with self._ranks.explained("rank 0 broke off a step"):
            batch = on_device(batch, self.device)
            logits = self._model.forward(batch, self._cache, within).float()
            self._group.finish(self.failure)
        for layer in layers if within is None else ():
            connector.save_kv_layer(layer)
        return logits

    def move(self, order: Move) -> None:
        """On ranks other than 0: copy this rank's part of blocks, as rank 0 says."""
        self._room.move(order)

    def _replay(self, batch: Batch, connector: KVConnector | None) -> torch.Tensor:
        layers = range(self.layout.num_layers) if connector is not None else ()
        for layer in layers:
            connector.wait_for_layer_load(layer)
        logits = self._graphs.run(batch)
        for layer in layers:
            connector.save_kv_layer(layer)
        return logits

    def build_batch(self, plan: StepPlan) -> Batch:
        """See BatchBuilder."""
        return self._batches.build(plan)


def take_tokens(
    batch: Batch, plan: StepPlan, sampled: list[Sequence], tokens: torch.Tensor | list[int]
) -> None:
    """Put tokens of the step before, which only the device knows, into a batch built without them.

    sampled, tokens  the sequences of that step, and int64 [n] what it chose for them
    """
    source = {sequence: row for row, sequence in enumerate(sampled)}
    pairs = [
        (batch.query_start[i + 1] - 1, source[sequence])
        for i, sequence in enumerate(plan.sequences)
        if sequence.token_ids[-1] == UNKNOWN_TOKEN
    ]
    if pairs:
        rows, sources = move(torch.tensor(pairs).t().contiguous(), batch.token_ids.device)
        # A sequence that got no token ends; until that is known its row needs some token.
        batch.token_ids[rows] = torch.as_tensor(tokens, device=rows.device)[sources].clamp_(min=0)


def model_config(config: EngineConfig) -> ModelConfig:
    """The checkpoint's, quantized on load where that is asked for. Raises CheckpointError, and
    ConfigError for a checkpoint that is quantized already."""
    model = ModelConfig.from_folder(config.model)
    if config.quantization is None:
        return model
    if model.quantization is not None:
        raise ConfigError(
            f"quantization is {config.quantization!r}, but the checkpoint ({config.model}) is "
            "quantized already; leave the setting out to serve it as it is"
        )
    return replace(model, quantization=on_load(config.quantization))


def kv_dtype(config: EngineConfig, model: ModelConfig, dtype: str) -> str:
    """What the KV cache holds, as configured or as `auto` decides for a compute dtype."""
    if config.kv_dtype != "auto":
        return config.kv_dtype
    if model.quantization is not None and model.quantization.fp8_kv:
        return "fp8_e4m3"
    return KV_DTYPE_OF[dtype]


def compute_dtype(config: EngineConfig, model: ModelConfig) -> str:
    """float32 or bfloat16, as configured or as `auto` decides."""
    if config.dtype != "auto":
        return config.dtype
    if config.device == "cpu" and model.num_parameters * 4 <= AUTO_FLOAT32_BYTES:
        return "float32"
    # float16 checkpoints run in bfloat16 too, which has their range.
    return "float32" if model.torch_dtype == "float32" else "bfloat16"


def plan_cache(config: EngineConfig, model: ModelConfig, layout: KVLayout) -> tuple[int, int]:
    """Blocks of the cache, the null block among them, and the most tokens of a sequence.

    Raises ConfigError when max_model_len is over the model's limit, or asked for and more than
    the cache holds.
    """
    limit = model.max_position_embeddings
    wanted = limit if config.max_model_len is None else config.max_model_len
    if wanted > limit:
        raise ConfigError(
            f"max_model_len is {wanted}, over the {limit} positions of the model "
            f"({config.model}); set it to {limit} or less"
        )
    blocks = config.num_blocks
    if blocks is None:
        useful = 1 + config.max_num_seqs * layout.blocks_for(wanted)
        blocks = min(config.kv_cache_bytes // layout.block_bytes, useful)
    capacity = (blocks - 1) * layout.block_size
    if capacity >= wanted:
        return blocks, wanted
    if config.max_model_len is None and capacity > 0:
        return blocks, capacity
    need = 1 + layout.blocks_for(wanted)
    raise ConfigError(
        f"the KV cache of {max(blocks, 0)} blocks holds {max(capacity, 0)} tokens, one sequence of "
        f"max_model_len {wanted} needs {need} blocks of {layout.block_bytes} bytes; set "
        f"kv_cache_bytes to {need * layout.block_bytes} or num_blocks to {need} or more, "
        "or lower max_model_len"
    )


def fingerprint(
    weights: bytes,
    model: ModelConfig,
    layout: KVLayout,
    *,
    batch_invariant: bool = False,
    rotate_qk: bool = False,
    fp8_attention: bool = False,
) -> bytes:
    """16 bytes that two workers share exactly when their KV is interchangeable."""
    settings = {
        "layout": LAYOUT_VERSION,
        "kv_dtype": layout.kv_dtype,
        "shape": [layout.num_layers, layout.num_kv_heads, layout.head_dim],
        "rope": asdict(model.rope),
        "windows": model.layer_windows,
        "eps": model.rms_norm_eps,
        "quantization": None if model.quantization is None else asdict(model.quantization),
    }
    if batch_invariant:  # other KV differs in its last bits
        settings["batch_invariant"] = True
    if rotate_qk:
        settings["rotate_qk"] = True
    if fp8_attention:  # so has the KV of every layer but the first
        settings["fp8_attention"] = True
    encoded = json.dumps(settings, sort_keys=True).encode()
    return blake2b(weights + encoded, digest_size=16).digest()


def _share_threads(config: EngineConfig) -> EngineConfig:
    """The settings of one of the ranks: together they use the threads that one would."""
    if config.tensor_parallel == 1:
        return config
    if not hasattr(os, "memfd_create"):
        raise ConfigError("tensor_parallel over 1 needs Linux; set it to 1")
    threads = config.threads or torch.get_num_threads()
    return replace(config, threads=max(1, threads // config.tensor_parallel))


def _device(config: EngineConfig, rank: int) -> torch.device:
    """The rank's own device, when there are several."""
    name = config.device
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}; set it to cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r}, but torch finds no CUDA device; set it to cpu")
    if config.tensor_parallel == 1:
        return device
    check_devices(config.tensor_parallel, device, torch.cuda.device_count(), is_nccl_available())
    return device if device.type == "cpu" else torch.device("cuda", rank)
