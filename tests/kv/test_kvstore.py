"""The kvstore: its memory, and itself as a process."""

import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import ValidationError

from baton.v1 import worker_pb2, worker_pb2_grpc
from common.kv.wire import BlockRange, encode_block
from services.kvstore.config import KVStoreConfig
from services.kvstore.store import ENTRY_BYTES, BlockStore
from tests.kv.store_process import ROOT, StoreProcess

pytestmark = pytest.mark.timeout(60)


def key(i: int) -> bytes:
    return i.to_bytes(16, "little")


def frame(i: int, size: int = 1000) -> bytes:
    return encode_block(key(i), BlockRange(0, 1, 0, 1), 16, bytes([i % 256]) * size)


COST = len(frame(0)) + ENTRY_BYTES


def test_a_frame_is_given_back_byte_for_byte():
    store = BlockStore(10 * COST)
    assert store.put(frame(1)) == "stored"
    assert store.get(key(1)) == frame(1)
    assert store.get(key(2)) is None
    assert (store.counters.hits, store.counters.misses) == (1, 1)


def test_the_same_key_is_kept_once():
    store = BlockStore(10 * COST)
    store.put(frame(1))
    assert store.put(frame(1)) == "already_held"
    assert (len(store), store.used_bytes) == (1, COST)


def test_memory_never_exceeds_the_cap_and_the_least_recently_used_goes_first():
    store = BlockStore(3 * COST)
    for i in range(3):
        store.put(frame(i))
    store.get(key(0))
    store.put(frame(3))
    assert store.used_bytes == 3 * COST
    assert [store.get(key(i)) is not None for i in range(4)] == [True, False, True, True]
    assert store.counters.evicted == 1


def test_a_large_frame_evicts_as_many_as_it_needs():
    store = BlockStore(3 * COST)
    for i in range(3):
        store.put(frame(i))
    assert store.put(frame(9, size=2000)) == "stored"
    assert store.used_bytes <= 3 * COST
    assert len(store) == 2


def test_a_frame_over_the_cap_is_rejected_and_evicts_nothing():
    store = BlockStore(3 * COST)
    store.put(frame(1))
    assert store.put(frame(2, size=4000)) == "rejected"
    assert store.get(key(1)) == frame(1)


def test_a_damaged_frame_is_never_kept():
    store = BlockStore(10 * COST)
    damaged = bytearray(frame(1))
    damaged[-1] ^= 1
    assert store.put(bytes(damaged)) == "rejected"
    assert store.put(frame(1)[:-1]) == "rejected"
    assert store.put(b"") == "rejected"
    assert len(store) == 0


def test_memory_that_went_bad_is_a_miss():
    store = BlockStore(10 * COST)
    store.put(frame(1))
    damaged = bytearray(frame(1))
    damaged[100] ^= 1
    store._frames[key(1)] = bytes(damaged)
    assert store.get(key(1)) is None
    assert (len(store), store.used_bytes, store.counters.corrupt) == (0, 0, 1)


def test_a_lookup_counts_keys_up_to_the_first_that_is_missing():
    store = BlockStore(10 * COST)
    for i in (1, 2, 4):
        store.put(frame(i))
    assert store.lookup([key(1), key(2), key(3), key(4)]) == 2
    assert store.lookup([key(3)]) == 0
    assert store.lookup([]) == 0


def test_the_end_of_a_chain_is_evicted_before_its_start():
    store = BlockStore(3 * COST)
    for i in (1, 2, 3):
        store.put(frame(i))
    store.lookup([key(1), key(2), key(3)])
    store.put(frame(4))
    assert store.lookup([key(1), key(2), key(3)]) == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("1048576", 1 << 20), ("512MiB", 512 << 20), ("1.5 gib", 3 << 29), ("2048KiB", 2 << 20)],
)
def test_a_size_may_have_a_unit(text, size):
    assert KVStoreConfig(max_bytes=text).max_bytes == size


@pytest.mark.parametrize("text", ["", "12x", "MiB", "-1", "1e9", "nan", "1023"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(ValidationError):
        KVStoreConfig(max_bytes=text)


def test_the_service_imports_no_torch():
    code = "import services.kvstore.main, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30).returncode == 0


@pytest.fixture(scope="module")
def process():
    with StoreProcess("--max-bytes", "1MiB") as process:
        yield process


def test_blocks_put_into_the_process_come_back_in_the_order_of_the_keys(process):
    response = process.put(frame(1), frame(2), frame(3), frame(1), b"garbage")
    assert (response.stored, response.already_held, response.rejected) == (3, 1, 1)
    assert process.lookup(key(3), key(1), key(9)) == 2
    assert process.get(key(3), key(1), key(9), key(2)) == [frame(3), frame(1)]


def test_the_process_stays_under_its_cap(process):
    process.put(*(frame(i, size=20_000) for i in range(100, 200)))
    assert process.lookup(key(199)) == 1
    assert process.lookup(key(100)) == 0
    state = worker_pb2_grpc.WorkerServiceStub(process.channel).GetState(
        worker_pb2.GetStateRequest(), timeout=10
    )
    assert state.role == worker_pb2.ROLE_KVSTORE
    assert state.status == worker_pb2.WORKER_STATUS_READY
    assert 0 < state.load.counters["used_bytes"] <= 1 << 20
    assert state.load.counters["evicted"] > 0


@pytest.mark.parametrize("keys", [[b"short"], [b""], [key(1)] * 65537], ids=["5", "0", "many"])
def test_keys_that_are_none_are_an_invalid_argument(process, keys):
    with pytest.raises(grpc.RpcError) as caught:
        process.lookup(*keys)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "keys" in caught.value.details()


def test_health_says_serving_and_sigterm_ends_the_process_well():
    with StoreProcess() as process:
        stub = health_pb2_grpc.HealthStub(process.channel)
        for service in ("", "baton.v1.KVStoreService"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert process.stop() == 0


def test_a_port_in_use_ends_the_process_with_the_remedy(process):
    second = subprocess.run(
        [sys.executable, "-m", "services.kvstore.main", "--port", str(process.port)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert second.returncode == 2
    assert "--port" in second.stderr
