"""From a prefill worker to a decode worker over real sockets: the right KV or none."""

import asyncio
import threading
import time
from dataclasses import replace

import pytest

from baton.v1 import worker_pb2
from common.errors import Overloaded
from common.kv.connectors import sender
from common.kv.connectors.handoff import HandoffReceiver
from common.kv.handoff import HandoffPolicy, PrefillCandidates
from common.kv.transports import DataPlane
from common.kv.wire import FRAME_OVERHEAD_BYTES
from common.telemetry.tracing import Tracing, context_of, inject
from tests.kv.support import BLOCK_SIZE, CARD, LAYOUT, PrefillWorker, Worker, prompt_of, until

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("one_layer_a_frame")]
POLICY = HandoffPolicy(min_tokens=8, lease_s=10.0, stall_timeout_s=5.0)


def receiver(**kwargs) -> HandoffReceiver:
    kwargs.setdefault("policy", POLICY)
    connector = HandoffReceiver(
        incarnation="decode-1",
        model_card=lambda: CARD,
        advertise_host="127.0.0.1",
        data_host="127.0.0.1",
        **kwargs,
    )
    connector.listen()
    return connector


@pytest.fixture
def prefill():
    worker = PrefillWorker()
    yield worker
    worker.stop()


@pytest.fixture
def decode():
    worker = Worker(receiver())
    yield worker
    worker.connector.shutdown()


def from_(*prefills: PrefillWorker | str) -> PrefillCandidates:
    return PrefillCandidates(tuple(getattr(p, "address", p) for p in prefills))


