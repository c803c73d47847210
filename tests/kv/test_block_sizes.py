"""Workers of different block sizes: what is cut from pages, and handoffs over real sockets."""

import random
import threading
import time

import numpy as np
import pytest
import torch

from common.kv.connectors.copies import HostCopies
from common.kv.connectors.handoff import HandoffReceiver
from common.kv.connectors.pages import pages_of
from common.kv.handoff import HandoffPolicy, PrefillCandidates
from common.kv.layout import ELEMENT_BYTES, SCALE_BYTES, KVLayout, block_sizes_fit
from tests.kv.support import LAYOUT, PrefillWorker, Worker, card_of, prompt_of, until

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("one_layer_a_frame")]
POLICY = HandoffPolicy(min_tokens=8, lease_s=10.0, stall_timeout_s=5.0)
# Prefill and decode.
SIZES = [(8, 16), (16, 8), (16, 32), (32, 16), (1, 16), (16, 1), (24, 72)]


@pytest.mark.parametrize("small", [1, 3, 8, 16, 1024])
def test_block_sizes_fit_when_one_divides_the_other(small):
    for other in (0, 1, 2, 3, 5, 8, 16, 24, 1024, 2048):
        fits = other > 0 and other <= 1024 and (small % other == 0 or other % small == 0)
        assert block_sizes_fit(small, other) == block_sizes_fit(other, small) == fits


# Cutting --------------------------------------------------------------------------------------


