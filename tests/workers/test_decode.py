"""The decode worker alone: it prefills by itself."""

import asyncio
import signal

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from common.rpc.channel import connect
from tests.engine.zoo import VOCAB, random_prompt
from tests.workers.support import GatewaySession, Reply, is_greedy, new_trace, until

LONG = 900
STOP = common_pb2.FINISH_REASON_STOP
LENGTH = common_pb2.FINISH_REASON_LENGTH
CANCELLED = common_pb2.FINISH_REASON_CANCELLED
ERROR = common_pb2.FINISH_REASON_ERROR


async def test_a_request_gets_the_tokens_that_transformers_computes(decode, model):
    prompts = [random_prompt(n, seed=n) for n in (1, 15, 16, 17, 100, 200)]
    async with GatewaySession(decode.address) as session:
        replies = [await session.submit(prompt) for prompt in prompts]
        for reply, prompt in zip(replies, prompts, strict=True):
            await reply.end()
            assert is_greedy(model, prompt, reply.tokens, 16)
            assert (reply.finish, reply.error, reply.cached) == (LENGTH, None, 0)
        again = await (await session.submit(prompts[-1])).end()
        assert again.tokens == replies[-1].tokens
        assert again.cached == 192
    await decode.idle()


async def test_welcome_and_state_say_what_is_served(decode, model):
    async with GatewaySession(decode.address) as session:
        state = session.welcome.state
    assert state.role == worker_pb2.ROLE_DECODE
    assert state.status == worker_pb2.WORKER_STATUS_READY
    assert (state.model.name, state.model.max_model_len) == (model.name, 1024)
    assert (state.model.block_size, state.model.kv_dtype) == (16, "float32")
    # 3 layers, k and v, 2 heads, 16 tokens, 16 numbers of 4 bytes.
    assert state.model.block_bytes == 3 * 2 * 2 * 16 * 16 * 4
    assert (state.model.vocab_size, len(state.model.fingerprint)) == (VOCAB, 16)
    assert state.data_address.startswith("127.0.0.1:")
    assert len(state.incarnation) == 16
    idle = (await decode.idle()).load
    assert idle.blocks_total > 0
    async with connect(decode.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_requests_of_one_step_share_a_frame(decode):
    async with GatewaySession(decode.address) as session:
        replies = [await session.submit(random_prompt(20, i), max_tokens=60) for i in range(8)]
        for reply in replies:
            await reply.end()
            assert len(reply.tokens) == 60
        assert session.frames < 8 * 60 / 3


async def test_a_broken_session_frees_its_blocks_within_a_second(decode):
    async with GatewaySession(decode.address) as session:
        replies = [await session.submit(random_prompt(60, i), max_tokens=LONG) for i in range(4)]
        waiting = await session.submit(random_prompt(60, 9), max_tokens=LONG)
        for reply in (*replies, waiting):
            await reply.has_tokens(1)
        assert (await decode.state()).load.blocks_used > 0
    await decode.idle(deadline_s=1.0)


async def test_ending_the_sending_side_ends_the_session(decode):
    async with GatewaySession(decode.address) as session:
        reply = await session.submit(random_prompt(60, 1), max_tokens=LONG)
        await reply.has_tokens(1)
        await session.call.done_writing()
        await asyncio.wait_for(session.reader, 5)
    await decode.idle(deadline_s=1.0)


async def test_cancel_ends_one_request_and_no_other(decode, model):
    prompt = random_prompt(40, 2)
    async with GatewaySession(decode.address) as session:
        gone = await session.submit(random_prompt(40, 1), max_tokens=LONG)
        stays = await session.submit(prompt, max_tokens=100)
        await gone.has_tokens(3)
        await session.cancel(gone.id)
        await session.cancel("nobody")
        await gone.end(timeout_s=2)
        assert gone.finish == CANCELLED
        assert is_greedy(model, prompt, (await stays.end()).tokens, 100)
        await decode.idle(deadline_s=1.0)


BAD = {
    "id out of range": ({"tokens": [5, VOCAB]}, "token 1 of the prompt is 199"),
    "largest id": ({"tokens": [2**32 - 1]}, "4294967295"),
    "no tokens": ({"tokens": []}, "0 tokens"),
    "too long": ({"tokens": [5] * 1024}, "1024 tokens"),
    "far too long": ({"tokens": [5] * 100_000}, "100000 tokens"),
    "temperature": ({"tokens": [5], "temperature": -1.0}, "temperature"),
    "not a number": ({"tokens": [5], "top_p": float("nan")}, "top_p"),
    "stop token": ({"tokens": [5], "stop_token_ids": [VOCAB]}, "199"),
    "no id": ({"tokens": [5], "request_id": ""}, "request_id"),
    "long id": ({"tokens": [5], "request_id": "x" * 257}, "request_id"),
    "long tenant": ({"tokens": [5], "tenant": "x" * 257}, "tenant"),
    "candidates": ({"tokens": [5], "candidates": ["a:1"] * 65}, "prefill_candidates"),
}


async def test_a_bad_request_is_refused_by_name_and_the_worker_lives_on(decode, model):
    async with GatewaySession(decode.address) as session:
        for name, (submit, text) in BAD.items():
            request_id = submit.get("request_id")
            if request_id == "":
                session.replies[""] = Reply()
                bare = worker_pb2.Submit(token_ids=[5], remaining_ms=1000)
                await session.send(submit=bare)
                reply = session.replies[""]
            else:
                reply = await session.submit(**submit)
            await reply.end(timeout_s=5)
            assert reply.finish == ERROR, name
            assert reply.error.kind == common_pb2.ERROR_KIND_INVALID_REQUEST, (name, reply.error)
            assert text in reply.error.message, name
            assert reply.tokens == []
        good = await (await session.submit([7, 8, 9])).end()
        assert is_greedy(model, [7, 8, 9], good.tokens, 16)
    await decode.idle()


async def test_a_second_submit_with_a_live_id_is_refused_and_the_first_goes_on(decode):
    async with GatewaySession(decode.address) as session:
        first = await session.submit(random_prompt(20, 1), request_id="same", max_tokens=LONG)
        await first.has_tokens(1)
        refusal = session.replies["same"] = Reply()
        await session.submit(random_prompt(20, 1), request_id="same")
        await refusal.end(timeout_s=5)
        assert refusal.error.kind == common_pb2.ERROR_KIND_INVALID_REQUEST
        assert "in use" in refusal.error.message
        session.replies["same"] = first
        await first.has_tokens(len(first.tokens) + 5)


async def test_two_sessions_may_use_the_same_request_id(decode, model):
    a, b = random_prompt(30, 1), random_prompt(30, 2)
    async with GatewaySession(decode.address) as one, GatewaySession(decode.address) as two:
        first = await one.submit(a, request_id="same", max_tokens=50)
        second = await two.submit(b, request_id="same", max_tokens=50)
        assert is_greedy(model, a, (await first.end()).tokens, 50)
        assert is_greedy(model, b, (await second.end()).tokens, 50)


async def test_a_request_ends_at_its_deadline(decode):
    async with GatewaySession(decode.address) as session:
        late = await session.submit(random_prompt(20, 1), max_tokens=LONG, remaining_ms=150)
        none = await session.submit(random_prompt(20, 2), remaining_ms=0)
        for reply in (late, none):
            await reply.end(timeout_s=5)
            assert reply.finish == ERROR
            assert reply.error.kind == common_pb2.ERROR_KIND_DEADLINE_EXCEEDED
        assert len(late.tokens) < LONG
    await decode.idle()


async def test_a_full_queue_refuses_and_serves_those_it_took(start):
    decode = start("decode", flags=("--max-num-seqs", "1", "--max-waiting", "1"))
    async with GatewaySession(decode.address) as session:
        running = await session.submit(random_prompt(20, 1), max_tokens=LONG)
        await running.has_tokens(1)
        waiting = await session.submit(random_prompt(20, 2))
        refused = await (await session.submit(random_prompt(20, 3))).end(timeout_s=5)
        assert refused.error.kind == common_pb2.ERROR_KIND_OVERLOADED
        await session.cancel(running.id)
        assert len((await waiting.end()).tokens) == 16


@pytest.mark.parametrize(
    "first",
    [
        worker_pb2.SessionRequest(),
        worker_pb2.SessionRequest(submit=worker_pb2.Submit(request_id="x")),
        worker_pb2.SessionRequest(hello=worker_pb2.Hello(gateway_id="x" * 257)),
    ],
    ids=["nothing", "submit", "long id"],
)
async def test_a_session_that_does_not_begin_with_hello_is_refused(decode, first):
    async with connect(decode.address) as channel:
        call = worker_pb2_grpc.DecodeServiceStub(channel).Session()
        await call.write(first)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_message_without_meaning_ends_the_session_and_its_requests(decode):
    async with GatewaySession(decode.address) as session:
        reply = await session.submit(random_prompt(20, 1), max_tokens=LONG)
        await reply.has_tokens(1)
        await session.send()
        await asyncio.wait_for(session.reader, 5)
        assert await session.call.code() is grpc.StatusCode.INVALID_ARGUMENT
    await decode.idle()


async def test_a_slow_reader_gets_fewer_frames_and_every_token(decode, model):
    prompt = random_prompt(30, 4)
    async with GatewaySession(decode.address) as session:
        session.reader.cancel()
        reply = await session.submit(prompt, max_tokens=400)
        # Nothing is read until the worker has finished.
        async with GatewaySession(decode.address) as other:
            await (await other.submit(prompt, max_tokens=400)).end()
            await decode.idle(deadline_s=10)
        session.reader = asyncio.create_task(session._read())
        await reply.end()
        assert is_greedy(model, prompt, reply.tokens, 400)


async def test_sigterm_finishes_the_streams_that_run_and_refuses_new_ones(start, model):
    decode = start("decode")
    prompt = random_prompt(20, 5)
    async with GatewaySession(decode.address) as session:
        reply = await session.submit(prompt, max_tokens=LONG)
        await reply.has_tokens(5)
        decode.process.send_signal(signal.SIGTERM)

        async def draining():
            return (await decode.state()).status == worker_pb2.WORKER_STATUS_DRAINING

        await until(draining, "decode draining")
        late = await (await session.submit([5, 6])).end()
        assert late.error.kind == common_pb2.ERROR_KIND_UNAVAILABLE
        assert late.error.leaving
        assert "draining" in late.error.message
        await reply.end()
        assert is_greedy(model, prompt, reply.tokens, LONG)
        await asyncio.wait_for(session.reader, 5)
    assert await asyncio.to_thread(decode.process.wait, 10) == 0


async def test_a_drain_that_takes_too_long_tells_callers_to_go_on_elsewhere(start):
    decode = start("decode", flags=("--drain-s", "0"))
    async with GatewaySession(decode.address) as session:
        reply = await session.submit(random_prompt(20, 5), max_tokens=LONG)
        await reply.has_tokens(1)
        decode.process.send_signal(signal.SIGTERM)
        await reply.end(timeout_s=10)
        assert reply.error.kind == common_pb2.ERROR_KIND_UNAVAILABLE
        assert reply.error.leaving
    assert await asyncio.to_thread(decode.process.wait, 10) == 0


async def test_spans_of_a_request_belong_to_the_callers_trace(decode):
    trace_id, parent = new_trace()
    async with GatewaySession(decode.address) as session:
        reply = await session.submit(random_prompt(100, 3), traceparent=parent)
        await reply.end()
    spans = {span.name: span for span in await decode.spans(trace_id)}
    assert set(spans) == {
        "decode.request",
        "decode.queue",
        "decode.first_token",
        "decode.generate",
    }
    root = spans["decode.request"]
    assert root.parent_span_id.hex() == "00f067aa0ba902b7"
    assert (root.attributes["prefill.where"], root.attributes["prefill.reason"]) == (
        "local",
        "no_candidates",
    )
    for name in set(spans) - {"decode.request"}:
        assert spans[name].parent_span_id == root.span_id
        assert root.start_unix_ns <= spans[name].start_unix_ns <= spans[name].end_unix_ns
        assert spans[name].end_unix_ns <= root.end_unix_ns
