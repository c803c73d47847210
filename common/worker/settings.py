"""Settings that prefill and decode workers share."""

from pathlib import Path

from pydantic import ByteSize, Field, field_validator

from common.engine.config import EngineConfig
from common.errors import ConfigError
from common.kv.connectors.registry import parse_connectors
from common.kv.transports import DEFAULT_NAMES, parse_names
from common.rpc.discovery import own_address, parse_addresses
from common.settings import ServiceSettings


class WorkerSettings(ServiceSettings):
    """A worker with an engine. Fields named like EngineConfig's mean what they mean there."""

    model: Path = Field(
        Path("models/baton-tiny"), description="folder of a Hugging Face checkpoint"
    )
    worker_id: str | None = Field(
        None, max_length=128, description="name in /debug/state; unset: random"
    )
    advertise_host: str | None = Field(
        None, description="host that peers connect to; unset: this machine's own address"
    )
    kvstore: str = Field("", description="KV stores, host:port[,host:port]; empty: none")
    kv_connectors: str = Field(
        "store,handoff",
        description="where KV is looked for, in this order: store, handoff and those of packages, "
        "name[:argument]; see docs/connectors.md",
    )
    transports: str = Field(
        ",".join(DEFAULT_NAMES), description="ways that KV may take between workers, best first"
    )
    dtype: str = Field("auto", description="auto, float32 or bfloat16: what is computed in")
    quantization: str | None = Field(
        None, description="fp8 or fp8-block: quantize the matrices of an unquantized checkpoint"
    )
    kv_dtype: str = Field("auto", description="auto, float32, bf16 or fp8_e4m3: the KV cache's")
    block_size: int = Field(
        16, description="tokens in a KV block; of prefill's and decode's one must divide the other"
    )
    max_model_len: int | None = Field(
        None, description="most tokens of a sequence; unset: the model's own limit"
    )
    num_blocks: int | None = Field(None, description="KV blocks; unset: from --kv-cache-bytes")
    kv_cache_bytes: ByteSize = Field(
        ByteSize(512 * 2**20), description="memory for the KV cache, for example 512MiB"
    )
    max_num_seqs: int = Field(64, description="sequences in one step")
    max_num_batched_tokens: int = Field(512, description="tokens in one step")
    max_waiting: int = Field(256, description="requests that may wait; more are refused")
    prefix_caching: bool = Field(True, description="reuse the KV of equal prefixes")
    device: str = Field("cpu", description="torch device")
    kernels: str = Field(
        "auto", description="auto, reference, cpu or triton: the kernels of the model"
    )
    async_scheduling: bool | None = Field(
        None, description="prepare the next step while this one runs; unset: on a GPU"
    )
    threads: int | None = Field(None, description="torch threads; unset: torch's own choice")
    faults: str = Field(
        "", description="faults on purpose, for tests of failures; see docs/reliability.md"
    )
    tensor_parallel: int = Field(
        1, description="processes that compute each step together; they share the threads"
    )
    batch_invariant: bool = Field(
        False, description="results do not depend, to the bit, on the rest of a step; slower"
    )
    rotate_qk: bool = Field(
        False,
        description="multiply Q and K by a Hadamard matrix: more exact FP8 KV where K has outliers",
    )
    fp8_attention: bool = Field(
        False,
        description="e4m3 products in the attention of prompts to FP8 KV: faster on a GPU, less "
        "exact",
    )
    # No description: for tests of what ranks on GPUs do.
    private_kv: bool = False

    @field_validator("kvstore")
    @classmethod
    def _check_addresses(cls, value: str) -> str:
        return checked_addresses(value)

    @field_validator("kv_connectors")
    @classmethod
    def _check_connectors(cls, value: str) -> str:
        try:
            names = [name for name, _ in parse_connectors(value)]
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if "handoff" not in names:
            raise ValueError("handoff must be one of them: it is how prefill and decode meet")
        return value

    @field_validator("transports")
    @classmethod
    def _check_transports(cls, value: str) -> str:
        try:
            parse_names(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return value

    @property
    def transport_names(self) -> tuple[str, ...]:
        return parse_names(self.transports)

    @property
    def kvstore_addresses(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.kvstore.split(",") if part.strip())

    @property
    def advertised_host(self) -> str:
        return own_address(self.host, self.advertise_host)

    def engine_config(self) -> EngineConfig:
        """Raises ConfigError, naming the setting, for a value that cannot work."""
        return EngineConfig(
            model=self.model,
            dtype=self.dtype,
            quantization=self.quantization,
            kv_dtype=self.kv_dtype,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            num_blocks=self.num_blocks,
            kv_cache_bytes=int(self.kv_cache_bytes),
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_waiting=self.max_waiting,
            prefix_caching=self.prefix_caching,
            device=self.device,
            kernels=self.kernels,
            async_scheduling=self.async_scheduling,
            threads=self.threads,
            tensor_parallel=self.tensor_parallel,
            batch_invariant=self.batch_invariant,
            rotate_qk=self.rotate_qk,
            fp8_attention=self.fp8_attention,
            private_kv=self.private_kv,
        )


def checked_addresses(value: str) -> str:
    """The setting as it is. Raises ValueError, which pydantic tells, unless it is
    host:port[,host:port]."""
    try:
        parse_addresses(value)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return value
