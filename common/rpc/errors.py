"""Baton errors to and from gRPC: status codes for calls, `Error` messages inside streams."""

import grpc

from baton.v1 import common_pb2 as pb
from common.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    HandoffError,
    InvalidRequest,
    Leaving,
    ModelNotFound,
    Overloaded,
    Unauthenticated,
    Unavailable,
    WireError,
)

FIELD_KEY = "baton-field"
CODE_KEY = "baton-code"
RETRY_KEY = "retry-after-s"
# Said instead of the message of an error that nobody raised on purpose: its text may hold anything.
INTERNAL_MESSAGE = "internal error; the server's log has the details"

# First match wins, so a subclass stands before its base.
_STATUS: tuple[tuple[type[BaseException], grpc.StatusCode], ...] = (
    (ModelNotFound, grpc.StatusCode.NOT_FOUND),
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (Cancelled, grpc.StatusCode.CANCELLED),
    (HandoffError, grpc.StatusCode.ABORTED),
    (WireError, grpc.StatusCode.DATA_LOSS),
)

_KINDS: tuple[tuple[type[BaseException], int], ...] = (
    (InvalidRequest, pb.ERROR_KIND_INVALID_REQUEST),
    (Overloaded, pb.ERROR_KIND_OVERLOADED),
    (DeadlineExceeded, pb.ERROR_KIND_DEADLINE_EXCEEDED),
    (Cancelled, pb.ERROR_KIND_CANCELLED),
    (Unavailable, pb.ERROR_KIND_UNAVAILABLE),
)

_FROM_KIND: dict[int, type[BatonError]] = {
    pb.ERROR_KIND_INVALID_REQUEST: InvalidRequest,
    pb.ERROR_KIND_OVERLOADED: Overloaded,
    pb.ERROR_KIND_DEADLINE_EXCEEDED: DeadlineExceeded,
    pb.ERROR_KIND_CANCELLED: Cancelled,
    pb.ERROR_KIND_UNAVAILABLE: Unavailable,
}

_FROM_STATUS: dict[grpc.StatusCode, type[BatonError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: ModelNotFound,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.ABORTED: HandoffError,
    grpc.StatusCode.DATA_LOSS: WireError,
}


def status_of(error: BaseException) -> grpc.StatusCode:
    """The gRPC status of an error; INTERNAL for one that was not raised on purpose."""
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return status
    return grpc.StatusCode.INTERNAL


def public_message(error: BaseException) -> str:
    """What a caller may read: the text of Baton's own errors, a fixed sentence for the rest."""
    return str(error) if isinstance(error, BatonError) else INTERNAL_MESSAGE


def trailing_metadata(error: BaseException) -> tuple[tuple[str, str], ...]:
    """The fields of an error that a status code and a message cannot carry."""
    pairs: list[tuple[str, str]] = []
    if isinstance(error, InvalidRequest):
        pairs += [(FIELD_KEY, error.field)] if error.field else []
        pairs += [(CODE_KEY, error.code)] if error.code else []
    if isinstance(error, Overloaded):
        pairs.append((RETRY_KEY, f"{error.retry_after_s:g}"))
    # gRPC metadata is printable ASCII; anything else would fail the whole call.
    return tuple((key, value) for key, value in pairs if value.isascii() and value.isprintable())


def from_rpc_error(error: grpc.aio.AioRpcError) -> BatonError:
    """The BatonError that the peer raised, or the one that says how the call failed."""
    message = error.details() or f"the call ended with {error.code().name}"
    metadata = {key: str(value) for key, value in (error.trailing_metadata() or ())}
    kind = _FROM_STATUS.get(error.code(), BatonError)
    if issubclass(kind, InvalidRequest):
        return kind(message, field=metadata.get(FIELD_KEY), code=metadata.get(CODE_KEY))
    if kind is Overloaded:
        return Overloaded(message, retry_after_s=_seconds(metadata.get(RETRY_KEY)))
    return kind(message)


def to_proto(error: BaseException) -> pb.Error:
    """An error as it travels inside a stream."""
    for kind, value in _KINDS:
        if isinstance(error, kind):
            return pb.Error(kind=value, message=str(error), leaving=isinstance(error, Leaving))
    return pb.Error(kind=pb.ERROR_KIND_INTERNAL, message=public_message(error))


def from_proto(error: pb.Error) -> BatonError:
    """The BatonError that an `Error` message stands for."""
    if error.leaving:
        return Leaving(error.message)
    return _FROM_KIND.get(error.kind, BatonError)(error.message)


def _seconds(text: str | None) -> float:
    try:
        return min(3600.0, max(0.0, float(text or "1")))
    except ValueError:
        return 1.0
