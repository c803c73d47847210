"""Traces: OpenTelemetry spans, kept in a bounded ring and exported by OTLP where asked.

Spans are made with explicit parents: a request's work hops between threads and loops, so there is
no ambient context to rely on.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import SpanContext, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from baton.v1 import worker_pb2 as pb
from common.errors import ConfigError

MAX_TRACES = 1024
MAX_SPANS_PER_TRACE = 256
MAX_SPANS = 8192
# Long enough for W3C's own limits of 55 and 512 characters.
MAX_HEADER_CHARS = 1024

Attribute = str | int | float | bool
_propagator = TraceContextTextMapPropagator()


class SpanRing(SpanProcessor):
    """The finished spans of the latest traces, by trace id; the oldest trace goes first."""

    def __init__(
        self, max_traces: int = MAX_TRACES, max_spans: int = MAX_SPANS, per_trace: int | None = None
    ) -> None:
        self._max_traces = max_traces
        self._max_spans = max_spans
        self._per_trace = per_trace or MAX_SPANS_PER_TRACE
        self._lock = threading.Lock()
        self._traces: OrderedDict[int, list[ReadableSpan]] = OrderedDict()
        self._count = 0

    def on_end(self, span: ReadableSpan) -> None:
        trace_id = span.get_span_context().trace_id
        with self._lock:
            spans = self._traces.setdefault(trace_id, [])
            self._traces.move_to_end(trace_id)
            if len(spans) < self._per_trace:
                spans.append(span)
                self._count += 1
            while len(self._traces) > self._max_traces or self._count > self._max_spans:
                _, dropped = self._traces.popitem(last=False)
                self._count -= len(dropped)

    def spans(self, trace_id: int) -> list[ReadableSpan]:
        with self._lock:
            return list(self._traces.get(trace_id, ()))


class Tracing:
    """The tracer of this process. Methods are safe from any thread."""

    def __init__(self, service: str, otlp_endpoint: str | None = None) -> None:
        self.service = service
        self._ring = SpanRing()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource.create({"service.name": service}),
            span_limits=SpanLimits(max_span_attribute_length=1024, max_span_attributes=64),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(self._ring)
        if otlp_endpoint:
            self._provider.add_span_processor(_otlp_processor(otlp_endpoint))
        self._tracer = self._provider.get_tracer("baton")

    def start(
        self,
        name: str,
        parent: Context | None = None,
        *,
        start_ns: int | None = None,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> Span:
        """A span that the caller must `end()`; a root when `parent` is None or empty."""
        return self._tracer.start_span(
            name,
            context=parent if parent is not None else Context(),
            start_time=start_ns,
            attributes=dict(attributes or {}),
        )

    def record(
        self,
        name: str,
        parent: Context | None,
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, Attribute] | None = None,
        *,
        error: str | None = None,
    ) -> Span:
        """A span of work already done, [start_ns, end_ns] by time.time_ns()."""
        span = self.start(name, parent, start_ns=start_ns, attributes=attributes)
        if error is not None:
            fail(span, error)
        span.end(end_time=max(start_ns, end_ns))
        return span

    def spans(self, trace_id: bytes) -> list[pb.SpanRecord]:
        """The finished spans of a trace (16 bytes), in the order in which they ended."""
        spans = self._ring.spans(int.from_bytes(trace_id, "big"))
        return [_to_proto(span, self.service) for span in spans]

    def shutdown(self) -> None:
        """Export what is pending. May block for some seconds where an exporter is set."""
        self._provider.shutdown()


def setup(service: str, otlp_endpoint: str | None = None) -> Tracing:
    """The Tracing of a process. Raises ConfigError when OTLP is asked for but not installed."""
    return Tracing(service, otlp_endpoint)


def extract(traceparent: str, tracestate: str = "") -> Context:
    """The context that W3C headers carry; an empty one when they are absent or malformed."""
    if not traceparent or len(traceparent) > MAX_HEADER_CHARS:
        return Context()
    carrier = {"traceparent": traceparent}
    if tracestate and len(tracestate) <= MAX_HEADER_CHARS:
        carrier["tracestate"] = tracestate
    return _propagator.extract(carrier, context=Context())


def inject(context: Context) -> tuple[str, str]:
    """`traceparent` and `tracestate` of a context; empty strings when it holds no span."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, context=context)
    return carrier.get("traceparent", ""), carrier.get("tracestate", "")


def context_of(span: trace.Span) -> Context:
    """The context whose children are children of this span."""
    return trace.set_span_in_context(span, Context())


def trace_id_of(context: Context) -> bytes:
    """The 16 bytes of the trace id; empty when the context holds no span."""
    found: SpanContext = trace.get_current_span(context).get_span_context()
    return found.trace_id.to_bytes(16, "big") if found.is_valid else b""


def fail(span: trace.Span, message: str) -> None:
    """Mark a span as failed."""
    span.set_status(Status(StatusCode.ERROR, message))


def _otlp_processor(endpoint: str) -> SpanProcessor:
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            f"otlp_endpoint is {endpoint!r} but the OTLP exporter is not installed; "
            f"pip install 'baton[observability]', or leave the endpoint unset"
        ) from error
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return BatchSpanProcessor(
        OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
    )


def _to_proto(span: ReadableSpan, service: str) -> pb.SpanRecord:
    own = span.get_span_context()
    parent = span.parent
    return pb.SpanRecord(
        trace_id=own.trace_id.to_bytes(16, "big"),
        span_id=own.span_id.to_bytes(8, "big"),
        parent_span_id=parent.span_id.to_bytes(8, "big") if parent is not None else b"",
        name=span.name,
        service=service,
        start_unix_ns=span.start_time or 0,
        end_unix_ns=span.end_time or 0,
        attributes={key: str(value) for key, value in (span.attributes or {}).items()},
        error=span.status.status_code is StatusCode.ERROR,
        status_message=span.status.description or "",
    )
