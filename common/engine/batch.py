"""The tensors of one step, built once and then only read."""

from dataclasses import dataclass

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
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    query_start: tuple[int, ...]
    context_len: tuple[int, ...]
    block_table: torch.Tensor
    logit_rows: torch.Tensor
    device_context_len: torch.Tensor | None = None
