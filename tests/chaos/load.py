"""The load of a chaos run: a fixed set of requests, sent at random, each answer judged."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.chaos.services import HTTP_PORT, TENANTS

# A request may end this late after its deadline and not be called stuck.
GRACE_S = 2.0
TIMEOUT_S = 30.0
SHORT_TIMEOUT_S = 0.4
CLIENTS = 8
# Prompts that one tenant has asked and then the other asks, when all is quiet again.
PRIVATE_PROMPTS = 4
# Statuses with which a mesh under faults may refuse or give up a request.
PROPER = {429, 502, 503, 504}


def bodies(seed: int, count: int) -> list[dict[str, Any]]:
    """`count` requests with fixed answers: greedy and seeded, short and long, many of them with
    one of four prefixes in common."""
    rng = random.Random(seed)
    words = ["river", "lamp", "stone", "cloud", "forest", "wheel", "silver", "north"]

    def codes(entries: int) -> str:
        return " ".join(f"{rng.choice(words)}={rng.randrange(1000, 9999)}" for _ in range(entries))

    shared = [codes(60) for _ in range(4)]
    made = []
    for number in range(count):
        prompt = (rng.choice(shared) + " " if rng.random() < 0.6 else "") + codes(
            rng.randrange(2, 40)
        )
        body = {
            "model": "baton-tiny",
            "prompt": f"codes: {prompt}",
            "max_tokens": rng.choice([8, 32, 150, 400]),
            "ignore_eos": True,
            "temperature": 0.0,
        }
        if number % 2:
            body |= {"temperature": 0.9, "seed": rng.randrange(2**31)}
        made.append(body)
    return made


@dataclass
class Tally:
    """What became of the requests of a run. `wrong` says, for each rule that was broken, how."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@dataclass
class Load:
    """Clients that ask until they are told to stop."""

    addresses: list[str]  # of gateways
    bodies: list[dict[str, Any]]
    expected: list[str]
    seed: int
    silent_s: Callable[[str, float, float], float]
    tally: Tally = field(default_factory=Tally)
    stopping: bool = False

    async def run(self) -> None:
        await asyncio.gather(*(self._client(i) for i in range(CLIENTS)))

    async def _client(self, number: int) -> None:
        rng = random.Random(f"{self.seed}/{number}")
        async with httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S + 10) as client:
            while not self.stopping:
                await self._ask(client, rng)

    async def _ask(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        index = rng.randrange(len(self.bodies))
        gateway = rng.choice(self.addresses)
        url = f"http://{gateway}:{HTTP_PORT}/v1/completions"
        body = {**self.bodies[index], "stream": rng.random() < 0.6}
        key = rng.choice(list(TENANTS.values()))
        timeout_s = SHORT_TIMEOUT_S if rng.random() < 0.1 else TIMEOUT_S
        leave_after = rng.randrange(1, 20) if body["stream"] and rng.random() < 0.15 else None
        began = time.monotonic()
        try:
            outcome, text = await _answer(client, url, key, body, timeout_s, leave_after)
        except httpx.TransportError as error:
            outcome, text = f"connection: {type(error).__name__}", None
        ended = time.monotonic()
        # A gateway that is stopped or cut off can tell nobody: that time is not its fault.
        took = ended - began - self.silent_s(gateway, began, ended)
        self.tally.outcomes[outcome.split(":")[0]] += 1
        if took > timeout_s + GRACE_S:
            self.tally.wrong.append(
                f"request {index} took {took:.1f} s of {timeout_s} s ({outcome})"
            )
        if outcome == "improper":
            self.tally.wrong.append(f"request {index}: {text}")
        if outcome == "completed" and text != self.expected[index]:
            self.tally.wrong.append(f"request {index}: {text!r} is not {self.expected[index]!r}")
        if outcome == "left" and not self.expected[index].startswith(text or ""):
            self.tally.wrong.append(f"request {index}: {text!r} does not begin its answer")
        if not outcome.startswith(("completed", "left")):
            await asyncio.sleep(0.1)  # as a client does that was told to come back later


async def _answer(
    client: httpx.AsyncClient,
    url: str,
    key: str,
    body: dict[str, Any],
    timeout_s: float,
    leave_after: int | None,
) -> tuple[str, str | None]:
    """What happened, and the text (or, when it was improper, why)."""
    headers = {"x-request-timeout-s": str(timeout_s), **_bearer(key)}
    async with client.stream("POST", url, json=body, headers=headers) as answer:
        if answer.status_code != 200:
            return _refusal(answer.status_code, await answer.aread())
        if not body["stream"]:
            return "completed", json.loads(await answer.aread())["choices"][0]["text"]
        pieces: list[str] = []
        events = 0
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return "completed", "".join(pieces)
            if not line.startswith("data: "):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return _refusal(event["error"].get("code"), line.encode())
            pieces += [choice["text"] for choice in event["choices"]]
            events += 1
            if events == leave_after:
                return "left", "".join(pieces)
    return "improper", "a stream ended without [DONE] and without an error"


def _refusal(status: Any, body: bytes) -> tuple[str, str | None]:
    try:
        message = json.loads(body.removeprefix(b"data: "))["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return "improper", f"{status}: no error body: {body[:200]!r}"
    if isinstance(status, int) and status not in PROPER:
        return "improper", f"{status}: {message}"
    return f"refused: {message}", None


async def undisturbed(url: str, requests: list[dict[str, Any]]) -> list[str]:
    """The answers of a mesh that nobody disturbs."""
    limit = asyncio.Semaphore(CLIENTS)
    headers = _bearer(next(iter(TENANTS.values())))
    async with httpx.AsyncClient(trust_env=False, timeout=120, headers=headers) as client:

        async def ask(body: dict[str, Any]) -> str:
            async with limit:
                answer = await client.post(f"{url}/v1/completions", json=body)
                return answer.raise_for_status().json()["choices"][0]["text"]

        return list(await asyncio.gather(*(ask(body) for body in requests)))


def found_of_others(urls: list[str], seed: int) -> list[str]:
    """What one tenant finds of prompts that only the other has asked, through each gateway: all of
    it is wrong. So is it when who asked them finds nothing, as nothing would be proved."""
    first, second = TENANTS.values()
    rng = random.Random(f"private {seed}")
    wrong = []
    with httpx.Client(trust_env=False, timeout=TIMEOUT_S) as client:
        for number in range(PRIVATE_PROMPTS):
            prompt = [rng.randrange(20, 500) for _ in range(400)]
            asked = [_cached_tokens(client, url, first, prompt) for url in urls * 2]
            if not any(asked[1:]):
                wrong.append(f"private prompt {number}: its own tenant found {asked} tokens of it")
            if found := _cached_tokens(client, urls[number % len(urls)], second, prompt):
                wrong.append(f"private prompt {number}: the other tenant found {found} tokens")
    return wrong


def _cached_tokens(client: httpx.Client, url: str, key: str, prompt: list[int]) -> int:
    body = {"model": "baton-tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0.0}
    answer = client.post(f"{url}/v1/completions", json=body, headers=_bearer(key))
    usage = answer.raise_for_status().json()["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"]


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
