"""A device's pages as connectors see them, on a bus whose copies come late: the same bytes as in
this machine's memory, of the moment when they were asked for."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from baton.conformance.late import LateBus
from common.engine.device_pages import DevicePages
from common.engine.runner import ModelRunner
from common.engine.sequence import EngineRequest
from common.errors import BatonError
from common.kv.connectors import pages, sender
from common.kv.connectors.copies import HostCopies
from common.kv.connectors.handoff import HandoffSender
from common.kv.layout import KVLayout
from common.kv.wire import decode_handoff_frame
from tests.engine.test_engine import request
from tests.engine.test_steps_ahead import make_requests
from tests.engine.test_steps_ahead_connectors import engine_with, saved_by
from tests.engine.zoo import checkpoint, random_prompt
from tests.kv.support import until
from tests.kv.test_conformance import EXAMPLE
from tests.kv.test_connectors import FakeReceiver, target

LAYOUTS = [
    KVLayout(3, 2, 8, 16, "fp8_e4m3"),
    KVLayout(2, 2, 64, 8, "bf16"),
    KVLayout(3, 1, 4, 4, "float32"),
    KVLayout(3, 1, 1, 1, "fp8_e4m3"),  # layers of 2 bytes
]


def both(layout: KVLayout, bus: LateBus) -> tuple[torch.Tensor, DevicePages]:
    """The same pages in this machine's memory and on a device."""
    generator = torch.Generator().manual_seed(3)
    shape = 12, layout.block_bytes
    here = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return here, DevicePages(here.clone(), layout, bus)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.kv_dtype)
def test_every_way_to_read_and_write_is_that_of_pages_in_this_machines_memory(layout):
    rng = np.random.default_rng(5)
    here, there = both(layout, LateBus())
    for ids, layers in [([3], range(1)), ([9, 2, 5], range(1, layout.num_layers))]:
        payload = rng.bytes(len(ids) * len(layers) * layout.layer_bytes)
        page = rng.bytes(layout.block_bytes)
        for cache in (here, there):
            pages.write_layers(cache, layout, tuple(ids), layers, memoryview(payload))
            pages.write_page(cache, ids[0] + 1, memoryview(page))
        wanted = pages.copy_layers(here, layout, ids, layers)
        assert pages.copy_layers(there, layout, ids, layers) == wanted
        assert wanted == payload or ids[0] + 1 in ids
        copies = [HostCopies(cache, layout) for cache in (here, there)]
        cut = ids, layout.with_block_size(2 * layout.block_size), 0, 2, layers
        for one, other in (
            (copy.layers(ids, layers) for copy in copies),
            (copy.pages(ids) for copy in copies),
            (copy.blocks(*cut) for copy in copies),
        ):
            assert one.done()
            assert other.result(10) == one.result()
        copies[1].close()
    assert pages.copy_pages(there, list(range(12))) == pages.copy_pages(here, list(range(12)))


def test_a_copy_is_of_the_moment_when_it_was_asked_for_and_they_come_in_order():
    layout, bus, order = LAYOUTS[0], LateBus(), []
    here, there = both(layout, bus)
    copies = HostCopies(there, layout)
    bus.open.clear()
    asked = []
    for i in range(8):
        payload = memoryview(bytes([i]) * layout.block_bytes)
        there.write([4], np.frombuffer(payload, np.uint8)[None])
        asked.append(copies.pages([4, 5]))
        asked[-1].add_done_callback(functools.partial(lambda i, _: order.append(i), i))
    there.write([4, 5], np.full((2, layout.block_bytes), 0xFF, np.uint8))
    assert not any(copy.done() for copy in asked)
    assert not asked[0].cancel()
    bus.open.set()
    for i, copy in enumerate(asked):
        changed, kept = copy.result(10)
        assert changed == bytes([i]) * layout.block_bytes
        assert kept == here[5].numpy().tobytes()
    copies.close()
    assert (order, bus.waited) == (list(range(8)), 0)


def test_a_copy_that_fails_says_so_and_those_after_it_come():
    layout, bus = LAYOUTS[0], LateBus()
    here, there = both(layout, bus)
    copies, bus.breaks = HostCopies(there, layout), 1
    failed, good = copies.pages([1]), copies.pages([2])
    with pytest.raises(BatonError, match="could not be copied"):
        failed.result(10)
    assert good.result(10) == [here[2].numpy().tobytes()]
    copies.close()
    assert not copies._thread.is_alive()


