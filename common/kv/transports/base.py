"""What a transport of the data plane is: framed, two-sided, acknowledged.

A sender connects to an address and sends frames; the receiver's handler sees each whole frame and
answers with a status, which travels back to the sender. Everything runs on the loop of one
LoopThread, which is never the loop of a service's gRPC server. The transport promises that a frame
arrives whole or not at all; who may send it and whether its bytes are right is checked above.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

# Called on the transport's loop with a frame's bytes (owned by the callee); its result, 0 to 65535,
# is the status that the sender gets.
FrameHandler = Callable[[memoryview], Awaitable[int]]


class Link(Protocol):
    """A connection to one receiver."""

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

    async def close(self) -> None: ...


class Transport(Protocol):
    """One way to move frames; see common.kv.transports.TRANSPORTS."""

    async def listen(self, host: str, port: int, on_frame: FrameHandler) -> int:
        """Accept links; returns the port that was bound (any free one where `port` is 0)."""
        ...

    async def connect(self, address: str) -> Link:
        """A live link to `address` (host:port), shared by all who ask for the same address.

        Raises HandoffError when nobody answers.
        """
        ...

    async def probe(self, address: str, timeout_s: float = 5.0) -> float:
        """A real test transfer there and back; returns the seconds it took.

        Raises HandoffError when the bytes do not come back.
        """
        ...

    async def close(self) -> None: ...
