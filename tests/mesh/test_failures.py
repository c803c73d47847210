"""Services killed under load: clients get the same tokens, and nothing is kept."""

import concurrent.futures
import json
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.mesh import Mesh, wait_until

PROMPT = "codes: river=4821 lamp=1937 stone=2750 cloud=9164 "
BODY = {
    "model": "baton-tiny",
    "prompt": PROMPT * 6,
    "max_tokens": 600,
    "temperature": 1.0,
    "seed": 7,
    "ignore_eos": True,
}
# All that depends on what was generated before.
MORE = {
    "max_tokens": 500,
    "min_tokens": 300,
    "ignore_eos": False,
    "frequency_penalty": 0.02,
    "presence_penalty": -0.3,
    "repetition_penalty": 1.05,
    "logit_bias": {"100": 2.0},
    "bad_words": ["river", [40, 41]],
    "logprobs": 0,
}


def choice_of(mesh: Mesh, body: dict[str, object]) -> dict[str, Any]:
    answer = httpx.post(f"{mesh.url}/v1/completions", json=body, timeout=120)
    return answer.raise_for_status().json()["choices"][0]


def text_of(mesh: Mesh, body: dict[str, object]) -> str:
    return choice_of(mesh, body)["text"]


def decode_at_work(mesh: Mesh) -> str | None:
    """The address of a decode worker that generates."""
    busy = [w for w in mesh.state()["workers"] if w["role"] == "decode" and w["running"]]
    return busy[0]["address"] if busy else None


@pytest.mark.parametrize(
    ("sig", "more", "flags"),
    [(signal.SIGKILL, MORE, []), (signal.SIGTERM, {}, ["--async-scheduling"])],
    ids=["killed", "told to end with a step under way"],
)
def test_a_stream_goes_on_with_the_same_tokens_when_its_decode_worker_ends(
    tmp_path: Path, sig: signal.Signals, more: dict[str, object], flags: list[str]
) -> None:
    # A drain this short ends long before the answer does.
    with Mesh(tmp_path, decode=2, args={"decode": ["--drain-s=0.1", *flags]}) as mesh:
        asked = {**BODY, **more}
        expected = choice_of(mesh, asked)
        pieces: list[str] = []
        told: list[str] = []
        body = {**asked, "stream": True}
        killed = False
        with httpx.stream("POST", f"{mesh.url}/v1/completions", json=body, timeout=120) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk, chunk
                    pieces += [choice["text"] for choice in chunk["choices"]]
                    logprobs = [choice["logprobs"] for choice in chunk["choices"]]
                    told += [token for part in logprobs if part for token in part["tokens"]]
                if len(pieces) > 20 and not killed:
                    address = wait_until(lambda: decode_at_work(mesh), 5, "a busy decode worker")
                    victim = next(s for s in mesh.of("decode") if address.endswith(f":{s.port}"))
                    code = victim.stop(sig)
                    killed = True
        assert killed
        assert "".join(pieces) == expected["text"]
        assert told == ((expected["logprobs"] or {}).get("tokens", []))
        assert code == (0 if sig == signal.SIGTERM else -signal.SIGKILL)
        heir = next(
            w for w in mesh.state()["workers"] if w["address"] != address and w["role"] == "decode"
        )
        # What the worker had computed was in the store, its last blocks too.
        if sig == signal.SIGTERM:
            assert heir["counters"]["store_blocks_loaded"] > 0


def test_prompts_are_prefilled_elsewhere_when_prefill_and_store_are_killed(tmp_path: Path) -> None:
    with Mesh(tmp_path, prefill=2) as mesh:
        bodies = [{**BODY, "prompt": f"{i} " + PROMPT * 20, "max_tokens": 8} for i in range(24)]
        expected = [text_of(mesh, {**body, "seed": 8}) for body in bodies[:4]]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(text_of, mesh, {**body, "seed": 8}) for body in bodies]
            for service in [*mesh.of("prefill"), *mesh.of("kvstore")]:
                service.stop(signal.SIGKILL)
            texts = [answer.result() for answer in answers]
        assert texts[:4] == expected
        alive = wait_until(lambda: decode_is_idle(mesh), 10, "an idle decode worker")
        assert alive["blocks_used"] == 0


def decode_is_idle(mesh: Mesh) -> dict[str, int] | None:
    worker = next(w for w in mesh.state()["workers"] if w["role"] == "decode")
    held = worker["running"] + worker["waiting"] + worker["blocks_used"] + worker["open_handoffs"]
    return worker if worker["status"] == "ready" and held == 0 else None
