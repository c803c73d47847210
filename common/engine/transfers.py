"""Sequences whose KV comes from a connector or goes to one: what is being loaded, what of it
failed, whose blocks are still being sent. Reads no clock, as the scheduler that it belongs to."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from common.engine.limits import SchedulerConfig
from common.engine.prefix import PrefixCache
from common.engine.sequence import Phase, RequestOutput, Sequence
from common.kv.connector import KVConnector

log = structlog.get_logger("scheduler")


@dataclass(slots=True)
class Sending:
    """A finished sequence whose blocks a connector still reads; `output` is told when it is done,
    None when it was told already."""

    sequence: Sequence
    output: RequestOutput | None


@dataclass(frozen=True, slots=True)
class Loading:
    """A sequence whose tokens [start, end) a connector loads."""

    sequence: Sequence
    start: int
    end: int


class Transfers:
    """What a scheduler and its connector tell each other of single requests.

    loading  by request id, those that wait until their KV is loaded
    within   by request id, those whose KV is loaded within the step under way
    sending  by request id, those that are over but for their blocks
    """

    def __init__(
        self,
        config: SchedulerConfig,
        connector: KVConnector,
        prefixes: PrefixCache,
        counters: Counter[str],
    ) -> None:
        self._config = config
        self._connector = connector
        self._prefixes = prefixes
        self._counters = counters
        self.loading: dict[str, Loading] = {}
        self.within: dict[str, Loading] = {}
        self.sending: dict[str, Sending] = {}
        self._failed_blocks: set[int] = set()
        self._ended: set[str] = set()

    def ask(self, sequence: Sequence, num_hits: int) -> tuple[int | None, bool]:
        """Tokens that a connector can load beyond the hits, and whether between steps. Asked until
        a first admission: what failed or was preempted is computed here."""
        if sequence.connector_asked or sequence.wants_prompt_logits:
            return 0, False
        computed = num_hits * self._config.block_size
        external, between_steps = self._connector.get_num_new_matched_tokens(sequence, computed)
        if external is None:
            return None, False
        sampled = sequence.request.prefill_tokens is None
        # What is loaded within a step needs a token that is computed in it.
        spared = sampled or not between_steps
        external = max(0, min(external, sequence.target - spared - computed))
        return external, between_steps and external > 0

    def begin(self, sequence: Sequence, start: int, external: int, between_steps: bool) -> None:
        """Tell of the blocks that an admitted sequence got; `external` tokens from `start` on are
        to be loaded into them."""
        end = start + external
        covered = sequence.block_table[: self._config.blocks_for(end)]
        self._connector.update_state_after_alloc(sequence, covered, external)
        if external:
            # What failed in these blocks before was another's.
            self._failed_blocks.difference_update(covered)
            loads = self.loading if between_steps else self.within
            loads[sequence.request_id] = Loading(sequence, start, end)

    def collect(self) -> tuple[list[Sending], list[Loading]]:
        """What the connector finished since the last call: who is done sending, and who is done
        loading, well or not."""
        ended, self._ended = self._ended, set()
        sent, loaded = self._connector.get_finished(ended)
        self._failed_blocks |= self._connector.get_block_ids_with_load_errors()
        # One that was aborted meanwhile is in neither.
        return (
            [self.sending.pop(request_id) for request_id in sent if request_id in self.sending],
            [self.loading.pop(request_id) for request_id in loaded if request_id in self.loading],
        )

    def land(self, failed_blocks: Iterable[int]) -> set[Sequence]:
        """Take in the loads of a step that is over. Those of whom some failed: what the step
        computed of them is void."""
        self._failed_blocks.update(failed_blocks)
        loads, self.within = self.within, {}
        return {
            load.sequence
            for load in loads.values()
            if load.sequence.phase is Phase.RUNNING and not self.take(load)
        }

    def take(self, load: Loading) -> bool:
        """Count what was loaded as computed, up to the first block that failed. False when one
        did."""
        sequence, good = load.sequence, load.end
        failed = [i for i, block in enumerate(sequence.block_table) if block in self._failed_blocks]
        self._failed_blocks.difference_update(sequence.block_table)
        if failed:
            self._counters["load_errors"] += 1
            good = max(load.start, min(load.end, failed[0] * self._config.block_size))
        sequence.computed = good
        loaded = good - load.start
        self._counters["loaded_tokens"] += loaded
        if sequence.preemptions == 0 and loaded > 0:
            sequence.cached_tokens += self._connector.num_cached_tokens(sequence, loaded)
        self._prefixes.register(sequence)
        return not failed

    def finish(self, sequence: Sequence) -> bool:
        """A sequence is over, or, where its blocks are being sent, given up. Whether the connector
        goes on reading its blocks."""
        if sequence.request_id not in self.sending:
            self._ended.add(sequence.request_id)
        self.loading.pop(sequence.request_id, None)
        self.within.pop(sequence.request_id, None)
        try:
            return self._connector.request_finished(sequence, sequence.block_table)
        except Exception:
            # A connector's trouble must not keep the blocks of a request that is over.
            self._counters["connector_failures"] += 1
            log.exception("request_finished_failed", request=sequence.request_id)
            return False
