"""Frames over TCP: always there, no dependency but the kernel.

On the wire each frame is a fixed head (magic, version, kind, status, sequence number, length), then
`length` bytes. Frames carry data or a probe and are answered, in any order, by a head without a
body (or, for a probe, with the same bytes). The sender has a window of unanswered frames; the
receiver has a budget of bytes that all connections share, and does not read a body that it has no
room for, so that pressure travels back through TCP itself.
"""

import asyncio
import collections
import contextlib
import os
import socket
import struct
import time
from collections.abc import Coroutine
from typing import Any, NamedTuple

import structlog

from common.errors import HandoffError
from common.kv.budget import ByteBudget
from common.kv.transports.base import FrameHandler
from common.kv.wire import FRAME_OVERHEAD_BYTES, MAX_PAYLOAD_BYTES, Buffer

log = structlog.get_logger("tcp")

_HEAD = struct.Struct("<4sBBHQQ")
_MAGIC = b"BTCP"
_VERSION = 1
_DATA, _ANSWER, _PROBE, _PROBE_ANSWER = 1, 2, 3, 4

MAX_FRAME_BYTES = MAX_PAYLOAD_BYTES + FRAME_OVERHEAD_BYTES
PROBE_BYTES = 64 * 1024
# Frames in flight on one link: enough to cover the receiver's engine step at a few MB a frame.
WINDOW_FRAMES = 32
# Bytes of frames that a receiver holds before their pages are written, all links together.
RECEIVE_BUDGET_BYTES = max(512 * 1024 * 1024, MAX_FRAME_BYTES)
SOCKET_BUFFER_BYTES = 4 * 1024 * 1024
CONNECT_TIMEOUT_S = 3.0
# A frame whose first byte came must come whole within this; then the peer counts as dead.
BODY_TIMEOUT_S = 15.0
# Headers and payloads under this are joined: one packet instead of two.
JOIN_BYTES = 64 * 1024
MAX_LINKS = 512


class _Head(NamedTuple):
    kind: int
    status: int
    sequence: int
    length: int


