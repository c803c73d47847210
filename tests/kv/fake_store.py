"""A kvstore in the test's own process."""

import grpc

from baton.v1 import kvstore_pb2_grpc
from common.faults import Faults
from common.rpc.loop import LoopThread
from services.kvstore.servicer import KVStoreServicer
from services.kvstore.store import BlockStore


class FakeStore(KVStoreServicer):
    """A store in this process, on a loop of its own, whose answers a test may change."""

    def __init__(self):
        super().__init__(BlockStore(1 << 28), Faults(""))
        self.lookups = 0
        self.on_lookup = self.on_get = self.on_put = None
        self.loop = LoopThread("test-store")
        self.loop.run(self._start()).result(10)

    async def _start(self):
        self.server = grpc.aio.server()
        kvstore_pb2_grpc.add_KVStoreServiceServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()

    async def LookupBlocks(self, request, context):
        self.lookups += 1
        if self.on_lookup is not None:
            return await self.on_lookup(request)
        return await super().LookupBlocks(request, context)

    async def GetBlocks(self, request, context):
        async for response in super().GetBlocks(request, context):
            if self.on_get is not None:
                response = await self.on_get(response)
            if response is None:
                return
            yield response

    async def PutBlocks(self, request_iterator, context):
        if self.on_put is not None:
            await self.on_put()
        return await super().PutBlocks(request_iterator, context)

    def stop(self):
        self.loop.run(self.server.stop(0)).result(10)
        self.loop.close()
