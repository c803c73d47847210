"""TCP ports of this machine: which are free, and which to take."""

import errno
import socket
from collections.abc import Iterator

FIRST_INTERNAL = 7100
LOOPBACK = "127.0.0.1"


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


def any_free(host: str = LOOPBACK) -> int:
    """A free port of the system's choice."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def internal_ports(taken: set[int]) -> Iterator[int]:
    """Free ports from FIRST_INTERNAL upwards, none of them in `taken` or given twice."""
    for port in range(FIRST_INTERNAL, 65536):
        if port not in taken and is_free(port):
            yield port