class TcpTransport:
    """Both sides of the TCP transport. All methods run on one loop."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._links: collections.OrderedDict[str, TcpLink] = collections.OrderedDict()
        self._connecting: dict[str, asyncio.Lock] = {}
        self._budget = ByteBudget(RECEIVE_BUDGET_BYTES)
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # Receiver -----------------------------------------------------------------------------

    async def listen(self, host: str, port: int, on_frame: FrameHandler) -> int:
        """Accept links on host:port; returns the port bound."""
        loop = asyncio.get_running_loop()
        family, address = await _resolve(host, port, passive=True)
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Before listen(): an accepted socket's window scale comes from the listener's buffer.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
            listener.bind(address)
            listener.listen(128)
        except OSError as error:
            listener.close()
            raise HandoffError(
                f"cannot listen on {host}:{port} for KV: {error}; choose another --data-port"
            ) from error
        listener.setblocking(False)
        self._listener = listener
        self._spawn(self._accept(loop, listener, on_frame))
        return listener.getsockname()[1]

    async def _accept(
        self, loop: asyncio.AbstractEventLoop, listener: socket.socket, on_frame: FrameHandler
    ) -> None:
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                # Out of file descriptors, or a peer that left at once: neither ends the listener.
                log.warning("accept_failed", error=str(error))
                await asyncio.sleep(0.1)
                continue
            _tune(sock)
            served = _Served(sock, on_frame, self._budget, self._max_frame_bytes)
            self._spawn(served.run())

    # Sender -------------------------------------------------------------------------------

    async def connect(self, address: str) -> "TcpLink":
        """The live link to `address`, made when there is none."""
        async with self._connecting.setdefault(address, asyncio.Lock()):
            link = self._links.get(address)
            if link is not None and not link.closed:
                self._links.move_to_end(address)
                return link
            link = TcpLink(address, await _open(address), self._max_frame_bytes)
            self._links[address] = link
            await self._trim()
            return link

    async def _trim(self) -> None:
        """Forget dead links; close the one longest unused when there are too many."""
        for address in [a for a, link in self._links.items() if link.closed]:
            del self._links[address]
        for lock in [a for a, lock in self._connecting.items() if not lock.locked()]:
            if lock not in self._links:
                del self._connecting[lock]
        while len(self._links) > MAX_LINKS:
            _, link = self._links.popitem(last=False)
            await link.close()

    async def probe(self, address: str, timeout_s: float = 5.0) -> float:
        """Send random bytes there and back over the link that data would take."""
        started = time.monotonic()
        nonce = os.urandom(PROBE_BYTES)
        try:
            async with asyncio.timeout(timeout_s):
                link = await self.connect(address)
                echoed = await link.probe(nonce)
        except TimeoutError as error:
            raise HandoffError(f"{address} did not answer a probe in {timeout_s:g} s") from error
        if echoed != nonce:
            raise HandoffError(f"{address} answered a probe with other bytes than were sent")
        return time.monotonic() - started

    async def close(self) -> None:
        """Close the listener and every link."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=3.0)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for link in list(self._links.values()):
            await link.close()
        self._links.clear()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class TcpLink:
    """One connection to a receiver, with a window of unanswered frames."""

    def __init__(self, address: str, sock: socket.socket, max_frame_bytes: int) -> None:
        self.address = address
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._max_frame_bytes = max_frame_bytes
        self._window = asyncio.Semaphore(WINDOW_FRAMES)
        self._writing = asyncio.Lock()
        self._sequence = 0
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._error: HandoffError | None = None
        self._reader = asyncio.create_task(self._read())

    @property
    def closed(self) -> bool:
        return self._error is not None

    async def send(self, header: bytes, payload: Buffer) -> asyncio.Future[int]:
        """Write one frame; the result awaits the receiver's status (see Link)."""
        return await self._request(_DATA, header, payload)

    async def probe(self, nonce: bytes) -> bytes:
        """Bytes there and back."""
        return await (await self._request(_PROBE, b"", nonce))

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
        self._pending[self._sequence] = answer
        head = _HEAD.pack(_MAGIC, _VERSION, kind, 0, self._sequence, length)
        # A write that was begun is finished even when the caller is cancelled: half a frame would
        # spoil the link for everyone else on it.
        await asyncio.shield(self._loop.create_task(self._write(head + header, body)))
        return answer

    async def _write(self, header: bytes, body: memoryview) -> None:
        async with self._writing:
            if self._error is not None:
                raise self._error
            try:
                await _send_all(self._loop, self._sock, header, body)
            except OSError as error:
                self._fail(f"writing failed: {error}")
                raise self._error from error

    async def _read(self) -> None:
        try:
            while True:
                head = await _read_head(self._loop, self._sock)
                await self._on_answer(head)
        except (OSError, EOFError, HandoffError) as error:
            self._fail(str(error) or type(error).__name__)
        finally:
            self._fail("it was closed")

    async def _on_answer(self, head: _Head) -> None:
        body = b""
        if head.kind == _PROBE_ANSWER and head.length <= PROBE_BYTES:
            body = bytes(await _read_body(self._loop, self._sock, head.length))
        elif head.kind != _ANSWER or head.length:
            raise HandoffError(f"an answer of kind {head.kind} with {head.length} bytes")
        answer = self._pending.pop(head.sequence, None)
        if answer is None:
            raise HandoffError(f"an answer to frame {head.sequence}, which is not in flight")
        self._window.release()
        if not answer.done():
            answer.set_result(body if head.kind == _PROBE_ANSWER else head.status)

    def _fail(self, reason: str) -> None:
        if self._error is not None:
            return
        self._error = HandoffError(f"the link to {self.address} broke: {reason}")
        # Wakes a write in progress and tells the peer; the descriptor is closed after the reader.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(self._error)
            self._window.release()
        self._pending.clear()
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


