import sys

import pytest

from common.errors import ConfigError
from common.telemetry import tracing
from common.telemetry.tracing import SpanRing, context_of, extract, inject, trace_id_of

# The example of https://www.w3.org/TR/trace-context/
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE_ID = bytes.fromhex("0af7651916cd43dd8448eb211c80319c")


def test_a_span_continues_the_trace_of_the_clients_header():
    traces = tracing.setup("gateway")
    span = traces.start("gateway.request", extract(PARENT, "vendor=1"))
    header, state = inject(context_of(span))
    span.end()
    assert header.split("-")[1] == TRACE_ID.hex()
    assert header.split("-")[2] == f"{span.get_span_context().span_id:016x}"
    assert state == "vendor=1"
    (record,) = traces.spans(TRACE_ID)
    assert record.parent_span_id == bytes.fromhex("b7ad6b7169203331")
    assert record.service == "gateway"


@pytest.mark.parametrize(
    "header", ["", "nonsense", "00-0-0-01", "00-" + "0" * 32 + "-1-01", "x" * 9999]
)
def test_a_malformed_header_starts_a_new_trace(header):
    context = extract(header, "a=b")
    assert trace_id_of(context) == b""
    span = tracing.setup("gateway").start("gateway.request", context)
    assert span.parent is None
    assert len(trace_id_of(context_of(span))) == 16


def test_a_trace_that_the_client_does_not_sample_is_kept_all_the_same():
    traces = tracing.setup("gateway")
    traces.record("gateway.request", extract(PARENT[:-2] + "00"), 1, 2)
    assert len(traces.spans(TRACE_ID)) == 1


def test_a_span_of_work_already_done_has_the_times_given():
    traces = tracing.setup("decode")
    parent = extract(PARENT)
    traces.record("decode.queue", parent, 1000, 2500, {"tokens": 7, "ok": True}, error="too late")
    (record,) = traces.spans(TRACE_ID)
    assert (record.name, record.start_unix_ns, record.end_unix_ns) == ("decode.queue", 1000, 2500)
    assert dict(record.attributes) == {"tokens": "7", "ok": "True"}
    assert (record.error, record.status_message) == (True, "too late")


def test_children_name_their_parent():
    traces = tracing.setup("decode")
    outer = traces.start("decode.request")
    inner = traces.record("decode.queue", context_of(outer), 1, 2)
    outer.end()
    records = traces.spans(trace_id_of(context_of(outer)))
    assert [r.name for r in records] == ["decode.queue", "decode.request"]
    assert records[0].parent_span_id == records[1].span_id
    assert records[0].span_id == inner.get_span_context().span_id.to_bytes(8, "big")


def test_an_unknown_trace_has_no_spans():
    assert tracing.setup("decode").spans(bytes(16)) == []


def test_the_ring_forgets_the_oldest_trace_first_and_never_grows():
    provider = tracing.setup("x")
    ring = SpanRing(max_traces=3, max_spans=8, per_trace=4)
    ids = []
    for _ in range(5):
        span = provider.start("a")
        ids.append(span.get_span_context().trace_id)
        ring.on_end(span)
    assert [len(ring.spans(i)) for i in ids] == [0, 0, 1, 1, 1]
    for _ in range(100):
        ring.on_end(span)
    assert len(ring.spans(ids[-1])) == 4
    assert sum(len(ring.spans(i)) for i in ids) <= 8


def test_otlp_without_its_package_is_refused_with_the_remedy(monkeypatch):
    name = "opentelemetry.exporter.otlp.proto.grpc.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"baton\[observability\]"):
        tracing.setup("decode", "http://127.0.0.1:4317")
