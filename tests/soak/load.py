"""Short requests of every kind, each answer judged: what a request is follows from its number."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx

from baton.v1 import common_pb2, inference_pb2_grpc
from baton.v1 import inference_pb2 as pb

TENANTS = {"one": "key-of-one-0123456789", "two": "key-of-two-0123456789"}
# What a request is, and of how many.
KINDS = {"whole": 6, "stream": 6, "left": 3, "late": 1, "refused": 2, "rpc": 1, "rpc stream": 1}
CLIENTS = 8
# Asked again and again: keys and KV of all of them are known long before the end of a long run.
PROMPTS = 400
# Only a prompt of this length is handed over; most are shorter.
LONG_TOKENS = 160
LATE_S = 0.05
TIMEOUT_S = 60.0
URL = "/v1/completions"
# Each with the status that it gets.
REFUSED: list[tuple[int, dict[str, Any] | bytes, str]] = [
    (400, {"temperature": -1.0}, TENANTS["one"]),
    (404, {"model": "nobody"}, TENANTS["one"]),
    (401, {}, "a-key-that-nobody-has"),
    (400, b"{", TENANTS["two"]),
]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with one right answer: greedy, of a fixed length."""

    token_ids: list[int]
    max_tokens: int

    def body(self, **more: Any) -> dict[str, Any]:
        fixed = {"model": "baton-tiny", "prompt": self.token_ids, "max_tokens": self.max_tokens}
        return {**fixed, "temperature": 0.0, "ignore_eos": True, **more}


def prompts(seed: int) -> list[Prompt]:
    rng = random.Random(f"prompts {seed}")
    made = []
    for number in range(PROMPTS):
        length = LONG_TOKENS if number % 4 == 0 else rng.randrange(1, 48)
        token_ids = [rng.randrange(20, 500) for _ in range(length)]
        made.append(Prompt(token_ids, rng.randrange(1, 6)))
    return made


@dataclass
class Load:
    """Clients that keep their connections while a batch lasts.

    wrong  each answer that is not as it must be, in words
    """

    url: str
    grpc_address: str
    seed: int
    sent: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _answers: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._prompts = prompts(self.seed)

    async def batch(self, count: int) -> None:
        """`count` more requests, CLIENTS at a time; returns when all of them are over."""
        numbers = iter(range(self.sent, self.sent + count))
        self.sent += count
        async with grpc.aio.insecure_channel(self.grpc_address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            await asyncio.gather(*(self._client(numbers, stub) for _ in range(CLIENTS)))

    async def _client(
        self, numbers: Iterator[int], stub: inference_pb2_grpc.InferenceServiceStub
    ) -> None:
        async with httpx.AsyncClient(
            base_url=self.url, trust_env=False, timeout=TIMEOUT_S
        ) as client:
            for number in numbers:
                rng = random.Random(f"{self.seed}/{number}")
                kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
                try:
                    await self._ask(client, stub, kind, rng)
                except (httpx.HTTPError, grpc.aio.AioRpcError, ValueError, KeyError) as error:
                    self.wrong.append(f"request {number} ({kind}): {type(error).__name__} {error}")
                self.outcomes[kind] += 1

    async def _ask(
        self,
        client: httpx.AsyncClient,
        stub: inference_pb2_grpc.InferenceServiceStub,
        kind: str,
        rng: random.Random,
    ) -> None:
        """Raises ValueError for an answer that is not as it must be."""
        index = rng.randrange(PROMPTS)
        prompt, key = self._prompts[index], rng.choice(list(TENANTS.values()))
        if kind == "refused":
            return await _refused(client, *rng.choice(REFUSED), prompt.body())
        if kind == "late":
            return await _late(client, key, prompt.body(max_tokens=500))
        if kind == "left":
            await _stream(client, key, prompt.body(max_tokens=200), leave_after=rng.randrange(1, 6))
            return None
        if kind == "stream":
            text = await _stream(client, key, prompt.body())
        elif kind == "whole":
            answer = await client.post(URL, json=prompt.body(), headers=_bearer(key))
            text = answer.raise_for_status().json()["choices"][0]["text"]
        else:
            text = await _rpc(stub, key, prompt, streamed=kind == "rpc stream")
        if text != self._answers.setdefault(index, text):
            raise ValueError(f"prompt {index}: {text!r}, before: {self._answers[index]!r}")
        return None


async def _stream(
    client: httpx.AsyncClient, key: str, body: dict[str, Any], leave_after: int | None = None
) -> str:
    """The text of a stream, or of its first events when the client leaves it then."""
    pieces: list[str] = []
    done = False
    headers = _bearer(key)
    async with client.stream("POST", URL, json={**body, "stream": True}, headers=headers) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            # To its very end, or the connection could not be kept.
            done = done or line == "data: [DONE]"
            if line.startswith("data: {"):
                pieces += [choice["text"] for choice in json.loads(line[6:])["choices"]]
                if len(pieces) == leave_after:
                    return "".join(pieces)
    if not done:
        raise ValueError("the stream ended without [DONE]")
    return "".join(pieces)


async def _late(client: httpx.AsyncClient, key: str, body: dict[str, Any]) -> None:
    headers = {**_bearer(key), "x-request-timeout-s": str(LATE_S)}
    answer = await client.post(URL, json=body, headers=headers)
    if answer.status_code != 504:
        raise ValueError(f"status {answer.status_code} after {LATE_S} s: {answer.text[:200]}")


async def _refused(
    client: httpx.AsyncClient,
    status: int,
    change: dict[str, Any] | bytes,
    key: str,
    body: dict[str, Any],
) -> None:
    content = change if isinstance(change, bytes) else json.dumps({**body, **change}).encode()
    answer = await client.post(URL, content=content, headers=_bearer(key))
    if answer.status_code != status:
        raise ValueError(f"status {answer.status_code}, not {status}: {answer.text[:200]}")


async def _rpc(
    stub: inference_pb2_grpc.InferenceServiceStub, key: str, prompt: Prompt, *, streamed: bool
) -> str:
    request = pb.CompletionRequest(
        model="baton-tiny",
        token_ids=pb.TokenIds(ids=prompt.token_ids),
        sampling=common_pb2.SamplingParams(
            temperature=0.0, max_tokens=prompt.max_tokens, ignore_eos=True
        ),
    )
    metadata = (("authorization", f"Bearer {key}"),)
    if not streamed:
        answer = await stub.Completion(request, metadata=metadata, timeout=TIMEOUT_S)
        return answer.text
    wanted = pb.StreamCompletionRequest(request=request)
    call = stub.StreamCompletion(wanted, metadata=metadata, timeout=TIMEOUT_S)
    return "".join([message.delta async for message in call])


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
