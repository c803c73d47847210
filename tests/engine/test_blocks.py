import collections

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.engine.blocks import BlockManager, BlockPoolError
from common.errors import ConfigError


def key(number):
    return number.to_bytes(16, "little")


def test_the_null_block_is_never_allocated():
    blocks = BlockManager(5)
    assert sorted(blocks.allocate(4)) == [1, 2, 3, 4]
    assert not blocks.can_allocate(1)
    with pytest.raises(BlockPoolError, match="1 blocks are wanted, 0 are free"):
        blocks.allocate(1)
    blocks.check([[1, 2, 3, 4]])


def test_a_pool_without_a_usable_block_is_refused():
    with pytest.raises(ConfigError, match="num_blocks is 1"):
        BlockManager(1)


def test_a_refused_allocation_takes_nothing():
    blocks = BlockManager(4)
    with pytest.raises(BlockPoolError):
        blocks.allocate(4)
    assert blocks.num_free == 3


def test_a_freed_prefix_is_found_by_its_keys_until_it_is_evicted():
    blocks = BlockManager(4)
    table = blocks.allocate(3)
    for index, block in enumerate(table):
        blocks.register(block, key(index))
    blocks.free(table)
    assert (blocks.num_used, blocks.num_cached) == (0, 3)
    assert blocks.match([key(0), key(1), key(2), key(9)]) == table
    blocks.allocate(1)
    assert blocks.match([key(0), key(1), key(2)]) == table[:2]  # the tail went first
    blocks.check()


def test_least_recently_freed_prefixes_are_evicted_first():
    blocks = BlockManager(4)
    first, second, third = blocks.allocate(3)
    for number, block in enumerate((first, second, third)):
        blocks.register(block, key(number))
    for block in (second, first, third):
        blocks.free([block])
    assert blocks.allocate(2) == [second, first]
    assert blocks.match([key(2)]) == [third]


def test_blocks_without_a_prefix_are_taken_before_those_with_one():
    blocks = BlockManager(4)
    known, blank = blocks.allocate(2)
    blocks.register(known, key(1))
    blocks.free([known])
    blocks.free([blank])
    blocks.allocate(2)
    assert blocks.match([key(1)]) == [known]


def test_a_shared_block_is_free_only_when_all_let_go():
    blocks = BlockManager(3)
    (block,) = blocks.allocate(1)
    blocks.register(block, key(1))
    blocks.acquire([block])
    blocks.free([block])
    assert blocks.num_used == 1
    blocks.check([[block]])
    blocks.free([block])
    assert (blocks.num_used, blocks.num_cached) == (0, 1)
    blocks.acquire(blocks.match([key(1)]))
    assert (blocks.num_used, blocks.num_cached) == (1, 0)


def test_of_two_blocks_with_the_same_key_the_first_is_found():
    blocks = BlockManager(3)
    first, second = blocks.allocate(2)
    blocks.register(first, key(1))
    blocks.register(second, key(1))
    assert blocks.match([key(1)]) == [first]
    blocks.free([second])
    blocks.free([first])
    assert blocks.num_cached == 1
    blocks.check([])


def test_misuse_is_named():
    blocks = BlockManager(3)
    (block,) = blocks.allocate(1)
    blocks.free([block])
    with pytest.raises(BlockPoolError, match="freed twice"):
        blocks.free([block])
    with pytest.raises(BlockPoolError, match="nobody refers"):
        blocks.register(block, key(1))
    with pytest.raises(BlockPoolError, match="block 0 is not"):
        blocks.free([0])


def test_check_finds_a_reference_that_no_table_has():
    blocks = BlockManager(3)
    blocks.allocate(1)
    with pytest.raises(BlockPoolError, match="live tables name it 0 times"):
        blocks.check([])


def test_without_prefix_caching_nothing_is_found():
    blocks = BlockManager(3, prefix_caching=False)
    (block,) = blocks.allocate(1)
    blocks.register(block, key(1))
    assert blocks.match([key(1)]) == []


def test_a_forgotten_cache_gives_no_hit():
    blocks = BlockManager(4)
    table = blocks.allocate(2)
    blocks.register(table[0], key(1))
    blocks.register(table[1], key(2))
    blocks.free(table[1:])
    blocks.forget()
    assert blocks.match([key(1)]) == []
    blocks.check([table[:1]])


class BlockManagerMachine(RuleBasedStateMachine):
    """The pool against a model that searches lists: tables, a key for each block, a free order."""

    NUM_BLOCKS = 8

    def __init__(self):
        super().__init__()
        self.pool = BlockManager(self.NUM_BLOCKS)
        self.tables = []
        self.keys = {}  # block -> key
        self.free_order = list(range(1, self.NUM_BLOCKS))

    def references(self):
        return collections.Counter(block for table in self.tables for block in table)

    @rule(chain=st.lists(st.integers(0, 2), max_size=4), extra=st.integers(0, 3))
    def start(self, chain, extra):
        """A sequence: hits of a chain of keys, then new blocks."""
        keys = [key(hash((*chain[: i + 1],)) % 2**64) for i in range(len(chain))]
        expected = []
        for wanted in keys:
            holders = [block for block, known in self.keys.items() if known == wanted]
            if not holders:
                break
            expected += holders
        hits = self.pool.match(keys)
        assert hits == expected
        new = len(keys) - len(hits) + extra
        unreferenced = [block for block in hits if not self.references()[block]]
        assert self.pool.num_unreferenced(hits) == len(unreferenced)
        if not self.pool.can_allocate(new + len(unreferenced)):
            assert new + len(unreferenced) > len(self.free_order)
            return
        self.pool.acquire(hits)
        self.free_order = [block for block in self.free_order if block not in unreferenced]
        fresh, self.free_order = self.free_order[:new], self.free_order[new:]
        assert self.pool.allocate(new) == fresh
        for block in fresh:
            self.keys.pop(block, None)
        table = hits + fresh
        self.tables.append(table)
        for index in range(len(hits), len(keys)):
            self.pool.register(table[index], keys[index])
            if keys[index] not in self.keys.values():
                self.keys[table[index]] = keys[index]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def finish(self, data):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.free(table)
        references = self.references()
        for block in reversed(table):
            if references[block]:
                continue
            if block in self.keys:
                self.free_order.append(block)
            else:
                self.free_order.insert(0, block)

    @invariant()
    def holds_together(self):
        self.pool.check(self.tables)
        references = self.references()
        assert self.pool.num_free == len(self.free_order)
        assert self.pool.num_used == len(references)
        assert self.pool.num_cached == sum(not references[block] for block in self.keys)


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
