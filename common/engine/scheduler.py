"""Who runs in the next step: continuous batching with chunked prefill, prefix hits, loads and
preemption, all expressed by two counters of a sequence, tokens computed and tokens scheduled.

Does no input or output and reads no clock: requests and time come in, plans and outputs go out.

    waiting --admit--> running --------------------> finished
       |  \\              ^  |                          ^
       |   `--> loading --'  `--preempt--> waiting      |
       `------------------------------------------------'  abort, deadline, error
"""

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from common.engine.blocks import BlockManager
from common.engine.limits import SchedulerConfig, length_limit
from common.engine.prefix import PrefixCache
from common.engine.prompt_rows import prompt_rows, within_rows
from common.engine.sequence import (
    UNKNOWN_TOKEN,
    EngineRequest,
    Phase,
    RequestOutput,
    Sampled,
    StepPlan,
    TokenLogprobs,
)
from common.engine.sequence import Sequence as Seq
from common.engine.transfers import Sending, Transfers
from common.errors import DeadlineExceeded, InvalidRequest, Overloaded
from common.kv.connector import KVConnector

# With others active, this part of the pool stays free of new prompts, so that those who run do not
# preempt the newcomer at once for their next token.
RESERVED_SHARE = 0.01

_NOTHING: Mapping[Seq, tuple[TokenLogprobs, ...]] = {}

COUNTERS = (
    "steps",
    "steps_ahead",
    "prompt_tokens",
    "generated_tokens",
    "preemptions",
    "prefix_hit_tokens",
    "loaded_tokens",
    "load_errors",
    "requests_finished",
    "aborted",
    "deadline_exceeded",
)


