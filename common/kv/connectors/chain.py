"""Several connectors as one: each adds to what those before it can load."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from common.kv.connector import KVCaches, KVConnector

if TYPE_CHECKING:
    from common.engine.sequence import Sequence, StepPlan


@dataclass(slots=True)
class _Share:
    """What the members load for one sequence: from token `start` on, (member, tokens) one after
    another, between steps or within one; who is still at it, which blocks failed so far, and
    whether the members were asked a second time."""

    sequence: "Sequence"
    start: int
    between_steps: bool = False
    parts: list[tuple[int, int]] = field(default_factory=list)
    loading: set[int] = field(default_factory=set)
    block_ids: list[int] = field(default_factory=list)
    failed: set[int] = field(default_factory=set)
    asked_again: bool = False

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.parts)


class ChainConnector(KVConnector):
    """Asks its members in order: the store first, then a handoff for what the store lacks.

    A sequence is done loading when every member is; failed blocks are reported only then, so that
    the engine never computes into a block that another member still fills. Before that the members
    are asked once more, but for the one that failed, from the first failed block on: what the store
    lost on the way a prefill worker can send, and what no prefill worker could send the store may
    have by now. A sequence is loaded
    either between steps or within one, as the first member that has something of it says: members
    that load the other way are left out.
    """

    def __init__(self, members: list[KVConnector]) -> None:
        self._members = list(members)
        self._block_size = 0
        self._shares: dict[str, _Share] = {}
        # Who loaded what, until the engine asks what of it was cached.
        self._loaded: dict[str, list[tuple[int, int]]] = {}
        self._loads_again = 0
        self._failed: set[int] = set()
        self._sending: dict[str, set[int]] = {}

    # Scheduler side -----------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, sequence: "Sequence", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        share = _Share(sequence, num_computed_tokens)
        for i, member in enumerate(self._members):
            reached = share.start + share.tokens
            found, later = member.get_num_new_matched_tokens(sequence, reached)
            if found is None:
                return None, True
            if not share.tokens:
                share.between_steps = later
            if found and later == share.between_steps:
                share.parts.append((i, found))
        self._shares[sequence.request_id] = share
        return share.tokens, share.between_steps

    def update_state_after_alloc(
        self, sequence: "Sequence", block_ids: list[int], num_external_tokens: int
    ) -> None:
        share = self._shares.get(sequence.request_id)
        if share is None or num_external_tokens == 0:
            self._shares.pop(sequence.request_id, None)
            for member in self._members:
                member.update_state_after_alloc(sequence, block_ids, 0)
            return
        share.block_ids = list(block_ids)
        if share.between_steps:
            share.loading = {i for i, _ in share.parts}
        else:
            self._loaded[sequence.request_id] = share.parts
        reached, parts = share.start, dict(share.parts)
        for i, member in enumerate(self._members):
            tokens = parts.get(i, 0)
            reached += tokens
            covered = block_ids[: -(-reached // self._block_size)] if tokens else block_ids
            member.update_state_after_alloc(sequence, covered, tokens)

    def num_cached_tokens(self, sequence: "Sequence", num_loaded_tokens: int) -> int:
        cached, left = 0, num_loaded_tokens
        for i, tokens in self._loaded.pop(sequence.request_id, ()):
            part = min(left, tokens)
            left -= part
            cached += self._members[i].num_cached_tokens(sequence, part) if part else 0
        return cached

    def build_connector_meta(self, plan: "StepPlan | None") -> Any:
        return [member.build_connector_meta(plan) for member in self._members]

    def request_finished(self, sequence: "Sequence", block_ids: list[int]) -> bool:
        self._shares.pop(sequence.request_id, None)
        self._loaded.pop(sequence.request_id, None)
        keeps = {
            i
            for i, member in enumerate(self._members)
            if member.request_finished(sequence, block_ids)
        }
        if keeps:
            self._sending[sequence.request_id] = keeps
        else:
            self._sending.pop(sequence.request_id, None)
        return bool(keeps)

    def take_events(self) -> dict[str, int]:
        events, self._loads_again = {"loads_tried_again": self._loads_again}, 0
        for member in self._members:
            for name, count in member.take_events().items():
                events[name] = events.get(name, 0) + count
        return events

    def open_handoffs(self) -> int:
        return sum(member.open_handoffs() for member in self._members)

    # Worker side --------------------------------------------------------------------------

    def register_kv_caches(self, caches: KVCaches) -> None:
        self._block_size = caches.layout.block_size
        for member in self._members:
            member.register_kv_caches(caches)

    def start_load_kv(self, meta: Any) -> None:
        for member, part in zip(self._members, meta or (), strict=meta is not None):
            member.start_load_kv(part)

    def wait_for_layer_load(self, layer: int) -> None:
        for member in self._members:
            member.wait_for_layer_load(layer)

    def save_kv_layer(self, layer: int) -> None:
        for member in self._members:
            member.save_kv_layer(layer)

    def wait_for_save(self) -> None:
        for member in self._members:
            member.wait_for_save()

    def get_finished(self, finished_request_ids: set[str]) -> tuple[set[str], set[str]]:
        sent: set[str] = set()
        loaded: set[str] = set()
        for i, member in enumerate(self._members):
            member_sent, member_loaded = member.get_finished(finished_request_ids)
            sent |= {r for r in member_sent if self._no_longer(self._sending, r, i)}
            for request_id in member_loaded:
                if request_id in self._shares:
                    self._shares[request_id].loading.discard(i)
        self._collect_failures()
        for request_id, share in list(self._shares.items()):
            if share.block_ids and not share.loading:
                if share.between_steps and share.failed and not self._ask_again(share):
                    continue
                self._failed |= share.failed
                del self._shares[request_id]
                if share.between_steps:
                    loaded.add(request_id)
                    self._loaded[request_id] = share.parts
        return sent, loaded

    def _ask_again(self, share: _Share) -> bool:
        """Have a member load from the first failed block on. True when nobody does: the load is
        over; False while one loads, or does not know yet."""
        if share.asked_again:
            return True
        size = self._block_size
        first = min(share.block_ids.index(block) for block in share.failed)
        covered = min(share.start + share.tokens, len(share.block_ids) * size)
        failed = _member_at(share.parts, first * size - share.start)
        for i, member in enumerate(self._members):
            if i == failed:
                continue
            found, later = member.get_num_new_matched_tokens(share.sequence, first * size)
            if found is None:
                return False
            # The sequence has blocks for what was to be loaded, and for no more.
            if first * size + found > covered:
                found = covered // size * size - first * size
            if found > 0 and later:
                end = -(-(first * size + found) // size)
                member.update_state_after_alloc(share.sequence, share.block_ids[:end], found)
                self._loads_again += 1
                share.asked_again, share.loading = True, {i}
                share.failed.difference_update(share.block_ids[first:end])
                share.parts = [*_first(share.parts, first * size - share.start), (i, found)]
                return False
        return True

    @staticmethod
    def _no_longer(waiting: dict[str, set[int]], request_id: str, member: int) -> bool:
        """Take a member off a request's list; True when it was the last one."""
        members = waiting.get(request_id, set())
        members.discard(member)
        if members:
            return False
        return waiting.pop(request_id, None) is not None

    def _collect_failures(self) -> None:
        """Failed blocks, to their shares. Those loaded within a step are told at once."""
        failed: set[int] = set()
        for member in self._members:
            failed |= member.get_block_ids_with_load_errors()
        for share in self._shares.values() if failed else ():
            # Only the blocks that are loaded: those before may be shared with other sequences.
            own = failed.intersection(share.block_ids[share.start // self._block_size :])
            if share.between_steps:
                share.failed |= own
            else:
                self._failed |= own

    def get_block_ids_with_load_errors(self) -> set[int]:
        self._collect_failures()
        failed, self._failed = self._failed, set()
        return failed

    def shutdown(self) -> None:
        for member in self._members:
            member.shutdown()


def _first(parts: list[tuple[int, int]], tokens: int) -> list[tuple[int, int]]:
    """The parts up to a number of tokens, the last one cut."""
    kept = []
    for member, count in parts:
        count = min(count, tokens)
        tokens -= count
        if count:
            kept.append((member, count))
    return kept


def _member_at(parts: list[tuple[int, int]], token: int) -> int:
    """The member that was to load a token."""
    for member, count in parts:
        if token < count:
            return member
        token -= count
    return -1
