"""The gRPC front answers as the HTTP front does."""

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.v1 import common_pb2, inference_pb2_grpc
from baton.v1 import inference_pb2 as pb
from tests.gateway.conftest import chat
from tests.gateway.fake import CONTEXT, END, VOCAB, fail, say, say_then_hang
from tests.support.mesh import wait_until

Code = grpc.StatusCode


@pytest.fixture
def channel(gateway):
    with grpc.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as opened:
        yield opened


@pytest.fixture
def stub(channel):
    return inference_pb2_grpc.InferenceServiceStub(channel)


def chat_request(**extra) -> pb.ChatCompletionRequest:
    messages = [pb.ChatMessage(role="user", content="hello world")]
    return pb.ChatCompletionRequest(**{"model": "m", "messages": messages, **extra})


def text_request(**extra) -> pb.CompletionRequest:
    return pb.CompletionRequest(**{"model": "m", "text": "hello world", **extra})


def test_both_fronts_give_the_same_answer_to_a_chat(stub, gateway, fake, tokenizer):
    fake.behaviour = say([*tokenizer.encode("the lazy dog").ids, END])
    http = httpx.post(f"{gateway.url}/v1/chat/completions", json=chat(seed=3)).json()
    rpc = stub.ChatCompletion(chat_request(sampling=common_pb2.SamplingParams(seed=3)))
    assert rpc.message.content == http["choices"][0]["message"]["content"] == "the lazy dog"
    assert rpc.finish_reason == common_pb2.FINISH_REASON_STOP
    assert rpc.usage.prompt_tokens == http["usage"]["prompt_tokens"]
    assert rpc.usage.completion_tokens == http["usage"]["completion_tokens"]
    assert rpc.usage.cached_tokens == 3
    over_http, over_grpc = fake.submits
    assert over_http.token_ids == over_grpc.token_ids
    assert over_http.sampling == over_grpc.sampling


def test_a_streamed_chat_ends_with_reason_and_usage(stub, fake, tokenizer):
    fake.behaviour = say([*tokenizer.encode("a😀b").ids, END])
    got = list(stub.StreamChatCompletion(pb.StreamChatCompletionRequest(request=chat_request())))
    assert [m.delta for m in got if m.delta] == ["a", "😀", "b"]
    assert [m.finish_reason for m in got[:-1]] == [0] * (len(got) - 1)
    assert got[-1].finish_reason == common_pb2.FINISH_REASON_STOP
    assert got[-1].usage.completion_tokens == 7


def test_a_completion_of_token_ids_returns_token_ids(stub, fake):
    fake.behaviour = say([40, 41, END])
    request = pb.CompletionRequest(model="m", token_ids=pb.TokenIds(ids=[7, 8, 9]))
    assert list(stub.Completion(request).token_ids) == [40, 41, END]
    assert list(fake.submits[0].token_ids) == [7, 8, 9]
    assert fake.submits[0].sampling.max_tokens == 16
    streamed = list(stub.StreamCompletion(pb.StreamCompletionRequest(request=request)))
    assert [i for m in streamed for i in m.token_ids] == [40, 41, END]


def test_echo_and_stop_work_as_over_http(stub, fake, tokenizer):
    fake.behaviour = say_then_hang(tokenizer.encode(" fox STOP").ids)
    answer = stub.Completion(text_request(text="quick", echo=True, stop=["STOP"]))
    assert answer.text == "quick fox "
    wait_until(lambda: len(fake.cancelled) == 1, 2, "cancel")


