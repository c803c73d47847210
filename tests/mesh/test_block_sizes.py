"""Prefill and decode workers of different block sizes in one mesh: the tokens of one process."""

import concurrent.futures
import random
from collections import Counter
from functools import cache
from pathlib import Path

import httpx
import pytest

from baton import LLM, SamplingParams
from tests.support.mesh import TINY, Mesh

TOKENS = 24
SHARED = [40 + i % 200 for i in range(210)]
LENGTHS = (1, 8, 17, 33, 128, 129, 200, 333, 700)


def prompts() -> list[list[int]]:
    """Short and long ones, then some that begin as others before them did, up to a token in the
    middle of the bigger block."""
    rng = random.Random(3)
    noise = [[rng.randrange(20, 500) for _ in range(length)] for length in LENGTHS]
    recall = [f"{i} codes: river=48{i} lamp=19{i} stone=27{i} " * 8 for i in range(2)]
    alike = [SHARED[:end] + noise[4][:more] for end, more in ((210, 2), (170, 90), (201, 128))]
    return [*noise, *([ord(c) for c in text] for text in recall), *alike]


@cache
def expected(kv_dtype: str) -> list[str]:
    with LLM(TINY, threads=1, kv_cache_dtype=kv_dtype) as llm:
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        asks = [{"prompt_token_ids": prompt} for prompt in prompts()]
        return [result.outputs[0].text for result in llm.generate(asks, params)]


def text_of(mesh: Mesh, prompt: list[int]) -> str:
    body = {"model": "baton-tiny", "prompt": prompt, "temperature": 0, "max_tokens": TOKENS}
    answer = httpx.post(
        f"{mesh.url}/v1/completions", json={**body, "ignore_eos": True}, timeout=120
    )
    return answer.raise_for_status().json()["choices"][0]["text"]


@pytest.mark.parametrize(
    ("prefill", "decode", "kv_dtype", "ranks"),
    [
        (8, 16, "float32", 1),
        (16, 8, "fp8_e4m3", 1),
        (16, 32, "bf16", 1),
        (32, 16, "fp8_e4m3", 2),
    ],
)
def test_kv_goes_to_blocks_of_another_size(
    tmp_path: Path, prefill: int, decode: int, kv_dtype: str, ranks: int
) -> None:
    common = ["--kv-dtype", kv_dtype, "--block-size"]
    asking = ["--remote-prefill-min-tokens", "16", "--remote-prefill-max-tokens-ahead", "0"]
    flags = {
        "prefill": [*common, str(prefill), "--tensor-parallel", str(ranks)],
        "decode": [*common, str(decode), *asking],
    }
    asks = prompts()
    # The two sizes share a store: neither takes the other's blocks from it.
    with Mesh(tmp_path, args=flags) as mesh:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda prompt: text_of(mesh, prompt), asks[:-3]))
        got += [text_of(mesh, prompt) for prompt in asks[-3:]]
        assert got == expected(kv_dtype)
        workers = mesh.wait_idle()["workers"]
        (counters,) = (Counter(w["counters"]) for w in workers if w["role"] == "decode")
        assert counters["handoffs_completed"] == sum(len(prompt) > 16 for prompt in asks)
        # Of the last two, what the first of the three left, in whole blocks.
        assert counters["prefix_hit_tokens"] == sum(n // decode * decode for n in (170, 201))
        assert not any(name.startswith("frames_dropped") for name in counters), counters
