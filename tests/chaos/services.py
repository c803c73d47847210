"""The mesh of a chaos run: every service on a host of its own, ended and begun at will."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.chaos.network import Network
from tests.support.mesh import ROOT, TINY, is_idle

PORT, HTTP_PORT = 7000, 8000
# Roles that a fault may hit; the count is how many of each there are.
COUNTS = {"kvstore": 1, "prefill": 2, "decode": 2, "gateway": 2}
# Both ask the same prompts: tenant and key.
TENANTS = {"one": "key-of-one-0123456789", "two": "key-of-two-0123456789"}


@dataclass
class Node:
    """A service, its host and its process."""

    name: str
    role: str
    address: str
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    started: float = 0.0  # time.monotonic()

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                # tcp: the namespaces of one machine share memory, which no cut would reach.
                env={"BATON_TRANSPORTS": "tcp", **os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.starts += 1
        self.started = time.monotonic()

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def end(self, number: signal.Signals, deadline_s: float) -> int:
        """Signal the process and wait for its exit code; TimeoutExpired after the deadline."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(deadline_s)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def descriptors(self) -> int:
        """Open file descriptors of the process."""
        assert self.process is not None
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@dataclass
class ChaosMesh:
    """Two gateways, prefill and decode workers, one store. A context manager."""

    folder: Path
    network: Network = field(default_factory=Network)
    nodes: dict[str, Node] = field(default_factory=dict)
    worker_flags: tuple[str, ...] = ()

    def __enter__(self) -> "ChaosMesh":
        try:
            self.keys_file.write_text("".join(f"{t} {key}\n" for t, key in TENANTS.items()))
            for role, count in COUNTS.items():
                for index in range(count):
                    self._add(role, f"{role}-{index}")
            for node in self.nodes.values():
                node.start()
            self.wait_ready(120)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def keys_file(self) -> Path:
        return self.folder / "api-keys"

    def of(self, role: str) -> list[Node]:
        return [node for node in self.nodes.values() if node.role == role]

    def urls(self) -> list[str]:
        return [f"http://{node.address}:{HTTP_PORT}" for node in self.of("gateway")]

    def state(self, url: str) -> dict | None:
        """The gateway's view of the mesh; None when it does not answer."""
        with contextlib.suppress(httpx.HTTPError, ValueError):
            answer = httpx.get(f"{url}/debug/state", timeout=5, trust_env=False)
            if answer.status_code == 200:
                return answer.json()
        return None

    def ready(self) -> bool:
        """Both gateways see every worker ready."""
        workers = sum(count for role, count in COUNTS.items() if role != "gateway")
        states = [self.state(url) for url in self.urls()]
        return all(
            state is not None and sum(w["status"] == "ready" for w in state["workers"]) == workers
            for state in states
        )

    def idle(self) -> bool:
        """No worker holds a request, a referenced block, a handoff or a lease, says each gateway,
        and no gateway has a request in flight."""
        states = [self.state(url) for url in self.urls()]
        return all(
            state is not None and is_idle(state) and state["gateway"]["in_flight"] == 0
            for state in states
        )

    def wait_ready(self, deadline_s: float) -> None:
        end = time.monotonic() + deadline_s
        while not self.ready():
            dead = [n.name for n in self.nodes.values() if not n.alive]
            if dead or time.monotonic() > end:
                raise AssertionError(f"mesh not ready; not running: {dead}; logs: {self.folder}")
            time.sleep(0.2)  # each look asks every gateway and worker

    def close(self) -> None:
        for node in self.nodes.values():
            if node.alive:
                node.send(signal.SIGCONT)
                node.send(signal.SIGKILL)
                node.process.wait(10)
        self.network.close()

    def _add(self, role: str, name: str) -> None:
        address = self.network.add(name)
        flags = [f"--host={address}", f"--port={PORT}", "--exit-with-parent"]
        stores = self._spec("kvstore")
        if role != "kvstore":
            flags += [f"--model={TINY}", f"--kvstore={stores}"]
        if role in ("prefill", "decode"):
            flags += ["--threads=1", *self.worker_flags]
        if role in ("decode", "gateway"):
            flags += [f"--prefill={self._spec('prefill')}"]
        if role == "gateway":
            flags += [f"--decode={self._spec('decode')}"]
            flags += [f"--http-port={HTTP_PORT}", "--announce-s=0"]
            flags += [f"--api-keys-file={self.keys_file}"]
        # `ip netns exec` replaces itself, so the process is the service's own.
        command = [*self.network.inside(name), sys.executable, "-m", f"services.{role}.main"]
        log = self.folder / f"{name}.log"
        self.nodes[name] = Node(name, role, address, [*command, *flags], log)

    def _spec(self, role: str) -> str:
        return ",".join(f"{node.address}:{PORT}" for node in self.of(role))
