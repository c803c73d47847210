"""Keys of KV blocks: a chain of hashes, so that equal keys mean equal tokens from the start on.

Imports no torch: the gateway computes the same keys to route by them.
"""

import hashlib
import struct
from collections.abc import Sequence

KEY_BYTES = 16


def tenant_salt(tenant: str) -> bytes:
    """The parent of a sequence's first block: tenants share no prefix. 16 bytes."""
    return hashlib.blake2b(tenant.encode(), digest_size=KEY_BYTES, person=b"baton-tenant").digest()


def block_key(parent: bytes, token_ids: Sequence[int], fingerprint: bytes) -> bytes:
    """Key of one full block: blake2b-128 over its parent's key, its tokens and the fingerprint.

    parent       the key of the block before it, or the tenant's salt
    token_ids    the block's tokens, each under 2**32
    fingerprint  whose KV it is (weights, KV dtype, layout version, rope settings)
    """
    digest = hashlib.blake2b(parent, digest_size=KEY_BYTES, person=b"baton-block")
    digest.update(struct.pack(f"<{len(token_ids)}I", *token_ids))
    digest.update(fingerprint)
    return digest.digest()


def chain_keys(
    token_ids: Sequence[int],
    block_size: int,
    fingerprint: bytes,
    tenant: str = "",
    known: Sequence[bytes] = (),
) -> list[bytes]:
    """16-byte keys of the full blocks of a sequence; a last block that is not full has none.

    known  the first keys of this same sequence, computed before: only the rest is hashed
    """
    keys = list(known)
    parent = keys[-1] if keys else tenant_salt(tenant)
    for start in range(len(keys) * block_size, len(token_ids) - block_size + 1, block_size):
        parent = block_key(parent, token_ids[start : start + block_size], fingerprint)
        keys.append(parent)
    return keys
