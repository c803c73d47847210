"""One process, aggregated and disaggregated give the same tokens."""

import concurrent.futures
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from baton import LLM, SamplingParams
from baton.eval.tasks import recall
from common.text.template import ChatTemplate
from tests.support.mesh import TINY, Mesh

REQUESTS = 200
AT_ONCE = 16
AHEAD = {"prefill": ["--async-scheduling"], "decode": ["--async-scheduling"]}
SHARED = [40 + i % 200 for i in range(160)]
PROCESSED: list[dict[str, Any]] = [
    {},
    {"frequency_penalty": 0.7, "presence_penalty": -0.2},
    {"repetition_penalty": 1.3},
    {"logit_bias": {50: 4.0, 60: -100.0}},
    {},
]


@dataclass(frozen=True)
class Ask:
    prompt: list[int]
    temperature: float
    top_p: float
    seed: int
    max_tokens: int
    more: dict[str, Any]


def mixed_requests(count: int) -> list[Ask]:
    """Recall and noise, short and long, some behind a shared prefix; greedy and seeded."""
    rng = random.Random(11)
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    template = ChatTemplate.from_folder(TINY)
    asks = []
    for index in range(count):
        length = rng.choice([1, 2, 15, 16, 17, 70, 130, 400, 900])
        if index % 4 < 2 and length >= 70:
            question = recall(rng, length, lambda text: len(tokenizer.encode(text).ids))
            text = template.render([dict(m) for m in question.messages])
            prompt = tokenizer.encode(text, add_special_tokens=False).ids
        else:
            prompt = [rng.randrange(20, 500) for _ in range(length)]
        if index % 3 == 0:
            prompt = SHARED + prompt
        temperature = 0.0 if index % 2 else rng.choice([0.7, 1.0, 1.3])
        top_p, max_tokens = rng.choice([1.0, 0.9]), rng.choice([1, 8, 24])
        more = PROCESSED[index % len(PROCESSED)]
        asks.append(Ask(prompt, temperature, top_p, index, max_tokens, more))
    return asks


def offline(asks: list[Ask]) -> list[list[int]]:
    llm = LLM(TINY, threads=1)
    params = [
        SamplingParams(
            temperature=a.temperature,
            top_p=a.top_p,
            seed=a.seed,
            max_tokens=a.max_tokens,
            ignore_eos=True,
            **a.more,
        )
        for a in asks
    ]
    results = llm.generate([{"prompt_token_ids": a.prompt} for a in asks], params)
    return [list(r.outputs[0].token_ids) for r in results]


def served(mesh: Mesh, asks: list[Ask]) -> list[list[int]]:
    """Token ids through the public gRPC API, which returns them exactly."""
    import grpc

    from baton.v1 import common_pb2, inference_pb2, inference_pb2_grpc

    channel = grpc.insecure_channel(f"127.0.0.1:{mesh.grpc_port}")
    stub = inference_pb2_grpc.InferenceServiceStub(channel)

    def one(ask: Ask) -> list[int]:
        request = inference_pb2.CompletionRequest(
            model="baton-tiny",
            token_ids=inference_pb2.TokenIds(ids=ask.prompt),
            sampling=common_pb2.SamplingParams(
                temperature=ask.temperature,
                top_p=ask.top_p,
                seed=ask.seed,
                max_tokens=ask.max_tokens,
                ignore_eos=True,
                **ask.more,
            ),
        )
        return list(stub.Completion(request, timeout=120).token_ids)

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool, channel:
        return list(pool.map(one, asks))


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    return mixed_requests(REQUESTS)


@pytest.fixture(scope="module")
def expected(asks: list[Ask]) -> list[list[int]]:
    return offline(asks)


@pytest.fixture(params=["disaggregated", "aggregated"])
def mesh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mesh]:
    apart = request.param == "disaggregated"
    with Mesh(tmp_path, prefill=int(apart), kvstore=int(apart)) as running:
        yield running


def test_two_hundred_mixed_requests_give_the_tokens_of_one_process(
    mesh: Mesh, asks: list[Ask], expected: list[list[int]]
) -> None:
    got = served(mesh, asks)
    wrong = [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b]
    assert not wrong, f"requests {wrong[:5]} differ of {len(wrong)}"
    state = mesh.wait_idle()
    if mesh.of("prefill"):
        prefills = [w for w in state["workers"] if w["role"] == "prefill"]
        sent = sum(w["counters"].get("handoff_blocks_sent", 0) for w in prefills)
        assert sent > 0, "no block came over the handoff"


def test_workers_that_prepare_steps_ahead_give_the_tokens_of_one_process(
    tmp_path: Path, asks: list[Ask], expected: list[list[int]]
) -> None:
    # Penalties make a step wait for the one before it: leave them to the test above.
    chosen = [i for i, ask in enumerate(asks) if not ask.more]
    with Mesh(tmp_path, args=AHEAD) as mesh:
        got = served(mesh, [asks[i] for i in chosen])
        wrong = [i for i, tokens in zip(chosen, got, strict=True) if tokens != expected[i]]
        assert not wrong, f"requests {wrong[:5]} differ of {len(wrong)}"
        workers = [w for w in mesh.wait_idle()["workers"] if w["role"] in AHEAD]
        for counters in (worker["counters"] for worker in workers):
            assert counters["steps_ahead"] == counters["steps"] > 10


def test_cached_tokens_are_reported_for_a_repeated_prompt(mesh: Mesh) -> None:
    body = {"model": "baton-tiny", "prompt": SHARED, "max_tokens": 2, "temperature": 0}
    first, second = (
        httpx.post(f"{mesh.url}/v1/completions", json=body, timeout=60).raise_for_status().json()
        for _ in range(2)
    )
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(SHARED) // 2
