"""A KV connector to a plain folder: each full block is a file named after its key, so that all
workers that see the folder share their KV. Nothing blocks the engine's thread: a small pool reads
and writes the files, and what it found waits in a queue for the engine's next turn.
"""

import collections
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from baton import kv
from common.errors import ConfigError, WireError

MAX_WAITING_SAVES = 256  # of blocks; more are dropped: nobody is owed a save


def make(context: kv.ConnectorContext) -> "FolderConnector":
    """The entry point: `--kv-connectors folder:/mnt/kv,handoff`."""
    if not context.argument:
        raise ConfigError("folder needs a path: --kv-connectors folder:/mnt/kv,handoff")
    return FolderConnector(Path(context.argument))


class FolderConnector(kv.KVConnector):
    """`_look`, `_read` and `_write` run in the pool, everything else on the engine's thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="folder-kv")
        self._room = threading.Semaphore(MAX_WAITING_SAVES)
        self._inbox: collections.deque[Callable[[], None]] = collections.deque()
        self._found: dict[str, int | None] = {}  # by request: blocks there are; None: not known yet
        self._loads: dict[str, list[int]] = {}  # by request: the pages that are being loaded
        self._to_start: list[tuple[Any, ...]] = []
        self._step: list[tuple[kv.Sequence, int, int]] = []
        self._done, self._failed = set[str](), set[int]()

    def register_kv_caches(self, caches: kv.KVCaches) -> None:
        self._caches, self._size = caches, caches.layout.block_size

    def get_num_new_matched_tokens(
        self, sequence: kv.Sequence, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        # The last token of an ordinary prompt must be computed: its logits are wanted.
        prefill = sequence.request.prefill_tokens
        blocks = (sequence.prompt_len - 1 if prefill is None else prefill) // self._size
        if blocks * self._size <= num_computed_tokens:
            return 0, False
        if sequence.request_id not in self._found:
            self._found[sequence.request_id] = None
            self._pool.submit(self._look, sequence.request_id, self._keys(sequence, blocks))
        found = self._found[sequence.request_id]
        return None if found is None else max(0, found * self._size - num_computed_tokens), True

    def update_state_after_alloc(
        self, sequence: kv.Sequence, block_ids: list[int], num_external_tokens: int
    ) -> None:
        end = self._found.pop(sequence.request_id, None)
        if end and num_external_tokens:
            end = min(end, len(block_ids))
            first = end - num_external_tokens // self._size
            pages = self._loads[sequence.request_id] = block_ids[first:end]
            self._to_start.append((sequence.request_id, self._keys(sequence, end)[first:], pages))

    def build_connector_meta(self, plan: kv.StepPlan | None) -> Any:
        rows = zip(plan.sequences, plan.start, plan.scheduled, strict=True) if plan else ()
        self._step = [row for row in rows if plan and row[0].request_id not in plan.loading]

    def start_load_kv(self, meta: Any) -> None:
        starting, self._to_start = self._to_start, []
        for load in starting:
            self._pool.submit(self._read, *load)

    def wait_for_save(self) -> None:
        step, self._step = self._step, []
        for sequence, start, count in step:
            if sequence.phase is kv.Phase.FINISHED:
                continue  # it ended with the step before: it has no pages any more
            first, end = start // self._size, (start + count) // self._size
            kept = [i for i in range(first, end) if self._room.acquire(blocking=False)]
            if kept:
                # Of a GPU's pages the bytes come later: the pool waits for them.
                copy = self._caches.copies.pages([sequence.block_table[i] for i in kept])
                keys = self._keys(sequence, end)
                for page, i in enumerate(kept):
                    self._pool.submit(self._write, keys[i], copy, page)

    def get_finished(self, finished_request_ids: set[str]) -> tuple[set[str], set[str]]:
        for _ in range(len(self._inbox)):
            self._inbox.popleft()()
        done, self._done = self._done, set()
        return set(), done

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def request_finished(self, sequence: kv.Sequence, block_ids: list[int]) -> bool:
        self._found.pop(sequence.request_id, None)
        self._loads.pop(sequence.request_id, None)
        return False  # what is saved was copied: the blocks need not be kept

    def shutdown(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _landed(self, request_id: str, pages: list[int], payloads: list[memoryview]) -> None:
        if self._loads.get(request_id) is not pages:
            return  # it was aborted: the pages may be somebody else's by now
        del self._loads[request_id]
        for page, payload in zip(pages, payloads, strict=False):
            kv.write_page(self._caches.cache, page, payload)
        self._failed.update(pages[len(payloads) :])
        self._done.add(request_id)

    def _keys(self, sequence: kv.Sequence, blocks: int) -> list[bytes]:
        tokens = sequence.token_ids[: blocks * self._size]
        return kv.chain_keys(tokens, self._size, self._caches.fingerprint, sequence.request.tenant)

    def _look(self, request_id: str, keys: list[bytes]) -> None:
        missing = (i for i, key in enumerate(keys) if not (self._folder / key.hex()).exists())
        found = next(missing, len(keys))
        self._tell(lambda: request_id in self._found and self._found.update({request_id: found}))

    def _read(self, request_id: str, keys: list[bytes], pages: list[int]) -> None:
        payloads: list[memoryview] = []
        for key in keys:
            try:
                block = kv.decode_block((self._folder / key.hex()).read_bytes())
            except (OSError, WireError):
                break  # missing, damaged or not readable: computed instead
            if block.key != key or len(block.payload) != self._caches.layout.block_bytes:
                break
            payloads.append(block.payload)
        self._tell(lambda: self._landed(request_id, pages, payloads))

    def _write(self, key: bytes, copy: Future[list[memoryview]], page: int) -> None:
        path = self._folder / key.hex()
        try:
            payload = copy.result()[page]
            if not path.exists():
                partial = path.with_suffix(f".{threading.get_native_id()}")
                whole = kv.BlockRange.whole(self._caches.layout)
                partial.write_bytes(kv.encode_block(key, whole, self._size, payload))
                partial.replace(path)  # nobody ever sees half a file
        finally:
            self._room.release()

    def _tell(self, action: Callable[[], Any]) -> None:
        self._inbox.append(action)
        self._caches.wake()
