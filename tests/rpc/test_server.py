import asyncio
import contextlib
import socket

import grpc
import pytest
import structlog
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc
from common.errors import ConfigError, InvalidRequest, Overloaded
from common.rpc.channel import connect
from common.rpc.errors import from_rpc_error
from common.rpc.server import RpcServer
from common.rpc.status import SERVICE_NAME, WorkerStatusServicer
from common.telemetry import tracing

DECODE = "baton.v1.DecodeService"
PREFILL = "baton.v1.PrefillService"


class Prefill(worker_pb2_grpc.PrefillServiceServicer):
    """Raises what `error` holds, or waits for ever."""

    def __init__(self):
        self.error = None
        self.begun = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def Prefill(self, request, context):
        if self.error is not None:
            raise self.error
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


class Decode(worker_pb2_grpc.DecodeServiceServicer):
    """Sends one frame, then raises what `error` holds."""

    error = None

    async def Session(self, request_iterator, context):
        yield pb.SessionResponse(frame=pb.StepFrame(step=1))
        raise self.error


@contextlib.asynccontextmanager
async def serving(*, max_message_bytes=64 * 2**20):
    server = RpcServer("127.0.0.1", 0, max_message_bytes=max_message_bytes)
    prefill, decode = Prefill(), Decode()
    server.add(prefill, worker_pb2_grpc.add_PrefillServiceServicer_to_server, PREFILL)
    server.add(decode, worker_pb2_grpc.add_DecodeServiceServicer_to_server, DECODE)
    status = WorkerStatusServicer(lambda: pb.GetStateResponse(worker_id="w"), tracing.setup("test"))
    server.add(status, worker_pb2_grpc.add_WorkerServiceServicer_to_server, SERVICE_NAME)
    port = await server.start()
    channel = connect(f"127.0.0.1:{port}")
    try:
        yield server, channel, prefill, decode
    finally:
        await channel.close()
        await server.stop(0)


async def failure(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_an_error_arrives_at_the_caller_as_itself():
    async with serving() as (_, channel, prefill, _):
        stub = worker_pb2_grpc.PrefillServiceStub(channel)
        prefill.error = InvalidRequest("num_tokens is 0", field="num_tokens", code="range")
        error = await failure(stub.Prefill(pb.PrefillRequest()))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        back = from_rpc_error(error)
        assert (type(back), str(back)) == (InvalidRequest, "num_tokens is 0")
        assert (back.field, back.code) == ("num_tokens", "range")
        prefill.error = Overloaded("full", retry_after_s=7)
        back = from_rpc_error(await failure(stub.Prefill(pb.PrefillRequest())))
        assert (type(back), back.retry_after_s) == (Overloaded, 7.0)


async def test_an_unexpected_error_is_logged_and_told_to_nobody():
    async with serving() as (_, channel, prefill, _):
        prefill.error = RuntimeError("secret path /etc/x")
        stub = worker_pb2_grpc.PrefillServiceStub(channel)
        with structlog.testing.capture_logs() as logs:
            error = await failure(stub.Prefill(pb.PrefillRequest()))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in error.details()
        assert [entry["event"] for entry in logs] == ["rpc_failed"]
        assert logs[0]["exc_info"] is prefill.error


async def test_an_error_in_the_middle_of_a_stream_ends_it_with_its_status():
    async with serving() as (_, channel, _, decode):
        decode.error = InvalidRequest("no such message")
        call = worker_pb2_grpc.DecodeServiceStub(channel).Session()
        assert (await call.read()).frame.step == 1
        error = await failure(call.read())
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == "no such message"


async def test_cancelling_a_call_cancels_its_servicer():
    async with serving() as (_, channel, prefill, _):
        call = worker_pb2_grpc.PrefillServiceStub(channel).Prefill(pb.PrefillRequest())
        await asyncio.wait_for(prefill.begun.wait(), 5)
        call.cancel()
        await asyncio.wait_for(prefill.cancelled.wait(), 5)


async def test_health_says_not_serving_until_told():
    async with serving() as (server, channel, _, _):
        stub = health_pb2_grpc.HealthStub(channel)

        async def status(name):
            return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status

        down = health_pb2.HealthCheckResponse.NOT_SERVING
        up = health_pb2.HealthCheckResponse.SERVING
        assert [await status(n) for n in ("", PREFILL, SERVICE_NAME)] == [down] * 3
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == down
        await server.set_serving()
        assert (await watch.read()).status == up
        assert [await status(n) for n in ("", PREFILL, SERVICE_NAME)] == [up] * 3
        await server.set_not_serving()
        assert (await watch.read()).status == down
        watch.cancel()


async def test_reflection_describes_the_services():
    async with serving() as (server, _, _, _):

        def describe():
            with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                database = ProtoReflectionDescriptorDatabase(channel)
                service = descriptor_pool.DescriptorPool(database).FindServiceByName(PREFILL)
                return set(database.get_services()), [m.name for m in service.methods]

        names, methods = await asyncio.to_thread(describe)
        assert {PREFILL, DECODE, SERVICE_NAME, "grpc.health.v1.Health"} <= names
        assert methods == ["Meet", "Prefill"]


async def test_a_message_over_the_limit_is_refused():
    async with serving(max_message_bytes=4096) as (_, channel, _, _):
        stub = worker_pb2_grpc.PrefillServiceStub(channel)
        error = await failure(stub.Prefill(pb.PrefillRequest(tenant="x" * 8192)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_port_in_use_is_refused_with_the_remedy():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = RpcServer("127.0.0.1", port)
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port}.*--port"):
            await server.start()
        await server.stop(0)


async def test_two_servers_never_share_a_port():
    async with serving() as (server, _, _, _):
        second = RpcServer("127.0.0.1", server.port)
        with pytest.raises(ConfigError):
            await second.start()
        await second.stop(0)


async def test_get_trace_gives_the_spans_and_refuses_a_bad_id():
    traces = tracing.setup("w")
    span = traces.start("decode.request")
    span.end()
    trace_id = tracing.trace_id_of(tracing.context_of(span))
    servicer = WorkerStatusServicer(pb.GetStateResponse, traces)
    answer = await servicer.GetTrace(pb.GetTraceRequest(trace_id=trace_id), None)
    assert [s.name for s in answer.spans] == ["decode.request"]
    with pytest.raises(InvalidRequest, match="5 bytes"):
        await servicer.GetTrace(pb.GetTraceRequest(trace_id=b"short"), None)
