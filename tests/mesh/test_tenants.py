"""Two tenants of one mesh find nothing of each other's KV, wherever it is kept."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.mesh import Mesh, wait_until

KEYS = {"one": "key-of-one-0123456789", "two": "key-of-two-0123456789"}
PROMPT = [20 + index % 300 for index in range(600)]
# Full blocks of 16 that leave the last token to be computed.
FOUND_AGAIN = 592
NO_CACHE = ["--no-prefix-caching"]
# Where KV is found: the mesh in which it can be found nowhere else.
PLACES: dict[str, dict[str, Any]] = {
    "decode": {"prefill": 0, "kvstore": 0},
    "prefill": {"kvstore": 0, "args": {"decode": NO_CACHE}},
    "store": {"prefill": 0, "args": {"decode": NO_CACHE}},
}


def ask(mesh: Mesh, tenant: str) -> tuple[str, int]:
    """The answer to the prompt, and how many of its tokens were found."""
    body = {"model": "baton-tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    headers = {"Authorization": f"Bearer {KEYS[tenant]}"}
    answer = httpx.post(f"{mesh.url}/v1/completions", json=body, headers=headers, timeout=60)
    value = answer.raise_for_status().json()
    return value["choices"][0]["text"], value["usage"]["prompt_tokens_details"]["cached_tokens"]


def found_in_store(mesh: Mesh) -> int:
    """Blocks that workers found there since their start."""
    workers = mesh.state()["workers"]
    return sum(worker["counters"].get("store_blocks_found", 0) for worker in workers)


@pytest.mark.parametrize("place", PLACES)
def test_what_one_tenant_left_is_found_by_that_tenant_only(tmp_path: Path, place: str) -> None:
    file = tmp_path / "api-keys"
    file.write_text("".join(f"{tenant} {key}\n" for tenant, key in KEYS.items()))
    settings = {"kvstore": 1, "prefill": 1, **PLACES[place]}
    args = {**settings.pop("args", {}), "gateway": ["--api-keys-file", str(file)]}
    with Mesh(tmp_path, args=args, **settings) as mesh:
        text, cached = ask(mesh, "one")
        assert cached == 0
        # Saves to the store go on after the answer.
        wait_until(lambda: ask(mesh, "one") == (text, FOUND_AGAIN), 10, f"found in {place}")
        found = found_in_store(mesh)
        assert (found > 0) == (place == "store")
        assert ask(mesh, "two") == (text, 0)
        assert found_in_store(mesh) == found
        wait_until(lambda: ask(mesh, "two") == (text, FOUND_AGAIN), 10, f"its own in {place}")
        assert ask(mesh, "one") == (text, FOUND_AGAIN)
        mesh.wait_idle()
