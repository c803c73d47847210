"""One gateway's stream: its live requests, and what is still to be sent to it."""

import time
from dataclasses import dataclass
from functools import partial

import structlog
from opentelemetry.trace import Span

from baton.v1 import worker_pb2 as pb
from common.engine.sequence import EngineRequest, RequestOutput
from common.errors import BatonError, InvalidRequest
from common.kv.handoff import PrefillCandidates
from common.rpc.errors import INTERNAL_MESSAGE
from common.rpc.sampling import params_from_proto
from common.telemetry.tracing import Tracing, context_of, extract, fail, inject
from common.worker.host import EngineHost
from common.worker.timeline import Timeline, now_ns
from services.decode import messages
from services.decode.outbox import Outbox

log = structlog.get_logger("decode")


@dataclass(slots=True)
class Live:
    """A request of this session that the engine has."""

    request_id: str
    engine_id: str
    span: Span
    timeline: Timeline
    tokens: int = 0
    answered: bool = False
    first_token_ns: int = 0


class Session:
    """Submits, cancels and outputs of one gateway. Used on the event loop.

    Ids are the gateway's own, so the engine's id has the session's number in front: two gateways
    may use the same one.
    """

    def __init__(self, number: int, gateway_id: str, host: EngineHost, tracing: Tracing) -> None:
        self.number = number
        self.gateway_id = gateway_id
        self.outbox = Outbox()
        self._host = host
        self._tracing = tracing
        self._live: dict[str, Live] = {}

    def submit(self, submit: pb.Submit) -> None:
        """Hand a request to the engine. One that cannot be taken is answered with an error delta;
        an earlier request with the same id goes on."""
        span = self._start_span(submit)
        try:
            self._submit(submit, span)
        except BatonError as error:
            self._refuse(submit.request_id, span, error, str(error))
        except Exception as error:
            log.exception("submit_failed", request=submit.request_id)
            self._refuse(submit.request_id, span, error, INTERNAL_MESSAGE)

    def _submit(self, submit: pb.Submit, span: Span) -> None:
        self._host.require_ready()
        messages.check_submit(submit, self._host.model_card().max_model_len)
        if submit.request_id in self._live:
            raise InvalidRequest(
                f"request_id {submit.request_id!r} is in use on this session; ids are used once",
                field="request_id",
            )
        live = Live(
            request_id=submit.request_id,
            engine_id=f"{self.number}/{submit.request_id}",
            span=span,
            timeline=Timeline(now_ns()),
        )
        request = self._engine_request(submit, live)
        self._live[live.request_id] = live
        try:
            self._host.submit(request, partial(self._on_output, live))
        except BaseException:
            del self._live[live.request_id]
            raise

    def _engine_request(self, submit: pb.Submit, live: Live) -> EngineRequest:
        traceparent, tracestate = inject(context_of(live.span))
        return EngineRequest(
            request_id=live.engine_id,
            prompt_token_ids=list(submit.token_ids),
            params=params_from_proto(submit.sampling, default_max_tokens=None),
            output_tokens=submit.output_tokens,
            tenant=submit.tenant,
            deadline=time.monotonic() + submit.remaining_ms / 1000,
            transfer=PrefillCandidates(
                tuple(submit.prefill_candidates),
                traceparent,
                tracestate,
                live.timeline.note_prefill,
            ),
            trace=live.timeline,
        )

    def cancel(self, request_id: str) -> None:
        """End a request; its last delta says so. An id that is not live is ignored: the cancel
        crossed the last delta on the way."""
        live = self._live.get(request_id)
        if live is not None:
            self._host.abort(live.engine_id)

    def close(self) -> None:
        """The stream is over: nobody waits for these requests any more."""
        self.outbox.close()
        if self._live:
            log.info("session_cancels", gateway=self.gateway_id, requests=len(self._live))
        for live in self._live.values():
            self._host.abort(live.engine_id)

    # Outputs --------------------------------------------------------------------------------

    def _on_output(self, live: Live, output: RequestOutput) -> None:
        message = messages.delta(live.request_id, output, first=not live.answered)
        live.answered = True
        live.tokens += len(output.token_ids)
        if output.token_ids and not live.first_token_ns:
            live.first_token_ns = now_ns()
        if output.finish_reason is not None:
            self._live.pop(live.request_id, None)
            self._end_spans(live, output)
        self.outbox.put(message, self._host.step)

    def _refuse(self, request_id: str, span: Span, error: Exception, text: str) -> None:
        fail(span, text)
        span.end()
        self.outbox.refuse(messages.refusal(request_id, error), self._host.step)

    # Spans ----------------------------------------------------------------------------------

    def _start_span(self, submit: pb.Submit) -> Span:
        return self._tracing.start(
            "decode.request",
            extract(submit.traceparent, submit.tracestate),
            attributes={
                "request.id": submit.request_id,
                "prompt.tokens": len(submit.token_ids),
                "worker.id": self._host.worker_id,
                "gateway.id": self.gateway_id,
                "tenant": submit.tenant,
            },
        )

    def _end_spans(self, live: Live, output: RequestOutput) -> None:
        """decode.handoff is made by the connector, these by the times it noted."""
        end, timeline, parent = now_ns(), live.timeline, context_of(live.span)
        queued = timeline.admitted_ns or timeline.scheduled_ns or end
        self._tracing.record("decode.queue", parent, timeline.submitted_ns, queued)
        if timeline.scheduled_ns and live.first_token_ns:
            self._tracing.record(
                "decode.first_token",
                parent,
                timeline.scheduled_ns,
                live.first_token_ns,
                {"tokens.ready": timeline.start_tokens},
            )
            self._tracing.record(
                "decode.generate", parent, live.first_token_ns, end, {"tokens": live.tokens}
            )
        where, reason = prefill_choice(timeline)
        live.span.set_attribute("prefill.where", where)
        live.span.set_attribute("prefill.reason", reason)
        live.span.set_attribute("tokens.cached", output.cached_tokens)
        live.span.set_attribute("tokens.generated", live.tokens)
        live.span.set_attribute("finish_reason", output.finish_reason or "")
        if output.error is not None:
            fail(live.span, str(output.error))
        live.span.end(end_time=end)


def prefill_choice(timeline: Timeline) -> tuple[str, str]:
    """Where the prompt was prefilled, remote or local, and why."""
    why = timeline.prefill_reason or "ended_before_it_was_decided"
    remote = why in ("handed_over", "ended_before_it_came")
    return "remote" if remote else "local", why
