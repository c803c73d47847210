"""A grpc.aio server with what every service of the mesh has: health, reflection, error mapping."""

from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common.errors import ConfigError
from common.rpc.channel import KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS, MAX_MESSAGE_BYTES
from common.rpc.discovery import join_address
from common.rpc.interceptor import ErrorInterceptor
from common.rpc.lifecycle import App, Lifecycle, run_service

__all__ = ["App", "Lifecycle", "RpcServer", "run_service"]


class RpcServer:
    """`add` servicers, `start`, and `set_serving` when Ready. Health starts as NOT_SERVING."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_concurrent_rpcs: int | None = None,
    ) -> None:
        self.host = host
        self.port = port
        self._server = grpc.aio.server(
            interceptors=(ErrorInterceptor(),),
            options=_options(max_message_bytes),
            maximum_concurrent_rpcs=max_concurrent_rpcs,
        )
        self._health = health.aio.HealthServicer()
        self._names: list[str] = []

    def add(self, servicer: Any, add_to_server: Callable[[Any, Any], None], name: str) -> None:
        """Register a servicer under its full name, for example `baton.v1.WorkerService`."""
        add_to_server(servicer, self._server)
        self._names.append(name)

    async def start(self) -> int:
        """Listen; returns the port, which port 0 leaves to the system.

        Raises ConfigError when the address cannot be bound.
        """
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        public = (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(public, self._server)
        await self.set_not_serving()
        address = join_address(self.host, self.port)
        try:
            bound = self._server.add_insecure_port(address)
        except RuntimeError:
            bound = 0
        if bound == 0:
            raise ConfigError(
                f"cannot listen on {address}: the port is in use or the host is not this "
                f"machine's; choose another with --port or --host"
            )
        await self._server.start()
        self.port = bound
        return bound

    async def set_serving(self) -> None:
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def set_not_serving(self) -> None:
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def _set_health(self, status: Any) -> None:
        for name in ("", *self._names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Stop listening; calls under way get `grace_s` seconds, then are cancelled."""
        await self._server.stop(grace_s)


def _options(max_message_bytes: int) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # Two processes on one port would share its connections at random: refuse instead.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Clients ping every KEEPALIVE_MS; the default of five minutes would cut them off.
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    )