class _Served:
    """The receiver's side of one connection."""

    def __init__(
        self,
        sock: socket.socket,
        on_frame: FrameHandler,
        budget: ByteBudget,
        max_frame_bytes: int,
    ) -> None:
        self._sock = sock
        self._on_frame = on_frame
        self._budget = budget
        self._max_frame_bytes = max_frame_bytes
        self._loop = asyncio.get_running_loop()
        self._writing = asyncio.Lock()
        self._handling: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(2 * WINDOW_FRAMES)

    async def run(self) -> None:
        try:
            while True:
                head = await _read_head(self._loop, self._sock)
                await self._on_head(head)
        except EOFError:
            log.debug("link_ended")
        except (OSError, TimeoutError, HandoffError) as error:
            log.warning("link_broke", error=str(error) or type(error).__name__)
        finally:
            for task in self._handling:
                task.cancel()
            if self._handling:
                await asyncio.wait(self._handling, timeout=1.0)
            self._sock.close()

    async def _on_head(self, head: _Head) -> None:
        limit = {_DATA: self._max_frame_bytes, _PROBE: PROBE_BYTES}.get(head.kind, -1)
        if head.length > limit:
            raise HandoffError(f"a frame of kind {head.kind} with {head.length} bytes")
        await self._room.acquire()
        await self._budget.take(head.length)
        try:
            body = await _read_body(self._loop, self._sock, head.length)
        except BaseException:
            self._budget.give(head.length)
            raise
        task = self._loop.create_task(self._handle(head, body))
        self._handling.add(task)
        task.add_done_callback(self._handling.discard)
        task.add_done_callback(lambda _: self._give_back(head.length))

    def _give_back(self, length: int) -> None:
        self._budget.give(length)
        self._room.release()

    async def _handle(self, head: _Head, body: bytearray) -> None:
        echo = memoryview(body) if head.kind == _PROBE else memoryview(b"")
        kind, status = _PROBE_ANSWER, 0
        if head.kind == _DATA:
            kind, status = _ANSWER, await self._on_frame(memoryview(body))
        answer = _HEAD.pack(_MAGIC, _VERSION, kind, status, head.sequence, len(echo))
        try:
            async with self._writing, asyncio.timeout(BODY_TIMEOUT_S):
                await _send_all(self._loop, self._sock, answer, echo)
        except (OSError, TimeoutError) as error:
            log.warning("answer_failed", error=str(error) or type(error).__name__)
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`; HandoffError for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise HandoffError(f"{address!r} is not an address of the form host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


async def _resolve(host: str, port: int, *, passive: bool = False) -> tuple[int, Any]:
    flags = socket.AI_PASSIVE if passive else 0
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=flags
        )
    except OSError as error:
        raise HandoffError(f"cannot resolve {host!r}: {error}") from error
    if not found:
        raise HandoffError(f"cannot resolve {host!r}: no address")
    return found[0][0], found[0][4]


async def _open(address: str) -> socket.socket:
    host, port = split_address(address)
    sock: socket.socket | None = None
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            family, resolved = await _resolve(host, port)
            sock = socket.socket(family, socket.SOCK_STREAM)
            _tune(sock)
            await asyncio.get_running_loop().sock_connect(sock, resolved)
        return sock
    except BaseException as error:
        if sock is not None:
            sock.close()
        if isinstance(error, OSError):  # TimeoutError is one
            reason = str(error) or f"no answer in {CONNECT_TIMEOUT_S:g} s"
            raise HandoffError(f"cannot connect to {address}: {reason}") from error
        raise


def _tune(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
    # A peer whose machine vanished sends no FIN: ask after 10 s of silence, give up after 15 more.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000)


async def _send_all(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, header: bytes, body: memoryview
) -> None:
    if len(body) <= JOIN_BYTES:
        await loop.sock_sendall(sock, b"".join((header, body)))
        return
    await loop.sock_sendall(sock, header)
    await loop.sock_sendall(sock, body)


async def _read_head(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> _Head:
    data = bytearray(_HEAD.size)
    await _fill(loop, sock, memoryview(data))
    magic, version, kind, status, sequence, length = _HEAD.unpack(data)
    if magic != _MAGIC or version != _VERSION:
        raise HandoffError(f"a frame begins with {magic!r} version {version}: not Baton's peer")
    return _Head(kind, status, sequence, length)


async def _read_body(loop: asyncio.AbstractEventLoop, sock: socket.socket, size: int) -> bytearray:
    body = bytearray(size)
    async with asyncio.timeout(BODY_TIMEOUT_S):
        await _fill(loop, sock, memoryview(body))
    return body


async def _fill(loop: asyncio.AbstractEventLoop, sock: socket.socket, view: memoryview) -> None:
    while view:
        count = await loop.sock_recv_into(sock, view)
        if count == 0:
            raise EOFError("the peer closed the connection")
        view = view[count:]


def _retrieve(answer: asyncio.Future[Any]) -> None:
    """Mark an answer's error as seen: nobody awaits the answers of a sender that gave up."""
    if not answer.cancelled():
        answer.exception()
