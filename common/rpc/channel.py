"""Client channels: one set of options for every call inside the mesh."""

import grpc

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
KEEPALIVE_MS = 10_000
KEEPALIVE_TIMEOUT_MS = 5_000
# A worker that comes back is found within this, whatever the number of failed attempts before.
MAX_RECONNECT_MS = 2_000


def connect(address: str, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> grpc.aio.Channel:
    """A channel to `host:port`. Connects lazily; must be closed by the caller.

    A peer that vanished without closing its connection is noticed within
    KEEPALIVE_MS + KEEPALIVE_TIMEOUT_MS, also while no call is under way.
    """
    options = (
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_MS),
        # Workers are peers on the same network; a proxy meant for the outside would break them.
        ("grpc.enable_http_proxy", 0),
        # Each channel has connections of its own: closing one replica's touches no other's.
        ("grpc.use_local_subchannel_pool", 1),
    )
    return grpc.aio.insecure_channel(address, options=options)
