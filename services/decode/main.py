"""The decode worker: reads its settings, wires its parts, serves, drains."""

import asyncio
import sys

import structlog

from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc
from common.errors import ConfigError, HandoffError
from common.kv.connectors.handoff import HandoffReceiver
from common.kv.transports import DataPlane
from common.rpc.loop import LoopThread
from common.rpc.server import Lifecycle, RpcServer, run_service
from common.rpc.status import SERVICE_NAME, WorkerStatusServicer
from common.settings import read_settings
from common.telemetry import logging, tracing
from common.worker.connectors import chain
from common.worker.host import EngineHost, own_version
from services.decode.config import DecodeConfig
from services.decode.servicer import DecodeServicer

log = structlog.get_logger("decode")

# How long a decode worker waits for a prefill worker to meet before it serves alone.
PEER_WAIT_S = 10.0
# What gateways get to read their last frames.
CLOSE_S = 2.0


class DecodeApp:
    """GetState answers from the first moment; health says SERVING once the model runs and a prefill
    worker was met, where one can be."""

    def __init__(self, config: DecodeConfig, lifecycle: Lifecycle) -> None:
        self._config = config
        self._tracing = tracing.setup("decode", config.otlp_endpoint)
        self._host = EngineHost(config, pb.ROLE_DECODE, lifecycle)
        self._loop = LoopThread("baton-kv")
        self._receiver = HandoffReceiver(
            incarnation=self._host.incarnation,
            worker_id=self._host.worker_id,
            version=own_version(),
            model_card=self._host.model_card,
            advertise_host=config.advertised_host,
            data_host=config.host,
            data_port=config.data_port,
            policy=config.handoff_policy(),
            loop=self._loop,
            transport=DataPlane(config.transport_names),
            tracing=self._tracing,
        )
        self._sessions = DecodeServicer(self._host, self._tracing)
        self._server = RpcServer(config.host, config.port)
        self._server.add(
            WorkerStatusServicer(self._host.describe, self._tracing),
            worker_pb2_grpc.add_WorkerServiceServicer_to_server,
            SERVICE_NAME,
        )
        self._server.add(
            self._sessions,
            worker_pb2_grpc.add_DecodeServiceServicer_to_server,
            "baton.v1.DecodeService",
        )

    async def startup(self) -> None:
        port = await self._server.start()
        log.info("listening", port=port)
        self._host.data_address = await self._listen()
        connector = chain(self._config, "decode", self._receiver, self._loop)
        await self._host.load(connector)
        await self._meet()
        self._host.serve()
        await self._server.set_serving()
        log.info(
            "ready", port=port, data_address=self._host.data_address, worker=self._host.worker_id
        )

    async def _meet(self) -> None:
        """Be sure of one prefill worker before being Ready; alone where there is none."""
        prefill, peers = self._config.prefill, self._receiver.peers
        self._host.describe_peers = peers.describe
        if not prefill:
            return
        met = await asyncio.wrap_future(self._loop.run(peers.meet_first(prefill, PEER_WAIT_S)))
        if not met:
            log.warning("no_prefill_worker_met", prefill=prefill, waited_s=PEER_WAIT_S)
        self._loop.run(peers.keep_meeting(prefill))

    async def _listen(self) -> str:
        try:
            return await asyncio.to_thread(self._receiver.listen)
        except (HandoffError, OSError) as error:
            raise ConfigError(
                f"the data plane cannot listen on {self._config.host}:{self._config.data_port} "
                f"({error}); choose another port with --data-port"
            ) from error

    async def drain(self, deadline_s: float) -> None:
        await self._server.set_not_serving()
        await self._host.drain(deadline_s)
        await self._sessions.close(CLOSE_S)

    async def shutdown(self) -> None:
        await self._server.stop(grace_s=1.0)
        await self._host.stop()
        await asyncio.to_thread(self._loop.close)
        self._tracing.shutdown()


def main(argv: list[str] | None = None) -> int:
    config = read_settings(DecodeConfig, argv, "baton serve decode")
    logging.setup("decode", config.log_level)
    return run_service(
        lambda lifecycle: DecodeApp(config, lifecycle),
        drain_s=config.drain_s,
        exit_with_parent=config.exit_with_parent,
    )


if __name__ == "__main__":
    sys.exit(main())
