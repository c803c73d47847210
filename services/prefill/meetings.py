"""The decode workers that a prefill worker has met: their KV fits, a test transfer went well."""

import collections
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from baton.v1 import worker_pb2 as pb
from common.errors import BatonError, ConfigError, InvalidRequest
from common.kv.connectors.peers import NOT_MET
from common.kv.layout import block_sizes_fit
from common.kv.wire import ENVELOPE_VERSION
from common.rpc.discovery import parse_addresses

log = structlog.get_logger("prefill")

MAX_TEXT = 256
MAX_MET = 512
REMEDY = (
    "KV is handed over only between workers of the same version, with the same model, --kv-dtype, "
    "--quantization, --batch-invariant, --rotate-qk and --fp8-attention, of whose --block-size one "
    "divides the other"
)


@dataclass(frozen=True, slots=True)
class Met:
    """A decode worker's process. `block_size` is in tokens."""

    worker_id: str
    incarnation: str
    data_address: str
    block_size: int
    test_transfer_ms: float


class Meetings:
    """Who was met, by incarnation. Used on the event loop.

    card   what this worker serves
    probe  a test transfer to a data address, in seconds. Raises HandoffError
    """

    def __init__(
        self, card: Callable[[], pb.ModelCard], probe: Callable[[str], Awaitable[float]]
    ) -> None:
        self._card = card
        self._probe = probe
        self._met: collections.OrderedDict[str, Met] = collections.OrderedDict()
        # The last failure by data address, until the worker there is met.
        self._failed: collections.OrderedDict[str, pb.Peer] = collections.OrderedDict()

    def met(self, incarnation: str) -> Met:
        """Raises InvalidRequest, with code `not_met`, for a process that was not met."""
        met = self._met.get(incarnation)
        if met is None:
            raise InvalidRequest(
                f"this prefill worker has not met the decode worker's process {incarnation!r}; "
                "call Meet first, and again after either of them restarted",
                field="handoff.incarnation",
                code=NOT_MET,
            )
        self._met.move_to_end(incarnation)
        return met

    async def meet(self, request: pb.MeetRequest) -> Met:
        """Compare, transfer, remember. Raises InvalidRequest for a worker that does not fit, and
        HandoffError where the test transfer fails."""
        _check_texts(request)
        try:
            check_fit(request, self._card())
            seconds = await self._probe(request.data_address)
        except BatonError as error:
            self._fail(request, error)
            raise
        met = Met(
            request.worker_id,
            request.incarnation,
            request.data_address,
            request.model.block_size,
            round(seconds * 1000, 3),
        )
        # One process listens at an address: who was met there before is gone.
        for old in [m for m in self._met.values() if m.data_address == met.data_address]:
            del self._met[old.incarnation]
        self._met[met.incarnation] = met
        self._failed.pop(met.data_address, None)
        while len(self._met) > MAX_MET:
            self._met.popitem(last=False)
        log.info("peer_met", peer=met.data_address, worker=met.worker_id, ms=met.test_transfer_ms)
        return met

    def describe(self) -> list[pb.Peer]:
        """For /debug/state."""
        met = [
            pb.Peer(
                address=m.data_address,
                worker_id=m.worker_id,
                incarnation=m.incarnation,
                status="met",
                test_transfer_ms=m.test_transfer_ms,
            )
            for m in self._met.values()
        ]
        return [*met, *self._failed.values()]

    def _fail(self, request: pb.MeetRequest, error: BatonError) -> None:
        status = "refused" if isinstance(error, InvalidRequest) else "unreachable"
        address = request.data_address
        before = self._failed.pop(address, None)
        self._failed[address] = pb.Peer(
            address=address,
            worker_id=request.worker_id,
            incarnation=request.incarnation,
            status=status,
            error=str(error),
        )
        if len(self._failed) > MAX_MET:
            self._failed.popitem(last=False)
        if before is None or before.error != str(error):
            log.error(f"peer_{status}", peer=address, error=str(error))


def check_fit(theirs: pb.MeetRequest, own: pb.ModelCard) -> None:
    """Raises InvalidRequest, with both values, when the KV of two workers is not the same, or
    cannot be cut from the blocks of one into those of the other."""
    model, size = theirs.model, theirs.model.block_size
    if not block_sizes_fit(size, own.block_size):
        raise _mismatch("block_size", size, own.block_size)
    for field, wanted, here in (
        ("frame_version", theirs.frame_version, ENVELOPE_VERSION),
        ("kv_dtype", model.kv_dtype, own.kv_dtype),
        # What this worker's KV takes in blocks of their size.
        ("block_bytes", model.block_bytes, own.block_bytes * size // own.block_size),
        ("fingerprint", model.fingerprint.hex(), own.fingerprint.hex()),
    ):
        if wanted != here:
            raise _mismatch(field, wanted, here)


def _mismatch(field: str, wanted: int | str, here: int | str) -> InvalidRequest:
    return InvalidRequest(
        f"the decode worker's {field} is {wanted!r}, this prefill worker's is {here!r}; {REMEDY}",
        field=f"model.{field}",
        code="model_mismatch",
    )


def _check_texts(request: pb.MeetRequest) -> None:
    for field in ("worker_id", "incarnation", "data_address"):
        if not 0 < len(getattr(request, field)) <= MAX_TEXT:
            raise InvalidRequest(f"{field} must have 1 to {MAX_TEXT} characters", field=field)
    try:
        addresses = parse_addresses(request.data_address)
    except ConfigError as error:
        raise InvalidRequest(f"data_address: {error}", field="data_address") from error
    if len(addresses) != 1:
        raise InvalidRequest(
            f"data_address is {request.data_address!r}; it must be one host:port",
            field="data_address",
        )
