"""Throughput, TTFT and ITL of any OpenAI endpoint, beside transformers on the same model.

    python benchmarks/serving.py --url http://127.0.0.1:8000 --requests 64 --concurrency 16
    python benchmarks/serving.py --url ... --transformers models/baton-tiny

Prompts are `--input-words` random words; requests ask for exactly `--output-tokens`
(`ignore_eos`, where the endpoint knows it). With `--transformers`, the same prompts go through
`generate` of Hugging Face transformers in batches of the same size, alternating with the endpoint
`--rounds` times, so that both sides see the same machine. Absolute times on a shared CPU prove
little; the ratio is the result.
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from baton.cli.locate import KEY_HELP, api_key, key_headers

WORDS = ["river", "lamp", "stone", "cloud", "amber", "forest", "window", "bridge", "silver", "oak"]


@dataclass(slots=True)
class Timing:
    """One request. Seconds since its start; `itl_s` are the gaps between chunks with text."""

    ttft_s: float
    total_s: float
    itl_s: list[float]
    prompt_tokens: int
    output_tokens: int
    error: str = ""


@dataclass(slots=True)
class Report:
    """One side's figures. Times in milliseconds."""

    name: str
    requests: int
    errors: int
    wall_s: float
    input_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    ttft_ms: dict[str, float] = field(default_factory=dict)
    itl_ms: dict[str, float] = field(default_factory=dict)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 and the mean of some seconds, in milliseconds."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    picked = {
        f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90, 99)
    }
    picked["mean"] = statistics.fmean(ordered)
    return {name: round(value * 1e3, 2) for name, value in picked.items()}


def make_prompts(count: int, words: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(words)) for _ in range(count)]


