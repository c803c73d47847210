"""The block pool: who refers to which KV block, and which blocks hold a known prefix.

A block is in one of three states:
  used    ref_count > 0; in the tables of live sequences
  cached  ref_count == 0, has a key; in the free list, found again by its key until it is taken
  blank   ref_count == 0, no key; in the free list
Block 0 is the null block: padding may point at it, it is never allocated.
"""

from collections.abc import Iterable, Iterator, Sequence

from common.errors import BatonError, ConfigError

NULL_BLOCK = 0


class BlockPoolError(BatonError):
    """The pool was asked for what it cannot give, or its invariants are broken."""


class Block:
    """One page of the KV cache. `newer` and `older` are its neighbours in the free list."""

    __slots__ = ("id", "key", "newer", "older", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.id = block_id
        self.key: bytes | None = None
        self.ref_count = 0
        self.older: Block | None = None
        self.newer: Block | None = None


class FreeList:
    """A doubly linked list through the blocks themselves, least recently used first; any block
    is taken out in O(1)."""

    def __init__(self) -> None:
        # A ring: head.newer is the oldest block, head.older the newest.
        self._head = Block(-1)
        self._head.older = self._head.newer = self._head
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Block]:
        block = self._head.newer
        while block is not None and block is not self._head:
            yield block
            block = block.newer

    def push_newest(self, block: Block) -> None:
        self._insert(block, after=self._head.older)

    def push_oldest(self, block: Block) -> None:
        self._insert(block, after=self._head)

    def remove(self, block: Block) -> None:
        if block.older is None or block.newer is None:
            raise BlockPoolError(f"block {block.id} is not in the free list")
        block.older.newer, block.newer.older = block.newer, block.older
        block.older = block.newer = None
        self._length -= 1

    def pop_oldest(self) -> Block:
        block = self._head.newer
        if block is None or block is self._head:
            raise BlockPoolError("no free block is left")
        self.remove(block)
        return block

    def _insert(self, block: Block, after: Block | None) -> None:
        if block.older is not None or after is None or after.newer is None:
            raise BlockPoolError(f"block {block.id} is in the free list already")
        block.older, block.newer = after, after.newer
        after.newer.older = block
        after.newer = block
        self._length += 1


