"""Which decode worker gets a request, and which prefill workers it may ask: pure decisions.

The cost of a worker is in tokens of work before this request's first token: what waits there, the
part of the prompt that is not in its prefix cache, and a share for every request that it runs.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from common.errors import Overloaded, Unavailable
from common.kv.layout import block_sizes_fit
from services.gateway.worker_state import WorkerState

# A request under way slows another about as much as this many prompt tokens to be computed.
REQUEST_COST_TOKENS = 64
MAX_PREFILL_CANDIDATES = 4
# About what one worker's cache holds; forgetting a key costs a prefix hit, nothing else.
MAX_INDEX_KEYS = 65_536
MAX_OWNERS = 4


class PrefixIndex:
    """Which workers were lately given a prompt with a block key: where its KV probably is."""

    def __init__(self, max_keys: int = MAX_INDEX_KEYS) -> None:
        self._max_keys = max_keys
        self._owners: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._owners)

    def record(self, keys: Iterable[bytes], address: str) -> None:
        """`address` now holds these blocks; its claim is the freshest."""
        for key in keys:
            others = tuple(o for o in self._owners.get(key, ()) if o != address)
            self._owners[key] = (address, *others)[:MAX_OWNERS]
            self._owners.move_to_end(key)
        while len(self._owners) > self._max_keys:
            self._owners.popitem(last=False)

    def matched_blocks(self, keys: Sequence[bytes]) -> dict[str, int]:
        """For each worker the length of the run of keys, from the first on, that it holds."""
        matched: dict[str, int] = {}
        for count, key in enumerate(keys):
            holding = [o for o in self._owners.get(key, ()) if matched.get(o, 0) == count]
            if not holding:
                break
            matched.update(dict.fromkeys(holding, count + 1))
        return matched


@dataclass(frozen=True, slots=True)
class Route:
    """`decode` owns the request; `prefill` may be asked, best first; `matched_tokens` is how much
    of the prompt the decode worker is expected to have."""

    decode: WorkerState
    prefill: tuple[WorkerState, ...]
    matched_tokens: int

    @property
    def candidates(self) -> tuple[str, ...]:
        """Addresses of the prefill workers."""
        return tuple(worker.address for worker in self.prefill)


def choose_route(
    decode: Collection[WorkerState],
    prefill: Collection[WorkerState],
    *,
    own_requests: Mapping[str, int],
    matched_blocks: Mapping[str, int],
    prompt_tokens: int,
    avoid: Collection[str] = (),
) -> Route:
    """The cheapest decode worker that has room, and the cheapest prefill workers whose KV it can
    take: those of its model, of a block size that fits its own.

    decode, prefill  usable workers (ready, of the served model)
    own_requests     this gateway's requests on each address: newer than the polled state
    matched_blocks   blocks, each of its own size, of the prompt that an address probably holds
    avoid            addresses that just failed this request: used only when nobody else is left

    Raises Unavailable when there is no decode worker and Overloaded when all are full.
    """
    if not decode:
        raise Unavailable("no decode worker is ready; see /debug/state for the state of each")
    # The worker itself refuses what came since the last poll and does not fit.
    having_room = [w for w in decode if w.max_waiting == 0 or w.waiting < w.max_waiting]
    if not having_room:
        raise Overloaded(
            f"all {len(decode)} decode workers are full; try again later", retry_after_s=1.0
        )
    preferred = [w for w in having_room if w.address not in avoid] or having_room

    def cost(worker: WorkerState) -> tuple[int, str]:
        matched = matched_blocks.get(worker.address, 0) * worker.block_size
        requests = max(worker.running + worker.waiting, own_requests.get(worker.address, 0))
        uncached = max(1, prompt_tokens - matched)
        tokens = worker.tokens_waiting + uncached + REQUEST_COST_TOKENS * requests
        return tokens, worker.address

    chosen = min(preferred, key=cost)
    fitting = [
        w
        for w in prefill
        if w.fingerprint == chosen.fingerprint and block_sizes_fit(w.block_size, chosen.block_size)
    ]
    ordered = sorted(fitting, key=cost)[:MAX_PREFILL_CANDIDATES]
    return Route(
        decode=chosen,
        prefill=tuple(ordered),
        matched_tokens=min(
            prompt_tokens, matched_blocks.get(chosen.address, 0) * chosen.block_size
        ),
    )
