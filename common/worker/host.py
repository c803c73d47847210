"""An engine inside a service: loaded on a thread, fed from the event loop, drained at the end."""

import asyncio
import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import structlog

from baton.v1 import worker_pb2 as pb
from common.engine.engine import Engine
from common.engine.sequence import EngineRequest, RequestOutput
from common.engine.warm_up import warm_up_request
from common.errors import BatonError, Leaving, Unavailable
from common.faults import Faults
from common.kv.connector import KVConnector
from common.rpc.lifecycle import Lifecycle, end_now
from common.worker.settings import WorkerSettings

log = structlog.get_logger("worker")

# When the engine is lost the process ends within this, though the engine's thread may be where
# nothing ends it: on a GPU, in a driver that waits for a rank that is gone.
LOST_S = 4.0
# What aborted requests get to report back before the engine is stopped under them.
ABORT_S = 2.0
STOP_S = 5.0

Listener = Callable[[RequestOutput], None]


class EngineHost:
    """Owns the engine, and which listener each live request has. Used on the event loop, except
    for what is said to run on another thread.

    `step` counts the engine's steps that had output; all outputs of a step are delivered in one
    callback of the loop.
    """

    def __init__(self, settings: WorkerSettings, role: int, lifecycle: Lifecycle) -> None:
        self.settings = settings
        self.role = role
        self.worker_id = settings.worker_id or secrets.token_hex(4)
        self.incarnation = secrets.token_hex(8)
        self.status = pb.WORKER_STATUS_LOADING
        self.data_address = ""
        self.data_links: Callable[[], dict[str, str]] = dict
        self.describe_peers: Callable[[], list[pb.Peer]] = list
        self.step = 0
        self.faults = Faults(settings.faults)
        self._lifecycle = lifecycle
        self._loop = asyncio.get_running_loop()
        self._engine: Engine | None = None
        self._listeners: dict[str, Listener] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._loader: threading.Thread | None = None

    # Start ----------------------------------------------------------------------------------

    async def load(self, connector: KVConnector | None) -> None:
        """Load the model and run it once. Raises CheckpointError or ConfigError."""
        started = time.monotonic()
        config = self.settings.engine_config()
        self._engine = await self._on_thread(lambda: Engine(config, connector, self._on_step))
        self._engine.failure.add_done_callback(lambda f: self._post(self._give_up, f.result()))
        self._engine.start()
        await self._warm_up()
        log.info("loaded", model=str(config.model), seconds=round(time.monotonic() - started, 3))

    def serve(self) -> None:
        """Be Ready from now on, unless the worker is on its way out already."""
        if self.status == pb.WORKER_STATUS_LOADING:
            self.status = pb.WORKER_STATUS_READY

    async def _on_thread(self, load: Callable[[], Engine]) -> Engine:
        """A daemon thread of its own: a stop during the load does not wait for its end."""
        done: asyncio.Future[Engine] = self._loop.create_future()

        def run() -> None:
            try:
                engine = load()
            except BaseException as error:
                self._post(_reject, done, error)
            else:
                self._post(_resolve, done, engine)

        self._loader = threading.Thread(target=run, name="baton-load", daemon=True)
        self._loader.start()
        return await done

    async def _warm_up(self) -> None:
        """One small request through the whole engine: what is lazy or broken shows before Ready."""
        engine = self._need_engine()
        request = warm_up_request(
            engine.runner.max_model_len, prefill_only=self.role == pb.ROLE_PREFILL
        )
        done: asyncio.Future[RequestOutput] = self._loop.create_future()

        def listen(output: RequestOutput) -> None:
            if output.finish_reason is not None:
                _resolve(done, output)

        self._submit(request, listen)
        output = await done
        if output.error is not None:
            raise output.error

    # Requests -------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return self.status == pb.WORKER_STATUS_READY

    def require_ready(self) -> None:
        """Raises Leaving while loading or draining."""
        if not self.ready:
            state = pb.WorkerStatus.Name(self.status).removeprefix("WORKER_STATUS_").lower()
            raise Leaving(f"worker {self.worker_id} is {state}; ask another one")

    def submit(self, request: EngineRequest, listener: Listener) -> None:
        """Hand a request to the engine; `listener` gets its outputs on the loop, the last one with
        a finish_reason. Raises InvalidRequest, Overloaded or Unavailable, and then calls nothing.
        """
        self.require_ready()
        self._submit(request, listener)

    def _submit(self, request: EngineRequest, listener: Listener) -> None:
        engine = self._need_engine()
        # The listener stands before the engine may answer on its own thread.
        self._listeners[request.request_id] = listener
        self._idle.clear()
        try:
            engine.submit(request)
        except BaseException:
            self._forget(request.request_id)
            raise

    def abort(self, request_id: str, error: BatonError | None = None) -> None:
        """End a request, cancelled or with this error; its listener hears of it. Unknown ids are
        ignored."""
        if self._engine is not None and request_id in self._listeners:
            self._engine.abort(request_id, error)

    def abort_soon(self, request_id: str, error: Exception) -> None:
        """For connectors, from any thread: a request whose transfer broke need not go on."""
        if self._engine is not None:
            self._engine.abort(request_id)

    def _on_step(self, outputs: list[RequestOutput]) -> None:
        """On the engine's thread, once a step: one hop to the loop for all requests."""
        if self.faults.at("engine.step"):
            self.faults.strike("engine.step")
        self._post(self._deliver, outputs)

    def _post(self, function: Callable[..., object], *args: object) -> None:
        # The loop may be closed already when the process is on its way out.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        self.step += 1
        for output in outputs:
            listener = self._listeners.get(output.request_id)
            if output.finish_reason is not None:
                self._forget(output.request_id)
            if listener is not None:
                listener(output)
        if any(output.error is not None for output in outputs) and not self._healthy():
            # Steps fail again and again, whoever asks: a new process may do better.
            self._lifecycle.fail(
                BatonError("the engine's steps fail in a row; see step_failed in the log")
            )

    def _give_up(self, error: BatonError) -> None:
        self.status = pb.WORKER_STATUS_DRAINING
        log.error("engine_lost", reason=str(error))
        self._lifecycle.fail(error)
        end = threading.Timer(LOST_S, end_now, (error,))
        end.daemon = True
        end.start()

    def _healthy(self) -> bool:
        return self._engine is None or self._engine.state().healthy

    def _forget(self, request_id: str) -> None:
        self._listeners.pop(request_id, None)
        if not self._listeners:
            self._idle.set()

    # State ----------------------------------------------------------------------------------

    def model_card(self) -> pb.ModelCard:
        """What is served; only a name while loading. Also called from the engine's thread."""
        name = self.settings.model.resolve().name
        if self._engine is None:
            return pb.ModelCard(name=name)
        runner = self._engine.runner
        return pb.ModelCard(
            name=name,
            max_model_len=runner.max_model_len,
            block_size=runner.layout.block_size,
            block_bytes=runner.layout.block_bytes,
            kv_dtype=runner.layout.kv_dtype,
            fingerprint=runner.fingerprint,
            vocab_size=runner.model_config.vocab_size,
        )

    def describe(self) -> pb.GetStateResponse:
        return pb.GetStateResponse(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            role=self.role,
            status=self.status,
            model=self.model_card(),
            load=self._load(),
            data_address=self.data_address,
            version=own_version(),
            data_links=self.data_links(),
            peers=self.describe_peers(),
        )

    def _load(self) -> pb.Load:
        if self._engine is None:
            return pb.Load(max_waiting_requests=self.settings.max_waiting)
        state = self._engine.state()
        return pb.Load(
            running_requests=state.running,
            waiting_requests=state.waiting + state.loading,
            max_waiting_requests=self.settings.max_waiting,
            blocks_total=state.blocks_total,
            blocks_used=state.blocks_used,
            blocks_cached=state.blocks_cached,
            open_handoffs=state.open_handoffs,
            # Each open handoff of a decode worker is one lease on its pages.
            open_leases=state.open_handoffs if self.role == pb.ROLE_DECODE else 0,
            tokens_waiting=state.tokens_waiting,
            counters=state.counters,
        )

    def _need_engine(self) -> Engine:
        if self._engine is None:
            raise Unavailable(f"worker {self.worker_id} is loading its model; ask another one")
        return self._engine

    # End ------------------------------------------------------------------------------------

    async def drain(self, deadline_s: float) -> None:
        """Take nothing new; what runs gets `deadline_s` seconds, then its caller is told to go on
        with another worker."""
        self.status = pb.WORKER_STATUS_DRAINING
        try:
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("drain_timed_out", handed_over=len(self._listeners), seconds=deadline_s)
            leaving = Leaving(f"worker {self.worker_id} is leaving; ask another one")
            for request_id in list(self._listeners):
                self.abort(request_id, leaving)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ABORT_S):
                    await self._idle.wait()

    async def stop(self) -> None:
        """Stop the engine (and with it the connectors)."""
        self.status = pb.WORKER_STATUS_DRAINING
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop, STOP_S)
        elif self._loader is not None:
            # Ending the interpreter under a thread inside torch can abort the process.
            await asyncio.to_thread(self._loader.join, STOP_S)


def _resolve(future: "asyncio.Future", value: object) -> None:
    if not future.done():
        future.set_result(value)


def _reject(future: "asyncio.Future", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def own_version() -> str:
    """Of the installed package."""
    try:
        return version("baton")
    except PackageNotFoundError:
        return "0"
