"""What rank 0 and its ranks say to each other, over a socket of this machine.

First JSON: the rank's settings one way, whether it loaded the other. Then, from rank 0 only, its
orders: a step or a move of blocks, each as its sizes, then all its integers. A move is answered,
again in JSON. Nothing of it can run code when read.
"""

import json
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from common.engine.batch import Batch, single_rows

_LENGTH = struct.Struct("<I")
# What kind of order it is, then four sizes: of a step its tokens, sequences, width of the block
# table and logit rows; of a move its first layer, the one after its last, and its blocks.
_HEAD = struct.Struct("<5Q")
_STEP, _OUT, _IN = range(3)


@dataclass(frozen=True, slots=True)
class Move:
    """Some layers of some blocks, each rank's heads of them, between its cache and its room.

    into_cache  from the room into the cache; False: out of the cache
    """

    into_cache: bool
    layers: range
    block_ids: Sequence[int]


def send_json(peer: socket.socket, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    peer.sendall(_LENGTH.pack(len(body)) + body)


def receive_json(peer: socket.socket) -> dict[str, Any] | None:
    """None: the peer is gone."""
    head = _receive(peer, _LENGTH.size)
    body = None if head is None else _receive(peer, _LENGTH.unpack(head)[0])
    return None if body is None else json.loads(body)


def encode_order(order: Batch | Move) -> bytes:
    """An order's message."""
    if isinstance(order, Batch):
        return _encode_step(order)
    kind, layers = _IN if order.into_cache else _OUT, order.layers
    head = _HEAD.pack(kind, layers.start, layers.stop, len(order.block_ids), 0)
    return head + torch.tensor(order.block_ids, dtype=torch.int64).numpy().tobytes()


def _encode_step(batch: Batch) -> bytes:
    integers = torch.cat(
        (
            batch.token_ids,
            batch.positions,
            batch.slot_mapping,
            torch.tensor((*batch.query_start, *batch.context_len)),
            batch.block_table.flatten(),
            batch.logit_rows,
        )
    )
    sizes = _HEAD.pack(
        _STEP,
        len(batch.token_ids),
        len(batch.context_len),
        batch.block_table.shape[1],
        len(batch.logit_rows),
    )
    return sizes + integers.numpy().tobytes()


def receive_order(peer: socket.socket) -> Batch | Move | None:
    """The next step's batch, or a move of blocks; None: the peer is gone."""
    head = _receive(peer, _HEAD.size)
    if head is None:
        return None
    kind, *sizes = _HEAD.unpack(head)
    return _receive_step(peer, *sizes) if kind == _STEP else _receive_move(peer, kind, *sizes)


def _receive_move(peer: socket.socket, kind: int, first: int, end: int, count: int, _: int) -> Any:
    body = _receive(peer, 8 * count)
    if body is None:
        return None
    return Move(kind == _IN, range(first, end), memoryview(body).cast("q").tolist())


def _receive_step(
    peer: socket.socket, tokens: int, sequences: int, width: int, logits: int
) -> Batch | None:
    counts = (tokens, tokens, tokens, sequences + 1, sequences, sequences * width, logits)
    body = _receive(peer, 8 * sum(counts))
    if body is None:
        return None
    ids, positions, slots, starts, contexts, table, rows = torch.frombuffer(
        body, dtype=torch.int64
    ).split(counts)
    batch = Batch(
        token_ids=ids,
        positions=positions,
        slot_mapping=slots,
        query_start=tuple(starts.tolist()),
        context_len=tuple(contexts.tolist()),
        block_table=table.view(sequences, width).int(),
        logit_rows=rows,
    )
    return replace(batch, last=single_rows(batch))


def _receive(peer: socket.socket, count: int) -> bytearray | None:
    buffer = bytearray(count)
    view = memoryview(buffer)
    while view:
        try:
            got = peer.recv_into(view)
        except ConnectionError:
            return None
        if got == 0:
            return None
        view = view[got:]
    return buffer
