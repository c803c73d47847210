"""The engine's nouns: a request, its sequence, the plan of a step, what a step gave."""

import enum
from dataclasses import dataclass, field
from typing import Any

from common.engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What a front hands to the engine.

    prompt_token_ids  at least one token, each in [0, vocab_size)
    params            sampling; `stop` strings are the front's business
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

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def target(self) -> int:
        """Tokens whose KV must be computed before the next sampling, or at all for a prefill."""
        wanted = self.request.prefill_tokens
        return len(self.token_ids) if wanted is None else wanted

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the scheduler decided for one step. `scheduled[i]` tokens of `sequences[i]`,
    starting at `start[i]`; `sampled[i]` tells whether its last token's logits are sampled."""

    step: int
    sequences: tuple[Sequence, ...]
    start: tuple[int, ...]
    scheduled: tuple[int, ...]
    sampled: tuple[bool, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.scheduled)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One request's share of a step. `finish_reason` is one of stop, length, cancelled, error,
    prefilled (a prefill worker's request whose KV is computed and handed over)."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    error: Exception | None = None
    cached_tokens: int = 0
    computed_tokens: int = 0
    trace: Any = None

    @classmethod
    def of(
        cls,
        sequence: Sequence,
        finish_reason: str | None,
        error: Exception | None = None,
        token_ids: tuple[int, ...] = (),
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
        )
