"""The HTTP front: routes, bodies, SSE. What a request means is generate.py's business."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from aiohttp import web

import baton
from common.errors import Cancelled, DeadlineExceeded, InvalidRequest, RequestTooLarge
from common.telemetry.tracing import Tracing
from services.gateway import debug
from services.gateway.admission import Admission
from services.gateway.errors import error_body, error_headers, http_status, is_ours
from services.gateway.fleet import Fleet
from services.gateway.generate import Generator
from services.gateway.generation import Generation
from services.gateway.metrics import CONTENT_TYPE, Metrics
from services.gateway.openai_format import DONE, Format, sse
from services.gateway.openai_json import parse_json
from services.gateway.openai_schema import ChatBody, CompletionBody, parse_chat, parse_completion
from services.gateway.presence import Presence
from services.gateway.requests import GenerateRequest
from services.gateway.scope import RequestScope, open_scope
from services.gateway.tenants import Tenants

log = structlog.get_logger("gateway.http")

TIMEOUT_HEADER = "x-request-timeout-s"
# A client that sends its body slower than this holds a connection for nothing.
BODY_TIMEOUT_S = 60.0
# Larger bodies are parsed on a thread.
INLINE_BODY_BYTES = 64 * 1024
SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}

Body = ChatBody | CompletionBody
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SCOPE = web.RequestKey("scope", RequestScope)
TENANT = web.RequestKey("tenant", str)
# What probes, scrapers and operators ask, none of which have a tenant. All else needs a key.
KEYLESS = frozenset({"/", "/health", "/ready", "/metrics", "/debug/state"})


class HttpFront:
    """All routes over one Generator."""

    def __init__(
        self,
        generator: Generator,
        fleet: Fleet,
        admission: Admission,
        tenants: Tenants,
        metrics: Metrics,
        tracing: Tracing,
        presence: Presence,
        *,
        max_body_bytes: int,
        request_timeout_s: float,
    ) -> None:
        self._generator = generator
        self._fleet = fleet
        self._admission = admission
        self._tenants = tenants
        self._metrics = metrics
        self._tracing = tracing
        self._presence = presence
        self._max_body_bytes = max_body_bytes
        self._request_timeout_s = request_timeout_s

    def app(self) -> web.Application:
        app = web.Application(
            client_max_size=self._max_body_bytes, middlewares=[self._observe_and_answer_errors]
        )
        app.on_response_prepare.append(self._add_headers)
        app.add_routes(
            [
                web.get("/", self._root),
                web.get("/health", self._health),
                web.get("/ready", self._ready),
                web.get("/metrics", self._get_metrics),
                web.get("/v1/models", self._list_models),
                web.get("/v1/models/{id:.+}", self._get_model),
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._completion),
                web.get("/debug/state", self._debug_state),
                web.get("/debug/traces/{id}", self._debug_trace),
            ]
        )
        return app

    # Generation -------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_chat)

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_completion)

    async def _generate(
        self, request: web.Request, parse: Callable[[dict[str, Any]], Body]
    ) -> web.StreamResponse:
        scope = open_scope(
            self._tracing,
            request.path,
            timeout_s=self._timeout_of(request),
            request_id=request.headers.get("x-request-id", ""),
            traceparent=request.headers.get("traceparent", ""),
            tracestate=request.headers.get("tracestate", ""),
        )
        scope.belong_to(request[TENANT])
        request[SCOPE] = scope
        failure: BaseException | None = None
        try:
            body, wanted = await self._read(request, parse)
            async with self._generator.run(wanted, scope) as generation:
                options = {
                    "return_token_ids": bool(body.return_token_ids),
                    "include_usage": body.include_usage,
                    "prompt_logprobs": body.prompt_logprobs,
                }
                answer = self._stream if body.stream else self._whole
                return await answer(request, scope, generation, Format(generation, **options))
        except asyncio.CancelledError:
            failure = Cancelled("the client went away")
            raise
        except BaseException as error:
            failure = error
            raise
        finally:
            scope.end(failure)

    def _timeout_of(self, request: web.Request) -> float:
        """The server's limit, or less where the client asks for less."""
        text = request.headers.get(TIMEOUT_HEADER)
        if text is None:
            return self._request_timeout_s
        try:
            asked = float(text)
        except ValueError:
            asked = 0.0
        if not 0 < asked < float("inf"):
            raise InvalidRequest(
                f"{TIMEOUT_HEADER} is {text[:64]!r}; it must be a positive number of seconds",
                field=TIMEOUT_HEADER,
            )
        return min(asked, self._request_timeout_s)

    async def _read(
        self, request: web.Request, parse: Callable[[dict[str, Any]], Body]
    ) -> tuple[Body, GenerateRequest]:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                raw = await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise RequestTooLarge(
                f"the request body is over the limit of {self._max_body_bytes} bytes", field="body"
            ) from error
        except TimeoutError as error:
            raise InvalidRequest(
                f"the request body did not arrive within {BODY_TIMEOUT_S:g} s", field="body"
            ) from error

        def understand() -> tuple[Body, GenerateRequest]:
            body = parse(parse_json(raw))
            return body, body.to_request()

        inline = len(raw) < INLINE_BODY_BYTES
        return understand() if inline else await asyncio.to_thread(understand)

    async def _whole(
        self, request: web.Request, scope: RequestScope, generation: Generation, shape: Format
    ) -> web.StreamResponse:
        texts: dict[int, list[str]] = {}
        async for delta in generation.deltas():
            texts.setdefault(delta.index, []).append(delta.text)
        joined = {index: "".join(pieces) for index, pieces in texts.items()}
        return _json(shape.whole(joined))

    async def _stream(
        self, request: web.Request, scope: RequestScope, generation: Generation, shape: Format
    ) -> web.StreamResponse:
        # Until the first delta a failure still has a status code of its own.
        await generation.wait_first()
        response = web.StreamResponse(headers=SSE_HEADERS)
        await response.prepare(request)
        try:
            await _write(response, scope, shape.openings())
            async for delta in generation.deltas():
                await _write(response, scope, shape.chunks(delta))
            closing = shape.closing()
            await _write(response, scope, [closing] if closing is not None else [], DONE)
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception as error:
            # The status is sent: an error event ends the stream, and no [DONE] follows it.
            _log_failure(request, error)
            scope.span.set_attribute("failed_mid_stream", str(error))
            await response.write(sse(error_body(error)))
        await response.write_eof()
        return response

    # The rest ---------------------------------------------------------------------------------

    async def _root(self, request: web.Request) -> web.Response:
        model = self._generator.model.name
        return _json({"service": "baton", "version": baton.__version__, "model": model})

    async def _health(self, request: web.Request) -> web.Response:
        return _json({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        if self._presence.leaving:
            return _json({"status": "draining"}, status=503)
        workers = len(self._fleet.usable("decode"))
        ready = self._presence.ready
        status = "ready" if ready else "no decode worker is ready"
        return _json({"status": status, "decode_workers": workers}, status=200 if ready else 503)

    async def _get_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def _list_models(self, request: web.Request) -> web.Response:
        return _json({"object": "list", "data": [self._model_json()]})

    async def _get_model(self, request: web.Request) -> web.Response:
        self._generator.check_model(request.match_info["id"])
        return _json(self._model_json())

    def _model_json(self) -> dict[str, Any]:
        model = self._generator.model
        return {
            "id": model.name,
            "object": "model",
            "created": model.created_unix_s,
            "owned_by": "baton",
            "max_model_len": self._generator.max_model_len,
        }

    async def _debug_state(self, request: web.Request) -> web.Response:
        return _json(await debug.state(self._fleet, self._admission, self._presence))

    async def _debug_trace(self, request: web.Request) -> web.Response:
        trace_id = debug.parse_trace_id(request.match_info["id"])
        found = await debug.trace(self._fleet, self._tracing, trace_id, request[TENANT])
        if found is None:
            raise web.HTTPNotFound(text=f"no spans of trace {trace_id.hex()} are held here")
        return _json(found)

    # Around all of it -------------------------------------------------------------------------

    @web.middleware
    async def _observe_and_answer_errors(
        self, request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        started = time.monotonic()
        status = 499
        try:
            with self._presence.busy():
                response = await self._answer(request, handler)
            status = response.status
            return response
        finally:
            self._metrics.http_request(_route_of(request), status)
            log.debug(
                "http_request", path=request.path, status=status, s=time.monotonic() - started
            )

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if _route_of(request) not in KEYLESS:
                request[TENANT] = self._tenants.tenant_of(request.headers.get("Authorization"))
            return await handler(request)
        except web.HTTPException as error:
            return _json(_plain_error(error), status=error.status, headers=_allow(error))
        except ConnectionError as error:
            raise asyncio.CancelledError from error  # the client went away: nobody to answer
        except Exception as error:
            _log_failure(request, error)
            headers = error_headers(error)
            return _json(error_body(error), status=http_status(error), headers=headers)

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        scope = request.get(SCOPE)
        if scope is not None:
            response.headers.update(scope.headers())
        if self._presence.leaving:
            # The client's next request is for another gateway, over another connection.
            response.headers["Connection"] = "close"
            response.force_close()


async def _write(
    response: web.StreamResponse,
    scope: RequestScope,
    chunks: list[dict[str, Any]],
    end: bytes = b"",
) -> None:
    """Raises DeadlineExceeded for a client that does not read until the deadline."""
    data = b"".join(map(sse, chunks)) + end
    if not data:
        return
    try:
        async with asyncio.timeout(max(0.0, scope.remaining_s)):
            await response.write(data)
    except TimeoutError as error:
        raise DeadlineExceeded("the client did not read its stream in time") from error


def _log_failure(request: web.Request, error: Exception) -> None:
    if is_ours(error):
        log.info("request_refused", path=request.path, error=type(error).__name__, why=str(error))
    else:
        log.error("request_failed", path=request.path, exc_info=error)


def _route_of(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "other"


def _plain_error(error: web.HTTPException) -> dict[str, Any]:
    message = error.text or error.reason
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status)
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _allow(error: web.HTTPException) -> dict[str, str]:
    allowed = error.headers.get("Allow")
    return {"Allow": allowed} if allowed else {}


def _json(
    value: dict[str, Any], *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    body = json.dumps(value, ensure_ascii=False).encode()
    return web.Response(
        body=body, status=status, headers=headers, content_type="application/json", charset="utf-8"
    )
