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
import secrets
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import structlog

from common.errors import HandoffError
from common.kv.budget import ByteBudget
from common.kv.transports.base import FrameHandler, Offer
from common.kv.transports.frames import (
    BODY_TIMEOUT_S,
    JOIN_BYTES,
    MAX_FRAME_BYTES,
    WINDOW_FRAMES,
    FrameLink,
    FrameServer,
    Head,
    Tasks,
    accept_links,
    fill,
    new_frame,
)
from common.kv.transports.tcp import RECEIVE_BUDGET_BYTES, dial, listen_on, tune

log = structlog.get_logger("transport")

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
# Of which loading the library may take most.
HELLO_S = 8.0
NONCE_BYTES = 16
MAX_ADDRESS_BYTES = 16 * 1024
# A header, and a payload that is not worth a message of its own.
MAX_INLINE_BYTES = 2 * JOIN_BYTES
# A worker holds some 16 descriptors.
MAX_LINKS = 64
CLOSE_NS = 100_000_000
_LENGTH = struct.Struct("<I")
# The process that loaded the library, whose state is the process's.
_loaded_in: int | None = None


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
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._listener: socket.socket | None = None
        self._accepting = Tasks()
        self._serving = Tasks()

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

    # Receiver -----------------------------------------------------------------------------

    async def offer(self, host: str, on_frame: FrameHandler) -> Offer:
        """See SideTransport."""
        self._listener = await listen_on(host, 0)

        def start(sock: socket.socket) -> None:
            if len(self._serving) >= MAX_LINKS:
                log.warning("ucx_link_refused", links=MAX_LINKS)
                sock.close()
                return
            tune(sock)
            self._serving.spawn(self._serve(sock, on_frame))

        self._accepting.spawn(accept_links(self._listener, start))
        return {"port": str(self._listener.getsockname()[1]), "nonce": self._nonce.hex()}

    async def _serve(self, sock: socket.socket, on_frame: FrameHandler) -> None:
        loop = asyncio.get_running_loop()
        worker = None
        try:
            async with asyncio.timeout(HELLO_S):
                nonce = bytearray(NONCE_BYTES)
                await fill(loop, sock, memoryview(nonce))
                if not secrets.compare_digest(bytes(nonce), self._nonce):
                    raise HandoffError("the peer knows another nonce")
                worker = await _make_worker(await self._load())
                address = worker.address
                await loop.sock_sendall(sock, _LENGTH.pack(len(address)) + address)
        except (OSError, EOFError, HandoffError) as error:  # TimeoutError is an OSError
            log.warning("ucx_link_failed", error=str(error) or type(error).__name__)
            if worker is not None:
                worker.close()
            sock.close()
            return
        await _Served(sock, on_frame, worker, self._budget).run()

    # Sender -------------------------------------------------------------------------------

    async def open(self, host: str, offer: Offer) -> "UcxLink":
        """See SideTransport."""
        try:
            nonce = bytes.fromhex(offer.get("nonce", ""))
        except ValueError as error:
            raise HandoffError("the offer's nonce makes no sense") from error
        peer = f"[{host}]:{offer.get('port')}" if ":" in host else f"{host}:{offer.get('port')}"
        sock = await dial(peer)
        worker = None
        try:
            async with asyncio.timeout(HELLO_S):
                await asyncio.get_running_loop().sock_sendall(sock, nonce)
                # Both sides load UCX at the same time, when it is the first link of both.
                worker = await _make_worker(await self._load())
                worker.connect(await _read_address(sock))
        except BaseException as error:
            if worker is not None:
                worker.close()
            sock.close()
            if isinstance(error, (OSError, EOFError)):  # TimeoutError is an OSError
                reason = str(error) or f"no answer in {HELLO_S:g} s"
                raise HandoffError(f"no UCX link to {peer}: {reason}") from error
            raise
        return UcxLink(peer, sock, worker)

    async def close(self) -> None:
        """Stop accepting, end every accepted link."""
        await self._accepting.cancel()
        await self._serving.cancel()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
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


class _Coming(NamedTuple):
    """A frame whose head is here; `whole` resolves when its payload is too."""

    head: Head
    frame: memoryview
    whole: "asyncio.Future[None] | None"


class _Served(FrameServer):
    """The receiver's side of one connection. Heads are read ahead of the payloads, so that the end
    of the connection is seen while a payload is awaited."""

    def __init__(
        self, sock: socket.socket, on_frame: FrameHandler, worker: "_Worker", budget: ByteBudget
    ) -> None:
        super().__init__(sock, on_frame, MAX_FRAME_BYTES)
        self._worker = worker
        self._budget = budget
        self._unhandled = 0  # bytes that the budget gave for frames that no handler has yet
        self._coming: asyncio.Queue[_Coming] = asyncio.Queue(2 * WINDOW_FRAMES)
        self._ordering = asyncio.create_task(self._handle_in_order())

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
        self._unhandled += head.length
        self._coming.put_nowait(_Coming(head, frame, whole))

    async def _handle_in_order(self) -> None:
        """As the heads came."""
        try:
            while True:
                head, frame, whole = await self._coming.get()
                if whole is not None:
                    async with asyncio.timeout(BODY_TIMEOUT_S):
                        await whole
                self._unhandled -= head.length
                self._handle_soon(head, frame, partial(self._give_back, head.length))
        except (OSError, HandoffError) as error:
            log.warning("link_broke", error=str(error) or "a payload did not come")
        finally:
            self.hang_up()

    def _give_back(self, length: int, _: bool) -> None:
        self._budget.give(length)

    async def _released(self) -> None:
        self._ordering.cancel()
        await asyncio.wait([self._ordering], timeout=1.0)
        self._worker.close()
        self._budget.give(self._unhandled)


class _Ucx:
    """The library and one context of this process. Made on a thread."""

    def __init__(self) -> None:
        global _loaded_in
        if _loaded_in not in (None, os.getpid()):
            # A child inherits the library's state without its threads: nothing would ever arrive.
            raise RuntimeError("it was loaded before this process was forked; fork before that")
        _loaded_in = os.getpid()
        # ucxx sets variables for GPUs when it is imported, and UCX complains of those it does not
        # know on a machine without one. They are the only way to tell it.
        os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
        import ucxx._lib.libucxx as api
        from ucxx._lib.arr import Array

        self.api, self.array = api, Array
        self.context = api.UCXContext(CONFIG, (api.Feature.TAG, api.Feature.WAKEUP))


async def _read_address(sock: socket.socket) -> bytes:
    """The receiver's UCX address, as it sends it after the nonce."""
    loop = asyncio.get_running_loop()
    length = bytearray(_LENGTH.size)
    await fill(loop, sock, memoryview(length))
    (size,) = _LENGTH.unpack(length)
    if size > MAX_ADDRESS_BYTES:
        raise HandoffError(f"the peer's UCX address has {size} bytes")
    address = bytearray(size)
    await fill(loop, sock, memoryview(address))
    return bytes(address)


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
