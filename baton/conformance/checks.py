"""What every KV connector must do, as functions that raise AssertionError. Whichever KV a step
reads is compared with what it must be, so each check also proves that no wrong byte was used.
"""

import inspect
import os
import random
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from baton.conformance.driven import BLOCK_SIZE, LOOK_S, TOKEN, VOCAB, DrivenWorker
from baton.conformance.late import LateBus
from common.engine.sequence import Phase
from common.kv.connector import KVConnector

# How long what is saved may take to be found, and what is over to be let go of.
PATIENCE_S = 10.0
UNTOUCHED = 0x5A


@dataclass(frozen=True)
class Subject:
    """The connector under test.

    make      a new connector each time; what one of them saves, the next ones find
    transfer  what requests carry for it (EngineRequest.transfer)
    loads     False: it only saves or sends, nothing is ever loaded
    spoil     makes what was saved unusable, or who sends it vanish; None: that cannot be done
    """

    make: Callable[[], KVConnector]
    transfer: Any = None
    loads: bool = True
    spoil: Callable[[], None] | None = None

    @contextmanager
    def worker(self, **fields: Any) -> Iterator[DrivenWorker]:
        """A worker with a new connector, which must hold nothing at the end."""
        worker = DrivenWorker(self.make(), **fields)
        try:
            yield worker
            worker.turns_until(worker.idle, PATIENCE_S)
        finally:
            worker.close()

    def ask(self, worker: DrivenWorker, prompt: list[int], name: str = "r", **fields: Any) -> None:
        """A request to its end."""
        worker.submit(name, prompt, transfer=self.transfer, **fields)
        output = worker.run(name)
        assert output.finish_reason == "length", output


def prompt_of(length: int) -> list[int]:
    """Tokens that nobody has stored before."""
    rng = random.Random(secrets.randbits(64))
    return [rng.randrange(VOCAB) for _ in range(length)]


def it_has_the_methods_of_the_api(subject: Subject) -> None:
    connector = subject.make()
    try:
        for name, method in inspect.getmembers(KVConnector, inspect.isfunction):
            wanted = list(inspect.signature(method).parameters)[1:]
            found = list(inspect.signature(getattr(connector, name)).parameters)
            assert found == wanted, f"{name}{found} must take {wanted}"
    finally:
        connector.shutdown()


def what_one_worker_computed_another_loads(subject: Subject) -> None:
    prompt = prompt_of(100)
    with subject.worker() as first:
        subject.ask(first, prompt)
    with subject.worker() as second:
        _load(subject, second, prompt)


def a_prompt_of_which_only_the_beginning_is_there_is_completed(subject: Subject) -> None:
    prompt = prompt_of(100)
    with subject.worker() as first:
        subject.ask(first, prompt)
    with subject.worker() as second:
        _load(subject, second, prompt)
        second.blocks.forget()
        subject.ask(second, prompt[:50] + prompt_of(60), "half")
        second.blocks.forget()
        subject.ask(second, prompt[: 2 * BLOCK_SIZE], "short")
        subject.ask(second, prompt[:BLOCK_SIZE], "one block")
        subject.ask(second, prompt[:1], "one token")


def kv_of_another_tenant_or_model_is_never_loaded(subject: Subject) -> None:
    prompt = prompt_of(100)
    with subject.worker() as first:
        subject.ask(first, prompt, tenant="one")
    with subject.worker() as second:
        subject.ask(second, prompt, "other", tenant="two")
        subject.ask(second, prompt, "none")
    with subject.worker(fingerprint=b"another-models-k") as third:
        subject.ask(third, prompt, tenant="one")


def many_requests_at_once_get_each_its_own_kv(subject: Subject) -> None:
    shared = prompt_of(40)
    prompts = [shared + prompt_of(5 + 9 * i) for i in range(8)]
    for blocks in (128, 24):  # the second with so little room that some are preempted
        with subject.worker(num_blocks=blocks) as worker:
            for i, prompt in enumerate(prompts):
                worker.submit(f"r{i}", prompt, max_tokens=4, transfer=subject.transfer)
            for i in range(len(prompts)):
                assert worker.run(f"r{i}", 2 * PATIENCE_S).finish_reason == "length"


def steps_begun_before_the_tokens_of_the_last_are_known_change_nothing(subject: Subject) -> None:
    """Some requests stop when nobody foresaw it, some are aborted, some preempted. What is found of
    theirs later, generated tokens among it, is right."""
    shared = prompt_of(40)
    prompts = [shared + prompt_of(5 + 9 * i) for i in range(8)]
    for blocks in (128, 32):
        with subject.worker(num_blocks=blocks, ahead=True) as worker:
            for i, prompt in enumerate(prompts):
                # The third time the token of a step in vain fills a block.
                stops = (0, 9, BLOCK_SIZE + -len(prompt) % BLOCK_SIZE, 27)[i % 4]
                fields = {"max_tokens": 40, "stops_after": stops, "transfer": subject.transfer}
                worker.submit(f"r{i}", prompt, **fields)
                worker.submit(f"gone{i}", prompt, **fields)
            for i in range(len(prompts)):
                worker.turn()
                worker.abort(f"gone{i}")
            ends = [worker.run(f"r{i}", 2 * PATIENCE_S).finish_reason for i in range(len(prompts))]
            assert ends == ["stop" if i % 4 else "length" for i in range(len(prompts))], ends
    with subject.worker(ahead=True) as second:
        for i, prompt in enumerate(prompts):
            subject.ask(second, [*prompt, *[TOKEN] * 40], f"again{i}")


