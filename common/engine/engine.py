"""The engine: one thread that turns requests into tokens, step after step.

A turn: take in requests and aborts, let connectors speak, decide a step, run it, tell what came
out. With nothing to do the thread sleeps on a condition until a request, a connector's `wake` or
the next deadline.
"""

import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import structlog
import torch

from common.engine.blocks import BlockManager
from common.engine.config import EngineConfig
from common.engine.limits import SchedulerConfig, length_limit
from common.engine.logprobs import prompt_logprobs
from common.engine.runner import ModelRunner, take_tokens
from common.engine.sampler import Draw, Sampler
from common.engine.scheduler import Scheduler
from common.engine.sequence import EngineRequest, Phase, RequestOutput, Sequence, StepPlan
from common.errors import BatonError, InvalidRequest, Overloaded, Unavailable
from common.kv.connector import KVCaches, KVConnector
from common.kv.connectors.copies import HostCopies

T = TypeVar("T")
log = structlog.get_logger("engine")

# A step that breaks may be one request's doing; so many in a row are the machine's.
UNHEALTHY_AFTER_FAILURES = 3


@dataclass(frozen=True, slots=True)
class EngineState:
    """A snapshot of an engine, taken between two turns.

    running, waiting, loading  requests
    blocks_total               blocks that sequences may own
    blocks_used                those that a request refers to; zero when idle
    blocks_cached              those that only the prefix cache keeps
    open_handoffs              transfers of connectors under way
    tokens_waiting             tokens of waiting requests
    healthy                    False after several broken steps in a row, or when none can run
    counters                   by name, since the start
    """

    running: int = 0
    waiting: int = 0
    loading: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    open_handoffs: int = 0
    tokens_waiting: int = 0
    healthy: bool = True
    counters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Submitted:
    request: EngineRequest
    seed: int
    at: float


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str
    error: BatonError | None


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that was started: its results may not be there yet.

    sampled        the sequences that get a token, in the order of `draw`'s
    prompt_logits  [rows of plan.prompt_rows, vocab]; None where there are none
    """

    plan: StepPlan
    prompt_logits: torch.Tensor | None
    sampled: list[Sequence]
    draw: Draw | None


class Engine:
    """Loads a model in the constructor (seconds) and serves it from a thread of its own.

    config     settings
    connector  where KV comes from and goes to; None: nowhere
    on_step    called on the engine's thread after each step with all that it gave; must be quick

    submit, abort, wake, drain, state and failure may be called from any thread. Raises
    CheckpointError or ConfigError for what cannot be served.
    """

    def __init__(
        self,
        config: EngineConfig,
        connector: KVConnector | None,
        on_step: Callable[[list[RequestOutput]], None],
    ) -> None:
        self.config = config
        self.runner = _load(config)
        self._on_step = on_step
        self._connector = connector or KVConnector()
        self._hears_of_layers = connector
        self._scheduler = Scheduler(
            scheduler_config(config, self.runner),
            BlockManager(self.runner.num_blocks, prefix_caching=config.prefix_caching),
            self._connector,
        )
        self._sampler = Sampler(self.runner.model_config.eos_token_ids, self.runner.choose)
        self._thread: threading.Thread | None = None
        self._failures = 0
        self._flight: _Flight | None = None
        self._connector_counters: Counter[str] = Counter()
        # Shared between threads: all below, under the condition's lock.
        self._condition = threading.Condition()
        self._inbox: deque[_Submitted | _Abort] = deque()
        self._live: set[str] = set()
        self._woken = False
        self._draining = False
        self._stopping = False
        self._state = self._snapshot()
        self._copies = HostCopies(self.runner.cache, self.runner.layout)
        self._connector.register_kv_caches(
            KVCaches(
                cache=self.runner.cache,
                layout=self.runner.layout,
                fingerprint=self.runner.fingerprint,
                wake=self.wake,
                copies=self._copies,
            )
        )
        self.failure.add_done_callback(lambda _: self.wake())

    # From any thread -----------------------------------------------------------------------

    @property
    def failure(self) -> Future[BatonError]:
        """Resolved, on any thread, with the reason why this engine can run no more."""
        return self.runner.failure

    def start(self) -> None:
        """Begin to serve."""
        if self._thread is not None:
            raise BatonError("the engine was started before; an engine is started once")
        self._thread = threading.Thread(target=self._run, name="baton-engine", daemon=True)
        self._thread.start()

    def check(self, request: EngineRequest) -> None:
        """Raises InvalidRequest for a request that could never be served."""
        length_limit(request, self._scheduler.config, self._scheduler.blocks.num_usable)

    def submit(self, request: EngineRequest) -> None:
        """Hand in a request; what becomes of it is told by on_step.

        Raises InvalidRequest, Overloaded, or Unavailable while draining, and then keeps nothing.
        """
        self.check(request)
        seed = request.params.seed
        submitted = _Submitted(
            request, secrets.randbits(64) if seed is None else seed, time.monotonic()
        )
        with self._condition:
            if self.failure.done():
                raise self.failure.result()
            if self._draining or self._stopping:
                raise Unavailable("the engine is draining and takes no new request")
            if request.request_id in self._live:
                raise InvalidRequest(
                    f"request_id {request.request_id!r} is in use; ids of live requests are unique",
                    field="request_id",
                )
            config = self._scheduler.config
            if len(self._live) >= config.max_requests:
                raise Overloaded(
                    f"{len(self._live)} requests are served or wait, as many as max_num_seqs "
                    f"{config.max_num_seqs} and max_waiting {config.max_waiting} allow"
                )
            self._live.add(request.request_id)
            self._inbox.append(submitted)
            self._condition.notify()

    def abort(self, request_id: str, error: BatonError | None = None) -> None:
        """End a request: cancelled, or with the error that its caller is to hear. An unknown or
        finished one is left alone."""
        with self._condition:
            if request_id in self._live:
                self._inbox.append(_Abort(request_id, error))
                self._condition.notify()

    def wake(self) -> None:
        """Have the thread look at its connectors."""
        with self._condition:
            self._woken = True
            self._condition.notify()

    def drain(self) -> None:
        """Take no new request from now on; those here are served to their end."""
        with self._condition:
            self._draining = True

    def state(self) -> EngineState:
        """The latest snapshot, with the requests that were handed in since."""
        with self._condition:
            arrived = sum(isinstance(message, _Submitted) for message in self._inbox)
            return replace(self._state, waiting=self._state.waiting + arrived)

    @property
    def num_live(self) -> int:
        """Requests whose end was not told yet."""
        with self._condition:
            return len(self._live)

    def stop(self, deadline_s: float = 0.0) -> None:
        """Serve those who are here for up to `deadline_s` seconds, then cancel the rest, and end
        the thread. The connector is shut down."""
        with self._condition:
            self._draining = True
            if self._thread is not None:
                self._condition.wait_for(lambda: not self._live, timeout=deadline_s)
            self._stopping = True
            self._condition.notify_all()
        if self._thread is None:
            self._release()
        elif self._thread is not threading.current_thread():
            self._thread.join()

    # The engine's thread -------------------------------------------------------------------

    def _run(self) -> None:
        if self.runner.config.threads is not None:
            torch.set_num_threads(self.runner.config.threads)
        try:
            busy = False
            while self._take_inbox(busy):
                busy = self._turn()
            self._end_all(None)
        finally:
            self._release()

    def _release(self) -> None:
        try:
            self._connector.shutdown()
        finally:
            self._copies.close()
            self.runner.close()

    def _take_inbox(self, busy: bool) -> bool:
        """Wait for something to do, then take it in. False: the engine is to stop."""
        with self._condition:
            if not busy:
                self._condition.wait_for(
                    lambda: self._inbox or self._woken or self._stopping, self._patience_s()
                )
            self._woken = False
            inbox, self._inbox = self._inbox, deque()
            stopping = self._stopping
        for message in inbox:
            if isinstance(message, _Abort):
                self._guard(lambda m=message: self._scheduler.abort(m.request_id, m.error))
            else:
                self._add(message)
        return not stopping

    def _patience_s(self) -> float | None:
        """Seconds until the next deadline; None: there is none."""
        deadline = self._scheduler.next_deadline()
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def _add(self, message: _Submitted) -> None:
        try:
            self._scheduler.add(message.request, message.seed, message.at)
        except BatonError as error:
            # Only a request that ended, but whose blocks are being sent, can be in the way here.
            self._tell([RequestOutput(message.request.request_id, (), "error", error)])

    def _turn(self) -> bool:
        """One step, or only a look at connectors. True when the next turn must not wait."""
        if self.failure.done():
            self._end_all(self.failure.result())
            return False
        flight, self._flight = self._flight, None
        outputs: list[RequestOutput] = []
        plan = self._attempt((), lambda: self._scheduler.schedule(time.monotonic()))
        begun = plan and self._attempt(plan.sequences, lambda: self._launch(plan, flight))
        if flight is not None:
            outputs += self._attempt(flight.plan.sequences, lambda: self._land(flight)) or ()
        if begun is not None:
            outputs += self._attempt(begun.plan.sequences, lambda: self._go_on(begun)) or ()
        outputs += self._scheduler.take_outputs()
        self._connector_counters.update(self._guard(self._connector.take_events) or {})
        self._tell(outputs)
        # A step that landed may have made room for who waits, though it gave nobody anything.
        return bool(outputs) or flight is not None or bool(plan and plan.sequences)

    def _launch(self, plan: StepPlan, flight: _Flight | None) -> _Flight | None:
        """Start a step; `flight` is the one before it where that is not done. None: no step."""
        connector = self._connector
        if not plan.sequences:
            connector.start_load_kv(connector.build_connector_meta(None))
            return None
        connector.start_load_kv(connector.build_connector_meta(plan))
        batch = self.runner.build_batch(plan)
        if flight is not None and flight.draw is not None:
            take_tokens(batch, plan, flight.sampled, flight.draw.tokens)
        sampled = [s for s, wanted in zip(plan.sequences, plan.sampled, strict=True) if wanted]
        draw = rest = None
        with torch.inference_mode():
            logits = self.runner.forward(batch, self._hears_of_layers)
            # A view is code that the step has pushed out of the caches, so none is made in vain.
            if any(plan.prompt_rows):
                logits, rest = logits[: len(sampled)], logits[len(sampled) :]
            if sampled:
                draw = self._sampler.draw(logits, sampled)
        return _Flight(plan, rest, sampled, draw)

    def _go_on(self, flight: _Flight) -> list[RequestOutput]:
        """What follows a step's start, once the step before it has landed: the tokens that this
        one computes are known now, so that connectors can name blocks by them."""
        self._connector.wait_for_save()
        if not self._may_go_on(flight.plan):
            return self._land(flight)
        self._scheduler.assume(flight.plan)
        self._flight = flight
        return []

    def _land(self, flight: _Flight) -> list[RequestOutput]:
        """Wait for a step and take what it gave."""
        plan = flight.plan
        # Blocks that failed between steps are collected between steps: those told of now are this
        # step's only if it loads some, and then no other is under way.
        failed = self._connector.get_block_ids_with_load_errors() if plan.loading else ()
        told = {}
        if flight.prompt_logits is not None:
            told = prompt_logprobs(flight.prompt_logits, plan)
        results = [] if flight.draw is None else flight.draw.results()
        outputs = self._scheduler.update(plan, results, failed, told)
        self._failures = 0
        return outputs

    def _may_go_on(self, plan: StepPlan) -> bool:
        """Whether the next step can be prepared without knowing this one's tokens."""
        if not self.runner.steps_ahead or plan.loading or any(plan.prompt_rows):
            return False
        pairs = zip(plan.sequences, plan.sampled, strict=True)
        return not any(wanted and s.request.params.processed for s, wanted in pairs)

    def _tell(self, outputs: list[RequestOutput]) -> None:
        """Publish the state and the outputs, in this order: who hears of an end finds it there."""
        state = self._snapshot()
        ended = {output.request_id for output in outputs if output.finish_reason is not None}
        with self._condition:
            self._state = state
            if ended:
                self._live -= ended
                self._condition.notify_all()
        if outputs:
            self._guard(lambda: self._on_step(outputs))

    def _snapshot(self) -> EngineState:
        scheduler, blocks = self._scheduler, self._scheduler.blocks
        return EngineState(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            loading=scheduler.num_loading,
            blocks_total=blocks.num_usable,
            blocks_used=blocks.num_used,
            blocks_cached=blocks.num_cached,
            open_handoffs=self._connector.open_handoffs(),
            tokens_waiting=scheduler.tokens_waiting,
            healthy=self._failures < UNHEALTHY_AFTER_FAILURES and not self.failure.done(),
            counters={**scheduler.counters, **self._connector_counters},
        )

    # Failures ------------------------------------------------------------------------------

    def _attempt(self, sequences: Collection[Sequence], call: Callable[[], T]) -> T | None:
        """Do a part of a step; None when it breaks. The worker must outlive that: `sequences` end
        with the error, or all, where nothing says whose fault it was."""
        try:
            return call()
        except Exception as error:
            self._failures += 1
            self._scheduler.counters["step_failures"] += 1
            live = [s.request_id for s in sequences if s.phase is not Phase.FINISHED]
            log.exception("step_failed", requests=len(live), failures_in_a_row=self._failures)
            # What broke is in the log; internals are no caller's business.
            told = error
            if not isinstance(error, BatonError):
                told = BatonError("a step of the engine failed; the worker's log says why")
                told.__cause__ = error
            self._end(live if sequences else self._scheduler.request_ids(), told)
            return None

    def _end_all(self, error: Exception | None) -> None:
        """None: they are cancelled."""
        self._end(self._scheduler.request_ids(), error)
        self._tell(self._scheduler.take_outputs())

    def _end(self, request_ids: list[str], error: Exception | None) -> None:
        for request_id in request_ids:
            self._guard(lambda r=request_id: self._scheduler.abort(r, error))

    def _guard(self, call: Callable[[], Any]) -> Any:
        """Call what must not end the thread; None, logged and counted, when it raises."""
        try:
            return call()
        except Exception:
            self._scheduler.counters["callback_failures"] += 1
            log.exception("callback_failed")
            return None


def _load(config: EngineConfig) -> ModelRunner:
    """A runner that was loaded on a thread of its own. Each thread that computes has OpenMP helpers
    as long as it lives; while there are more of them than cores, all sleep between operations."""
    loaded: Future[ModelRunner] = Future()

    def load() -> None:
        try:
            loaded.set_result(ModelRunner(config))
        except BaseException as error:
            loaded.set_exception(error)

    # A daemon, so that a process can end while it loads.
    threading.Thread(target=load, name="baton-load", daemon=True).start()
    return loaded.result()


def scheduler_config(config: EngineConfig, runner: ModelRunner) -> SchedulerConfig:
    """The scheduler's settings: the engine's, and what the runner found."""
    return SchedulerConfig(
        block_size=config.block_size,
        max_model_len=runner.max_model_len,
        vocab_size=runner.model_config.vocab_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_waiting=config.max_waiting,
        eos_token_ids=runner.model_config.eos_token_ids,
        fingerprint=runner.fingerprint,
        prefix_caching=config.prefix_caching,
    )
