from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NixlSender(_message.Message):
    __slots__ = ("agent", "metadata", "metadata_checksum", "staging")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    METADATA_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    STAGING_FIELD_NUMBER: _ClassVar[int]
    agent: str
    metadata: bytes
    metadata_checksum: int
    staging: MemoryRange
    def __init__(self, agent: _Optional[str] = ..., metadata: _Optional[bytes] = ..., metadata_checksum: _Optional[int] = ..., staging: _Optional[_Union[MemoryRange, _Mapping]] = ...) -> None: ...

class MemoryRange(_message.Message):
    __slots__ = ("address", "length", "device_id")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    address: int
    length: int
    device_id: int
    def __init__(self, address: _Optional[int] = ..., length: _Optional[int] = ..., device_id: _Optional[int] = ...) -> None: ...
