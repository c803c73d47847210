"""Child processes that live and die together. No policy about what they are."""

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

LAST_LINES = 20
# A line longer than this is cut in what is shown; the log file has it whole.
MAX_SHOWN_LINE = 2000
# Flags carry these; as variables they would reach every service alike, a port for one.
PLAN_VARIABLES = frozenset(
    f"BATON_{name}"
    for name in (
        *("HOST", "PORT", "HTTP_PORT", "GRPC_PORT", "DATA_PORT", "ADVERTISE_HOST"),
        *("PREFILL", "DECODE", "KVSTORE", "MODEL", "WORKER_ID"),
    )
)


class Child:
    """One process, its output in a log file (and, when asked, on the terminal)."""

    def __init__(self, name: str, command: Sequence[str], log_file: Path) -> None:
        self.name = name
        self.command = list(command)
        self.log_file = log_file
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    async def start(self, environ: dict[str, str], show: Callable[[str], None] | None) -> None:
        """Start it. show: called with every line of its output. Raises OSError."""
        log = self.log_file.open("ab")
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.command,
                env=environ,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                # Ctrl-C on the terminal goes to `baton up` alone, which stops the rest in order.
                start_new_session=True,
            )
        except OSError:
            log.close()
            raise
        self._reader = asyncio.create_task(self._read(log, show))

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def _read(self, log: BinaryIO, show: Callable[[str], None] | None) -> None:
        pipe = self._process.stdout if self._process else None
        if pipe is None:
            return
        with log:
            rest = b""
            while data := await pipe.read(65536):
                log.write(data)
                log.flush()
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._keep(line, show)
                rest = rest[:MAX_SHOWN_LINE]
            if rest:
                self._keep(rest, show)

    def _keep(self, line: bytes, show: Callable[[str], None] | None) -> None:
        text = line[:MAX_SHOWN_LINE].decode("utf-8", "replace").rstrip("\r")
        self.last_lines.append(text)
        if show is not None:
            show(f"{self.name:<10} | {text}")

    async def wait(self) -> int:
        """Its exit code (negative: the signal that ended it), once all its output is read."""
        if self._process is None:
            return 0
        code = await self._process.wait()
        if self._reader is not None:
            # A grandchild that still holds the pipe must not keep us.
            await asyncio.wait({self._reader}, timeout=1.0)
        return code

    def send(self, number: signal.Signals) -> None:
        """Signal it, if it still runs."""
        if self._process is not None and self.running:
            self._process.send_signal(number)


async def stop_all(children: Sequence[Child], deadline_s: float) -> list[str]:
    """SIGTERM to all of them at once; SIGKILL after `deadline_s` to what is left.

    Returns the names of those that had to be killed.
    """
    for child in children:
        child.send(signal.SIGTERM)
    ends = [asyncio.create_task(child.wait(), name=child.name) for child in children]
    if not ends:
        return []
    _, running = await asyncio.wait(ends, timeout=deadline_s)
    for child in children:
        child.send(signal.SIGKILL)
    await asyncio.wait(ends)
    return sorted(task.get_name() for task in running)


def child_environment() -> dict[str, str]:
    """The environment of the children: this one, with output unbuffered."""
    kept = {k: v for k, v in os.environ.items() if k not in PLAN_VARIABLES}
    return kept | {"PYTHONUNBUFFERED": "1"}


def say(text: str) -> None:
    """A line for the person who typed the command."""
    print(text, file=sys.stderr, flush=True)
