"""Frames through shared memory, between processes of one machine and one user.

The receiver makes one memory file a link (memfd: it has no name, so nothing can be left behind) and
passes it over a unix socket. The sender copies a frame into a free extent and announces it on the
socket; the extent is the receiver's until its answer. Two copies in all, into the memory and out of
it into a page; no byte of a page is ever written by the sender. Sockets wake both sides, so that
idle costs nothing, and end with their process, so that death is seen at once.

Whether two processes are on one machine is not guessed from names: the receiver keeps a socket and
a file with a nonce in a folder under /dev/shm, and who can read that nonce can share memory.
"""

import asyncio
import contextlib
import fcntl
import mmap
import os
import re
import secrets
import socket
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import structlog

from common.errors import HandoffError
from common.kv.transports.arena import Arena, Room
from common.kv.transports.base import FrameHandler, Offer
from common.kv.transports.frames import (
    MAX_FRAME_BYTES,
    FrameLink,
    FrameServer,
    Head,
    Tasks,
    accept_links,
)

log = structlog.get_logger("transport")

FOLDER = Path("/dev/shm")
PREFIX = "baton-"
# Bytes in flight on one link; a single larger frame may go alone. It bounds the memory of a link,
# of which only what was used at least once is real.
IN_FLIGHT_BYTES = 64 * 1024 * 1024
ARENA_BYTES = -(-MAX_FRAME_BYTES // Arena.ALIGN) * Arena.ALIGN
# Each may come to hold IN_FLIGHT_BYTES; who comes after them is sent to another transport.
MAX_LINKS = 32
CONNECT_TIMEOUT_S = 2.0
# A folder without a lock is either being made or was left by a process that died making it.
YOUNG_S = 10.0
# A receiver's lock goes with its process, but perhaps after its sockets.
DEATH_S = 0.2
NAME = re.compile(PREFIX + r"[0-9a-f]{16}")


def missing() -> str | None:
    """Why this machine has no shm transport; None when it has."""
    if sys.platform != "linux":
        return "it needs Linux (memfd_create)"
    if not os.access(FOLDER, os.W_OK):
        return f"{FOLDER} is not there or not writable"
    return None


class ShmTransport:
    """Both sides of the shm transport. All methods run on one loop."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._parent = folder
        self._home: _Home | None = None
        self._listener: socket.socket | None = None
        self._serving = Tasks()
        self._accepting = Tasks()

    # Receiver -----------------------------------------------------------------------------

    async def offer(self, host: str, on_frame: FrameHandler) -> Offer:
        """See SideTransport; `host` means nothing here."""
        if reason := missing():
            raise HandoffError(f"no shared memory here: {reason}")
        try:
            sweep(self._parent)
            self._home = _Home(self._parent)
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.setblocking(False)
            self._listener.bind(str(self._home.socket))
            self._listener.listen(128)
        except OSError as error:
            await self.close()
            raise HandoffError(f"cannot offer shared memory in {self._parent}: {error}") from error
        self._accepting.spawn(
            accept_links(self._listener, lambda sock: self._serve(sock, on_frame))
        )
        return {"folder": self._home.folder.name, "nonce": self._home.nonce}

    def _serve(self, sock: socket.socket, on_frame: FrameHandler) -> None:
        if len(self._serving) >= MAX_LINKS:
            log.warning("shm_link_refused", links=MAX_LINKS)
            sock.close()
            return
        try:
            memory = _make_memory(sock)
        except OSError as error:
            log.warning("shm_link_failed", error=str(error))
            sock.close()
            return
        self._serving.spawn(_Served(sock, on_frame, memory).run())

    # Sender -------------------------------------------------------------------------------

    async def open(self, host: str, offer: Offer) -> "ShmLink":
        """See SideTransport."""
        folder = _check_nonce(self._parent, offer.get("folder", ""), offer.get("nonce", ""))
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await asyncio.get_running_loop().sock_connect(sock, str(folder / "socket"))
                memory = await _receive_memory(sock)
        except BaseException as error:
            sock.close()
            if isinstance(error, OSError):  # TimeoutError is one
                reason = str(error) or f"no answer in {CONNECT_TIMEOUT_S:g} s"
                raise HandoffError(f"cannot share memory through {folder}: {reason}") from error
            raise
        return ShmLink(folder, sock, memory)

    async def close(self) -> None:
        """Stop accepting, end every accepted link, remove the folder."""
        await self._accepting.cancel()
        await self._serving.cancel()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._home is not None:
            self._home.remove()
            self._home = None


class ShmLink(FrameLink):
    """One connection to a receiver, and the memory shared with it."""

    transport = "shm"

    def __init__(self, folder: Path, sock: socket.socket, memory: mmap.mmap) -> None:
        super().__init__(str(folder), sock, min(MAX_FRAME_BYTES, len(memory)))
        self._folder = folder
        self._memory: np.ndarray | None = np.frombuffer(memory, np.uint8)
        self._room = Room(len(memory), IN_FLIGHT_BYTES)

    async def _carry(self, kind: int, sequence: int, header: bytes, body: memoryview) -> None:
        # The payload starts on a cache line: copies of it are faster on both sides.
        gap = -len(header) % 64
        start = await self._room.take(sequence, gap + len(header) + len(body))
        if self._memory is None:
            return
        middle, end = start + gap + len(header), start + gap + len(header) + len(body)
        self._memory[start + gap : middle] = np.frombuffer(header, np.uint8)
        # numpy lets go of the interpreter's lock while it copies.
        np.copyto(self._memory[middle:end], np.frombuffer(body, np.uint8))
        await self._write(Head(kind, 0, sequence, end - start - gap, start + gap))

    def _answered(self, sequence: int) -> None:
        self._room.give(sequence)

    def _released(self) -> None:
        self._memory = None
        self._room.close()
        # A receiver that was killed could not clean up behind itself.
        self._loop.call_later(DEATH_S, remove_if_dead, self._folder)


class _Served(FrameServer):
    """The receiver's side of one connection. Frames are views of the memory; the mapping lives as
    long as the last of them."""

    def __init__(self, sock: socket.socket, on_frame: FrameHandler, memory: mmap.mmap) -> None:
        super().__init__(sock, on_frame, MAX_FRAME_BYTES)
        self._memory: memoryview | None = memoryview(memory)

    async def _take(self, head: Head) -> None:
        end = head.extra + head.length
        if self._memory is None or end > len(self._memory):
            raise HandoffError(f"a frame at [{head.extra}, {end}) is outside of the memory")
        self._handle_soon(head, self._memory[head.extra : end])

    async def _released(self) -> None:
        self._memory = None


class _Home:
    """The folder of one receiver: `socket`, and `nonce`, which is locked while the process lives
    (a lock is seen from other containers, a process id is not)."""

    def __init__(self, parent: Path) -> None:
        self.nonce = secrets.token_hex(16)
        self.folder = parent / f"{PREFIX}{secrets.token_hex(8)}"
        self.socket = self.folder / "socket"
        self.folder.mkdir(mode=0o700)
        self._lock = os.open(self.folder / "nonce", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.write(self._lock, self.nonce.encode())
        # Also when the process ends without closing, as when its model does not load.
        self._at_exit = weakref.finalize(self, _remove, self.folder)

    def remove(self) -> None:
        self._at_exit()
        os.close(self._lock)


def sweep(parent: Path) -> None:
    """Remove the folders of receivers that died without doing so."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if NAME.fullmatch(folder.name) and time.time() - folder.stat().st_mtime >= YOUNG_S:
                remove_if_dead(folder)


def remove_if_dead(folder: Path) -> None:
    """Remove a receiver's folder unless its process lives."""
    try:
        lock = os.open(folder / "nonce", os.O_RDWR)
    except FileNotFoundError:
        _remove(folder)
        return
    except OSError:
        return  # another user's
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # held: its process lives
    else:
        _remove(folder)
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / "socket").unlink(missing_ok=True)
        (folder / "nonce").unlink(missing_ok=True)
        folder.rmdir()


