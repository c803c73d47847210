"""The connectors of a worker, put together in the order in which they are asked."""

from common.kv.connector import KVConnector
from common.kv.connectors.chain import ChainConnector
from common.kv.connectors.registry import ConnectorContext, make_connector, parse_connectors
from common.kv.connectors.store import StoreConnector
from common.rpc.loop import LoopThread
from common.worker.settings import WorkerSettings
from common.worker.timeline import TimedConnector


def chain(
    settings: WorkerSettings, role: str, handoff: KVConnector, loop: LoopThread
) -> KVConnector:
    """What --kv-connectors names; the store only where --kvstore names one. `loop` does their I/O.

    Raises ConfigError for a connector that cannot be made.
    """
    members: list[KVConnector] = []
    for name, argument in parse_connectors(settings.kv_connectors):
        if name == "handoff":
            members.append(handoff)
        elif name != "store":
            members.append(make_connector(name, ConnectorContext(role, argument, loop)))
        elif settings.kvstore_addresses:
            members.append(StoreConnector(settings.kvstore_addresses, loop=loop))
    return TimedConnector(ChainConnector(members))
