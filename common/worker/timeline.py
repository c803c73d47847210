"""When a request was admitted, first scheduled and computed: what its spans are made of."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.kv.connector import KVCaches, KVConnector

if TYPE_CHECKING:
    from common.engine.sequence import Sequence, StepPlan


@dataclass(slots=True)
class Timeline:
    """Times are time.time_ns(), 0 where the request never got there. Written on the engine's
    thread, read after the request's last output.

    prefill_reason  `handed_over`, or why the prompt was prefilled where it is decoded
    start_tokens    tokens that had KV when the sequence was first scheduled
    """

    submitted_ns: int
    admitted_ns: int = 0
    scheduled_ns: int = 0
    computed_ns: int = 0
    prefill_reason: str = ""
    start_tokens: int = 0

    def note_prefill(self, why: str) -> None:
        self.prefill_reason = why


def now_ns() -> int:
    # Spans are compared across machines, so this is the wall clock, not the monotonic one.
    return time.time_ns()


class ForwardingConnector(KVConnector):
    """Passes every call to `inner`."""

    def __init__(self, inner: KVConnector) -> None:
        self._inner = inner

    def get_num_new_matched_tokens(
        self, sequence: "Sequence", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._inner.get_num_new_matched_tokens(sequence, num_computed_tokens)

    def update_state_after_alloc(
        self, sequence: "Sequence", block_ids: list[int], num_external_tokens: int
    ) -> None:
        self._inner.update_state_after_alloc(sequence, block_ids, num_external_tokens)

    def num_cached_tokens(self, sequence: "Sequence", loaded_tokens: int) -> int:
        return self._inner.num_cached_tokens(sequence, loaded_tokens)

    def build_connector_meta(self, plan: "StepPlan | None") -> Any:
        return self._inner.build_connector_meta(plan)

    def request_finished(self, sequence: "Sequence", block_ids: list[int]) -> bool:
        return self._inner.request_finished(sequence, block_ids)

    def take_events(self) -> dict[str, int]:
        return self._inner.take_events()

    def open_handoffs(self) -> int:
        return self._inner.open_handoffs()

    def register_kv_caches(self, caches: KVCaches) -> None:
        self._inner.register_kv_caches(caches)

    def start_load_kv(self, meta: Any) -> None:
        self._inner.start_load_kv(meta)

    def wait_for_layer_load(self, layer: int) -> None:
        self._inner.wait_for_layer_load(layer)

    def save_kv_layer(self, layer: int) -> None:
        self._inner.save_kv_layer(layer)

    def wait_for_save(self) -> None:
        self._inner.wait_for_save()

    def get_finished(self, finished_request_ids: set[str]) -> tuple[set[str], set[str]]:
        return self._inner.get_finished(finished_request_ids)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._inner.get_block_ids_with_load_errors()

    def shutdown(self) -> None:
        self._inner.shutdown()


class TimedConnector(ForwardingConnector):
    """Notes times in the Timeline that `request.trace` holds.

    The connector API is where the engine tells others of each admission, step and end, so the
    engine needs no clock for this.
    """

    def update_state_after_alloc(
        self, sequence: "Sequence", block_ids: list[int], num_external_tokens: int
    ) -> None:
        timeline = _timeline(sequence)
        if timeline is not None and not timeline.admitted_ns:
            timeline.admitted_ns = now_ns()
        super().update_state_after_alloc(sequence, block_ids, num_external_tokens)

    def build_connector_meta(self, plan: "StepPlan | None") -> Any:
        for sequence, start in zip(plan.sequences, plan.start, strict=True) if plan else ():
            timeline = _timeline(sequence)
            if timeline is not None and not timeline.scheduled_ns:
                timeline.scheduled_ns = now_ns()
                timeline.start_tokens = start
        return super().build_connector_meta(plan)

    def request_finished(self, sequence: "Sequence", block_ids: list[int]) -> bool:
        timeline = _timeline(sequence)
        if timeline is not None:
            timeline.computed_ns = now_ns()
        return super().request_finished(sequence, block_ids)


def _timeline(sequence: "Sequence") -> Timeline | None:
    trace = sequence.request.trace
    return trace if isinstance(trace, Timeline) else None
