"""Prometheus metrics. Names follow vLLM's, with `baton:` before them, where one means the same."""

from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from services.gateway.worker_state import WorkerState

if TYPE_CHECKING:
    from services.gateway.generation import Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_BY_TENANT = (
    ("requests", "Ended requests that were generated for"),
    ("prompt_tokens", "Prompt tokens of ended requests"),
    ("generation_tokens", "Tokens generated for ended requests"),
    ("prompt_tokens_cached", "Prompt tokens whose KV was found"),
)
_GAUGES = (
    ("running", "worker_requests_running", "Requests that the worker is generating"),
    ("waiting", "worker_requests_waiting", "Requests that wait at the worker"),
    ("tokens_waiting", "worker_tokens_waiting", "Prompt tokens that wait at the worker"),
    ("blocks_total", "worker_kv_blocks", "KV blocks that the worker has"),
    ("blocks_used", "worker_kv_blocks_used", "KV blocks that live requests refer to"),
    ("blocks_cached", "worker_kv_blocks_cached", "KV blocks kept for the prefix cache only"),
    ("open_handoffs", "worker_open_handoffs", "KV handoffs under way"),
)


class Metrics:
    """The gateway's own registry.

    workers    the last known state of every worker, asked at each scrape
    in_flight  requests being served, and requests queued before that
    tenants    the names that there are
    """

    def __init__(
        self,
        workers: Callable[[], Sequence[WorkerState]],
        in_flight: Callable[[], tuple[int, int]],
        tenants: Iterable[str] = (),
    ) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("http_requests", "HTTP requests", ("route", "status"))
        self._rpcs = self._counter("grpc_requests", "gRPC requests", ("method", "status"))
        self._ended = self._counter("request_success", "Ended choices", ("finished_reason",))
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of ended requests")
        self._output = self._counter("generation_tokens", "Tokens generated for ended requests")
        self._cached = self._counter("prompt_tokens_cached", "Prompt tokens whose KV was found")
        self._resumes = self._counter(
            "request_resumes", "Choices that moved to another decode worker", ("when",)
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token")
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to end")
        self._itl = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a choice", _TOKEN_SECONDS
        )
        self._by_tenant = {
            name: self._counter(f"tenant_{name}", f"{text}, by tenant", ("tenant",))
            for name, text in _BY_TENANT
        }
        for counter in self._by_tenant.values():
            for tenant in tenants:
                counter.labels(tenant)
        running = self._gauge("num_requests_running", "Requests that this gateway serves")
        running.set_function(lambda: in_flight()[0])
        waiting = self._gauge("num_requests_waiting", "Requests queued in this gateway")
        waiting.set_function(lambda: in_flight()[1])
        self.registry.register(_WorkerCollector(workers))

    def http_request(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def grpc_request(self, method: str, status: str) -> None:
        self._rpcs.labels(method, status).inc()

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        """`count` tokens came together, `seconds` after the last ones."""
        self._itl.observe(seconds / count)

    def resumed(self, *, mid_stream: bool) -> None:
        self._resumes.labels("mid_stream" if mid_stream else "before_first_token").inc()

    def generation_ended(
        self, usage: "Usage", reasons: Iterable[str | None], seconds: float, tenant: str
    ) -> None:
        """`reasons`: None for a choice that did not come to its end. `tenant`: one of those that
        there are, or empty."""
        self._prompt.inc(usage.prompt_tokens)
        self._output.inc(usage.completion_tokens)
        self._cached.inc(usage.cached_tokens)
        self._e2e.observe(seconds)
        if tenant:
            by_tenant = {name: counter.labels(tenant) for name, counter in self._by_tenant.items()}
            by_tenant["requests"].inc()
            by_tenant["prompt_tokens"].inc(usage.prompt_tokens)
            by_tenant["generation_tokens"].inc(usage.completion_tokens)
            by_tenant["prompt_tokens_cached"].inc(usage.cached_tokens)
        for reason in reasons:
            self._ended.labels(reason or "abort").inc()

    def render(self) -> bytes:
        """The text format; CONTENT_TYPE goes with it."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"baton:{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"baton:{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(f"baton:{name}", text, buckets=buckets, registry=self.registry)


class _WorkerCollector(Collector):
    """What the workers there are now say: one that left leaves no stale series."""

    def __init__(self, workers: Callable[[], Sequence[WorkerState]]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        states = self._workers()
        labels = ("role", "worker")
        up = GaugeMetricFamily("baton:worker_up", "1 where the worker is ready", labels=labels)
        for state in states:
            up.add_metric((state.role, state.address), float(state.ready))
        yield up
        for field, name, text in _GAUGES:
            family = GaugeMetricFamily(f"baton:{name}", text, labels=labels)
            for state in states:
                family.add_metric((state.role, state.address), float(getattr(state, field)))
            yield family
        yield _data_links(states)
        yield _events(states)


def _data_links(states: Sequence[WorkerState]) -> GaugeMetricFamily:
    labels = ("role", "worker", "transport")
    family = GaugeMetricFamily(
        "baton:worker_data_links", "Peers that the worker sends KV to", labels=labels
    )
    for state in states:
        for transport, count in sorted(Counts(state.data_links.values()).items()):
            family.add_metric((state.role, state.address, transport), float(count))
    return family


def _events(states: Sequence[WorkerState]) -> CounterMetricFamily:
    labels = ("role", "worker", "event")
    family = CounterMetricFamily(
        "baton:worker_events", "What the worker has counted since its start", labels=labels
    )
    for state in states:
        for event, count in sorted(state.counters.items()):
            family.add_metric((state.role, state.address, event), float(count))
    return family
