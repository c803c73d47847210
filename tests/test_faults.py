"""Faults on purpose: what is drawn, and that a damaged handoff never damages an answer."""

import concurrent.futures
from pathlib import Path

import httpx
import pytest

from common.errors import ConfigError
from common.faults import Faults
from tests.support.mesh import Mesh

HANDOFF = (
    "seed=5 handoff.send:drop=0.03 handoff.send:delay=0.1,0.05 handoff.send:duplicate=0.2 "
    "handoff.send:reorder=0.1 handoff.send:truncate=0.1 handoff.send:flip=0.2"
)
STORE = "seed=6 store.get:flip=0.1 store.get:truncate=0.1 store.get:drop=0.05"


def test_the_same_seed_draws_the_same_faults():
    def drawn(text: str) -> list[list[str]]:
        faults = Faults(text)
        return [[rule.kind for rule in faults.draw("handoff.send")] for _ in range(200)]

    assert drawn(HANDOFF) == drawn(HANDOFF)
    assert drawn(HANDOFF) != drawn(HANDOFF.replace("seed=5", "seed=6"))
    share = sum(kinds.count("delay") for kinds in drawn(HANDOFF)) / 200
    assert 0.03 < share < 0.2


def test_nothing_happens_unless_it_is_asked_for():
    faults = Faults("")
    assert not faults.at("handoff.send")
    assert faults.draw("handoff.send") == []


def test_a_flip_changes_one_bit_and_a_truncation_only_the_length():
    faults = Faults("store.get:flip=1 store.get:truncate=1")
    data = bytes(range(256))
    flipped = faults.damage("store.get", data, ["flip"])
    changed = int.from_bytes(data, "big") ^ int.from_bytes(flipped, "big")
    assert changed.bit_count() == 1
    cut = faults.damage("store.get", data, ["truncate"])
    assert len(cut) < 256
    assert data.startswith(cut)


@pytest.mark.parametrize(
    "word", ["x", "handoff.send:melt=0.1", "nowhere:drop=1", "store.get:flip=2", "store.get:flip=x"]
)
def test_a_word_that_names_no_fault_is_refused_by_name(word):
    with pytest.raises(ConfigError, match=word):
        Faults(f"seed=1 {word}")


def test_answers_stay_right_while_frames_are_lost_doubled_reordered_and_damaged(tmp_path: Path):
    bodies = [
        {
            "model": "baton-tiny",
            "prompt": f"codes: {number} " + "river=4821 lamp=1937 stone=2750 cloud=9164 " * 8,
            "max_tokens": 8,
            "temperature": 1.0,
            "seed": number,
            "ignore_eos": True,
        }
        for number in range(40)
    ]

    def ask(mesh: Mesh) -> list[str]:
        def one(body: dict[str, object]) -> str:
            answer = httpx.post(f"{mesh.url}/v1/completions", json=body, timeout=120)
            return answer.raise_for_status().json()["choices"][0]["text"]

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            return list(pool.map(one, bodies))

    with Mesh(tmp_path, prefill=0, kvstore=0) as mesh:
        expected = ask(mesh)
    flags = {
        "prefill": [f"--faults={HANDOFF}"],
        "kvstore": [f"--faults={STORE}"],
        "decode": ["--handoff-stall-s=1"],
    }
    with Mesh(tmp_path, prefill=2, args=flags) as mesh:
        assert ask(mesh) == expected
        assert ask(mesh) == expected
        workers = mesh.wait_idle()["workers"]
    counted = {name: count for w in workers for name, count in w["counters"].items()}
    assert counted["frames_dropped_corrupt"] > 0
    assert counted["frames_dropped_duplicate"] > 0
