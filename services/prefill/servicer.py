"""PrefillService: one call is one prompt, computed here, its KV pushed to a decode worker."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import grpc
import structlog
from opentelemetry.trace import Span

from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc
from common.engine.sampling_params import SamplingParams
from common.engine.sequence import EngineRequest, RequestOutput
from common.errors import BatonError, Cancelled, InvalidRequest, Overloaded
from common.kv.connectors.handoff import HandoffSender, SendResult
from common.kv.handoff import HandoffTarget
from common.telemetry.tracing import Tracing, context_of, extract, fail, inject
from common.worker.host import EngineHost
from common.worker.timeline import Timeline, now_ns
from services.prefill.meetings import MAX_TEXT, Meetings, Met

log = structlog.get_logger("prefill")

HANDOFF_ID_BYTES = 16
MAX_LEASE_MS = 3_600_000


class PrefillServicer(worker_pb2_grpc.PrefillServiceServicer):
    """Messages to engine requests; the KV goes out through the HandoffSender connector."""

    def __init__(
        self, host: EngineHost, sender: HandoffSender, meetings: Meetings, tracing: Tracing
    ) -> None:
        self._host = host
        self._sender = sender
        self._meetings = meetings
        self._tracing = tracing
        self._numbers = itertools.count()
        self._tokens_ahead = 0

    async def Meet(
        self, request: pb.MeetRequest, context: grpc.aio.ServicerContext
    ) -> pb.MeetResponse:
        self._host.require_ready()
        met = await self._meetings.meet(request)
        own = self._host.describe()
        return pb.MeetResponse(
            worker_id=own.worker_id,
            incarnation=own.incarnation,
            test_transfer_ms=met.test_transfer_ms,
            version=own.version,
        )

    async def Prefill(
        self, request: pb.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> pb.PrefillResponse:
        self._host.require_ready()
        decode = self._meetings.met(request.handoff.incarnation)
        check_request(request, self._host.model_card(), decode.block_size)
        metadata = _texts(context.invocation_metadata() or ())
        span = self._tracing.start(
            "prefill.request",
            extract(metadata.get("traceparent", ""), metadata.get("tracestate", "")),
            attributes={
                "request.id": request.request_id,
                "prompt.tokens": request.num_tokens,
                "handoff.id": request.handoff.id.hex(),
                "worker.id": self._host.worker_id,
                "tenant": request.tenant,
            },
        )
        job = partial(_engine_request, request, decode, context.time_remaining(), span)
        try:
            with self._counted(request, decode.block_size):
                return await self._run(request.request_id, job, span)
        except asyncio.CancelledError:
            fail(span, "cancelled by the caller")
            raise
        except BatonError as error:
            fail(span, str(error))
            raise
        finally:
            span.end()

    @contextlib.contextmanager
    def _counted(self, request: pb.PrefillRequest, block_size: int) -> Iterator[None]:
        """Count a prompt as under way. Raises Overloaded when others of too many tokens are.

        block_size  tokens in a block of the decode worker
        """
        ahead, most = self._tokens_ahead, request.max_tokens_ahead
        if 0 < most < ahead:
            raise Overloaded(
                f"prompts of {ahead} tokens are under way here, over the {most} that the caller "
                "wants to wait for; ask another worker, or prefill where it decodes"
            )
        wanted = request.num_tokens - request.first_block * block_size
        self._tokens_ahead += wanted
        try:
            yield
        finally:
            self._tokens_ahead -= wanted

    async def _run(
        self, name: str, request: Callable[[str, Timeline], EngineRequest], span: Span
    ) -> pb.PrefillResponse:
        # One prompt can come twice (a second attempt), so the engine's id is this call's own.
        request_id = f"{name}#{next(self._numbers)}"
        timeline = Timeline(now_ns())
        sent = asyncio.wrap_future(self._sender.completion(request_id))
        done: asyncio.Future[RequestOutput] = asyncio.get_running_loop().create_future()

        def listen(output: RequestOutput) -> None:
            if output.finish_reason is not None and not done.done():
                done.set_result(output)

        try:
            self._host.submit(request(request_id, timeline), listen)
            output = await done
            self._record(span, timeline, output)
            _check_output(output, self._sender.result(request_id))
            return _response(output, _check_sent(await sent))
        finally:
            self._host.abort(request_id)
            self._sender.forget(request_id)
            sent.cancel()

    def _record(self, span: Span, timeline: Timeline, output: RequestOutput) -> None:
        parent = context_of(span)
        start = timeline.scheduled_ns or timeline.computed_ns or now_ns()
        self._tracing.record("prefill.queue", parent, timeline.submitted_ns, start)
        self._tracing.record(
            "prefill.compute",
            parent,
            start,
            timeline.computed_ns or now_ns(),
            {"tokens.cached": output.cached_tokens, "tokens.computed": output.computed_tokens},
        )
        span.set_attribute("tokens.cached", output.cached_tokens)
        span.set_attribute("tokens.computed", output.computed_tokens)


def check_request(request: pb.PrefillRequest, own: pb.ModelCard, block_size: int) -> None:
    """What the engine does not check by itself.

    block_size  tokens in a block of the decode worker, whose blocks the request speaks of

    Raises InvalidRequest, naming field and values, for what cannot be computed or used.
    """
    tokens = len(request.token_ids)
    if not 0 < request.num_tokens <= tokens:
        raise InvalidRequest(
            f"num_tokens is {request.num_tokens}; it must be in [1, {tokens}], "
            f"the number of token_ids",
            field="num_tokens",
        )
    if tokens > own.max_model_len:
        raise InvalidRequest(
            f"token_ids has {tokens} tokens; this worker serves at most {own.max_model_len}",
            field="token_ids",
        )
    blocks = -(-request.num_tokens // block_size)
    if request.first_block >= blocks:
        raise InvalidRequest(
            f"first_block is {request.first_block}, but {request.num_tokens} tokens have only "
            f"{blocks} blocks",
            field="first_block",
        )
    _check_handoff(request)


def _check_handoff(request: pb.PrefillRequest) -> None:
    handoff = request.handoff
    if len(handoff.id) != HANDOFF_ID_BYTES:
        raise InvalidRequest(
            f"handoff.id has {len(handoff.id)} bytes; it must have {HANDOFF_ID_BYTES}",
            field="handoff.id",
        )
    if not 0 < handoff.lease_ms <= MAX_LEASE_MS:
        raise InvalidRequest(
            f"handoff.lease_ms is {handoff.lease_ms}; it must be in [1, {MAX_LEASE_MS}]",
            field="handoff.lease_ms",
        )
    for field in ("request_id", "tenant"):
        if len(getattr(request, field)) > MAX_TEXT:
            raise InvalidRequest(f"{field} is over {MAX_TEXT} characters", field=field)


def _engine_request(
    request: pb.PrefillRequest,
    decode: Met,
    remaining_s: float | None,
    span: Span,
    request_id: str,
    timeline: Timeline,
) -> EngineRequest:
    lease_s = request.handoff.lease_ms / 1000
    # KV that comes after its lease is dropped by the decode worker: no use computing it.
    limit_s = lease_s if remaining_s is None else min(lease_s, remaining_s)
    traceparent, tracestate = inject(context_of(span))
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=list(request.token_ids),
        params=SamplingParams(max_tokens=1),
        tenant=request.tenant,
        deadline=time.monotonic() + limit_s,
        prefill_tokens=request.num_tokens,
        transfer=HandoffTarget(
            id=request.handoff.id,
            incarnation=request.handoff.incarnation,
            generation=request.handoff.generation,
            data_address=decode.data_address,
            block_size=decode.block_size,
            first_block=request.first_block,
            lease_ms=request.handoff.lease_ms,
            traceparent=traceparent,
            tracestate=tracestate,
        ),
        trace=timeline,
    )


def _check_output(output: RequestOutput, sent: SendResult | None) -> None:
    if output.finish_reason == "prefilled":
        return
    if sent is not None and sent.error is not None and not isinstance(sent.error, Cancelled):
        # The transfer broke, and the prompt was aborted for that: tell the cause.
        raise sent.error
    if output.error is not None:
        raise output.error
    raise Cancelled(f"the prefill ended early: {output.finish_reason}")


def _check_sent(result: SendResult) -> SendResult:
    if result.error is not None:
        raise result.error
    return result


def _response(output: RequestOutput, sent: SendResult) -> pb.PrefillResponse:
    return pb.PrefillResponse(
        cached_tokens=output.cached_tokens,
        computed_tokens=output.computed_tokens,
        blocks_sent=sent.blocks_sent,
        bytes_sent=sent.bytes_sent,
    )


def _texts(metadata: Sequence[tuple[str, str | bytes]]) -> dict[str, str]:
    return {key: value for key, value in metadata if isinstance(value, str)}
