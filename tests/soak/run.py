"""`make soak`: `python -m tests.soak.run --requests 20000`; exit status 1 when something grows.

Batches of short requests; after each, when nothing is in flight, what every process holds is read.
Flat means, between the median of the second quarter of these readings and that of the last one:
memory grew by at most --memory-slack-mib, descriptors not at all, threads by at most 2. And after
each batch every request, block, handoff and lease is back to zero within 5 s, and every answer was
the right one.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from tests.soak.flat import Sample, Trend, sample, settled, trend
from tests.soak.load import TENANTS, Load
from tests.support.mesh import Mesh

SAMPLES = 40
MIB = 2**20
# Of what may be kept there is little, so that all of it is in use before the second quarter.
WORKER = ["--threads=1", "--num-blocks=256"]
FLAGS = {"prefill": WORKER, "decode": WORKER, "kvstore": ["--max-bytes=16MiB"]}
ENV = {
    # Products that torch and oneDNN keep prepared, by their number of rows.
    "LRU_CACHE_CAPACITY": "16",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    # What is freed is given back (glibc), so that what is read is what is held.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}


def soak_mesh(folder: Path, decode: int = 2) -> Mesh:
    """The mesh of a soak; not started yet."""
    keys = folder / "api-keys"
    keys.write_text("".join(f"{tenant} {key}\n" for tenant, key in TENANTS.items()))
    args = {**FLAGS, "gateway": [f"--api-keys-file={keys}"]}
    return Mesh(folder, decode=decode, args=args, env=ENV)


def soak(
    mesh: Mesh, requests: int, seed: int, *, samples: int = SAMPLES, memory_slack_bytes: int
) -> list[str]:
    """`requests` in `samples` batches on a mesh that is ready; returns what is wrong, in words."""
    load = Load(mesh.url, f"127.0.0.1:{mesh.grpc_port}", seed)
    taken: list[list[Sample]] = []
    began = time.monotonic()
    for number in range(samples):
        asyncio.run(load.batch(requests * (number + 1) // samples - load.sent))
        try:
            mesh.wait_idle()
        except AssertionError as error:
            return [*load.wrong, f"after {load.sent} requests: {error}: {mesh.state()['workers']}"]
        taken.append(settled(lambda: [sample(s.process.pid) for s in mesh.services]))
        memory = " ".join(f"{held.rss_bytes / MIB:.0f}" for held in taken[-1])
        passed = time.monotonic() - began
        print(f"{load.sent} requests, {passed:.0f} s, MiB {memory}", file=sys.stderr)
    print(", ".join(f"{count} {kind}" for kind, count in sorted(load.outcomes.items())))
    wrong = load.wrong
    for service, held in zip(mesh.services, zip(*taken, strict=True), strict=True):
        name = f"{service.role} {service.port}"
        found = trend(held)
        print(_row(name, held[0], found))
        wrong += [f"{name}: {why}" for why in found.broken(memory_slack_bytes)]
    return wrong


def _row(name: str, first: Sample, found: Trend) -> str:
    held = (first, found.before, found.after)
    memory = " ".join(f"{s.rss_bytes / MIB:7.1f}" for s in held)
    descriptors = " ".join(f"{s.descriptors:3d}" for s in held)
    threads = " ".join(f"{s.threads:3d}" for s in held)
    return f"{name:14s} MiB {memory}   descriptors {descriptors}   threads {threads}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.run", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-slack-mib", type=float, default=4.0)
    parser.add_argument("--log-dir", type=Path, help="default: a new temporary folder")
    args = parser.parse_args(argv)
    folder = args.log_dir or Path(tempfile.mkdtemp(prefix="baton-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{args.requests} requests, seed {args.seed}, logs in {folder}", flush=True)
    print("after the first batch, median of the second quarter, of the last quarter:")
    with soak_mesh(folder) as mesh:
        slack = int(args.memory_slack_mib * MIB)
        wrong = soak(mesh, args.requests, args.seed, memory_slack_bytes=slack)
    for line in wrong:
        print(f"WRONG: {line}")
    print("not flat, or not right" if wrong else "flat")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
