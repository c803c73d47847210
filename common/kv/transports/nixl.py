"""Frames through NIXL, NVIDIA's library for moving memory between machines, over its UCX backend.

The sender copies a frame into its staging memory and announces it on a TCP connection; the receiver
reads it from there into memory of its own, and the extent is its until it answers. So nobody ever
writes into another process: a frame that comes late, or for a link that is gone, cannot land in
memory that has another use by now. Credit, answers, order and a peer's death are matters of the
connection.

Each link has an agent of its own at both ends: what goes wrong with a peer is thrown away with it.
The library's progress thread, which polls without end, is off. An agent is driven by the loop while
something is under way (a read here, an unanswered frame there) and costs nothing otherwise.

Only the library's bindings are loaded, for the first link. Its Python layer is left out: it pickles
descriptors, and resets the process's logging when it is imported. What a sender tells of itself is
a NixlSender (protos/baton/v1/transport.proto).
"""

import asyncio
import contextlib
import importlib.machinery
import importlib.util
import mmap
import secrets
import socket
import sys
import threading
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import xxhash
from google.protobuf.message import DecodeError

from baton.v1.transport_pb2 import MemoryRange, NixlSender
from common.errors import HandoffError
from common.kv.budget import ByteBudget
from common.kv.transports.arena import Room
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

# By the CUDA that it was built for; without a GPU they are the same.
PACKAGES = ("nixl_cu12", "nixl_cu13")
# UCX's TCP sends 8 KiB at a time unless told otherwise, at a third of the speed.
BACKEND = {"engine_config": "TCP_TX_SEG_SIZE=1M,TCP_RX_SEG_SIZE=1M"}
# Of each end of a link: what may be in flight. Registered, which for a network card means pinned.
STAGING_BYTES = 64 * 1024 * 1024
# In place of an offset: the body follows its head, being small or larger than the staging memory.
INLINE = 2**64 - 1
# While something is under way an agent is driven without pause for as long as it should take from
# when something was begun or ended: the peer is likely to answer at once, and the bytes then come
# at BYTES_PER_S. After that, or LONGEST_SPIN_S, it is driven after TICK_S, and ever more rarely.
SPIN_S = 0.0003
LONGEST_SPIN_S = 0.004
BYTES_PER_S = 1e9
TICK_S = 0.001
LONGEST_TICK_S = 0.005
# Some 64 KiB of addresses and keys, on a machine with many network cards.
MAX_GREETING_BYTES = 256 * 1024
WELCOME = b"welcome"
# An agent holds some 12 descriptors.
MAX_LINKS = 32
TCP_ESTABLISHED = 1
_loading = threading.Lock()


def missing() -> str | None:
    """Why this machine has no nixl transport; None when it has the package."""
    if sys.platform != "linux":
        return "it needs Linux"
    if _package() is None:
        return "the package nixl-cu12 (extra `nixl`; nixl-cu13 beside CUDA 13) is not installed"
    return None


class NixlTransport:
    """Both sides of the nixl transport. All methods run on one loop."""

    def __init__(self) -> None:
        self._budget = ByteBudget(RECEIVE_BUDGET_BYTES)
        self._door = Door("nixl", MAX_LINKS)

    async def offer(self, host: str, on_frame: FrameHandler) -> Offer:
        """See SideTransport."""

        async def welcome(sock: socket.socket) -> FrameServer:
            greeting = await read_message(sock, MAX_GREETING_BYTES)
            agent = await _make_agent()
            try:
                agent.meet(greeting)
                await send_message(sock, WELCOME)
                return _Served(sock, on_frame, agent, self._budget)
            except BaseException:
                agent.close()
                raise

        return await self._door.open(host, welcome)

    async def open(self, host: str, offer: Offer) -> "NixlLink":
        """See SideTransport."""
        async with knock("nixl", host, offer) as (peer, sock):
            agent = await _make_agent()
            try:
                await send_message(sock, agent.greeting())
                if await read_message(sock, len(WELCOME)) != WELCOME:
                    raise HandoffError(f"{peer} does not welcome a link by nixl")
                return NixlLink(peer, sock, agent)
            except BaseException:
                agent.close()
                raise

    async def close(self) -> None:
        """Stop accepting, end every accepted link."""
        await self._door.close()


