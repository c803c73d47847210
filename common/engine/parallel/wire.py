"""What rank 0 and its ranks say to each other, over a socket of this machine.

First JSON: the rank's settings one way, whether it loaded the other. Then, from rank 0 only, one
message a step: the batch's sizes, then all its integers. Nothing of it can run code when read.
"""

import json
import socket
import struct
from typing import Any

import torch

from common.engine.batch import Batch

_LENGTH = struct.Struct("<I")
# Tokens, sequences, width of the block table, logit rows.
_SIZES = struct.Struct("<4Q")


def send_json(peer: socket.socket, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    peer.sendall(_LENGTH.pack(len(body)) + body)


def receive_json(peer: socket.socket) -> dict[str, Any] | None:
    """None: the peer is gone."""
    head = _receive(peer, _LENGTH.size)
    body = None if head is None else _receive(peer, _LENGTH.unpack(head)[0])
    return None if body is None else json.loads(body)


def encode_batch(batch: Batch) -> bytes:
    """A step's message."""
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
    sizes = _SIZES.pack(
        len(batch.token_ids),
        len(batch.context_len),
        batch.block_table.shape[1],
        len(batch.logit_rows),
    )
    return sizes + integers.numpy().tobytes()


def receive_batch(peer: socket.socket) -> Batch | None:
    """The next step's batch; None: the peer is gone."""
    head = _receive(peer, _SIZES.size)
    if head is None:
        return None
    tokens, sequences, width, logits = _SIZES.unpack(head)
    counts = (tokens, tokens, tokens, sequences + 1, sequences, sequences * width, logits)
    body = _receive(peer, 8 * sum(counts))
    if body is None:
        return None
    ids, positions, slots, starts, contexts, table, rows = torch.frombuffer(
        body, dtype=torch.int64
    ).split(counts)
    return Batch(
        token_ids=ids,
        positions=positions,
        slot_mapping=slots,
        query_start=tuple(starts.tolist()),
        context_len=tuple(contexts.tolist()),
        block_table=table.view(sequences, width).int(),
        logit_rows=rows,
    )


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
