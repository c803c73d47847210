"""The data plane: the best transport that a real test transfer shows to work, peer by peer.

A peer is reached over tcp first and says what else it offers. The transports are tried in the order
of the setting, each by sending a block's worth of random bytes; the first that brings them over
unchanged is used. One that fails, at the test or later, is left alone for a while, longer after
each further time, and tried again beside the traffic: meanwhile the next one in order carries it.
"""

import asyncio
import collections
import contextlib
import json
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from common.errors import ConfigError, HandoffError
from common.kv.transports.base import (
    PROBE_TIMEOUT_S,
    FrameHandler,
    Link,
    Offer,
    SideTransport,
)
from common.kv.transports.frames import MAX_ANSWER_BYTES, Tasks
from common.kv.transports.nixl import NixlTransport
from common.kv.transports.nixl import missing as nixl_missing
from common.kv.transports.shm import ShmTransport
from common.kv.transports.shm import missing as shm_missing
from common.kv.transports.tcp import TcpLink, TcpTransport, split_address, within
from common.kv.transports.ucx import UcxTransport
from common.kv.transports.ucx import missing as ucx_missing

log = structlog.get_logger("transport")

# A new one is one file and one line here.
SIDE_TRANSPORTS = {
    "shm": (ShmTransport, shm_missing),
    "ucx": (UcxTransport, ucx_missing),
    "nixl": (NixlTransport, nixl_missing),
}
NAMES = (*SIDE_TRANSPORTS, "tcp")
# Without nixl, for host memory another way to UCX, and none beside ucx: who wants it names it.
DEFAULT_NAMES = ("shm", "ucx", "tcp")
# A test transfer of PROBE_BYTES takes milliseconds; over a slow network a second.
TEST_S = 3.0
# One that takes longer, as when it loads a library for its first link, is opened by a later try.
OPEN_S = 2.0
FIRST_PAUSE_S = 30.0
LONGEST_PAUSE_S = 600.0
MAX_PEERS = 512


