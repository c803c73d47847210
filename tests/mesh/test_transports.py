"""Which transport KV takes between real services, and that the tokens are the same."""

from pathlib import Path

import httpx
import pytest

from tests.kv.transports.support import need
from tests.support.mesh import Mesh, wait_until

PROMPTS = [f"{i} codes: river=4821 lamp=1937 stone=2750 cloud=9164 " * 8 for i in range(4)]


def texts(mesh: Mesh) -> list[str]:
    answers = []
    for prompt in PROMPTS:
        body = {
            "model": "baton-tiny",
            "prompt": prompt,
            "max_tokens": 16,
            "seed": 5,
            "ignore_eos": True,
        }
        answer = httpx.post(f"{mesh.url}/v1/completions", json=body, timeout=60)
        answers.append(answer.raise_for_status().json()["choices"][0]["text"])
    assert any(answers)
    return answers


def metrics(mesh: Mesh) -> str:
    return httpx.get(f"{mesh.url}/metrics").text


@pytest.fixture(scope="module")
def aggregated(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("aggregated")
    with Mesh(folder, prefill=0, kvstore=0) as mesh:
        return texts(mesh)


@pytest.mark.parametrize("used", ["shm", "tcp", "nixl"])
def test_the_chosen_transport_carries_the_kv_and_is_shown(
    tmp_path: Path, aggregated: list[str], used: str
) -> None:
    need(used)
    flags = [] if used == "shm" else ["--transports", used]
    args = {"prefill": flags, "decode": flags}
    with Mesh(tmp_path, kvstore=0, args=args) as mesh:
        assert texts(mesh) == aggregated
        state = mesh.wait_idle()
        prefill, decode = (
            next(w for w in state["workers"] if w["role"] == role) for role in ("prefill", "decode")
        )
        assert prefill["data_links"] == {decode["data_address"]: used}
        counters = decode["counters"]
        assert counters["handoffs_completed"] > 0
        carried = {k: v for k, v in counters.items() if k.startswith("transport_bytes_received")}
        assert list(carried) == [f"transport_bytes_received_{used}"]
        assert carried.popitem()[1] > counters["handoff_bytes_received"]
        shown = (f'transport="{used}"', 'event="handoffs_completed"')
        wait_until(lambda: all(text in metrics(mesh) for text in shown), 5, "metrics")