class NixlLink(FrameLink):
    """One connection to a receiver, and the memory that it reads from."""

    transport = "nixl"

    def __init__(self, address: str, sock: socket.socket, agent: "_Agent") -> None:
        super().__init__(address, sock, MAX_FRAME_BYTES)
        self._agent = agent
        self._memory: np.ndarray | None = agent.memory
        self._room = Room(STAGING_BYTES, STAGING_BYTES)

    async def _carry(self, kind: int, sequence: int, header: bytes, body: memoryview) -> None:
        size = len(header) + len(body)
        if not JOIN_BYTES < size <= STAGING_BYTES:
            await self._write(Head(kind, 0, sequence, size, INLINE), header, body)
            return
        start = await self._room.take(sequence, size)
        if self._memory is None:
            return
        middle = start + len(header)
        self._memory[start:middle] = np.frombuffer(header, np.uint8)
        # numpy lets go of the interpreter's lock while it copies.
        np.copyto(self._memory[middle : start + size], np.frombuffer(body, np.uint8))
        self._agent.lend(sequence, size)
        await self._write(Head(kind, 0, sequence, size, start))

    def _answered(self, sequence: int) -> None:
        self._agent.take_back(sequence)
        self._room.give(sequence)

    def _released(self) -> None:
        self._agent.close()
        self._memory = None
        self._room.close()


class _Served(AheadServer):
    """The receiver's side of one connection. A frame is read to where it lies in the sender's
    staging memory; the memory lives as long as the last frame in it."""

    def __init__(
        self, sock: socket.socket, on_frame: FrameHandler, agent: "_Agent", budget: ByteBudget
    ) -> None:
        super().__init__(sock, on_frame, MAX_FRAME_BYTES)
        self._agent = agent
        self._budget = budget
        self._taken: dict[int, int] = {}  # extents of frames that are not answered: start, end

    async def _take(self, head: Head) -> None:
        if head.extra == INLINE:
            await self._take_inline(head)
            return
        start, end = head.extra, head.extra + head.length
        if end > STAGING_BYTES or not head.length:
            raise HandoffError(f"a frame at [{start}, {end}) is outside of the staging memory")
        if any(start < b and a < end for a, b in self._taken.items()):
            raise HandoffError(f"a frame at [{start}, {end}) lies on one that is not answered")
        self._taken[start] = end
        frame = memoryview(self._agent.memory)[start:end]
        whole = self._agent.read(start, head.length)
        self._handle_when_whole(head, frame, whole, lambda _: None)

    def _handled(self, head: Head) -> None:
        self._taken.pop(head.extra, None)

    async def _take_inline(self, head: Head) -> None:
        await self._budget.take(head.length)
        try:
            frame = new_frame(head.length)
            async with asyncio.timeout(BODY_TIMEOUT_S):
                await self._inlet.fill(frame)
        except BaseException:
            self._budget.give(head.length)
            raise
        self._handle_when_whole(head, frame, None, lambda _: self._budget.give(head.length))

    def _check_alive(self) -> None:
        # A process that let go of its memory may have been read all the same, where UCX copies from
        # process to process. It hung up before.
        if self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != TCP_ESTABLISHED:
            raise HandoffError("the sender left before its frame was read")

    async def _released(self) -> None:
        self._agent.close()
        await super()._released()


async def _make_agent() -> "_Agent":
    """An agent for one link, made on a thread: the first takes half a second. Raises
    HandoffError."""
    try:
        return _Agent(await asyncio.to_thread(_make))
    except Exception as error:
        # Whatever a library without a GPU, a driver or a device may raise.
        raise HandoffError(f"NIXL does not start: {type(error).__name__}: {error}") from error


class _Made(NamedTuple):
    """What one link has of the library: its module, an agent with one backend, and memory that is
    registered with it (STAGING_BYTES of uint8)."""

    api: ModuleType
    errors: tuple[type[Exception], ...]
    name: str
    agent: Any
    backend: int
    memory: np.ndarray
    registered: Any


