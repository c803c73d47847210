"""Time to the first token, prefilled elsewhere (KV sent layer by layer, or afterwards) and here.

    python benchmarks/ttft.py --rounds 5

Three processes: a decode worker, a prefill worker that sends each layer's KV while the next layer
computes, and one that sends when the whole prompt is computed. Each may use all cores: only one
computes at a time, since one request is asked at a time. `here` is the decode worker's own
prefill. The sides take turns within a round, each with a prompt of its own, so that nothing is
found in a cache. Caches hold little more than the longest prompt, which every side meets before
anything is measured: no page is touched for the first time, as in a worker that has run for a
while. The model is the one of benchmarks/cpu_peers.py, in bfloat16, unless another is named.

ms       to the first token, over a gateway's session: median, least and most of the rounds
/ here   the median over rounds of this side's time by the time of `here` in the same round
ask      until the worker that prefills begins its first step, ms; this and the rest from the
         request's trace, medians
prefill  from there until the last layer of the prompt is computed
hand over  from there until the decode worker begins its first step
first    that step, until the token is there; where the prompt is prefilled here it is the same
         step as the prompt's last one
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import grpc
from cpu_peers import make_model
from disaggregation import Reply, Session, worker

from baton.v1 import worker_pb2, worker_pb2_grpc
from common.rpc.channel import connect

LENGTHS = "512,2048,8191"
# Over those of the longest prompt.
SPARE_BLOCKS = 32
STALL_S = 60
# What workers get to end the spans of a request whose token is here.
SPANS_S = 10.0
SIDES = ("here", "layer by layer", "afterwards")


@dataclass(frozen=True)
class Times:
    """Of one request, in seconds; see above. Those that the side does not have are 0."""

    total: float
    ask: float = 0.0
    prefill: float = 0.0
    hand_over: float = 0.0
    first: float = 0.0


@dataclass(frozen=True)
class Side:
    """A way to have a prompt prefilled. `channels` lead to all workers that take part."""

    session: Session
    remote: bool
    channels: tuple[grpc.aio.Channel, ...]

    async def measure(self, tokens: int) -> Times:
        _, reply = await self.session.ask(tokens, remote=self.remote)
        total = await reply.first()
        return _split(total, await self._spans(reply), self.remote)

    async def _spans(self, reply: Reply) -> dict[str, tuple[int, int]]:
        """Start and end by name, ns of the wall clock, which the workers share here."""
        request = worker_pb2.GetTraceRequest(trace_id=reply.trace)
        stubs = [worker_pb2_grpc.WorkerServiceStub(channel) for channel in self.channels]
        wanted = {"decode.request", "prefill.request"} if self.remote else {"decode.request"}
        async with asyncio.timeout(SPANS_S):
            while True:  # the token may be here before the prefill worker has ended its call
                answers = [await stub.GetTrace(request) for stub in stubs]
                spans = {s.name: (s.start_unix_ns, s.end_unix_ns) for a in answers for s in a.spans}
                if wanted <= spans.keys():
                    return spans
                await asyncio.sleep(0.02)


def _split(total: float, spans: dict[str, tuple[int, int]], remote: bool) -> Times:
    asked = spans["decode.request"][0]
    step, token = spans["decode.first_token"]
    if not remote:
        return Times(total, (step - asked) / 1e9, first=(token - step) / 1e9)
    if "prefill.compute" not in spans:
        raise SystemExit("error: a handoff failed; the decode worker computed the prompt itself")
    begun, computed = spans["prefill.compute"]
    parts = (begun - asked, computed - begun, step - computed, token - step)
    return Times(total, *(part / 1e9 for part in parts))


async def measure(sides: dict[str, Side], lengths: list[int], rounds: int) -> dict:
    """The times of all rounds by length and side."""
    found: dict[int, dict[str, list[Times]]] = {}
    for side in sides.values():
        await side.measure(max(lengths))
    for length in lengths:
        found[length] = {name: [] for name in sides}
        for number in range(rounds + 1):
            # Each round begins with another side; the first is not counted.
            start = number % len(sides)
            for name in [*list(sides)[start:], *list(sides)[:start]]:
                times = await sides[name].measure(length)
                if number:
                    found[length][name].append(times)
        show(length, found[length])
    return found


def show(length: int, found: dict[str, list[Times]]) -> None:
    print(f"\n{length} tokens, {len(found['here'])} rounds, load {os.getloadavg()[0]:.1f}")
    print(f"{'':16}{'ms':>9}{'min':>9}{'max':>9}{'/ here':>8}"
          f"{'ask':>8}{'prefill':>9}{'hand over':>11}{'first':>9}")  # fmt: skip
    for name, rounds in found.items():
        totals = sorted(t.total for t in rounds)
        ratio = statistics.median(
            t.total / here.total for t, here in zip(rounds, found["here"], strict=True)
        )
        ask, prefill, hand_over, first = (
            statistics.median(getattr(t, part) for t in rounds) * 1e3
            for part in ("ask", "prefill", "hand_over", "first")
        )
        print(
            f"{name:16}{statistics.median(totals) * 1e3:9.1f}{totals[0] * 1e3:9.1f}"
            f"{totals[-1] * 1e3:9.1f}{ratio:8.3f}{ask:8.2f}{prefill:9.1f}{hand_over:11.2f}"
            f"{first:9.2f}",
            flush=True,
        )


async def run(
    args: argparse.Namespace, lengths: list[int], decode: str, prefill: dict[str, str]
) -> None:
    vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    async with connect(decode) as channel:
        sides: dict[str, Side] = {}
        for name in SIDES:
            address = prefill.get(name, "")
            session = Session(channel, address, vocab)
            await session.open()
            others = (connect(address),) if address else ()
            sides[name] = Side(session, bool(address), (channel, *others))
        await measure(sides, lengths, args.rounds)
        for side in sides.values():
            await side.session.close()
            for other in side.channels[1:]:
                await other.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("/tmp/baton-llama-88m"))
    parser.add_argument("--lengths", default=LENGTHS, help="prompt tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--transports", default="shm,tcp", help="as of the workers")
    args = parser.parse_args()
    make_model(args.model)
    lengths = [int(length) for length in args.lengths.split(",")]
    limit = max(lengths) + 1  # with the answer
    flags = [f"--threads={args.threads}", "--dtype=bfloat16", f"--transports={args.transports}"]
    flags += [f"--max-model-len={limit}", f"--num-blocks={SPARE_BLOCKS + limit // 16}"]
    # Sent afterwards, nothing comes for as long as the prompt is computed.
    always = ("--remote-prefill-min-tokens=1", "--remote-prefill-max-tokens-ahead=0")
    always += (f"--handoff-stall-s={STALL_S}",)
    with (
        tempfile.TemporaryDirectory() as text,
        worker("prefill", args.model, Path(text), *flags) as live,
        worker("prefill", args.model, Path(text), *flags, "--no-layer-wise") as after,
        worker("decode", args.model, Path(text), *flags, *always, f"--prefill={live}") as decode,
    ):
        asyncio.run(run(args, lengths, decode, {"layer by layer": live, "afterwards": after}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