def parse_names(text: str) -> tuple[str, ...]:
    """`shm,tcp` to names, best first. Raises ConfigError."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names or len(set(names)) < len(names) or not set(names) <= set(NAMES):
        raise ConfigError(
            f"{text!r} does not name transports; list some of {', '.join(NAMES)}, each once, "
            f"best first"
        )
    if {"ucx", "nixl"} <= set(names):
        raise ConfigError(
            f"{text!r} names ucx and nixl: each brings a UCX of its own, and a process can have "
            f"one (docs/transports.md); leave one of them out"
        )
    return names


@dataclass(slots=True)
class _Peer:
    """One address, and what is known of the process behind it (`instance`), by transport.

    links     live or dead, also of transports that are not in use now
    retry_at  when to try again those that failed, by the monotonic clock
    pauses_s  how long each was left alone the last time
    """

    address: str
    instance: str = ""
    name: str = ""
    links: dict[str, Link] = field(default_factory=dict)
    retry_at: dict[str, float] = field(default_factory=dict)
    pauses_s: dict[str, float] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    climbing: bool = False

    @property
    def link(self) -> Link | None:
        """The link in use, while it lives."""
        link = self.links.get(self.name)
        return None if link is None or link.closed else link


class DataPlane:
    """All transports of one process behind the Transport interface. All methods run on one loop,
    except those that say otherwise.

    names  the transports that may carry frames, best first
    """

    def __init__(self, names: Sequence[str] = DEFAULT_NAMES) -> None:
        self._names = tuple(names)
        self._tcp = TcpTransport()
        self._sides: dict[str, SideTransport] = {}
        self._instance = secrets.token_hex(8)
        self._peers: collections.OrderedDict[str, _Peer] = collections.OrderedDict()
        self._tasks = Tasks()
        self._events: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()  # of _events
        for name in self._names:
            if name == "tcp":
                continue
            make, missing = SIDE_TRANSPORTS[name]
            if reason := missing():
                log.info("transport_unavailable", transport=name, reason=reason)
            else:
                self._sides[name] = make()

    # Receiver -----------------------------------------------------------------------------

    async def listen(self, host: str, port: int, on_frame: FrameHandler) -> int:
        """See Transport. A transport that cannot accept links is not offered, and logged."""
        offers: dict[str, Offer] = {}
        for name, side in self._sides.items():
            try:
                offers[name] = await side.offer(host, self._counted(name, on_frame))
            except HandoffError as error:
                log.warning("transport_not_offered", transport=name, reason=str(error))
        told = json.dumps({"instance": self._instance, "offers": offers}).encode()
        handler = self._counted("tcp", on_frame)
        return await self._tcp.listen(host, port, handler, told)

    def _counted(self, name: str, on_frame: FrameHandler) -> FrameHandler:
        async def handle(frame: memoryview) -> int:
            with self._lock:
                self._events[f"transport_frames_received_{name}"] += 1
                self._events[f"transport_bytes_received_{name}"] += len(frame)
            return await on_frame(frame)

        return handle

    # Sender -------------------------------------------------------------------------------

    async def connect(self, address: str) -> Link:
        """See Transport: a link of the best transport that works with this peer."""
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peers[address] = _Peer(address)
        self._peers.move_to_end(address)
        async with peer.lock:
            link = peer.link
            if link is None:
                link = await self._choose(peer)
                await self._trim()
            elif not peer.climbing and self._better(peer):
                peer.climbing = True
                self._tasks.spawn(self._climb(peer))
            return link

    async def probe(self, address: str, timeout_s: float = PROBE_TIMEOUT_S) -> float:
        """See Transport: over the link that data will take, chosen now when there is none."""
        started = time.monotonic()
        async with within(timeout_s, address):
            await (await self.connect(address)).probe()
        return time.monotonic() - started

    async def _choose(self, peer: _Peer) -> Link:
        """Agree with the peer anew on a transport."""
        broken, peer.name = peer.name, ""
        tcp, instance, offers = await self._meet(peer.address)
        if instance != peer.instance:
            # Another process, perhaps on another machine: nothing is known about it.
            await self._close_sides(peer)
            peer.instance, peer.retry_at, peer.pauses_s = instance, {}, {}
        elif broken:
            self._failed(peer, broken, "the link broke")
        refused: dict[str, str] = {}
        # What failed comes last: it is still better than nothing.
        for name in sorted(self._names, key=lambda name: name in peer.retry_at):
            try:
                return await self._try(peer, name, tcp, offers)
            except HandoffError as error:
                refused[name] = str(error)
        raise HandoffError(
            f"no transport to {peer.address} works: "
            + "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        )

    async def _meet(self, address: str) -> tuple[TcpLink, str, Mapping[str, Offer]]:
        """A live tcp link to the peer, the peer's instance and what it offers."""
        async with within(TEST_S, address):
            try:
                tcp = await self._tcp.connect(address)
                told = await tcp.offers()
            except HandoffError:
                # The cached link may be one to a process that is gone.
                tcp = await self._tcp.connect(address)
                told = await tcp.offers()
        instance, offers = _parse_offers(told)
        return tcp, instance, offers

    async def _try(
        self,
        peer: _Peer,
        name: str,
        tcp: TcpLink,
        offers: Mapping[str, Offer],
    ) -> Link:
        """Test a transport, and use it from now on. Raises HandoffError when it does not work."""
        started = time.monotonic()
        link = peer.links.get(name)
        if link is None or link.closed:
            link = await self._open(peer, name, tcp, offers)
        try:
            async with within(TEST_S, peer.address):
                await link.probe()
        except BaseException as error:
            if link is not tcp:
                await link.close()
            if isinstance(error, HandoffError):
                self._failed(peer, name, str(error))
            raise
        peer.name, peer.links[name] = name, link
        peer.retry_at.pop(name, None)
        log.info(
            "transport_chosen",
            peer=peer.address,
            transport=name,
            ms=round((time.monotonic() - started) * 1000, 2),
        )
        return link

    async def _open(
        self, peer: _Peer, name: str, tcp: TcpLink, offers: Mapping[str, Offer]
    ) -> Link:
        if name == "tcp":
            return tcp
        if name not in self._sides:
            raise HandoffError("not available here")
        if name not in offers:
            raise HandoffError("not offered by the peer")
        try:
            async with within(OPEN_S, peer.address):
                return await self._sides[name].open(split_address(peer.address)[0], offers[name])
        except HandoffError as error:
            self._failed(peer, name, str(error))
            raise

    def _failed(self, peer: _Peer, name: str, reason: str) -> None:
        pause_s = min(2 * peer.pauses_s.get(name, FIRST_PAUSE_S / 2), LONGEST_PAUSE_S)
        peer.pauses_s[name], peer.retry_at[name] = pause_s, time.monotonic() + pause_s
        self._count(f"transport_failed_{name}")
        log.info(
            "transport_failed", peer=peer.address, transport=name, reason=reason, pause_s=pause_s
        )

    # Back up ------------------------------------------------------------------------------

    def _better(self, peer: _Peer) -> list[str]:
        """Transports before the one in use whose pause is over."""
        now = time.monotonic()
        before = self._names[: self._names.index(peer.name)]
        return [name for name in before if now >= peer.retry_at.get(name, now + 1)]

    async def _climb(self, peer: _Peer) -> None:
        """Test better transports while the one in use goes on; its link stays for a next time."""
        try:
            tcp, instance, offers = await self._meet(peer.address)
            for name in self._better(peer) if instance == peer.instance else ():
                with contextlib.suppress(HandoffError):  # logged, and left alone for longer
                    await self._try(peer, name, tcp, offers)
                    return
        except HandoffError as error:
            log.debug("transport_climb_failed", peer=peer.address, error=str(error))
        finally:
            peer.climbing = False

    # State --------------------------------------------------------------------------------

    def links(self) -> dict[str, str]:
        """See Transport. From any thread."""
        return {p.address: p.name for p in list(self._peers.values()) if p.link is not None}

    def take_events(self) -> dict[str, int]:
        """See Transport. From any thread."""
        with self._lock:
            events, self._events = dict(self._events), collections.Counter()
        return events

    def _count(self, name: str) -> None:
        with self._lock:
            self._events[name] += 1

    async def _trim(self) -> None:
        """Forget the peers longest unused when there are too many."""
        while len(self._peers) > MAX_PEERS:
            _, peer = self._peers.popitem(last=False)
            await self._close_sides(peer)

    async def _close_sides(self, peer: _Peer) -> None:
        """Close all links but tcp's, which its transport owns."""
        for name, link in list(peer.links.items()):
            if name != "tcp":
                await link.close()
        peer.links.clear()

    async def close(self) -> None:
        """Stop listening, close every link."""
        await self._tasks.cancel()
        for peer in list(self._peers.values()):
            await self._close_sides(peer)
        self._peers.clear()
        for side in self._sides.values():
            await side.close()
        await self._tcp.close()


def _parse_offers(told: bytes) -> tuple[str, dict[str, Offer]]:
    """Instance and offers of a peer. What is not understood is left out: a later version's."""
    try:
        message = json.loads(told[:MAX_ANSWER_BYTES]) if told else {}
        instance, offers = str(message.get("instance", "")), message.get("offers", {})
        texts = {
            name: {str(k): v for k, v in offer.items() if isinstance(v, str)}
            for name, offer in offers.items()
        }
    except (ValueError, AttributeError) as error:
        raise HandoffError(f"the peer's offers cannot be read: {error}") from error
    return instance, texts
