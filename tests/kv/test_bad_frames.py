"""Every kind of bad frame, over a real socket: counted by its kind, answered, and no page touched.

The test is the prefill worker: it is told what is wanted, and sends what it likes. Whatever the
decode worker then runs on is checked byte by byte by its `_check_past`.
"""

import asyncio
import random
import socket
import struct
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from baton.v1 import worker_pb2
from common.errors import HandoffError
from common.kv.connectors.handoff import HandoffReceiver
from common.kv.handoff import HandoffPolicy, PrefillCandidates, Verdict
from common.kv.keys import chain_keys
from common.kv.transports import TcpTransport
from common.kv.transports.tcp import split_address
from common.kv.wire import (
    BlockRange,
    Envelope,
    encode_block_header,
    encode_envelope,
    incarnation_digest,
    partial_block_key,
)
from common.rpc.loop import LoopThread
from tests.kv.support import BLOCK_SIZE, CARD, FINGERPRINT, LAYOUT, VECTOR_BYTES, Worker, kv_of

pytestmark = pytest.mark.timeout(60)
PROMPT = [random.Random(5).randrange(1000) for _ in range(40)]  # 39 tokens of KV: 3 blocks, 7 in
TOTAL = 3
WHOLE = BlockRange.whole(LAYOUT)


class Rig:
    """A decode worker that wants a prompt's KV, and a link to its data plane."""

    def __init__(self, **policy):
        self.loop = LoopThread("test-bad-frames")
        self.calls: list[worker_pb2.PrefillRequest] = []
        self.called = threading.Event()
        policy = {"min_tokens": 1, "stall_timeout_s": 20.0, **policy}
        self.receiver = HandoffReceiver(
            incarnation="decode-1",
            model_card=lambda: CARD,
            advertise_host="127.0.0.1",
            data_host="127.0.0.1",
            policy=HandoffPolicy(**policy),
            prefill=self,
        )
        self.address = self.receiver.listen()
        self.worker = Worker(self.receiver)
        self.transport = TcpTransport()
        self.counts: dict[str, int] = {}

    async def meet(self, address, request, timeout_s):
        return worker_pb2.MeetResponse(incarnation="p")

    async def prefill(self, address, request, timeout_s, metadata):
        self.calls.append(request)
        self.called.set()
        await asyncio.Event().wait()

    def begin(self, request_id: str = "r", **kwargs) -> worker_pb2.PrefillRequest:
        """The request that a prefill worker gets for PROMPT."""
        self.called.clear()
        candidates = PrefillCandidates(("nobody:1", "nobody:2"))
        self.worker.submit(request_id, PROMPT, transfer=candidates, **kwargs)
        self.worker.turns_until(self.called.is_set)
        return self.calls[-1]

    def send(self, *frame) -> Verdict:
        """Send one frame; turns until it is answered."""

        async def send():
            link = await self.transport.connect(self.address)
            return await (await link.send(*frame))

        answer = self.loop.run(send())
        self.worker.turns_until(answer.done)
        return Verdict(answer.result())

    def dropped(self, kind: str) -> int:
        self.worker.turn()  # what could not be decoded is answered first and counted then
        for name, count in self.receiver.take_events().items():
            self.counts[name] = self.counts.get(name, 0) + count
        return self.counts.get(f"frames_dropped_{kind}", 0)

    def finish(self, request, skip: int = 0) -> None:
        """Send all that is right, from frame `skip` on; the request must end well with it."""
        for index in range(skip, TOTAL):
            assert self.send(*frame_of(request, index)).harmless
        assert self.worker.run("r").finish_reason == "length"
        assert self.worker.computed_tokens == 1
        assert self.worker.idle()

    async def close(self):
        """The client's end."""

    def stop(self):
        self.receiver.shutdown()
        self.loop.run(self.transport.close()).result(5)
        self.loop.close()


@pytest.fixture
def rig():
    rig = Rig()
    yield rig
    rig.stop()


def envelope_of(request, index: int, **changes) -> Envelope:
    fields = {
        "handoff_id": request.handoff.id,
        "incarnation": incarnation_digest(request.handoff.incarnation),
        "generation": request.handoff.generation,
        "number": index,
        "first_block": index,
        "num_blocks": 1,
        "total": TOTAL,
    }
    return Envelope(**{**fields, **changes})


def key_of(index: int) -> bytes:
    keys = chain_keys(PROMPT[:32], BLOCK_SIZE, FINGERPRINT, "")
    return [*keys, partial_block_key(keys[-1], PROMPT[32:39], FINGERPRINT, "")][index]


