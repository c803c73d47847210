"""Frames through UCX: InfiniBand, RoCE, or whatever else it finds between two machines.

A frame's head and header go over a TCP connection of their own, its payload by a tagged UCX message
whose tag is the frame's number. So credit, answers, order and a peer's death are those of every
transport, and UCX only moves bytes. Each link has a UCX worker of its own at both ends: what goes
wrong with one peer is thrown away with its worker. An endpoint is made from the receiver's address
only, so that bytes of a stranger are never parsed by UCX's address code.

A worker is driven by the loop: its event descriptor wakes it, and while a transfer is under way so
does a short timer, because UCX does not signal every event. Nothing waits inside UCX, and an idle
link costs nothing. The package is ucxx (ucx-py is discontinued); it is loaded for the first link,
never when this module is imported.
"""

import asyncio
import contextlib
import importlib.util
import os
import socket
from collections.abc import Callable
from typing import Any

from common.errors import HandoffError
from common.kv.budget import ByteBudget
from common.kv.transports.base import FrameHandler, Offer
from common.kv.transports.door import Door, knock, read_message, send_message
from common.kv.transports.frames import (
    BODY_TIMEOUT_S,
    JOIN_BYTES,
    MAX_FRAME_BYTES,
    AheadServer,
    FrameLink,
    FrameServer,
    Head,
    new_frame,
)
from common.kv.transports.one_ucx import claim
from common.kv.transports.tcp import RECEIVE_BUDGET_BYTES

# UCX's TCP sends 8 KiB at a time unless told otherwise, at a third of the speed. ucxx sets the
# rendezvous threshold for GPUs; UCX's own choice is better for host memory.
CONFIG = {"TCP_TX_SEG_SIZE": "1M", "TCP_RX_SEG_SIZE": "1M", "RNDV_THRESH": "auto"}
# While a transfer is under way a worker is progressed without pause until nothing has happened for
# SPIN_S, because the peer is likely to answer at once; then after TICK_S, and ever more rarely.
SPIN_S = 0.0003
TICK_S = 0.001
LONGEST_TICK_S = 0.02
# Events handled before the loop's other work gets its turn.
TURNS = 64
MAX_ADDRESS_BYTES = 16 * 1024
# A header, and a payload that is not worth a message of its own.
MAX_INLINE_BYTES = 2 * JOIN_BYTES
# A worker holds some 16 descriptors.
MAX_LINKS = 64
CLOSE_NS = 100_000_000


def missing() -> str | None:
    """Why this machine has no ucx transport; None when it has the package."""
    if importlib.util.find_spec("ucxx") is None:
        return "the package ucxx-cu12 (extra `ucx`; ucxx-cu13 beside CUDA 13) is not installed"
    return None


class UcxTransport:
    """Both sides of the ucx transport. All methods run on one loop."""

    def __init__(self) -> None:
        self._ucx: _Ucx | None = None
        self._loading = asyncio.Lock()
        self._budget = ByteBudget(RECEIVE_BUDGET_BYTES)
        self._door = Door("ucx", MAX_LINKS)

    async def _load(self) -> "_Ucx":
        """UCX, on a thread: importing it takes a second. Raises HandoffError."""
        async with self._loading:
            if self._ucx is None:
                try:
                    self._ucx = await asyncio.to_thread(_Ucx)
                except Exception as error:
                    # Whatever a library without a GPU, a driver or a device may raise.
                    raise HandoffError(
                        f"UCX does not start: {type(error).__name__}: {error}"
                    ) from error
            return self._ucx

    async def offer(self, host: str, on_frame: FrameHandler) -> Offer:
        """See SideTransport."""

        async def welcome(sock: socket.socket) -> FrameServer:
            worker = await _make_worker(await self._load())
            try:
                await send_message(sock, worker.address)
                return _Served(sock, on_frame, worker, self._budget)
            except BaseException:
                worker.close()
                raise

        return await self._door.open(host, welcome)

    async def open(self, host: str, offer: Offer) -> "UcxLink":
        """See SideTransport."""
        async with knock("ucx", host, offer) as (peer, sock):
            # Both sides load UCX at the same time, when it is the first link of both.
            worker = await _make_worker(await self._load())
            try:
                worker.connect(await read_message(sock, MAX_ADDRESS_BYTES))
                return UcxLink(peer, sock, worker)
            except BaseException:
                worker.close()
                raise

    async def close(self) -> None:
        """Stop accepting, end every accepted link."""
        await self._door.close()
        self._ucx = None


class UcxLink(FrameLink):
    """One connection to a receiver."""

    transport = "ucx"

    def __init__(self, address: str, sock: socket.socket, worker: "_Worker") -> None:
        super().__init__(address, sock, MAX_FRAME_BYTES)
        self._worker = worker

    async def _carry(self, kind: int, sequence: int, header: bytes, body: memoryview) -> None:
        inline = len(header)
        if len(body) <= JOIN_BYTES:
            header, body = header + bytes(body), memoryview(b"")
            inline = len(header)
        head = Head(kind, 0, sequence, inline + len(body), inline)
        if not body:
            await self._write(head, header)
            return
        sent = self._worker.send(body, sequence)
        await self._write(head, header)
        await sent

    def _released(self) -> None:
        self._worker.close()


