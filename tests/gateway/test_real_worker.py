"""The gateway with the real workers and the bundled model."""

import concurrent.futures

import httpx
import openai
import pytest

from baton import LLM, SamplingParams
from tests.support.mesh import TINY, Mesh, wait_until


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    with Mesh(tmp_path_factory.mktemp("mesh"), kvstore=0) as running:
        yield running


@pytest.fixture(scope="module")
def client(mesh):
    with httpx.Client(base_url=mesh.url, timeout=60, verify=False) as opened:
        yield opened


def test_streamed_and_whole_answers_are_equal_and_leave_nothing_behind(mesh):
    client = openai.OpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0)
    (model,) = client.models.list().data

    def ask(seed: int) -> tuple[str, str]:
        arguments = {
            "model": model.id,
            "messages": [{"role": "user", "content": "What is Baton? " * 20}],
            "max_tokens": 24,
            "temperature": 0.9,
            "seed": seed,
        }
        whole = client.chat.completions.create(**arguments).choices[0].message.content
        stream = client.chat.completions.create(**arguments, stream=True)
        return whole, "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(whole == streamed for whole, streamed in pool.map(ask, range(8)))
    mesh.wait_idle()


def test_a_client_that_leaves_frees_the_blocks_within_a_second(client):
    body = {
        "model": "baton-tiny",
        "prompt": list(range(20, 220)),
        "max_tokens": 3000,
        "ignore_eos": True,
        "stream": True,
    }

    def totals() -> dict[str, int]:
        return client.get("/debug/state").raise_for_status().json()["totals"]

    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        lines = response.iter_lines()  # held: a collected iterator closes the connection
        assert next(lines).startswith('data: {"id"')
        wait_until(lambda: totals()["blocks_used"] > 0, 5, "blocks in use")
    wait_until(lambda: not any(totals().values()), 1.5, "idle")


def test_a_trace_goes_through_every_service(client):
    body = {"model": "baton-tiny", "prompt": list(range(30, 330)), "max_tokens": 2}
    response = client.post("/v1/completions", json=body)
    url = f"/debug/traces/{response.headers['x-trace-id']}"
    wanted = {"gateway", "decode", "prefill"}

    def services() -> bool:
        spans = client.get(url).raise_for_status().json()["spans"]
        ids = {span["span_id"] for span in spans}
        roots = [span for span in spans if span["parent_span_id"] not in ids]
        return {s["service"] for s in spans} == wanted and len(roots) == 1

    wait_until(services, 5, "one tree of spans of all three services")


def test_choices_and_logprobs_over_the_mesh_are_those_of_one_process(client):
    prompt = [20 + index % 300 for index in range(100)]
    fields = {"temperature": 0.9, "seed": 3, "max_tokens": 6, "n": 3, "logprobs": 4}
    with LLM(TINY, threads=1) as llm:
        params = SamplingParams(prompt_logprobs=2, ignore_eos=True, **fields)
        given = [{"prompt_token_ids": prompt}]
        (wanted,) = llm.generate(given, params, use_tqdm=False)
    body = {
        "model": "baton-tiny",
        "prompt": prompt,
        "prompt_logprobs": 2,
        "ignore_eos": True,
        "return_token_ids": True,
        **fields,
    }
    choices = client.post("/v1/completions", json=body).raise_for_status().json()["choices"]
    assert [choice["token_ids"] for choice in choices] == [a.token_ids for a in wanted.outputs]
    for choice, answer in zip(choices, wanted.outputs, strict=True):
        own = [entry[t].logprob for t, entry in zip(answer.token_ids, answer.logprobs, strict=True)]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(own, abs=1e-4)
        assert choice["prompt_logprobs"][0] is None
        for told, entry in zip(
            choice["prompt_logprobs"][1:], wanted.prompt_logprobs[1:], strict=True
        ):
            found = {int(token): one["logprob"] for token, one in told.items()}
            assert found == pytest.approx({t: e.logprob for t, e in entry.items()}, abs=1e-4)