def payload_of(index: int, layers: range = range(LAYOUT.num_layers)) -> bytes:
    """The right bytes of a block, laid out here as docs/architecture.md says."""
    rows = [kv_of(PROMPT[: p + 1]) for p in range(index * 16, min(39, index * 16 + 16))]
    tokens = np.zeros((BLOCK_SIZE, *rows[0].shape), np.uint8)
    tokens[: len(rows)] = rows
    block = tokens.transpose(1, 2, 0, 3)[layers.start : layers.stop]  # layer, vector, token, bytes
    return block[..., :VECTOR_BYTES].tobytes() + block[..., VECTOR_BYTES:].tobytes()


def frame_of(request, index: int, *, key=None, tokens=None, part=WHOLE, payload=None, **changes):
    """Header and payload of the frame with block `index`, with something changed."""
    layers = range(part.layer_start, min(LAYOUT.num_layers, part.layer_start + part.layer_count))
    payload = payload_of(index, layers) if payload is None else payload
    tokens = tokens or min(16, 39 - index * 16)
    header = encode_block_header(key or key_of(index), part, tokens, payload)
    return encode_envelope(envelope_of(request, index, **changes)) + header, payload


def test_right_frames_are_all_that_a_request_needs(rig):
    rig.finish(rig.begin())
    assert rig.dropped("") == 0


def test_layers_that_come_in_any_order_are_taken_and_counted_as_reordered(rig):
    request = rig.begin()
    parts = [(i, BlockRange(0, 2, layer, 1)) for i in range(TOTAL) for layer in range(3)]
    random.Random(1).shuffle(parts)
    order = list(range(len(parts)))
    random.Random(2).shuffle(order)
    for number, (index, part) in zip(order, parts, strict=True):
        assert rig.send(*frame_of(request, index, part=part, number=number)) is Verdict.ACCEPTED
    rig.worker.run("r")
    assert rig.worker.computed_tokens == 1
    rig.dropped("")
    overtaken = sum(n < max(order[:i], default=0) for i, n in enumerate(order))
    assert rig.counts["frames_reordered"] == overtaken > 0


def test_a_duplicate_is_dropped_and_counts_once(rig):
    request = rig.begin()
    assert rig.send(*frame_of(request, 0)) is Verdict.ACCEPTED
    assert rig.send(*frame_of(request, 0)) is Verdict.DUPLICATE
    assert rig.dropped("duplicate") == 1
    rig.finish(request, skip=1)
    rig.dropped("")
    assert rig.counts["handoff_blocks_received"] == TOTAL


BAD = {
    "wrong_incarnation": {"incarnation": incarnation_digest("decode-0")},
    "old_generation": {"generation": 2},
    "unknown_handoff": {"handoff_id": bytes(16)},
    "wrong_block": {"key": b"k" * 16},
}
WRONG_BLOCK = {
    "tokens": {"tokens": 3},
    "total": {"total": 4},
    "index": {"first_block": 7},
    "blocks": {"num_blocks": 2},
    "no-blocks": {"num_blocks": 0},
    "heads": {"part": BlockRange(0, 1, 0, 3)},
    "layers": {"part": BlockRange(0, 2, 1, 3)},
    "short": {"payload": bytes(LAYOUT.block_bytes - 1)},
    "long": {"payload": bytes(LAYOUT.block_bytes + 1)},
    "empty": {"payload": b""},
}


@pytest.mark.parametrize("kind", BAD)
def test_a_frame_of_another_handoff_worker_attempt_or_prompt_is_dropped(rig, kind):
    request = rig.begin()
    before = rig.worker.cache.clone()
    poison = {"payload": b"\xff" * LAYOUT.block_bytes, **BAD[kind]}
    assert rig.send(*frame_of(request, 0, **poison)) is Verdict[kind.upper()]
    assert rig.worker.cache.equal(before)
    assert rig.dropped(kind) == 1
    rig.finish(request)


@pytest.mark.parametrize("what", WRONG_BLOCK)
def test_a_frame_that_is_not_what_was_asked_for_is_dropped(rig, what):
    request = rig.begin()
    before = rig.worker.cache.clone()
    assert rig.send(*frame_of(request, 0, **WRONG_BLOCK[what])) is Verdict.WRONG_BLOCK
    assert rig.worker.cache.equal(before)
    assert rig.dropped("wrong_block") == 1
    rig.finish(request)


