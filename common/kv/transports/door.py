"""A TCP port of a transport's own, for peers that were told its nonce.

A transport that carries bodies by a library keeps heads, answers, credit and the news of a peer's
death on such a connection. The nonce comes with the offer, over tcp: who merely found the port is
cut off before a library sees any of its bytes.
"""

import asyncio
import contextlib
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import structlog

from common.errors import HandoffError
from common.kv.transports.base import Offer
from common.kv.transports.frames import FrameServer, Tasks, accept_links, fill
from common.kv.transports.tcp import dial, listen_on, tune

log = structlog.get_logger("transport")

NONCE_BYTES = 16
# Of which loading a library may take most.
HELLO_S = 8.0
_LENGTH = struct.Struct("<I")


class Door:
    """The receiver's port. All methods run on one loop.

    name       the transport's, for the log
    max_links  who comes after them is sent away
    """

    def __init__(self, name: str, max_links: int) -> None:
        self._name = name
        self._max_links = max_links
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._listener: socket.socket | None = None
        self._accepting = Tasks()
        self._serving = Tasks()

    def __len__(self) -> int:
        """Connections that are open."""
        return len(self._serving)

    async def open(
        self, host: str, welcome: Callable[[socket.socket], Awaitable[FrameServer]]
    ) -> Offer:
        """Accept links; each is served by what `welcome` makes of a connection whose peer knows
        the nonce. Raises HandoffError when the port cannot be opened."""
        self._listener = await listen_on(host, 0)

        def start(sock: socket.socket) -> None:
            if len(self._serving) >= self._max_links:
                log.warning(
                    "link_refused",
                    transport=self._name,
                    error=f"{self._max_links} links are open",
                )
                sock.close()
                return
            tune(sock)
            self._serving.spawn(self._serve(sock, welcome))

        self._accepting.spawn(accept_links(self._listener, start))
        return {"port": str(self._listener.getsockname()[1]), "nonce": self._nonce.hex()}

    async def _serve(
        self, sock: socket.socket, welcome: Callable[[socket.socket], Awaitable[FrameServer]]
    ) -> None:
        try:
            async with _greeting(sock, f"{self._name} link"):
                nonce = bytearray(NONCE_BYTES)
                await fill(asyncio.get_running_loop(), sock, memoryview(nonce))
                if not secrets.compare_digest(bytes(nonce), self._nonce):
                    raise HandoffError("the peer knows another nonce")
                server = await welcome(sock)
        except HandoffError as error:
            log.warning("link_refused", transport=self._name, error=str(error))
            return
        await server.run()

    async def close(self) -> None:
        """Stop accepting, end every accepted link."""
        await self._accepting.cancel()
        await self._serving.cancel()
        if self._listener is not None:
            self._listener.close()
            self._listener = None


@contextlib.asynccontextmanager
async def knock(name: str, host: str, offer: Offer) -> AsyncIterator[tuple[str, socket.socket]]:
    """The sender's side: the receiver's address and a connection that told the offer's nonce. What
    fails inside, or takes longer than HELLO_S, closes it and is a HandoffError."""
    try:
        nonce = bytes.fromhex(offer.get("nonce", ""))
    except ValueError as error:
        raise HandoffError("the offer's nonce makes no sense") from error
    peer = f"[{host}]:{offer.get('port')}" if ":" in host else f"{host}:{offer.get('port')}"
    sock = await dial(peer)
    async with _greeting(sock, f"no {name} link to {peer}"):
        await asyncio.get_running_loop().sock_sendall(sock, nonce)
        yield peer, sock


@contextlib.asynccontextmanager
async def _greeting(sock: socket.socket, what: str) -> AsyncIterator[None]:
    """Close `sock` unless what is inside succeeds in time; raises HandoffError."""
    try:
        async with asyncio.timeout(HELLO_S):
            yield
    except BaseException as error:
        sock.close()
        if isinstance(error, (OSError, EOFError)):  # TimeoutError is an OSError
            reason = str(error) or f"no answer in {HELLO_S:g} s"
            raise HandoffError(f"{what}: {reason}") from error
        raise


async def send_message(sock: socket.socket, message: bytes) -> None:
    """Send its length, then `message`."""
    await asyncio.get_running_loop().sock_sendall(sock, _LENGTH.pack(len(message)) + message)


async def read_message(sock: socket.socket, limit: int) -> bytes:
    """What `send_message` sent. Raises HandoffError for more than `limit` bytes."""
    loop = asyncio.get_running_loop()
    length = bytearray(_LENGTH.size)
    await fill(loop, sock, memoryview(length))
    (size,) = _LENGTH.unpack(length)
    if size > limit:
        raise HandoffError(f"the peer greets with {size} bytes, at most {limit} may be")
    message = bytearray(size)
    await fill(loop, sock, memoryview(message))
    return bytes(message)
