"""The ranks of a worker as the model sees them: sums and gathers over all of them."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.errors import BatonError, ConfigError

# A rank that is this late is stuck: one that died is noticed at once, by its closed connections
# or by the end of its process.
TIMEOUT = timedelta(seconds=120)
# How often the end of a GPU's step is looked for: little beside the milliseconds of a step.
POLL_S = 5e-5
# What NCCL gets to let go of its connections.
CLOSE_S = 1.0


class Group:
    """Collectives over the ranks, each called by all of them in the same order: NCCL's where the
    ranks are on GPUs, else gloo's. In a group of one they do nothing.

    After `connect` gloo's raise RuntimeError when another rank is gone; the group is of no use
    then. NCCL's are only put into the device's queue, and there wait for such a rank for ever:
    `finish` does not, and `abort` makes them end.

    in_order  sum each number in the order of the ranks. A library cuts what it sums into parts and
              begins each at another rank: a number's bits depend on how many there are. Slower
    """

    def __init__(
        self, rank: int, size: int, device: torch.device, *, in_order: bool = False
    ) -> None:
        self.rank = rank
        self.size = size
        self._device = device
        self._in_order = in_order
        # gloo's or NCCL's process group; a build of torch may have but one of the two classes.
        self._ranks: Any = None

    def connect(self, meeting_fd: int) -> None:
        """Meet the other ranks; returns when all are there.

        meeting_fd  an empty file of memory that all ranks have open: addresses go through it, not
                    through a port that others could reach
        """
        store = dist.FileStore(f"/proc/self/fd/{meeting_fd}", self.size)
        connect = _gloo if self._device.type == "cpu" else _nccl
        self._ranks = connect(store, self.rank, self.size)
        self.barrier()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        aborting = self.abort()
        if aborting is not None:
            aborting.join(CLOSE_S)
        self._ranks = None

    def abort(self) -> threading.Thread | None:
        """From any thread: end the collectives under way, where these do not end by themselves
        when a rank is gone. What they give is of no meaning. Gives the thread that does it: NCCL
        has been seen to hang in this too."""
        ranks = self._ranks
        if ranks is None or self._device.type != "cuda":
            return None
        aborting = threading.Thread(target=ranks.abort, name="baton-abort", daemon=True)
        aborting.start()
        return aborting

    def finish(self, failure: "Future[BatonError]") -> None:
        """Returns when what was put into the device's queue is done; on a CPU it is. Raises
        `failure` when it comes first, and TimeoutError when a rank is stuck."""
        if self._device.type == "cuda":
            end = torch.cuda.Event()
            end.record()
            poll(end.query, failure)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """x, overwritten with the sum over all ranks, with the same bits on each. Returns when
        every rank has called it, whatever x's size; on a GPU, what is queued after it starts
        then."""
        if self._ranks is None:
            return x
        if x.numel() == 0:
            self.barrier()
            return x
        if not self._in_order:
            self._ranks.allreduce([x]).wait()
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._ranks.allgather([parts], [x]).wait()
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return x.copy_(total)

    def gather(self, part: torch.Tensor, columns: int) -> torch.Tensor:
        """part [n, share of the columns], equal shares in the order of the ranks but for the last
        ones -> [n, columns] on rank 0, of no meaning on the others."""
        if self._ranks is None:
            return part
        share = -(-columns // self.size)
        padded = torch.nn.functional.pad(part, (0, share - part.shape[1])).contiguous()
        options = dist.GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else []
        self._ranks.gather([parts] if parts else [], [padded], options).wait()
        return torch.cat(parts, 1)[:, :columns] if parts else padded

    def barrier(self) -> None:
        """Returns when every rank has called it; on a GPU as `sum` does."""
        if self._ranks is not None:
            self._ranks.allreduce([torch.zeros(1, device=self._device)]).wait()


def poll(done: Callable[[], bool], failure: "Future[BatonError]") -> None:
    """Returns when `done` says True and no rank has failed; raises as `Group.finish` does."""
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while not done() and not failure.done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no end of the step in {TIMEOUT.total_seconds():.0f} s")
        time.sleep(POLL_S)
    if failure.done():  # the end may have come of an abort: there is nothing in the results
        raise failure.result()


def check_devices(size: int, device: torch.device, gpus: int, nccl: bool) -> None:
    """Raises ConfigError, with the remedy, for devices that several ranks cannot be on.

    device  as configured
    gpus    that torch sees
    nccl    whether torch has it
    """
    asked = f"tensor_parallel is {size} with device {str(device)!r}"
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{asked}; ranks run on cpu or cuda: set device to one of them")
    if device.type == "cpu":
        return
    if device.index is not None:
        raise ConfigError(
            f"{asked}; the ranks take cuda:0 to cuda:{size - 1}, one each: set device to cuda, and "
            "CUDA_VISIBLE_DEVICES to the GPUs that are meant"
        )
    if gpus < size:
        raise ConfigError(
            f"{asked}, but torch sees {gpus} GPU{'' if gpus == 1 else 's'}; each rank needs one of "
            f"its own: set tensor_parallel to {max(gpus, 1)} or less, or let the worker see "
            f"{size} (CUDA_VISIBLE_DEVICES, docker's --gpus)"
        )
    if not nccl:
        raise ConfigError(
            f"{asked}, but this torch ({torch.__version__}) was built without NCCL, by which ranks "
            "on GPUs sum; install a build for CUDA on Linux, or set tensor_parallel to 1"
        )


def _gloo(store: dist.Store, rank: int, size: int) -> Any:
    options = dist.ProcessGroupGloo._Options()
    # Named, because the default is the machine's host name, which may resolve to nothing.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = TIMEOUT
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: dist.Store, rank: int, size: int) -> Any:
    # NCCL meets over sockets before it uses the GPUs' links: all ranks are on this machine.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    options = dist.ProcessGroupNCCL.Options()
    # Its watchdog ends the process without a word; `finish` is to say what happened before that.
    options._timeout = 2 * TIMEOUT
    return dist.ProcessGroupNCCL(store, rank, size, options)
