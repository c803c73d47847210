"""The tensor-parallel ranks of a worker as the system sees them."""

from pathlib import Path


def ranks_of(pid: int) -> list[int]:
    """Process ids of the living ranks that a process started, in their order."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            # Fields after the name, which may hold spaces: the state, then the parent.
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # it ended meanwhile
        if b"common.engine.parallel.rank" in command and int(parent) == pid and state != "Z":
            rank = int(command[command.index(b"common.engine.parallel.rank") + 1])
            found.append((rank, int(folder.name)))
    return [pid for _, pid in sorted(found)]


def alive(pid: int) -> bool:
    """Whether this process still runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
