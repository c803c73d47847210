import hashlib

from common.kv.keys import block_key, chain_keys, tenant_salt

PRINT = bytes(range(16))


def test_a_key_is_the_hash_of_parent_tokens_and_fingerprint():
    tokens = [1, 2**31, 3]
    parent = hashlib.blake2b(b"acme", digest_size=16, person=b"baton-tenant").digest()
    body = parent + b"".join(token.to_bytes(4, "little") for token in tokens) + PRINT
    expected = hashlib.blake2b(body, digest_size=16, person=b"baton-block").digest()
    assert chain_keys(tokens, 3, PRINT, "acme") == [expected]
    assert block_key(tenant_salt("acme"), tokens, PRINT) == expected


def test_only_full_blocks_have_keys():
    assert chain_keys([], 4, PRINT) == []
    assert chain_keys([1, 2, 3], 4, PRINT) == []
    assert len(chain_keys(range(11), 4, PRINT)) == 2


def test_a_longer_sequence_keeps_the_keys_of_its_prefix():
    short, long = chain_keys(range(8), 4, PRINT), chain_keys(range(20), 4, PRINT)
    assert long[:2] == short
    assert chain_keys(range(20), 4, PRINT, known=short) == long


def test_a_change_anywhere_before_changes_all_keys_after():
    tokens = list(range(16))
    before = chain_keys(tokens, 4, PRINT)
    tokens[5] = 99
    after = chain_keys(tokens, 4, PRINT)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False, False]


def test_tenants_and_fingerprints_share_no_key():
    keys = [
        *chain_keys(range(4), 4, PRINT, ""),
        *chain_keys(range(4), 4, PRINT, "a"),
        *chain_keys(range(4), 4, PRINT, "b"),
        *chain_keys(range(4), 4, b"x" * 16, "a"),
    ]
    assert len(set(keys)) == 4
    assert {len(key) for key in keys} == {16}


def test_blocks_of_different_sizes_share_no_key():
    """What a store or an index has under one size is not found under another."""
    keys = [key for size in (1, 2, 4, 8, 16) for key in chain_keys(range(16), size, PRINT)]
    keys += [key for size in (1, 2, 4, 8, 16) for key in chain_keys([99] * 16, size, PRINT)]
    assert len(set(keys)) == len(keys) == 2 * (16 + 8 + 4 + 2 + 1)