# The engine --------------------------------------------------------------------------------------


@pytest.fixture
def put_behind(monkeypatch):
    """Engines made once this was called have their pages on a device, behind the bus returned."""

    def put() -> LateBus:
        bus = LateBus(delay_s=0.002)

        def pages_of(runner: ModelRunner) -> DevicePages:
            return DevicePages(runner._cache.data, runner.layout, bus)

        monkeypatch.setattr(ModelRunner, "_pages", pages_of)
        return bus

    return put


def test_an_engine_saves_the_same_blocks_from_pages_of_a_device_and_loads_them(
    tmp_path, monkeypatch, put_behind
):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    requests = [
        EngineRequest(f"r{i}", prompt, params)
        for i, (prompt, params) in enumerate(zip(*make_requests(6, seed=5), strict=True))
    ]
    # So few blocks that pages are given away while they are copied.
    settings = {"num_blocks": 14, "max_num_seqs": 6, "batch_invariant": True}
    settings["model"] = checkpoint("qwen3", False)
    expected = saved_by(False, tmp_path / "here", requests, **settings)
    bus = put_behind()
    assert saved_by(True, tmp_path / "there", requests, **settings) == expected
    assert bus.left > 8
    assert bus.waited == 0

    from folder_connector import FolderConnector

    # A whole new worker, which loads into pages of a device what the other one saved.
    with engine_with(FolderConnector(tmp_path / "there"), **settings) as (engine, listener):
        for one in requests:
            engine.submit(one)
        engine.start()
        ends = [listener.end(one.request_id).finish_reason for one in requests]
        told = [listener.tokens(one.request_id) for one in requests]
        loaded = engine.state().counters["loaded_tokens"]
    assert (told, ends) == expected[:2]
    assert loaded >= 16 * sum((len(one.prompt_token_ids) - 1) // 16 for one in requests) // 2


def sent_by(prompts: list[list[int]], ahead: bool) -> dict[tuple[bytes, int, int], bytes]:
    """Have an engine prefill prompts, among requests that it serves itself; the KV that it sent:
    (handoff, block, layer) -> bytes."""
    connector, receiver = HandoffSender(), FakeReceiver()
    settings = {"num_blocks": 26, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    settings |= {"batch_invariant": True, "model": checkpoint("qwen3", False)}
    with engine_with(connector, ahead, **settings) as (engine, listener):
        done = [connector.completion(f"p{i}") for i in range(len(prompts))]
        for i, prompt in enumerate(prompts):
            to = target(receiver.address, id=bytes([i]) * 16, lease_ms=30_000)
            prefill = request(f"p{i}", [*prompt, 7], prefill=len(prompt))
            engine.submit(replace(prefill, transfer=to))
            engine.submit(request(f"d{i}", prompt[:9], max_tokens=30))
        engine.start()
        for i in range(len(prompts)):
            assert done[i].result(20).error is None
            assert listener.end(f"d{i}").finish_reason == "length"
        until(lambda: connector._staged_bytes == 0)
    receiver.stop()
    return layers_of(receiver.frames)


def layers_of(frames: list[bytes]) -> dict[tuple[bytes, int, int], bytes]:
    """As `sent_by`, of blocks without scales."""
    found = {}
    for frame in frames:
        envelope, block = decode_handoff_frame(memoryview(frame))
        part, rows = block.range, np.frombuffer(block.payload, np.uint8)
        rows = rows.reshape(envelope.num_blocks, part.layer_count, -1)
        for i in range(envelope.num_blocks):
            for layer in range(part.layer_count):
                at = envelope.handoff_id, envelope.first_block + i, part.layer_start + layer
                assert at not in found
                found[at] = rows[i, layer].tobytes()
    return found


def test_a_prefill_worker_sends_the_same_bytes_from_pages_of_a_device(monkeypatch, put_behind):
    """Layer by layer, steps ahead, with so few blocks that pages are given away meanwhile."""
    monkeypatch.setattr(sender, "MIN_FRAME_BYTES", 1)
    monkeypatch.setattr(sender, "EARLY_FRAME_BYTES", 1)
    prompts = [random_prompt(16 * (3 + i % 4), seed=i) for i in range(8)]
    expected = sent_by(prompts, ahead=False)
    assert len(expected) == 3 * sum(len(prompt) // 16 for prompt in prompts)
    bus = put_behind()
    assert sent_by(prompts, ahead=True) == expected
    assert bus.left >= 3 * len(prompts)
    assert bus.waited == 0
