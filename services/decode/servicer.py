"""DecodeService: one Session stream for each gateway process."""

import asyncio
import contextlib
import itertools

import grpc
import structlog

from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc
from common.errors import InvalidRequest
from common.telemetry.tracing import Tracing
from common.worker.host import EngineHost
from services.decode.session import Session

log = structlog.get_logger("decode")

HELLO_S = 10.0
MAX_GATEWAY_ID = 256


class DecodeServicer(worker_pb2_grpc.DecodeServiceServicer):
    """Carries messages between streams and sessions."""

    def __init__(self, host: EngineHost, tracing: Tracing) -> None:
        self._host = host
        self._tracing = tracing
        self._numbers = itertools.count(1)
        self._open: dict[Session, asyncio.Task[object] | None] = {}

    async def Session(self, request_iterator: object, context: grpc.aio.ServicerContext) -> None:
        hello = await _read_hello(context)
        session = Session(next(self._numbers), hello.gateway_id, self._host, self._tracing)
        self._open[session] = asyncio.current_task()
        reader = asyncio.create_task(_read(session, context))
        reader.add_done_callback(lambda _: session.outbox.close())
        log.info("session_opened", gateway=session.gateway_id, session=session.number)
        try:
            await context.write(pb.SessionResponse(welcome=pb.Welcome(state=self._host.describe())))
            while (frame := await session.outbox.next()) is not None:
                await context.write(pb.SessionResponse(frame=frame))
            if reader.done():
                # Raises what was wrong with the gateway's messages, if anything was.
                await reader
        finally:
            reader.cancel()
            session.close()
            del self._open[session]
            log.info("session_closed", gateway=session.gateway_id, session=session.number)

    async def close(self, timeout_s: float) -> None:
        """End all sessions once what waits in them is sent."""
        tasks = [task for task in self._open.values() if task is not None]
        for session in list(self._open):
            session.outbox.close()
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)


async def _read_hello(context: grpc.aio.ServicerContext) -> pb.Hello:
    message = None
    with contextlib.suppress(TimeoutError):
        message = await asyncio.wait_for(context.read(), HELLO_S)
    if not isinstance(message, pb.SessionRequest) or message.WhichOneof("message") != "hello":
        raise InvalidRequest("the first message of a session must be hello", field="hello")
    if len(message.hello.gateway_id) > MAX_GATEWAY_ID:
        raise InvalidRequest(
            f"gateway_id is over {MAX_GATEWAY_ID} characters", field="hello.gateway_id"
        )
    return message.hello


async def _read(session: Session, context: grpc.aio.ServicerContext) -> None:
    """Until the gateway ends its side. Raises InvalidRequest for a message without meaning."""
    while True:
        await session.outbox.room()
        message = await context.read()
        if message is grpc.aio.EOF:
            return
        match message.WhichOneof("message"):
            case "submit":
                session.submit(message.submit)
            case "cancel":
                session.cancel(message.cancel.request_id)
            case other:
                raise InvalidRequest(
                    f"message {other or 'without content'} is not expected here; "
                    f"send submit or cancel",
                    field="message",
                )
