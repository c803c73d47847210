"""Frames over a stream socket: heads, the window of unanswered frames, answers, probes.

On the wire each frame is a fixed head (magic, version, kind, status, sequence number, length and a
number whose meaning depends on the kind). A request's bytes, its body, go wherever the transport
carries them: behind the head (tcp), in shared memory (shm), through a network card (ucx). Answers
come back on the socket in any order. The socket's end is the link's end, so that a peer's death is
seen at once, whatever carries the bodies.
"""

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import numpy as np
import structlog
import xxhash

from common.errors import HandoffError
from common.kv.transports.base import FrameHandler
from common.kv.wire import FRAME_OVERHEAD_BYTES, MAX_PAYLOAD_BYTES, Buffer

log = structlog.get_logger("transport")

HEAD = struct.Struct("<4sBBHQQQ")
MAGIC = b"BTNF"
VERSION = 2
DATA, PROBE, OFFERS, ANSWER = 1, 2, 3, 4

MAX_FRAME_BYTES = MAX_PAYLOAD_BYTES + FRAME_OVERHEAD_BYTES
# The usual block of a 7B model: what a test transfer must get through.
PROBE_BYTES = 2 * 1024 * 1024
MAX_ANSWER_BYTES = 64 * 1024
# Frames in flight on one link: enough to cover the receiver's engine step at a few MB a frame.
WINDOW_FRAMES = 32
# A frame that was announced must come whole within this; then the peer counts as dead.
BODY_TIMEOUT_S = 15.0
# Headers and payloads under this are joined: one packet instead of two.
JOIN_BYTES = 64 * 1024


class Head(NamedTuple):
    """`extra`: where or how the body comes (a request), its checksum (the answer to a probe)."""

    kind: int
    status: int
    sequence: int
    length: int
    extra: int = 0

    def pack(self) -> bytes:
        kind, status, sequence, length, extra = self
        return HEAD.pack(MAGIC, VERSION, kind, status, sequence, length, extra)


class FrameLink:
    """The sender's side of one connection. A subclass carries the bodies."""

    transport = ""

    def __init__(self, address: str, sock: socket.socket, max_frame_bytes: int) -> None:
        self.address = address
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._max_frame_bytes = max_frame_bytes
        self._window = asyncio.Semaphore(WINDOW_FRAMES)
        self._writing = asyncio.Lock()
        self._sequence = 0
        self._pending: dict[int, tuple[int, asyncio.Future[Any]]] = {}
        self._error: HandoffError | None = None
        self._inlet = Inlet(self._loop, sock)
        self._reader = asyncio.create_task(self._read())

    # For subclasses -----------------------------------------------------------------------

    async def _carry(self, kind: int, sequence: int, header: bytes, body: memoryview) -> None:
        """Announce a frame and bring its body over; on return `body` may be reused. Raises OSError
        or HandoffError, which break the link."""
        raise NotImplementedError

    def _answered(self, sequence: int) -> None:
        """The receiver is done with a frame's body."""

    def _released(self) -> None:
        """The link broke: let go of what it holds. Called once."""

    # ----------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._error is not None

    async def send(self, header: bytes, payload: Buffer) -> asyncio.Future[int]:
        """See Link."""
        return await self._request(DATA, header, payload)

    async def probe(self) -> float:
        """See Link."""
        started = time.monotonic()
        sent = os.urandom(min(PROBE_BYTES, self._max_frame_bytes))
        checksum, _ = await (await self._request(PROBE, b"", sent))
        if checksum != xxhash.xxh3_64_intdigest(sent):
            error = HandoffError(
                f"{self.address} got other bytes by {self.transport} than were sent"
            )
            self._fail(str(error))
            raise error
        return time.monotonic() - started

    async def offers(self) -> bytes:
        """What the receiver has beside this transport, as it wrote it."""
        _, body = await (await self._request(OFFERS, b"", b""))
        return body

    async def _request(self, kind: int, header: bytes, payload: Buffer) -> asyncio.Future[Any]:
        body = memoryview(payload).cast("B")
        length = len(header) + len(body)
        if length > self._max_frame_bytes:
            raise HandoffError(
                f"a frame of {length} bytes is over the transport's {self._max_frame_bytes}"
            )
        await self._window.acquire()
        if self._error is not None:
            self._window.release()
            raise self._error
        self._sequence += 1
        answer = self._loop.create_future()
        answer.add_done_callback(_retrieve)
        self._pending[self._sequence] = (kind, answer)
        # A write that was begun is finished even when the caller is cancelled: half a frame would
        # spoil the link for everyone else on it.
        write = self._loop.create_task(self._guarded(kind, self._sequence, header, body))
        write.add_done_callback(_retrieve)
        await asyncio.shield(write)
        return answer

    async def _guarded(self, kind: int, sequence: int, header: bytes, body: memoryview) -> None:
        try:
            await self._carry(kind, sequence, header, body)
        except (OSError, HandoffError) as error:
            self._fail(f"writing failed: {error}")
        if self._error is not None:
            raise self._error

    async def _write(self, head: Head, header: bytes = b"", body: Buffer = b"") -> None:
        async with self._writing:
            if self._error is not None:
                raise self._error
            await send_all(self._loop, self._sock, head.pack() + header, body)

    async def _read(self) -> None:
        try:
            while True:
                await self._on_answer(await self._inlet.head())
        except (OSError, EOFError, HandoffError) as error:
            self._fail(str(error) or type(error).__name__)
        finally:
            self._fail("it was closed")

    async def _on_answer(self, head: Head) -> None:
        if head.kind != ANSWER or head.length > MAX_ANSWER_BYTES:
            raise HandoffError(f"an answer of kind {head.kind} with {head.length} bytes")
        body = bytearray(head.length)
        await self._inlet.fill(memoryview(body))
        if head.sequence not in self._pending:
            raise HandoffError(f"an answer to frame {head.sequence}, which is not in flight")
        kind, answer = self._pending.pop(head.sequence)
        self._window.release()
        self._answered(head.sequence)
        if not answer.done():
            answer.set_result(head.status if kind == DATA else (head.extra, bytes(body)))

    def _fail(self, reason: str) -> None:
        if self._error is not None:
            return
        self._error = HandoffError(f"the link to {self.address} broke: {reason}")
        # Wakes a write in progress and tells the peer; the descriptor is closed after the reader.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        for _, answer in self._pending.values():
            if not answer.done():
                answer.set_exception(self._error)
            self._window.release()
        self._pending.clear()
        self._released()
        self._loop.create_task(self._close_socket())

    async def _close_socket(self) -> None:
        self._reader.cancel()
        if asyncio.current_task() is not self._reader:
            await asyncio.wait([self._reader])
        async with self._writing:
            self._sock.close()

    async def close(self) -> None:
        """Frames in flight fail with HandoffError."""
        self._fail("it was closed")
        await asyncio.wait([self._reader], timeout=1.0)


