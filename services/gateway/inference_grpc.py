"""The gRPC front: baton.v1.InferenceService over the same Generator as HTTP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
from google.protobuf.message import Message

from baton.v1 import common_pb2, inference_pb2_grpc
from baton.v1 import inference_pb2 as pb
from common.engine.sampling_params import SamplingParams
from common.errors import Cancelled, InvalidRequest, RequestTooLarge
from common.rpc.errors import status_of
from common.telemetry.tracing import Tracing
from services.gateway.generate import Generator
from services.gateway.generation import Delta, Generation, Usage
from services.gateway.metrics import Metrics
from services.gateway.requests import COMPLETION_MAX_TOKENS, GenerateRequest, Prompt
from services.gateway.scope import RequestScope, open_scope

SERVICE_NAME = "baton.v1.InferenceService"
_SCALARS = ("temperature", "top_k", "top_p", "min_p", "seed", "min_tokens", "ignore_eos")
_REASONS = {"stop": common_pb2.FINISH_REASON_STOP, "length": common_pb2.FINISH_REASON_LENGTH}


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Errors leave as BatonError; the server's interceptor turns them into status codes."""

    def __init__(
        self,
        generator: Generator,
        metrics: Metrics,
        tracing: Tracing,
        *,
        max_body_bytes: int,
        request_timeout_s: float,
    ) -> None:
        self._generator = generator
        self._metrics = metrics
        self._tracing = tracing
        self._max_body_bytes = max_body_bytes
        self._request_timeout_s = request_timeout_s

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        generator = self._generator
        model = pb.Model(id=generator.model.name, max_model_len=generator.max_model_len)
        return pb.ListModelsResponse(models=[model])

    async def ChatCompletion(
        self, request: pb.ChatCompletionRequest, context: grpc.aio.ServicerContext
    ) -> pb.ChatCompletionResponse:
        async with (
            self._scope("ChatCompletion", request, context) as scope,
            self._generator.run(chat_request(request), scope) as generation,
        ):
            text, _, reason = await _collect(generation)
            return pb.ChatCompletionResponse(
                id=generation.id,
                model=request.model,
                created_unix_s=generation.created_unix_s,
                message=pb.ChatMessage(role="assistant", content=text),
                finish_reason=reason,
                usage=_usage(generation.usage),
            )

    async def StreamChatCompletion(
        self, request: pb.StreamChatCompletionRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.StreamChatCompletionResponse]:
        async with self._scope("StreamChatCompletion", request, context) as scope:
            wanted = chat_request(request.request)
            async with self._generator.run(wanted, scope) as generation:
                async for delta in generation.deltas():
                    if delta.text or delta.finish_reason:
                        yield pb.StreamChatCompletionResponse(
                            id=generation.id,
                            model=wanted.model,
                            created_unix_s=generation.created_unix_s,
                            delta=delta.text,
                            **_ending(delta, generation),
                        )

    async def Completion(
        self, request: pb.CompletionRequest, context: grpc.aio.ServicerContext
    ) -> pb.CompletionResponse:
        async with (
            self._scope("Completion", request, context) as scope,
            self._generator.run(completion_request(request), scope) as generation,
        ):
            text, ids, reason = await _collect(generation)
            return pb.CompletionResponse(
                id=generation.id,
                model=request.model,
                created_unix_s=generation.created_unix_s,
                text=_echo(generation) + text,
                token_ids=ids,
                finish_reason=reason,
                usage=_usage(generation.usage),
            )

    async def StreamCompletion(
        self, request: pb.StreamCompletionRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.StreamCompletionResponse]:
        async with self._scope("StreamCompletion", request, context) as scope:
            wanted = completion_request(request.request)
            async with self._generator.run(wanted, scope) as generation:
                echo = _echo(generation)
                async for delta in generation.deltas():
                    yield pb.StreamCompletionResponse(
                        id=generation.id,
                        model=wanted.model,
                        created_unix_s=generation.created_unix_s,
                        delta=echo + delta.text,
                        token_ids=delta.token_ids,
                        **_ending(delta, generation),
                    )
                    echo = ""

    @contextlib.asynccontextmanager
    async def _scope(
        self, method: str, request: Message, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[RequestScope]:
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        left = context.time_remaining()
        limit = self._request_timeout_s
        scope = open_scope(
            self._tracing,
            method,
            timeout_s=limit if left is None else max(0.0, min(limit, left)),
            request_id=metadata.get("x-request-id", ""),
            traceparent=metadata.get("traceparent", ""),
            tracestate=metadata.get("tracestate", ""),
        )
        failure: BaseException | None = None
        status = grpc.StatusCode.OK
        try:
            await context.send_initial_metadata(tuple(scope.headers().items()))
            self._check_size(request)
            yield scope
        except (asyncio.CancelledError, GeneratorExit):
            failure, status = Cancelled("the client went away"), grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            failure, status = error, status_of(error)
            raise
        finally:
            scope.end(failure)
            self._metrics.grpc_request(method, status.name)

    def _check_size(self, request: Message) -> None:
        size = request.ByteSize()
        if size > self._max_body_bytes:
            raise RequestTooLarge(
                f"the request has {size} bytes; the limit is {self._max_body_bytes}", field="body"
            )


def chat_request(request: pb.ChatCompletionRequest) -> GenerateRequest:
    """Raises InvalidRequest."""
    return GenerateRequest(
        request.model,
        _sampling(request.sampling, list(request.stop), default_max_tokens=None),
        messages=tuple(_message(message) for message in request.messages),
    )


def completion_request(request: pb.CompletionRequest) -> GenerateRequest:
    """Raises InvalidRequest."""
    if request.WhichOneof("prompt") is None:
        raise InvalidRequest("prompt is missing; give text or token ids", field="prompt")
    is_text = request.WhichOneof("prompt") == "text"
    prompt: Prompt = request.text if is_text else tuple(request.token_ids.ids)
    return GenerateRequest(
        request.model,
        _sampling(request.sampling, list(request.stop), default_max_tokens=COMPLETION_MAX_TOKENS),
        prompts=(prompt,),
        echo=request.echo,
    )


def _message(message: pb.ChatMessage) -> dict[str, str]:
    parsed = {"role": message.role, "content": message.content}
    return {**parsed, "name": message.name} if message.name else parsed


def _sampling(
    sampling: common_pb2.SamplingParams, stop: list[str], default_max_tokens: int | None
) -> SamplingParams:
    given = {name: getattr(sampling, name) for name in _SCALARS if sampling.HasField(name)}
    has_max = sampling.HasField("max_tokens")
    return SamplingParams(
        **given,
        max_tokens=sampling.max_tokens if has_max else default_max_tokens,
        stop=tuple(stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
    )


async def _collect(generation: Generation) -> tuple[str, list[int], int]:
    """The whole of a request's only choice: text, token ids, finish reason."""
    pieces = [delta.text async for delta in generation.deltas()]
    choice = generation.choices[0]
    return "".join(pieces), choice.tokens, _REASONS[choice.finish_reason or "length"]


def _echo(generation: Generation) -> str:
    return generation.prompt_text(generation.choices[0]) if generation.request.echo else ""


def _ending(delta: Delta, generation: Generation) -> dict[str, object]:
    if delta.finish_reason is None:
        return {}
    return {
        "finish_reason": _REASONS[delta.finish_reason],
        "usage": _usage(generation.usage),
    }


def _usage(usage: Usage) -> common_pb2.Usage:
    return common_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )
