"""Session messages to the engine's nouns and back."""

from baton.v1 import common_pb2, worker_pb2
from common.engine.sequence import RequestOutput
from common.errors import DeadlineExceeded, InvalidRequest
from common.rpc.errors import to_proto
from common.rpc.sampling import logprobs_to_proto

MAX_TEXT = 256
MAX_CANDIDATES = 64

FINISH = {
    "stop": common_pb2.FINISH_REASON_STOP,
    "length": common_pb2.FINISH_REASON_LENGTH,
    "cancelled": common_pb2.FINISH_REASON_CANCELLED,
    "error": common_pb2.FINISH_REASON_ERROR,
}


def check_submit(submit: worker_pb2.Submit, max_model_len: int) -> None:
    """What costs nothing to see before the tokens are copied; the engine checks the rest.

    Raises InvalidRequest, naming the field, or DeadlineExceeded.
    """
    if not 0 < len(submit.request_id) <= MAX_TEXT:
        raise InvalidRequest(
            f"request_id has {len(submit.request_id)} characters; 1 to {MAX_TEXT} are allowed",
            field="request_id",
        )
    if len(submit.tenant) > MAX_TEXT:
        raise InvalidRequest(f"tenant is over {MAX_TEXT} characters", field="tenant")
    if len(submit.prefill_candidates) > MAX_CANDIDATES:
        raise InvalidRequest(
            f"prefill_candidates has {len(submit.prefill_candidates)} entries; "
            f"at most {MAX_CANDIDATES}",
            field="prefill_candidates",
        )
    tokens = len(submit.token_ids)
    if not 0 < tokens < max_model_len:
        raise InvalidRequest(
            f"the prompt has {tokens} tokens; this model takes 1 to {max_model_len - 1} "
            f"(its context of {max_model_len} must hold at least one more)",
            field="token_ids",
        )
    if submit.remaining_ms == 0:
        raise DeadlineExceeded("no time was left when the request was sent to its decode worker")


def delta(request_id: str, output: RequestOutput, *, first: bool) -> worker_pb2.TokenDelta:
    """One request's share of a step."""
    message = worker_pb2.TokenDelta(
        request_id=request_id,
        token_ids=output.token_ids,
        logprobs=logprobs_to_proto(output.logprobs),
        prompt_logprobs=logprobs_to_proto(output.prompt_logprobs),
    )
    if first:
        message.cached_tokens = output.cached_tokens
    if output.finish_reason is not None:
        message.finish_reason = FINISH.get(output.finish_reason, common_pb2.FINISH_REASON_ERROR)
    if output.error is not None:
        message.error.CopyFrom(to_proto(output.error))
    return message


def refusal(request_id: str, error: BaseException) -> worker_pb2.TokenDelta:
    """The answer to a Submit that was not taken."""
    return worker_pb2.TokenDelta(
        request_id=request_id, finish_reason=common_pb2.FINISH_REASON_ERROR, error=to_proto(error)
    )