class _Served(AheadServer):
    """The receiver's side of one connection."""

    def __init__(
        self, sock: socket.socket, on_frame: FrameHandler, worker: "_Worker", budget: ByteBudget
    ) -> None:
        super().__init__(sock, on_frame, MAX_FRAME_BYTES)
        self._worker = worker
        self._budget = budget

    async def _take(self, head: Head) -> None:
        if head.extra > min(head.length, MAX_INLINE_BYTES):
            raise HandoffError(f"a frame of {head.length} bytes with {head.extra} of them inline")
        await self._budget.take(head.length)
        try:
            frame = new_frame(head.length)
            async with asyncio.timeout(BODY_TIMEOUT_S):
                await self._inlet.fill(frame[: head.extra])
            # Asked for at once, so that UCX has several payloads to move.
            rest = frame[head.extra :]
            whole = self._worker.receive(rest, head.sequence) if rest else None
        except BaseException:
            self._budget.give(head.length)
            raise
        self._handle_when_whole(head, frame, whole, lambda _: self._budget.give(head.length))

    async def _released(self) -> None:
        self._worker.close()
        await super()._released()


class _Ucx:
    """The library and one context of this process. Made on a thread."""

    def __init__(self) -> None:
        claim("ucx")
        # ucxx sets variables for GPUs when it is imported, and UCX complains of those it does not
        # know on a machine without one. They are the only way to tell it.
        os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
        import ucxx._lib.libucxx as api
        from ucxx._lib.arr import Array

        self.api, self.array = api, Array
        self.context = api.UCXContext(CONFIG, (api.Feature.TAG, api.Feature.WAKEUP))


async def _make_worker(ucx: _Ucx) -> "_Worker":
    """A worker for one link; made on a thread, it takes tens of milliseconds."""

    def make() -> Any:
        made = ucx.api.UCXWorker(ucx.context)
        made.init_blocking_progress_mode()
        return made

    try:
        return _Worker(ucx, await asyncio.to_thread(make))
    except ucx.api.UCXError as error:
        raise HandoffError(f"no UCX worker: {error}") from error


class _Worker:
    """A UCX worker on the loop. Its requests become futures."""

    def __init__(self, ucx: _Ucx, worker: Any) -> None:
        self._ucx = ucx
        self._worker = worker
        self._endpoint: Any = None
        self._loop = asyncio.get_running_loop()
        self._file = worker.epoll_file_descriptor
        # Request, its memory (which UCX only points to), and who waits for it.
        self._open: list[tuple[Any, Any, asyncio.Future[None]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._soon: asyncio.Handle | None = None
        self._moved = 0.0  # when UCX last did something
        self._loop.add_reader(self._file, self._turn)
        self._turn()

    @property
    def address(self) -> bytes:
        """What a peer needs to connect."""
        return bytes(self._worker.address.tobytes())

    def connect(self, address: bytes) -> None:
        """Make `send` go to the worker with this address. Raises HandoffError."""
        try:
            self._endpoint = self._worker.create_endpoint_from_worker_address(
                self._ucx.api.UCXAddress.create_from_buffer(address), True
            )
        except self._ucx.api.UCXError as error:
            raise HandoffError(f"UCX cannot connect: {error}") from error

    def send(self, body: memoryview, tag: int) -> "asyncio.Future[None]":
        """Done when `body` may be reused."""
        return self._start(lambda memory, at: self._endpoint.tag_send(memory, at), body, tag)

    def receive(self, body: memoryview, tag: int) -> "asyncio.Future[None]":
        """Done when `body` is filled."""
        return self._start(lambda memory, at: self._worker.tag_recv(memory, at), body, tag)

    def _start(
        self, operation: Callable[[Any, Any], Any], body: memoryview, tag: int
    ) -> "asyncio.Future[None]":
        done = self._loop.create_future()
        if self._worker is None:
            done.set_exception(HandoffError("the UCX link is closed"))
            return done
        memory = self._ucx.array(body)
        try:
            request = operation(memory, self._ucx.api.UCXXTag(tag))
        except self._ucx.api.UCXError as error:
            done.set_exception(HandoffError(f"UCX: {error}"))
            return done
        self._open.append((request, memory, done))
        self._turn()
        return done

    def _turn(self) -> None:
        """Progress while something happens, then sleep until the descriptor or the timer."""
        if self._worker is None:
            return
        moved = False
        for _ in range(TURNS):
            if not self._worker.progress_once():
                break
            moved = True
        self._settle()
        now = self._loop.time()
        if moved:
            self._moved = now
        if self._open and now - self._moved < SPIN_S:
            self._again()
            return
        if not self._worker.arm():
            self._again()
            return
        if self._open and self._timer is None:
            tick_s = min(max(TICK_S, (now - self._moved) / 8), LONGEST_TICK_S)
            self._timer = self._loop.call_later(tick_s, self._tick)

    def _again(self) -> None:
        if self._soon is None:
            self._soon = self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._soon = None
        self._turn()

    def _tick(self) -> None:
        self._timer = None
        self._turn()

    def _settle(self) -> None:
        """Resolve the futures of what is over."""
        ended = [entry for entry in self._open if entry[0].completed]
        if not ended:
            return
        self._open = [entry for entry in self._open if entry not in ended]
        for request, _, done in ended:
            try:
                request.check_error()
            except self._ucx.api.UCXError as error:
                if not done.done():
                    done.set_exception(HandoffError(f"UCX: {error}"))
            else:
                if not done.done():
                    done.set_result(None)

    def close(self) -> None:
        """Give up what is under way. Afterwards UCX points to no memory of ours."""
        if self._worker is None:
            return
        self._loop.remove_reader(self._file)
        for handle in (self._timer, self._soon):
            if handle is not None:
                handle.cancel()
        with contextlib.suppress(self._ucx.api.UCXError):
            if self._endpoint is not None:
                self._endpoint.close_blocking(period=CLOSE_NS, max_attempts=1)
            self._worker.cancel_inflight_requests(period=CLOSE_NS, max_attempts=1)
        for _, _, done in self._open:
            if not done.done():
                done.set_exception(HandoffError("the UCX link was closed"))
                done.exception()
        self._endpoint = self._worker = None
        self._open.clear()
