"""The process of a rank other than 0: loads its part of the model, then runs what it is sent.

    python -m common.engine.parallel.rank RANK SOCKET_FD SHARED_FD MEETING_FD

It ends when rank 0 closes the socket or dies, whatever it is doing then.
"""

import os
import select
import signal
import socket
import sys
import threading
from pathlib import Path

from common.engine.batch import Batch
from common.engine.config import EngineConfig
from common.engine.parallel.wire import receive_json, receive_order, send_json
from common.engine.runner import ModelRunner, Place
from common.errors import BatonError


def main(argv: list[str]) -> int:
    rank, socket_fd, shared_fd, meeting_fd = map(int, argv)
    # What stops the worker is for rank 0, which finishes what runs before it lets go of the ranks.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=socket_fd) as rank_0:
        watch = threading.Thread(target=_end_with, args=(rank_0,), name="baton-rank-0", daemon=True)
        watch.start()
        settings = receive_json(rank_0)
        if settings is None:
            return 0
        config = EngineConfig(**{**settings, "model": Path(settings["model"])})
        try:
            runner = ModelRunner(config, Place(rank, shared_fd, meeting_fd))
        except BatonError as error:
            send_json(rank_0, {"error": str(error), "kind": type(error).__name__})
            return 1
        send_json(rank_0, {})
        runner.connect()
        while (order := receive_order(rank_0)) is not None:
            if isinstance(order, Batch):
                runner.forward(order)
            else:
                runner.move(order)
                send_json(rank_0, {})
    return 0


def _end_with(rank_0: socket.socket) -> None:
    """Rank 0's end may come while this process loads, or waits for it in the middle of a step."""
    poll = select.poll()
    poll.register(rank_0, select.POLLRDHUP)
    poll.poll()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
