"""Rank 0's side: starts the processes of the other ranks, sends them steps, notices their end."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from dataclasses import asdict
from pathlib import Path

import structlog

from common.engine.batch import Batch
from common.engine.config import EngineConfig
from common.engine.parallel.wire import Move, encode_order, receive_json, send_json
from common.errors import BatonError, CheckpointError, ConfigError, Unavailable

log = structlog.get_logger("ranks")

# What a rank gets to end by itself once its socket is closed: it needs next to nothing.
END_S = 1.0
# A rank's death breaks rank 0's step at once; how it died is known a moment later.
EXPLAIN_S = 1.0
# A rank that does not take an order, or answer one, for so long is stuck.
SEND_S = 120.0
# Where `common` is: the ranks import the same code, wherever they are started.
ROOT = Path(__file__).resolve().parents[3]
ERRORS: dict[str, type[BatonError]] = {
    kind.__name__: kind for kind in (CheckpointError, ConfigError)
}


class Ranks:
    """The processes of ranks 1 to N-1, as long as they all live: when one ends, the others are
    killed, and `failure` holds the reason.

    config      what the ranks run, every limit resolved
    shared_fd   file of memory that all ranks map: see Place
    meeting_fd  as in Group.connect

    Used on one thread; `failure` may be watched from any.
    """

    def __init__(self, config: EngineConfig, shared_fd: int, meeting_fd: int) -> None:
        self.failure: Future[BatonError] = Future()
        self._sockets: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ending = threading.Event()
        try:
            for rank in range(1, config.tensor_parallel):
                self._start(rank, config, shared_fd, meeting_fd)
        except BaseException:
            self.close()
            raise
        for rank, process in enumerate(self._processes, 1):
            watch = (rank, process, self._processes, self.failure, self._ending)
            threading.Thread(target=_watch, args=watch, name="baton-rank", daemon=True).start()

    def _start(self, rank: int, config: EngineConfig, shared_fd: int, meeting_fd: int) -> None:
        ours, theirs = socket.socketpair()
        self._sockets.append(ours)
        fds = (theirs.fileno(), shared_fd, meeting_fd)
        # -P: a folder named `common` where the user stands is not ours.
        command = [sys.executable, "-P", "-m", "common.engine.parallel.rank", str(rank)]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with theirs:
            process = subprocess.Popen(
                [*command, *map(str, fds)],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                # Ctrl-C on a terminal is for rank 0, which ends the others in its own time.
                start_new_session=True,
            )
        self._processes.append(process)
        send_json(ours, {**asdict(config), "model": str(config.model)})

    def wait_loaded(self) -> None:
        """Returns when every rank has loaded its part. Raises what kept one from it."""
        for rank, peer in enumerate(self._sockets, 1):
            answer = receive_json(peer)
            if answer is None:
                raise self._explain(f"rank {rank} ended while it loaded")
            if "error" in answer:
                raise ERRORS.get(answer["kind"], BatonError)(f"rank {rank}: {answer['error']}")
            peer.settimeout(SEND_S)

    def send(self, order: Batch | Move) -> None:
        """Have every rank run this step, or move these blocks. Raises Unavailable when one is
        gone."""
        if self.failure.done():
            raise self.failure.result()
        message = encode_order(order)
        with self.explained("an order could not be sent to a rank"):
            for peer in self._sockets:
                peer.sendall(message)

    def wait_moved(self) -> None:
        """Returns when every rank has done the move that it was sent last. Raises
        ConnectionError when one is gone."""
        for rank, peer in enumerate(self._sockets, 1):
            if receive_json(peer) is None:
                raise ConnectionError(f"rank {rank} ended while it moved blocks")

    def wait_for(self, call: Callable[[], None]) -> None:
        """Run what all ranks take part in and what may never return when one of them is gone.
        Raises what it raises, or `failure` where that comes first."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                done.set_result(call())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, name="baton-ranks", daemon=True).start()
        wait((done, self.failure), return_when=FIRST_COMPLETED)
        if not done.done():
            raise self.failure.result()
        done.result()

    @contextlib.contextmanager
    def explained(self, symptom: str) -> Iterator[None]:
        """What breaks in here ends the ranks: no later step would find them all at one place.
        Raises how one of them died, or else the symptom."""
        try:
            yield
        except Exception as error:
            # For the log alone: what broke inside is no caller's business.
            log.error("ranks_broke", symptom=symptom, error=str(error))
            raise self._explain(symptom) from error

    def _explain(self, symptom: str) -> BatonError:
        with contextlib.suppress(TimeoutError):
            return self.failure.result(EXPLAIN_S)
        _fail(self.failure, self._processes, symptom)
        return self.failure.result()

    def close(self) -> None:
        """End the ranks: they leave when their socket is closed, or are killed."""
        self._ending.set()
        for peer in self._sockets:
            peer.close()
        deadline = time.monotonic() + END_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


# No method: a thread that held the Ranks would keep their sockets open for ever.
def _watch(
    rank: int,
    process: subprocess.Popen[bytes],
    processes: Sequence[subprocess.Popen[bytes]],
    failure: "Future[BatonError]",
    ending: threading.Event,
) -> None:
    code = process.wait()
    if ending.is_set():
        return
    how = (
        f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
    )
    _fail(failure, processes, f"rank {rank} (pid {process.pid}) {how}")


def _fail(
    failure: "Future[BatonError]", processes: Sequence[subprocess.Popen[bytes]], reason: str
) -> None:
    error = Unavailable(
        f"{reason}; the {len(processes) + 1} tensor-parallel ranks of a worker end together: start "
        "it again, and look into its log and the system's for the cause (memory, most often)"
    )
    # The first to say why is right: the others die of it.
    with contextlib.suppress(InvalidStateError):
        failure.set_result(error)
    for process in processes:
        process.kill()
