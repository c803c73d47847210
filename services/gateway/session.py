"""The one stream between this gateway and a decode worker, shared by all its requests."""

import asyncio
from collections.abc import Callable

import grpc
import structlog

from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc
from common.errors import Unavailable

log = structlog.get_logger("gateway.session")

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 1.0
# The peer accepted the stream but says nothing: it hangs.
WELCOME_TIMEOUT_S = 10.0

Event = pb.TokenDelta | Unavailable
Sink = Callable[[Event], None]


class DecodeSession:
    """Submits and cancels; each request's events go to its sink, on the loop's thread.

    address     the decode worker's
    channel     owned by the caller
    gateway_id  says who this is
    welcomed    called with the worker's state each time the stream is up
    lost        called each time the stream broke
    """

    def __init__(
        self,
        address: str,
        channel: grpc.aio.Channel,
        gateway_id: str,
        welcomed: Callable[[pb.GetStateResponse], None],
        lost: Callable[[], None],
    ) -> None:
        self.address = address
        self.connected = False
        self._stub = worker_pb2_grpc.DecodeServiceStub(channel)
        self._gateway_id = gateway_id
        self._welcomed = welcomed
        self._lost = lost
        self._sinks: dict[str, Sink] = {}
        self._outbox: asyncio.Queue[pb.SessionRequest] = asyncio.Queue()
        self._call: grpc.aio.StreamStreamCall | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def in_flight(self) -> int:
        """Requests submitted and not ended."""
        return len(self._sinks)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"session {self.address}")

    async def close(self) -> None:
        """End the stream; requests that still run on it get Unavailable."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        self._fail_all("its session was closed")

    def submit(self, submit: pb.Submit, sink: Sink) -> None:
        """Hand a request over; its id must be new. The sink gets TokenDelta messages up to one
        with a finish reason or an error, or Unavailable when the worker is lost before.

        Raises Unavailable when the stream is down.
        """
        if not self.connected:
            raise Unavailable(f"decode worker {self.address} is not connected")
        self._sinks[submit.request_id] = sink
        self._outbox.put_nowait(pb.SessionRequest(submit=submit))

    def cancel(self, request_id: str) -> None:
        """Stop a request; its sink hears nothing more. A request that ended is left alone."""
        if self._sinks.pop(request_id, None) is not None and self.connected:
            message = pb.SessionRequest(cancel=pb.Cancel(request_id=request_id))
            self._outbox.put_nowait(message)

    def drop_connection(self) -> None:
        """Break the stream of a worker that answers nothing; connecting starts over."""
        if self._call is not None:
            self._call.cancel()

    async def _run(self) -> None:
        backoff = FIRST_BACKOFF_S
        while True:
            try:
                was_connected = await self._connect_once()
            except Exception:  # without this loop the worker would be lost for good
                log.exception("session_failed", worker=self.address)
                was_connected = False
            backoff = FIRST_BACKOFF_S if was_connected else min(MAX_BACKOFF_S, backoff * 2)
            await asyncio.sleep(backoff)

    async def _connect_once(self) -> bool:
        """One stream from hello to its end. True when it was welcomed."""
        self._outbox = asyncio.Queue()
        welcomed = False
        reason = "the worker ended the session"
        self._call = call = self._stub.Session()
        writer = asyncio.create_task(self._write(call, self._outbox), name=f"to {self.address}")
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                first = await call.read()
            if first is not grpc.aio.EOF and first.HasField("welcome"):
                welcomed = self.connected = True
                log.info("session_open", worker=self.address)
                self._welcomed(first.welcome.state)
                await self._receive(call)
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except TimeoutError:
            reason = f"no welcome within {WELCOME_TIMEOUT_S:g} s"
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            reason = "the worker stopped answering"  # drop_connection cancelled the call
        finally:
            call.cancel()
            writer.cancel()
            self.connected = False
            self._call = None
            self._fail_all(reason)
        if welcomed:
            log.warning("session_lost", worker=self.address, reason=reason)
            self._lost()
        return welcomed

    async def _write(
        self, call: grpc.aio.StreamStreamCall, outbox: asyncio.Queue[pb.SessionRequest]
    ) -> None:
        """Send what is queued. A stream that breaks is noticed by whoever reads it."""
        try:
            await call.write(pb.SessionRequest(hello=pb.Hello(gateway_id=self._gateway_id)))
            while True:
                await call.write(await outbox.get())
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            log.debug("session_write_ended", worker=self.address, why=str(error))

    async def _receive(self, call: grpc.aio.StreamStreamCall) -> None:
        while True:
            message = await call.read()
            if message is grpc.aio.EOF:
                return
            for delta in message.frame.deltas:
                self._deliver(delta)

    def _deliver(self, delta: pb.TokenDelta) -> None:
        sink = self._sinks.get(delta.request_id)
        if sink is None:  # cancelled while the frame was on its way
            return
        if delta.finish_reason or delta.HasField("error"):
            del self._sinks[delta.request_id]
        sink(delta)

    def _fail_all(self, reason: str) -> None:
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink(Unavailable(f"decode worker {self.address} was lost: {reason}"))
