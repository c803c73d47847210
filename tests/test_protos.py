"""The protos keep the rules of buf STANDARD that a client notices."""

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import EnumDescriptor, FileDescriptor

from baton.v1 import common_pb2, inference_pb2, kvstore_pb2, worker_pb2

FILES: list[FileDescriptor] = [
    m.DESCRIPTOR for m in (common_pb2, inference_pb2, kvstore_pb2, worker_pb2)
]
METHODS = [m for f in FILES for s in f.services_by_name.values() for m in s.methods]
ENUMS = [e for f in FILES for e in f.enum_types_by_name.values()]


def test_every_call_has_a_request_and_a_response_of_its_own() -> None:
    used = [t.full_name for m in METHODS for t in (m.input_type, m.output_type)]
    assert METHODS
    assert len(used) == len(set(used))
    for method in METHODS:
        assert method.input_type.name == f"{method.name}Request"
        assert method.output_type.name == f"{method.name}Response"


@pytest.mark.parametrize("enum", ENUMS, ids=lambda e: e.name)
def test_enum_values_carry_the_prefix_and_zero_is_unspecified(enum: EnumDescriptor) -> None:
    prefix = "".join("_" + c if c.isupper() else c for c in enum.name).upper().lstrip("_")
    assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"
    assert all(value.name.startswith(prefix + "_") for value in enum.values)


def test_an_unset_sampling_scalar_is_not_zero() -> None:
    for field in common_pb2.SamplingParams.DESCRIPTOR.fields:
        assert field.is_repeated or field.has_presence, field.name


def test_the_committed_stubs_are_what_the_protos_give() -> None:
    tool = Path(__file__).resolve().parents[1] / "tools" / "protos.py"
    done = subprocess.run([sys.executable, str(tool), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