def _make() -> _Made:
    """On a thread. Raises what the library raises."""
    api = _bindings()
    config = api.nixlAgentConfig()
    config.useProgThread = False
    config.useListenThread = False
    config.syncMode = api.NIXL_THREAD_SYNC_NONE  # one thread at a time: this one, then the loop's
    name = f"baton-{secrets.token_hex(16)}"
    agent = api.nixlAgent(name, config)
    backend = agent.createBackend("UCX", BACKEND)
    memory = np.frombuffer(mmap.mmap(-1, STAGING_BYTES), np.uint8)
    extent = (memory.ctypes.data, STAGING_BYTES, 0, "")
    registered = api.nixlRegDList(api.DRAM_SEG, [extent])
    agent.registerMem(registered, [backend])
    # They have no base class of their own.
    errors = tuple(v for k, v in vars(api).items() if k.startswith("nixl") and k.endswith("Error"))
    return _Made(api, errors, name, agent, backend, memory, registered)


def _package() -> importlib.machinery.ModuleSpec | None:
    """The package that is installed, not imported."""
    return next((spec for name in PACKAGES if (spec := importlib.util.find_spec(name))), None)


def _bindings() -> ModuleType:
    """The library's extension module alone. Raises ImportError, RuntimeError."""
    claim("nixl")
    package = _package()
    if package is None:
        raise ImportError(missing())
    name = f"{package.name}._bindings"
    with _loading:
        if name not in sys.modules:
            finder = importlib.machinery.PathFinder
            spec = finder.find_spec(name, package.submodule_search_locations)
            if spec is None or spec.loader is None:
                raise ImportError(f"{package.name} has no bindings for this Python")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.modules[name] = module
        return sys.modules[name]


class _Read(NamedTuple):
    """A read under way: the library's request, its bytes, and who waits for it."""

    request: int
    size: int
    done: "asyncio.Future[None]"


