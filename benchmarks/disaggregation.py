"""When is prefill elsewhere worth it? The defaults of --remote-prefill-* are from here.

    python benchmarks/disaggregation.py --model models/baton-tiny --rounds 9

A prefill and a decode worker on this machine, each with half of the cores, driven over a gateway's
session. Both sides of a comparison alternate within a round, each with a prompt of its own (nothing
is found in a cache); a figure is the median over rounds of remote over local: above 1, prefill on
the decode worker gives the first token earlier.

suffix  the first token's time by uncached tokens, both workers idle
load    the same for one length, with other prompts under way at the prefill worker
stall   the longest gap between two tokens of streams that run on the decode worker meanwhile
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from baton.cli.ports import any_free
from baton.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from common.rpc.channel import connect
from common.rpc.probe import probe

ROOT = Path(__file__).resolve().parent.parent
START_S = 120.0
SUFFIXES = (16, 32, 64, 128, 256, 512, 1000)
LOADS = (0, 512, 1024, 2048, 4096, 8192)
LOAD_PROMPT = 512
STREAMS = 4


@dataclass
class Reply:
    """When the tokens of a request came; monotonic seconds. `trace` is its trace id, 16 bytes."""

    sent: float
    trace: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    times: list[float] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def first(self) -> float:
        """Seconds to the first token."""
        while not self.times:
            self.changed.clear()
            await self.changed.wait()
        return self.times[0] - self.sent

    @property
    def longest_gap(self) -> float:
        return max(b - a for a, b in itertools.pairwise(self.times))


class Session:
    """One Session stream with a decode worker, as a gateway has it."""

    def __init__(self, channel: grpc.aio.Channel, prefill: str, vocab: int) -> None:
        self._call = worker_pb2_grpc.DecodeServiceStub(channel).Session()
        self._prefill = prefill
        self._random = random.Random(time.monotonic_ns())
        self._vocab = vocab
        self._replies: dict[str, Reply] = {}
        self._numbers = itertools.count()
        self._reader: asyncio.Task[None] | None = None

    async def open(self) -> None:
        await self._call.write(worker_pb2.SessionRequest(hello=worker_pb2.Hello(gateway_id="b")))
        await self._call.read()
        self._reader = asyncio.create_task(self._read())

    async def ask(self, tokens: int, *, remote: bool, max_tokens: int = 1) -> tuple[str, Reply]:
        """Submit a prompt that nobody has seen."""
        name = str(next(self._numbers))
        reply = self._replies[name] = Reply(time.monotonic())
        submit = worker_pb2.Submit(
            request_id=name,
            token_ids=[self._random.randrange(10, self._vocab) for _ in range(tokens)],
            sampling=common_pb2.SamplingParams(
                temperature=0.0, max_tokens=max_tokens, ignore_eos=True
            ),
            remaining_ms=600_000,
            prefill_candidates=[self._prefill] if remote else [],
            traceparent=f"00-{reply.trace.hex()}-{secrets.token_hex(8)}-01",
        )
        await self._call.write(worker_pb2.SessionRequest(submit=submit))
        return name, reply

    async def first_token_s(self, tokens: int, *, remote: bool) -> float:
        _, reply = await self.ask(tokens, remote=remote)
        return await reply.first()

    async def cancel(self, name: str) -> None:
        cancel = worker_pb2.Cancel(request_id=name)
        await self._call.write(worker_pb2.SessionRequest(cancel=cancel))

    async def _read(self) -> None:
        while (message := await self._call.read()) is not grpc.aio.EOF:
            now = time.monotonic()
            for delta in message.frame.deltas:
                reply = self._replies[delta.request_id]
                reply.times += [now] * len(delta.token_ids)
                reply.changed.set()

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
        self._call.cancel()


@contextmanager
def worker(role: str, model: Path, folder: Path, *flags: str) -> Iterator[str]:
    """A worker process, with half of the cores unless `flags` say otherwise; its address once it
    serves."""
    port = any_free()
    address, name = f"127.0.0.1:{port}", f"{role}-{port}.log"
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    command = [sys.executable, "-m", f"services.{role}.main", f"--port={port}"]
    command += [f"--model={model}", f"--threads={threads}", "--exit-with-parent", *flags]
    with (folder / name).open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        end = time.monotonic() + START_S
        while (failure := probe(address, 1.0)) is not None:
            if process.poll() is not None or time.monotonic() > end:
                text = (folder / name).read_text(errors="replace")[-2000:]
                raise SystemExit(f"error: {role} worker does not serve ({failure}):\n{text}")
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(30)


async def ratios(
    rounds: int, measure: Callable[[bool], Awaitable[float]]
) -> tuple[float, float, float]:
    """Median remote and local seconds, and the median of the rounds' ratios."""
    pairs = []
    for number in range(rounds):
        order = (True, False) if number % 2 else (False, True)
        found = {remote: await measure(remote) for remote in order}
        pairs.append((found[True], found[False]))
    remote, local = (statistics.median(column) for column in zip(*pairs, strict=True))
    return remote, local, statistics.median(r / here for r, here in pairs)


