"""The connector to the kvstore service: loads prompts' blocks from it, saves full blocks to it.

The store may be slow, wrong or gone: a lookup that takes too long is a miss, a block whose key or
checksum is not what was asked for is not used, a save that finds no room is dropped and counted.
"""

import asyncio
import collections
import hashlib
from collections.abc import Sequence as Many
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from common.engine.sequence import Phase
from common.errors import BatonError, HandoffError, WireError
from common.kv.budget import ByteBudget
from common.kv.connector import KVCaches, KVConnector
from common.kv.connectors.copies import arrived
from common.kv.connectors.pages import write_page
from common.kv.connectors.store_client import StoreClient
from common.kv.keys import chain_keys
from common.kv.wire import BlockRange, decode_block, encode_block
from common.rpc.loop import LoopThread

if TYPE_CHECKING:
    from common.engine.sequence import Sequence, StepPlan

log = structlog.get_logger("store")

# Keys that are known to be in a store and are not sent again.
MAX_KNOWN_KEYS = 1 << 17
SAVE_BATCH_FRAMES = 64
# At shutdown, for copies that wait to be saved.
FLUSH_S = 5.0


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Times in seconds, sizes in bytes.

    lookup_timeout_s  a lookup that takes longer is a miss: the request waits for it
    load_timeout_s    blocks that have not come by then are computed
    save_timeout_s    one batch of saves
    max_loading_bytes blocks received but not yet written to pages
    max_saving_bytes  copies of blocks under way or waiting to be saved; more are dropped
    """

    lookup_timeout_s: float = 0.25
    load_timeout_s: float = 5.0
    save_timeout_s: float = 10.0
    max_loading_bytes: int = 256 * 1024 * 1024
    max_saving_bytes: int = 128 * 1024 * 1024


@dataclass(slots=True, eq=False)
class _Lookup:
    """What a store has of a request's chain; `matched` is None until the answer is here."""

    client: StoreClient
    keys: list[bytes]
    matched: int | None = None
    call: "Future[None] | None" = None


@dataclass(slots=True, eq=False)
class _Load:
    request_id: str
    client: StoreClient
    keys: list[bytes]
    block_ids: list[int]
    landed: int = 0
    call: "Future[None] | None" = None


@dataclass(frozen=True, slots=True)
class _Found:
    request_id: str
    lookup: _Lookup
    matched: int


@dataclass(frozen=True, slots=True)
class _Block:
    load: _Load
    payload: memoryview
    cost: int


@dataclass(frozen=True, slots=True)
class _LoadEnded:
    load: _Load


@dataclass(frozen=True, slots=True)
class _SavesFailed:
    keys: list[bytes]


@dataclass(frozen=True, slots=True)
class _Save:
    """A block to be saved: one of the pages of a copy that may not be here yet."""

    key: bytes
    copy: "Future[list[memoryview]]"
    page: int


@dataclass(slots=True, eq=False)
class _Saves:
    """Copies on their way to one store. Used on the loop."""

    client: StoreClient
    queue: collections.deque[_Save] = field(default_factory=collections.deque)
    task: "asyncio.Task[None] | None" = None


