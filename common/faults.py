"""Faults on purpose: what the tests of failures do to a running service. Inert unless asked for.

    BATON_FAULTS="seed=7 handoff.send:flip=0.01 handoff.send:delay=0.05,0.2 engine.step:kill=0.001"

Each word is `point:kind=probability` or `point:kind=probability,seconds`. The draws of a point
follow from the seed and from how often the point was reached before.
"""

import math
import os
import random
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from common.errors import ConfigError

log = structlog.get_logger("faults")

# What may happen to a frame on its way, and what may happen to a process anywhere.
FRAME_KINDS = ("drop", "delay", "duplicate", "reorder", "truncate", "flip")
PROCESS_KINDS = ("stall", "kill")
POINTS = {
    "handoff.send": (*FRAME_KINDS, *PROCESS_KINDS),
    "store.get": ("drop", "delay", "truncate", "flip", *PROCESS_KINDS),
    "engine.step": PROCESS_KINDS,
}
# How long a delay or a stall takes where no seconds are given.
SECONDS = {"delay": 0.1, "stall": 2.0, "reorder": 0.1}


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of fault at one point: how probable, and how long where that means something."""

    point: str
    kind: str
    probability: float
    seconds: float


class Faults:
    """The rules of one process. A point is reached on one thread only.

    Raises ConfigError, naming the word, for rules that say nothing here.
    """

    def __init__(self, text: str) -> None:
        words = text.split()
        seeds = [word.removeprefix("seed=") for word in words if word.startswith("seed=")]
        self._rules: dict[str, list[Rule]] = {}
        for word in words:
            if not word.startswith("seed="):
                rule = _rule(word)
                self._rules.setdefault(rule.point, []).append(rule)
        seed = seeds[-1] if seeds else "0"
        self._random = {point: random.Random(f"{seed}/{point}") for point in POINTS}
        if self._rules:
            log.warning("faults_active", rules=text)

    def at(self, point: str) -> bool:
        """Whether anything may happen at the point."""
        return point in self._rules

    def draw(self, point: str) -> list[Rule]:
        """What happens this time; a process that is to be killed does not return."""
        chance = self._random[point]
        # Every rule draws each time, so that one does not change when another one strikes.
        drawn = [r for r in self._rules.get(point, ()) if chance.random() < r.probability]
        for rule in drawn:
            log.warning("fault", point=point, kind=rule.kind, seconds=rule.seconds)
            if rule.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return drawn

    def strike(self, point: str) -> None:
        """Draw, and stall the calling thread when that came out."""
        for rule in self.draw(point):
            if rule.kind == "stall":
                time.sleep(rule.seconds)

    def damage(self, point: str, data: bytes, kinds: Iterable[str]) -> bytes:
        """`data` cut short, or with one bit flipped, when `kinds` say so."""
        chance = self._random[point]
        if "truncate" in kinds:
            data = data[: chance.randrange(len(data))] if data else data
        if "flip" in kinds and data:
            changed = bytearray(data)
            changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            data = bytes(changed)
        return data


def _rule(word: str) -> Rule:
    name, _, amount = word.partition("=")
    point, _, kind = name.partition(":")
    probability, _, seconds = amount.partition(",")
    if kind not in POINTS.get(point, ()):
        known = "; ".join(f"{p}: {', '.join(kinds)}" for p, kinds in POINTS.items())
        raise ConfigError(f"BATON_FAULTS: {word!r} names no fault; there are {known}")
    try:
        rule = Rule(point, kind, float(probability), float(seconds or SECONDS.get(kind, 0.0)))
    except ValueError as error:
        raise ConfigError(
            f"BATON_FAULTS: {word!r} is not point:kind=probability[,seconds]"
        ) from error
    if not 0 <= rule.probability <= 1 or not 0 <= rule.seconds < math.inf:
        raise ConfigError(f"BATON_FAULTS: {word!r}: a probability is 0 to 1, seconds 0 or more")
    return rule
