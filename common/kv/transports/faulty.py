"""A transport whose frames meet faults on their way; see common.faults."""

import asyncio

from common.faults import Faults
from common.kv.transports.base import PROBE_TIMEOUT_S, FrameHandler, Link, Transport

POINT = "handoff.send"


def with_faults(transport: Transport, faults: Faults) -> Transport:
    """The transport itself, unless faults are asked for."""
    return FaultyTransport(transport, faults) if faults.at(POINT) else transport


class FaultyTransport:
    """Everything of `inner`, but links lose, delay, double, reorder and damage data frames."""

    def __init__(self, inner: Transport, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults
        self._links: dict[Link, FaultyLink] = {}

    async def listen(self, host: str, port: int, on_frame: FrameHandler) -> int:
        return await self._inner.listen(host, port, on_frame)

    async def connect(self, address: str) -> Link:
        link = await self._inner.connect(address)
        self._links = {inner: faulty for inner, faulty in self._links.items() if not inner.closed}
        return self._links.setdefault(link, FaultyLink(link, self._faults))

    async def probe(self, address: str, timeout_s: float = PROBE_TIMEOUT_S) -> float:
        return await self._inner.probe(address, timeout_s)

    def take_events(self) -> dict[str, int]:
        return self._inner.take_events()

    def links(self) -> dict[str, str]:
        return self._inner.links()

    async def close(self) -> None:
        await self._inner.close()


class FaultyLink:
    """One link with faults."""

    def __init__(self, inner: Link, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults
        self._tasks: set[asyncio.Task[None]] = set()
        # Set when a frame was sent, for the one that waits to come after it.
        self._passed = asyncio.Event()

    @property
    def transport(self) -> str:
        return self._inner.transport

    @property
    def closed(self) -> bool:
        return self._inner.closed

    async def probe(self) -> float:
        return await self._inner.probe()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._inner.close()

    async def send(
        self, header: bytes, payload: bytes | bytearray | memoryview
    ) -> "asyncio.Future[int]":
        """See Link."""
        rules = {rule.kind: rule for rule in self._faults.draw(POINT)}
        if "stall" in rules:
            await asyncio.sleep(rules["stall"].seconds)
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if "drop" in rules:
            return answer  # nobody ever answers: the lease ends it
        if "truncate" in rules or "flip" in rules:
            frame = self._faults.damage(POINT, header + bytes(payload), rules)
            header, payload = frame[: len(header)], frame[len(header) :]
        late = rules.get("delay") or rules.get("reorder")
        if late is not None:
            # The frame's bytes may be reused once this returns.
            self._later(self._send_late(late.kind, late.seconds, header, bytes(payload), answer))
            return answer
        if "duplicate" in rules:
            await self._inner.send(header, bytes(payload))
        sent = await self._inner.send(header, payload)
        self._passed.set()
        return sent

    async def _send_late(
        self, kind: str, seconds: float, header: bytes, payload: bytes, answer: "asyncio.Future"
    ) -> None:
        self._passed.clear()
        try:
            async with asyncio.timeout(seconds):
                # A delayed frame waits for its time, a reordered one for the frame after it too.
                await (self._passed.wait() if kind == "reorder" else asyncio.sleep(seconds))
        except TimeoutError:
            pass
        try:
            status = await (await self._inner.send(header, payload))
        except Exception as error:
            if not answer.done():
                answer.set_exception(error)
            return
        if not answer.done():
            answer.set_result(status)

    def _later(self, work: "asyncio.Coroutine") -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
