"""What a gateway has not read yet."""

import asyncio

from baton.v1 import worker_pb2 as pb

# Live requests are bounded by the engine; this bounds the refused ones that nobody reads about.
MAX_DELTAS = 8192


class Outbox:
    """One delta per request, however many steps it covers: a slow reader gets fewer, longer
    frames, and memory is bounded by the tokens of the requests alive. Used on one loop."""

    def __init__(self) -> None:
        self._deltas: dict[str, pb.TokenDelta] = {}
        self._refusals: list[pb.TokenDelta] = []
        self._step = 0
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False

    def put(self, delta: pb.TokenDelta, step: int) -> None:
        """Add to what is to be sent. Deltas of one request are merged: tokens append."""
        if self._closed:
            return
        waiting = self._deltas.get(delta.request_id)
        if waiting is None:
            self._deltas[delta.request_id] = delta
        else:
            waiting.MergeFrom(delta)
        self._added(step)

    def refuse(self, delta: pb.TokenDelta, step: int) -> None:
        """Add a delta that must not be merged: the answer to a Submit that was not taken."""
        if self._closed:
            return
        self._refusals.append(delta)
        self._added(step)

    def _added(self, step: int) -> None:
        self._step = step
        self._filled.set()
        if len(self._refusals) + len(self._deltas) >= MAX_DELTAS:
            self._room.clear()

    async def room(self) -> None:
        """Wait until the reader has caught up; called before more is taken from it."""
        await self._room.wait()

    async def next(self) -> pb.StepFrame | None:
        """The next frame; None once closed and empty."""
        await self._filled.wait()
        if not self._deltas and not self._refusals:
            return None
        frame = pb.StepFrame(step=self._step, deltas=[*self._refusals, *self._deltas.values()])
        self._refusals, self._deltas = [], {}
        self._room.set()
        if not self._closed:
            self._filled.clear()
        return frame

    def close(self) -> None:
        """Take no more; what waits is still sent."""
        self._closed = True
        self._filled.set()
        self._room.set()