class FrameServer:
    """The receiver's side of one connection. A subclass takes the bodies in.

    offers  what an OFFERS request is answered with
    """

    def __init__(
        self,
        sock: socket.socket,
        on_frame: FrameHandler,
        max_frame_bytes: int,
        offers: bytes = b"",
    ) -> None:
        self._sock = sock
        self._on_frame = on_frame
        self._max_frame_bytes = max_frame_bytes
        self._offers = offers
        self._loop = asyncio.get_running_loop()
        self._inlet = Inlet(self._loop, sock)
        self._writing = asyncio.Lock()
        self._handling: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(2 * WINDOW_FRAMES)

    # For subclasses -----------------------------------------------------------------------

    async def _take(self, head: Head) -> None:
        """Take a frame's body in and call `_handle_soon` with it. Raises OSError, EOFError or
        HandoffError, which end the link."""
        raise NotImplementedError

    def _handled(self, head: Head) -> None:
        """A frame's bytes are not needed any more; its answer comes next, and may be followed by
        another frame in their place before the answer's sending returns."""

    async def _released(self) -> None:
        """The link ended and no handler runs: let go of what it holds."""

    # ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until the peer leaves or sends what makes no sense."""
        try:
            while True:
                await self._on_head(await self._inlet.head())
        except EOFError:
            log.debug("link_ended")
        except (OSError, TimeoutError, HandoffError) as error:
            log.warning("link_broke", error=str(error) or type(error).__name__)
        finally:
            for task in self._handling:
                task.cancel()
            if self._handling:
                await asyncio.wait(self._handling, timeout=1.0)
            await self._released()
            self._sock.close()

    async def _on_head(self, head: Head) -> None:
        limit = {DATA: self._max_frame_bytes, PROBE: self._max_frame_bytes, OFFERS: 0}
        if head.length > limit.get(head.kind, -1):
            raise HandoffError(f"a frame of kind {head.kind} with {head.length} bytes")
        await self._room.acquire()
        if head.kind == OFFERS:
            self._handle_soon(head, memoryview(b""))
        else:
            await self._take(head)

    def _handle_soon(
        self, head: Head, frame: memoryview, done: Callable[[bool], None] | None = None
    ) -> None:
        """Have a whole frame handled and answered. `done` is called afterwards, with False when
        the handler was cut short and may have left the frame with somebody else."""

        def ended(task: asyncio.Task[None]) -> None:
            self._handling.discard(task)
            self._room.release()
            error = None if task.cancelled() else task.exception()
            if error is not None:
                log.error("frame_handler_crashed", exc_info=error)
                self.hang_up()
            if done is not None:
                done(not task.cancelled() and error is None)

        task = self._loop.create_task(self._handle(head, frame))
        self._handling.add(task)
        task.add_done_callback(ended)

    async def _handle(self, head: Head, frame: memoryview) -> None:
        status, extra, body = 0, 0, b""
        if head.kind == DATA:
            status = await self._on_frame(frame)
        elif head.kind == PROBE:
            extra = xxhash.xxh3_64_intdigest(frame)
        else:
            body = self._offers
        self._handled(head)
        answer = Head(ANSWER, status, head.sequence, len(body), extra).pack()
        try:
            async with self._writing, asyncio.timeout(BODY_TIMEOUT_S):
                await send_all(self._loop, self._sock, answer, body)
        except (OSError, TimeoutError) as error:
            log.warning("answer_failed", error=str(error) or type(error).__name__)
            self.hang_up()

    def hang_up(self) -> None:
        """Have `run` end, from anywhere on the loop."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


class _Coming(NamedTuple):
    """A frame whose head is here. `whole` resolves when its body is too; None: it is.
    `done` as for `_handle_soon`."""

    head: Head
    frame: memoryview
    whole: "asyncio.Future[None] | None"
    done: Callable[[bool], None]


class AheadServer(FrameServer):
    """Heads are read ahead of the bodies, which come by another way than the connection: so its end
    is seen while a body is awaited. Frames are handled in the order of their heads."""

    def __init__(self, sock: socket.socket, on_frame: FrameHandler, max_frame_bytes: int) -> None:
        super().__init__(sock, on_frame, max_frame_bytes)
        self._coming: asyncio.Queue[_Coming] = asyncio.Queue()  # bounded by _room
        self._ordering = asyncio.create_task(self._handle_in_order())

    def _handle_when_whole(
        self,
        head: Head,
        frame: memoryview,
        whole: "asyncio.Future[None] | None",
        done: Callable[[bool], None],
    ) -> None:
        """Have a frame handled after those before it. `done` is called in any case."""
        self._coming.put_nowait(_Coming(head, frame, whole, done))

    async def _handle_in_order(self) -> None:
        try:
            while True:
                head, frame, whole, done = await self._coming.get()
                try:
                    if whole is not None:
                        async with asyncio.timeout(BODY_TIMEOUT_S):
                            await whole
                    self._check_alive()
                except BaseException:
                    done(False)
                    raise
                self._handle_soon(head, frame, done)
        except (OSError, HandoffError) as error:
            log.warning("link_broke", error=str(error) or "a body did not come")
        finally:
            self.hang_up()

    def _check_alive(self) -> None:
        """For subclasses: raise HandoffError when a body that seems whole cannot be trusted."""

    async def _released(self) -> None:
        self._ordering.cancel()
        await asyncio.wait([self._ordering], timeout=1.0)
        while not self._coming.empty():
            self._coming.get_nowait().done(False)


class Tasks:
    """Tasks that nobody awaits, until they are cancelled together."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def cancel(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=3.0)


