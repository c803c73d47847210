"""What a KV connector of another package is made of; docs/connectors.md says how."""

from common.engine.sequence import Phase, Sequence, StepPlan
from common.kv.connector import KVCaches, KVConnector
from common.kv.connectors.copies import HostCopies
from common.kv.connectors.pages import copy_layers, copy_pages, write_layers, write_page
from common.kv.connectors.registry import ConnectorContext
from common.kv.keys import chain_keys
from common.kv.layout import KVLayout
from common.kv.wire import BlockRange, decode_block, encode_block

__all__ = [
    "BlockRange",
    "ConnectorContext",
    "HostCopies",
    "KVCaches",
    "KVConnector",
    "KVLayout",
    "Phase",
    "Sequence",
    "StepPlan",
    "chain_keys",
    "copy_layers",
    "copy_pages",
    "decode_block",
    "encode_block",
    "write_layers",
    "write_page",
]