class StoreConnector(KVConnector):
    """Blocks from and to kvstore services.

    addresses  host:port of each; a chain of blocks stays on one store, picked by its first key
    loop       shared with other connectors; one of its own when None
    """

    def __init__(
        self,
        addresses: Many[str],
        *,
        loop: LoopThread | None = None,
        settings: StoreSettings | None = None,
    ) -> None:
        if not addresses:
            raise HandoffError("a store connector needs the address of one store at least")
        self._settings = settings or StoreSettings()
        self._owns_loop = loop is None
        self._loop = loop or LoopThread("baton-store")
        self._clients = [StoreClient(address) for address in sorted(set(addresses))]
        self._saves = {client: _Saves(client) for client in self._clients}
        self._budget = ByteBudget(self._settings.max_loading_bytes)
        self._caches: KVCaches | None = None
        self._lookups: dict[str, _Lookup] = {}
        self._loads: dict[str, _Load] = {}
        self._to_start: list[_Load] = []
        self._keys: dict[str, list[bytes]] = {}
        self._known: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self._step: list[tuple[Sequence, int, int]] = []
        self._inbox: collections.deque[_Found | _Block | _LoadEnded | _SavesFailed] = (
            collections.deque()
        )
        self._done: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._events: collections.Counter[str] = collections.Counter()
        # Bytes of copies that wait to be saved: each counter has one writer, the engine's thread
        # and the loop, so that neither needs a lock.
        self._saving_in = 0
        self._saving_out = 0

    # Scheduler side -----------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, sequence: "Sequence", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        lookup = self._lookups.get(sequence.request_id)
        if lookup is None:
            lookup = self._look_up(sequence, num_computed_tokens)
        if lookup is None:
            return 0, False
        if lookup.matched is None:
            return None, True
        size = self._need_caches().layout.block_size
        tokens = max(0, lookup.matched * size - num_computed_tokens)
        return tokens, tokens > 0

    def _look_up(self, sequence: "Sequence", computed: int) -> _Lookup | None:
        """Ask the chain's store; None when there is nothing to ask for or nobody to ask."""
        size = self._need_caches().layout.block_size
        wanted = sequence.request.prefill_tokens
        # An ordinary request needs its last prompt token computed: it gives the first logits.
        blocks = (sequence.prompt_len - 1 if wanted is None else wanted) // size
        if blocks * size <= computed:
            return None
        keys = self._chain(sequence, blocks)
        client = self._client_of(keys[0])
        lookup = _Lookup(client, keys[:blocks])
        self._lookups[sequence.request_id] = lookup
        if not client.available:
            self._events["store_lookups_skipped"] += 1
            lookup.matched = 0
            return lookup
        self._events["store_lookups"] += 1
        lookup.call = self._loop.run(self._ask(sequence.request_id, lookup))
        return lookup

    def update_state_after_alloc(
        self, sequence: "Sequence", block_ids: list[int], num_external_tokens: int
    ) -> None:
        # Whoever asks again after this wants to know what there is by then.
        lookup = self._lookups.pop(sequence.request_id, None)
        if num_external_tokens == 0 or lookup is None or not lookup.matched:
            return
        end = min(lookup.matched, len(block_ids))
        first = end - num_external_tokens // self._need_caches().layout.block_size
        load = _Load(
            sequence.request_id, lookup.client, lookup.keys[first:end], block_ids[first:end]
        )
        self._loads[sequence.request_id] = load
        self._to_start.append(load)

    def build_connector_meta(self, plan: "StepPlan | None") -> Any:
        steps = zip(plan.sequences, plan.start, plan.scheduled, strict=True) if plan else ()
        # What another connector loads within the step is not known to be good when it is over.
        self._step = [s for s in steps if plan and s[0].request_id not in plan.loading]
        starting, self._to_start = self._to_start, []
        return starting

    def request_finished(self, sequence: "Sequence", block_ids: list[int]) -> bool:
        request_id = sequence.request_id
        self._keys.pop(request_id, None)
        self._done.discard(request_id)
        for ended in (self._lookups.pop(request_id, None), self._loads.pop(request_id, None)):
            if ended is not None and ended.call is not None:
                ended.call.cancel()
        return False

    def take_events(self) -> dict[str, int]:
        events, self._events = dict(self._events), collections.Counter()
        return events

    def open_handoffs(self) -> int:
        return len(self._loads)

    # Worker side --------------------------------------------------------------------------

    def register_kv_caches(self, caches: KVCaches) -> None:
        self._caches = caches

    def start_load_kv(self, meta: Any) -> None:
        for load in meta or ():
            if self._loads.get(load.request_id) is load:
                load.call = self._loop.run(self._fetch(load))

    def wait_for_save(self) -> None:
        step, self._step = self._step, []
        size = self._need_caches().layout.block_size
        chosen: list[tuple[StoreClient, bytes, int]] = []
        for sequence, start, scheduled in step:
            first, end = start // size, (start + scheduled) // size
            # One that ended with the step before has no blocks any more.
            if end <= first or sequence.phase is Phase.FINISHED:
                continue
            keys = self._chain(sequence, end)
            client = self._client_of(keys[0])
            fresh = (i for i in range(first, end) if keys[i] not in self._known)
            chosen += [(client, keys[i], sequence.block_table[i]) for i in fresh]
        if chosen:
            self._save(chosen)

    def _save(self, chosen: list[tuple[StoreClient, bytes, int]]) -> None:
        """Copy blocks that were just computed and queue them, as many as there is room for."""
        caches = self._need_caches()
        unique = {key: (client, block) for client, key, block in chosen if client.available}
        waiting = self._saving_in - self._saving_out
        room = (self._settings.max_saving_bytes - waiting) // caches.layout.block_bytes
        kept = list(unique.items())[: max(0, room)]
        self._events["store_saves_dropped"] += len(chosen) - len(kept)
        if not kept:
            return
        copy = caches.copies.pages([block for _, (_, block) in kept])
        self._saving_in += len(kept) * caches.layout.block_bytes
        for page, (key, (client, _)) in enumerate(kept):
            self._remember(key)
            self._loop.call_soon(self._enqueue, self._saves[client], _Save(key, copy, page))

    def get_finished(self, finished_request_ids: set[str]) -> tuple[set[str], set[str]]:
        given_back = 0
        for _ in range(len(self._inbox)):
            match self._inbox.popleft():
                case _Found(request_id, lookup, matched):
                    self._on_found(request_id, lookup, matched)
                case _Block() as block:
                    given_back += block.cost
                    self._land(block)
                case _LoadEnded(load):
                    self._on_load_ended(load)
                case _SavesFailed(keys):
                    self._events["store_saves_dropped"] += len(keys)
                    for key in keys:
                        self._known.pop(key, None)
        if given_back:
            self._loop.call_soon(self._budget.give, given_back)
        done, self._done = self._done, set()
        return set(), done

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def shutdown(self) -> None:
        for load in self._loads.values():
            if load.call is not None:
                load.call.cancel()
        if not self._loop.closed:
            self._loop.run(self._close()).result(timeout=10.0)
        if self._owns_loop:
            self._loop.close()

    async def _close(self) -> None:
        """What waits to be saved is: the next worker of these requests finds it in the store."""
        tasks = [saves.task for saves in self._saves.values() if saves.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=FLUSH_S)
        for client in self._clients:
            await client.close()

    # What came in, on the engine's thread ---------------------------------------------------

    def _on_found(self, request_id: str, lookup: _Lookup, matched: int) -> None:
        if self._lookups.get(request_id) is not lookup:
            return
        lookup.matched = matched
        self._events["store_blocks_found"] += matched
        for key in lookup.keys[:matched]:
            self._remember(key)
        # The store lost them, or never had them: they are worth saving again.
        for key in lookup.keys[matched:]:
            self._known.pop(key, None)

    def _land(self, block: _Block) -> None:
        load = block.load
        if self._loads.get(load.request_id) is not load:
            self._events["store_blocks_late"] += 1
            return
        write_page(self._need_caches().cache, load.block_ids[load.landed], block.payload)
        load.landed += 1
        self._events["store_blocks_loaded"] += 1

    def _on_load_ended(self, load: _Load) -> None:
        if self._loads.get(load.request_id) is not load:
            return
        del self._loads[load.request_id]
        missing = load.block_ids[load.landed :]
        if missing:
            self._events["store_blocks_lost"] += len(missing)
            self._failed_blocks.update(missing)
        self._done.add(load.request_id)

    # Calls, on the loop -------------------------------------------------------------------

    async def _ask(self, request_id: str, lookup: _Lookup) -> None:
        matched = 0
        try:
            matched = await lookup.client.lookup(lookup.keys, self._settings.lookup_timeout_s)
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            log.warning("store_lookup_failed", store=lookup.client.address, error=_short(error))
        finally:
            self._tell(_Found(request_id, lookup, matched))

    async def _fetch(self, load: _Load) -> None:
        try:
            async with asyncio.timeout(self._settings.load_timeout_s):
                await self._receive(load)
        except (grpc.aio.AioRpcError, TimeoutError, WireError) as error:
            log.warning("store_load_failed", store=load.client.address, error=_short(error))
        finally:
            self._tell(_LoadEnded(load))

    async def _receive(self, load: _Load) -> None:
        layout = self._need_caches().layout
        whole = BlockRange.whole(layout)
        expected = iter(load.keys)
        async for frame in load.client.get(load.keys, self._settings.load_timeout_s):
            block = decode_block(frame, layout.block_bytes)
            key = next(expected, None)
            if (block.key, block.range, block.token_count) != (key, whole, layout.block_size):
                raise WireError(f"the store sent block {block.key.hex()}, which was not asked for")
            if len(block.payload) != layout.block_bytes:
                raise WireError(f"the store sent a block of {len(block.payload)} bytes")
            await self._budget.take(len(frame))
            self._tell(_Block(load, block.payload, len(frame)))

    def _enqueue(self, saves: _Saves, save: _Save) -> None:
        saves.queue.append(save)
        if saves.task is None:
            saves.task = asyncio.get_running_loop().create_task(self._flush(saves))

    async def _flush(self, saves: _Saves) -> None:
        """Send what waits for one store, in batches, then end."""
        try:
            while saves.queue:
                count = min(SAVE_BATCH_FRAMES, len(saves.queue))
                batch = [saves.queue.popleft() for _ in range(count)]
                try:
                    await self._put(saves.client, batch)
                finally:
                    self._saving_out += count * self._need_caches().layout.block_bytes
        finally:
            saves.task = None

    async def _put(self, client: StoreClient, batch: list[_Save]) -> None:
        layout, held = self._need_caches().layout, 0
        whole = BlockRange.whole(layout)
        try:
            pages = [(save.key, (await arrived(save.copy))[save.page]) for save in batch]
            frames = (encode_block(key, whole, layout.block_size, page) for key, page in pages)
            if client.available:
                held = await client.put(frames, self._settings.save_timeout_s)
        except (grpc.aio.AioRpcError, BatonError) as error:
            log.warning("store_save_failed", store=client.address, error=_short(error))
        if held < len(batch):
            self._tell(_SavesFailed([save.key for save in batch[held:]]))

    def _tell(self, event: "_Found | _Block | _LoadEnded | _SavesFailed") -> None:
        self._inbox.append(event)
        self._need_caches().wake()

    # Keys ---------------------------------------------------------------------------------

    def _chain(self, sequence: "Sequence", blocks: int) -> list[bytes]:
        """Keys of the sequence's first `blocks` full blocks at least."""
        if len(sequence.block_keys) >= blocks:
            return sequence.block_keys
        keys = self._keys.get(sequence.request_id, [])
        if len(keys) < blocks:
            caches = self._need_caches()
            size = caches.layout.block_size
            tokens = sequence.token_ids[: blocks * size]
            tenant = sequence.request.tenant
            keys = chain_keys(tokens, size, caches.fingerprint, tenant, keys)
            self._keys[sequence.request_id] = keys
        return keys

    def _client_of(self, first_key: bytes) -> StoreClient:
        """Rendezvous hashing: a store that comes or goes moves only its own chains."""
        if len(self._clients) == 1:
            return self._clients[0]
        return max(
            self._clients,
            key=lambda c: hashlib.blake2b(first_key + c.address.encode(), digest_size=8).digest(),
        )

    def _remember(self, key: bytes) -> None:
        self._known[key] = None
        self._known.move_to_end(key)
        if len(self._known) > MAX_KNOWN_KEYS:
            self._known.popitem(last=False)

    def _need_caches(self) -> KVCaches:
        if self._caches is None:
            raise HandoffError("the connector was used before register_kv_caches")
        return self._caches


def _short(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
