"""`baton up`: gateway, prefill, decode and kvstore on this machine, started and stopped as one."""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import httpx

from baton.cli.locate import model_folder
from baton.cli.mesh import HOST, MeshPlan, ServiceSpec, specs
from baton.cli.ports import any_free, internal_ports, is_free
from baton.cli.procfs import listener
from baton.cli.supervisor import Child, child_environment, say, stop_all
from common.errors import ConfigError
from common.rpc.probe import probe

POLL_S = 0.1
PROBE_S = 2.0
PROGRESS_EVERY_S = 5.0
# Above what services may take after their own drain, so that they end by themselves.
STOP_MARGIN_S = 12.0
MAX_REPLICAS = 64


def main(argv: list[str]) -> int:
    """Returns 0 after Ctrl-C or SIGTERM, 1 when a service died or was not Ready in time."""
    args = _parser().parse_args(argv)
    plan = _plan(args)
    folder = Path(args.log_dir or tempfile.mkdtemp(prefix="baton-"))
    folder.mkdir(parents=True, exist_ok=True)
    services = specs(plan, internal_ports({plan.http_port, plan.grpc_port}))
    return asyncio.run(_Up(plan, services, folder, args.verbose, args.ready_timeout_s).run())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baton up",
        description="Start the whole mesh on 127.0.0.1, print the URL when Ready, stop it on "
        "Ctrl-C. Flags after -- go to every prefill and decode worker.",
    )
    add = parser.add_argument
    add("--model", metavar="PATH", help="model folder (default: BATON_MODEL, or the bundled one)")
    add("--served-model-name", metavar="NAME", help="its name in the API (default: the folder's)")
    add("--api-keys-file", metavar="FILE", type=Path, help="who may ask: lines of TENANT KEY")
    add("--prefill", type=int, default=1, metavar="N", help="prefill workers (default: 1)")
    add("--decode", type=int, default=1, metavar="N", help="decode workers (default: 1)")
    add("--kvstore", type=int, default=1, metavar="N", help="KV stores (default: 1)")
    add("--port", type=int, default=8000, help="HTTP port, 0 takes a free one (default: 8000)")
    add("--grpc-port", type=int, default=9000, help="gRPC port, 0 takes a free one (default: 9000)")
    add("--log-dir", metavar="FOLDER", help="where logs go (default: a new temporary folder)")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    add("-v", "--verbose", action="store_true", help="show the services' logs here, too")
    add("--ready-timeout-s", type=float, default=600.0, help="give up loading (default: 600)")
    add(
        "--drain-s", type=float, default=10.0, help="for requests that run at the end (default: 10)"
    )
    add("worker_flags", nargs="*", metavar="-- FLAG", help="for example: -- --kv-dtype fp8_e4m3")
    return parser


def _plan(args: argparse.Namespace) -> MeshPlan:
    for name, least in (("prefill", 0), ("decode", 1), ("kvstore", 0)):
        if not least <= getattr(args, name) <= MAX_REPLICAS:
            raise ConfigError(f"--{name} {getattr(args, name)} is not in [{least}, {MAX_REPLICAS}]")
    return MeshPlan(
        model=model_folder(args.model),
        http_port=_port(args.port, "--port"),
        grpc_port=_port(args.grpc_port, "--grpc-port"),
        prefill=args.prefill,
        decode=args.decode,
        kvstore=args.kvstore,
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        drain_s=args.drain_s,
        log_level=args.log_level,
        served_model_name=args.served_model_name,
        api_keys_file=args.api_keys_file,
        worker_flags=tuple(args.worker_flags),
    )


def _port(port: int, flag: str) -> int:
    if not 0 <= port < 65536:
        raise ConfigError(f"{flag} {port} is not in [0, 65535]")
    if port == 0:
        return any_free()
    if not is_free(port):
        holder = listener(port) if sys.platform == "linux" else None
        by = f" by {holder}" if holder else ""
        raise ConfigError(
            f"port {port} is taken{by}; stop that, or take another port: baton up {flag} {port + 1}"
        )
    return port


