"""Every service restarted, one after the other, under load: no client gets an error."""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from baton.v1 import common_pb2, inference_pb2_grpc
from baton.v1 import inference_pb2 as pb
from common.rpc.probe import probe
from tests.chaos.load import bodies, undisturbed
from tests.support.balancer import HAPROXY, Balancer
from tests.support.mesh import Mesh, Service, wait_until

# The order of docs/operations.md.
ORDER = ("gateway", "prefill", "decode", "kvstore")
REQUESTS = 16
SHORT_TOKENS = 8
TIMEOUT_S = 60.0
START_S = 60.0
ARGS = {
    # Longer than the balancer takes to notice, see deploy/haproxy.cfg.
    "gateway": ["--announce-s=3"],
    "prefill": ["--threads=1"],
    # Too short for the longer answers: they go on with the other worker.
    "decode": ["--threads=1", "--drain-s=0.2"],
}


@dataclass
class Load:
    """Clients of four kinds that ask until they are told to stop. `errors` must stay empty."""

    balancer: Balancer
    bodies: list[dict[str, Any]]
    expected: list[str]
    stopping: bool = False
    answered: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Clients ask while the block runs; leaving it waits for their last answers."""
        # Services end with the thread that started them, so it is the clients that get another.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            asking = thread.submit(asyncio.run, self._run())
            try:
                yield
            finally:
                self.stopping = True
                asking.result()

    async def _run(self) -> None:
        kinds = (self._http_whole, self._http_stream, self._grpc_whole, self._grpc_stream)
        # Long answers are there when something ends; short ones find every gap between two.
        short = [i for i, body in enumerate(self.bodies) if body["max_tokens"] == SHORT_TOKENS]
        everything = range(len(self.bodies))
        asked = [(kind, of) for kind in kinds for of in (everything, short)]
        await asyncio.gather(*(self._client(kind, of) for kind, of in asked))

    async def _client(self, ask: Any, asked: Sequence[int]) -> None:
        """One request after the other over a connection that stays open."""
        name = ask.__name__.removeprefix("_")
        rng = random.Random(f"{name}/{len(asked)}")
        http = f"http://127.0.0.1:{self.balancer.http_port}"
        options = (("grpc.use_local_subchannel_pool", 1),)
        target = f"127.0.0.1:{self.balancer.grpc_port}"
        async with (
            httpx.AsyncClient(base_url=http, trust_env=False, timeout=TIMEOUT_S) as client,
            grpc.aio.insecure_channel(target, options=options) as channel,
        ):
            using = client if name.startswith("http") else channel
            while not self.stopping:
                index = rng.choice(asked)
                try:
                    text = await ask(using, self.bodies[index])
                except (httpx.HTTPError, grpc.aio.AioRpcError, AssertionError) as error:
                    self.errors.append(f"{name} {index}: {error!r}")
                    return
                self.answered[name] += 1
                if text != self.expected[index]:
                    self.errors.append(f"{name} {index}: {text!r} is not {self.expected[index]!r}")

    async def _http_whole(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    async def _http_stream(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        pieces: list[str] = []
        asked = {**body, "stream": True}
        async with client.stream("POST", "/v1/completions", json=asked) as answer:
            assert answer.status_code == 200, await answer.aread()
            events = [line[6:] async for line in answer.aiter_lines() if line]
        assert events[-1:] == ["[DONE]"], events[-1:]
        for event in map(json.loads, events[:-1]):
            assert "error" not in event, event
            pieces += [choice["text"] for choice in event["choices"]]
        return "".join(pieces)

    async def _grpc_whole(self, channel: grpc.aio.Channel, body: dict[str, Any]) -> str:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        return (await stub.Completion(_request(body), timeout=TIMEOUT_S)).text

    async def _grpc_stream(self, channel: grpc.aio.Channel, body: dict[str, Any]) -> str:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        asked = pb.StreamCompletionRequest(request=_request(body))
        return "".join([m.delta async for m in stub.StreamCompletion(asked, timeout=TIMEOUT_S)])


def _request(body: dict[str, Any]) -> pb.CompletionRequest:
    names = ("max_tokens", "ignore_eos", "temperature", "seed")
    sampling = {name: body[name] for name in names if name in body}
    return pb.CompletionRequest(
        model=body["model"],
        text=body["prompt"],
        sampling=common_pb2.SamplingParams(**sampling),
    )


def restart(service: Service) -> None:
    """As one deploys: the next service is touched once this one says that it is Ready."""
    assert service.stop(signal.SIGTERM) == 0, f"{service.role}: {service.log}"
    service.start()
    check = f"127.0.0.1:{service.port}"
    target = f"http://{check}/ready" if service.role == "gateway" else check
    wait_until(lambda: probe(target) is None, START_S, f"{service.role} Ready again")


# Under CI nothing is skipped: there it fails, and says what is missing.
@pytest.mark.skipif("CI" not in os.environ and HAPROXY is None, reason="needs haproxy")
def test_a_rolling_restart_of_every_service_gives_no_client_an_error(tmp_path: Path) -> None:
    with (
        Mesh(tmp_path, decode=2, gateways=2, args=ARGS) as mesh,
        Balancer(mesh, tmp_path) as balancer,
    ):
        asked = bodies(seed=3, count=REQUESTS)
        expected = asyncio.run(undisturbed(mesh.url, asked))
        load = Load(balancer, asked, expected)
        with load.running():
            for service in sorted(mesh.services, key=lambda s: ORDER.index(s.role)):
                restart(service)
        assert load.errors == []
        assert len(load.answered) == 4
        assert min(load.answered.values()) > 10
        # The gateways needed no forgiveness: nothing was sent to one that did not take it.
        assert {(s["wretr"], s["wredis"]) for s in balancer.servers()} == {("0", "0")}
        mesh.wait_idle()
