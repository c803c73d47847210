"""Transports of the data plane by name. A new one is one file and one line here."""

from collections.abc import Callable

from common.kv.transports.base import FrameHandler, Link, Transport
from common.kv.transports.tcp import TcpTransport

TRANSPORTS: dict[str, Callable[[], Transport]] = {"tcp": TcpTransport}

__all__ = ["TRANSPORTS", "FrameHandler", "Link", "TcpTransport", "Transport"]
