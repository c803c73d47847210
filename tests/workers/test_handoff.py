"""A decode worker with prefill workers: KV that comes gives the tokens of KV computed here."""

import asyncio
import secrets
import signal

import grpc
import pytest

from baton.v1 import worker_pb2, worker_pb2_grpc
from common.rpc.channel import connect
from tests.engine.zoo import VOCAB, checkpoint, random_prompt
from tests.workers.support import GatewaySession, is_greedy, new_trace


async def spans_of(worker, trace_id):
    return {span.name: span for span in await worker.spans(trace_id)}


async def sent_blocks(prefill):
    return (await prefill.idle()).load.counters["handoff_blocks_sent"]


async def test_disaggregated_tokens_equal_those_of_transformers(prefill, decode, model):
    prompts = [random_prompt(n, seed=n) for n in (65, 66, 80, 81, 97, 300, 700)]
    before, failed = await sent_blocks(prefill), await failures(decode)
    async with GatewaySession(decode.address) as session:
        replies = [await session.submit(p, candidates=[prefill.address]) for p in prompts]
        for prompt, reply in zip(prompts, replies, strict=True):
            await reply.end()
            assert reply.error is None
            assert is_greedy(model, prompt, reply.tokens, 16)
    assert await failures(decode) == failed
    assert await sent_blocks(prefill) - before == sum(-(-(len(p) - 1) // 16) for p in prompts)


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
        # Nobody listens there: asking would show. 63 tokens besides the last are under 64.
        reply = await session.submit(
            random_prompt(64, seed=1000), candidates=["127.0.0.1:9"], traceparent=parent
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


async def test_a_cancelled_request_stops_the_prefill_worker_too(start, decode):
    prefill = start("prefill", flags=("--max-num-batched-tokens", "1"))
    async with GatewaySession(decode.address) as session:
        _, reply = await begin_long_prefill(session, prefill, 4000)
        await session.cancel(reply.id)
        await reply.end(timeout_s=2)
        await asyncio.gather(prefill.idle(1.0), decode.idle(1.0))


@pytest.mark.parametrize("kind", ["weights", "kv_dtype", "block_size"])
async def test_workers_that_do_not_fit_each_other_share_no_kv(start, decode, model, kind):
    flags = {
        "weights": (),
        "kv_dtype": ("--kv-dtype", "bf16"),
        "block_size": ("--block-size", "32"),
    }
    other = checkpoint("llama", True) if kind == "weights" else model
    prefill = start("prefill", flags=flags[kind], model=other)
    before = len(decode.events("handoff_attempt_failed"))
    prompt = random_prompt(200, seed=2000 + len(kind))
    async with GatewaySession(decode.address) as session:
        reply = await session.submit(prompt, candidates=[prefill.address])
        await reply.end()
        assert reply.error is None
        assert is_greedy(model, prompt, reply.tokens, 16)
    own, theirs = (await decode.state()).model, (await prefill.state()).model
    field = "fingerprint" if kind == "weights" else kind
    (failed,) = decode.events("handoff_attempt_failed")[before:]
    for card in (own, theirs):
        value = getattr(card, field)
        assert (value.hex() if isinstance(value, bytes) else str(value)) in failed["error"]


class Caller:
    """Calls Prefill as a decode worker would, with one thing changed."""

    def __init__(self, channel, card):
        self.stub = worker_pb2_grpc.PrefillServiceStub(channel)
        self.card = card

    def request(self, **changes):
        handoff = worker_pb2.Handoff(
            id=secrets.token_bytes(16), incarnation="x", generation=1, lease_ms=5000
        )
        fields = {
            "request_id": "r",
            "handoff": handoff,
            "token_ids": [5] * 40,
            "num_tokens": 39,
            "data_address": "127.0.0.1:9",
            "model": self.card,
        }
        return worker_pb2.PrefillRequest(**{**fields, **changes})

    async def refusal(self, **changes):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.stub.Prefill(self.request(**changes), timeout=10)
        return caught.value.code(), caught.value.details()


async def test_a_bad_prefill_request_is_refused_by_name_and_the_worker_lives_on(prefill):
    card = (await prefill.state()).model
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    short = worker_pb2.Handoff(id=b"x", lease_ms=5000)
    no_lease = worker_pb2.Handoff(id=bytes(16))
    async with connect(prefill.address) as channel:
        caller = Caller(channel, card)
        for text, change in {
            "num_tokens is 41": {"num_tokens": 41},
            "num_tokens is 0": {"num_tokens": 0},
            "token 3 of the prompt is 199": {"token_ids": [5, 5, 5, VOCAB], "num_tokens": 3},
            "first_block is 3": {"first_block": 3},
            "1025 tokens": {"token_ids": [5] * 1025},
            "handoff.id has 1 bytes": {"handoff": short},
            "lease_ms is 0": {"handoff": no_lease},
            "data_address": {"data_address": "a:1,b:2"},
            "model": {"model": worker_pb2.ModelCard()},
        }.items():
            code, details = await caller.refusal(**change)
            assert code is invalid, (text, details)
            assert text in details
        # A receiver that is not there is no fault of the request.
        code, _ = await caller.refusal()
        assert code in (grpc.StatusCode.ABORTED, grpc.StatusCode.UNAVAILABLE)
    await prefill.idle()
