"""What the gateway knows of one worker."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from google.protobuf.json_format import MessageToDict

from baton.v1 import worker_pb2 as pb

ROLES = {pb.ROLE_PREFILL: "prefill", pb.ROLE_DECODE: "decode", pb.ROLE_KVSTORE: "kvstore"}
STATUSES = {
    pb.WORKER_STATUS_LOADING: "loading",
    pb.WORKER_STATUS_READY: "ready",
    pb.WORKER_STATUS_DRAINING: "draining",
}


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One answer to GetState. Field names are those of /debug/state."""

    address: str
    role: str
    worker_id: str = ""
    incarnation: str = ""
    status: str = "unknown"
    model: str = ""
    max_model_len: int = 0
    block_size: int = 16
    kv_dtype: str = ""
    fingerprint: bytes = b""
    vocab_size: int = 0
    data_address: str = ""
    version: str = ""
    data_links: MappingProxyType[str, str] = field(default_factory=lambda: MappingProxyType({}))
    peers: tuple[Mapping[str, Any], ...] = ()
    running: int = 0
    waiting: int = 0
    max_waiting: int = 0
    tokens_waiting: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    open_handoffs: int = 0
    open_leases: int = 0
    counters: MappingProxyType[str, int] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def ready(self) -> bool:
        return self.status == "ready"

    def as_json(self) -> dict[str, Any]:
        """For /debug/state."""
        shown = {name: getattr(self, name) for name in self.__slots__}
        shown["fingerprint"] = self.fingerprint.hex()
        shown["data_links"] = dict(sorted(self.data_links.items()))
        shown["counters"] = dict(sorted(self.counters.items()))
        shown["blocks_free"] = max(0, self.blocks_total - self.blocks_used - self.blocks_cached)
        return shown


def from_proto(address: str, role: str, state: pb.GetStateResponse) -> WorkerState:
    """`role` is what the worker was configured as, for one that does not say."""
    model, load = state.model, state.load
    return WorkerState(
        address=address,
        role=ROLES.get(state.role, role),
        worker_id=state.worker_id,
        incarnation=state.incarnation,
        status=STATUSES.get(state.status, "unknown"),
        model=model.name,
        max_model_len=model.max_model_len,
        block_size=model.block_size or 16,
        kv_dtype=model.kv_dtype,
        fingerprint=model.fingerprint,
        vocab_size=model.vocab_size,
        data_address=state.data_address,
        version=state.version,
        data_links=MappingProxyType(dict(state.data_links)),
        peers=tuple(MessageToDict(p, preserving_proto_field_name=True) for p in state.peers),
        running=load.running_requests,
        waiting=load.waiting_requests,
        max_waiting=load.max_waiting_requests,
        tokens_waiting=load.tokens_waiting,
        blocks_total=load.blocks_total,
        blocks_used=load.blocks_used,
        blocks_cached=load.blocks_cached,
        open_handoffs=load.open_handoffs,
        open_leases=load.open_leases,
        counters=MappingProxyType(dict(load.counters)),
    )
