"""What a prefill worker is told: flags, or BATON_ variables as their defaults."""

from pydantic import ByteSize, Field

from common.worker.settings import WorkerSettings


class PrefillConfig(WorkerSettings):
    """A prefill worker computes the KV of prompts and pushes it to decode workers."""

    port: int = Field(7100, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    max_staged_bytes: ByteSize = Field(
        ByteSize(256 * 2**20), description="memory for KV that waits to be sent"
    )
    layer_wise: bool = Field(
        True,
        description="send the KV of each layer while the next one computes; off: all of it once "
        "the prompt is computed",
    )