class _Agent:
    """An agent on the loop: a sender's, which lends its memory, or a receiver's, which reads."""

    def __init__(self, made: _Made) -> None:
        self._made: _Made | None = made
        self._loop = asyncio.get_running_loop()
        self._peer = ""
        self._source = MemoryRange()
        self._lent: dict[int, int] = {}  # bytes of frames that may be read, by number
        self._reads: list[_Read] = []
        self._moved = 0.0  # when something was begun or ended
        self._spin_s = SPIN_S
        self._next: asyncio.Handle | None = None
        # Kept by who has frames in it, whatever becomes of the agent.
        self.memory = made.memory

    # Sender -------------------------------------------------------------------------------

    def greeting(self) -> bytes:
        """What the receiver needs: a NixlSender."""
        assert self._made is not None
        metadata = self._made.agent.getLocalMD()
        message = NixlSender(
            agent=self._made.name,
            metadata=metadata,
            metadata_checksum=xxhash.xxh3_64_intdigest(metadata),
            staging=MemoryRange(address=self.memory.ctypes.data, length=STAGING_BYTES),
        )
        return message.SerializeToString()

    def lend(self, sequence: int, size: int) -> None:
        """Frame `sequence` is there to be read. Where no hardware does it, this agent answers."""
        self._lent[sequence] = size
        self._begun_or_ended()

    def take_back(self, sequence: int) -> None:
        """Frame `sequence` was answered."""
        self._lent.pop(sequence, None)
        self._begun_or_ended()

    # Receiver -----------------------------------------------------------------------------

    def meet(self, greeting: bytes) -> None:
        """Take in what a sender says of itself. Raises HandoffError."""
        assert self._made is not None
        try:
            sender = NixlSender.FromString(greeting)
        except DecodeError as error:
            raise HandoffError(f"a sender's greeting cannot be read: {error}") from error
        if xxhash.xxh3_64_intdigest(sender.metadata) != sender.metadata_checksum:
            raise HandoffError("a sender's metadata has another checksum")
        staging = sender.staging
        if staging.length != STAGING_BYTES or staging.address >= 2**64 - STAGING_BYTES:
            raise HandoffError(
                f"a sender stages frames in {staging.length} bytes at {staging.address:#x}, "
                f"here it is {STAGING_BYTES}: is it of this version?"
            )
        try:
            peer = self._made.agent.loadRemoteMD(sender.metadata).decode()
        except (*self._made.errors, UnicodeDecodeError) as error:
            raise HandoffError(f"a sender's metadata cannot be read: {error}") from error
        if peer != sender.agent:
            raise HandoffError(f"the sender {sender.agent!r} brings the metadata of {peer!r}")
        self._peer, self._source = peer, staging

    def read(self, start: int, length: int) -> "asyncio.Future[None]":
        """Read bytes [start, start + length) of the sender's staging memory to the same place of
        `memory`; done when they are here."""
        done = self._loop.create_future()
        if self._made is None:
            done.set_exception(HandoffError("the link is closed"))
            return done
        api, agent = self._made.api, self._made.agent
        local = (self.memory.ctypes.data + start, length, 0)
        remote = (self._source.address + start, length, self._source.device_id)
        try:
            request = agent.createXferReq(
                api.NIXL_READ,
                api.nixlXferDList(api.DRAM_SEG, [local]),
                api.nixlXferDList(api.DRAM_SEG, [remote]),
                self._peer,
                "",
                [self._made.backend],
            )
        except self._made.errors as error:
            done.set_exception(HandoffError(f"NIXL cannot read: {error}"))
            return done
        read = _Read(request, length, done)
        try:
            agent.postXferReq(request, "")
        except self._made.errors as error:
            self._end(read, f"NIXL cannot read: {error}")
            return done
        self._reads.append(read)
        self._begun_or_ended()
        return done

    # Both -----------------------------------------------------------------------------------

    def _begun_or_ended(self) -> None:
        size = sum(self._lent.values()) + sum(read.size for read in self._reads)
        self._spin_s = min(SPIN_S + size / BYTES_PER_S, LONGEST_SPIN_S)
        self._moved = self._loop.time()
        self._drive()

    def _drive(self) -> None:
        """Let the library work, and have it called again while something is under way."""
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if self._made is None:
            return
        try:
            # Nothing but calls like this one moves bytes. Notifications are not used.
            self._made.agent.getNotifs({}, [self._made.backend])
        except self._made.errors as error:
            self._end_all(f"NIXL: {error}")
        now = self._loop.time()
        if self._settle():
            self._moved = now
        if not self._reads and not self._lent:
            return
        if now - self._moved < self._spin_s:
            self._next = self._loop.call_soon(self._drive)
        else:
            tick_s = min(max(TICK_S, (now - self._moved) / 8), LONGEST_TICK_S)
            self._next = self._loop.call_later(tick_s, self._drive)

    def _settle(self) -> bool:
        """Resolve the futures of reads that are over; False when there is none."""
        assert self._made is not None
        open_before, self._reads = self._reads, []
        for read in open_before:
            reason = ""
            try:
                state = self._made.agent.getXferStatus(read.request)
                if state == self._made.api.NIXL_IN_PROG:
                    self._reads.append(read)
                    continue
                if state != self._made.api.NIXL_SUCCESS:
                    reason = f"NIXL could not read: {state}"
            except self._made.errors as error:
                reason = f"NIXL could not read: {error}"
            self._end(read, reason)
        return len(self._reads) < len(open_before)

    def _end(self, read: _Read, reason: str = "") -> None:
        """A read is over, or given up for this reason."""
        assert self._made is not None
        with contextlib.suppress(*self._made.errors):
            self._made.agent.releaseXferReq(read.request)
        if read.done.done():
            return
        if reason:
            read.done.set_exception(HandoffError(reason))
            read.done.exception()  # seen: nobody may wait for it any more
        else:
            read.done.set_result(None)

    def _end_all(self, reason: str) -> None:
        for read in self._reads:
            self._end(read, reason)
        self._reads.clear()

    def close(self) -> None:
        """Give up what is under way. Afterwards the library points to no memory of ours, which goes
        with the last frame in it."""
        if self._made is None:
            return
        if self._next is not None:
            self._next.cancel()
        self._end_all("the link was closed")
        with contextlib.suppress(*self._made.errors):
            if self._peer:
                self._made.agent.invalidateRemoteMD(self._peer)
            self._made.agent.deregisterMem(self._made.registered, [self._made.backend])
        # The last reference: the library ends its connections here.
        self._made = None