def bytes_of(layout: KVLayout, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Payload and scales of tokens: [num_layers, k|v, kv_head, token, bytes] each, never zero."""
    rng = np.random.default_rng(5)
    shape = (layout.num_layers, 2, layout.num_kv_heads, tokens)
    vector = layout.head_dim * ELEMENT_BYTES[layout.kv_dtype]
    return tuple(rng.integers(1, 256, (*shape, n), np.uint8) for n in (vector, SCALE_BYTES))


def lay_out(
    layout: KVLayout, payload: np.ndarray, scales: np.ndarray, blocks: range, layers: range
) -> bytes:
    """The bytes of some layers of blocks, one vector after another; zeros where no token is."""
    out = bytearray()
    parts = (payload, scales) if layout.kv_dtype == "fp8_e4m3" else (payload,)
    for block in blocks:
        for part in parts:
            for layer in layers:
                for vectors in part[layer].reshape(-1, *part.shape[3:]):
                    for at in range(block * layout.block_size, (block + 1) * layout.block_size):
                        is_there = at < len(vectors)
                        out += vectors[at].tobytes() if is_there else bytes(vectors.shape[1])
    return bytes(out)


@pytest.mark.parametrize("kv_dtype", ["float32", "bf16", "fp8_e4m3"])
@pytest.mark.parametrize(("size", "to_size"), SIZES)
def test_blocks_of_another_size_are_cut_from_pages(size, to_size, kv_dtype):
    rng, tokens = random.Random(size * to_size), 5 * max(size, to_size) + 3
    layout = KVLayout(3, 2, 4, size, kv_dtype)
    to, kv = layout.with_block_size(to_size), bytes_of(layout, tokens)
    table = rng.sample(range(1, 256), layout.blocks_for(tokens))
    cache = torch.zeros(256, layout.block_bytes, dtype=torch.uint8)
    for index, page in enumerate(table):
        whole = lay_out(layout, *kv, range(index, index + 1), range(3))
        cache[page] = torch.frombuffer(bytearray(whole), dtype=torch.uint8)
    total, copies = to.blocks_for(tokens), HostCopies(cache, layout)
    for _ in range(8):
        first, layer = rng.randrange(total), rng.randrange(3)
        blocks = range(first, rng.randint(first + 1, total))
        layers = range(layer, rng.randint(layer + 1, 3))
        pages = table[pages_of(layout, to, first, len(blocks))]
        got = copies.blocks(pages, to, first, len(blocks), layers).result()
        assert got == lay_out(to, *kv, blocks, layers), (blocks, layers)


# Handing over: each step checks every byte that attention reads --------------------------------


@pytest.fixture
def start(request):
    """Starts workers of a block size."""

    def begin(role: str, block_size: int, policy: HandoffPolicy = POLICY, **fields):
        if role == "prefill":
            worker = PrefillWorker(block_size=block_size, **fields)
            request.addfinalizer(worker.stop)
            return worker
        connector = HandoffReceiver(
            incarnation=f"decode-{block_size}",
            model_card=lambda: card_of(block_size),
            advertise_host="127.0.0.1",
            data_host="127.0.0.1",
            policy=policy,
        )
        connector.listen()
        request.addfinalizer(connector.shutdown)
        return Worker(connector, block_size=block_size, **fields)

    return begin


def from_(*prefills: PrefillWorker) -> PrefillCandidates:
    return PrefillCandidates(tuple(p.address for p in prefills))


@pytest.mark.parametrize(("size", "to_size"), SIZES)
@pytest.mark.parametrize("step_tokens", [20, 64])
def test_the_decode_worker_computes_only_the_last_token(start, size, to_size, step_tokens):
    prefill = start("prefill", size, num_blocks=2048, step_tokens=step_tokens)
    decode = start("decode", to_size, num_blocks=2048)
    for length in (9, 16, 17, 18, 33, 49, 100, 257):
        decode.submit("r", prompt_of(length, seed=length), transfer=from_(prefill))
        decode.computed_tokens = 0
        assert decode.run("r").finish_reason == "length"
        assert decode.computed_tokens == 1
        decode.outputs.clear()
        blocks = -(-(length - 1) // to_size)
        layout = LAYOUT.with_block_size(to_size)
        events = decode.connector.take_events()
        assert events["handoff_blocks_received"] == blocks
        assert events["handoff_bytes_received"] == blocks * layout.block_bytes
        assert not any(name.startswith("frames_dropped") for name in events)
    assert decode.idle()
    until(prefill.worker.idle)
    assert prefill.sender._staged_bytes == 0


@pytest.mark.parametrize(("size", "to_size"), SIZES)
def test_only_the_blocks_that_the_decode_worker_lacks_are_sent(start, size, to_size):
    """Its hits end inside of a page of the prefill worker where that has more tokens."""
    prefill = start("prefill", size, num_blocks=2048)
    decode = start("decode", to_size, num_blocks=2048)
    prompt, there, expected = prompt_of(400), 0, []
    for length in (100, 108, 221, 400):
        decode.submit(f"r{length}", prompt[:length], transfer=from_(prefill))
        decode.run(f"r{length}")
        hits, there = there // to_size, length
        # A short rest is computed here, not asked for.
        expected += [hits] if length - 1 - hits * to_size >= POLICY.min_tokens else []
    assert [call.first_block for call in prefill.calls] == expected
    until(prefill.worker.idle)


@pytest.mark.parametrize(("size", "to_size"), SIZES[:4])
def test_tokens_count_as_cached_where_the_whole_block_was(start, size, to_size):
    prefill = start("prefill", size)
    first, second = start("decode", to_size), start("decode", to_size)
    prompt = prompt_of(100)
    for worker in (first, second):
        worker.submit("a", prompt, transfer=from_(prefill))
        worker.run("a")
        worker.connector.shutdown()
    assert first.outputs["a"][-1].cached_tokens == 0
    kept = 99 // size * size
    assert prefill.worker.computed_tokens == 99 + 99 - kept
    assert second.outputs["a"][-1].cached_tokens == kept // to_size * to_size


@pytest.mark.parametrize(("size", "to_size"), SIZES[:4])
def test_many_at_once_under_preemption_with_a_full_send_queue(start, size, to_size):
    prefill = start("prefill", size, num_blocks=16 * 24 // size, step_tokens=52)
    prefill.sender._max_staged_bytes = 3 * LAYOUT.with_block_size(32).block_bytes
    decode = start("decode", to_size, num_blocks=512)
    for i in range(8):
        decode.submit(f"r{i}", prompt_of(150 + i, seed=i), transfer=from_(prefill))
    for i in range(8):
        decode.run(f"r{i}", 20)
    assert decode.idle()
    until(prefill.worker.idle)
    assert prefill.sender._staged_bytes == 0


@pytest.mark.parametrize(("size", "to_size"), [(8, 32), (32, 8)])
def test_a_step_that_breaks_between_two_layers_is_tried_again(start, size, to_size):
    prefill, decode = start("prefill", size), start("decode", to_size)

    def break_down(layer: int) -> None:
        if layer == 1:
            prefill.worker.on_layer = None
            raise RuntimeError("the step breaks")

    prefill.worker.on_layer = break_down
    decode.submit("r", prompt_of(129), transfer=from_(prefill, prefill))
    decode.run("r")
    assert [call.handoff.generation for call in prefill.calls] == [1, 2]
    assert decode.computed_tokens == 1
    until(prefill.worker.idle)
    assert prefill.sender._staged_bytes == 0


def test_what_a_worker_of_one_size_began_a_worker_of_another_size_ends(start):
    half, stuck = start("prefill", 32, step_tokens=40), threading.Event()
    half.worker.on_turn = lambda w: stuck.wait(30) if w.computed_tokens >= 80 else None
    other = start("prefill", 8)
    decode = start("decode", 16, HandoffPolicy(min_tokens=1, stall_timeout_s=0.5))
    decode.submit("r", prompt_of(200), transfer=from_(half, other))
    decode.run("r")
    assert decode.computed_tokens == 1
    # 80 tokens were there, the fifth block of 16 among them; the pages were of 32.
    assert [call.first_block for call in other.calls] == [5]
    stuck.set()


def test_an_aborted_handoff_leaves_the_pages_to_others(start):
    prefill, decode = start("prefill", 32, step_tokens=16), start("decode", 8)
    # A step takes its time, so that the abort comes before the last.
    prefill.worker.on_turn = lambda w: time.sleep(0.01)
    decode.submit("gone", prompt_of(300, seed=1), transfer=from_(prefill))
    decode.turns_until(lambda: decode.connector._events["handoff_blocks_received"])
    decode.abort("gone")
    decode.submit("next", prompt_of(120, seed=2), transfer=from_(prefill), max_tokens=30)
    decode.run("next")
    assert decode.idle()
    until(prefill.worker.idle)
