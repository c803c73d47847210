"""Helpers of the CLI tests: the `baton` command as a real process."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.cli.ports import any_free
from tests.support.mesh import wait_until

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "baton-tiny"
# Far above what loading takes: a machine that is shared may be slow.
READY_S = 240.0


def baton(*args: str, timeout_s: float = 180, **kwargs) -> subprocess.CompletedProcess[str]:
    """Run `baton ARGS` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "baton.cli.main", *args],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=ROOT,
        check=False,
        **kwargs,
    )


def children_of(pid: int) -> dict[int, str]:
    """The direct children of a process: pid and command line."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(stat[1]) == pid:
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[int(folder.name)] = command
    return found


def alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Up:
    """`baton up` on free ports, its stdout (the URL) and stderr (progress) in files."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.log_dir = folder / "logs"
        self._out = folder / "stdout"
        self._err = folder / "stderr"
        command = [sys.executable, "-m", "baton.cli.main", "up", "--port=0", "--grpc-port=0"]
        command += [f"--log-dir={self.log_dir}", *args]
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=err, cwd=ROOT, env=dict(os.environ)
            )

    @property
    def url(self) -> str:
        """The endpoint, without /v1; empty until Ready."""
        return self._out.read_text().strip().removesuffix("/v1")

    @property
    def progress(self) -> str:
        return self._err.read_text()

    def wait_ready(self) -> str:
        wait_until(
            lambda: self.url or self.process.poll() is not None, READY_S, "baton up is Ready"
        )
        assert self.url, self.progress
        return self.url

    def children(self) -> dict[int, str]:
        return children_of(self.process.pid)

    def child(self, role: str) -> int:
        return next(p for p, command in self.children().items() if f"services.{role}." in command)

    def end(self) -> None:
        """Whatever happened in the test, nothing of it stays."""
        held = list(self.children())
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pid in held:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start_up(tmp_path) -> Iterator[Callable[..., Up]]:
    """start_up(*args): an Up that is ended after the test."""
    started: list[Up] = []

    def start(*args: str) -> Up:
        started.append(Up(tmp_path, *args))
        return started[-1]

    yield start
    for up in started:
        up.end()


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which this process listens, without ever answering."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def free_ports() -> tuple[int, int]:
    return any_free(), any_free()
