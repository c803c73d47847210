"""How a KV block looks on the wire and in the store: a header that describes it, then its bytes.

Nothing here is trusted: a decoder checks magic, version, lengths and checksum before it hands out a
byte, and raises WireError for anything else. Imports no torch: the store uses it too.
"""

import hashlib
import struct
from dataclasses import dataclass

import xxhash

from common.errors import WireError
from common.kv.keys import chain_keys
from common.kv.layout import KVLayout

Buffer = bytes | bytearray | memoryview

BLOCK_VERSION = 1
# 2: a frame holds some layers of neighbouring blocks, and has a number.
ENVELOPE_VERSION = 2
KEY_BYTES = 16
# A block of the largest model foreseen (128 layers, 16 KV heads of 256, 32 tokens of float32) is
# 128 MiB; the usual 2 MiB. One frame over this is refused before memory is set aside for it.
MAX_PAYLOAD_BYTES = 256 * 1024 * 1024

_BLOCK_MAGIC = b"BKVB"
_ENVELOPE_MAGIC = b"BKVH"
# magic, version, flags, key, head start, head count, layer start, layer count, tokens, payload
_BLOCK = struct.Struct("<4sHH16sHHHHIQ")
# magic, version, flags, handoff id, incarnation digest, generation, number, first block, blocks,
# total blocks
_ENVELOPE = struct.Struct("<4sHH16s16sIIIII")
_CHECKSUM = struct.Struct("<Q")
_FLAG_CACHED = 1

BLOCK_HEADER_BYTES = _BLOCK.size + _CHECKSUM.size
ENVELOPE_BYTES = _ENVELOPE.size + _CHECKSUM.size
# What a handoff frame has beside its payload.
FRAME_OVERHEAD_BYTES = ENVELOPE_BYTES + BLOCK_HEADER_BYTES


@dataclass(frozen=True, slots=True)
class BlockRange:
    """Which part of a block a frame holds: KV heads [head_start, head_start + head_count) of
    layers [layer_start, layer_start + layer_count)."""

    head_start: int
    head_count: int
    layer_start: int
    layer_count: int

    @classmethod
    def whole(cls, layout: KVLayout) -> "BlockRange":
        """The range of a block with all heads and all layers."""
        return cls(0, layout.num_kv_heads, 0, layout.num_layers)


@dataclass(frozen=True, slots=True)
class Block:
    """A decoded frame. `token_count` tokens of the block have KV; `payload` is a view into the
    frame it was decoded from. A handoff's frame may hold several neighbouring blocks: then key and
    token count are the last one's (its key stands for all tokens before it), those before it are
    full, and `payload` is one block's bytes of the range after another's."""

    key: bytes
    range: BlockRange
    token_count: int
    payload: memoryview


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a handoff adds to blocks: whose handoff, which attempt, which place.

    handoff_id   16 random bytes, the decode worker's
    incarnation  16-byte digest of the decode worker's incarnation
    generation   attempt of this handoff
    number       of the frame in its attempt, from 0; a frame that is sent again keeps it
    first_block  logical index in its sequence of the frame's first block
    num_blocks   blocks in the frame, one at least
    total        logical blocks that the handoff's tokens cover
    cached       the sender had the blocks' KV already, it was not computed for this request
    """

    handoff_id: bytes
    incarnation: bytes
    generation: int
    number: int
    first_block: int
    num_blocks: int
    total: int
    cached: bool = False


def encode_block_header(key: bytes, range: BlockRange, token_count: int, payload: Buffer) -> bytes:
    """The header of a block, to be sent right before `payload` (which is not copied)."""
    if len(key) != KEY_BYTES:
        raise WireError(f"a block key has {KEY_BYTES} bytes, got {len(key)}")
    length = memoryview(payload).nbytes
    if length > MAX_PAYLOAD_BYTES:
        raise WireError(f"a block's payload is {length} bytes, at most {MAX_PAYLOAD_BYTES} may be")
    try:
        fields = _BLOCK.pack(
            _BLOCK_MAGIC,
            BLOCK_VERSION,
            0,
            key,
            range.head_start,
            range.head_count,
            range.layer_start,
            range.layer_count,
            token_count,
            length,
        )
    except struct.error as error:
        raise WireError(f"a block header cannot hold {range}, {token_count} tokens") from error
    return fields + _CHECKSUM.pack(_checksum(fields, payload))


def encode_block(key: bytes, range: BlockRange, token_count: int, payload: Buffer) -> bytes:
    """Header and payload as one frame, as the store keeps it."""
    return b"".join((encode_block_header(key, range, token_count, payload), payload))


def decode_block(frame: Buffer, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> Block:
    """A frame's block, or WireError: the frame must hold exactly one block that is whole."""
    view = memoryview(frame).cast("B")
    if len(view) < BLOCK_HEADER_BYTES:
        raise WireError(f"a block frame of {len(view)} bytes is shorter than its header")
    fields = view[: _BLOCK.size]
    magic, version, flags, key, *ranges, tokens, length = _BLOCK.unpack(fields)
    _check_start(magic, _BLOCK_MAGIC, version, BLOCK_VERSION, flags)
    if length > max_payload_bytes:
        raise WireError(f"a block frame announces {length} bytes, over {max_payload_bytes}")
    payload = view[BLOCK_HEADER_BYTES:]
    if len(payload) != length:
        raise WireError(f"a block frame announces {length} bytes of payload and has {len(payload)}")
    (checksum,) = _CHECKSUM.unpack(view[_BLOCK.size : BLOCK_HEADER_BYTES])
    if checksum != _checksum(fields, payload):
        raise WireError(f"the checksum of block {key.hex()} does not match its bytes")
    return Block(key, BlockRange(*ranges), tokens, payload)


