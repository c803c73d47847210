"""One kvstore service as a connector sees it: three calls, and a circuit breaker before them.

The store's name is resolved here, not by gRPC, which keeps the addresses that it found for 30 s and
longer: a store that was started again elsewhere is found by the first call after a failed one.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable

import grpc

from baton.v1 import kvstore_pb2, kvstore_pb2_grpc
from common.rpc.channel import connect
from common.rpc.discovery import resolve

# After a failure the store is left alone this long, twice as long after each further one.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
# For calls under way to where the store was before.
LEAVE_S = 10.0


class StoreClient:
    """Calls run on one loop; `available` may be asked from any thread.

    A call that fails or runs out of time raises grpc.aio.AioRpcError or TimeoutError and opens the
    breaker: until the pause is over the store counts as having nothing, at no cost.
    """

    def __init__(self, address: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.address = address
        self._clock = clock
        self._channel: grpc.aio.Channel | None = None
        self._target = ""  # what the channel connects to
        self._resolved = False
        self._leaving: set[asyncio.Task[None]] = set()
        self._pause_s = 0.0
        self._closed_again = 0.0

    @property
    def available(self) -> bool:
        return self._clock() >= self._closed_again

    async def lookup(self, keys: list[bytes], timeout_s: float) -> int:
        """How many keys, from the first on, the store holds."""
        request = kvstore_pb2.LookupBlocksRequest(keys=keys)
        try:
            # The timeout of gRPC would not end a wait for a connection that is being made slowly.
            async with asyncio.timeout(timeout_s):
                response = await (await self._stub()).LookupBlocks(request)
        except (grpc.aio.AioRpcError, TimeoutError):
            self._failed()
            raise
        self._worked()
        return min(response.matched, len(keys))

    async def get(self, keys: list[bytes], timeout_s: float) -> AsyncIterator[bytes]:
        """Frames in the order of the keys, until the first miss."""
        stub = await self._stub()
        call = stub.GetBlocks(kvstore_pb2.GetBlocksRequest(keys=keys), timeout=timeout_s)
        try:
            async for response in call:
                yield response.frame
        except grpc.aio.AioRpcError:
            self._failed()
            raise
        finally:
            call.cancel()
        self._worked()

    async def put(self, frames: Iterable[bytes], timeout_s: float) -> int:
        """Save frames; returns how many the store now holds."""
        requests = (kvstore_pb2.PutBlocksRequest(frame=frame) for frame in frames)
        try:
            stub = await self._stub()
            response = await stub.PutBlocks(_stream(requests), timeout=timeout_s)
        except grpc.aio.AioRpcError:
            self._failed()
            raise
        self._worked()
        return response.stored + response.already_held

    async def close(self) -> None:
        for leaving in list(self._leaving):
            leaving.cancel()
        if self._channel is not None:
            await self._channel.close()

    async def _stub(self) -> kvstore_pb2_grpc.KVStoreServiceStub:
        """Calls to where the store's name leads, asked anew after each failure."""
        if not self._resolved:
            found = await resolve(self.address)
            self._resolved = True
            # A name that leads nowhere now is left to gRPC, which says so.
            target = _target(found) or self.address
            if self._channel is None or target != self._target:
                if self._channel is not None:
                    leaving = asyncio.create_task(self._channel.close(LEAVE_S))
                    self._leaving.add(leaving)
                    leaving.add_done_callback(self._leaving.discard)
                self._channel, self._target = connect(target), target
        return kvstore_pb2_grpc.KVStoreServiceStub(self._channel)

    def _failed(self) -> None:
        self._resolved = False
        self._pause_s = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, 2 * self._pause_s))
        self._closed_again = self._clock() + self._pause_s

    def _worked(self) -> None:
        self._pause_s = 0.0
        self._closed_again = 0.0


async def _stream(
    requests: Iterable[kvstore_pb2.PutBlocksRequest],
) -> AsyncIterator[kvstore_pb2.PutBlocksRequest]:
    for request in requests:
        yield request


def _target(addresses: set[str]) -> str:
    """All of them for gRPC, which takes the first that answers; empty for none."""
    if not addresses:
        return ""
    scheme = "ipv6" if any(address.startswith("[") for address in addresses) else "ipv4"
    return f"{scheme}:{','.join(sorted(addresses))}"
