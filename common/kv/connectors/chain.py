"""Several connectors as one: each adds to what those before it can load."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from common.kv.connector import KVCaches, KVConnector

if TYPE_CHECKING:
    from common.engine.sequence import Sequence, StepPlan


@dataclass(slots=True)
class _Share:
    """What the members load for one sequence: from token `start` on, `tokens` by member, between
    steps or within one; who is still at it, and which blocks failed so far."""

    start: int
    tokens: list[int]
    between_steps: bool
    loading: set[int] = field(default_factory=set)
    block_ids: list[int] = field(default_factory=list)
    failed: set[int] = field(default_factory=set)


class ChainConnector(KVConnector):
    """Asks its members in order: the store first, then a handoff for what the store lacks.

    A sequence is done loading when every member is; failed blocks are reported only then, so that
    the engine never computes into a block that another member still fills. A sequence is loaded
    either between steps or within one, as the first member that has something of it says: members
    that load the other way are left out.
    """

    def __init__(self, members: list[KVConnector]) -> None:
        self._members = list(members)
        self._block_size = 0
        self._shares: dict[str, _Share] = {}
        # Shares of what was loaded, until the engine asks what of it was cached.
        self._loaded: dict[str, list[int]] = {}
        self._failed: set[int] = set()
        self._sending: dict[str, set[int]] = {}

    # Scheduler side -----------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, sequence: "Sequence", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        share = _Share(num_computed_tokens, [], False)
        reached = num_computed_tokens
        for member in self._members:
            found, later = member.get_num_new_matched_tokens(sequence, reached)
            if found is None:
                return None, True
            if reached == num_computed_tokens:
                share.between_steps = later
            elif later != share.between_steps:
                found = 0
            share.tokens.append(found)
            reached += found
        self._shares[sequence.request_id] = share
        return reached - num_computed_tokens, share.between_steps

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
            share.loading = {i for i, tokens in enumerate(share.tokens) if tokens}
        else:
            self._loaded[sequence.request_id] = share.tokens
        reached = share.start
        for member, tokens in zip(self._members, share.tokens, strict=True):
            reached += tokens
            covered = block_ids[: -(-reached // self._block_size)] if tokens else block_ids
            member.update_state_after_alloc(sequence, covered, tokens)

    def num_cached_tokens(self, sequence: "Sequence", num_loaded_tokens: int) -> int:
        cached, left = 0, num_loaded_tokens
        for member, tokens in zip(
            self._members, self._loaded.pop(sequence.request_id, ()), strict=False
        ):
            share = min(left, tokens)
            left -= share
            cached += member.num_cached_tokens(sequence, share) if share else 0
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
        events: dict[str, int] = {}
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
                self._failed |= share.failed
                del self._shares[request_id]
                if share.between_steps:
                    loaded.add(request_id)
                    self._loaded[request_id] = share.tokens
        return sent, loaded

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