def encode_envelope(envelope: Envelope) -> bytes:
    """The bytes that precede a block's header in a handoff frame."""
    if len(envelope.handoff_id) != 16 or len(envelope.incarnation) != 16:
        raise WireError("a handoff id and an incarnation digest have 16 bytes each")
    try:
        fields = _ENVELOPE.pack(
            _ENVELOPE_MAGIC,
            ENVELOPE_VERSION,
            _FLAG_CACHED if envelope.cached else 0,
            envelope.handoff_id,
            envelope.incarnation,
            envelope.generation,
            envelope.number,
            envelope.first_block,
            envelope.num_blocks,
            envelope.total,
        )
    except struct.error as error:
        raise WireError(f"an envelope cannot hold {envelope}") from error
    return fields + _CHECKSUM.pack(_checksum(fields, b""))


def decode_envelope(frame: Buffer) -> Envelope:
    """The envelope at the start of a handoff frame, or WireError."""
    view = memoryview(frame).cast("B")
    if len(view) < ENVELOPE_BYTES:
        raise WireError(f"a handoff frame of {len(view)} bytes is shorter than its envelope")
    fields = view[: _ENVELOPE.size]
    magic, version, flags, *values = _ENVELOPE.unpack(fields)
    _check_start(magic, _ENVELOPE_MAGIC, version, ENVELOPE_VERSION, flags & ~_FLAG_CACHED)
    (checksum,) = _CHECKSUM.unpack(view[_ENVELOPE.size : ENVELOPE_BYTES])
    if checksum != _checksum(fields, b""):
        raise WireError("the checksum of a handoff envelope does not match its bytes")
    return Envelope(*values, cached=bool(flags & _FLAG_CACHED))


def decode_handoff_frame(
    frame: Buffer, max_payload_bytes: int = MAX_PAYLOAD_BYTES
) -> tuple[Envelope, Block]:
    """Envelope and block of one handoff frame, both verified, or WireError."""
    envelope = decode_envelope(frame)
    return envelope, decode_block(memoryview(frame)[ENVELOPE_BYTES:], max_payload_bytes)


def incarnation_digest(incarnation: str) -> bytes:
    """16 bytes that stand for a worker's incarnation in an envelope."""
    return hashlib.blake2b(incarnation.encode(), digest_size=16).digest()


def partial_block_key(
    parent: bytes | None, token_ids: list[int], fingerprint: bytes, tenant: str
) -> bytes:
    """Key of a block that is not full yet: it is never kept, only compared during a handoff.

    parent     key of the full block before it; None for a sequence's first block
    token_ids  the tokens that the block holds
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES, person=b"baton-partial")
    digest.update(parent if parent is not None else tenant.encode())
    digest.update(struct.pack(f"<B{len(token_ids)}I", parent is None, *token_ids))
    digest.update(fingerprint)
    return digest.digest()


def covering_keys(
    token_ids: list[int], block_size: int, fingerprint: bytes, tenant: str
) -> list[bytes]:
    """Keys of all blocks that the tokens cover, the last one's too when it is not full."""
    full = len(token_ids) // block_size * block_size
    keys = list(chain_keys(token_ids[:full], block_size, fingerprint, tenant))
    if full < len(token_ids):
        parent = keys[-1] if keys else None
        keys.append(partial_block_key(parent, token_ids[full:], fingerprint, tenant))
    return keys


def _checksum(fields: Buffer, payload: Buffer) -> int:
    digest = xxhash.xxh3_64(fields)
    if payload:
        digest.update(payload)
    return digest.intdigest()


def _check_start(magic: bytes, wanted: bytes, version: int, known: int, flags: int) -> None:
    if magic != wanted:
        raise WireError(f"a frame starts with {magic!r}, expected {wanted!r}")
    if version != known or flags:
        raise WireError(f"a frame has version {version}, flags {flags}; this is version {known}")
