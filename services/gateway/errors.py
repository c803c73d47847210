"""Errors in the shape of OpenAI's API."""

from typing import Any

from common.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RequestTooLarge,
    Unauthenticated,
    Unavailable,
)
from common.rpc.errors import public_message

# First match wins, so a subclass stands before its base.
# Each entry: the error, its HTTP status, OpenAI's `type`, its `code` when it names none itself.
_KINDS: tuple[tuple[type[BaseException], int, str, str | None], ...] = (
    (ModelNotFound, 404, "invalid_request_error", "model_not_found"),
    (RequestTooLarge, 413, "invalid_request_error", "request_too_large"),
    (InvalidRequest, 400, "invalid_request_error", None),
    (Unauthenticated, 401, "invalid_request_error", "invalid_api_key"),
    (Overloaded, 429, "rate_limit_error", "overloaded"),
    (DeadlineExceeded, 504, "timeout_error", "deadline_exceeded"),
    (Unavailable, 503, "server_error", "unavailable"),
    # Nginx's status of a client that went away; it is only ever seen in logs and metrics.
    (Cancelled, 499, "server_error", "cancelled"),
)


def http_status(error: BaseException) -> int:
    """500 for an error that was not raised on purpose."""
    return _kind(error)[0]


def error_body(error: BaseException) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`."""
    _, kind, code = _kind(error)
    field = error.field if isinstance(error, InvalidRequest) else None
    own_code = error.code if isinstance(error, InvalidRequest) else None
    message = public_message(error)
    if field is not None and field.partition("[")[0] not in message:
        message = f"{field}: {message}"
    return {"error": {"message": message, "type": kind, "param": field, "code": own_code or code}}


def error_headers(error: BaseException) -> dict[str, str]:
    """`Retry-After` in whole seconds, at least one, where trying again can help; what a 401 has to
    ask for."""
    if isinstance(error, Unauthenticated):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, Overloaded):
        return {"Retry-After": str(max(1, round(error.retry_after_s)))}
    if isinstance(error, Unavailable):
        return {"Retry-After": "1"}
    return {}


def is_ours(error: BaseException) -> bool:
    """Whether the error was raised on purpose, and so needs no traceback in the log."""
    return isinstance(error, BatonError)


def _kind(error: BaseException) -> tuple[int, str, str | None]:
    for kind, status, name, code in _KINDS:
        if isinstance(error, kind):
            return status, name, code
    return 500, "server_error", "internal_error"
