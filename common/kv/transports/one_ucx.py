"""One UCX a process: the packages of ucx and nixl bring a copy each.

Both take over the process's calls that map memory. The copy that comes second cannot, works without
its cache of registrations, and follows a null pointer when a peer dies in the middle of a transfer
(seen with the UCX 1.21 of ucxx 0.52 beside that of NIXL 1.5.1).
"""

import os

# The process and the transport that loaded it. A dict, for setdefault is atomic.
_loaded: dict[str, tuple[int, str]] = {}


def claim(transport: str) -> None:
    """To be called before `transport` loads its UCX. Raises RuntimeError when it must not."""
    process, owner = _loaded.setdefault("ucx", (os.getpid(), transport))
    if process != os.getpid():
        # A child inherits the library's state without its threads: nothing would ever arrive.
        raise RuntimeError("it was loaded before this process was forked; fork before that")
    if owner != transport:
        raise RuntimeError(
            f"{owner} has loaded a UCX of its own, and a process can have one: name either ucx or "
            f"nixl in --transports"
        )
