"""Transports of the data plane. docs/transports.md says how each works and how to add one."""

from common.kv.transports.base import FrameHandler, Link, SideTransport, Transport
from common.kv.transports.faulty import with_faults
from common.kv.transports.plane import DEFAULT_NAMES, NAMES, SIDE_TRANSPORTS, DataPlane, parse_names
from common.kv.transports.tcp import TcpTransport

__all__ = [
    "DEFAULT_NAMES",
    "NAMES",
    "SIDE_TRANSPORTS",
    "DataPlane",
    "FrameHandler",
    "Link",
    "SideTransport",
    "TcpTransport",
    "Transport",
    "parse_names",
    "with_faults",
]
