"""The real services as processes on loopback, for tests."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from baton.cli.ports import any_free

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "baton-tiny"


def wait_until(condition: Callable[[], Any], deadline_s: float, what: str) -> Any:
    """The first true answer of `condition`; AssertionError naming `what` after the deadline."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if answer := condition():
            return answer
        time.sleep(0.05)  # other processes do not tell when it holds
    raise AssertionError(f"{what}: not within {deadline_s} s")


@dataclass
class Service:
    """One service process. `log` is a file that takes stdout and stderr, `env` extra variables."""

    role: str
    port: int
    command: list[str]
    log: Path
    env: dict[str, str]
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        """Begin its process: the first, or another one after `stop`."""
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self.env},
            )

    def stop(self, sig: signal.Signals = signal.SIGTERM, deadline_s: float = 40) -> int:
        if self.process.poll() is None:
            self.process.send_signal(sig)
        return self.process.wait(deadline_s)


@dataclass
class Mesh:
    """A mesh of real processes. `args` are extra flags by role, `env` extra variables of all."""

    folder: Path
    model: Path = TINY
    prefill: int = 1
    decode: int = 1
    kvstore: int = 1
    gateways: int = 1
    args: dict[str, list[str]] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    services: list[Service] = field(default_factory=list)
    http_port: int = field(default_factory=any_free)
    grpc_port: int = field(default_factory=any_free)
    # HTTP and gRPC of each gateway, the two above first.
    gateway_ports: list[tuple[int, int]] = field(default_factory=list)
    # One client: building one for each poll costs more than the poll.
    _client: httpx.Client = field(default_factory=lambda: httpx.Client(verify=False, timeout=5))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def __enter__(self) -> Self:
        try:
            self._start_all()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start_all(self) -> None:
        stores = [any_free() for _ in range(self.kvstore)]
        prefills = [any_free() for _ in range(self.prefill)]
        decodes = [any_free() for _ in range(self.decode)]
        for port in stores:
            self.start("kvstore", port)
        store_flags = ["--kvstore", spec(stores)] if stores else []
        for port in prefills:
            self.start("prefill", port, *store_flags)
        peer_flags = ["--prefill", spec(prefills)] if prefills else []
        for port in decodes:
            self.start("decode", port, *store_flags, *peer_flags)
        self.gateway_ports = [(self.http_port, self.grpc_port)]
        self.gateway_ports += [(any_free(), any_free()) for _ in range(1, self.gateways)]
        for ports in self.gateway_ports:
            self._start_gateway(ports, prefills, decodes, stores)
        wait_until(self.ready, 90, f"mesh Ready (logs in {self.folder})")

    def start(self, role: str, port: int, *flags: str) -> Service:
        """Start one worker; it is Ready some time later."""
        model = ["--model", str(self.model)] if role != "kvstore" else []
        return self._spawn(role, port, "--port", str(port), *model, *flags)

    def _start_gateway(
        self, ports: tuple[int, int], prefills: list[int], decodes: list[int], stores: list[int]
    ) -> Service:
        flags = ["--http-port", str(ports[0]), "--grpc-port", str(ports[1]), "--announce-s=0"]
        flags += ["--model", str(self.model), "--decode", spec(decodes)]
        if prefills:
            flags += ["--prefill", spec(prefills)]
        if stores:
            flags += ["--kvstore", spec(stores)]
        return self._spawn("gateway", ports[0], *flags)

    def _spawn(self, role: str, port: int, *flags: str) -> Service:
        command = [sys.executable, "-m", f"services.{role}.main", "--host", "127.0.0.1"]
        command += ["--exit-with-parent", *flags, *self.args.get(role, [])]
        service = Service(role, port, command, self.folder / f"{role}-{port}.log", self.env)
        service.start()
        self.services.append(service)
        return service

    def of(self, role: str) -> list[Service]:
        return [s for s in self.services if s.role == role]

    def ready(self) -> bool:
        """Every process lives, and the gateway sees every worker that still runs as ready."""
        for service in self.services:
            if service.process.poll() is not None:
                tail = service.log.read_text(errors="replace")[-2000:]
                raise AssertionError(f"{service.role} exited {service.process.returncode}: {tail}")
        try:
            # /debug/state asks the workers; /ready says what the gateway's own rounds have seen.
            if self._client.get(f"{self.url}/ready").status_code != 200:
                return False
            state = self.state()
        except httpx.HTTPError:
            return False
        workers = [w for w in state["workers"] if w["status"] == "ready"]
        return len(workers) == len(self.services) - len(self.of("gateway"))

    def state(self) -> dict[str, Any]:
        return self._client.get(f"{self.url}/debug/state").raise_for_status().json()

    def wait_idle(self, deadline_s: float = 5) -> dict[str, Any]:
        """The state once nothing is held anywhere."""
        return wait_until(lambda: (s := self.state()) and is_idle(s) and s, deadline_s, "mesh idle")

    def close(self) -> None:
        for service in self.services:
            if service.process.poll() is None:
                service.process.terminate()
        for service in self.services:
            try:
                service.process.wait(40)
            except subprocess.TimeoutExpired:
                service.process.kill()
                service.process.wait(10)


IDLE_KEYS = ("running", "waiting", "blocks_used", "open_handoffs", "open_leases")


def is_idle(state: dict[str, Any]) -> bool:
    """True when every worker answers and has no request, referenced block, handoff or lease."""
    return all(
        worker["status"] == "ready" and all(worker[key] == 0 for key in IDLE_KEYS)
        for worker in state["workers"]
    )


def spec(ports: list[int]) -> str:
    return ",".join(f"127.0.0.1:{port}" for port in ports)
