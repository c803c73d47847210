"""The prefill worker: reads its settings, wires its parts, serves, drains."""

import asyncio
import sys

import structlog

from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc
from common.kv.connectors.handoff import HandoffSender
from common.kv.transports import DataPlane, with_faults
from common.rpc.loop import LoopThread
from common.rpc.server import Lifecycle, RpcServer, run_service
from common.rpc.status import SERVICE_NAME, WorkerStatusServicer
from common.settings import read_settings
from common.telemetry import logging, tracing
from common.worker.connectors import chain
from common.worker.host import EngineHost
from services.prefill.config import PrefillConfig
from services.prefill.meetings import Meetings
from services.prefill.servicer import PrefillServicer

log = structlog.get_logger("prefill")


class PrefillApp:
    """GetState answers from the first moment; health says SERVING once the model runs."""

    def __init__(self, config: PrefillConfig, lifecycle: Lifecycle) -> None:
        self._tracing = tracing.setup("prefill", config.otlp_endpoint)
        self._host = EngineHost(config, pb.ROLE_PREFILL, lifecycle)
        self._loop = LoopThread("baton-kv")
        self._sender = HandoffSender(
            loop=self._loop,
            max_staged_bytes=int(config.max_staged_bytes),
            on_failure=self._host.abort_soon,
            transport=with_faults(DataPlane(config.transport_names), self._host.faults),
            tracing=self._tracing,
            layer_wise=config.layer_wise,
        )
        self._host.data_links = self._sender.links
        meetings = Meetings(self._host.model_card, self._probe)
        self._host.describe_peers = meetings.describe
        self._connector = chain(config, "prefill", self._sender, self._loop)
        self._server = RpcServer(config.host, config.port)
        self._server.add(
            WorkerStatusServicer(self._host.describe, self._tracing),
            worker_pb2_grpc.add_WorkerServiceServicer_to_server,
            SERVICE_NAME,
        )
        self._server.add(
            PrefillServicer(self._host, self._sender, meetings, self._tracing),
            worker_pb2_grpc.add_PrefillServiceServicer_to_server,
            "baton.v1.PrefillService",
        )

    async def startup(self) -> None:
        port = await self._server.start()
        log.info("listening", port=port)
        await self._host.load(self._connector)
        # Decode workers come to meet this one: it is asked for nothing before.
        self._host.serve()
        await self._server.set_serving()
        log.info("ready", port=port, worker=self._host.worker_id)

    async def _probe(self, address: str) -> float:
        return await asyncio.wrap_future(self._loop.run(self._sender.probe(address)))

    async def drain(self, deadline_s: float) -> None:
        await self._server.set_not_serving()
        await self._host.drain(deadline_s)

    async def shutdown(self) -> None:
        await self._server.stop(grace_s=1.0)
        await self._host.stop()
        await asyncio.to_thread(self._loop.close)
        self._tracing.shutdown()


def main(argv: list[str] | None = None) -> int:
    config = read_settings(PrefillConfig, argv, "baton serve prefill")
    logging.setup("prefill", config.log_level)
    return run_service(
        lambda lifecycle: PrefillApp(config, lifecycle),
        drain_s=config.drain_s,
        exit_with_parent=config.exit_with_parent,
    )


if __name__ == "__main__":
    sys.exit(main())
