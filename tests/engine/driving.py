"""Runs a ModelRunner by hand: batches built here, from the Batch's definition alone."""

import random
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
import torch

from common.engine.batch import Batch, single_rows
from common.engine.config import EngineConfig
from common.engine.runner import ModelRunner


def make_runner(path, **settings) -> ModelRunner:
    """A runner whose cache is full of bytes that are NaN in every KV dtype."""
    defaults = {"num_blocks": 800, "max_model_len": 256, "threads": 1}
    runner = ModelRunner(EngineConfig(model=path, **{**defaults, **settings}))
    shape = runner.num_blocks, runner.layout.block_bytes
    if isinstance(runner.cache, torch.Tensor):
        runner.cache.fill_(0xFF)
    else:
        runner.cache.write(range(runner.num_blocks), np.full(shape, 0xFF, np.uint8))
    return runner


def shuffled_blocks(runner: ModelRunner, seed: int = 0) -> list[int]:
    blocks = list(range(1, runner.num_blocks))
    random.Random(seed).shuffle(blocks)
    return blocks


def make_batch(
    rows: Seq[tuple[list[int], int, list[int]]], size: int, all_rows: bool = False
) -> Batch:
    """One row per sequence: its tokens of this step, the position of the first, its block table.

    Logits of each sequence's last token, with which alone the last layer then attends, or of all.
    """
    tokens, positions, slots, starts, contexts, wanted = [], [], [], [0], [], []
    for ids, start, table in rows:
        for position, token in enumerate(ids, start):
            tokens.append(token)
            positions.append(position)
            slots.append(table[position // size] * size + position % size)
        starts.append(len(tokens))
        contexts.append(start + len(ids))
        wanted.append(len(tokens) - 1)
    width = max(len(table) for *_, table in rows)
    batch = Batch(
        token_ids=torch.tensor(tokens),
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        query_start=tuple(starts),
        context_len=tuple(contexts),
        block_table=torch.tensor(
            [table + [-1] * (width - len(table)) for *_, table in rows], dtype=torch.int32
        ),
        logit_rows=torch.arange(len(tokens)) if all_rows else torch.tensor(wanted),
    )
    return replace(batch, last=single_rows(batch))


def prompt_logits(
    runner: ModelRunner, prompt: list[int], table: list[int], chunks: Seq[int]
) -> torch.Tensor:
    """Logits [tokens, vocab] of a prompt computed in chunks of these sizes."""
    out, start = [], 0
    for count in chunks:
        row = (prompt[start : start + count], start, table)
        out.append(runner.forward(make_batch([row], runner.layout.block_size, all_rows=True)))
        start += count
    return torch.cat(out)
