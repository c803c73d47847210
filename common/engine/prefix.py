"""Sequences and the prefix cache: which blocks a sequence finds, which of its own it offers."""

from common.engine.blocks import BlockManager
from common.engine.limits import SchedulerConfig
from common.engine.sequence import Sequence
from common.kv.keys import chain_keys


class PrefixCache:
    """Finds blocks by the chained keys of a sequence's tokens. Keys are computed once each and
    kept in `sequence.block_keys`."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager) -> None:
        self._config = config
        self._blocks = blocks

    def match(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest known prefix that leaves the last token to be computed (its
        logits are wanted), unless only KV is; none while logits of the whole prompt are wanted.
        Nothing is acquired."""
        if not self._config.prefix_caching or sequence.wants_prompt_logits:
            return []
        sampled = sequence.request.prefill_tokens is None
        usable = (sequence.target - sampled) // self._config.block_size
        return self._blocks.match(self._keys(sequence, usable))

    def register(self, sequence: Sequence) -> None:
        """Offer the full blocks with KV, computed or verified, that were not offered yet."""
        full = sequence.computed // self._config.block_size
        if full <= sequence.registered or not self._config.prefix_caching:
            return
        keys = self._keys(sequence, full)
        for index in range(sequence.registered, full):
            self._blocks.register(sequence.block_table[index], keys[index])
        sequence.registered = full

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """Keys of the first `count` full blocks."""
        if len(sequence.block_keys) < count:
            sequence.block_keys = chain_keys(
                sequence.token_ids[: count * self._config.block_size],
                self._config.block_size,
                self._config.fingerprint,
                sequence.request.tenant,
                known=sequence.block_keys,
            )
        return sequence.block_keys[:count]
