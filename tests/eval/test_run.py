"""`baton eval` against an endpoint: what it sends, what it prints, how it fails."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from baton.eval.run import main


class Endpoint(BaseHTTPRequestHandler):
    """Says 8000 to everything, and keeps what it was asked."""

    asked: list[dict[str, Any]]
    status = 200

    def do_GET(self) -> None:
        self._reply({"data": [{"id": "the-model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        self._reply({"choices": [{"message": {"role": "assistant", "content": "8000"}}]})

    def _reply(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[tuple[str, type[Endpoint]]]:
    handler = type("Handler", (Endpoint,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("suffix", ["", "/", "/v1"])
def test_an_endpoint_is_asked_greedily_in_chats(endpoint, capsys, suffix):
    url, handler = endpoint
    assert main(["--url", url + suffix, "--questions", "2", "--contexts", "64", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["task"] for line in lines} == {
        "recall", "json", "copy", "reverse", "add2", "add3", "facts",
    }  # fmt: skip
    assert len(handler.asked) == 2 * len(lines)
    assert all(body["temperature"] == 0 for body in handler.asked)
    assert all(body["model"] == "the-model" for body in handler.asked)
    assert handler.asked[0]["messages"][0]["role"] == "user"


def test_recall_is_measured_in_tokens_of_the_bundled_tokenizer(endpoint, capsys):
    url, _ = endpoint
    assert main(["--url", url, "--questions", "4", "--contexts", "1500", "--json"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[0])
    assert line["context_tokens"] == 1500
    assert 1500 <= line["prompt_tokens"] <= 1560


def test_an_endpoint_that_fails_is_named_with_its_words(endpoint, capsys):
    url, handler = endpoint
    handler.status = 503
    assert main(["--url", url, "--questions", "1"]) == 1
    assert "503" in capsys.readouterr().err


def test_an_endpoint_that_is_not_there_is_an_error_not_a_traceback(capsys):
    assert main(["--url", "http://127.0.0.1:1", "--questions", "1"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_a_folder_without_a_model_is_an_error_that_names_it(tmp_path, capsys):
    assert main(["--model", str(tmp_path), "--questions", "1"]) == 1
    assert str(tmp_path) in capsys.readouterr().err
