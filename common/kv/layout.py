"""The bytes of a KV block. Imports no torch: the store and the tests use it too."""

from dataclasses import dataclass, replace

LAYOUT_VERSION = 1

# Bytes of one element; fp8_e4m3 has one float32 scale for each token and head beside it.
ELEMENT_BYTES = {"float32": 4, "bf16": 2, "fp8_e4m3": 1}
SCALE_BYTES = 4
# Tokens in a block, at most.
MAX_BLOCK_SIZE = 1024


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Payload `[layer][k|v][kv_head][token][head_dim]`, contiguous, then, where the dtype has
    them, float32 scales `[layer][k|v][kv_head][token]`. One block is `block_bytes` bytes."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    kv_dtype: str

    @property
    def payload_elements(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim

    @property
    def scale_elements(self) -> int:
        if self.kv_dtype != "fp8_e4m3":
            return 0
        return self.num_layers * 2 * self.num_kv_heads * self.block_size

    @property
    def payload_bytes(self) -> int:
        return self.payload_elements * ELEMENT_BYTES[self.kv_dtype]

    @property
    def scale_bytes(self) -> int:
        return self.scale_elements * SCALE_BYTES

    @property
    def block_bytes(self) -> int:
        return self.payload_bytes + self.scale_bytes

    @property
    def layer_bytes(self) -> int:
        """One layer of one block, its scales included."""
        return self.block_bytes // self.num_layers

    def layer_slices(self, layers: range) -> tuple[slice, ...]:
        """Where neighbouring layers lie in a block's bytes: their payload, then, where the dtype
        has them, their scales."""
        payload, scales = (n // self.num_layers for n in (self.payload_bytes, self.scale_bytes))
        start, end = layers.start, layers.stop
        slices = [slice(start * payload, end * payload)]
        if scales:
            at = self.payload_bytes
            slices.append(slice(at + start * scales, at + end * scales))
        return tuple(slices)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def with_block_size(self, block_size: int) -> "KVLayout":
        """The same KV in blocks of another size."""
        return replace(self, block_size=block_size)


def block_sizes_fit(one: int, other: int) -> bool:
    """Whether KV in blocks of one size can be cut into blocks of the other: one divides the other,
    and both are sizes that a block can have."""
    small, big = sorted((one, other))
    return small > 0 and big <= MAX_BLOCK_SIZE and big % small == 0