def test_zero_is_a_value_and_unset_is_the_default(stub, fake):
    zero = common_pb2.SamplingParams(temperature=0)
    stub.Completion(text_request(sampling=zero))
    stub.Completion(text_request())
    assert [s.sampling.temperature for s in fake.submits] == [0, 1]


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        (chat_request(model="other"), Code.NOT_FOUND, "model"),
        (chat_request(model=""), Code.INVALID_ARGUMENT, "model"),
        (chat_request(messages=[]), Code.INVALID_ARGUMENT, "messages"),
        (
            chat_request(messages=[pb.ChatMessage(role="x", content="a")]),
            Code.INVALID_ARGUMENT,
            "messages[0].role",
        ),
        (
            chat_request(messages=[pb.ChatMessage(role="user", content="hi " * CONTEXT)]),
            Code.INVALID_ARGUMENT,
            "messages",
        ),
        (
            chat_request(sampling=common_pb2.SamplingParams(temperature=3)),
            Code.INVALID_ARGUMENT,
            "temperature",
        ),
        (
            chat_request(sampling=common_pb2.SamplingParams(max_tokens=0)),
            Code.INVALID_ARGUMENT,
            "max_tokens",
        ),
        (
            chat_request(sampling=common_pb2.SamplingParams(top_p=float("nan"))),
            Code.INVALID_ARGUMENT,
            "top_p",
        ),
        (chat_request(stop=[""]), Code.INVALID_ARGUMENT, "stop"),
        (
            chat_request(messages=[pb.ChatMessage(role="user", content="x" * 70_000)]),
            Code.INVALID_ARGUMENT,
            "body",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_chat_that_does_not_fit_has_its_status(stub, fake, request_, code, field):
    with pytest.raises(grpc.RpcError) as refused:
        stub.ChatCompletion(request_)
    assert refused.value.code() is code
    assert dict(refused.value.trailing_metadata())["baton-field"] == field
    assert fake.submits == []


def test_prompts_that_do_not_fit_are_invalid_arguments(stub, fake):
    for prompt in (
        {"token_ids": pb.TokenIds(ids=[VOCAB])},
        {"token_ids": pb.TokenIds()},
        {"token_ids": pb.TokenIds(ids=[5] * CONTEXT)},
        {"text": ""},
        {},
    ):
        with pytest.raises(grpc.RpcError) as refused:
            stub.Completion(pb.CompletionRequest(model="m", **prompt))
        assert refused.value.code() is Code.INVALID_ARGUMENT
        assert "prompt" in refused.value.details()
    assert fake.submits == []


def test_an_overloaded_worker_is_resource_exhausted(stub, fake):
    fake.behaviour = fail(common_pb2.ERROR_KIND_OVERLOADED, "full")
    with pytest.raises(grpc.RpcError) as refused:
        stub.ChatCompletion(chat_request())
    assert refused.value.code() is Code.RESOURCE_EXHAUSTED
    assert "retry-after-s" in dict(refused.value.trailing_metadata())


def test_cancelling_a_call_cancels_at_the_worker(stub, fake):
    fake.behaviour = say_then_hang([40])
    call = stub.StreamChatCompletion(pb.StreamChatCompletionRequest(request=chat_request()))
    next(call)
    call.cancel()
    wait_until(lambda: len(fake.cancelled) == 1, 2, "cancel")


def test_a_calls_deadline_reaches_the_worker_and_ends_the_request(stub, fake):
    fake.behaviour = say_then_hang([])
    with pytest.raises(grpc.RpcError) as ended:
        stub.ChatCompletion(chat_request(), timeout=0.5)
    assert ended.value.code() is Code.DEADLINE_EXCEEDED
    assert fake.submits[0].remaining_ms <= 500
    wait_until(lambda: len(fake.cancelled) == 1, 2, "cancel")


def test_the_trace_of_the_metadata_goes_on(stub, fake):
    trace = "1af7651916cd43dd8448eb211c80319c"
    metadata = (("traceparent", f"00-{trace}-b7ad6b7169203331-01"), ("x-request-id", "r1"))
    _, call = stub.ChatCompletion.with_call(chat_request(), metadata=metadata)
    sent = dict(call.initial_metadata())
    assert sent["x-trace-id"] == trace
    assert sent["x-request-id"] == "r1"
    assert trace in fake.submits[0].traceparent


def test_models_health_and_reflection_are_served(stub, channel):
    (model,) = stub.ListModels(pb.ListModelsRequest()).models
    assert (model.id, model.max_model_len) == ("m", CONTEXT)
    health = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse.SERVING

    def status():
        return health.Check(
            health_pb2.HealthCheckRequest(service="baton.v1.InferenceService")
        ).status

    wait_until(lambda: status() == serving, 3, "health")
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = reflection.ServerReflectionInfo(iter([ask]))
    names = {service.name for service in answer.list_services_response.service}
    assert "baton.v1.InferenceService" in names
