"""The one path of a request, whichever front it came through: validate, render, tokenize, route,
submit, detokenize, deltas, usage."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial

from common.engine.sampling_params import SamplingParams, choice_seed
from common.errors import (
    InvalidRequest,
    ModelNotFound,
)
from common.kv.keys import chain_keys
from common.telemetry.tracing import Tracing
from common.text.detokenizer import IncrementalDecoder
from common.text.vocabulary import bad_word_ids
from services.gateway.admission import Admission
from services.gateway.fleet import Fleet
from services.gateway.generation import Choice, Generation
from services.gateway.metrics import Metrics
from services.gateway.prompts import PromptEncoder
from services.gateway.requests import GenerateRequest
from services.gateway.router import PrefixIndex, Route, choose_route
from services.gateway.scope import RequestScope

# Text shorter than this is tokenized faster than a thread takes over.
INLINE_CHARS = 2048
# The affinity of longer prompts is decided by their first blocks.
MAX_AFFINITY_BLOCKS = 512


@dataclass(frozen=True, slots=True)
class ServedModel:
    """`eos_token_ids` are the model's; `max_positions` its longest sequence in tokens."""

    name: str
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    created_unix_s: int


class Generator:
    """Starts generations. Holds what they share."""

    def __init__(
        self,
        model: ServedModel,
        encoder: PromptEncoder,
        fleet: Fleet,
        admission: Admission,
        metrics: Metrics,
        tracing: Tracing,
        max_resumes: int,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.fleet = fleet
        self.metrics = metrics
        self.tracing = tracing
        self.max_resumes = max_resumes
        self.index = PrefixIndex()
        self._admission = admission

    @property
    def max_model_len(self) -> int:
        return self.fleet.max_model_len(self.model.max_positions)

    @contextlib.asynccontextmanager
    async def run(self, request: GenerateRequest, scope: RequestScope) -> AsyncIterator[Generation]:
        """A generation that was accepted by its workers; leaving the block cancels what is left.

        Raises BatonError for a request that cannot be served.
        """
        self.check_model(request.model)
        async with self._admission.admit(scope.deadline):
            prompts = await self._tokenize(request)
            request = replace(request, sampling=self._checked(request.sampling))
            choices = self._choices(request, prompts, scope.tenant)
            generation = Generation(self, request, scope, choices, len(prompts))
            try:
                await generation.submit_all()
                yield generation
            finally:
                generation.close()

    def check_model(self, name: str) -> None:
        if name != self.model.name:
            raise ModelNotFound(
                f"the model {name[:256]!r} does not exist; this endpoint serves "
                f"{self.model.name!r}",
                field="model",
            )

    async def _tokenize(self, request: GenerateRequest) -> list[list[int]]:
        if request.messages is not None:
            messages = request.messages
            size = sum(len(message["content"]) for message in messages)
            ids = await _off_loop(size, partial(self.encoder.encode_chat, messages))
            self._check_prompt("messages", ids)
            return [ids]
        prompts = []
        for index, prompt in enumerate(request.prompts):
            field = "prompt" if len(request.prompts) == 1 else f"prompt[{index}]"
            if isinstance(prompt, str):
                ids = await _off_loop(
                    len(prompt), lambda text=prompt: self.encoder.encode_text(text)
                )
            else:
                ids = list(prompt)
            self._check_prompt(field, ids)
            prompts.append(ids)
        return prompts

    def _check_prompt(self, field: str, ids: list[int]) -> None:
        limit = self.max_model_len
        if not ids:
            raise InvalidRequest(f"{field} has no tokens; give some text", field=field)
        if len(ids) >= limit:
            raise InvalidRequest(
                f"{field} has {len(ids)} tokens; the context holds {limit} with at least one left "
                "for the answer",
                field=field,
                code="context_length_exceeded",
            )
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.model.vocab_size:
            raise InvalidRequest(
                f"{field} has the token id {low if low < 0 else high}; ids are in "
                f"[0, {self.model.vocab_size})",
                field=field,
            )

    def _choices(
        self, request: GenerateRequest, prompts: list[list[int]], tenant: str
    ) -> list[Choice]:
        params = request.sampling
        seed = secrets.randbits(63) if params.seed is None else params.seed
        choices = []
        for prompt in prompts:
            room = self.max_model_len - len(prompt)
            max_tokens = min(params.max_tokens or room, room)
            if params.min_tokens > max_tokens:
                raise InvalidRequest(
                    f"min_tokens is {params.min_tokens}; the context has room for {max_tokens}",
                    field="min_tokens",
                )
            keys = self._keys(prompt, tenant)
            choices += [
                Choice(
                    index=len(choices) + i,
                    prompt=prompt,
                    keys=keys,
                    seed=choice_seed(seed, i),
                    max_tokens=max_tokens,
                    decoder=self._decoder(prompt, params),
                )
                for i in range(request.n)
            ]
        return choices

    def _checked(self, params: SamplingParams) -> SamplingParams:
        """What workers are asked for: bad words as tokens. Raises InvalidRequest for what this
        model cannot do."""
        params.check_vocabulary(self.model.vocab_size)
        if params.stop and self.encoder.tokenizer is None:
            raise InvalidRequest(
                "stop needs text, and this model has no tokenizer; use stop_token_ids", field="stop"
            )
        if not params.bad_words:
            return params
        return replace(params, bad_words=bad_word_ids(self.encoder.tokenizer, params.bad_words))

    def _keys(self, prompt: list[int], tenant: str) -> dict[int, list[bytes]]:
        """By block size the prompt's keys, for each size that a worker has."""
        reference = self.fleet.reference
        if reference is None:
            return {}
        workers = (*self.fleet.usable("decode"), *self.fleet.usable("prefill"))
        return {
            size: chain_keys(
                prompt[: MAX_AFFINITY_BLOCKS * size], size, reference.fingerprint, tenant
            )
            for size in {worker.block_size for worker in workers}
        }

    def _decoder(self, prompt: list[int], params: SamplingParams) -> IncrementalDecoder | None:
        if self.encoder.tokenizer is None:
            return None
        return IncrementalDecoder(self.encoder.tokenizer, prompt, stop=params.stop)

    def route(self, choice: Choice) -> Route:
        """Where a choice goes now. Raises Unavailable or Overloaded."""
        decode = self.fleet.usable("decode")
        if choice.tokens:  # only the same model goes on with the same tokens
            decode = [w for w in decode if w.fingerprint == choice.fingerprint]
        prefill = self.fleet.usable("prefill")
        held = {size: self.index.matched_blocks(keys) for size, keys in choice.keys.items()}
        return choose_route(
            decode,
            prefill,
            own_requests=self.fleet.own_requests(),
            matched_blocks={
                worker.address: held.get(worker.block_size, {}).get(worker.address, 0)
                for worker in (*decode, *prefill)
            },
            prompt_tokens=len(choice.prompt) + len(choice.tokens),
            avoid=choice.avoid,
        )


async def _off_loop(size: int, encode: Callable[[], list[int]]) -> list[int]:
    return encode() if size < INLINE_CHARS else await asyncio.to_thread(encode)
