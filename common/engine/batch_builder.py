"""From the plan of a step to its tensors.

Between two steps of a model everything that Python touches has left the caches, and most of all the
code of libraries. So what a step of single tokens needs is written by little of that, into memory
that stays.
"""

import itertools
import struct
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
import torch

from common.engine.batch import Batch, single_rows
from common.engine.device import move
from common.engine.sequence import StepPlan


class BatchBuilder:
    """Builds the batches of one worker. A batch holds until the next one is built: that has the
    same tensors, with other numbers, where it has as many tokens, sequences and logits.

    block_size  tokens in a block
    device      where batches go; nobody waits for what is copied there
    """

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._stays_here = device.type == "cpu"
        self._integers = np.empty((4, 0), np.int64)
        self._rows: list[np.ndarray] = []
        self._tables = np.empty((0, 0), np.int32)
        # Of each row of _tables: whose blocks it has, and how many. A sequence's table only grows,
        # or is another list.
        self._written: list[tuple[list[int], int]] = []
        self._sizes: tuple[int, ...] = ()
        self._tensors: tuple[torch.Tensor, ...] = ()

    def build(self, plan: StepPlan) -> Batch:
        """The tensors of a plan whose sequences' block tables cover every scheduled token; logit
        rows in the order of its sampled sequences, then those of its `prompt_rows`."""
        size = self._block_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        ends = tuple(start + n for start, n in zip(plan.start, plan.scheduled, strict=True))
        for sequence, start, end in zip(plan.sequences, plan.start, ends, strict=True):
            table = sequence.block_table
            tokens += sequence.token_ids[start:end]
            positions += range(start, end)
            slots += [table[p // size] * size + p % size for p in range(start, end)]
        query_start = (0, *itertools.accumulate(plan.scheduled))
        rows = _logit_rows(plan, query_start)
        self._write_tables([sequence.block_table for sequence in plan.sequences])
        self._write_integers(tokens, positions, slots, rows)
        width = -(-max(ends) // size)
        ids, places, slot_mapping, table, logit_rows = self._views(
            len(tokens), len(rows), len(ends), width
        )
        batch = Batch(ids, places, slot_mapping, query_start, ends, table, logit_rows)
        last = single_rows(batch)
        if last is not None:
            batch = replace(batch, last=last)
        return batch if self._stays_here else on_device(batch, self._device)

    def _write_integers(self, *parts: list[int]) -> None:
        most = max(map(len, parts))
        if self._integers.shape[1] < most:
            self._integers = np.empty((len(parts), 2 * most), np.int64)
            self._rows = list(self._integers)
            self._sizes = ()
        for row, part in zip(self._rows, parts, strict=True):
            struct.pack_into(f"{len(part)}q", row, 0, *part)

    def _write_tables(self, tables: Seq[list[int]]) -> None:
        most = max(map(len, tables))
        if len(self._tables) < len(tables) or self._tables.shape[1] < most:
            self._tables = np.full((2 * len(tables), 2 * most), -1, np.int32)
            self._written = [([], 0)] * len(self._tables)
            self._sizes = ()
        for row, table in enumerate(tables):
            known, count = self._written[row]
            if known is table and count == len(table):
                continue
            if known is not table:
                self._tables[row] = -1
                count = 0
            self._tables[row, count : len(table)] = table[count:]
            self._written[row] = table, len(table)

    def _views(self, *sizes: int) -> tuple[torch.Tensor, ...]:
        """token_ids, positions, slot_mapping, block_table and logit_rows of what was written."""
        if sizes != self._sizes:
            tokens, rows, sequences, width = sizes
            whole, tables = torch.from_numpy(self._integers), torch.from_numpy(self._tables)
            *three, logit_rows = whole.unbind()
            ids, positions, slots = (row[:tokens] for row in three)
            table = tables[:sequences, :width]
            self._tensors = ids, positions, slots, table, logit_rows[:rows]
            self._sizes = sizes
        return self._tensors


def _logit_rows(plan: StepPlan, query_start: Seq[int]) -> list[int]:
    ends = zip(query_start[1:], plan.sampled, strict=True)
    rows = [end - 1 for end, sampled in ends if sampled]
    for first, start, positions in zip(query_start, plan.start, plan.prompt_rows, strict=False):
        rows += [first + position - start for position in positions]
    return rows


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device; does not wait for those that come there."""
    if batch.token_ids.device.type == device.type:
        return batch
    integers = (batch.token_ids, batch.positions, batch.slot_mapping)
    ids, positions, slots = move(torch.stack(integers), device)
    return replace(
        batch,
        token_ids=ids,
        positions=positions,
        slot_mapping=slots,
        block_table=move(batch.block_table.contiguous(), device),
        logit_rows=move(batch.logit_rows, device),
        last=None if batch.last is None else on_device(batch.last, device),
    )
