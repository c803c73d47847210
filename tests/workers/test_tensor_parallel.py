"""Workers of two ranks: how they serve, stop and die."""

import asyncio
import os
import signal
import time

import pytest

from tests.engine.zoo import checkpoint
from tests.support.ranks import alive, ranks_of
from tests.workers.conftest import workers
from tests.workers.support import GatewaySession, until

DEATH_S = 5.0


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Workers that are ended by the tests, one each."""
    with workers(checkpoint("llama", False), tmp_path_factory.mktemp("ranks")) as begin:
        yield iter(begin("decode", "decode", "prefill", flags=("--tensor-parallel", "2")))


async def test_a_worker_ends_within_seconds_and_says_which_rank_was_killed(three):
    worker = next(three)
    (rank,) = ranks_of(worker.process.pid)
    os.kill(rank, signal.SIGKILL)
    killed = time.monotonic()
    assert await asyncio.to_thread(worker.process.wait, 40) == 1
    assert time.monotonic() - killed < DEATH_S
    assert (
        worker.text()
        .splitlines()[-1]
        .startswith(f"error: rank 1 (pid {rank}) was killed by SIGKILL")
    )


async def test_the_ranks_end_within_seconds_of_a_worker_that_is_killed(three):
    worker = next(three)
    (rank,) = ranks_of(worker.process.pid)
    worker.process.kill()
    await until(lambda: not alive(rank), "the rank's end", DEATH_S)


async def test_sigterm_ends_a_worker_and_its_ranks_with_zero(three):
    worker = next(three)
    (rank,) = ranks_of(worker.process.pid)
    worker.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(worker.process.wait, 40) == 0
    assert not alive(rank)


async def test_a_worker_ends_within_seconds_though_its_engine_never_comes_back(start):
    """As on a GPU, whose driver waits for a rank that is gone."""
    # Of this seed the warm-up's step is let by, and one of the next ten is not.
    faults = ("--faults", "seed=1 engine.step:stall=0.2,300")
    worker = start("decode", flags=("--tensor-parallel", "2", *faults))
    (rank,) = ranks_of(worker.process.pid)
    async with GatewaySession(worker.address) as session:
        await session.submit([5, 6, 7], max_tokens=50)
        await until(lambda: '"event": "fault"' in worker.text(), "the stall", 20)
        os.kill(rank, signal.SIGKILL)
        killed = time.monotonic()
        assert await asyncio.to_thread(worker.process.wait, 40) == 1
    assert time.monotonic() - killed < DEATH_S
    last = worker.text().splitlines()[-1]
    assert last.startswith(f"error: rank 1 (pid {rank}) was killed by SIGKILL")


async def test_ranks_that_cannot_share_the_heads_are_refused(start):
    worker = start("decode", flags=("--tensor-parallel", "4"), ready=False)
    assert await asyncio.to_thread(worker.process.wait, 40) == 2
    assert "tensor_parallel is 4" in worker.text().splitlines()[-1]
