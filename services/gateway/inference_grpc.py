"""The gRPC front: baton.v1.InferenceService over the same Generator as HTTP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable

import grpc
from google.protobuf.message import Message

from baton.v1 import common_pb2, inference_pb2_grpc
from baton.v1 import inference_pb2 as pb
from common.engine.sequence import TokenLogprobs
from common.errors import Cancelled, InvalidRequest, RequestTooLarge
from common.rpc.errors import status_of
from common.rpc.sampling import logprobs_to_proto, params_from_proto
from common.telemetry.tracing import Tracing
from common.text.vocabulary import token_bytes
from services.gateway.generate import Generator
from services.gateway.generation import Choice, Delta, Generation, Usage
from services.gateway.metrics import Metrics
from services.gateway.presence import Presence
from services.gateway.requests import COMPLETION_MAX_TOKENS, GenerateRequest, Prompt
from services.gateway.scope import RequestScope, open_scope
from services.gateway.tenants import Tenants

SERVICE_NAME = "baton.v1.InferenceService"
_REASONS = {"stop": common_pb2.FINISH_REASON_STOP, "length": common_pb2.FINISH_REASON_LENGTH}


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Errors leave as BatonError; the server's interceptor turns them into status codes."""

    def __init__(
        self,
        generator: Generator,
        tenants: Tenants,
        metrics: Metrics,
        tracing: Tracing,
        presence: Presence,
        *,
        max_body_bytes: int,
        request_timeout_s: float,
    ) -> None:
        self._generator = generator
        self._tenants = tenants
        self._metrics = metrics
        self._tracing = tracing
        self._presence = presence
        self._max_body_bytes = max_body_bytes
        self._request_timeout_s = request_timeout_s

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        self._tenants.tenant_of(_metadata(context).get("authorization"))
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
            texts = await _collect(generation)
            choices = [
                pb.ChatChoice(
                    index=choice.index,
                    message=pb.ChatMessage(role="assistant", content=texts[choice.index]),
                    finish_reason=_reason(choice),
                    logprobs=_logprobs(generation, choice.logprobs),
                )
                for choice in generation.choices
            ]
            return pb.ChatCompletionResponse(
                id=generation.id,
                model=request.model,
                created_unix_s=generation.created_unix_s,
                message=choices[0].message,
                finish_reason=choices[0].finish_reason,
                usage=_usage(generation.usage),
                choices=choices,
                prompt_logprobs=_of_prompt(generation),
            )

    async def StreamChatCompletion(
        self, request: pb.StreamChatCompletionRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.StreamChatCompletionResponse]:
        async with self._scope("StreamChatCompletion", request, context) as scope:
            wanted = chat_request(request.request)
            async with self._generator.run(wanted, scope) as generation:
                opened = False
                async for delta in generation.deltas():
                    if delta.text or delta.finish_reason or delta.logprobs:
                        first = delta.index == 0 and not opened
                        opened = opened or first
                        yield pb.StreamChatCompletionResponse(
                            id=generation.id,
                            model=wanted.model,
                            created_unix_s=generation.created_unix_s,
                            delta=delta.text,
                            index=delta.index,
                            logprobs=_logprobs(generation, delta.logprobs),
                            prompt_logprobs=_of_prompt(generation) if first else (),
                            **_ending(delta, generation),
                        )

    async def Completion(
        self, request: pb.CompletionRequest, context: grpc.aio.ServicerContext
    ) -> pb.CompletionResponse:
        async with (
            self._scope("Completion", request, context) as scope,
            self._generator.run(completion_request(request), scope) as generation,
        ):
            texts = await _collect(generation)
            choices = [
                pb.CompletionChoice(
                    index=choice.index,
                    text=_echo(generation) + texts[choice.index],
                    token_ids=choice.tokens,
                    finish_reason=_reason(choice),
                    logprobs=_logprobs(generation, choice.logprobs),
                )
                for choice in generation.choices
            ]
            return pb.CompletionResponse(
                id=generation.id,
                model=request.model,
                created_unix_s=generation.created_unix_s,
                text=choices[0].text,
                token_ids=choices[0].token_ids,
                finish_reason=choices[0].finish_reason,
                usage=_usage(generation.usage),
                choices=choices,
                prompt_logprobs=_of_prompt(generation),
            )

    async def StreamCompletion(
        self, request: pb.StreamCompletionRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.StreamCompletionResponse]:
        async with self._scope("StreamCompletion", request, context) as scope:
            wanted = completion_request(request.request)
            async with self._generator.run(wanted, scope) as generation:
                unopened = {choice.index for choice in generation.choices}
                async for delta in generation.deltas():
                    first = delta.index in unopened
                    unopened.discard(delta.index)
                    yield pb.StreamCompletionResponse(
                        id=generation.id,
                        model=wanted.model,
                        created_unix_s=generation.created_unix_s,
                        delta=(_echo(generation) if first else "") + delta.text,
                        token_ids=delta.token_ids,
                        index=delta.index,
                        logprobs=_logprobs(generation, delta.logprobs),
                        prompt_logprobs=(
                            _of_prompt(generation) if first and delta.index == 0 else ()
                        ),
                        **_ending(delta, generation),
                    )

    @contextlib.asynccontextmanager
    async def _scope(
        self, method: str, request: Message, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[RequestScope]:
        metadata = _metadata(context)
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
            scope.belong_to(self._tenants.tenant_of(metadata.get("authorization")))
            self._check_size(request)
            with self._presence.busy():
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


def _metadata(context: grpc.aio.ServicerContext) -> dict[str, str]:
    return {key: str(value) for key, value in context.invocation_metadata() or ()}


def chat_request(request: pb.ChatCompletionRequest) -> GenerateRequest:
    """Raises InvalidRequest."""
    return GenerateRequest(
        request.model,
        params_from_proto(
            request.sampling,
            default_max_tokens=None,
            stop=request.stop,
            bad_words=request.bad_words,
        ),
        messages=tuple(_message(message) for message in request.messages),
        n=request.n if request.HasField("n") else 1,
    )


def completion_request(request: pb.CompletionRequest) -> GenerateRequest:
    """Raises InvalidRequest."""
    if request.WhichOneof("prompt") is None:
        raise InvalidRequest("prompt is missing; give text or token ids", field="prompt")
    is_text = request.WhichOneof("prompt") == "text"
    prompt: Prompt = request.text if is_text else tuple(request.token_ids.ids)
    return GenerateRequest(
        request.model,
        params_from_proto(
            request.sampling,
            default_max_tokens=COMPLETION_MAX_TOKENS,
            stop=request.stop,
            bad_words=request.bad_words,
        ),
        prompts=(prompt,),
        n=request.n if request.HasField("n") else 1,
        echo=request.echo,
    )


def _message(message: pb.ChatMessage) -> dict[str, str]:
    parsed = {"role": message.role, "content": message.content}
    return {**parsed, "name": message.name} if message.name else parsed


async def _collect(generation: Generation) -> list[str]:
    """The whole text of each choice."""
    pieces: list[list[str]] = [[] for _ in generation.choices]
    async for delta in generation.deltas():
        pieces[delta.index].append(delta.text)
    return ["".join(texts) for texts in pieces]


def _reason(choice: Choice) -> int:
    return _REASONS[choice.finish_reason or "length"]


def _logprobs(
    generation: Generation, told: Iterable[TokenLogprobs]
) -> list[common_pb2.TokenLogprobs]:
    """With what each token spells: a caller may have no tokenizer."""
    messages = logprobs_to_proto(told)
    tokenizer = generation.tokenizer
    if tokenizer is not None:
        for message in messages:
            message.text = token_bytes(tokenizer, message.token_id)
            message.top_texts.extend(token_bytes(tokenizer, token) for token in message.top_ids)
    return messages


def _of_prompt(generation: Generation) -> list[common_pb2.TokenLogprobs]:
    return _logprobs(generation, generation.prompt_logprobs(generation.choices[0]))


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
