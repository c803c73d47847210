"""Frames over TCP: always there, no dependency but the kernel.

A frame's body follows its head. The receiver has a budget of bytes that all connections share, and
does not read a body that it has no room for, so that pressure travels back through TCP itself.
Every other transport is found through this one: a peer is asked over TCP what else it has.
"""

import asyncio
import collections
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

from common.errors import HandoffError
from common.kv.budget import ByteBudget
from common.kv.transports.base import PROBE_TIMEOUT_S, FrameHandler
from common.kv.transports.frames import (
    BODY_TIMEOUT_S,
    MAX_FRAME_BYTES,
    FrameLink,
    FrameServer,
    Head,
    Tasks,
    accept_links,
    new_frame,
)

# Bytes of frames that a receiver holds before their pages are written, all links together.
RECEIVE_BUDGET_BYTES = max(512 * 1024 * 1024, MAX_FRAME_BYTES)
SOCKET_BUFFER_BYTES = 4 * 1024 * 1024
CONNECT_TIMEOUT_S = 3.0
MAX_LINKS = 512


class TcpTransport:
    """Both sides of the TCP transport. All methods run on one loop."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._links: collections.OrderedDict[str, TcpLink] = collections.OrderedDict()
        self._connecting: dict[str, asyncio.Lock] = {}
        self._budget = ByteBudget(RECEIVE_BUDGET_BYTES)
        self._listener: socket.socket | None = None
        self._tasks = Tasks()

    # Receiver -----------------------------------------------------------------------------

    async def listen(
        self, host: str, port: int, on_frame: FrameHandler, offers: bytes = b""
    ) -> int:
        """Accept links on host:port; returns the port bound. `offers` is told to who asks."""
        listener = await listen_on(host, port)
        self._listener = listener

        def start(sock: socket.socket) -> None:
            tune(sock)
            served = _Served(sock, on_frame, self._budget, self._max_frame_bytes, offers)
            self._tasks.spawn(served.run())

        self._tasks.spawn(accept_links(listener, start))
        return listener.getsockname()[1]

    # Sender -------------------------------------------------------------------------------

    async def connect(self, address: str) -> "TcpLink":
        """The live link to `address`, made when there is none."""
        async with self._connecting.setdefault(address, asyncio.Lock()):
            link = self._links.get(address)
            if link is not None and not link.closed:
                self._links.move_to_end(address)
                return link
            link = TcpLink(address, await dial(address), self._max_frame_bytes)
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

    async def probe(self, address: str, timeout_s: float = PROBE_TIMEOUT_S) -> float:
        """See Transport."""
        started = time.monotonic()
        async with within(timeout_s, address):
            await (await self.connect(address)).probe()
        return time.monotonic() - started

    def take_events(self) -> dict[str, int]:
        return {}

    def links(self) -> dict[str, str]:
        return {a: link.transport for a, link in list(self._links.items()) if not link.closed}

    async def close(self) -> None:
        """Close the listener and every link."""
        await self._tasks.cancel()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for link in list(self._links.values()):
            await link.close()
        self._links.clear()


class TcpLink(FrameLink):
    """One connection to a receiver."""

    transport = "tcp"

    async def _carry(self, kind: int, sequence: int, header: bytes, body: memoryview) -> None:
        await self._write(Head(kind, 0, sequence, len(header) + len(body)), header, body)


class _Served(FrameServer):
    """The receiver's side of one connection."""

    def __init__(
        self,
        sock: socket.socket,
        on_frame: FrameHandler,
        budget: ByteBudget,
        max_frame_bytes: int,
        offers: bytes,
    ) -> None:
        super().__init__(sock, on_frame, max_frame_bytes, offers)
        self._budget = budget

    async def _take(self, head: Head) -> None:
        await self._budget.take(head.length)
        try:
            body = new_frame(head.length)
            async with asyncio.timeout(BODY_TIMEOUT_S):
                await self._inlet.fill(body)
        except BaseException:
            self._budget.give(head.length)
            raise
        self._handle_soon(head, body, lambda _: self._budget.give(head.length))


@contextlib.asynccontextmanager
async def within(timeout_s: float, address: str) -> AsyncIterator[None]:
    """HandoffError when what is inside takes longer."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise HandoffError(
            f"{address} did not answer a test transfer in {timeout_s:g} s"
        ) from error


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`; HandoffError for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise HandoffError(f"{address!r} is not an address of the form host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


async def listen_on(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises HandoffError."""
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
    return listener


async def dial(address: str) -> socket.socket:
    """A connected socket. Raises HandoffError."""
    host, port = split_address(address)
    sock: socket.socket | None = None
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            family, resolved = await _resolve(host, port)
            sock = socket.socket(family, socket.SOCK_STREAM)
            tune(sock)
            await asyncio.get_running_loop().sock_connect(sock, resolved)
        return sock
    except BaseException as error:
        if sock is not None:
            sock.close()
        if isinstance(error, OSError):  # TimeoutError is one
            reason = str(error) or f"no answer in {CONNECT_TIMEOUT_S:g} s"
            raise HandoffError(f"cannot connect to {address}: {reason}") from error
        raise


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


def tune(sock: socket.socket) -> None:
    """Non-blocking, no delay, large buffers, a dead machine noticed."""
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
