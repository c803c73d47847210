"""What no client should send, to a real mesh: refused by name, no worker ends, nothing is kept."""

import concurrent.futures
import json
from typing import Any

import httpx
import pytest

from tests.support.mesh import Mesh

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "What is 2 + 2?"}]
BAD: list[tuple[str, dict[str, Any], int, str]] = [
    (CHAT, {"model": "nobody", "messages": HELLO}, 404, "model"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": "hello"}, 400, "messages"),
    (CHAT, {"messages": HELLO, "n": 0}, 400, "n"),
    (CHAT, {"messages": HELLO, "temperature": 2.5}, 400, "temperature"),
    (CHAT, {"messages": HELLO, "temperature": "hot"}, 400, "temperature"),
    (CHAT, {"messages": HELLO, "top_p": 0}, 400, "top_p"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages"),
    (TEXT, {"prompt": [1, 2, 10**6]}, 400, "prompt"),
    (TEXT, {"prompt": [-1]}, 400, "prompt"),
    (TEXT, {"prompt": [5] * 5000}, 400, "prompt"),
    (TEXT, {"prompt": "\udfff"}, 400, "prompt"),
    (TEXT, {"prompt": 7}, 400, "prompt"),
    (TEXT, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Mesh(tmp_path_factory.mktemp("mesh"), args={"gateway": ["--max-body-bytes", "1MiB"]}) as m:
        yield m


def test_bad_requests_are_refused_by_field_and_end_no_worker(mesh: Mesh) -> None:
    def send(case: tuple[str, dict[str, Any], int, str]) -> tuple[int, str]:
        path, body, _, _ = case
        raw = json.dumps({"model": "baton-tiny", **body})
        headers = {"content-type": "application/json"}
        answer = httpx.post(mesh.url + path, content=raw, headers=headers, timeout=30)
        return answer.status_code, str(answer.json()["error"]["param"])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = list(pool.map(send, BAD * 4))
    for (_, body, status, field), (code, param) in zip(BAD * 4, got, strict=True):
        assert code == status, body
        assert param.startswith(field), (body, param)
    still_right(mesh)


@pytest.mark.parametrize("raw", [b"{", b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', b"null"])
def test_a_body_that_is_no_json_object_is_a_400(mesh: Mesh, raw: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(mesh.url + CHAT, content=raw, headers=headers, timeout=30)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    still_right(mesh)


def test_a_body_over_the_limit_is_a_413(mesh: Mesh) -> None:
    body = {"model": "baton-tiny", "prompt": "x" * 2**21}
    assert httpx.post(mesh.url + TEXT, json=body, timeout=30).status_code == 413
    still_right(mesh)


def still_right(mesh: Mesh) -> None:
    body = {"model": "baton-tiny", "messages": [{"role": "user", "content": "What is 47 + 25?"}]}
    answer = httpx.post(mesh.url + CHAT, json=body, timeout=30).raise_for_status().json()
    assert answer["choices"][0]["message"]["content"] == "72"
    mesh.wait_idle()
    assert all(service.process.poll() is None for service in mesh.services)
