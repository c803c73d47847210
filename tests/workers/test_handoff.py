"""A decode worker with prefill workers: KV that comes gives the tokens of KV computed here."""

import asyncio
import secrets
import signal
import time

import grpc
import pytest

from baton.cli.ports import any_free
from baton.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from common.errors import HandoffError, InvalidRequest
from common.kv.handoff import Verdict
from common.kv.transports import DataPlane
from common.kv.wire import ENVELOPE_VERSION
from common.rpc.channel import connect
from common.rpc.errors import from_rpc_error
from common.rpc.loop import LoopThread
from tests.engine.zoo import VOCAB, checkpoint, random_prompt
from tests.workers.support import GatewaySession, is_greedy, new_trace, until


async def spans_of(worker, trace_id):
    return {span.name: span for span in await worker.spans(trace_id)}


async def sent_blocks(prefill):
    return (await prefill.idle()).load.counters["handoff_blocks_sent"]


async def test_disaggregated_tokens_equal_those_of_transformers(prefill, decode, model):
    prompts = [random_prompt(n, seed=n) for n in (129, 130, 144, 145, 161, 300, 700)]
    before, failed = await sent_blocks(prefill), await failures(decode)
    async with GatewaySession(decode.address) as session:
        replies = [await session.submit(p, candidates=[prefill.address]) for p in prompts]
        for prompt, reply in zip(prompts, replies, strict=True):
            await reply.end()
            assert reply.error is None
            assert is_greedy(model, prompt, reply.tokens, 16)
    assert await failures(decode) == failed
    assert await sent_blocks(prefill) - before == sum(-(-(len(p) - 1) // 16) for p in prompts)


async def test_rotated_kv_is_handed_over_between_workers_that_both_rotate(start, model):
    prefill, decode = start("prefill", "decode", flags=("--rotate-qk",))
    prompt = random_prompt(300, seed=1006)
    async with GatewaySession(decode.address) as session:
        reply = await (await session.submit(prompt, candidates=[prefill.address])).end()
    assert reply.error is None
    assert is_greedy(model, prompt, reply.tokens, 16)
    assert await sent_blocks(prefill) == 19


async def failures(decode):
    return (await decode.idle()).load.counters.get("handoffs_failed", 0)


async def test_a_handoff_is_one_trace_over_both_workers(prefill, decode):
    trace_id, parent = new_trace()
    async with GatewaySession(decode.address) as session:
        reply = await session.submit(
            random_prompt(200, seed=1001), candidates=[prefill.address], traceparent=parent
        )
        await reply.end()
    await decode.idle()
    await prefill.idle()
    here, there = await spans_of(decode, trace_id), await spans_of(prefill, trace_id)
    assert {"decode.request", "decode.queue", "decode.handoff"} <= set(here)
    assert {"decode.first_token", "decode.generate"} <= set(here)
    assert {"prefill.request", "prefill.queue", "prefill.compute", "prefill.transfer"} <= set(there)
    attributes = here["decode.request"].attributes
    assert attributes["prefill.where"] == "remote"
    assert attributes["prefill.reason"] == "handed_over"
    ids = {s.span_id for s in here.values()}
    assert there["prefill.request"].parent_span_id in ids
    for name in ("prefill.queue", "prefill.compute", "prefill.transfer"):
        assert there[name].parent_span_id == there["prefill.request"].span_id


async def test_a_short_prompt_is_prefilled_where_it_is_decoded(decode):
    trace_id, parent = new_trace()
    async with GatewaySession(decode.address) as session:
        # Nobody listens there: asking would show. 127 tokens besides the last are under 128.
        reply = await session.submit(
            random_prompt(128, seed=1000), candidates=["127.0.0.1:9"], traceparent=parent
        )
        assert (await reply.end()).error is None
    spans = await spans_of(decode, trace_id)
    assert "decode.handoff" not in spans
    assert spans["decode.request"].attributes["prefill.reason"] == "few_uncached_tokens"


async def test_an_unreachable_candidate_is_passed_over_for_the_next(prefill, decode, model):
    prompt = random_prompt(200, seed=1002)
    before = await sent_blocks(prefill)
    async with GatewaySession(decode.address) as session:
        reply = await session.submit(prompt, candidates=["127.0.0.1:9", prefill.address])
        await reply.end()
        assert is_greedy(model, prompt, reply.tokens, 16)
    assert await sent_blocks(prefill) - before == 13


async def test_with_no_candidate_alive_the_prompt_is_prefilled_locally(decode, model):
    trace_id, parent = new_trace()
    prompt = random_prompt(200, seed=1003)
    async with GatewaySession(decode.address) as session:
        reply = await session.submit(prompt, candidates=["127.0.0.1:9"], traceparent=parent)
        await reply.end()
        assert is_greedy(model, prompt, reply.tokens, 16)
        assert reply.error is None
    spans = await spans_of(decode, trace_id)
    assert spans["decode.request"].attributes["prefill.reason"] == "handoff_failed"
    await decode.idle()


async def begin_long_prefill(session, prefill, seed):
    """A request whose prefill is under way. It takes a good part of a second at one token a step,
    so a machine too busy to see it running gets other prompts."""
    async with connect(prefill.address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        for attempt in range(10):
            prompt = random_prompt(900, seed=seed + attempt)
            reply = await session.submit(prompt, candidates=[prefill.address], max_tokens=64)
            while not reply.tokens:
                state = await stub.GetState(worker_pb2.GetStateRequest(), timeout=10)
                if state.load.running_requests:
                    return prompt, reply
            await reply.end()
    raise AssertionError("no prefill was seen running")


async def test_a_prefill_worker_killed_in_the_middle_costs_time_and_no_token(start, decode, model):
    prefill = start("prefill", flags=("--max-num-batched-tokens", "1"))
    before = await failures(decode)
    async with GatewaySession(decode.address) as session:
        prompt, reply = await begin_long_prefill(session, prefill, 3000)
        prefill.stop(kill=True)
        await reply.end()
        assert reply.error is None
        assert is_greedy(model, prompt, reply.tokens, 64)
    assert await failures(decode) == before + 1


async def test_a_prefill_worker_that_hangs_costs_time_and_no_token(start, model):
    decode = start("decode", flags=("--handoff-stall-s", "0.5"))
    prefill = start("prefill")
    prefill.process.send_signal(signal.SIGSTOP)
    prompt = random_prompt(300, seed=1004)
    async with GatewaySession(decode.address) as session:
        reply = await session.submit(prompt, candidates=[prefill.address])
        await reply.end()
        assert reply.error is None
        assert is_greedy(model, prompt, reply.tokens, 16)
    await decode.idle()


async def test_one_deadline_ends_a_request_on_every_service_though_none_of_them_answers(start):
    store, prefill = start("kvstore", "prefill")
    flags = ("--kvstore", store.address, "--prefill", prefill.address)
    decode = start("decode", flags=flags)
    async with GatewaySession(decode.address) as session:
        await (await session.submit(random_prompt(8, seed=1))).end()  # what is made lazily is made
        store.process.send_signal(signal.SIGSTOP)
        prefill.process.send_signal(signal.SIGSTOP)
        try:
            prompt = random_prompt(300, seed=7000)
            began = time.monotonic()
            reply = await session.submit(
                prompt, candidates=[prefill.address], remaining_ms=1200, max_tokens=2
            )
            await reply.end(timeout_s=3.2)
            assert reply.error.kind == common_pb2.ERROR_KIND_DEADLINE_EXCEEDED
            assert 1.0 < time.monotonic() - began < 3.2
            await decode.idle()
        finally:
            prefill.process.send_signal(signal.SIGCONT)
            store.process.send_signal(signal.SIGCONT)
    await prefill.idle()


async def test_a_loaded_prefill_worker_is_passed_over_and_the_trace_says_why(start, model):
    prefill = start("prefill", flags=("--max-num-batched-tokens", "1"))
    decode = start("decode", flags=("--remote-prefill-max-tokens-ahead", "500"))
    trace_id, parent = new_trace()
    async with GatewaySession(decode.address) as session:
        _, first = await begin_long_prefill(session, prefill, 6000)
        prompt = random_prompt(200, seed=6100)
        second = await session.submit(prompt, candidates=[prefill.address], traceparent=parent)
        await second.end()
        assert first.tokens == []
        assert is_greedy(model, prompt, second.tokens, 16)
        await session.cancel(first.id)
        await first.end()
    attributes = (await spans_of(decode, trace_id))["decode.request"].attributes
    assert (attributes["prefill.where"], attributes["prefill.reason"]) == ("local", "pool_loaded")
    counters = (await decode.idle()).load.counters
    assert counters["prefill_pool_loaded"] == 1
    assert counters["prefill_ended_before_it_came"] == 1


async def test_a_cancelled_request_stops_the_prefill_worker_too(start, decode):
    prefill = start("prefill", flags=("--max-num-batched-tokens", "1"))
    async with GatewaySession(decode.address) as session:
        _, reply = await begin_long_prefill(session, prefill, 4000)
        await session.cancel(reply.id)
        await reply.end(timeout_s=2)
        await asyncio.gather(prefill.idle(1.0), decode.idle(1.0))


@pytest.mark.parametrize("kind", ["weights", "kv_dtype", "block_size", "rotate_qk"])
async def test_workers_that_do_not_fit_each_other_share_no_kv(start, model, kind):
    flags = {
        "weights": (),
        "kv_dtype": ("--kv-dtype", "bf16"),
        "block_size": ("--block-size", "24"),  # of 16 and 24 none divides the other
        "rotate_qk": ("--rotate-qk",),
    }
    other = checkpoint("llama", True) if kind == "weights" else model
    prefill = start("prefill", flags=flags[kind], model=other)
    decode = start("decode", flags=("--prefill", prefill.address))  # Ready though alone
    own, theirs = await decode.state(), await prefill.state()
    field = "fingerprint" if kind in ("weights", "rotate_qk") else kind
    (refused,) = own.peers
    assert (refused.address, refused.status) == (prefill.address, "refused")
    assert [peer.status for peer in theirs.peers] == ["refused"]
    told = [
        refused.error,
        theirs.peers[0].error,
        decode.events("peer_refused")[0]["error"],
        prefill.events("peer_refused")[0]["error"],
    ]
    for card in (own.model, theirs.model):
        value = getattr(card, field)
        shown = value.hex() if isinstance(value, bytes) else str(value)
        assert all(shown in text for text in told), (shown, told)
    prompt = random_prompt(200, seed=2000 + len(kind))
    trace_id, parent = new_trace()
    async with GatewaySession(decode.address) as session:
        reply = await session.submit(prompt, candidates=[prefill.address], traceparent=parent)
        await reply.end()
        assert reply.error is None
        assert is_greedy(model, prompt, reply.tokens, 16)
    # It is not even asked.
    assert decode.events("handoff_attempt_failed") == []
    span = (await spans_of(decode, trace_id))["decode.request"]
    assert span.attributes["prefill.reason"] == "no_candidate_fits"


class Caller:
    """Calls a prefill worker as a decode worker would, with one thing changed."""

    def __init__(self, channel, card):
        self.stub = worker_pb2_grpc.PrefillServiceStub(channel)
        self.card = card
        self.incarnation = secrets.token_hex(4)

    def introduction(self, **changes):
        fields = {
            "worker_id": "d",
            "incarnation": self.incarnation,
            "data_address": "127.0.0.1:9",
            "model": self.card,
            "frame_version": ENVELOPE_VERSION,
        }
        return worker_pb2.MeetRequest(**{**fields, **changes})

    def request(self, **changes):
        handoff = worker_pb2.Handoff(
            id=secrets.token_bytes(16),
            incarnation=self.incarnation,
            generation=1,
            lease_ms=5000,
        )
        fields = {"request_id": "r", "handoff": handoff, "token_ids": [5] * 40, "num_tokens": 39}
        return worker_pb2.PrefillRequest(**{**fields, **changes})

    async def refusal(self, **changes):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.stub.Prefill(self.request(**changes), timeout=10)
        return from_rpc_error(caught.value)

    async def snub(self, **changes):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.stub.Meet(self.introduction(**changes), timeout=10)
        return from_rpc_error(caught.value)


async def test_a_bad_prefill_request_is_refused_by_name_and_the_worker_lives_on(prefill):
    card = (await prefill.state()).model
    receiver, loop = DataPlane(), LoopThread("test")

    async def drop(frame):
        return Verdict.UNKNOWN_HANDOFF

    port = loop.run(receiver.listen("127.0.0.1", 0, drop)).result(5)
    async with connect(prefill.address) as channel:
        caller = Caller(channel, card)
        own = caller.incarnation
        short = worker_pb2.Handoff(id=b"x", incarnation=own, lease_ms=5000)
        no_lease = worker_pb2.Handoff(id=bytes(16), incarnation=own)
        await caller.stub.Meet(caller.introduction(data_address=f"127.0.0.1:{port}"), timeout=10)
        for text, change in {
            "num_tokens is 41": {"num_tokens": 41},
            "num_tokens is 0": {"num_tokens": 0},
            "token 3 of the prompt is 199": {"token_ids": [5, 5, 5, VOCAB], "num_tokens": 3},
            "first_block is 3": {"first_block": 3},
            "1025 tokens": {"token_ids": [5] * 1025},
            "handoff.id has 1 bytes": {"handoff": short},
            "lease_ms is 0": {"handoff": no_lease},
        }.items():
            error = await caller.refusal(**change)
            assert isinstance(error, InvalidRequest), (text, error)
            assert text in str(error)
        # A receiver that does not want the KV is no fault of the request.
        assert "unknown_handoff" in str(await caller.refusal())
    loop.run(receiver.close()).result(5)
    loop.close()
    await prefill.idle()


async def test_a_process_that_was_not_met_is_refused_and_so_is_a_bad_introduction(prefill):
    card = (await prefill.state()).model
    async with connect(prefill.address) as channel:
        caller = Caller(channel, card)
        stranger = worker_pb2.Handoff(id=bytes(16), incarnation="stranger", lease_ms=5000)
        assert (await caller.refusal(handoff=stranger)).code == "not_met"
        for text, change in {
            "data_address": {"data_address": "a:1,b:2"},
            "incarnation must have": {"incarnation": ""},
            "worker_id must have": {"worker_id": "w" * 257},
            "block_size is 0": {"model": worker_pb2.ModelCard()},
            "frame_version is 1,": {"frame_version": 1},
        }.items():
            error = await caller.snub(**change)
            assert isinstance(error, InvalidRequest)
            assert text in str(error)
        # Nobody listens there.
        assert isinstance(await caller.snub(), HandoffError)
        assert (await caller.refusal()).code == "not_met"
    states = {peer.address: peer.status for peer in (await prefill.state()).peers}
    assert states["127.0.0.1:9"] == "unreachable"


async def test_a_decode_worker_is_ready_after_a_test_transfer_with_a_prefill_worker(start, model):
    port = any_free()
    decode = start("decode", flags=("--prefill", f"127.0.0.1:{port}"), ready=False)
    await until(lambda: decode.events("loaded"), "decode loaded", 60)
    assert decode.events("ready") == []
    prefill = start("prefill", flags=("--port", str(port)), ready=False)
    decode.ready()
    met = decode.events("peer_met")
    assert [event["peer"] for event in met] == [f"127.0.0.1:{port}"]
    assert decode.events("no_prefill_worker_met") == []
    state = await prefill.ready().state()
    (peer,) = state.peers
    assert (peer.status, peer.address) == ("met", (await decode.state()).data_address)
    assert peer.test_transfer_ms > 0


async def test_a_prefill_worker_that_restarts_is_met_again_and_one_of_another_model_is_not_used(
    start, model
):
    first = start("prefill")
    port = ("--port", first.address.rpartition(":")[2])
    decode = start("decode", flags=("--prefill", first.address))

    async def ask(session, seed):
        prompt = random_prompt(200, seed=seed)
        reply = await session.submit(prompt, candidates=[first.address])
        await reply.end()
        assert reply.error is None
        assert is_greedy(model, prompt, reply.tokens, 16)
        return (await decode.idle()).load.counters["handoffs_completed"]

    async with GatewaySession(decode.address) as session:
        assert await ask(session, 5000) == 1
        first.stop(kill=True)
        second = start("prefill", flags=port)
        assert await ask(session, 5001) == 2
        second.stop(kill=True)
        start("prefill", flags=port, model=checkpoint("llama", True))
        assert await ask(session, 5002) == 2
        (peer,) = (await decode.state()).peers
        assert (peer.status, "fingerprint" in peer.error) == ("refused", True)
