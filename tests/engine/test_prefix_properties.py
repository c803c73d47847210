"""The prefix cache against a model that keeps every block's whole prefix and searches lists."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.engine.blocks import BlockManager
from common.engine.limits import SchedulerConfig
from common.engine.prefix import PrefixCache
from common.engine.sampling_params import SamplingParams
from common.engine.sequence import EngineRequest, Sequence

SIZE, NUM_BLOCKS = 2, 10
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


class PrefixMachine(RuleBasedStateMachine):
    """Sequences come, compute, go on and end. `holds` says of a block which tenant's tokens, from
    the start of a sequence to the block's end, its KV is of, as long as it may be found."""

    def __init__(self):
        super().__init__()
        config = SchedulerConfig(
            block_size=SIZE, max_model_len=64, vocab_size=4, fingerprint=b"f" * 16
        )
        self.blocks = BlockManager(NUM_BLOCKS)
        self.cache = PrefixCache(config, self.blocks)
        self.live: list[Sequence] = []
        self.holds: dict[int, tuple[str, tuple[int, ...]]] = {}

    def expected(self, tenant: str, tokens: list[int], usable: int) -> list[int]:
        found = []
        for end in range(SIZE, usable * SIZE + 1, SIZE):
            prefix = (tenant, tuple(tokens[:end]))
            block = next((b for b, known in self.holds.items() if known == prefix), None)
            if block is None:
                break
            found.append(block)
        return found

    @rule(tokens=TOKENS, tenant=st.sampled_from(["", "a"]), prefill=st.booleans())
    def start(self, tokens, tenant, prefill):
        request = EngineRequest(
            "r",
            list(tokens),
            SamplingParams(max_tokens=8),
            tenant=tenant,
            prefill_tokens=len(tokens) if prefill else None,
        )
        sequence = Sequence(request=request, token_ids=list(tokens), seed=0, max_len=64)
        # An ordinary request keeps one token to compute; one that only wants KV needs none.
        hits = self.cache.match(sequence)
        assert hits == self.expected(tenant, tokens, (len(tokens) - (not prefill)) // SIZE)
        needed = -(-len(tokens) // SIZE) - len(hits)
        if not self.blocks.can_allocate(needed + self.blocks.num_unreferenced(hits)):
            return
        self.blocks.acquire(hits)
        fresh = self.blocks.allocate(needed)
        for block in fresh:
            self.holds.pop(block, None)  # evicted, if it held anything
        sequence.block_table = hits + fresh
        sequence.registered, sequence.computed = len(hits), len(hits) * SIZE
        self.live.append(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def compute(self, data):
        sequence = data.draw(st.sampled_from(self.live))
        left = len(sequence.token_ids) - sequence.computed
        sequence.computed += data.draw(st.integers(0, left))
        offered = sequence.registered
        self.cache.register(sequence)
        for index in range(offered, sequence.computed // SIZE):
            prefix = (sequence.request.tenant, tuple(sequence.token_ids[: (index + 1) * SIZE]))
            if prefix not in self.holds.values():
                self.holds[sequence.block_table[index]] = prefix

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def generate(self, data, token):
        """A token more, in a block more where the last one is full."""
        sequence = data.draw(st.sampled_from(self.live))
        if len(sequence.token_ids) == len(sequence.block_table) * SIZE:
            if not self.blocks.can_allocate(1):
                return
            (block,) = self.blocks.allocate(1)
            self.holds.pop(block, None)
            sequence.block_table.append(block)
        sequence.token_ids.append(token)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def finish(self, data):
        sequence = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.blocks.free(sequence.block_table)

    @rule()
    def forget(self):
        self.blocks.forget()
        self.holds.clear()

    @invariant()
    def holds_together(self):
        self.blocks.check([sequence.block_table for sequence in self.live])


TestPrefixCache = PrefixMachine.TestCase
TestPrefixCache.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
