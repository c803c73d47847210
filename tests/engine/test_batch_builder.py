"""The tensors of a step are those of its plan, whatever the steps before it were."""

import random

import pytest
import torch

from common.engine.batch import single_rows
from common.engine.batch_builder import BatchBuilder
from common.engine.sampling_params import SamplingParams
from common.engine.sequence import EngineRequest, Sequence, StepPlan
from tests.engine.driving import make_batch

CPU = torch.device("cpu")


def sequence(tokens, table):
    return Sequence(EngineRequest("r", tokens, SamplingParams()), tokens, 0, block_table=table)


def test_a_batch_is_built_from_the_plan_and_the_sequences_block_tables():
    a = sequence([10, 11, 12, 13, 14, 15], [5, 2, 9])
    b = sequence([20, 21, 22], [7, 6])
    c = sequence([30, 31, 32, 33], [1, 3, 4])
    plan = StepPlan(0, (a, b, c), start=(3, 2, 0), scheduled=(2, 1, 3), sampled=(False, True, True))
    batch = BatchBuilder(2, CPU).build(plan)
    assert batch.token_ids.tolist() == [13, 14, 22, 30, 31, 32]
    assert batch.positions.tolist() == [3, 4, 2, 0, 1, 2]
    assert batch.slot_mapping.tolist() == [5, 18, 12, 2, 3, 6]
    assert batch.block_table.tolist() == [[5, 2, 9], [7, 6, -1], [1, 3, 4]]
    assert batch.query_start == (0, 2, 3, 6)
    assert batch.context_len == (5, 3, 3)
    assert batch.logit_rows.tolist() == [2, 5]


def test_the_rows_with_logits_are_sequences_of_one_token_for_the_last_layer():
    a = sequence([10, 11, 12, 13, 14, 15], [5, 2, 9])
    b = sequence([20, 21, 22], [7, 6])
    rows = (range(2, 5), range(0))
    plan = StepPlan(0, (a, b), (1, 0), (5, 3), sampled=(True, False), prompt_rows=rows)
    last = BatchBuilder(2, CPU).build(plan).last
    assert last.token_ids.tolist() == [15, 12, 13, 14]
    assert last.positions.tolist() == [5, 2, 3, 4]
    assert (last.context_len, last.query_start) == ((6, 3, 4, 5), (0, 1, 2, 3, 4))
    assert last.block_table.tolist() == [[5, 2, 9]] * 4
    # Nothing to be left out, or nothing left.
    assert BatchBuilder(2, CPU).build(StepPlan(0, (b,), (2,), (1,), (True,))).last is None
    assert BatchBuilder(2, CPU).build(StepPlan(0, (b,), (0,), (3,), (False,))).last is None


@pytest.mark.parametrize("seed", range(4))
def test_memory_that_stays_holds_nothing_of_steps_before(seed):
    """Tables grow, sequences change places, come and go, and one gets other blocks."""
    rng = random.Random(seed)
    size, builder = 4, BatchBuilder(4, CPU)
    blocks = iter(rng.sample(range(1, 10**6), 10**4))
    live = []
    for step in range(60):
        if rng.random() < 0.4:
            tokens = [rng.randrange(100) for _ in range(rng.choice([1, 3, 30]))]
            live.append((sequence(tokens, []), len(tokens)))
        rng.shuffle(live)
        live = live[: rng.choice([3, 8, 20])]
        if live and rng.random() < 0.2:  # preempted: all is computed again, in other blocks
            live[0][0].block_table, live[0][0].computed = [], 0
            live[0] = live[0][0], len(live[0][0].token_ids)
        rows, counts = [], []
        for s, _ in live:
            missing = len(s.token_ids) - s.computed
            counts.append(missing if step % 3 else rng.randint(1, missing))
            s.block_table += [next(blocks) for _ in range(-(-len(s.token_ids) // size))][
                len(s.block_table) :
            ]
            chunk = s.token_ids[s.computed : s.computed + counts[-1]]
            rows.append((chunk, s.computed, s.block_table))
        if not live:
            continue
        sequences = tuple(s for s, _ in live)
        starts = tuple(s.computed for s in sequences)
        sampled = tuple(
            s.computed + n == len(s.token_ids) for s, n in zip(sequences, counts, strict=True)
        )
        got = builder.build(StepPlan(step, sequences, starts, tuple(counts), sampled))
        want = make_batch(rows, size)
        for name in ("token_ids", "positions", "slot_mapping"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert (got.query_start, got.context_len) == (want.query_start, want.context_len)
        width = got.block_table.shape[1]
        assert width == -(-max(want.context_len) // size)
        assert torch.equal(got.block_table, want.block_table[:, :width])
        assert got.logit_rows.tolist() == want.logit_rows[torch.tensor(sampled)].tolist()
        for s, n, done in zip(sequences, counts, sampled, strict=True):
            s.computed += n
            if done:
                s.token_ids.append(rng.randrange(100))


def test_decode_steps_are_built_where_the_last_one_was():
    builder = BatchBuilder(4, CPU)
    one, other = sequence([1, 2, 3], [1, 2]), sequence([4, 5], [3, 4])
    plans = [StepPlan(i, (one, other), (1 + i, i), (1, 1), (True, True)) for i in range(2)]
    places = []
    for plan in plans:
        batch = builder.build(plan)
        tensors = (batch.token_ids, batch.positions, batch.slot_mapping, batch.block_table)
        places.append([t.data_ptr() for t in (*tensors, batch.logit_rows)])
    assert places[0] == places[1]


def test_all_rows_or_none_leave_the_last_layer_as_it_is():
    batch = make_batch([([1, 2, 3], 0, [1])], 4, all_rows=True)
    assert single_rows(batch) is None