def the_pages_of_a_device_whose_copies_come_late_are_right(subject: Subject) -> None:
    """With so little room that pages are another's before the copy of them has come."""
    shared = prompt_of(40)
    prompts = [shared + prompt_of(5 + 9 * i) for i in range(8)]
    with subject.worker(num_blocks=24, ahead=True, bus=LateBus(delay_s=0.002)) as worker:
        for i, prompt in enumerate(prompts):
            worker.submit(f"r{i}", prompt, max_tokens=20, transfer=subject.transfer)
        for i in range(len(prompts)):
            assert worker.run(f"r{i}", 2 * PATIENCE_S).finish_reason == "length"
    with subject.worker(ahead=True, bus=LateBus()) as second:
        for i, prompt in enumerate(prompts):
            subject.ask(second, [*prompt, *[TOKEN] * 20], f"again{i}")


def a_load_that_fails_is_computed(subject: Subject) -> None:
    """Both before a request comes and while its load is under way."""
    if subject.spoil is None:
        return
    prompt, later = prompt_of(100), prompt_of(100)
    with subject.worker() as first:
        subject.ask(first, prompt)
        subject.ask(first, later, "later")
    with subject.worker() as second:
        if subject.loads:
            _load(subject, second, prompt)
            second.blocks.forget()
        sequence = second.submit("during", later, transfer=subject.transfer)
        second.turns_until(lambda: sequence.phase is not Phase.WAITING)
        subject.spoil()
        assert second.run("during", 2 * PATIENCE_S).finish_reason == "length"
        second.blocks.forget()
        subject.ask(second, prompt, "after")


def an_abort_lets_go_of_the_blocks_and_nothing_late_touches_them(subject: Subject) -> None:
    """At several points of a request's life; another request gets the blocks then."""
    prompt = prompt_of(150)
    with subject.worker() as first:
        subject.ask(first, prompt)
    with subject.worker(num_blocks=16) as worker:
        for turns in range(6):
            worker.blocks.forget()
            worker.submit("gone", prompt, transfer=subject.transfer)
            for _ in range(turns):
                worker.turn()
            worker.abort("gone")
            worker.turns_until(lambda: worker.blocks.num_used == 0, PATIENCE_S)
            worker.blocks.forget()
            worker.cache.fill_(UNTOUCHED)
            for _ in range(3):  # what is late may come now
                worker.woken.wait(LOOK_S)
                worker.woken.clear()
                worker.turn()
            assert bool((worker.cache == UNTOUCHED).all()), "a page that nobody owns was written"
            worker.submit("next", prompt_of(150), max_tokens=20)
            assert worker.run("next").finish_reason == "length"
            worker.outputs.clear()
            worker.turns_until(worker.idle, PATIENCE_S)


def it_wakes_the_engine_when_there_is_something_to_collect(subject: Subject) -> None:
    prompt = prompt_of(100)
    with subject.worker() as first:
        first.submit("r", prompt, transfer=subject.transfer)
        assert first.run("r", PATIENCE_S, woken=True).finish_reason == "length"
    with subject.worker() as second:
        second.submit("r", prompt, transfer=subject.transfer)
        assert second.run("r", PATIENCE_S, woken=True).finish_reason == "length"


def its_counters_are_counts_by_name(subject: Subject) -> None:
    with subject.worker() as worker:
        subject.ask(worker, prompt_of(50))
        events = worker.connector.take_events()
        assert all(isinstance(name, str) and count >= 0 for name, count in events.items()), events
        assert worker.connector.open_handoffs() == 0


def shutdown_leaves_no_thread_and_no_descriptor(subject: Subject) -> None:
    """What a process makes once and keeps is made by the first life."""
    held = []
    for _ in range(3):
        with subject.worker() as worker:
            subject.ask(worker, prompt_of(100))
        held.append(_held())
    end = time.monotonic() + PATIENCE_S
    while (now := _held()) > held[0] and time.monotonic() < end:
        time.sleep(0.02)
    threads = [thread.name for thread in threading.enumerate()]
    assert now <= held[0], f"threads, descriptors: {held[0]} became {now}; threads are {threads}"


CHECKS: tuple[Callable[[Subject], None], ...] = (
    it_has_the_methods_of_the_api,
    what_one_worker_computed_another_loads,
    a_prompt_of_which_only_the_beginning_is_there_is_completed,
    kv_of_another_tenant_or_model_is_never_loaded,
    many_requests_at_once_get_each_its_own_kv,
    an_abort_lets_go_of_the_blocks_and_nothing_late_touches_them,
    steps_begun_before_the_tokens_of_the_last_are_known_change_nothing,
    the_pages_of_a_device_whose_copies_come_late_are_right,
    it_wakes_the_engine_when_there_is_something_to_collect,
    its_counters_are_counts_by_name,
    shutdown_leaves_no_thread_and_no_descriptor,
    # Last: what is spoiled may stay so.
    a_load_that_fails_is_computed,
)


def _load(subject: Subject, worker: DrivenWorker, prompt: list[int]) -> None:
    """Ask until some of the prompt's KV is loaded: saving may take its time."""
    if not subject.loads:
        return
    end, tries = time.monotonic() + PATIENCE_S, 0
    while not worker.scheduler.counters["loaded_tokens"]:
        assert time.monotonic() < end, f"nothing was loaded within {PATIENCE_S:g} s"
        worker.blocks.forget()
        tries += 1
        subject.ask(worker, prompt, f"load-{tries}")


def _held() -> tuple[int, int]:
    """Threads and open descriptors of this process (0 where /proc does not say)."""
    fds = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    return threading.active_count(), fds