async def accept_links(listener: socket.socket, start: Callable[[socket.socket], None]) -> None:
    """Call `start` with each socket that connects, for ever."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            sock, _ = await loop.sock_accept(listener)
        except OSError as error:
            # Out of file descriptors, or a peer that left at once: neither ends the listener.
            log.warning("accept_failed", error=str(error))
            await asyncio.sleep(0.1)
            continue
        start(sock)


async def send_all(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, header: bytes, body: Buffer
) -> None:
    """`header`, then `body`."""
    if len(body) <= JOIN_BYTES:
        await loop.sock_sendall(sock, b"".join((header, body)))
        return
    await loop.sock_sendall(sock, header)
    await loop.sock_sendall(sock, body)


async def fill(loop: asyncio.AbstractEventLoop, sock: socket.socket, view: memoryview) -> None:
    """Read until `view` is full. Raises EOFError when the peer closed before."""
    while view:
        count = await loop.sock_recv_into(sock, view)
        if count == 0:
            raise EOFError("the peer closed the connection")
        view = view[count:]


class Inlet:
    """What a connection receives: small things many at a time, large ones straight to their
    place."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        self._loop = loop
        self._sock = sock
        self._buffer = memoryview(bytearray(JOIN_BYTES))
        self._ready = self._buffer[:0]

    async def fill(self, view: memoryview) -> None:
        """Read until `view` is full. Raises EOFError when the peer closed before."""
        while view:
            if not self._ready:
                if len(view) >= len(self._buffer):
                    await fill(self._loop, self._sock, view)
                    return
                count = await self._loop.sock_recv_into(self._sock, self._buffer)
                if count == 0:
                    raise EOFError("the peer closed the connection")
                self._ready = self._buffer[:count]
            count = min(len(view), len(self._ready))
            view[:count] = self._ready[:count]
            view, self._ready = view[count:], self._ready[count:]

    async def head(self) -> Head:
        """The next head. Raises EOFError at the end, HandoffError for what is none."""
        data = bytearray(HEAD.size)
        await self.fill(memoryview(data))
        magic, version, *fields = HEAD.unpack(data)
        if magic != MAGIC or version != VERSION:
            raise HandoffError(
                f"a frame begins with {magic!r} version {version}, wanted {MAGIC!r} {VERSION}: "
                f"not a Baton peer of this version"
            )
        return Head(*fields)


def new_frame(size: int) -> memoryview:
    """Memory for a frame, not cleared: clearing it costs as much as filling it."""
    return memoryview(np.empty(size, np.uint8))


def _retrieve(future: "asyncio.Future[Any]") -> None:
    """Mark an error as seen: nobody awaits the answers of a sender that gave up."""
    if not future.cancelled():
        future.exception()
