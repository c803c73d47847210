"""Workers that come, go, break and do not fit; a gateway that is full or told to stop."""

import concurrent.futures
import contextlib
import json
import subprocess
import sys

import pytest

from baton.cli.ports import any_free
from baton.v1 import common_pb2, worker_pb2
from tests.gateway.conftest import chat, completion, sse_events
from tests.gateway.fake import (
    END,
    LENGTH,
    FakeDecode,
    GatewayProcess,
    make_model,
    say,
    say_then_hang,
)
from tests.support.mesh import ROOT, wait_until


@contextlib.contextmanager
def mesh(model, *fakes: FakeDecode, flags=(), spec=None):
    gateway = GatewayProcess(model, spec or ",".join(f.address for f in fakes), *flags)
    try:
        if spec is None:
            wait_until(lambda: usable(gateway) == len(fakes), 10, "all workers seen")
        yield gateway, gateway.client
    finally:
        gateway.stop()
        for fake in fakes:
            fake.kill()


def usable(gateway: GatewayProcess) -> int:
    return gateway.client.get("/ready").json().get("decode_workers", 0)


def count_on():
    """A model whose next token is its position: what a resumed sequence goes on with too."""

    async def behaviour(submit):
        position = len(submit.token_ids)
        left = submit.sampling.max_tokens - submit.output_tokens
        for index in range(left):
            last = index == left - 1
            yield worker_pb2.TokenDelta(
                token_ids=[10 + position + index], finish_reason=LENGTH if last else 0
            )

    return behaviour


def die_after(tokens: int):
    async def behaviour(submit):
        position = len(submit.token_ids)
        for index in range(tokens):
            yield worker_pb2.TokenDelta(token_ids=[10 + position + index])
        yield worker_pb2.TokenDelta(
            finish_reason=common_pb2.FINISH_REASON_ERROR,
            error=common_pb2.Error(kind=common_pb2.ERROR_KIND_UNAVAILABLE, message="going down"),
        )

    return behaviour


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_request_whose_worker_goes_away_gives_the_same_tokens_from_another(model, tokens):
    one, two = FakeDecode(die_after(tokens)), FakeDecode(count_on())
    two.state.load.running_requests = 3  # so that the other one is asked first
    with mesh(model, one, two) as (_, client):
        for _ in range(2):
            body = completion(prompt=[5, 6], max_tokens=6, seed=9, return_token_ids=True)
            got = client.post("/v1/completions", json=body).raise_for_status().json()
            assert got["choices"][0]["token_ids"] == [12, 13, 14, 15, 16, 17]
            assert got["usage"]["completion_tokens"] == 6
        resumed = [s for s in two.submits if s.request_id.endswith("-1")]
        assert resumed
        assert list(resumed[0].token_ids) == [5, 6, *range(12, 12 + tokens)]
        assert resumed[0].sampling.max_tokens == 6
        assert resumed[0].output_tokens == tokens
        assert resumed[0].sampling.seed == 9


def test_a_killed_worker_is_followed_mid_stream(model):
    one = FakeDecode(say_then_hang([40, 41]))
    two = FakeDecode(say([END]), port=any_free())
    two.kill()
    later = None
    spec = f"{one.address},{two.address}"
    try:
        with mesh(model, one, spec=spec) as (gateway, client):
            body = completion(stream=True, return_token_ids=True)
            with client.stream("POST", "/v1/completions", json=body) as response:
                wait_until(lambda: one.submits, 5, "submit")
                later = FakeDecode(say([42, END]), port=two.port)
                wait_until(lambda: usable(gateway) == 2, 5, "second worker found within 5 s")
                one.kill()
                events = sse_events(response)
            assert events[-1] == "[DONE]"
            ids = [json.loads(e)["choices"][0].get("token_ids", []) for e in events[:-1]]
            assert [token for part in ids for token in part] == [40, 41, 42, END]
            assert list(later.submits[0].token_ids)[-2:] == [40, 41]
            wait_until(lambda: usable(gateway) == 1, 2, "dead worker dropped")
            states = {w["address"]: w["status"] for w in gateway.state()["workers"]}
            assert states == {one.address: "unreachable", later.address: "ready"}
    finally:
        if later is not None:
            later.kill()


