"""The connectors of a worker, put together: the store first, then the handoff."""

from collections.abc import Sequence

from common.kv.connector import KVConnector
from common.kv.connectors.chain import ChainConnector
from common.kv.connectors.store import StoreConnector
from common.rpc.loop import LoopThread
from common.worker.timeline import NotedHandoff, TimedConnector


def chain(stores: Sequence[str], handoff: KVConnector, loop: LoopThread) -> KVConnector:
    """`stores` are host:port, none for a worker without a store; `loop` does their I/O."""
    members: list[KVConnector] = [StoreConnector(stores, loop=loop)] if stores else []
    return TimedConnector(ChainConnector([*members, NotedHandoff(handoff)]))