@pytest.mark.parametrize("length", [9, 16, 17, 18, 32, 33, 100, 257, 500])
def test_the_decode_worker_computes_only_the_last_token(prefill, decode, length):
    decode.submit("r", prompt_of(length), transfer=from_(prefill))
    output = decode.run("r")
    assert output.finish_reason == "length"
    assert decode.computed_tokens == 1
    assert output.cached_tokens == 0
    assert decode.idle()
    until(prefill.worker.idle)
    blocks = -(-(length - 1) // BLOCK_SIZE)
    frames = -(-(length - 1) // prefill.worker.step_tokens) * LAYOUT.num_layers
    events = decode.connector.take_events()
    assert events == {
        "handoff_blocks_received": blocks,
        "handoff_bytes_received": blocks * LAYOUT.block_bytes,
        "handoffs_completed": 1,
        "prefill_handed_over": 1,
        "transport_frames_received_shm": frames,
        "transport_bytes_received_shm": (
            blocks * LAYOUT.block_bytes + frames * FRAME_OVERHEAD_BYTES
        ),
    }


def test_blocks_come_while_the_prompt_is_still_computed():
    prefill = PrefillWorker(step_tokens=32)
    decode = Worker(receiver())
    steps_at_first_block = []

    def watch(worker: Worker) -> None:
        if decode.connector._events["handoff_blocks_received"] and not steps_at_first_block:
            steps_at_first_block.append(worker.computed_tokens)
        time.sleep(0.01)  # a step takes its time, as a real one does

    prefill.worker.on_turn = watch
    decode.submit("r", prompt_of(400), transfer=from_(prefill))
    decode.run("r")
    assert steps_at_first_block[0] < 399
    prefill.stop()
    decode.connector.shutdown()


def test_a_layer_leaves_while_the_next_ones_are_computed(prefill, decode):
    received = []

    def wait_for_the_first_layer(layer: int) -> None:
        if layer == LAYOUT.num_layers - 2:
            events = decode.connector._events
            received.append(until(lambda: events["handoff_bytes_received"]))

    prefill.worker.on_layer = wait_for_the_first_layer
    decode.submit("r", prompt_of(65), transfer=from_(prefill))
    decode.run("r")
    assert received[0] % (4 * LAYOUT.layer_bytes) == 0
    assert decode.computed_tokens == 1


def test_a_sender_that_is_not_layer_wise_sends_when_the_whole_prompt_is_computed(decode):
    prefill = PrefillWorker(step_tokens=32)
    prefill.sender._layer_wise = False
    staged = []
    prefill.worker.on_layer = lambda layer: staged.append(prefill.sender._staged_bytes)
    decode.submit("r", prompt_of(100), transfer=from_(prefill))
    decode.run("r")
    assert decode.computed_tokens == 1
    assert staged == [0] * LAYOUT.num_layers * 4
    until(prefill.worker.idle)
    prefill.stop()


def test_small_layers_share_a_frame(prefill, decode, monkeypatch):
    monkeypatch.setattr(sender, "MIN_FRAME_BYTES", 7 * LAYOUT.layer_bytes)
    decode.submit("r", prompt_of(65), transfer=from_(prefill))
    decode.run("r")
    until(lambda: _count(prefill.worker).get("handoff_frames_sent") == 2)


def test_layers_of_a_step_before_the_last_go_together(decode, monkeypatch):
    monkeypatch.setattr(sender, "EARLY_FRAME_BYTES", LAYOUT.block_bytes * 100)
    prefill = PrefillWorker(step_tokens=32)
    decode.submit("r", prompt_of(97), transfer=from_(prefill))
    decode.run("r")
    assert decode.computed_tokens == 1
    frames = 2 + LAYOUT.num_layers  # of three steps
    until(lambda: _count(prefill.worker).get("handoff_frames_sent") == frames)
    prefill.stop()


def test_big_chunks_are_split_into_frames_of_the_largest_size(prefill, decode, monkeypatch):
    monkeypatch.setattr(sender, "MAX_FRAME_BYTES", 2 * LAYOUT.layer_bytes)
    decode.submit("r", prompt_of(65), transfer=from_(prefill))
    decode.run("r")
    assert decode.computed_tokens == 1
    until(lambda: _count(prefill.worker).get("handoff_frames_sent") == 6)


def test_a_step_that_breaks_between_two_layers_leaves_nothing_staged(prefill, decode):
    def break_down(layer: int) -> None:
        if layer == 2:
            prefill.worker.on_layer = None
            raise RuntimeError("the step breaks")

    prefill.worker.on_layer = break_down
    decode.submit("r", prompt_of(65), transfer=from_(prefill, prefill))
    decode.run("r")
    assert [call.handoff.generation for call in prefill.calls] == [1, 2]
    assert decode.computed_tokens == 1
    until(prefill.worker.idle)
    until(lambda: prefill.sender._staged_bytes == 0)


def test_only_the_blocks_that_the_decode_worker_lacks_are_sent(prefill, decode):
    prompt = prompt_of(200)
    decode.submit("a", prompt[:100], transfer=from_(prefill))
    decode.run("a")
    decode.submit("b", prompt, transfer=from_(prefill))
    output = decode.run("b")
    assert prefill.calls[1].first_block == 99 // BLOCK_SIZE
    assert output.cached_tokens == 99 // BLOCK_SIZE * BLOCK_SIZE
    assert decode.computed_tokens == 2


def test_tokens_that_the_prefill_worker_had_cached_count_as_cached(prefill):
    first, second = Worker(receiver()), Worker(receiver())
    prompt = prompt_of(100)
    first.submit("a", prompt, transfer=from_(prefill))
    assert first.run("a").cached_tokens == 0
    second.submit("b", prompt, transfer=from_(prefill))
    assert second.run("b").cached_tokens == 96
    assert prefill.worker.computed_tokens == 99 + 3
    first.connector.shutdown()
    second.connector.shutdown()


def test_a_prompt_that_is_wholly_cached_on_the_prefill_worker_is_sent_without_a_step(prefill):
    first, second = Worker(receiver()), Worker(receiver())
    prompt = prompt_of(65)
    for worker in (first, second):
        worker.submit("a", prompt, transfer=from_(prefill))
        worker.run("a")
        worker.connector.shutdown()
    assert prefill.worker.computed_tokens == 64
    assert second.computed_tokens == 1


def test_many_requests_at_once_get_each_its_own_kv(prefill, decode):
    prompts = {f"r{i}": prompt_of(20 + 7 * i, seed=i) for i in range(16)}
    decode.num_blocks = 256
    for request_id, prompt in prompts.items():
        decode.submit(request_id, prompt, transfer=from_(prefill))
    for request_id in prompts:
        decode.run(request_id, 20)
    assert decode.idle()
    until(prefill.worker.idle)


def test_a_prefill_worker_under_preemption_never_sends_another_sequences_kv():
    prefill = PrefillWorker(num_blocks=24)
    decode = Worker(receiver(), num_blocks=256)
    for i in range(8):
        decode.submit(f"r{i}", prompt_of(150 + i, seed=i), transfer=from_(prefill))
    for i in range(8):
        decode.run(f"r{i}", 20)  # every step checks every byte that attention reads
    until(prefill.worker.idle)
    prefill.stop()
    decode.connector.shutdown()


def test_a_full_send_queue_holds_the_pages_until_there_is_room(decode):
    prefill = PrefillWorker()
    prefill.sender._max_staged_bytes = 2 * LAYOUT.block_bytes
    decode.submit("r", prompt_of(500), transfer=from_(prefill))
    decode.run("r")
    assert decode.computed_tokens == 1
    until(prefill.worker.idle)
    assert prefill.sender._staged_bytes == 0
    prefill.stop()


def test_a_short_prompt_is_prefilled_here(prefill, decode):
    decode.submit("r", prompt_of(8), transfer=from_(prefill))
    decode.run("r")
    assert prefill.calls == []
    assert decode.computed_tokens == 8


def test_without_candidates_the_prompt_is_prefilled_here(decode):
    decode.submit("r", prompt_of(50), transfer=PrefillCandidates(()))
    decode.run("r")
    assert decode.computed_tokens == 50


def test_the_next_candidate_is_asked_when_the_first_does_not_answer(prefill, decode):
    decode.submit("r", prompt_of(50), transfer=from_("127.0.0.1:1", prefill))
    decode.run("r")
    assert decode.computed_tokens == 1
    assert [call.handoff.generation for call in prefill.calls] == [2]
    assert decode.connector.take_events()["handoff_attempts_failed"] == 1


def test_when_every_candidate_fails_the_prompt_is_prefilled_here(decode):
    decode.submit("r", prompt_of(50), transfer=from_("127.0.0.1:1", "127.0.0.1:2"))
    assert decode.run("r").finish_reason == "length"
    assert decode.computed_tokens == 50
    assert decode.idle()
    assert decode.connector.take_events()["handoffs_failed"] == 1


def test_no_more_than_max_attempts_candidates_are_asked():
    decode = Worker(receiver(policy=HandoffPolicy(min_tokens=1, max_attempts=2)))
    decode.submit("r", prompt_of(50), transfer=from_(*[f"127.0.0.1:{i}" for i in range(1, 6)]))
    decode.run("r")
    assert decode.connector.take_events()["handoff_attempts_failed"] == 2
    decode.connector.shutdown()


def test_an_error_of_the_prefill_worker_leads_to_the_next_candidate(prefill, decode):
    full = PrefillWorker()

    async def refuse(request):
        raise Overloaded("full")

    full.spoil = refuse
    decode.submit("r", prompt_of(50), transfer=from_(full, prefill))
    decode.run("r")
    assert len(full.calls) == len(prefill.calls) == 1
    assert decode.computed_tokens == 1
    full.stop()


def test_an_answer_of_ok_without_the_blocks_is_a_failure(prefill, decode):
    liar = PrefillWorker()

    async def lie(request):
        return worker_pb2.PrefillResponse(blocks_sent=99)

    liar.spoil = lie
    decode.submit("r", prompt_of(50), transfer=from_(liar, prefill))
    decode.run("r")
    assert decode.computed_tokens == 1
    liar.stop()


def test_blocks_that_landed_before_a_failure_are_not_asked_for_again(prefill):
    """The first worker sends some blocks and then goes silent."""
    half, stuck = PrefillWorker(step_tokens=32), threading.Event()
    half.worker.on_turn = lambda w: stuck.wait(30) if w.computed_tokens >= 64 else None
    decode = Worker(receiver(policy=HandoffPolicy(min_tokens=1, stall_timeout_s=0.5)))
    decode.submit("r", prompt_of(200), transfer=from_(half, prefill))
    decode.run("r")
    assert decode.computed_tokens == 1
    assert prefill.calls[0].first_block > 0
    assert prefill.calls[0].handoff.generation == 2
    until(lambda: half.cancelled == 1)
    stuck.set()
    half.stop()
    decode.connector.shutdown()


def test_a_stalled_prefill_worker_does_not_hold_a_request_past_the_stall_timeout(decode):
    async def stall(request):
        await asyncio.sleep(3600)

    silent = PrefillWorker()
    silent.spoil = stall
    quick = Worker(receiver(policy=HandoffPolicy(min_tokens=1, stall_timeout_s=0.3)))
    started = time.monotonic()
    quick.submit("r", prompt_of(50), transfer=from_(silent))
    quick.run("r")
    assert 0.3 <= time.monotonic() - started < 3
    assert quick.computed_tokens == 50
    until(lambda: silent.cancelled == 1)
    quick.connector.shutdown()
    silent.stop()


def test_an_abort_cancels_the_call_and_frees_the_blocks_at_once(decode):
    async def stall(request):
        await asyncio.sleep(3600)

    silent = PrefillWorker()
    silent.spoil = stall
    decode.submit("r", prompt_of(50), transfer=from_(silent))
    decode.turns_until(lambda: silent.calls)
    assert decode.blocks.num_used > 0
    decode.abort("r")
    assert decode.idle()
    until(lambda: silent.cancelled == 1, 2)
    silent.stop()


def test_late_frames_of_an_aborted_request_are_dropped_and_touch_no_page(prefill, decode):
    """The pages go to another request at once, which then must find its own KV in them."""
    release = asyncio.Event()
    seen = []

    async def late(request):
        seen.append(request)
        # The abort cancels this call; a worker that does not notice goes on sending.
        try:
            await release.wait()
        except asyncio.CancelledError:
            asyncio.current_task().uncancel()
        return None

    prefill.spoil = late
    decode.submit("gone", prompt_of(100, seed=1), transfer=from_(prefill))
    decode.turns_until(lambda: seen)
    decode.abort("gone")
    decode.turns_until(lambda: "frames_dropped_after_abort" in _count(decode), 10)
    decode.submit("next", prompt_of(100, seed=2), max_tokens=30)
    decode.run("next")
    assert decode.events["frames_dropped_after_abort"] >= 1
    assert "handoff_blocks_received" not in decode.events


def _count(worker: Worker) -> dict[str, int]:
    """All of the connector's events so far."""
    totals = worker.__dict__.setdefault("events", {})
    for name, count in worker.connector.take_events().items():
        totals[name] = totals.get(name, 0) + count
    return totals


def test_kv_of_another_model_is_never_used(prefill, decode):
    """A prefill worker that computes under another fingerprint, and does not say so."""
    other = replace(prefill.sender._caches, fingerprint=b"another")
    prefill.worker.connector.register_kv_caches(other)
    decode.submit("r", prompt_of(100), transfer=from_(prefill))
    decode.run("r")
    assert decode.computed_tokens == 100
    assert _count(decode)["frames_dropped_wrong_block"] >= 1


def test_a_deadline_ends_the_request_and_the_call(decode):
    async def stall(request):
        await asyncio.sleep(3600)

    silent = PrefillWorker()
    silent.spoil = stall
    started = time.monotonic()
    decode.submit("r", prompt_of(50), transfer=from_(silent), deadline=time.monotonic() + 0.4)
    output = decode.run("r")
    assert output.finish_reason in ("error", "length")
    assert time.monotonic() - started < 2
    assert silent.calls[0].handoff.lease_ms <= 400
    until(lambda: silent.cancelled == 1, 2)
    decode.turns_until(decode.idle)
    silent.stop()


def test_a_prefill_worker_that_dies_midway_costs_a_retry_and_nothing_else(prefill):
    dying = PrefillWorker(step_tokens=16)
    dying.worker.on_turn = lambda w: time.sleep(0.03)
    decode = Worker(receiver())
    decode.submit("r", prompt_of(400), transfer=from_(dying, prefill))
    decode.turns_until(lambda: "handoff_blocks_received" in _count(decode))
    dying.stop()
    decode.run("r")
    assert decode.computed_tokens == 1
    decode.connector.shutdown()


@pytest.mark.parametrize("end", ["sender", "receiver"])
def test_a_link_that_breaks_midway_is_replaced_by_the_next_transport_with_nothing_lost(end):
    prefill = PrefillWorker(step_tokens=16)
    decode = Worker(receiver(transport=DataPlane(["shm", "tcp"])))
    prefill.worker.on_turn = lambda worker: time.sleep(0.01)
    decode.submit("r", prompt_of(400), transfer=from_(prefill))
    decode.turns_until(lambda: decode.connector._events["handoff_blocks_received"] > 3)
    plane, loop = prefill.sender._transport, prefill.sender._loop
    assert list(plane.links().values()) == ["shm"]
    if end == "sender":
        (peer,) = plane._peers.values()
        loop.run(peer.link.close()).result(5)
    else:
        served = decode.connector._transport._sides["shm"]._serving
        decode.connector._loop.run(served.cancel()).result(5)
    decode.run("r")  # it checks every byte that attention reads
    assert decode.computed_tokens == 1
    assert len(prefill.calls) == 1
    assert list(plane.links().values()) == ["tcp"]
    events = decode.connector.take_events()
    assert events["handoff_blocks_received"] == 25
    assert events["handoffs_completed"] == 1
    assert "handoff_attempts_failed" not in events
    assert events["transport_frames_received_shm"] > 0
    assert events["transport_frames_received_tcp"] > 0
    prefill.stop()
    decode.connector.shutdown()


def test_the_receivers_refusal_reaches_the_prefill_workers_caller(prefill, decode):
    """A frame with a wrong incarnation: as after a restart of the decode worker."""

    async def other_process(request):
        changed = worker_pb2.PrefillRequest()
        changed.CopyFrom(request)
        changed.handoff.incarnation = "decode-0"
        return changed

    prefill.spoil = other_process
    decode.submit("r", prompt_of(50), transfer=from_(prefill))
    decode.run("r")
    assert decode.computed_tokens == 50
    assert _count(decode)["frames_dropped_wrong_incarnation"] >= 1
    until(prefill.worker.idle)


def test_the_handoff_has_a_span_under_the_requests_and_its_context_goes_along(prefill):
    tracing = Tracing("test")
    root = tracing.start("decode.request")
    traceparent, tracestate = inject(context_of(root))
    decode = Worker(receiver(tracing=tracing))
    candidates = PrefillCandidates((prefill.address,), traceparent, tracestate)
    decode.submit("r", prompt_of(50), transfer=candidates)
    decode.run("r")
    trace_id = root.get_span_context().trace_id.to_bytes(16, "big")
    (span,) = tracing.spans(trace_id)
    assert (span.name, span.error) == ("decode.handoff", False)
    assert span.parent_span_id == root.get_span_context().span_id.to_bytes(8, "big")
    sent = prefill.metadata[0]["traceparent"]
    assert sent.startswith(f"00-{trace_id.hex()}-{span.span_id.hex()}-")
    decode.connector.shutdown()
