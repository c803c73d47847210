"""Gateways and workers that end by plan: nobody is refused for it."""

import asyncio
import concurrent.futures
import json
import signal
import socket
import threading

import grpc
import pytest

from baton.cli.ports import any_free
from baton.v1 import common_pb2, inference_pb2_grpc, worker_pb2
from baton.v1 import inference_pb2 as pb
from common.rpc.probe import probe
from tests.gateway.conftest import completion, sse_events
from tests.gateway.fake import (
    END,
    LENGTH,
    STOP,
    FakeDecode,
    GatewayProcess,
    say,
    say_then_hang,
)
from tests.gateway.test_failures import count_on, mesh
from tests.support.mesh import wait_until


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_gateway_that_ends_serves_until_that_is_known_and_then_lets_streams_end(model):
    release = threading.Event()

    async def say_when_released(submit):
        yield worker_pb2.TokenDelta(token_ids=[40])
        await asyncio.to_thread(release.wait, 60)
        yield worker_pb2.TokenDelta(token_ids=[41], finish_reason=LENGTH)

    fake = FakeDecode(say_when_released)
    with mesh(model, fake, flags=("--announce-s=3",)) as (gateway, client):
        target = f"127.0.0.1:{gateway.grpc_port}"
        stream = client.stream("POST", "/v1/completions", json=completion(stream=True))
        with stream as response, grpc.insecure_channel(target) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            fake.behaviour = say([42, END])
            gateway.process.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get("/ready").status_code == 503, 3, "/ready says no")
            assert "NOT_SERVING" in probe(target)
            answer = client.post("/v1/completions", json=completion())
            assert answer.status_code == 200
            assert answer.headers["connection"] == "close"
            assert stub.Completion(pb.CompletionRequest(model="m", text="hello")).text
            assert gateway.state()["gateway"]["draining"] is True
            wait_until(lambda: not accepts(gateway.http_port), 10, "no HTTP connection taken")
            wait_until(lambda: not accepts(gateway.grpc_port), 3, "no gRPC connection taken")
            assert gateway.process.poll() is None
            release.set()
            assert sse_events(response)[-1] == "[DONE]"
        assert gateway.process.wait(10) == 0


def test_a_gateway_ends_at_the_limit_of_its_drain_whatever_runs(model):
    fake = FakeDecode(say_then_hang([40]))
    with mesh(model, fake, flags=("--drain-s=0.5", "--announce-s=5")) as (gateway, client):
        with client.stream("POST", "/v1/completions", json=completion(stream=True)):
            assert gateway.stop(5) == 0
        assert [e["in_flight"] for e in gateway.events("drain_timed_out")] == [1]


def test_a_grpc_client_that_follows_health_has_no_error_when_its_gateway_ends(model):
    config = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": "baton.v1.InferenceService"},
    }
    options = (("grpc.service_config", json.dumps(config)), ("grpc.use_local_subchannel_pool", 1))
    fake = FakeDecode(say([40, END]))
    flags = ("--announce-s=1",)
    with mesh(model, fake, flags=flags) as (one, _), mesh(model, fake, flags=flags) as (two, _):
        target = f"ipv4:127.0.0.1:{one.grpc_port},127.0.0.1:{two.grpc_port}"
        ended = threading.Event()

        def call_until_ended() -> int:
            with grpc.insecure_channel(target, options=options) as channel:
                stub = inference_pb2_grpc.InferenceServiceStub(channel)
                calls = 0
                while not ended.is_set():
                    assert stub.Completion(pb.CompletionRequest(model="m", text="hi")).text
                    calls += 1
                return calls

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            callers = [pool.submit(call_until_ended) for _ in range(4)]
            try:
                wait_until(lambda: len(fake.submits) > 40, 10, "calls under way")
                assert one.stop() == 0
                done = len(fake.submits)
                wait_until(lambda: len(fake.submits) > done + 40, 10, "calls at the other one")
            finally:
                ended.set()
            assert all(caller.result(20) for caller in callers)


def leave_after(tokens: int):
    """A worker that is drained: it gives its request back."""

    async def behaviour(submit):
        position = len(submit.token_ids)
        for index in range(tokens):
            yield worker_pb2.TokenDelta(token_ids=[10 + position + index])
        yield worker_pb2.TokenDelta(
            finish_reason=common_pb2.FINISH_REASON_ERROR,
            error=common_pb2.Error(
                kind=common_pb2.ERROR_KIND_UNAVAILABLE, message="draining", leaving=True
            ),
        )

    return behaviour


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_request_that_a_worker_gives_back_is_not_a_lost_one(model, tokens):
    one, two = FakeDecode(leave_after(tokens)), FakeDecode(count_on())
    two.state.load.running_requests = 3  # so that the other one is asked first
    with mesh(model, one, two, flags=("--max-resumes=0",)) as (_, client):
        body = completion(prompt=[5, 6], max_tokens=6, return_token_ids=True)
        got = client.post("/v1/completions", json=body).raise_for_status().json()
        assert got["choices"][0]["token_ids"] == [12, 13, 14, 15, 16, 17]
    assert (len(one.submits), len(two.submits)) == (1, 1)


def test_a_worker_that_refuses_is_asked_again_only_after_it_was_seen_ready(model):
    refusing = leave_after(0)

    async def refuse_twice(submit):
        behaviour = refusing if len(fake.submits) < 3 else say([40, END])
        async for delta in behaviour(submit):
            yield delta

    fake = FakeDecode(refuse_twice)
    with (
        mesh(model, fake, flags=("--max-resumes=0",)) as (_, client),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(client.post, "/v1/completions", json=completion())

        def without_worker():
            got = client.get("/ready")
            return got if got.json()["decode_workers"] == 0 else None

        # The balancer is told nothing of a moment that requests wait for.
        assert wait_until(without_worker, 5, "nobody to ask").status_code == 200
        assert answer.result(20).status_code == 200
    assert len(fake.submits) == 3


def test_a_request_that_finds_no_worker_waits_for_one_to_come(model):
    port, fake = any_free(), None
    gateway = GatewayProcess(model, f"127.0.0.1:{port}", wait_ready=False)
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(gateway.client.post, "/v1/completions", json=completion())
            wait_until(lambda: gateway.state()["gateway"]["in_flight"] == 1, 5, "it waits")
            fake = FakeDecode(say([40, END], STOP), port=port)
            assert answer.result(20).status_code == 200
    finally:
        gateway.stop()
        if fake is not None:
            fake.kill()
