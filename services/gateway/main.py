"""The gateway: reads its settings, wires its parts, serves, drains."""

import asyncio
import sys
import time

import structlog
from aiohttp import web

from baton.v1 import inference_pb2_grpc
from common.engine.config import ModelConfig
from common.errors import ConfigError
from common.rpc.channel import MAX_MESSAGE_BYTES
from common.rpc.server import Lifecycle, RpcServer, run_service
from common.settings import read_settings
from common.telemetry import logging, tracing
from services.gateway.admission import Admission
from services.gateway.config import GatewayConfig
from services.gateway.fleet import Fleet
from services.gateway.generate import Generator, ServedModel
from services.gateway.generation import WORKER_WAIT_S
from services.gateway.inference_grpc import SERVICE_NAME, InferenceServicer
from services.gateway.metrics import Metrics
from services.gateway.openai_http import HttpFront
from services.gateway.presence import Presence
from services.gateway.prompts import PromptEncoder
from services.gateway.tenants import read_tenants

log = structlog.get_logger("gateway")

# gRPC calls that outlast the drain get this to be told so.
GRPC_CLOSE_S = 1.0
HTTP_CLOSE_S = 1.0
READY_CHECK_S = 30.0


class GatewayApp:
    """Answers from the first moment; health says SERVING once a decode worker is ready."""

    def __init__(self, config: GatewayConfig, lifecycle: Lifecycle) -> None:
        self._config = config
        self._tracing = tracing.setup("gateway", config.otlp_endpoint)
        model_config = ModelConfig.from_folder(config.model)
        self._fleet = Fleet(
            {"decode": config.decode, "prefill": config.prefill, "kvstore": config.kvstore},
            model_config.vocab_size,
        )
        self._admission = admission = Admission(config.max_in_flight, config.max_queue)
        tenants = read_tenants(config.api_keys_file)
        log.info("tenants", api_keys_file=str(config.api_keys_file), tenants=len(tenants.names))
        metrics = Metrics(
            self._fleet.last_states,
            lambda: (admission.in_flight, admission.waiting),
            tenants.names,
        )
        generator = Generator(
            _served(config, model_config),
            PromptEncoder(config.model),
            self._fleet,
            admission,
            metrics,
            self._tracing,
            config.max_resumes,
        )
        limits = {
            "max_body_bytes": config.max_body_bytes,
            "request_timeout_s": config.request_timeout_s,
        }
        self._presence = Presence()
        http = HttpFront(
            generator,
            self._fleet,
            admission,
            tenants,
            metrics,
            self._tracing,
            self._presence,
            **limits,
        )
        # A client that leaves ends its handler at once, and with it everything under it.
        self._http = web.AppRunner(
            http.app(), access_log=None, handler_cancellation=True, shutdown_timeout=HTTP_CLOSE_S
        )
        # Answers are not bounded by the limit on requests, which the servicer checks itself.
        message_bytes = max(config.max_body_bytes + 2**20, MAX_MESSAGE_BYTES)
        self._grpc = RpcServer(
            config.host, config.public_grpc_port, max_message_bytes=message_bytes
        )
        self._grpc.add(
            InferenceServicer(generator, tenants, metrics, self._tracing, self._presence, **limits),
            inference_pb2_grpc.add_InferenceServiceServicer_to_server,
            SERVICE_NAME,
        )
        self._readiness: asyncio.Task[None] | None = None
        self._site: web.TCPSite
        self._goodbye: asyncio.Task[None] | None = None

    async def startup(self) -> None:
        await self._fleet.start()
        grpc_port = await self._grpc.start()
        http_port = await self._listen_http()
        log.info("listening", host=self._config.host, http_port=http_port, grpc_port=grpc_port)
        self._readiness = asyncio.create_task(self._follow_readiness(http_port, grpc_port))

    async def _listen_http(self) -> int:
        config = self._config
        await self._http.setup()
        self._site = web.TCPSite(self._http, config.host, config.http_port)
        try:
            await self._site.start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.host}:{config.http_port} ({error.strerror}); choose "
                "another port with --http-port"
            ) from error
        return int(self._http.addresses[0][1])

    async def _follow_readiness(self, http_port: int, grpc_port: int) -> None:
        """Health says what /ready says; the log tells each change."""
        while True:
            while not await self._fleet.wait_usable(READY_CHECK_S):
                log.warning("no_decode_worker", decode=self._config.decode)
            self._presence.ready = True
            await self._grpc.set_serving()
            log.info("ready", http_port=http_port, port=grpc_port, model=self._config.model_name)
            await self._until_unusable()
            self._presence.ready = False
            await self._grpc.set_not_serving()
            log.warning("not_ready", decode=self._config.decode)

    async def _until_unusable(self) -> None:
        """A moment without a worker, as between two of a restart, is bridged by the requests."""
        while True:
            await self._fleet.wait_unusable()
            if not await self._fleet.wait_usable(WORKER_WAIT_S):
                return

    async def drain(self, deadline_s: float) -> None:
        """Say that this gateway leaves, serve until that is known, take no connection any more and
        let end what runs."""
        if self._readiness is None:
            return  # the start was not over: nothing was served
        end = time.monotonic() + deadline_s
        self._readiness.cancel()
        self._presence.leaving = True
        await self._grpc.set_not_serving()
        await asyncio.sleep(min(self._config.announce_s, deadline_s))
        log.info("closed", in_flight=self._admission.in_flight)
        await self._site.stop()
        # Tells clients by GOAWAY to call elsewhere. Not waited for: it also waits for who watches
        # health.
        self._goodbye = asyncio.create_task(self._grpc.stop(max(0.0, end - time.monotonic())))
        left = await self._presence.wait_idle(max(0.0, end - time.monotonic()))
        if left:
            log.warning("drain_timed_out", in_flight=left)

    async def shutdown(self) -> None:
        if self._readiness is not None:
            self._readiness.cancel()  # a start that failed was never drained
        await asyncio.gather(self._http.cleanup(), self._grpc.stop(GRPC_CLOSE_S))
        if self._goodbye is not None:
            await self._goodbye
        await self._fleet.close()
        await asyncio.to_thread(self._tracing.shutdown)


def _served(config: GatewayConfig, model: ModelConfig) -> ServedModel:
    return ServedModel(
        name=config.model_name,
        vocab_size=model.vocab_size,
        max_positions=model.max_position_embeddings,
        eos_token_ids=model.eos_token_ids,
        created_unix_s=int(time.time()),
    )


def main(argv: list[str] | None = None) -> int:
    config = read_settings(GatewayConfig, argv, "baton serve gateway")
    logging.setup("gateway", config.log_level)
    return run_service(
        lambda lifecycle: GatewayApp(config, lifecycle),
        drain_s=config.drain_s,
        exit_with_parent=config.exit_with_parent,
    )


if __name__ == "__main__":
    sys.exit(main())
