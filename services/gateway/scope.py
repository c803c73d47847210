"""One request from its arrival to its end: ids, trace, deadline."""

import re
import time
import uuid
from dataclasses import dataclass, field

from opentelemetry.context import Context
from opentelemetry.sdk.trace import Span

from common.telemetry.tracing import Tracing, context_of, extract, fail, inject, trace_id_of

_CLIENT_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(slots=True)
class RequestScope:
    """`deadline` and `started_s` are time.monotonic() seconds; `request_id` is the client's own
    where it sent a printable one, `unique_id` is never shared. `tenant` is whose KV it may find."""

    route: str
    request_id: str
    deadline: float
    span: Span
    tenant: str = ""
    unique_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started_s: float = field(default_factory=time.monotonic)

    @property
    def context(self) -> Context:
        """Parent of the request's spans."""
        return context_of(self.span)

    @property
    def remaining_s(self) -> float:
        return self.deadline - time.monotonic()

    def belong_to(self, tenant: str) -> None:
        """Whose request this is, once that is known."""
        self.tenant = tenant
        self.span.set_attribute("tenant", tenant)

    def headers(self) -> dict[str, str]:
        """What the response says of the request."""
        traceparent, _ = inject(self.context)
        return {
            "x-request-id": self.request_id,
            "x-trace-id": trace_id_of(self.context).hex(),
            "traceparent": traceparent,
        }

    def end(self, error: BaseException | None = None) -> None:
        if error is not None:
            fail(self.span, str(error) or type(error).__name__)
        self.span.end()


def open_scope(
    tracing: Tracing,
    route: str,
    *,
    timeout_s: float,
    request_id: str = "",
    traceparent: str = "",
    tracestate: str = "",
) -> RequestScope:
    """Begin a request; `traceparent` and `tracestate` are W3C's, from the client."""
    own_id = request_id if _CLIENT_ID.fullmatch(request_id) else f"req-{uuid.uuid4().hex}"
    span = tracing.start(
        "gateway.request",
        extract(traceparent, tracestate),
        attributes={"route": route, "request_id": own_id},
    )
    return RequestScope(route, own_id, time.monotonic() + timeout_s, span)