def _check_nonce(parent: Path, name: str, nonce: str) -> Path:
    """The offered folder, when it is here and holds this nonce. Raises HandoffError."""
    if not NAME.fullmatch(name) or not nonce:
        raise HandoffError(f"{name!r} is not an offer of shared memory")
    try:
        found = (parent / name / "nonce").read_bytes()
    except OSError as error:
        raise HandoffError(f"not the same machine or user: {error}") from error
    if not secrets.compare_digest(found, nonce.encode()):
        raise HandoffError(f"{parent / name} holds another nonce: it is not the peer's")
    return parent / name


# Linux only, as all of this: the module is imported elsewhere too.
SEALS = 0
if sys.platform == "linux":
    SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def _make_memory(sock: socket.socket) -> mmap.mmap:
    """Memory for one link, its file passed to the peer. Sealed: neither side can shrink it, which
    would kill the other on its next access."""
    sock.setblocking(False)
    file = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, ARENA_BYTES)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, SEALS)
        socket.send_fds(sock, [b"m"], [file])
        return mmap.mmap(file, ARENA_BYTES)
    finally:
        os.close(file)


async def _receive_memory(sock: socket.socket) -> mmap.mmap:
    """The memory that the receiver made. Raises OSError, HandoffError."""
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    loop.add_reader(sock, lambda: readable.done() or readable.set_result(None))
    try:
        await readable
    finally:
        loop.remove_reader(sock)
    message, files, _, _ = socket.recv_fds(sock, 1, 1)
    try:
        if message != b"m" or len(files) != 1:
            raise HandoffError("the receiver passed no memory; it may have too many links")
        size = os.fstat(files[0]).st_size
        if fcntl.fcntl(files[0], fcntl.F_GET_SEALS) & SEALS != SEALS or not size:
            raise HandoffError("the receiver's memory is not sealed")
        return mmap.mmap(files[0], size)
    finally:
        for file in files:
            os.close(file)
