"""What the gateway is told: flags, or BATON_ variables as their defaults."""

from pathlib import Path

from pydantic import ByteSize, Field, field_validator

from common.errors import ConfigError
from common.rpc.discovery import parse_addresses
from common.settings import ServiceSettings


class GatewayConfig(ServiceSettings):
    """The gateway serves OpenAI's HTTP API and baton.v1.InferenceService over decode workers."""

    host: str = Field("127.0.0.1", description="address to listen on, for both ports")
    port: int = Field(9000, ge=0, le=65535, description="the same as --grpc-port, which wins")
    http_port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 takes a free one")
    grpc_port: int | None = Field(
        None, ge=0, le=65535, description="public gRPC port; 0 takes a free one; unset: --port"
    )
    model: Path = Field(
        Path("models/baton-tiny"), description="folder with config, tokenizer and chat template"
    )
    served_model_name: str | None = Field(
        None, max_length=256, description="the model's name in the API; unset: the folder's name"
    )
    prefill: str = Field("", description="prefill workers, host:port[,host:port]")
    decode: str = Field("127.0.0.1:7200", description="decode workers, host:port[,host:port]")
    kvstore: str = Field("", description="KV stores, host:port[,host:port]; shown in /debug/state")
    api_keys_file: Path | None = Field(
        None, description="file of lines TENANT KEY; unset: no key is asked for, all share KV"
    )
    max_body_bytes: ByteSize = Field(
        ByteSize(4 * 2**20),
        ge=1024,
        le=2**30,
        description="largest request, for example 4MiB; longer ones get 413",
    )
    request_timeout_s: float = Field(
        600.0, gt=0, le=86_400, description="most seconds that a request may take"
    )
    max_in_flight: int = Field(
        1024, ge=1, le=1_000_000, description="requests served at one time; more wait"
    )
    max_queue: int = Field(
        256, ge=0, le=1_000_000, description="requests that may wait; more get 429"
    )

    max_resumes: int = Field(
        2, ge=0, le=100, description="times that an answer goes on elsewhere after a lost worker"
    )

    announce_s: float = Field(
        5.0,
        ge=0,
        le=600,
        description="seconds of --drain-s that new requests are still served after SIGTERM, while "
        "/ready says 503; longer than a balancer takes to notice",
    )

    @field_validator("prefill", "decode", "kvstore")
    @classmethod
    def _check_addresses(cls, value: str) -> str:
        try:
            parse_addresses(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return value

    @property
    def public_grpc_port(self) -> int:
        return self.port if self.grpc_port is None else self.grpc_port

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model.resolve().name
