"""The store's messages to calls of the store."""

import asyncio
import time
from collections.abc import AsyncIterator

import grpc

from baton.v1 import kvstore_pb2 as pb
from baton.v1 import kvstore_pb2_grpc
from common.errors import InvalidRequest
from common.faults import Faults
from common.kv.wire import KEY_BYTES
from services.kvstore.store import BlockStore

SERVICE_NAME = "baton.v1.KVStoreService"
# The longest chain foreseen: a million tokens in blocks of 16.
MAX_KEYS = 65536
# Verifying frames holds the loop: others get a turn after this many seconds.
TURN_S = 0.005


class KVStoreServicer(kvstore_pb2_grpc.KVStoreServiceServicer):
    """All calls run on one loop, so the store needs no lock."""

    def __init__(self, store: BlockStore, faults: Faults) -> None:
        self._store = store
        self._faults = faults

    async def LookupBlocks(
        self, request: pb.LookupBlocksRequest, context: grpc.aio.ServicerContext
    ) -> pb.LookupBlocksResponse:
        return pb.LookupBlocksResponse(matched=self._store.lookup(_checked(request.keys)))

    async def GetBlocks(
        self, request: pb.GetBlocksRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GetBlocksResponse]:
        for key in _checked(request.keys):
            frame = self._store.get(key)
            if frame is None:
                return
            if self._faults.at("store.get"):
                frame = await self._spoil(frame)
            yield pb.GetBlocksResponse(frame=frame)

    async def _spoil(self, frame: bytes) -> bytes:
        rules = {rule.kind: rule for rule in self._faults.draw("store.get")}
        for rule in rules.values():
            await asyncio.sleep(rule.seconds)
        return b"" if "drop" in rules else self._faults.damage("store.get", frame, rules)

    async def PutBlocks(
        self,
        request_iterator: AsyncIterator[pb.PutBlocksRequest],
        context: grpc.aio.ServicerContext,
    ) -> pb.PutBlocksResponse:
        response = pb.PutBlocksResponse()
        turn_began = time.monotonic()
        async for request in request_iterator:
            outcome = self._store.put(request.frame)
            setattr(response, outcome, getattr(response, outcome) + 1)
            if time.monotonic() - turn_began > TURN_S:
                await asyncio.sleep(0)
                turn_began = time.monotonic()
        return response


def _checked(keys: "list[bytes]") -> list[bytes]:
    if len(keys) > MAX_KEYS:
        raise InvalidRequest(f"keys has {len(keys)} entries; at most {MAX_KEYS}", field="keys")
    for key in keys:
        if len(key) != KEY_BYTES:
            raise InvalidRequest(
                f"keys has an entry of {len(key)} bytes; a key has {KEY_BYTES}", field="keys"
            )
    return list(keys)
