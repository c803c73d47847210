"""The ranks of a worker as the model sees them: sums and gathers over all of them."""

from datetime import timedelta

import torch
import torch.distributed as dist

# A rank that is this late is stuck: one that died is noticed at once, by its closed connections.
TIMEOUT = timedelta(seconds=120)


class Group:
    """Collectives over the ranks, each called by all of them in the same order. In a group of one
    they do nothing.

    After `connect` these raise RuntimeError when another rank is gone; the group is of no use then.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._ranks: dist.ProcessGroupGloo | None = None

    def connect(self, meeting_fd: int) -> None:
        """Meet the other ranks; returns when all are there.

        meeting_fd  an empty file of memory that all ranks have open: addresses go through it, not
                    through a port that others could reach
        """
        store = dist.FileStore(f"/proc/self/fd/{meeting_fd}", self.size)
        options = dist.ProcessGroupGloo._Options()
        # Named, because the default is the machine's host name, which may resolve to nothing.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = TIMEOUT
        self._ranks = dist.ProcessGroupGloo(store, self.rank, self.size, options)
        self.barrier()

    def close(self) -> None:
        self._ranks = None

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """x, overwritten with the sum over all ranks, with the same bits on each. Returns when
        every rank has called it, whatever x's size."""
        if self._ranks is None:
            return x
        if x.numel() == 0:
            self.barrier()
            return x
        self._ranks.allreduce([x]).wait()
        return x

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
        """Returns when every rank has called it."""
        if self._ranks is not None:
            self._ranks.allreduce([torch.zeros(1)]).wait()