@pytest.mark.parametrize("resumes", [0, 1, 2])
def test_a_request_follows_only_so_many_lost_workers(model, resumes):
    one, two = FakeDecode(die_after(1)), FakeDecode(die_after(1))
    with mesh(model, one, two, flags=("--max-resumes", str(resumes))) as (_, client):
        response = client.post("/v1/completions", json=completion())
        assert response.status_code == 503
        assert len(one.submits) + len(two.submits) == resumes + 1


def test_without_a_worker_requests_are_503_and_the_gateway_is_alive_but_not_ready(model):
    gateway = GatewayProcess(model, f"127.0.0.1:{any_free()}", wait_ready=False)
    try:
        assert gateway.client.get("/health").status_code == 200
        assert gateway.client.get("/ready").status_code == 503
        headers = {"x-request-timeout-s": "0.5"}  # else it waits longer for one to come
        response = gateway.client.post("/v1/completions", json=completion(), headers=headers)
        assert response.status_code == 503
        assert "no decode worker is ready" in response.json()["error"]["message"]
    finally:
        assert gateway.stop() == 0


def test_a_worker_of_another_model_is_not_used_and_named_once(model):
    right, wrong = FakeDecode(say([END])), FakeDecode(say([END]), fingerprint=b"w" * 16)
    gateway = GatewayProcess(model, f"{right.address},{wrong.address}")
    try:
        refused = wait_until(lambda: gateway.events("worker_refused"), 5, "refusal")
        for _ in range(6):
            gateway.client.post("/v1/completions", json=completion()).raise_for_status()
        assert usable(gateway) == 1
        assert {len(right.submits), len(wrong.submits)} == {0, 6}
        names = {refused[0]["fingerprint"], refused[0]["served_fingerprint"]}
        assert names == {(b"w" * 16).hex(), (b"f" * 16).hex()}
        assert {refused[0]["worker"], refused[0]["served_by"]} == {right.address, wrong.address}
        assert len(gateway.events("worker_refused")) == 1
    finally:
        gateway.stop()
        right.kill()
        wrong.kill()


def test_requests_beyond_the_queue_are_429_and_those_in_it_are_served(model):
    fake = FakeDecode(say_then_hang([40]))
    flags = ("--max-in-flight", "1", "--max-queue", "1")
    with mesh(model, fake, flags=flags) as (gateway, client):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            with client.stream("POST", "/v1/completions", json=completion(stream=True)) as first:
                assert first.status_code == 200
                fake.behaviour = say([END])
                queued = pool.submit(client.post, "/v1/completions", json=completion())
                wait_until(lambda: gateway.state()["gateway"]["queued"] == 1, 5, "queued")
                refused = client.post("/v1/completions", json=completion())
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
            assert queued.result(10).status_code == 200
        assert gateway.state()["gateway"]["in_flight"] == 0


def test_concurrent_requests_share_one_session_and_keep_their_tokens_apart(model):
    async def echo(submit):
        async for delta in say([*submit.token_ids, END])(submit):
            yield delta

    fake = FakeDecode(echo)
    with mesh(model, fake) as (gateway, client):

        def ask(index: int) -> bool:
            prompt = [10 + index, 100 + index, 200]
            body = completion(prompt=prompt, return_token_ids=True)
            got = client.post("/v1/completions", json=body).raise_for_status().json()
            return got["choices"][0]["token_ids"] == [*prompt, END]

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            assert all(pool.map(ask, range(64)))
        assert fake.sessions == 1
        assert gateway.state()["gateway"]["in_flight"] == 0


def test_a_model_folder_without_a_tokenizer_serves_token_ids(tmp_path):
    bare = make_model(tmp_path / "bare", tokenizer=False)
    fake = FakeDecode(say([40, 41, END]))
    with mesh(bare, fake) as (_, client):
        body = completion(prompt=[5, 6], return_token_ids=True)
        got = client.post("/v1/completions", json=body).raise_for_status().json()
        assert got["choices"][0]["token_ids"] == [40, 41, END]
        refused = client.post("/v1/completions", json=completion())
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "prompt"
        assert client.post("/v1/chat/completions", json=chat()).status_code == 400


@pytest.mark.parametrize("flag", ["--max-queue=-1", "--decode=nonsense", "--model=/no/such/folder"])
def test_a_setting_that_cannot_work_ends_the_start_with_code_2_and_names_it(model, flag):
    command = [sys.executable, "-m", "services.gateway.main", "--model", str(model), flag]
    command += ["--http-port", "0", "--grpc-port", "0"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2
    name, _, value = flag.partition("=")
    assert name in ended.stderr or value in ended.stderr
