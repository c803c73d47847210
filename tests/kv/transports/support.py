"""One way to test every transport: real sockets, real memory, real processes."""

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from common.kv.transports import Link, SideTransport, TcpTransport
from common.kv.transports.base import FrameHandler
from common.kv.transports.nixl import NixlTransport
from common.kv.transports.nixl import missing as nixl_missing
from common.kv.transports.shm import ShmTransport
from common.kv.transports.ucx import UcxTransport
from common.kv.transports.ucx import missing as ucx_missing

ROOT = Path(__file__).resolve().parents[3]
SIDES: dict[str, Callable[[], SideTransport]] = {
    "shm": ShmTransport,
    "ucx": UcxTransport,
    "nixl": NixlTransport,
}
# nixl is tested in a process of its own: it cannot be in one with ucx.
NAMES = tuple(os.environ.get("TRANSPORTS_UNDER_TEST", "tcp,shm,ucx").split(","))


# Those that need a package.
MISSING = {"ucx": ucx_missing, "nixl": nixl_missing}


def need(name: str) -> None:
    """Skip where the transport's package is not installed; where all must run (CI), it must be."""
    reason = MISSING[name]() if name in MISSING else None
    if reason and os.environ.get("CI"):
        pytest.fail(f"{reason}; .ci/run installs it")
    if reason:
        pytest.skip(f"{reason}: make install EXTRAS=dev,{name}")


class Inbox:
    """A handler that keeps what it gets; `hold` makes it wait before it answers."""

    def __init__(self, status: int = 0):
        self.frames: list[bytes] = []
        self.status = status
        self.hold: asyncio.Event | None = None

    async def __call__(self, frame: memoryview) -> int:
        self.frames.append(bytes(frame))
        if self.hold is not None:
            await self.hold.wait()
        return self.status


@dataclass
class End:
    """Receiver or sender by one transport, as its process would have it."""

    name: str
    transport: Any = None
    opened: list[Link] = field(default_factory=list)

    def __post_init__(self):
        self.transport = self.transport or {"tcp": TcpTransport, **SIDES}[self.name]()

    async def listen(self, on_frame: FrameHandler) -> Any:
        """What `open` of the other end needs."""
        if self.name == "tcp":
            return f"127.0.0.1:{await self.transport.listen('127.0.0.1', 0, on_frame)}"
        return await self.transport.offer("127.0.0.1", on_frame)

    async def open(self, where: Any) -> Link:
        if self.name == "tcp":
            link = await self.transport.connect(where)
        else:
            link = await self.transport.open("127.0.0.1", where)
        self.opened.append(link)
        return link

    async def close(self) -> None:
        for link in self.opened:
            await link.close()
        await self.transport.close()


@contextlib.asynccontextmanager
async def ends(name: str) -> AsyncIterator[tuple[End, End]]:
    """A receiver and a sender."""
    pair = End(name), End(name)
    try:
        yield pair
    finally:
        for end in reversed(pair):
            await end.close()


async def until(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        await asyncio.sleep(0.005)  # other processes do not tell when it holds


def open_files() -> list[str]:
    """What this process's descriptors refer to, sockets and pipes by kind only."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{number}").split(":[")[0])
    return sorted(found)


def mappings() -> int:
    """Mappings of shared memory of links in this process."""
    return Path("/proc/self/maps").read_text().count("memfd:baton-kv")


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50
    )


class Process:
    """A peer of its own, tests/kv/transports/peer.py, talked to by lines."""

    def __init__(self, *args: str):
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tests.kv.transports.peer", *args],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    async def line(self, seconds: float = 20.0) -> str:
        async with asyncio.timeout(seconds):
            return (await asyncio.to_thread(self.popen.stdout.readline)).strip()

    def kill(self) -> None:
        self.popen.kill()
        self.stop()

    def stop_running(self) -> None:
        self.popen.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.popen.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """The end of its input is its sign to end."""
        self.popen.stdin.close()
        try:
            self.popen.wait(5)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait(5)
        self.popen.stdout.close()
