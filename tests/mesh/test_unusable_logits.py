"""A request whose logits are NaN ends with an error, and nobody else's notices, over the mesh."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine import zoo
from tests.support.mesh import Mesh

POISON = 50  # whoever reads this token gets NaN
GOOD, TOKENS = 12, 8


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    # Sizes for which the steps of a CPU are tapes; prompts from 16 tokens on are handed over.
    path = zoo.make_checkpoint("llama", False, tmp_path / "model", head_dim=32, hidden_size=192)
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    weights["lm_head.weight"][POISON] = 0  # never the likeliest
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    flags = {"decode": ["--remote-prefill-min-tokens=16", "--async-scheduling"]}
    with Mesh(tmp_path, model=path, args=flags) as running:
        yield running


def ask(mesh: Mesh, prompt: list[int]) -> httpx.Response:
    body = {"model": "model", "prompt": prompt, "temperature": 0, "max_tokens": TOKENS}
    body |= {"ignore_eos": True, "return_token_ids": True}
    return httpx.post(f"{mesh.url}/v1/completions", json=body, timeout=60)


def test_poisoned_requests_end_with_an_error_and_the_others_have_their_tokens(mesh: Mesh) -> None:
    def clean(length: int, seed: int) -> list[int]:
        return [t if t != POISON else POISON + 1 for t in zoo.random_prompt(length, seed)]

    good = [clean(5 + 9 * i, i) for i in range(GOOD)]
    alone = [ask(mesh, prompt).raise_for_status().json() for prompt in good]
    bad = [[*clean(3 + 7 * i, 100 + i), POISON, *clean(i, 200 + i)] for i in range(GOOD)]
    with ThreadPoolExecutor(2 * GOOD) as pool:
        mixed = [prompt for pair in zip(good, bad, strict=True) for prompt in pair]
        answers = list(pool.map(lambda prompt: ask(mesh, prompt), mixed))
    for answer, wanted in zip(answers[::2], alone, strict=True):
        assert answer.raise_for_status().json()["choices"] == wanted["choices"]
    for answer in answers[1::2]:
        assert answer.status_code == 500
        assert "no usable logits" in answer.json()["error"]["message"]
    workers = mesh.wait_idle()["workers"]
    sent = sum(w["counters"].get("handoff_blocks_sent", 0) for w in workers)
    assert sent > 0
    assert not any(w["counters"].get("step_failures", 0) for w in workers if "counters" in w)
