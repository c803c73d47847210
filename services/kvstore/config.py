"""What the kvstore is told: flags, or BATON_ variables as their defaults."""

import re

from pydantic import Field, field_validator

from common.settings import ServiceSettings

_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)")


class KVStoreConfig(ServiceSettings):
    """The kvstore keeps blocks of KV cache in memory for prefill and decode workers."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(7300, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    max_bytes: int = Field(
        512 << 20, ge=1 << 20, description="memory for blocks, as 512MiB or a number of bytes"
    )

    @field_validator("max_bytes", mode="before")
    @classmethod
    def _read_size(cls, value: object) -> object:
        return parse_bytes(value) if isinstance(value, str) else value


def parse_bytes(text: str) -> int:
    """`512MiB`, `1.5 GiB` or `1048576` as bytes. Raises ValueError for anything else."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or match[2] not in _UNITS or len(text) > 32:
        raise ValueError("give a number of bytes, or one with KiB, MiB or GiB, as 512MiB")
    return int(float(match[1]) * _UNITS[match[2]])
