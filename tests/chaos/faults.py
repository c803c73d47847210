"""What is done to the mesh, drawn from a seed."""

import asyncio
import contextlib
import math
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.chaos.services import ChaosMesh, Node

KINDS = {"kill": 4, "pause": 3, "restart": 2, "cut": 3}
ROLES = {"prefill": 4, "decode": 4, "kvstore": 2, "gateway": 1}
DRAIN_S = 60.0
START_S = 15.0


@dataclass
class Faults:
    """Disturbs one node after the other, and now and then two at once."""

    mesh: ChaosMesh
    seed: int
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    # When a node could not be heard: its address, from and to in time.monotonic().
    silences: list[tuple[str, float, float]] = field(default_factory=list)

    async def run(self, count: int) -> None:
        """`count` faults, then every node runs and is connected again."""
        rng = random.Random(self.seed)
        while (left := count - self.done.total()) > 0:
            nodes = self._victims(rng, 2 if left > 1 and rng.random() < 0.2 else 1)
            await asyncio.gather(*(self._disturb(node, rng) for node in nodes))
            await asyncio.sleep(rng.uniform(0.2, 3.0))  # undisturbed

    def _victims(self, rng: random.Random, count: int) -> list[Node]:
        roles = rng.choices(list(ROLES), list(ROLES.values()), k=count)
        victims = {node.name: node for node in (rng.choice(self.mesh.of(r)) for r in roles)}
        # One gateway always stays, or there would be nobody to ask.
        gateways = [n for n in victims.values() if n.role == "gateway"]
        return [n for n in victims.values() if n not in gateways[1:]]

    async def _disturb(self, node: Node, rng: random.Random) -> None:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        length_s = rng.choice([0.2, 1.0, 4.0])
        self.done[f"{kind} {node.role}"] += 1
        if kind == "kill":
            await asyncio.to_thread(node.end, signal.SIGKILL, 10)
            await asyncio.sleep(length_s / 4)  # how long it is gone
            node.start()
        elif kind == "pause":
            with self._silent(node):
                node.send(signal.SIGSTOP)
                await asyncio.sleep(length_s)  # how long it lasts
                node.send(signal.SIGCONT)
        elif kind == "cut":
            with self._silent(node):
                self.mesh.network.cut(node.name)
                await asyncio.sleep(length_s)  # how long it lasts
                self.mesh.network.mend(node.name)
        else:
            await self._restart(node)

    @contextlib.contextmanager
    def _silent(self, node: Node) -> Iterator[None]:
        began = time.monotonic()
        self.silences.append((node.address, began, math.inf))
        index = len(self.silences) - 1
        try:
            yield
        finally:
            self.silences[index] = (node.address, began, time.monotonic())

    def silent_s(self, address: str, began: float, ended: float) -> float:
        """For how many seconds of this time the node at the address could not be heard."""
        return sum(
            max(0.0, min(ended, to) - max(began, start))
            for silent, start, to in self.silences
            if silent == address
        )

    async def _restart(self, node: Node) -> None:
        try:
            code = await asyncio.to_thread(node.end, signal.SIGTERM, DRAIN_S)
        except subprocess.TimeoutExpired:
            self.wrong.append(f"{node.name} did not end {DRAIN_S} s after SIGTERM")
            code = await asyncio.to_thread(node.end, signal.SIGKILL, 10)
        # Before it has a handler, a process that still starts ends by the signal itself.
        starting = time.monotonic() - node.started < START_S and code == -signal.SIGTERM
        if code not in (0, -signal.SIGKILL) and not starting:
            self.wrong.append(f"{node.name} exited {code} after SIGTERM")
        node.start()
