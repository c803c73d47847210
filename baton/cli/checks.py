"""The doctor's checks of machine, packages and ports. Each returns findings and changes nothing."""

import importlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from baton.cli.ports import is_free
from baton.cli.procfs import listener
from common.rpc.probe import probe

GIB = 2**30
MIN_MEMORY_GIB = 2.0
MIN_FREE_GIB = 1.0

# module: (distribution, extra that has it; "" for Baton's own dependencies)
NEEDED = {
    "grpc": ("grpcio", ""),
    "grpc_health": ("grpcio-health-checking", ""),
    "grpc_reflection": ("grpcio-reflection", ""),
    "google.protobuf": ("protobuf", ""),
    "opentelemetry.sdk": ("opentelemetry-sdk", ""),
    "prometheus_client": ("prometheus-client", ""),
    "pydantic": ("pydantic", ""),
    "structlog": ("structlog", ""),
    "uvloop": ("uvloop", ""),
    "xxhash": ("xxhash", ""),
    "aiohttp": ("aiohttp", "gateway"),
    "jinja2": ("jinja2", "gateway"),
    "tokenizers": ("tokenizers", "gateway"),
    "torch": ("torch", "worker"),
    "numpy": ("numpy", "worker"),
    "safetensors": ("safetensors", "worker"),
}
OPTIONAL = {
    "httpx": ("httpx", "client", "`baton chat` and `generate --url` need it"),
    "opentelemetry.exporter.otlp.proto.grpc": (
        "opentelemetry-exporter-otlp-proto-grpc",
        "observability",
        "--otlp-endpoint needs it",
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's answer; `remedy` is what to do, empty when all is well."""

    name: str
    status: Literal["ok", "warn", "fail"]
    message: str
    remedy: str = ""


def check_python() -> Iterator[Finding]:
    """Python 3.11 or 3.12."""
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        yield Finding("python", "ok", f"{version} at {sys.executable}")
    else:
        yield Finding(
            "python",
            "fail",
            f"{version} at {sys.executable}; Baton needs 3.11 or 3.12",
            "install Python 3.11 or 3.12 and run `make PYTHON=python3.11 up`",
        )


def check_machine() -> Iterator[Finding]:
    """Operating system, cores, memory, room for logs."""
    system = f"{platform.system()} {platform.machine()}"
    if sys.platform == "linux":
        yield Finding("system", "ok", system)
    else:
        yield Finding("system", "fail", f"{system}; `baton up` needs Linux", "use compose.yaml")
    yield Finding("cores", "ok", str(os.cpu_count() or 1))
    yield _memory()
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free / GIB
    if free >= MIN_FREE_GIB:
        yield Finding("disk", "ok", f"{free:.0f} GiB free in {folder}")
    else:
        yield Finding(
            "disk",
            "warn",
            f"{free:.1f} GiB free in {folder}, where logs go",
            "free some space, or name another folder: baton up --log-dir FOLDER",
        )


def _memory() -> Finding:
    free = _available_memory_gib()
    if free is None:
        return Finding("memory", "warn", "cannot be read here", "")
    if free >= MIN_MEMORY_GIB:
        return Finding("memory", "ok", f"{free:.1f} GiB available")
    return Finding(
        "memory",
        "warn",
        f"{free:.1f} GiB available; each worker holds the model and up to 512 MiB of KV cache",
        "stop something else, or make the cache smaller: baton up -- --kv-cache-bytes 128MiB",
    )


def _available_memory_gib() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = {line.split(":")[0]: line.split()[1] for line in lines}
    return int(kib["MemAvailable"]) * 1024 / GIB if "MemAvailable" in kib else None


def check_packages() -> Iterator[Finding]:
    """Every needed package imports; what is optional is said."""
    broken = [f for module, (dist, extra) in NEEDED.items() if (f := _broken(module, dist, extra))]
    yield from broken
    if not broken:
        yield Finding("packages", "ok", f"all {len(NEEDED)} needed ones import")
    for module, (dist, extra, why) in OPTIONAL.items():
        if finding := _broken(module, dist, extra):
            yield Finding(finding.name, "warn", f"{finding.message}; {why}", finding.remedy)


def _broken(module: str, dist: str, extra: str) -> Finding | None:
    target = f"baton[{extra}]" if extra else "baton"
    remedy = f"`make install` in a checkout, or pip install -c constraints.txt '{target}'"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return Finding(f"package {dist}", "fail", "not installed", remedy)
    except (ImportError, OSError, RuntimeError) as error:
        # A wheel for another machine, or a library that it needs is missing.
        return Finding(f"package {dist}", "fail", f"does not import: {error}", remedy)
    return None


def check_transports() -> Iterator[Finding]:
    """Which ways KV can take between workers."""
    try:
        from common.kv.transports import SIDE_TRANSPORTS
    except ImportError:
        return  # check_packages has said so
    reasons = {name: missing() for name, (_, missing) in SIDE_TRANSPORTS.items()}
    usable = [name for name, reason in reasons.items() if reason is None]
    yield Finding("transports", "ok", ", ".join([*usable, "tcp"]))
    for name, reason in reasons.items():
        if reason is not None:
            remedy = "docs/transports.md says when it is worth having"
            yield Finding(f"transport {name}", "warn", f"not used: {reason}", remedy)


def check_device() -> Iterator[Finding]:
    """torch's build, and a GPU where there is one."""
    try:
        import torch
    except (ImportError, OSError):
        return  # check_packages has said so
    version = metadata.version("torch")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        yield Finding("torch", "ok", f"{version}, {name}; use it with: baton up -- --device cuda")
    else:
        yield Finding("torch", "ok", f"{version} on the CPU")


def check_ports(http_port: int, grpc_port: int) -> Iterator[Finding]:
    """The gateway's two ports are free, or a mesh that answers has them."""
    url = f"http://127.0.0.1:{http_port}"
    for name, flag, port in (("HTTP", "--port", http_port), ("gRPC", "--grpc-port", grpc_port)):
        if not 0 < port < 65536:
            yield Finding(f"port {port}", "fail", "is not in [1, 65535]", f"choose another {flag}")
        elif is_free(port):
            yield Finding(f"port {port} ({name})", "ok", "free")
        elif probe(f"{url}/ready", 2.0) is None:
            yield Finding(f"port {port} ({name})", "warn", f"a mesh is running at {url}", "")
        else:
            holder = listener(port) if sys.platform == "linux" else None
            yield Finding(
                f"port {port} ({name})",
                "fail",
                f"taken by {holder or 'another process'}",
                f"stop it, or take another port: baton up {flag} {port + 1}",
            )
