"""Turns what a servicer raises into a gRPC status, once for all services."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog
from grpc.aio import AbortError

from common.errors import BatonError
from common.rpc.errors import public_message, status_of, trailing_metadata

log = structlog.get_logger("rpc")

_OWN_PREFIX = "/baton."


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """BatonError becomes its status; anything else is logged with its traceback and becomes
    INTERNAL with a message that tells nothing of it. Health and reflection are left alone."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_OWN_PREFIX):
            return handler
        return _wrap(handler, method)


def _wrap(handler: Any, method: str) -> Any:
    """The same handler (a named tuple with one of four functions set), guarded."""
    for name in ("unary_unary", "stream_unary", "unary_stream", "stream_stream"):
        function = getattr(handler, name)
        if function is None:
            continue
        streams = name.endswith("_stream") and inspect.isasyncgenfunction(function)
        guarded = _guard_stream(function, method) if streams else _guard(function, method)
        return handler._replace(**{name: guarded})
    return handler


def _guard(function: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await function(request, context)
        except (AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            return await _abort(context, method, error)

    return call


def _guard_stream(
    function: Callable[..., AsyncIterator[Any]], method: str
) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            async for message in function(request, context):
                yield message
        except (AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            await _abort(context, method, error)

    return call


async def _abort(context: grpc.aio.ServicerContext, method: str, error: Exception) -> None:
    if isinstance(error, BatonError):
        log.info("rpc_refused", method=method, error=type(error).__name__, message=str(error))
    else:
        log.error("rpc_failed", method=method, exc_info=error)
    await context.abort(status_of(error), public_message(error), trailing_metadata(error))
