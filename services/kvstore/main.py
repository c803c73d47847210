"""The kvstore service: blocks of KV cache in memory, for whoever has the key."""

import secrets
import sys
from importlib.metadata import version

import structlog

from baton.v1 import kvstore_pb2_grpc, worker_pb2, worker_pb2_grpc
from common.faults import Faults
from common.rpc import status
from common.rpc.server import Lifecycle, RpcServer, run_service
from common.settings import read_settings
from common.telemetry import logging, tracing
from services.kvstore.config import KVStoreConfig
from services.kvstore.servicer import SERVICE_NAME, KVStoreServicer
from services.kvstore.store import BlockStore

log = structlog.get_logger("kvstore")


class KVStoreApp:
    """Wires the store to gRPC; `startup`, `drain` and `shutdown` are called by run_service."""

    def __init__(self, config: KVStoreConfig) -> None:
        self._config = config
        self._incarnation = secrets.token_hex(8)
        self._status = worker_pb2.WORKER_STATUS_LOADING
        self._store = BlockStore(config.max_bytes)
        self._tracing = tracing.setup("kvstore", config.otlp_endpoint)
        self._server = RpcServer(config.host, config.port)
        self._server.add(
            KVStoreServicer(self._store, Faults(config.faults)),
            kvstore_pb2_grpc.add_KVStoreServiceServicer_to_server,
            SERVICE_NAME,
        )
        self._server.add(
            status.WorkerStatusServicer(self.describe, self._tracing),
            worker_pb2_grpc.add_WorkerServiceServicer_to_server,
            status.SERVICE_NAME,
        )

    async def startup(self) -> None:
        port = await self._server.start()
        self._status = worker_pb2.WORKER_STATUS_READY
        await self._server.set_serving()
        log.info("ready", port=port, max_bytes=self._config.max_bytes)

    def describe(self) -> worker_pb2.GetStateResponse:
        """Who this is and what it holds."""
        counters = self._store.counters
        names = type(counters).__dataclass_fields__
        load = worker_pb2.Load(
            blocks_cached=len(self._store),
            counters={name: getattr(counters, name) for name in names},
        )
        load.counters["used_bytes"] = self._store.used_bytes
        load.counters["max_bytes"] = self._store.max_bytes
        return worker_pb2.GetStateResponse(
            worker_id=f"kvstore-{self._incarnation}",
            incarnation=self._incarnation,
            role=worker_pb2.ROLE_KVSTORE,
            status=self._status,
            load=load,
            version=version("baton"),
        )

    async def drain(self, deadline_s: float) -> None:
        self._status = worker_pb2.WORKER_STATUS_DRAINING
        await self._server.set_not_serving()
        await self._server.stop(deadline_s)

    async def shutdown(self) -> None:
        await self._server.stop(0)
        self._tracing.shutdown()


def main(argv: list[str] | None = None) -> int:
    """Run the service; returns the process's exit code."""
    config = read_settings(KVStoreConfig, argv, "baton serve kvstore")
    logging.setup("kvstore", config.log_level)

    def make_app(lifecycle: Lifecycle) -> KVStoreApp:
        return KVStoreApp(config)

    return run_service(make_app, drain_s=config.drain_s, exit_with_parent=config.exit_with_parent)


if __name__ == "__main__":
    sys.exit(main())
