from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from tests.gateway.fake import END, FakeDecode, GatewayProcess, make_model, say


@pytest.fixture(scope="package")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "fake")


@pytest.fixture(scope="package")
def tokenizer(model) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


@pytest.fixture(scope="package")
def shared(model):
    """One gateway with one fake worker, for all tests that leave both as they were."""
    fake = FakeDecode(say([END]))
    gateway = GatewayProcess(model, fake.address, "--max-body-bytes", "65536")
    yield gateway, fake
    code = gateway.stop()
    fake.kill()
    assert code == 0


@pytest.fixture
def gateway(shared) -> GatewayProcess:
    return shared[0]


@pytest.fixture
def fake(shared) -> FakeDecode:
    """The shared worker, forgetting what earlier tests did."""
    worker = shared[1]
    worker.submits.clear()
    worker.cancelled.clear()
    worker.behaviour = say([END])
    return worker


@pytest.fixture
def client(gateway):
    with httpx.Client(base_url=gateway.url, timeout=30, verify=False) as http:
        yield http


def chat(**extra) -> dict:
    return {"model": "m", "messages": [{"role": "user", "content": "hello world"}], **extra}


def completion(**extra) -> dict:
    return {"model": "m", "prompt": "hello world", **extra}


def sse_events(response: httpx.Response) -> list[str]:
    """The data of every event; fails for anything that is not one."""
    blocks = response.read().decode().split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]
