"""A short soak of a real mesh, and the rule that says what is flat."""

import os
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.soak.flat import MIN_SAMPLES, THREAD_SLACK, Sample, sample, settled, trend
from tests.soak.run import MIB, soak, soak_mesh

REST = Sample(rss_bytes=300 * MIB, descriptors=20, threads=12)


def test_a_short_soak_is_flat_and_right(tmp_path: Path) -> None:
    # Caches still fill in so few requests: what grows by 70 KiB with each of them is seen.
    with soak_mesh(tmp_path, decode=1) as mesh:
        assert soak(mesh, 480, seed=3, samples=8, memory_slack_bytes=16 * MIB) == []


def test_what_fills_in_the_first_quarter_and_then_rests_is_flat() -> None:
    rng = random.Random(5)
    filling = [replace(REST, rss_bytes=(200 + 10 * i) * MIB, descriptors=i) for i in range(10)]
    resting = [replace(REST, rss_bytes=300 * MIB + rng.randrange(MIB)) for _ in range(30)]
    assert trend(filling + resting).broken(4 * MIB) == []


@pytest.mark.parametrize(
    ("grows", "step", "word"),
    [("rss_bytes", MIB // 4, "memory"), ("descriptors", 1, "descr"), ("threads", 1, "threads")],
)
def test_what_grows_with_the_requests_is_not(grows: str, step: int, word: str) -> None:
    held = [replace(REST, **{grows: getattr(REST, grows) + i * step}) for i in range(40)]
    (why,) = trend(held).broken(4 * MIB)
    assert why.startswith(word)


def test_one_descriptor_is_too_many_and_a_thread_of_a_pool_is_not() -> None:
    held = [REST] * 20 + [replace(REST, descriptors=21, threads=12 + THREAD_SLACK)] * 20
    assert trend(held).broken(0) == ["descriptors: 20, then 21"]


def test_too_few_samples_say_nothing() -> None:
    with pytest.raises(ValueError, match="say nothing"):
        trend([REST] * (MIN_SAMPLES - 1))


def test_a_sample_sees_memory_descriptors_and_threads() -> None:
    ended = threading.Event()
    before = sample(os.getpid())
    held = bytearray(os.urandom(32 * MIB))
    with open(os.devnull) as _:
        thread = threading.Thread(target=ended.wait)
        thread.start()
        (after,) = settled(lambda: [sample(os.getpid())])
        ended.set()
        thread.join()
    assert after.rss_bytes - before.rss_bytes > len(held) * 0.9
    assert after.descriptors == before.descriptors + 1
    assert after.threads == before.threads + 1
