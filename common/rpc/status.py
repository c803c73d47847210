"""WorkerService: who a process is, how loaded, and its finished spans."""

from collections.abc import Callable

import grpc

from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc
from common.errors import InvalidRequest
from common.telemetry.tracing import Tracing

SERVICE_NAME = "baton.v1.WorkerService"
TRACE_ID_BYTES = 16


class WorkerStatusServicer(worker_pb2_grpc.WorkerServiceServicer):
    """`describe()` is called for each GetState, on the loop: it must not block."""

    def __init__(self, describe: Callable[[], pb.GetStateResponse], tracing: Tracing) -> None:
        self._describe = describe
        self._tracing = tracing

    async def GetState(
        self, request: pb.GetStateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetStateResponse:
        return self._describe()

    async def GetTrace(
        self, request: pb.GetTraceRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetTraceResponse:
        if len(request.trace_id) != TRACE_ID_BYTES:
            raise InvalidRequest(
                f"trace_id has {len(request.trace_id)} bytes; it must have {TRACE_ID_BYTES}",
                field="trace_id",
            )
        return pb.GetTraceResponse(spans=self._tracing.spans(request.trace_id))
