"""Where a prompt's beginning is, by workers of different block sizes."""

from functools import partial

import pytest

from tests.gateway.conftest import completion
from tests.gateway.fake import END, FakeDecode, GatewayProcess, say
from tests.support.mesh import wait_until

PROMPT = [10 + i % 200 for i in range(111)]


@pytest.mark.parametrize("sizes", [(8, 32), (32, 8)], ids=str)
def test_the_prefix_that_a_worker_has_is_counted_in_its_own_blocks(model, sizes):
    """The other one comes first in the order of addresses: its size is not this one's."""
    fakes = sorted((FakeDecode(say([END])) for _ in sizes), key=lambda fake: fake.address)
    for fake, size in zip(fakes, sizes, strict=True):
        fake.state.model.block_size = size
    fakes[0].state.load.running_requests = 8  # so that the other one is asked
    gateway = GatewayProcess(model, ",".join(fake.address for fake in fakes))
    try:
        ready = partial(gateway.client.get, "/ready")
        wait_until(lambda: ready().json().get("decode_workers") == 2, 10, "both seen")
        expected = []
        for _ in range(2):
            body = completion(prompt=PROMPT, max_tokens=1)
            answer = gateway.client.post("/v1/completions", json=body).raise_for_status()
            trace = gateway.client.get(f"/debug/traces/{answer.headers['x-trace-id']}").json()
            (route,) = [s for s in trace["spans"] if s["name"] == "gateway.route"]
            assert route["attributes"]["worker"] == fakes[1].address
            expected.append(int(route["attributes"]["expected_cached_tokens"]))
        assert expected == [0, len(PROMPT) // sizes[1] * sizes[1]]
    finally:
        gateway.stop()
        for fake in fakes:
            fake.kill()
