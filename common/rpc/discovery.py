"""Names to addresses. Nothing here blocks the event loop."""

import asyncio
import ipaddress
import socket

from common.errors import ConfigError

RESOLVE_TIMEOUT_S = 2.0
MAX_NAMES = 1024


def parse_addresses(spec: str) -> list[tuple[str, int]]:
    """`"host:port,[::1]:port"` as pairs; spaces and empty parts are ignored.

    Raises ConfigError, naming the part, for anything that is not host:port.
    """
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    if len(parts) > MAX_NAMES:
        raise ConfigError(f"{len(parts)} addresses given; at most {MAX_NAMES}")
    return [_parse_one(part) for part in parts]


def _parse_one(part: str) -> tuple[str, int]:
    host, separator, port = part.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"address {part!r}: write an IPv6 address as [address]:port")
    if not separator or not host or not (port.isascii() and port.isdigit()):
        raise ConfigError(f"address {part!r} is not host:port")
    if not 0 < int(port) < 65536:
        raise ConfigError(f"address {part!r}: port {port} is not in [1, 65535]")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """host:port, with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def resolve(spec: str) -> set[str]:
    """Every `ip:port` that the names stand for now.

    A name that does not resolve, or not within RESOLVE_TIMEOUT_S, stands for none: under compose
    a service without replicas has no DNS entry, which is no error. Where a name has IPv4 and
    IPv6 addresses only the IPv4 ones count, lest one replica be two.
    """
    pairs = parse_addresses(spec)
    found = await asyncio.gather(*(_resolve_one(host, port) for host, port in pairs))
    return set().union(*found)


async def _resolve_one(host: str, port: int) -> set[str]:
    if _is_ip(host):
        return {join_address(host, port)}
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(RESOLVE_TIMEOUT_S):
            infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError):
        return set()
    families = {info[0] for info in infos}
    wanted = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    return {join_address(str(info[4][0]), port) for info in infos if info[0] == wanted}


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def own_address(bound_host: str, advertise_host: str | None = None) -> str:
    """The host that peers are told to connect to.

    `advertise_host` when given; the bound address when it is one machine's; and for a wildcard
    bind the source address of this machine's route to others (no packet is sent), or its
    loopback where there is no network.
    """
    if advertise_host:
        return advertise_host
    if bound_host not in ("", "0.0.0.0", "::", "*"):
        return "127.0.0.1" if bound_host == "localhost" else bound_host
    # 192.0.2.1 is reserved for documentation: any route to it is the default route.
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return _host_name_address()


def _host_name_address() -> str:
    # A container on an internal network has no default route, but its name is its address.
    try:
        infos = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    except OSError:
        return "127.0.0.1"
    return str(infos[0][4][0]) if infos else "127.0.0.1"