async def suffix(session: Session, rounds: int, longest: int) -> None:
    print("\nsuffix: uncached tokens, remote ms, local ms, remote / local")
    for tokens in (n for n in SUFFIXES if n < longest):
        row = await ratios(rounds, lambda r, n=tokens: session.first_token_s(n + 1, remote=r))
        print(f"{tokens:8d} {row[0] * 1e3:9.1f} {row[1] * 1e3:9.1f} {row[2]:8.2f}", flush=True)


async def load(session: Session, rounds: int, longest: int) -> None:
    length = min(LOAD_PROMPT, longest - 2)
    print(f"\nload: tokens under way at the prefill worker, then as above for {length} tokens")
    for ahead in LOADS:

        async def measure(remote: bool, ahead: int = ahead) -> float:
            others = [await session.ask(length + 1, remote=True) for _ in range(ahead // length)]
            seconds = await session.first_token_s(length + 1, remote=remote)
            await asyncio.gather(*(reply.first() for _, reply in others))
            return seconds

        row = await ratios(rounds, measure)
        print(f"{ahead:8d} {row[0] * 1e3:9.1f} {row[1] * 1e3:9.1f} {row[2]:8.2f}", flush=True)


async def stall(session: Session, rounds: int, longest: int) -> None:
    print(f"\nstall: tokens prefilled beside {STREAMS} streams, longest gap in ms, then the ratio")
    for tokens in (n for n in SUFFIXES if n < longest):

        async def measure(remote: bool, tokens: int = tokens) -> float:
            streams = [
                await session.ask(8, remote=False, max_tokens=longest // 2) for _ in range(STREAMS)
            ]
            await asyncio.gather(*(reply.first() for _, reply in streams))
            await session.first_token_s(tokens + 1, remote=remote)
            for name, _ in streams:
                await session.cancel(name)
            return statistics.median(r.longest_gap for _, r in streams if len(r.times) > 1)

        row = await ratios(rounds, measure)
        print(f"{tokens:8d} {row[0] * 1e3:9.1f} {row[1] * 1e3:9.1f} {row[2]:8.2f}", flush=True)


async def run(args: argparse.Namespace, prefill: str, decode: str) -> None:
    config = json.loads((args.model / "config.json").read_text())
    longest = min(config["max_position_embeddings"], 1 << 14)
    async with connect(decode) as channel:
        session = Session(channel, prefill, config["vocab_size"])
        await session.open()
        for remote in (True, False):  # the first of each way is slower
            await session.first_token_s(200, remote=remote)
        for part in (suffix, load, stall):
            if part.__name__ in args.parts.split(","):
                await part(session, args.rounds, longest)
        await session.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "baton-tiny")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", default="suffix,load,stall")
    args = parser.parse_args()
    # Everything is asked of the prefill worker that the comparison says.
    always = ("--remote-prefill-min-tokens=1", "--remote-prefill-max-tokens-ahead=0")
    with (
        tempfile.TemporaryDirectory() as folder,
        worker("prefill", args.model, Path(folder)) as prefill,
        worker("decode", args.model, Path(folder), f"--prefill={prefill}", *always) as decode,
    ):
        asyncio.run(run(args, prefill, decode))
    return 0


if __name__ == "__main__":
    sys.exit(main())