class BlockManager:
    """Allocates, shares and forgets blocks. The only writer of reference counts and keys.

    num_blocks      blocks in the cache, the null block among them
    prefix_caching  False: no block is ever found by its key
    """

    def __init__(self, num_blocks: int, *, prefix_caching: bool = True) -> None:
        if num_blocks < 2:
            raise ConfigError(
                f"num_blocks is {num_blocks}; set it to 2 or more (block 0 is reserved)"
            )
        self._blocks = [Block(block_id) for block_id in range(num_blocks)]
        self._by_key: dict[bytes, Block] = {}
        self._free = FreeList()
        self._prefix_caching = prefix_caching
        self._num_cached = 0
        for block in self._blocks[1:]:
            self._free.push_newest(block)

    @property
    def num_usable(self) -> int:
        """Blocks that can be allocated at all."""
        return len(self._blocks) - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody refers to; cached ones among them."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that a live sequence refers to."""
        return self.num_usable - self.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that nobody refers to and that hold a known prefix."""
        return self._num_cached

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix. Nothing is acquired."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block.id)
        return found

    def num_unreferenced(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks are in the free list: acquiring them makes it shorter."""
        return sum(self._blocks[block_id].ref_count == 0 for block_id in block_ids)

    def acquire(self, block_ids: Sequence[int]) -> None:
        """One more reference to each of these (matched) blocks."""
        for block_id in block_ids:
            block = self._block(block_id)
            if block.ref_count == 0:
                self._free.remove(block)
                self._num_cached -= block.key is not None
            block.ref_count += 1

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Blocks with one reference each and no key, least recently used first.
        Raises BlockPoolError, having taken none, when there are not so many."""
        if not self.can_allocate(count):
            raise BlockPoolError(f"{count} blocks are wanted, {len(self._free)} are free")
        return [self._take() for _ in range(count)]

    def register(self, block_id: int, key: bytes) -> None:
        """Let a full block, whose KV is computed or verified, be found by its key. When another
        block holds the same prefix, that one stays the one to be found."""
        block = self._block(block_id)
        if block.ref_count == 0:
            raise BlockPoolError(f"block {block_id} is registered, but nobody refers to it")
        if block.key is not None and block.key != key:
            raise BlockPoolError(f"block {block_id} has a key already")
        if self._prefix_caching and key not in self._by_key:
            block.key = key
            self._by_key[key] = block

    def free(self, block_table: Sequence[int]) -> None:
        """Drop one reference to each block of a table. The tail is the first to be evicted: a
        prefix is of use without its tail, but not the other way round."""
        for block_id in reversed(block_table):
            block = self._block(block_id)
            if block.ref_count == 0:
                raise BlockPoolError(f"block {block_id} is freed twice")
            block.ref_count -= 1
            if block.ref_count:
                continue
            if block.key is None:
                self._free.push_oldest(block)
            else:
                self._num_cached += 1
                self._free.push_newest(block)

    def forget(self) -> None:
        """Empty the prefix cache: no block is found by its key any more."""
        for block in self._by_key.values():
            block.key = None
        self._by_key.clear()
        self._num_cached = 0

    def check(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Verify the invariants, and, given the tables of all live sequences, that the reference
        counts are theirs. O(blocks). Raises BlockPoolError naming what is broken."""
        free = list(self._free)
        problems = [
            *_problems_of_blocks(self._blocks, {block.id for block in free}),
            *_problems_of_keys(self._blocks, self._by_key),
        ]
        if len(free) != len(self._free) or len({block.id for block in free}) != len(free):
            problems.append(f"the free list says {len(self._free)} blocks, {len(free)} are linked")
        cached = sum(block.key is not None for block in free)
        if cached != self._num_cached:
            problems.append(f"{self._num_cached} blocks are counted as cached, {cached} are")
        if tables is not None:
            problems += _problems_of_references(self._blocks, tables)
        if problems:
            raise BlockPoolError("; ".join(problems))

    def _block(self, block_id: int) -> Block:
        if not NULL_BLOCK < block_id < len(self._blocks):
            raise BlockPoolError(
                f"block {block_id} is not one of 1 to {self.num_usable} that sequences may own"
            )
        return self._blocks[block_id]

    def _take(self) -> int:
        block = self._free.pop_oldest()
        if block.key is not None:
            del self._by_key[block.key]
            block.key = None
            self._num_cached -= 1
        block.ref_count = 1
        return block.id


def _problems_of_blocks(blocks: Sequence[Block], free: set[int]) -> list[str]:
    problems = []
    if blocks[NULL_BLOCK].ref_count or blocks[NULL_BLOCK].key is not None or NULL_BLOCK in free:
        problems.append("the null block is in use")
    for block in blocks[1:]:
        if block.ref_count < 0 or (block.ref_count == 0) != (block.id in free):
            where = "in" if block.id in free else "not in"
            problems.append(
                f"block {block.id} has {block.ref_count} references and is {where} the free list"
            )
    return problems


def _problems_of_keys(blocks: Sequence[Block], by_key: dict[bytes, Block]) -> list[str]:
    problems = [
        f"key {key.hex()} leads to block {block.id}, which does not have it"
        for key, block in by_key.items()
        if block.key != key
    ]
    keyed = sum(block.key is not None for block in blocks)
    if keyed != len(by_key):
        problems.append(f"{keyed} blocks have keys, {len(by_key)} keys lead to blocks")
    return problems


def _problems_of_references(blocks: Sequence[Block], tables: Iterable[Sequence[int]]) -> list[str]:
    counts = [0] * len(blocks)
    for table in tables:
        for block_id in table:
            counts[block_id] += 1
    return [
        f"block {block.id} has {block.ref_count} references, live tables name it {count} times"
        for block, count in zip(blocks, counts, strict=True)
        if block.ref_count != count
    ]
