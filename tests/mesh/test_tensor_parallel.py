"""Services of several ranks beside services of one, in one mesh: the same KV, the same tokens."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from baton import LLM, SamplingParams
from tests.support.mesh import TINY, Mesh, Service, wait_until
from tests.support.ranks import ranks_of

TWO = ["--tensor-parallel", "2"]
FOUR = ["--tensor-parallel", "4"]
# Each rank has a cache of its own, as on GPUs.
TWO_APART = [*TWO, "--private-kv"]
PROMPTS = [f"{i} codes: river=48{i} lamp=19{i} stone=27{i} cloud=91{i} " * 8 for i in range(6)]
TOKENS = 24
DEATH_S = 5.0


@pytest.fixture(scope="module")
def expected() -> list[str]:
    with LLM(TINY, threads=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        return [result.outputs[0].text for result in llm.generate(PROMPTS, params)]


def text_of(mesh: Mesh, prompt: str, **changes: object) -> str:
    body = {"model": "baton-tiny", "prompt": prompt, "temperature": 0, "max_tokens": TOKENS}
    answer = httpx.post(
        f"{mesh.url}/v1/completions", json={**body, "ignore_eos": True, **changes}, timeout=120
    )
    return answer.raise_for_status().json()["choices"][0]["text"]


def check_tokens_and_handoffs(mesh: Mesh, expected: list[str]) -> None:
    assert [text_of(mesh, prompt) for prompt in PROMPTS] == expected
    workers = mesh.wait_idle()["workers"]
    sent = [w["counters"].get("handoff_blocks_sent", 0) for w in workers if w["role"] == "prefill"]
    assert sent[0] > 0


def test_two_prefill_ranks_hand_their_kv_to_one_decode_process(
    tmp_path: Path, expected: list[str]
) -> None:
    with Mesh(tmp_path, args={"prefill": TWO}) as mesh:
        check_tokens_and_handoffs(mesh, expected)


@pytest.mark.parametrize(("prefill", "decode"), [(TWO, FOUR), (FOUR, TWO)], ids=["2-4", "4-2"])
def test_prefill_ranks_hand_their_kv_to_another_number_of_decode_ranks(
    tmp_path: Path, expected: list[str], prefill: list[str], decode: list[str]
) -> None:
    with Mesh(tmp_path, kvstore=0, args={"prefill": prefill, "decode": decode}) as mesh:
        check_tokens_and_handoffs(mesh, expected)


@pytest.mark.parametrize(
    ("prefill", "decode"), [(TWO_APART, []), ([], TWO_APART)], ids=["2-1", "1-2"]
)
def test_ranks_with_caches_of_their_own_send_and_receive_whole_blocks(
    tmp_path: Path, expected: list[str], prefill: list[str], decode: list[str]
) -> None:
    with Mesh(tmp_path, args={"prefill": prefill, "decode": decode}) as mesh:
        check_tokens_and_handoffs(mesh, expected)


# The last test kills a worker of it.
@pytest.fixture(scope="module")
def wide_decode(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("wide")
    with Mesh(folder, decode=2, kvstore=0, args={"decode": TWO}) as mesh:
        yield mesh


def test_one_prefill_process_hands_its_kv_to_two_decode_ranks(
    wide_decode: Mesh, expected: list[str]
) -> None:
    check_tokens_and_handoffs(wide_decode, expected)


def test_a_stream_goes_on_elsewhere_when_a_rank_of_its_worker_is_killed(wide_decode: Mesh) -> None:
    mesh = wide_decode
    settings = {"temperature": 1.0, "seed": 7, "max_tokens": 200, "ignore_eos": True}
    expected = text_of(mesh, PROMPTS[0], **settings)
    body = {"model": "baton-tiny", "prompt": PROMPTS[0], "stream": True, **settings}
    pieces: list[str] = []
    ended: Future[tuple[int, float, str]] | None = None
    with (
        ThreadPoolExecutor() as pool,
        httpx.stream("POST", f"{mesh.url}/v1/completions", json=body, timeout=120) as answer,
    ):
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                pieces += [choice["text"] for choice in chunk["choices"]]
            if len(pieces) > 20 and ended is None:
                victim = wait_until(lambda: busy_decode(mesh), 5, "a busy decode worker")
                ended = pool.submit(kill_rank, victim)
    assert "".join(pieces) == expected
    assert ended is not None
    code, seconds, reason = ended.result()
    assert code == 1
    assert seconds < DEATH_S
    assert reason in victim.log.read_text()


def busy_decode(mesh: Mesh) -> Service | None:
    busy = [w for w in mesh.state()["workers"] if w["role"] == "decode" and w["running"]]
    address = busy[0]["address"] if busy else ":"
    return next((s for s in mesh.of("decode") if address.endswith(f":{s.port}")), None)


def kill_rank(service: Service) -> tuple[int, float, str]:
    """The worker's exit code, the seconds until it ended, and what it must have said."""
    (rank,) = ranks_of(service.process.pid)
    os.kill(rank, signal.SIGKILL)
    killed = time.monotonic()
    code = service.process.wait(40)
    return code, time.monotonic() - killed, f"error: rank 1 (pid {rank}) was killed by SIGKILL"
