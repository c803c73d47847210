"""TCP ports of this machine: which are free, and which to take."""

import errno
import secrets
import socket
from collections.abc import Iterator

FIRST_INTERNAL = 7100
LOOPBACK = "127.0.0.1"
CHOICE = range(10_000, 32_768)
_given: set[int] = set()


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether a server could listen on `port` now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # A server's own connections that linger in TIME_WAIT do not keep it from listening.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def any_free() -> int:
    """A free port of loopback that this process was not given before.

    It is below those that the system gives to outgoing connections (from 32768 on Linux), so that
    no connection takes it before a server listens there.
    """
    start = secrets.randbelow(len(CHOICE))
    for port in (*CHOICE[start:], *CHOICE[:start]):
        if port not in _given and is_free(port):
            _given.add(port)
            return port
    raise OSError(errno.EADDRINUSE, f"every port of {CHOICE.start} to {CHOICE.stop - 1} is in use")


def internal_ports(taken: set[int]) -> Iterator[int]:
    """Free ports from FIRST_INTERNAL upwards, none of them in `taken` or given twice."""
    for port in range(FIRST_INTERNAL, 65536):
        if port not in taken and is_free(port):
            yield port
