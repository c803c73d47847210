"""The decode worker's call to a prefill worker."""

import collections
from collections.abc import Awaitable, Callable

import grpc

from baton.v1 import worker_pb2, worker_pb2_grpc
from common.rpc.channel import connect
from common.rpc.errors import from_rpc_error

Metadata = tuple[tuple[str, str], ...]
# address, request, seconds, metadata: one call of PrefillService.Prefill. Raises BatonError.
PrefillCall = Callable[
    [str, worker_pb2.PrefillRequest, float, Metadata], Awaitable[worker_pb2.PrefillResponse]
]

MAX_CHANNELS = 512


class GrpcPrefill:
    """PrefillService by gRPC, one channel per address. Used on one loop."""

    def __init__(self) -> None:
        self._channels: collections.OrderedDict[str, grpc.aio.Channel] = collections.OrderedDict()

    async def __call__(
        self, address: str, request: worker_pb2.PrefillRequest, timeout_s: float, metadata: Metadata
    ) -> worker_pb2.PrefillResponse:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = connect(address)
        self._channels.move_to_end(address)
        if len(self._channels) > MAX_CHANNELS:
            _, oldest = self._channels.popitem(last=False)
            await oldest.close()
        stub = worker_pb2_grpc.PrefillServiceStub(channel)
        try:
            return await stub.Prefill(request, timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
