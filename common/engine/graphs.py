"""CUDA graphs of decode steps: the kernels of a whole step start with one call.

A graph repeats what was captured, addresses included. So there is one for each of a few batch
sizes, all reading one set of tensors that stay put; a step fills them and repeats the smallest
graph that has room.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch

from common.engine.batch import Batch
from common.engine.cache import NULL_BLOCK

Forward = Callable[[Batch], torch.Tensor]


def bucket_sizes(most: int) -> list[int]:
    """Batch sizes that graphs are captured for: powers of two, then every 32, and the most."""
    sizes = [size for size in (1, 2, 4, 8, 16) if size < most]
    return [*sizes, *range(32, most, 32), most]


def only_decodes(batch: Batch) -> bool:
    """One token of each sequence, each of which is sampled: the steps that graphs are for."""
    count = len(batch.context_len)
    return len(batch.token_ids) == count == len(batch.logit_rows) > 0


class StaticBatch:
    """The tensors of decode steps of up to `most` sequences, at addresses that stay.

    width    entries of a block table
    context  tokens that a sequence has at most
    """

    def __init__(self, most: int, width: int, context: int, device: torch.device) -> None:
        self._context = context
        self._integers = torch.zeros(3, most, dtype=torch.int64, device=device)
        self._rows = torch.arange(most, device=device)
        self._context_len = torch.zeros(most, dtype=torch.int32, device=device)
        self._table = torch.full((most, width), NULL_BLOCK, dtype=torch.int32, device=device)

    def of_size(self, size: int) -> Batch:
        """The first `size` rows. What they say is filled in later."""
        return Batch(
            token_ids=self._integers[0, :size],
            positions=self._integers[1, :size],
            slot_mapping=self._integers[2, :size],
            query_start=tuple(range(size + 1)),
            context_len=(self._context,) * size,
            block_table=self._table[:size],
            logit_rows=self._rows[:size],
            device_context_len=self._context_len[:size],
        )

    def fill(self, batch: Batch, size: int) -> None:
        """Put a step of at most `size` sequences here. The rows beyond are no sequence's: they
        attend to nothing, and their KV goes to the null block."""
        count = len(batch.context_len)
        self._integers[:, count:size] = NULL_BLOCK
        self._context_len[count:size] = 0
        for row, tensor in enumerate((batch.token_ids, batch.positions, batch.slot_mapping)):
            self._integers[row, :count] = tensor
        # From pinned memory, so that nobody waits for the copy.
        lengths = torch.tensor(batch.context_len, dtype=torch.int32)
        if self._context_len.is_cuda:
            lengths = lengths.pin_memory()
        self._context_len[:count].copy_(lengths, non_blocking=True)
        self._table[:count, : batch.block_table.shape[1]] = batch.block_table


class DecodeGraphs:
    """Captures in the constructor, largest first: the smaller ones then use its memory again. All
    leave their logits in one tensor, float32 [largest size, vocab]: what a graph returns it keeps,
    and twenty graphs of a large vocabulary would keep gigabytes."""

    def __init__(
        self, forward: Forward, static: StaticBatch, sizes: list[int], logits: torch.Tensor
    ) -> None:
        self._static = static
        self._logits = logits
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            batch = static.of_size(size)
            forward(batch)  # compiles what is not compiled yet, which no capture may
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # What other threads ask of the device meanwhile is no business of the capture's.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits[:size].copy_(forward(batch))
            self._graphs[size] = graph

    def room_for(self, batch: Batch) -> bool:
        return only_decodes(batch) and len(batch.context_len) <= max(self._graphs)

    def run(self, batch: Batch) -> torch.Tensor:
        """Logits [num_logits, vocab] float32 of a batch with room, valid until the next run."""
        count = len(batch.context_len)
        size = min(size for size in self._graphs if size >= count)
        self._static.fill(batch, size)
        self._graphs[size].replay()
        return self._logits[:count]


def warm_up(
    forward: Forward, lengths: Iterable[int], context: int, block_size: int, device: torch.device
) -> None:
    """Runs steps of so many tokens, which between them use every kernel, so that none is compiled
    while somebody waits: prompts of up to `context` tokens, whose KV goes to the null block."""
    for length in lengths:
        starts = (*range(0, length, context), length)
        contexts = tuple(end - start for start, end in pairwise(starts))
        zeros = torch.zeros(length, dtype=torch.int64, device=device)
        width = -(-max(contexts) // block_size)
        table = torch.full((len(contexts), width), NULL_BLOCK, dtype=torch.int32)
        forward(
            Batch(
                token_ids=zeros,
                positions=torch.arange(length, device=device) % context,
                slot_mapping=zeros,
                query_start=starts,
                context_len=contexts,
                block_table=table.to(device),
                logit_rows=zeros[:1],
            )
        )
