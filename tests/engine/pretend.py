"""A model without weights: the KV of a token is its whole prefix, the next token a function of it.

Each step checks that every KV entry it would attend to is that of this very sequence, so that a
block that was shared, loaded, recomputed or freed wrongly shows at once.
"""

import random

from common.engine.blocks import BlockManager
from common.engine.limits import SchedulerConfig
from common.engine.sampling_params import SamplingParams
from common.engine.scheduler import Scheduler
from common.engine.sequence import UNKNOWN_TOKEN, EngineRequest, Phase, Sampled
from common.kv.connector import KVConnector

VOCAB = 1000
EOS = 999


def next_token(tokens):
    """Never EOS."""
    state = 7
    for token in tokens:
        state = (state * 31 + token + 1) % 1_000_003
    return state % (VOCAB - 1)


def continuation(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def request(request_id, prompt, *, max_tokens=8, deadline=None, prefill=None, tenant="", **params):
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        params=SamplingParams(temperature=0, max_tokens=max_tokens, **params),
        tenant=tenant,
        deadline=deadline,
        prefill_tokens=prefill,
    )


class PretendEngine:
    """Scheduler, block pool and the pretended model, stepped by hand.

    ahead  a step lands, and computes, only after the next one was planned
    """

    def __init__(
        self, *, num_blocks=100, connector=None, model=next_token, ahead=False, **settings
    ):
        defaults = {
            "block_size": 4,
            "max_model_len": 200,
            "vocab_size": VOCAB,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 32,
            "eos_token_ids": (EOS,),
            "fingerprint": b"f" * 16,
        }
        self.config = SchedulerConfig(**{**defaults, **settings})
        self.blocks = BlockManager(num_blocks)
        self.connector = connector or KVConnector()
        self.scheduler = Scheduler(self.config, self.blocks, self.connector)
        self.model = model
        self.ahead, self.flight = ahead, None
        self.pages = {}  # (block, offset) -> prefix
        self.connector.register_kv_caches(self)
        self.outputs = []
        self.tokens = {}
        self.ends = {}
        self.now = 0.0

    def add(self, *args, **kwargs):
        return self.scheduler.add(request(*args, **kwargs), seed=0, now=self.now)

    def step(self):
        flight, self.flight = self.flight, None
        plan = self.scheduler.schedule(self.now)
        self.connector.build_connector_meta(plan)
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        assert len(plan.sequences) <= self.config.max_num_seqs
        begun = plan, [list(sequence.block_table) for sequence in plan.sequences]
        if flight is not None:
            self.land(*flight)
        if self.ahead and plan.sequences and not plan.loading:
            self.scheduler.assume(plan)
            self.flight = begun
        else:
            self.land(*begun)
        self.scheduler.check()
        return plan

    def land(self, plan, tables):
        """The device writes only now, into the pages that were the sequences' when it was told."""
        sampled = []
        failed = self.connector.get_block_ids_with_load_errors() if plan.loading else set()
        rows = zip(plan.sequences, plan.start, plan.scheduled, plan.sampled, tables, strict=True)
        for sequence, start, count, wanted, table in rows:
            assert count > 0
            end = start + count
            self.write(sequence, table, start, end)
            if sequence.phase is not Phase.FINISHED and not failed.intersection(table):
                self.verify(sequence, table, end)
            if wanted:
                token = self.model(sequence.token_ids[:end])
                sampled.append(
                    Sampled(token, error=ValueError("bad logits") if token is None else None)
                )
        self.take(self.scheduler.update(plan, sampled, failed))

    def take(self, outputs):
        self.outputs += outputs
        for output in outputs:
            assert output.request_id not in self.ends, "told of after its end"
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.ends[output.request_id] = output

    def run(self, limit=2000):
        for _ in range(limit):
            if self.scheduler.idle:
                return
            self.step()
        raise AssertionError(f"not done after {limit} steps")

    def slot(self, table, position):
        size = self.config.block_size
        return table[position // size], position % size

    def write(self, sequence, table, start, end):
        for position in range(start, end):
            prefix = tuple(sequence.token_ids[: position + 1])
            # What a step in vain writes is nobody's.
            known = len(prefix) == position + 1 and UNKNOWN_TOKEN not in prefix
            self.pages[self.slot(table, position)] = prefix if known else "in vain"

    def verify(self, sequence, table, end):
        for position in range(end):
            prefix = tuple(sequence.token_ids[: position + 1])
            assert self.pages.get(self.slot(table, position)) == prefix


def tokens(count, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(900) for _ in range(count)]


def all_free(engine):
    engine.scheduler.check()
    return engine.blocks.num_used == 0
