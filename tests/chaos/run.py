"""`make chaos`: `python -m tests.chaos.run --faults 500 [--seed N]`; exit code 1 on a broken rule.

The rules: the tokens of every completed request equal the undisturbed run's; every failed one has
a proper error; none outlives its deadline by more than 2 s; 5 s after the last request every
block, handoff and lease is back to zero on every worker and descriptors are where they were; then
a tenant that asks prompts of the other finds none of their KV.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.faults import Faults
from tests.chaos.load import Load, bodies, found_of_others, undisturbed
from tests.chaos.network import available
from tests.chaos.services import ChaosMesh
from tests.support.mesh import wait_until

REQUESTS = 48
QUIET_S = 5.0
# Sockets that open and close while one looks; a leak grows with the requests, far past this.
DESCRIPTOR_SLACK = 12
READY_S = 60.0


async def chaos(mesh: ChaosMesh, seed: int, faults: int) -> list[str]:
    """One run on a mesh that is ready; returns every broken rule, in words."""
    requests = bodies(seed, REQUESTS)
    expected = await undisturbed(mesh.urls()[0], requests)
    before = {n.name: (n.starts, n.descriptors()) for n in mesh.nodes.values()}
    disturb = Faults(mesh, seed)
    gateways = [node.address for node in mesh.of("gateway")]
    load = Load(gateways, requests, expected, seed, disturb.silent_s)
    began = time.monotonic()
    asking = asyncio.create_task(load.run())
    await disturb.run(faults)
    load.stopping = True
    await asking
    wrong = load.tally.wrong + disturb.wrong + await asyncio.to_thread(_quiet, mesh, before)
    if not wrong:
        wrong += await asyncio.to_thread(found_of_others, mesh.urls(), seed)
    print(f"seed {seed}: {disturb.done.total()} faults in {time.monotonic() - began:.0f} s")
    print("  faults:   " + ", ".join(f"{n} {kind}" for kind, n in sorted(disturb.done.items())))
    outcomes = sorted(load.tally.outcomes.items())
    print("  requests: " + ", ".join(f"{n} {outcome}" for outcome, n in outcomes), flush=True)
    if not load.tally.outcomes["completed"]:
        wrong.append("no request was completed: nothing was proved")
    return wrong


def _quiet(mesh: ChaosMesh, before: dict[str, tuple[int, int]]) -> list[str]:
    """What is still held once the load has stopped and every node is back."""
    try:
        mesh.wait_ready(READY_S)
    except AssertionError as error:
        return [str(error)]
    try:
        wait_until(mesh.idle, QUIET_S, "idle")
    except AssertionError as error:
        return [f"{error}: {mesh.state(mesh.urls()[0])}"]
    wrong = []
    for node in mesh.nodes.values():
        starts, descriptors = before[node.name]
        if node.starts == starts and node.descriptors() > descriptors + DESCRIPTOR_SLACK:
            wrong.append(f"{node.name} has {node.descriptors()} descriptors, had {descriptors}")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.run", description=__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, help="repeat a run; unset: a new one, printed")
    parser.add_argument("--log-dir", type=Path, help="default: a new temporary folder")
    args = parser.parse_args(argv)
    if not available():
        print("chaos needs root and `ip netns` (package iproute2)", file=sys.stderr)
        return 2
    seed = random.randrange(2**31) if args.seed is None else args.seed
    folder = args.log_dir or Path(tempfile.mkdtemp(prefix="baton-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}, logs in {folder}", flush=True)
    with ChaosMesh(folder) as mesh:
        wrong = asyncio.run(chaos(mesh, seed, args.faults))
    for line in wrong:
        print(f"BROKEN: {line}")
    print(f"{len(wrong)} rules broken")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