def test_a_truncated_frame_is_dropped_wherever_it_was_cut(rig):
    request = rig.begin()
    whole = b"".join(frame_of(request, 0))
    cuts = [0, 1, 60, 100, len(whole) // 2, len(whole) - 1]
    for cut in cuts:
        assert rig.send(whole[:cut], b"") is Verdict.CORRUPT
    assert rig.dropped("corrupt") == len(cuts)
    rig.finish(request)


def test_a_flipped_bit_is_dropped_wherever_it_is(rig):
    request = rig.begin()
    whole = bytearray(b"".join(frame_of(request, 0)))
    bits = random.Random(3).sample(range(len(whole) * 8), 40)
    for bit in bits:
        whole[bit // 8] ^= 1 << bit % 8
        assert rig.send(bytes(whole), b"") is Verdict.CORRUPT
        whole[bit // 8] ^= 1 << bit % 8
    assert rig.dropped("corrupt") == len(bits)
    rig.finish(request)


def test_a_frame_that_breaks_off_with_its_connection_is_as_if_never_sent(rig):
    request = rig.begin()
    before = rig.worker.cache.clone()
    whole = b"".join(frame_of(request, 0))
    with socket.create_connection(split_address(rig.address)) as raw:
        raw.sendall(struct.pack("<4sBBHQQ", b"BTCP", 1, 1, 0, 1, len(whole)) + whole[:-1])
    rig.worker.turn()
    assert rig.worker.cache.equal(before)
    rig.finish(request)


def test_a_late_frame_of_an_aborted_request_is_dropped(rig):
    request = rig.begin()
    assert rig.send(*frame_of(request, 0)) is Verdict.ACCEPTED
    rig.worker.abort("r")
    assert rig.worker.idle()
    # The pages go to another prompt at once; the late frame must not get into them.
    rig.worker.submit("next", [7] * 50, max_tokens=4)
    rig.worker.turn()
    assert rig.send(*frame_of(request, 1)) is Verdict.AFTER_ABORT
    assert rig.worker.run("next").finish_reason == "length"
    assert rig.dropped("after_abort") == 1


def test_a_late_frame_of_a_finished_handoff_is_dropped(rig):
    request = rig.begin()
    rig.finish(request)
    assert rig.send(*frame_of(request, 2)) is Verdict.AFTER_COMPLETE
    assert rig.dropped("after_complete") == 1


def test_a_frame_of_an_attempt_that_was_given_up_is_dropped_and_the_next_attempt_goes_on():
    rig = Rig(stall_timeout_s=0.3)
    first = rig.begin()
    assert rig.send(*frame_of(first, 0)) is Verdict.ACCEPTED
    rig.worker.turns_until(lambda: len(rig.calls) == 2)
    assert (rig.calls[1].first_block, rig.calls[1].handoff.generation) == (1, 2)
    assert rig.send(*frame_of(first, 1)) is Verdict.OLD_GENERATION
    assert rig.dropped("old_generation") == 1
    rig.finish(rig.calls[1], skip=1)
    rig.stop()


def test_frames_after_the_last_attempt_failed_are_dropped_and_the_prompt_is_computed():
    rig = Rig(stall_timeout_s=0.2, max_attempts=1)
    request = rig.begin(max_tokens=8)
    rig.worker.turns_until(lambda: rig.worker.computed_tokens)
    assert rig.send(*frame_of(request, 1)) is Verdict.AFTER_FAILURE
    assert rig.worker.run("r").finish_reason == "length"
    assert rig.dropped("after_failure") == 1
    rig.stop()


def test_a_frame_after_the_lease_is_dropped_even_before_the_engine_noticed():
    rig = Rig(lease_s=0.3, max_attempts=1)
    request = rig.begin()
    time.sleep(0.35)  # the lease is a length of time: nothing to wait for but the clock
    assert rig.send(*frame_of(request, 0)) in (Verdict.EXPIRED, Verdict.AFTER_FAILURE)
    rig.worker.run("r")
    assert rig.worker.computed_tokens == len(PROMPT)
    rig.stop()


def test_frames_for_the_worker_that_was_here_before_a_restart_are_dropped(rig):
    """The same address, another process: nothing of the old one's handoffs is known."""
    old = rig.begin()
    rig.worker.abort("r")
    rig.worker.submit("s", PROMPT, transfer=PrefillCandidates(("nobody:1",)))
    other = replace(envelope_of(old, 0), incarnation=incarnation_digest("an earlier process"))
    header = encode_block_header(key_of(0), WHOLE, 16, payload_of(0))
    assert rig.send(encode_envelope(other) + header, payload_of(0)) is Verdict.WRONG_INCARNATION
    rig.worker.abort("s")


def test_a_frame_over_the_transports_limit_never_leaves(rig):
    rig.transport = TcpTransport(max_frame_bytes=100)
    with pytest.raises(HandoffError, match="over the transport's 100"):
        rig.send(b"x" * 101, b"")