async def ask(client: httpx.AsyncClient, model: str, prompt: str, output_tokens: int) -> Timing:
    """Stream one completion and time it."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.perf_counter()
    stamps: list[float] = []
    usage: dict[str, int] = {}
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return Timing(0, 0, [], 0, 0, f"HTTP {response.status_code}: {text[:200]}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                usage = chunk.get("usage") or usage
                if chunk["choices"] and chunk["choices"][0].get("text"):
                    stamps.append(time.perf_counter())
    except httpx.HTTPError as error:
        return Timing(0, 0, [], 0, 0, f"{type(error).__name__}: {error}")
    end = time.perf_counter()
    gaps = [later - earlier for earlier, later in itertools.pairwise(stamps)]
    return Timing(
        ttft_s=(stamps[0] if stamps else end) - start,
        total_s=end - start,
        itl_s=gaps,
        prompt_tokens=usage.get("prompt_tokens", 0),
        output_tokens=usage.get("completion_tokens", len(stamps)),
    )


async def gather_limited(
    jobs: Sequence[Callable[[], Awaitable[Timing]]], concurrency: int
) -> list[Timing]:
    """Run the jobs, at most `concurrency` at a time, in order."""
    gate = asyncio.Semaphore(concurrency)

    async def one(job: Callable[[], Awaitable[Timing]]) -> Timing:
        async with gate:
            return await job()

    return list(await asyncio.gather(*(one(job) for job in jobs)))


async def first_model(client: httpx.AsyncClient) -> str:
    answer = await client.get("/v1/models")
    if answer.status_code != 200:
        raise SystemExit(f"error: /v1/models: HTTP {answer.status_code}: {answer.text[:500]}")
    return answer.json()["data"][0]["id"]


async def run_endpoint(args: argparse.Namespace, prompts: list[str]) -> Report:
    limits = httpx.Limits(max_connections=args.concurrency)
    async with httpx.AsyncClient(
        base_url=args.url,
        timeout=args.timeout_s,
        limits=limits,
        headers=key_headers(api_key(args.api_key)),
    ) as client:
        model = args.model or await first_model(client)
        jobs = [lambda p=p: ask(client, model, p, args.output_tokens) for p in prompts]
        start = time.perf_counter()
        timings = await gather_limited(jobs, args.concurrency)
        return summarize("endpoint", timings, time.perf_counter() - start)


def summarize(name: str, timings: list[Timing], wall_s: float) -> Report:
    good = [t for t in timings if not t.error]
    for text in sorted({t.error for t in timings if t.error}):
        print(f"error: {text}")
    output_tokens = sum(t.output_tokens for t in good)
    return Report(
        name=name,
        requests=len(good),
        errors=len(timings) - len(good),
        wall_s=round(wall_s, 3),
        input_tokens=sum(t.prompt_tokens for t in good),
        output_tokens=output_tokens,
        output_tokens_per_s=round(output_tokens / wall_s, 1),
        requests_per_s=round(len(good) / wall_s, 2),
        ttft_ms=percentiles([t.ttft_s for t in good]),
        itl_ms=percentiles([gap for t in good for gap in t.itl_s]),
    )


class TransformersSide:
    """`generate` of transformers, static batches of `concurrency` prompts, greedy."""

    def __init__(self, model: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self._tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def run(self, prompts: list[str], batch: int, output_tokens: int) -> Report:
        start = time.perf_counter()
        fed = made = 0
        for at in range(0, len(prompts), batch):
            inputs = self._tokenizer(prompts[at : at + batch], return_tensors="pt", padding=True)
            inputs.pop("token_type_ids", None)
            with self._torch.inference_mode():
                out = self._model.generate(
                    **inputs,
                    do_sample=False,
                    min_new_tokens=output_tokens,
                    max_new_tokens=output_tokens,
                )
            fed += int(inputs["attention_mask"].sum())
            made += (out.shape[1] - inputs["input_ids"].shape[1]) * out.shape[0]
        wall_s = time.perf_counter() - start
        return Report(
            name="transformers generate",
            requests=len(prompts),
            errors=0,
            wall_s=round(wall_s, 3),
            input_tokens=fed,
            output_tokens=made,
            output_tokens_per_s=round(made / wall_s, 1),
            requests_per_s=round(len(prompts) / wall_s, 2),
        )


def print_report(report: Report) -> None:
    print(
        f"{report.name:22s} {report.requests:5d} ok {report.errors:3d} failed "
        f"{report.wall_s:8.2f} s {report.output_tokens_per_s:10.1f} output tokens/s "
        f"{report.requests_per_s:7.2f} requests/s"
    )
    for label, figures in (("TTFT", report.ttft_ms), ("ITL", report.itl_ms)):
        if figures:
            row = "  ".join(f"{k} {v:.2f}" for k, v in figures.items())
            print(f"{'':22s} {label} ms: {row}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", metavar="KEY", help=KEY_HELP)
    parser.add_argument("--model", help="default: the first one of /v1/models")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--input-words", type=int, default=128, help="words of a prompt")
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout-s", type=float, default=600.0)
    parser.add_argument("--transformers", type=Path, help="folder of the model, for the other side")
    parser.add_argument("--json", type=Path, help="write all reports here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    reference = TransformersSide(args.transformers) if args.transformers else None
    reports: list[Report] = []
    for round_number in range(args.rounds):
        # Other prompts each round: a prefix cache must not answer for the engine.
        prompts = make_prompts(args.requests, args.input_words, args.seed + round_number)
        reports.append(asyncio.run(run_endpoint(args, prompts)))
        print_report(reports[-1])
        if reference:
            reports.append(reference.run(prompts, args.concurrency, args.output_tokens))
            print_report(reports[-1])
    if reference:
        ours = statistics.median(r.output_tokens_per_s for r in reports[::2])
        theirs = statistics.median(r.output_tokens_per_s for r in reports[1::2])
        print(f"endpoint / transformers, medians of output tokens/s: {ours / theirs:.2f}")
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in reports], indent=1))
    return 1 if any(r.errors for r in reports) else 0


if __name__ == "__main__":
    raise SystemExit(main())
