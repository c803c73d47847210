import asyncio

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from common.telemetry import tracing


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self):
        self.names = []
        self.services = set()

    async def Export(self, request, context):
        for resource in request.resource_spans:
            pairs = {a.key: a.value.string_value for a in resource.resource.attributes}
            self.services.add(pairs["service.name"])
            self.names += [s.name for scope in resource.scope_spans for s in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_spans_go_to_the_otlp_endpoint_and_stay_in_the_ring():
    server, collector = grpc.aio.server(), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        traces = tracing.setup("prefill", f"http://127.0.0.1:{port}")
        span = traces.record("prefill.compute", None, 1, 2)
        await asyncio.to_thread(traces.shutdown)
    finally:
        await server.stop(0)
    assert collector.names == ["prefill.compute"]
    assert collector.services == {"prefill"}
    assert len(traces.spans(tracing.trace_id_of(tracing.context_of(span)))) == 1
