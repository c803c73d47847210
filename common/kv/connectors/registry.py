"""Connectors by name: those of Baton, and those that other packages offer as entry points."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

from common.errors import ConfigError
from common.kv.connector import KVConnector
from common.rpc.loop import LoopThread

GROUP = "baton.kv_connectors"
# Made by the services: they need addresses, ports and peers of the worker.
BUILT_IN = ("store", "handoff")


@dataclass(frozen=True, slots=True)
class ConnectorContext:
    """What a connector from another package is made with.

    role      prefill or decode
    argument  what follows the name and a colon in --kv-connectors, such as a path; may be empty
    loop      a thread with an asyncio loop, for the connector's input and output
    """

    role: str
    argument: str
    loop: LoopThread


# What an entry point of GROUP names. Raises ConfigError for an argument that cannot work.
Factory = Callable[[ConnectorContext], KVConnector]


def parse_connectors(text: str) -> list[tuple[str, str]]:
    """`store,folder:/mnt/kv,handoff` as names and arguments. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    pairs = [(name, argument) for name, _, argument in (part.partition(":") for part in parts)]
    names = [name for name, _ in pairs]
    if not names or "" in names or len(set(names)) < len(names):
        raise ConfigError(
            f"{text!r} does not name connectors; list them, each once, in the order in which they "
            "are asked, for example store,handoff"
        )
    return pairs


def make_connector(name: str, context: ConnectorContext) -> KVConnector:
    """A connector of another package. Raises ConfigError, naming what is installed."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        known = ", ".join(sorted((*BUILT_IN, *found)))
        raise ConfigError(
            f"no KV connector is named {name!r}; there are {known}. A package offers one as an "
            f"entry point of the group {GROUP!r}"
        )
    try:
        connector = found[name].load()(context)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the KV connector {name!r} of {found[name].value} cannot be made: {error!r}"
        ) from error
    if not isinstance(connector, KVConnector):
        raise ConfigError(
            f"{found[name].value} gave a {type(connector).__name__} for the KV connector {name!r}; "
            "it must be a subclass of common.kv.connector.KVConnector"
        )
    return connector
