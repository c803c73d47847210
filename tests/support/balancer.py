"""The balancer of deploy/haproxy.cfg before the gateways of a mesh."""

import csv
import os
import shutil
import subprocess
from pathlib import Path
from typing import Self

import httpx

from baton.cli.ports import any_free
from tests.support.mesh import ROOT, Mesh, wait_until

CONFIG = ROOT / "deploy" / "haproxy.cfg"
HAPROXY = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
# What a test wants to see, which nobody else needs.
STATS = """
frontend stats
    bind 127.0.0.1:{port}
    stats enable
    stats uri /stats
"""


class Balancer:
    """haproxy as a process. A context manager; entered, it knows each gateway for Ready."""

    def __init__(self, mesh: Mesh, folder: Path) -> None:
        self._folder = folder
        self.http_port, self.grpc_port, self._stats_port = any_free(), any_free(), any_free()
        ports = {"BATON_HTTP": self.http_port, "BATON_GRPC": self.grpc_port}
        for number, (http, grpc) in enumerate(mesh.gateway_ports, 1):
            ports[f"BATON_GATEWAY_{number}_HTTP"] = http
            ports[f"BATON_GATEWAY_{number}_GRPC"] = grpc
        self._environ = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
        self._gateways = len(mesh.gateway_ports)

    def __enter__(self) -> Self:
        stats = self._folder / "stats.cfg"
        stats.write_text(STATS.format(port=self._stats_port))
        with (self._folder / "haproxy.log").open("wb") as out:
            self._process = subprocess.Popen(
                [HAPROXY, "-db", "-f", str(CONFIG), "-f", str(stats)],
                env=os.environ | self._environ,
                stdout=out,
                stderr=out,
            )
        try:
            wait_until(lambda: self._up() == 2 * self._gateways, 10, "the balancer's servers up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(10)

    def servers(self) -> list[dict[str, str]]:
        """haproxy's statistics of each gateway of each backend."""
        answer = httpx.get(f"http://127.0.0.1:{self._stats_port}/stats;csv", trust_env=False)
        rows = csv.DictReader(answer.raise_for_status().text.removeprefix("# ").splitlines())
        return [row for row in rows if row["svname"].startswith("gateway-")]

    def _up(self) -> int:
        try:
            return sum(row["status"].startswith("UP") for row in self.servers())
        except httpx.HTTPError:
            return 0
