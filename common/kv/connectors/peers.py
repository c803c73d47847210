"""The prefill workers that a decode worker knows, and whether it has met them.

Two processes meet before the first request goes from one to the other: the prefill worker compares
whose KV each of them has (model, KV dtype, layout, frame version, and whether one's block size
divides the other's) and makes a test transfer to the decode worker's data plane. Either side's
restart makes it another process, to be met again: the prefill worker takes no request from a
process that it has not met.
"""

import asyncio
import collections
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from baton.v1 import worker_pb2 as pb
from common.errors import BatonError, DeadlineExceeded, InvalidRequest, Unavailable
from common.kv.connectors.prefill_call import Metadata, PrefillClient
from common.rpc.discovery import resolve

log = structlog.get_logger("handoff")

# The code of a refusal by a prefill worker that does not know the caller's process.
NOT_MET = "not_met"
# The test transfer tries each transport for up to 3 s.
MEET_TIMEOUT_S = 8.0
ROUND_S = 1.0
# How long one that does not fit, or does not answer, is passed over.
PASS_OVER_S = 5.0
MAX_PEERS = 512


@dataclass(frozen=True, slots=True)
class Peer:
    """A prefill worker. `status` is met, refused (it does not fit) or unreachable; `since` is
    monotonic seconds."""

    address: str
    status: str
    since: float
    worker_id: str = ""
    incarnation: str = ""
    error: str = ""
    test_transfer_ms: float = 0.0


class Peers:
    """Meets prefill workers and calls them. Used on one loop; `in_order` and `describe` may be
    called from any thread.

    client     the calls
    introduce  what this decode worker says of itself, once its model has loaded
    """

    def __init__(self, client: PrefillClient, introduce: Callable[[], pb.MeetRequest]) -> None:
        self._client = client
        self._introduce = introduce
        self._peers: collections.OrderedDict[str, Peer] = collections.OrderedDict()
        self._locks: dict[str, asyncio.Lock] = {}
        self._keeper: asyncio.Task[None] | None = None

    # From any thread ----------------------------------------------------------------------

    def in_order(self, addresses: Iterable[str]) -> tuple[str, ...]:
        """Those worth asking, in the order given: not those that do not fit, and last those that
        did not answer lately."""
        now = time.monotonic()
        good, late = [], []
        for address in addresses:
            peer = self._peers.get(address)
            fresh = peer is not None and now - peer.since < PASS_OVER_S
            if peer is None or peer.status == "met" or not fresh:
                good.append(address)
            elif peer.status == "unreachable":
                late.append(address)
        return (*good, *late)

    def describe(self) -> list[pb.Peer]:
        """For /debug/state."""
        return [
            pb.Peer(
                address=peer.address,
                worker_id=peer.worker_id,
                incarnation=peer.incarnation,
                status=peer.status,
                error=peer.error,
                test_transfer_ms=peer.test_transfer_ms,
            )
            for peer in list(self._peers.values())
        ]

    # On the loop --------------------------------------------------------------------------

    async def prefill(
        self, address: str, request: pb.PrefillRequest, timeout_s: float, metadata: Metadata
    ) -> pb.PrefillResponse:
        """One attempt of a handoff: the call, after a meeting where there was none with the
        process that answers. Raises BatonError."""
        await self.meet(address)
        try:
            try:
                return await self._client.prefill(address, request, timeout_s, metadata)
            except InvalidRequest as error:
                if error.code != NOT_MET:
                    raise
            self._forget(address)  # it has restarted, or forgotten us
            await self.meet(address)
            return await self._client.prefill(address, request, timeout_s, metadata)
        except Unavailable as error:
            self._note(Peer(address, "unreachable", time.monotonic(), error=str(error)))
            raise

    async def meet(self, address: str) -> None:
        """Meet the process at an address unless it was met. Raises InvalidRequest when it does not
        fit, another BatonError when it does not answer or the test transfer fails."""
        async with self._locks.setdefault(address, asyncio.Lock()):
            known = self._peers.get(address)
            if known is not None and known.status == "met":
                return
            try:
                async with asyncio.timeout(MEET_TIMEOUT_S):
                    answer = await self._client.meet(address, self._introduce(), MEET_TIMEOUT_S)
            except TimeoutError as error:
                late = DeadlineExceeded(f"{address} did not answer within {MEET_TIMEOUT_S:g} s")
                self._note(Peer(address, "unreachable", time.monotonic(), error=str(late)))
                raise late from error
            except BatonError as error:
                status = "refused" if isinstance(error, InvalidRequest) else "unreachable"
                self._note(Peer(address, status, time.monotonic(), error=str(error)))
                raise
            self._note(
                Peer(
                    address,
                    "met",
                    time.monotonic(),
                    answer.worker_id,
                    answer.incarnation,
                    test_transfer_ms=answer.test_transfer_ms,
                )
            )

    async def keep_meeting(self, spec: str) -> None:
        """Every second meet those of `spec` that are not met. Ends by being cancelled.

        spec  host:port[,host:port]; names are resolved anew each time
        """
        self._keeper = asyncio.current_task()
        while True:
            try:
                await self._meet_all(await resolve(spec))
            except Exception:  # whatever it is, those that come later must be met too
                log.exception("meeting_failed")
            await asyncio.sleep(ROUND_S)

    async def meet_first(self, spec: str, timeout_s: float) -> bool:
        """Wait until one of `spec` is met. False: `timeout_s` passed, every one that answers
        does not fit, or the names stand for none."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            addresses = await resolve(spec)
            await self._meet_all(addresses)
            found = [self._peers[a].status for a in addresses if a in self._peers]
            if "met" in found:
                return True
            if all(status == "refused" for status in found):
                return False
            await asyncio.sleep(ROUND_S / 4)
        return False

    async def close(self) -> None:
        """Call nobody any more."""
        if self._keeper is not None:
            self._keeper.cancel()
        await self._client.close()

    async def _meet_all(self, addresses: set[str]) -> None:
        async def meet(address: str) -> None:
            try:
                await self.meet(address)
            except BatonError as error:
                log.debug("peer_not_met", peer=address, error=str(error))  # told when it changes

        await asyncio.gather(*(meet(address) for address in addresses))

    def _note(self, peer: Peer) -> None:
        before = self._peers.get(peer.address)
        self._peers[peer.address] = peer
        self._peers.move_to_end(peer.address)
        while len(self._peers) > MAX_PEERS:
            address, _ = self._peers.popitem(last=False)
            self._locks.pop(address, None)
        if before is not None and (before.status, before.error) == (peer.status, peer.error):
            return
        if peer.status == "met":
            log.info("peer_met", peer=peer.address, worker=peer.worker_id, ms=peer.test_transfer_ms)
        elif peer.status == "refused":
            log.error("peer_refused", peer=peer.address, error=peer.error)
        else:
            log.warning("peer_unreachable", peer=peer.address, error=peer.error)

    def _forget(self, address: str) -> None:
        self._peers.pop(address, None)
