"""The KV connector API: how blocks come from elsewhere and go elsewhere.

One class with two sides and the method names that authors of vLLM connectors know. Every method
is called on the engine's thread, between steps or around one, and must not block: a connector does
its input and output on threads or loops of its own, and calls `wake` when there is something to
collect. Because pages are written on the engine's thread only, after the connector has checked that
their owner still lives, bytes that arrive late cannot land in a page that was given away.

Order of calls in one turn of the engine:
  get_finished, get_block_ids_with_load_errors      collect what arrived and what failed
  get_num_new_matched_tokens, update_state_after_alloc   for each sequence that asks to be admitted
  build_connector_meta, start_load_kv               begin loads, tell the worker side of the step
  wait_for_layer_load, save_kv_layer                around each layer (a connector may ignore them)
  request_finished                                  of sequences that the step before has ended
  wait_for_save                                     the step's KV is in the pages
  request_finished                                  before the blocks of a sequence are released

Where the engine steps ahead (`async_scheduling`), a step is begun before the tokens of the one
before it are known. Until its `wait_for_save` the last of a sequence's token_ids may be
UNKNOWN_TOKEN, and the sequence may end: it is FINISHED then and has no blocks, and what the step
computed for it is nobody's. In `wait_for_save`, in `request_finished` and where a sequence asks to
be admitted all tokens are known.

On a GPU a step may be under way whenever one of these is called. What is put on the current stream
of the engine's thread, as all of pages.py and copies.py is, comes after it: a copy holds what the
step wrote, and a page that was given to another is written after its last owner's step. A connector
that moves bytes in another way waits for an event that it recorded on that stream.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.kv.layout import KVLayout

if TYPE_CHECKING:
    from common.engine.sequence import Sequence, StepPlan
    from common.kv.connectors.copies import HostCopies
    from common.kv.connectors.pages import Pages


@dataclass(frozen=True, slots=True)
class KVCaches:
    """What a connector may touch: `cache` are the pages, which the functions of
    common/kv/connectors/pages.py read and write as uint8 `[num_blocks, block_bytes]`, wherever they
    are, and of which `copies` makes copies that nobody waits for; `fingerprint` identifies whose KV
    it is; `wake()` may be called from any thread."""

    cache: "Pages"
    layout: KVLayout
    fingerprint: bytes
    wake: Callable[[], None]
    copies: "HostCopies"


class KVConnector:
    """Base of all connectors: does nothing, which is a correct connector."""

    # Scheduler side -----------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, sequence: "Sequence", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens beyond `num_computed_tokens` (a multiple of the block size) that can be loaded,
        and whether loading happens between steps (True: the sequence waits in LOADING until
        get_finished names it). None: not known yet, ask again after the next wake."""
        return 0, False

    def update_state_after_alloc(
        self, sequence: "Sequence", block_ids: list[int], num_external_tokens: int
    ) -> None:
        """`block_ids` is the sequence's block table; the last `num_external_tokens` of the tokens
        it covers are to be loaded, 0 for none. They are all that the connector said it can load
        or, where another connector failed and there are blocks for no more, the first of them:
        then they end where `block_ids` ends, with a whole block."""

    def num_cached_tokens(self, sequence: "Sequence", num_loaded_tokens: int) -> int:
        """Of the tokens that were just loaded, those that a cache held, as opposed to those that
        somebody computed for this very request. Told to the user as cached."""
        return num_loaded_tokens

    def build_connector_meta(self, plan: "StepPlan | None") -> Any:
        """What the worker side needs for this step; None plan when only loads are pending. The
        last token of a sequence may be UNKNOWN_TOKEN."""
        return None

    def request_finished(self, sequence: "Sequence", block_ids: list[int]) -> bool:
        """The sequence ended or was aborted. True: keep its blocks until get_finished names it
        among those done sending."""
        return False

    def take_events(self) -> dict[str, int]:
        """Counters since the last call, by name."""
        return {}

    def open_handoffs(self) -> int:
        """Transfers under way."""
        return 0

    # Worker side --------------------------------------------------------------------------

    def register_kv_caches(self, caches: KVCaches) -> None:
        """Called once, before any other method."""

    def start_load_kv(self, meta: Any) -> None:
        """Begin the loads of this step."""

    def wait_for_layer_load(self, layer: int) -> None:
        """Before a layer reads its KV. Of several ranks none has read any layer then; it is called
        again before rank 0 reads this one."""

    def save_kv_layer(self, layer: int) -> None:
        """After a layer's KV of this step is in the pages, that of all ranks; after the whole step
        where other layers' pages cannot be read within it (graphs, ranks with private caches)."""

    def wait_for_save(self) -> None:
        """After the step: everything to be saved was copied or is held by request_finished. Those
        of its sequences that are FINISHED have no blocks any more."""

    def get_finished(self, finished_request_ids: set[str]) -> tuple[set[str], set[str]]:
        """Ids of the requests done sending and of those done loading since the last call."""
        return set(), set()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks whose load failed since the last call; their requests are also among those done
        loading, and the engine recomputes from the first failed block on."""
        return set()

    def shutdown(self) -> None:
        """Release everything. Called once, with no request left."""
