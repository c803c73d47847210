"""The tensors of one step, built once and then only read."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens of all sequences of a step, laid end to end.

    token_ids     [num_tokens]                int64
    positions     [num_tokens]                int64, index of the token in its sequence
    slot_mapping  [num_tokens]                int64, block_id * block_size + offset: where KV goes
    query_start   num_sequences + 1 ints      sequence i's tokens: query_start[i] to [i + 1]
    context_len   num_sequences ints          tokens to attend to, those of this step included
    block_table   [num_sequences, max_blocks] int32, -1 past the sequence's blocks; its rows may lie
                  further apart than they are long
    logit_rows    [num_logits]                int64, rows of token_ids whose logits are wanted
    device_context_len  context_len as [num_sequences] int32 on the device, where it stays put from
                        step to step (a CUDA graph's): context_len then are upper bounds
    last          the logit rows by themselves, with which alone the last layer attends; None: it
                  attends with all rows
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    query_start: tuple[int, ...]
    context_len: tuple[int, ...]
    block_table: torch.Tensor
    logit_rows: torch.Tensor
    device_context_len: torch.Tensor | None = None
    last: "Batch | None" = None


def single_rows(batch: Batch) -> Batch | None:
    """The logit rows of a batch in the machine's memory, each as a sequence of one token that
    attends to what its own had before it. None where they are all rows or there are none."""
    rows = batch.logit_rows
    if len(rows) in (0, len(batch.token_ids)):
        return None
    positions = batch.positions[rows]
    owner = np.searchsorted(batch.query_start, rows.numpy(), side="right") - 1
    return Batch(
        token_ids=batch.token_ids[rows],
        positions=positions,
        slot_mapping=batch.slot_mapping[rows],
        query_start=tuple(range(len(rows) + 1)),
        context_len=tuple((positions + 1).tolist()),
        block_table=batch.block_table[torch.from_numpy(owner)],
        logit_rows=torch.arange(len(rows)),
    )
