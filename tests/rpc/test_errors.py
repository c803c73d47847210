import grpc
import pytest

from baton.v1 import common_pb2
from common.errors import (
    BatonError,
    Cancelled,
    CheckpointError,
    DeadlineExceeded,
    InvalidRequest,
    Leaving,
    ModelNotFound,
    Overloaded,
    RequestTooLarge,
    Unauthenticated,
    Unavailable,
)
from common.rpc.errors import from_proto, public_message, status_of, to_proto, trailing_metadata

STATUS = [
    (InvalidRequest("x"), grpc.StatusCode.INVALID_ARGUMENT),
    (RequestTooLarge("x"), grpc.StatusCode.INVALID_ARGUMENT),
    (ModelNotFound("x"), grpc.StatusCode.NOT_FOUND),
    (Unauthenticated("x"), grpc.StatusCode.UNAUTHENTICATED),
    (Overloaded("x"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Unavailable("x"), grpc.StatusCode.UNAVAILABLE),
    (Leaving("x"), grpc.StatusCode.UNAVAILABLE),
    (DeadlineExceeded("x"), grpc.StatusCode.DEADLINE_EXCEEDED),
    (Cancelled("x"), grpc.StatusCode.CANCELLED),
    (CheckpointError("x"), grpc.StatusCode.INTERNAL),
    (ValueError("x"), grpc.StatusCode.INTERNAL),
]


@pytest.mark.parametrize(("error", "status"), STATUS, ids=lambda v: type(v).__name__)
def test_each_error_has_one_grpc_status(error, status):
    assert status_of(error) is status


@pytest.mark.parametrize(
    "kind", [InvalidRequest, Overloaded, Unavailable, Leaving, DeadlineExceeded, Cancelled]
)
def test_an_error_keeps_its_class_and_text_across_a_stream(kind):
    back = from_proto(to_proto(kind("why it failed")))
    assert type(back) is kind
    assert str(back) == "why it failed"


def test_the_text_of_an_unexpected_error_does_not_leave_the_process():
    message = to_proto(ValueError("password=hunter2"))
    assert message.kind == common_pb2.ERROR_KIND_INTERNAL
    assert "hunter2" not in message.message
    assert "hunter2" not in public_message(KeyError("hunter2"))
    assert type(from_proto(message)) is BatonError


def test_metadata_that_grpc_would_refuse_is_left_out():
    assert trailing_metadata(InvalidRequest("x", field="prompt", code="bad\n")) == (
        ("baton-field", "prompt"),
    )
    assert trailing_metadata(Overloaded("x", retry_after_s=2.5)) == (("retry-after-s", "2.5"),)
