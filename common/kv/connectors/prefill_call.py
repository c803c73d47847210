"""The decode worker's calls to a prefill worker."""

import collections
from typing import Protocol

import grpc

from baton.v1 import worker_pb2, worker_pb2_grpc
from common.rpc.channel import connect
from common.rpc.errors import from_rpc_error

Metadata = tuple[tuple[str, str], ...]

MAX_CHANNELS = 512


class PrefillClient(Protocol):
    """What a decode worker asks of prefill workers, by address. Calls raise BatonError."""

    async def meet(
        self, address: str, request: worker_pb2.MeetRequest, timeout_s: float
    ) -> worker_pb2.MeetResponse: ...

    async def prefill(
        self, address: str, request: worker_pb2.PrefillRequest, timeout_s: float, metadata: Metadata
    ) -> worker_pb2.PrefillResponse: ...

    async def close(self) -> None: ...


class GrpcPrefill:
    """PrefillService by gRPC, one channel per address. Used on one loop."""

    def __init__(self) -> None:
        self._channels: collections.OrderedDict[str, grpc.aio.Channel] = collections.OrderedDict()

    async def meet(
        self, address: str, request: worker_pb2.MeetRequest, timeout_s: float
    ) -> worker_pb2.MeetResponse:
        stub = await self._stub(address)
        try:
            return await stub.Meet(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def prefill(
        self, address: str, request: worker_pb2.PrefillRequest, timeout_s: float, metadata: Metadata
    ) -> worker_pb2.PrefillResponse:
        stub = await self._stub(address)
        try:
            return await stub.Prefill(request, timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def _stub(self, address: str) -> worker_pb2_grpc.PrefillServiceStub:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = connect(address)
        self._channels.move_to_end(address)
        if len(self._channels) > MAX_CHANNELS:
            _, oldest = self._channels.popitem(last=False)
            await oldest.close()
        return worker_pb2_grpc.PrefillServiceStub(channel)

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