class Scheduler:
    """Owns all sequences of an engine and their block tables. Used from one thread.

    `schedule` and `update` alternate; `update` (or `take_outputs` after an empty plan) gives what
    happened to requests since the last call, aborts and expired deadlines included.
    """

    def __init__(
        self, config: SchedulerConfig, blocks: BlockManager, connector: KVConnector | None = None
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self._prefixes = PrefixCache(config, blocks)
        self._transfers = Transfers(
            config, connector or KVConnector(), self._prefixes, self.counters
        )
        self._sequences: dict[str, Seq] = {}
        self._waiting: list[Seq] = []
        self._running: list[Seq] = []
        self._outputs: list[RequestOutput] = []
        self._order = itertools.count()
        self._step = 0
        self._assumed: StepPlan | None = None

    # What the outside asks -----------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_loading(self) -> int:
        return len(self._transfers.loading)

    @property
    def num_sending(self) -> int:
        return len(self._transfers.sending)

    @property
    def tokens_waiting(self) -> int:
        """Tokens whose KV waiting sequences lack."""
        return sum(sequence.target for sequence in self._waiting)

    @property
    def idle(self) -> bool:
        """No request is left, not even one whose blocks are still being sent."""
        return not self._sequences and not self._transfers.sending

    def request_ids(self) -> list[str]:
        """Of all requests whose end was not told yet."""
        return [s.request_id for s in self._live()]

    def next_deadline(self) -> float | None:
        """The earliest deadline of a live request, on the clock that `now` is of."""
        deadlines = [sequence.request.deadline for sequence in self._live()]
        return min((d for d in deadlines if d is not None), default=None)

    def check(self) -> None:
        """Verify that block tables and reference counts agree. Raises BlockPoolError."""
        held = [entry.sequence for entry in self._transfers.sending.values()]
        self.blocks.check([s.block_table for s in [*self._sequences.values(), *held]])

    # Requests in ---------------------------------------------------------------------------

    def add(self, request: EngineRequest, seed: int, now: float) -> Seq:
        """Queue a request. Raises InvalidRequest or Overloaded, and then keeps nothing of it.

        seed  in [0, 2**64): the request's own, or one drawn for it
        """
        limit = length_limit(request, self.config, self.blocks.num_usable)
        if request.request_id in self._sequences or request.request_id in self._transfers.sending:
            raise InvalidRequest(
                f"request_id {request.request_id!r} is in use; ids of live requests are unique",
                field="request_id",
            )
        if len(self._sequences) >= self.config.max_requests:
            raise Overloaded(
                f"{len(self._waiting)} requests wait and {len(self._running)} run; "
                f"at most {self.config.max_waiting} may wait, try again later"
            )
        sequence = Seq(
            request=request,
            token_ids=list(request.prompt_token_ids),
            seed=seed,
            arrival_s=now,
            max_len=limit,
            order=next(self._order),
        )
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)
        return sequence

    def abort(self, request_id: str, error: Exception | None = None) -> bool:
        """End a request between two steps: cancelled, or in error when one is given. False when
        there is no such request."""
        reason = "cancelled" if error is None else "error"
        sequence, entry = self._sequences.get(request_id), self._transfers.sending.get(request_id)
        if sequence is None and (entry is None or entry.output is None):
            return False
        self.counters["aborted"] += error is None
        if sequence is not None:
            self._finish(sequence, RequestOutput.of(sequence, reason, error))
            return True
        self._outputs.append(RequestOutput.of(entry.sequence, reason, error))
        entry.output = None
        if not self._transfers.finish(entry.sequence):
            self._sent(self._transfers.sending.pop(request_id))
        return True

    # The step ------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan:
        """Collect what connectors finished, end what is overdue, and decide the next step. An
        empty plan: nothing can run before a connector or a new request changes that."""
        sent, loaded = self._transfers.collect()
        for entry in sent:
            self._sent(entry)
        for load in loaded:
            self._transfers.take(load)
            self._run(load.sequence)
        self._expire(now)
        planned: dict[Seq, int] = {}
        budget = self.config.max_num_batched_tokens
        preempted = self.counters["preemptions"]
        budget = self._plan_running(planned, budget)
        if self.counters["preemptions"] == preempted:
            self._admit(planned, budget, now)
        for sequence, count in planned.items():
            sequence.scheduled = count
        self._step += bool(planned)
        self.counters["steps"] += bool(planned)
        return StepPlan(
            step=self._step,
            sequences=tuple(planned),
            start=tuple(sequence.computed for sequence in planned),
            scheduled=tuple(planned.values()),
            sampled=tuple(
                s.request.prefill_tokens is None and s.computed + count == s.target
                for s, count in planned.items()
            ),
            prompt_rows=prompt_rows(planned),
            loading=frozenset(self._transfers.within),
        )

    def assume(self, plan: StepPlan) -> None:
        """Count a step that is under way as done, so that the next one can be planned meanwhile.

        Its sampled tokens are UNKNOWN_TOKEN until its `update`, which must come before the next
        plan's. Not for plans with loads or prompt rows: what they lead to is known only later.
        """
        self._assumed = plan
        self.counters["steps_ahead"] += 1
        for sequence, count, sampled in zip(
            plan.sequences, plan.scheduled, plan.sampled, strict=True
        ):
            if sequence.phase is Phase.FINISHED:
                continue
            sequence.scheduled = 0
            sequence.computed += count
            if sampled:
                sequence.token_ids.append(UNKNOWN_TOKEN)

    def update(
        self,
        plan: StepPlan,
        sampled: Sequence[Sampled],
        failed_blocks: Iterable[int] = (),
        prompt_logprobs: Mapping[Seq, tuple[TokenLogprobs, ...] | Exception] = _NOTHING,
    ) -> list[RequestOutput]:
        """Take the results of a step.

        sampled          one per sampled sequence of the plan, in its order; an error ends it
        failed_blocks    blocks whose load failed, where the plan has loads
        prompt_logprobs  of the plan's prompt_rows, or the error that ends a sequence
        """
        # Of two steps under way only the later one may load: its loads are not this one's.
        spoiled = self._transfers.land(failed_blocks) if plan.loading else ()
        results = iter(sampled)
        for sequence, count, wanted in zip(
            plan.sequences, plan.scheduled, plan.sampled, strict=True
        ):
            result = next(results) if wanted else None
            if plan is not self._assumed:
                sequence.scheduled = 0
            # One that ended while the step ran was told of already.
            if sequence in spoiled or sequence.phase is Phase.FINISHED:
                continue
            if plan is not self._assumed:
                sequence.computed += count
            self._prefixes.register(sequence)
            told = prompt_logprobs.get(sequence, ())
            if isinstance(told, Exception):
                self._finish(sequence, RequestOutput.of(sequence, "error", told))
                continue
            sequence.prompt_logprobs_told += len(told)
            if result is not None:
                self._take_token(sequence, result, told)
            elif told:
                self._outputs.append(RequestOutput.of(sequence, None, prompt_logprobs=told))
            elif sequence.request.prefill_tokens is not None:
                self._finish_if_prefilled(sequence)
        if plan is self._assumed:
            self._assumed = None
        return self.take_outputs()

    def take_outputs(self) -> list[RequestOutput]:
        """What happened to requests since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    # Running sequences ---------------------------------------------------------------------

    def _plan_running(self, planned: dict[Seq, int], budget: int) -> int:
        """Those who only need their last token go first: they are what users wait for. Returns
        the budget that is left."""
        missing = [(s, s.target - s.computed) for s in self._running]
        decoding = [pair for pair in missing if pair[1] == 1]
        prefilling = [pair for pair in missing if pair[1] > 1]
        for sequence, count in itertools.chain(decoding, prefilling):
            count = within_rows(sequence, sequence.computed, min(budget, count), planned)
            if count <= 0 or sequence.phase is not Phase.RUNNING or _is_full(sequence):
                continue
            others = len(planned)
            if self._grow(sequence, sequence.computed + count, planned):
                planned[sequence] = count
                budget -= count
            if len(planned) <= others:  # some were preempted
                budget = self.config.max_num_batched_tokens - sum(planned.values())
        return budget

    def _grow(self, sequence: Seq, tokens: int, planned: dict[Seq, int]) -> bool:
        """Give a sequence blocks for its first `tokens` tokens, preempting the youngest as long
        as there are none. False when it was the youngest itself."""
        missing = self.config.blocks_for(tokens) - len(sequence.block_table)
        if missing <= 0:
            return True
        while not self.blocks.can_allocate(missing):
            victim = self._running[-1]
            planned.pop(victim, None)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table += self.blocks.allocate(missing)
        return True

    def _preempt(self, sequence: Seq) -> None:
        """Give up its blocks; what it computed is computed again, or found in the cache."""
        self.counters["preemptions"] += 1
        self._running.remove(sequence)
        self._release(sequence)
        sequence.computed = sequence.registered = 0
        sequence.preemptions += 1
        sequence.phase = Phase.WAITING
        bisect.insort(self._waiting, sequence, key=_order)

    # Admission -----------------------------------------------------------------------------

    def _admit(self, planned: dict[Seq, int], budget: int, now: float) -> None:
        """First come, first served; a sequence that loads, or whose connector does not know yet,
        does not hold up the next."""
        for sequence in list(self._waiting):
            if len(self._running) + self.num_loading >= self.config.max_num_seqs:
                return
            hits = self._prefixes.match(sequence)
            external, between_steps = self._transfers.ask(sequence, len(hits))
            if external is None:
                continue
            reached = len(hits) * self.config.block_size + external
            count = 0 if between_steps else min(budget, sequence.target - reached)
            if not between_steps and count <= 0 < sequence.target - reached:
                return
            if sequence.wants_prompt_logits:
                count = within_rows(sequence, 0, count, planned)
                if count <= 0:
                    continue
            if not self._has_room(sequence, hits):
                return
            self._start(sequence, hits, external, between_steps, now)
            if count > 0:
                planned[sequence] = count
                budget -= count

    def _has_room(self, sequence: Seq, hits: list[int]) -> bool:
        """Whether all tokens it has now get blocks, without touching the reserve."""
        wanted = self.config.blocks_for(sequence.target) - len(hits)
        wanted += self.blocks.num_unreferenced(hits)
        if self._running or self.num_loading:
            wanted += int(self.blocks.num_usable * RESERVED_SHARE)
        return self.blocks.can_allocate(wanted)

    def _start(
        self, sequence: Seq, hits: list[int], external: int, between_steps: bool, now: float
    ) -> None:
        """Move a sequence out of the queue, with blocks for all its tokens, or, when it loads,
        for those loaded."""
        hit_tokens = len(hits) * self.config.block_size
        reached = hit_tokens + external
        wanted = self.config.blocks_for(reached if between_steps else sequence.target)
        self.blocks.acquire(hits)
        sequence.block_table = hits + self.blocks.allocate(wanted - len(hits))
        sequence.registered = len(hits)
        sequence.connector_asked = True
        self._waiting.remove(sequence)
        self.counters["prefix_hit_tokens"] += hit_tokens
        if sequence.preemptions == 0:
            sequence.first_scheduled_s = now
            sequence.cached_tokens = hit_tokens
            self.counters["prompt_tokens"] += min(sequence.target, sequence.prompt_len)
        self._transfers.begin(sequence, hit_tokens, external, between_steps)
        if between_steps:
            sequence.computed = hit_tokens
            sequence.phase = Phase.LOADING
            return
        sequence.computed = reached
        self._run(sequence)

    def _run(self, sequence: Seq) -> None:
        sequence.phase = Phase.RUNNING
        bisect.insort(self._running, sequence, key=_order)
        self._finish_if_prefilled(sequence)

    # Ends ----------------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        for sequence in self._live():
            deadline = sequence.request.deadline
            if deadline is not None and now >= deadline:
                self.counters["deadline_exceeded"] += 1
                _drop_unknown(sequence)
                where = sequence.phase.value
                if sequence.phase is Phase.FINISHED:
                    where = "sending its KV"
                spent = now - sequence.arrival_s
                error = DeadlineExceeded(
                    f"the request's time ran out after {spent:.3f} s, while {where}, with "
                    f"{len(sequence.output_token_ids)} tokens generated"
                )
                self.abort(sequence.request_id, error)

    def _live(self) -> list[Seq]:
        entries = self._transfers.sending.values()
        sending = [entry.sequence for entry in entries if entry.output is not None]
        return [*self._sequences.values(), *sending]

    def _take_token(
        self, sequence: Seq, result: Sampled, prompt_logprobs: tuple[TokenLogprobs, ...]
    ) -> None:
        token = result.token
        if token is None:
            self._finish(sequence, RequestOutput.of(sequence, "error", result.error))
            return
        _drop_unknown(sequence)
        sequence.token_ids.append(token)
        self.counters["generated_tokens"] += 1
        reason = self._finish_reason(sequence, token)
        logprobs = () if result.logprobs is None else (result.logprobs,)
        output = RequestOutput.of(sequence, reason, None, (token,), logprobs, prompt_logprobs)
        if reason is None:
            self._outputs.append(output)
        else:
            self._finish(sequence, output)

    def _finish_reason(self, sequence: Seq, token: int) -> str | None:
        if token in self.config.stop_tokens(sequence.request.params):
            return "stop"
        return "length" if len(sequence.token_ids) >= sequence.max_len else None

    def _finish_if_prefilled(self, sequence: Seq) -> None:
        if sequence.request.prefill_tokens is not None and sequence.computed >= sequence.target:
            self._finish(sequence, RequestOutput.of(sequence, "prefilled"))

    def _finish(self, sequence: Seq, output: RequestOutput) -> None:
        """Take a sequence out of wherever it is, with its last output; its blocks go when no
        connector reads them."""
        request_id = sequence.request_id
        _drop_unknown(sequence)
        for queue in (self._running, self._waiting):
            if sequence in queue:
                queue.remove(sequence)
        del self._sequences[request_id]
        sequence.phase = Phase.FINISHED
        self.counters["requests_finished"] += 1
        if self._transfers.finish(sequence):
            later = output.finish_reason == "prefilled"  # told only when the KV has arrived
            self._transfers.sending[request_id] = Sending(sequence, output if later else None)
            if later:
                return
        else:
            self._release(sequence)
        self._outputs.append(output)

    def _sent(self, entry: Sending) -> None:
        self._release(entry.sequence)
        if entry.output is not None:
            self._outputs.append(entry.output)

    def _release(self, sequence: Seq) -> None:
        self.blocks.free(sequence.block_table)
        sequence.block_table = []


def _order(sequence: Seq) -> int:
    return sequence.order


def _is_full(sequence: Seq) -> bool:
    """Whether its last token, not known yet, is the last that it may have."""
    return sequence.token_ids[-1] == UNKNOWN_TOKEN and len(sequence.token_ids) >= sequence.max_len


def _drop_unknown(sequence: Seq) -> None:
    if sequence.token_ids[-1] == UNKNOWN_TOKEN:
        sequence.token_ids.pop()
