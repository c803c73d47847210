"""The plan of a mesh on one machine: which processes, with which flags, in which order. No I/O."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """One process of the mesh."""

    name: str  # unique, "decode-1"
    role: str
    flags: tuple[str, ...]
    # What common.rpc.probe asks whether it is Ready.
    ready_target: str

    def command(self) -> list[str]:
        """The command line, run by this interpreter."""
        # -P: a folder named `services` where the user stands is not ours.
        return [sys.executable, "-P", "-m", f"services.{self.role}.main", *self.flags]


@dataclass(frozen=True, slots=True)
class MeshPlan:
    """What `baton up` is asked for."""

    model: Path
    http_port: int
    grpc_port: int
    prefill: int = 1
    decode: int = 1
    kvstore: int = 1
    cores: int = 1
    drain_s: float = 10.0
    log_level: str = "info"
    served_model_name: str | None = None
    api_keys_file: Path | None = None
    # Appended to the flags of every prefill and decode worker.
    worker_flags: tuple[str, ...] = ()


def specs(plan: MeshPlan, ports: Iterator[int]) -> list[ServiceSpec]:
    """The processes, the ones that others need first; the last one is the gateway.

    ports: free ports, one is taken for each service but the gateway.
    """
    stores = [_kvstore(plan, i, next(ports)) for i in range(plan.kvstore)]
    kvstore = _addresses(stores)
    workers: dict[str, list[ServiceSpec]] = {"prefill": [], "decode": []}
    for role, count in (("prefill", plan.prefill), ("decode", plan.decode)):
        # Decode workers meet the prefill workers, which therefore come first.
        peers = _addresses(workers["prefill"]) if role == "decode" else ""
        for i in range(count):
            workers[role].append(_worker(plan, role, i, next(ports), kvstore, peers))
    gateway = _gateway(plan, _addresses(workers["prefill"]), _addresses(workers["decode"]), kvstore)
    return [*stores, *workers["prefill"], *workers["decode"], gateway]


def _addresses(services: Iterable[ServiceSpec]) -> str:
    return ",".join(s.ready_target for s in services)


def _common(plan: MeshPlan, port: int) -> tuple[str, ...]:
    return (
        f"--host={HOST}",
        f"--port={port}",
        f"--log-level={plan.log_level}",
        f"--drain-s={plan.drain_s}",
        "--exit-with-parent",
    )


def _kvstore(plan: MeshPlan, index: int, port: int) -> ServiceSpec:
    return ServiceSpec(f"kvstore-{index}", "kvstore", _common(plan, port), f"{HOST}:{port}")


def _worker(
    plan: MeshPlan, role: str, index: int, port: int, kvstore: str, prefill: str
) -> ServiceSpec:
    # Threads of all workers together should not be more than the cores: they would only wait.
    threads = max(1, plan.cores // (plan.prefill + plan.decode))
    flags = (
        *_common(plan, port),
        f"--model={plan.model}",
        f"--threads={threads}",
        *((f"--kvstore={kvstore}",) if kvstore else ()),
        *((f"--prefill={prefill}",) if prefill else ()),
        *plan.worker_flags,
    )
    return ServiceSpec(f"{role}-{index}", role, flags, f"{HOST}:{port}")


def _gateway(plan: MeshPlan, prefill: str, decode: str, kvstore: str) -> ServiceSpec:
    flags = (
        *_common(plan, plan.grpc_port),
        f"--http-port={plan.http_port}",
        "--announce-s=0",  # it has no balancer that would have to notice its end
        f"--model={plan.model}",
        f"--decode={decode}",
        *((f"--prefill={prefill}",) if prefill else ()),
        *((f"--kvstore={kvstore}",) if kvstore else ()),
        *((f"--served-model-name={plan.served_model_name}",) if plan.served_model_name else ()),
        *((f"--api-keys-file={plan.api_keys_file}",) if plan.api_keys_file else ()),
    )
    return ServiceSpec("gateway", "gateway", flags, f"http://{HOST}:{plan.http_port}/ready")
