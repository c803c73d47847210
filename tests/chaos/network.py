"""A network of hosts on this machine: a namespace each, cables that can be pulled, one switch.

The switch is a bridge in a namespace of its own, where no firewall of this machine sees it.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass, field

# 198.18.0.0/15 is reserved for tests of network devices (RFC 2544): nobody's real network.
PREFIX = "198.18.77"


def available() -> bool:
    """Whether this user may make network namespaces here."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"baton-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode == 0:
        _ip("netns", "delete", name)
    return made.returncode == 0


@dataclass
class Network:
    """Hosts by name. Leaves nothing behind after `close`, nor when a run before it was killed."""

    tag: str = field(default_factory=lambda: f"bt{os.getpid() % 100_000}")
    hosts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")
        # This process is on the network, too.
        self._plug(f"{self.tag}x1")
        _ip("addr", "add", f"{PREFIX}.1/24", "dev", f"{self.tag}x1")
        _ip("link", "set", f"{self.tag}x1", "up")

    @property
    def switch(self) -> str:
        return f"{self.tag}-switch"

    def add(self, name: str) -> str:
        """A host with a cable to the bridge; returns its address."""
        number = len(self.hosts) + 2
        self.hosts[name] = number
        space, cable = self.space(name), f"{self.tag}x{number}"
        _ip("netns", "add", space)
        self._plug(cable)
        _ip("link", "set", cable, "netns", space)
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "addr", "add", self.address(name) + "/24", "dev", cable)
        _ip("-n", space, "link", "set", cable, "up")
        return self.address(name)

    def address(self, name: str) -> str:
        return f"{PREFIX}.{self.hosts[name]}"

    def space(self, name: str) -> str:
        return f"{self.tag}-{name}"

    def inside(self, name: str) -> list[str]:
        """What a command line begins with to run on the host."""
        return ["ip", "netns", "exec", self.space(name)]

    def cut(self, name: str) -> None:
        """Pull the cable: packets vanish, no connection is told."""
        self._port(name, "down")

    def mend(self, name: str) -> None:
        self._port(name, "up")

    def close(self) -> None:
        for name in self.hosts:
            _ip("netns", "delete", self.space(name))
        _ip("netns", "delete", self.switch)

    def _plug(self, cable: str) -> None:
        """A cable with one end in the switch and the other here."""
        _ip("link", "add", cable, "type", "veth", "peer", "name", f"p-{cable}")
        _ip("link", "set", f"p-{cable}", "netns", self.switch)
        _ip("-n", self.switch, "link", "set", f"p-{cable}", "master", "bridge", "up")

    def _port(self, name: str, state: str) -> None:
        _ip("-n", self.switch, "link", "set", f"p-{self.tag}x{self.hosts[name]}", state)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
