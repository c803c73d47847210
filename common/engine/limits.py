"""What an engine can take: the scheduler's settings and the checks of a request against them.

Pure functions of frozen values, so that a front may call them from any thread.
"""

from dataclasses import dataclass

from common.engine.sampling_params import SamplingParams
from common.engine.sequence import EngineRequest
from common.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Settings of the scheduler; all are known once the runner has loaded.

    block_size              tokens in a block
    max_model_len           most tokens of a sequence, prompt and output together
    vocab_size              token ids are under this
    max_num_seqs            sequences that run or load at a time
    max_num_batched_tokens  tokens in one step
    max_waiting             requests beyond max_num_seqs that are kept
    eos_token_ids           the model's end-of-sequence tokens
    fingerprint             part of the block keys
    prefix_caching          reuse the KV of equal prefixes
    """

    block_size: int
    max_model_len: int
    vocab_size: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_waiting: int = 256
    eos_token_ids: tuple[int, ...] = ()
    fingerprint: bytes = b""
    prefix_caching: bool = True

    @property
    def max_requests(self) -> int:
        """Live requests, running or waiting, over which a new one is refused."""
        return self.max_num_seqs + self.max_waiting

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def stop_tokens(self, params: SamplingParams) -> tuple[int, ...]:
        """Tokens that end a sequence with these parameters."""
        eos = () if params.ignore_eos else self.eos_token_ids
        return eos + params.stop_token_ids


def check_request(request: EngineRequest, config: SchedulerConfig) -> None:
    """Raises InvalidRequest for a request whose tokens or lengths can never be served."""
    prompt = request.prompt_token_ids
    if not prompt:
        raise InvalidRequest("the prompt has no token; at least one is needed", field="prompt")
    for index, token in enumerate(prompt):
        if not isinstance(token, int) or isinstance(token, bool):
            raise InvalidRequest(
                f"token {index} of the prompt is {token!r}, not an integer", field="prompt"
            )
        if not 0 <= token < config.vocab_size:
            raise InvalidRequest(
                f"token {index} of the prompt is {token}; the model's ids are 0 to "
                f"{config.vocab_size - 1}",
                field="prompt",
            )
    if request.prefill_tokens is not None:
        _check_prefill(request, config)
    elif len(prompt) >= config.max_model_len:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens; the model's context of {config.max_model_len} "
            f"tokens leaves room for {config.max_model_len - 1} and one of output",
            field="prompt",
            code="context_length_exceeded",
        )
    _check_output(request)
    request.params.check_vocabulary(config.vocab_size)


def _check_output(request: EngineRequest) -> None:
    given, prompt = request.output_tokens, len(request.prompt_token_ids)
    if not 0 <= given < prompt:
        raise InvalidRequest(
            f"output_tokens is {given}, of {prompt} tokens; at least one must be the prompt's",
            field="output_tokens",
        )
    if any(isinstance(word, str) for word in request.params.bad_words):
        raise InvalidRequest("bad_words must be token ids here, not text", field="bad_words")
    if request.params.n != 1:
        raise InvalidRequest(
            f"n is {request.params.n}; one request of the engine has one answer", field="n"
        )


def _check_prefill(request: EngineRequest, config: SchedulerConfig) -> None:
    wanted, prompt = request.prefill_tokens, len(request.prompt_token_ids)
    if wanted is None or not 0 <= wanted <= prompt:
        raise InvalidRequest(
            f"prefill_tokens is {wanted!r}, the prompt has {prompt} tokens", field="prefill_tokens"
        )
    if wanted > config.max_model_len:
        raise InvalidRequest(
            f"prefill_tokens is {wanted}, over the model's context of {config.max_model_len}",
            field="prefill_tokens",
            code="context_length_exceeded",
        )


def length_limit(request: EngineRequest, config: SchedulerConfig, num_blocks: int) -> int:
    """Most tokens, prompt and output together, that the request may reach.

    num_blocks  blocks of the whole cache that sequences may own

    Raises InvalidRequest for what check_request refuses, and for a request that would not fit into
    the cache even with nobody else there.
    """
    check_request(request, config)
    given, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
    prompt = given - request.output_tokens
    capacity = num_blocks * config.block_size
    if request.prefill_tokens is not None:
        limit, needed = given, request.prefill_tokens
    elif max_tokens is None:
        # The last token's KV is never needed.
        limit, needed = min(config.max_model_len, capacity + 1), given
    else:
        limit = min(prompt + max_tokens, config.max_model_len)
        needed = limit - 1
    if max_tokens is not None and request.output_tokens >= max_tokens:
        raise InvalidRequest(
            f"output_tokens is {request.output_tokens}; max_tokens {max_tokens} leaves nothing to "
            "generate",
            field="output_tokens",
        )
    if needed > capacity or limit < given:
        raise InvalidRequest(
            f"the prompt of {prompt} tokens with max_tokens {max_tokens} needs KV for {needed} "
            f"tokens; the cache of {num_blocks} blocks of {config.block_size} holds {capacity}",
            field="prompt" if prompt >= capacity else "max_tokens",
            code="context_length_exceeded",
        )
    return limit
