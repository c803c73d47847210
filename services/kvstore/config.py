"""What the kvstore is told: flags, or BATON_ variables as their defaults."""

from pydantic import ByteSize, Field

from common.settings import ServiceSettings


class KVStoreConfig(ServiceSettings):
    """The kvstore keeps blocks of KV cache in memory for prefill and decode workers."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(7300, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    max_bytes: ByteSize = Field(
        ByteSize(512 * 2**20), ge=2**20, description="memory for blocks, for example 512MiB"
    )
    faults: str = Field(
        "", description="faults on purpose, for tests of failures; see docs/reliability.md"
    )
