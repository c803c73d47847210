"""Frames that are not exactly what was sent are refused, whatever happened to them."""

import struct
from dataclasses import replace

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import WireError
from common.kv import wire

KEY = bytes(range(16))
RANGE = wire.BlockRange(head_start=2, head_count=4, layer_start=0, layer_count=3)
PAYLOAD = bytes(i * 7 % 251 for i in range(96))
ENVELOPE = wire.Envelope(b"h" * 16, wire.incarnation_digest("one"), 3, 7, 5, 2, 9)


def frame() -> bytes:
    return wire.encode_block(KEY, RANGE, 16, PAYLOAD)


def handoff_frame() -> bytes:
    return wire.encode_envelope(ENVELOPE) + frame()


def test_a_block_comes_back_as_it_was_sent():
    block = wire.decode_block(frame())
    assert (block.key, block.range, block.token_count) == (KEY, RANGE, 16)
    assert bytes(block.payload) == PAYLOAD


def test_the_header_has_the_documented_bytes():
    fields = struct.pack("<4sHH16sHHHHIQ", b"BKVB", 1, 0, KEY, 2, 4, 0, 3, 16, len(PAYLOAD))
    checksum = struct.pack("<Q", xxhash.xxh3_64_intdigest(fields + PAYLOAD))
    assert frame() == fields + checksum + PAYLOAD


def test_the_envelope_has_the_documented_bytes():
    values = (b"BKVH", 2, 1, b"h" * 16, wire.incarnation_digest("one"), 3, 7, 5, 2, 9)
    fields = struct.pack("<4sHH16s16sIIIII", *values)
    whole = fields + struct.pack("<Q", xxhash.xxh3_64_intdigest(fields))
    assert wire.encode_envelope(replace(ENVELOPE, cached=True)) == whole


def test_an_envelope_comes_back_as_it_was_sent():
    envelope, block = wire.decode_handoff_frame(handoff_frame())
    assert envelope == ENVELOPE
    assert bytes(block.payload) == PAYLOAD


def test_every_truncation_is_refused():
    whole = handoff_frame()
    for length in range(len(whole)):
        with pytest.raises(WireError):
            wire.decode_handoff_frame(whole[:length])


def test_every_single_bit_flip_is_refused():
    whole = bytearray(handoff_frame())
    for bit in range(len(whole) * 8):
        whole[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            wire.decode_handoff_frame(whole)
        whole[bit // 8] ^= 1 << bit % 8
    wire.decode_handoff_frame(whole)


def test_bytes_after_the_payload_are_refused():
    with pytest.raises(WireError, match="announces 96 bytes of payload and has 97"):
        wire.decode_block(frame() + b"x")


def test_a_payload_over_the_limit_is_refused_before_it_is_read():
    with pytest.raises(WireError, match="over 95"):
        wire.decode_block(frame(), max_payload_bytes=95)


def test_a_frame_of_a_later_version_is_refused():
    later = bytearray(frame())
    later[4] = 2
    with pytest.raises(WireError, match="version 2"):
        wire.decode_block(later)


def test_a_header_that_cannot_hold_its_values_is_an_error():
    with pytest.raises(WireError, match="16 bytes"):
        wire.encode_block(b"short", RANGE, 16, PAYLOAD)
    with pytest.raises(WireError):
        wire.encode_block(KEY, wire.BlockRange(70000, 1, 0, 1), 16, PAYLOAD)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(data):
    with pytest.raises(WireError):
        wire.decode_handoff_frame(data)
    with pytest.raises(WireError):
        wire.decode_block(data)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**32 - 1), st.binary(max_size=2000))
def test_any_key_token_count_and_payload_survive(key, tokens, payload):
    block = wire.decode_block(wire.encode_block(key, RANGE, tokens, payload))
    assert (block.key, block.token_count, bytes(block.payload)) == (key, tokens, payload)


def test_a_partial_key_depends_on_parent_tokens_fingerprint_and_tenant():
    keys = {
        wire.partial_block_key(b"p" * 16, [1, 2], b"f", ""),
        wire.partial_block_key(b"q" * 16, [1, 2], b"f", ""),
        wire.partial_block_key(b"p" * 16, [1, 3], b"f", ""),
        wire.partial_block_key(b"p" * 16, [1], b"f", ""),
        wire.partial_block_key(b"p" * 16, [1, 2], b"g", ""),
        wire.partial_block_key(None, [1, 2], b"f", ""),
        wire.partial_block_key(None, [1, 2], b"f", "tenant"),
    }
    assert len(keys) == 7
