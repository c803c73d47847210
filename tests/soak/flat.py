"""What a process holds, and the rule that says whether it is flat."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Threads of pools that come and go with the load (gRPC's, asyncio's).
THREAD_SLACK = 2
MIN_SAMPLES = 8
SETTLE_S = 5.0
SETTLE_STEP_S = 0.1


@dataclass(frozen=True, slots=True)
class Sample:
    """What a process held between two batches of requests."""

    rss_bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True, slots=True)
class Trend:
    """Medians of the second quarter and of the last one. The first quarter fills caches that have a
    limit; from then on nothing may grow."""

    before: Sample
    after: Sample

    def broken(self, memory_slack_bytes: int) -> list[str]:
        """In words, what grew by more than it may."""
        grown = []
        memory = self.after.rss_bytes - self.before.rss_bytes
        if memory > memory_slack_bytes:
            grown.append(f"memory grew by {memory / 2**20:.1f} MiB")
        if self.after.descriptors > self.before.descriptors:
            grown.append(f"descriptors: {self.before.descriptors}, then {self.after.descriptors}")
        if self.after.threads > self.before.threads + THREAD_SLACK:
            grown.append(f"threads: {self.before.threads}, then {self.after.threads}")
        return grown


def trend(samples: Sequence[Sample]) -> Trend:
    """Of samples that were taken after equal numbers of requests, MIN_SAMPLES at least."""
    quarter = len(samples) // 4
    if len(samples) < MIN_SAMPLES:
        raise ValueError(f"{len(samples)} samples say nothing; take {MIN_SAMPLES} at least")
    return Trend(_median(samples[quarter : 2 * quarter]), _median(samples[-quarter:]))


def _median(samples: Sequence[Sample]) -> Sample:
    """Of each field: one that was measured, so that half a descriptor is not one."""

    def of(field: str) -> int:
        return statistics.median_low(getattr(sample, field) for sample in samples)

    return Sample(of("rss_bytes"), of("descriptors"), of("threads"))


def sample(pid: int) -> Sample:
    """What the process holds now."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return Sample(
        rss_bytes=int(status["VmRSS"].split()[0]) * 1024,
        descriptors=len(os.listdir(f"/proc/{pid}/fd")),
        threads=int(status["Threads"]),
    )


def settled(take: Callable[[], list[Sample]]) -> list[Sample]:
    """Samples of processes at rest: two in a row that agree in descriptors (connections that their
    client has closed are closed here a moment later), or the last ones after SETTLE_S."""
    end = time.monotonic() + SETTLE_S
    last = take()
    while True:
        time.sleep(SETTLE_STEP_S)  # others close their ends meanwhile
        now = take()
        if [s.descriptors for s in now] == [s.descriptors for s in last] or time.monotonic() > end:
            return now
        last = now
