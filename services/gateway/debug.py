"""/debug/state and /debug/traces: what the mesh holds and where a request's time went."""

import re
from typing import Any

from baton.v1 import worker_pb2 as pb
from common.errors import InvalidRequest
from common.telemetry.tracing import Tracing
from services.gateway.admission import Admission
from services.gateway.fleet import Fleet
from services.gateway.presence import Presence
from services.gateway.worker_state import WorkerState

_TRACE_ID = re.compile(r"[0-9a-fA-F]{32}")
_TOTALS = ("running", "waiting", "tokens_waiting", "blocks_used", "open_handoffs", "open_leases")


async def state(fleet: Fleet, admission: Admission, presence: Presence) -> dict[str, Any]:
    """Every worker's state, asked now; the totals are all zero when nothing is served."""
    workers = await fleet.fresh_states()
    reference = fleet.reference
    return {
        "gateway": {
            "in_flight": admission.in_flight,
            "queued": admission.waiting,
            "draining": presence.leaving,
            "served_fingerprint": reference.fingerprint.hex() if reference else None,
        },
        "workers": [worker.as_json() for worker in workers],
        "totals": _totals(workers),
    }


def _totals(workers: list[WorkerState]) -> dict[str, int]:
    return {name: sum(getattr(worker, name) for worker in workers) for name in _TOTALS}


def parse_trace_id(text: str) -> bytes:
    """16 bytes of 32 hexadecimal digits. Raises InvalidRequest."""
    if not _TRACE_ID.fullmatch(text):
        raise InvalidRequest(
            f"trace id {text[:64]!r} is not 32 hexadecimal digits", field="trace_id"
        )
    return bytes.fromhex(text)


async def trace(
    fleet: Fleet, tracing: Tracing, trace_id: bytes, tenant: str
) -> dict[str, Any] | None:
    """The trace's spans of this gateway and of every worker, by start time; None without any. A
    tenant sees those of its own requests only: anybody may send another's trace id."""
    found = {span.span_id: span for span in await fleet.spans(trace_id)}
    found |= {span.span_id: span for span in tracing.spans(trace_id)}
    shown = [span for span in found.values() if not tenant or _tenant_of(span, found) == tenant]
    if not shown:
        return None
    ordered = sorted(shown, key=lambda span: (span.start_unix_ns, span.end_unix_ns))
    return {"trace_id": trace_id.hex(), "spans": [_span_json(span) for span in ordered]}


def _tenant_of(span: pb.SpanRecord | None, spans: dict[bytes, pb.SpanRecord]) -> str:
    """Whose request a span is part of: the first span of a process's part of it says so."""
    while span is not None and "tenant" not in span.attributes:
        span = spans.get(span.parent_span_id)
    return "" if span is None else span.attributes["tenant"]


def _span_json(span: pb.SpanRecord) -> dict[str, Any]:
    return {
        "name": span.name,
        "service": span.service,
        "span_id": span.span_id.hex(),
        "parent_span_id": span.parent_span_id.hex() or None,
        "start_unix_ns": span.start_unix_ns,
        "end_unix_ns": span.end_unix_ns,
        "duration_ms": (span.end_unix_ns - span.start_unix_ns) / 1e6,
        "attributes": dict(sorted(span.attributes.items())),
        "error": span.error,
        "status_message": span.status_message,
    }
