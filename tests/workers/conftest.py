import contextlib
from types import SimpleNamespace

import pytest
import torch

from tests.engine.zoo import checkpoint
from tests.workers.support import Worker


@pytest.fixture(scope="session")
def model():
    torch.set_num_threads(1)
    return checkpoint("llama", False)


@contextlib.contextmanager
def workers(model, folder):
    """A function that starts workers, side by side where several are asked for."""
    with contextlib.ExitStack() as stack:

        def begin(*roles, flags=(), model=model, ready=True):
            started = [Worker(role, model, folder, *flags) for role in roles]
            for worker in started:
                stack.callback(worker.stop, kill=True)
            for worker in started if ready else ():
                worker.ready()
            return started[0] if len(started) == 1 else started

        yield begin


@pytest.fixture
def start(model, tmp_path):
    """Starts workers of a test's own."""
    with workers(model, tmp_path) as begin:
        yield begin


@pytest.fixture(scope="package")
def pair(model, tmp_path_factory):
    """A prefill and a decode worker that tests share; no test may hurt them."""
    with workers(model, tmp_path_factory.mktemp("workers")) as begin:
        prefill, decode = begin("prefill", "decode")
        yield SimpleNamespace(prefill=prefill, decode=decode)


@pytest.fixture
def decode(pair):
    return pair.decode


@pytest.fixture
def prefill(pair):
    return pair.prefill
