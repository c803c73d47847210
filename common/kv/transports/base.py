"""What a transport of the data plane is: framed, two-sided, acknowledged.

A sender connects to an address and sends frames; the receiver's handler sees each whole frame and
answers with a status, which travels back to the sender. Everything runs on the loop of one
LoopThread, which is never the loop of a service's gRPC server. The transport promises that a frame
arrives whole or not at all; who may send it and whether its bytes are right is checked above.

Two kinds stand behind it. `tcp` reaches any peer by host and port. A SideTransport is faster where
it works, and is opened with what the peer offers over tcp. common.kv.transports.plane chooses.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

# Called on the transport's loop with a frame's bytes, which stay as they are until the result is
# there and may be another frame's afterwards. The result, 0 to 65535, is the sender's status.
FrameHandler = Callable[[memoryview], Awaitable[int]]

# Enough for a few transports that do not answer to be tried before one that does.
PROBE_TIMEOUT_S = 15.0

# What a peer needs to open a side transport's link: names and short texts, sent as JSON.
Offer = Mapping[str, str]


class Link(Protocol):
    """A connection to one receiver."""

    @property
    def transport(self) -> str:
        """The transport's name."""
        ...

    @property
    def closed(self) -> bool:
        """True once the peer is gone or `close` was called; such a link never works again."""
        ...

    async def send(
        self, header: bytes, payload: bytes | bytearray | memoryview
    ) -> "asyncio.Future[int]":
        """Send one frame, `header` then `payload`. Waits for credit; on return the bytes were
        written and `payload` may be reused. The result holds the receiver's status
        once it has answered.

        Raises HandoffError when the link breaks, here or in the result.
        """
        ...

    async def probe(self) -> float:
        """Send random bytes, have their checksum come back; the seconds it took.

        Raises HandoffError when the link breaks or the checksum is another one.
        """
        ...

    async def close(self) -> None: ...


class Transport(Protocol):
    """What connectors use: the data plane, or tcp alone."""

    async def listen(self, host: str, port: int, on_frame: FrameHandler) -> int:
        """Accept links; returns the port that was bound (any free one where `port` is 0)."""
        ...

    async def connect(self, address: str) -> Link:
        """A live link to `address` (host:port), shared by all who ask for the same address.

        Raises HandoffError when nobody answers.
        """
        ...

    async def probe(self, address: str, timeout_s: float = PROBE_TIMEOUT_S) -> float:
        """A real test transfer over the link to `address`; returns the seconds it took.

        Raises HandoffError when nobody answers in time or bytes come in changed.
        """
        ...

    def take_events(self) -> dict[str, int]:
        """Counters since the last call, by name. From any thread."""
        ...

    def links(self) -> dict[str, str]:
        """Which transport is in use to which address. From any thread."""
        ...

    async def close(self) -> None: ...


class SideTransport(Protocol):
    """A way to a peer that tcp reaches too; see common.kv.transports.SIDE_TRANSPORTS."""

    async def offer(self, host: str, on_frame: FrameHandler) -> Offer:
        """Accept links (on `host`, where that means something); returns what peers need to open
        one. Raises HandoffError when this process cannot accept any."""
        ...

    async def open(self, host: str, offer: Offer) -> Link:
        """A new link to the peer that made `offer` and that tcp reaches at `host`.

        Raises HandoffError when there is no way, such as between two machines for shared memory.
        """
        ...

    async def close(self) -> None: ...
