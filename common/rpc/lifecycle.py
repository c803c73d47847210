"""The life of a service process: start, serve until told to stop, drain, end with an exit code."""

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, Protocol

import structlog
import uvloop

from common.errors import BatonError, CheckpointError, ConfigError

log = structlog.get_logger("lifecycle")

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
# After drain() had its time, shutdown() has this much before the process ends anyway.
SHUTDOWN_S = 10.0
# One stop often arrives as several signals: Ctrl-C reaches the whole process group, and the parent
# passes it on too. Only a signal later than this is a person's second one.
SAME_STOP_S = 1.0
_PR_SET_PDEATHSIG = 1


class App(Protocol):
    """What a service main wires up."""

    async def startup(self) -> None:
        """Returns when the service is Ready. Raises BatonError when it never will be."""

    async def drain(self, deadline_s: float) -> None:
        """Refuse new work, finish what runs, or give up after `deadline_s` seconds."""

    async def shutdown(self) -> None:
        """Release everything. Also called when startup failed half way."""


class Lifecycle:
    """How the parts of a service ask for its end. Methods are safe from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._stop = asyncio.Event()
        self.error: BaseException | None = None

    def request_stop(self) -> None:
        """End as SIGTERM does: drain, then exit code 0."""
        self._loop.call_soon_threadsafe(self._stop.set)

    def fail(self, error: BaseException) -> None:
        """End because of an error that the service cannot outlive."""
        if self.error is None:
            self.error = error
        self._loop.call_soon_threadsafe(self._stop.set)

    async def wait(self) -> None:
        await self._stop.wait()


def run_service(
    make_app: Callable[[Lifecycle], App], *, drain_s: float = 30.0, exit_with_parent: bool = False
) -> int:
    """Run a service until a signal or an error ends it; returns the process's exit code.

    make_app          called on the running loop (uvloop)
    drain_s           seconds that requests under way get after SIGTERM or SIGINT; a second signal
                      some time later ends the process at once
    exit_with_parent  SIGTERM is delivered to this process when its parent dies (Linux)

    0 after a stop that was asked for, 2 for a CheckpointError or a ConfigError, 1 for the rest.
    """
    if exit_with_parent:
        _signal_on_parent_death()
    return uvloop.run(_live(make_app, drain_s))


async def _live(make_app: Callable[[Lifecycle], App], drain_s: float) -> int:
    lifecycle = Lifecycle(asyncio.get_running_loop())
    _install_signals(lifecycle)
    app: App | None = None
    try:
        app = make_app(lifecycle)
        await _until_stopped(app, lifecycle)
        if lifecycle.error is None:
            log.info("draining", deadline_s=drain_s)
            await app.drain(drain_s)
    except (BatonError, OSError) as error:
        lifecycle.error = error
    except Exception as error:
        log.exception("crashed")
        lifecycle.error = error
    if app is not None:
        await _shut_down(app)
    return _report(lifecycle.error)


async def _until_stopped(app: App, lifecycle: Lifecycle) -> None:
    """Start the app, then wait for the end; a stop during the start interrupts it."""
    starting = asyncio.create_task(app.startup())
    stopping = asyncio.create_task(lifecycle.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        await starting
        await stopping
        return
    starting.cancel()
    await asyncio.wait({starting}, timeout=SHUTDOWN_S)


async def _shut_down(app: App) -> None:
    try:
        async with asyncio.timeout(SHUTDOWN_S):
            await app.shutdown()
    except TimeoutError:
        log.warning("shutdown_timed_out", seconds=SHUTDOWN_S)
    except Exception:
        log.exception("shutdown_failed")


def end_now(error: BaseException) -> NoReturn:
    """End the process as this error does, without waiting for anything. From any thread."""
    code = _report(error)
    os._exit(code)


def _report(error: BaseException | None) -> int:
    if error is None:
        log.info("stopped")
        return EXIT_OK
    print(f"error: {str(error) or type(error).__name__}", file=sys.stderr, flush=True)
    return EXIT_CONFIG if isinstance(error, (CheckpointError, ConfigError)) else EXIT_FAILED


def _install_signals(lifecycle: Lifecycle) -> None:
    loop = asyncio.get_running_loop()
    first_s: float | None = None

    def on_signal(number: signal.Signals) -> None:
        nonlocal first_s
        if first_s is None:
            first_s = loop.time()
            lifecycle.request_stop()
        elif loop.time() - first_s > SAME_STOP_S:
            # Whoever asks twice does not want to wait for the drain.
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)


def _signal_on_parent_death() -> None:
    if not sys.platform.startswith("linux"):
        raise ConfigError("exit_with_parent needs Linux; leave the flag out")
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        # The parent died before the request was in place: no signal would ever come.
        os.kill(os.getpid(), signal.SIGTERM)
