"""The engine's nouns: a request, its sequence, the plan of a step, what a step gave."""

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from common.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from common.engine.logits import LogitState


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What a front hands to the engine.

    prompt_token_ids  at least one token, each in [0, vocab_size)
    params            sampling; `stop`, `n` and texts in `bad_words` are the front's business
    output_tokens     the last this-many of prompt_token_ids were generated before, on a worker
                      that was lost: penalties, min_tokens, max_tokens and bad_words count them
                      as output
    tenant            salt of the block keys: tenants share no prefix
    deadline          time.monotonic() seconds after which the request is ended; None: never
    prefill_tokens    compute KV of the first this-many tokens and end without sampling
                      (a prefill worker's request); None: an ordinary request
    transfer          what the KV connectors need to know (prefill candidates on a decode worker,
                      the handoff on a prefill worker); opaque to the engine
    trace             opaque to the engine, handed back in outputs
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    tenant: str = ""
    deadline: float | None = None
    prefill_tokens: int | None = None
    transfer: Any = None
    trace: Any = None
    output_tokens: int = 0


# Stands for the last token of a sequence while a step that was counted as done still chooses it.
UNKNOWN_TOKEN = -1


class Phase(enum.Enum):
    """Where a sequence is. Everything else follows from its counters."""

    WAITING = "waiting"  # owns no blocks that it computed into, or was preempted
    LOADING = "loading"  # owns blocks that a connector is filling
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside the scheduler. Written by the scheduler only.

    token_ids     prompt, then output
    computed      tokens[0:computed] have KV in block_table
    scheduled     tokens[computed:computed+scheduled] are in the step under way
    cached_tokens prompt tokens whose KV was found (prefix cache, store) at first admission
    registered    the first this-many blocks were offered to the prefix cache
    max_len       prompt and output together never get longer than this
    order         of arrival: who is preempted last
    logit_state   kept by the sampler where the request's logits are processed
    prompt_logprobs_told  tokens of the prompt, but the first, whose log-probabilities were told
    """

    request: EngineRequest
    token_ids: list[int]
    seed: int
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    computed: int = 0
    scheduled: int = 0
    cached_tokens: int = 0
    phase: Phase = Phase.WAITING
    arrival_s: float = 0.0
    first_scheduled_s: float = 0.0
    connector_asked: bool = False
    registered: int = 0
    max_len: int = 0
    order: int = 0
    preemptions: int = 0
    logit_state: "LogitState | None" = None
    prompt_logprobs_told: int = 0

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def prompt_len(self) -> int:
        """Tokens that the request came with."""
        return len(self.request.prompt_token_ids)

    @property
    def output_start(self) -> int:
        """Index of the first output token, of another worker or of this one."""
        return self.prompt_len - self.request.output_tokens

    @property
    def target(self) -> int:
        """Tokens whose KV must be computed before the next sampling, or at all for a prefill."""
        wanted = self.request.prefill_tokens
        return len(self.token_ids) if wanted is None else wanted

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.output_start :]

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether the prompt must be computed here, for the log-probabilities of its tokens."""
        wanted = self.request.params.prompt_logprobs is not None
        return wanted and self.prompt_logprobs_told < self.output_start - 1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the scheduler decided for one step. `scheduled[i]` tokens of `sequences[i]`,
    starting at `start[i]`; `sampled[i]` tells whether its last token's logits are sampled, and
    `prompt_rows[i]` the positions whose logits are wanted for the log-probability of the prompt's
    next token (() when no sequence wants any). Of the requests in `loading` a connector loads KV
    within the step: until it ends, neither what is loaded nor what is computed on it is known to
    be good."""

    step: int
    sequences: tuple[Sequence, ...]
    start: tuple[int, ...]
    scheduled: tuple[int, ...]
    sampled: tuple[bool, ...]
    prompt_rows: tuple[range, ...] = ()
    loading: frozenset[str] = frozenset()

    @property
    def num_tokens(self) -> int:
        return sum(self.scheduled)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the model thought of a token: its natural log-probability and rank (1 is the
    likeliest), and the likeliest tokens with theirs, best first."""

    token_id: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """What sampling gave one sequence: a token, or the error that says why there is none."""

    token: int | None
    logprobs: TokenLogprobs | None = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One request's share of a step. `finish_reason` is one of stop, length, cancelled, error,
    prefilled (a prefill worker's request whose KV is computed and handed over). `logprobs`, where
    asked for, are those of `token_ids`; `prompt_logprobs` those of the next tokens of the prompt,
    from its second one on."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    error: Exception | None = None
    cached_tokens: int = 0
    computed_tokens: int = 0
    trace: Any = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @classmethod
    def of(
        cls,
        sequence: Sequence,
        finish_reason: str | None = None,
        error: Exception | None = None,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        prompt_logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> "RequestOutput":
        """What is told of a sequence now; `computed_tokens` are those of the prompt."""
        wanted = sequence.request.prefill_tokens
        prompt = sequence.prompt_len if wanted is None else wanted
        return cls(
            request_id=sequence.request_id,
            token_ids=token_ids,
            finish_reason=finish_reason,
            error=error,
            cached_tokens=sequence.cached_tokens,
            computed_tokens=max(0, min(sequence.computed, prompt) - sequence.cached_tokens),
            trace=sequence.request.trace,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