class _Up:
    """One run of the mesh."""

    def __init__(
        self,
        plan: MeshPlan,
        services: list[ServiceSpec],
        log_dir: Path,
        verbose: bool,
        ready_timeout_s: float,
    ) -> None:
        self._plan = plan
        self._specs = services
        self._verbose = verbose
        self._log_dir = log_dir
        self._ready_timeout_s = ready_timeout_s
        self._children = [Child(s.name, s.command(), log_dir / f"{s.name}.log") for s in services]
        self._stop = asyncio.Event()

    async def run(self) -> int:
        self._install_signals()
        say(f"baton: model {self._plan.model}")
        say(f"baton: logs in {self._log_dir}")
        ended: set[asyncio.Task[int]] = set()
        try:
            failure = await self._start(ended)
            if failure is None:
                failure = await self._serve(ended)
        finally:
            await self._stop_children()
        if failure is not None:
            say(f"baton: error: {failure}")
            return 1
        say("baton: stopped")
        return 0

    async def _stop_children(self) -> None:
        # Who uses a service ends before it: a drain still has what it needs. A second Ctrl-C
        # meanwhile lands in _on_signal, which kills.
        for roles in (("gateway",), ("prefill", "decode"), ("kvstore",)):
            group = [
                child
                for child, spec in zip(self._children, self._specs, strict=True)
                if spec.role in roles
            ]
            for name in await stop_all(group, self._plan.drain_s + STOP_MARGIN_S):
                say(f"baton: {name} did not stop in time and was killed")

    def _install_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._stop.is_set():
            say(f"baton: {number.name}, stopping (again to kill)")
            self._stop.set()
            return
        for child in self._children:
            child.send(signal.SIGKILL)

    async def _start(self, ended: set[asyncio.Task[int]]) -> str | None:
        """Start all and wait until all are Ready. Returns why not, or None (also when stopped)."""
        began = time.monotonic()
        show = say if self._verbose else None
        for child in self._children:
            await child.start(child_environment(), show)
            ended.add(asyncio.create_task(child.wait(), name=child.name))
        say(f"baton: started {', '.join(c.name for c in self._children)}")
        ready = asyncio.create_task(self._until_ready(began))
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait(
            {ready, stop, *ended},
            timeout=self._ready_timeout_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        stop.cancel()
        if ready.done():
            return None
        ready.cancel()
        if self._stop.is_set():
            return None
        return self._death(ended) or (
            f"not Ready after {self._ready_timeout_s:g} s; the logs are in {self._log_dir} "
            "(a large model may need a longer --ready-timeout-s)"
        )

    async def _until_ready(self, began: float) -> None:
        waiting = {s.name: s for s in self._specs}
        last_said = began
        while waiting:
            for name, spec in list(waiting.items()):
                if await asyncio.to_thread(self._is_ready, spec):
                    del waiting[name]
                    last_said = time.monotonic()
                    say(f"baton: {name} ready after {last_said - began:.1f} s")
            if waiting and time.monotonic() - last_said >= PROGRESS_EVERY_S:
                last_said = time.monotonic()
                names = ", ".join(waiting)
                say(f"baton: still loading: {names} ({last_said - began:.0f} s)")
            await asyncio.sleep(POLL_S)
        url = f"http://{HOST}:{self._plan.http_port}"
        say(f"baton: Ready after {time.monotonic() - began:.1f} s, Ctrl-C stops")
        say(f"baton: gRPC {HOST}:{self._plan.grpc_port}, state {url}/debug/state")
        say(
            "baton: try it in another terminal: baton chat"
            + ("" if self._plan.http_port == 8000 else f" --url {url}")
        )
        # The one line on stdout, for scripts.
        print(f"{url}/v1", flush=True)

    def _is_ready(self, spec: ServiceSpec) -> bool:
        """Blocks for PROBE_S or so, hence the thread."""
        if probe(spec.ready_target, PROBE_S) is not None:
            return False
        if spec.role != "gateway":
            return True
        # Ready is what a first request finds: the gateway itself must have seen all the others.
        return _workers_seen(self._plan.http_port) == len(self._specs) - 1

    async def _serve(self, ended: set[asyncio.Task[int]]) -> str | None:
        """Wait for the stop or a death. Returns what died, or None after a stop."""
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({stop, *ended}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        return None if self._stop.is_set() else self._death(ended)

    def _death(self, ended: set[asyncio.Task[int]]) -> str | None:
        by_name = {child.name: child for child in self._children}
        for task in ended:
            if task.done():
                child = by_name[task.get_name()]
                code = task.result()
                say(f"baton: the last lines of {child.log_file}:")
                for line in child.last_lines:
                    say(f"  {line}")
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                return f"{child.name} ended ({how}); stopped the rest"
        return None


def _workers_seen(http_port: int) -> int:
    """How many workers and stores the gateway calls ready."""
    try:
        with httpx.Client(trust_env=False, timeout=PROBE_S) as client:
            state = client.get(f"http://{HOST}:{http_port}/debug/state").raise_for_status().json()
    except httpx.HTTPError:
        return 0
    return sum(worker["status"] == "ready" for worker in state["workers"])
