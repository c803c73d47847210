"""`baton doctor` finds what is wrong and says what to do."""

import json
import os
import shutil
from pathlib import Path

import pytest

from baton.cli import checks
from baton.cli.model_check import check_model
from tests.cli.conftest import MODEL, baton


@pytest.fixture
def model(tmp_path):
    """A copy of the bundled model, to be damaged."""
    return shutil.copytree(MODEL, tmp_path / "model")


def failures(findings):
    return {f.name: f for f in findings if f.status == "fail"}


def test_a_machine_in_order_passes(free_ports):
    http_port, grpc_port = free_ports
    done = baton("doctor", f"--port={http_port}", f"--grpc-port={grpc_port}")
    assert done.returncode == 0, done.stdout
    assert "FAIL" not in done.stdout
    assert "baton-tiny" in done.stdout


def test_a_taken_port_is_named_with_its_holder_and_a_remedy(taken_port, free_ports):
    done = baton("doctor", "--json", f"--port={taken_port}", f"--grpc-port={free_ports[0]}")
    assert done.returncode == 1
    (finding,) = [f for f in json.loads(done.stdout) if f["status"] == "fail"]
    assert finding["name"] == f"port {taken_port} (HTTP)"
    assert f"pid {os.getpid()}" in finding["message"]
    assert f"--port {taken_port + 1}" in finding["remedy"]


def test_a_missing_model_folder_is_named_with_a_remedy(tmp_path):
    (finding,) = failures(check_model(str(tmp_path / "gone"))).values()
    assert str(tmp_path / "gone") in finding.message
    assert "--model" in finding.remedy


def test_truncated_weights_are_found(model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    found = failures(check_model(str(model)))
    assert "truncated" in found["model weights"].message


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x08" + bytes(7) + b"not json"])
def test_a_file_that_is_no_safetensors_is_found(model, content):
    (model / "model.safetensors").write_bytes(content)
    found = failures(check_model(str(model)))
    assert "model.safetensors" in found["model weights"].message


def test_pickle_weights_are_refused_with_the_reason(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    found = failures(check_model(str(model)))
    assert "pickle" in found["model weights"].message


def test_a_shard_that_the_index_names_but_the_folder_lacks_is_found(model):
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    found = failures(check_model(str(model)))
    assert "model-00002-of-00002.safetensors" in found["model weights"].message


def test_a_broken_tokenizer_is_found(model):
    (model / "tokenizer.json").write_text("{")
    assert "model tokenizer" in failures(check_model(str(model)))


def test_a_broken_config_is_found(model):
    (model / "config.json").write_text("{")
    found = failures(check_model(str(model)))
    assert "config.json" in found["model"].message


def test_a_missing_package_is_named_with_the_extra_that_has_it(monkeypatch):
    monkeypatch.setitem(checks.NEEDED, "no_such_module", ("no-such-dist", "gateway"))
    found = failures(checks.check_packages())
    assert "baton[gateway]" in found["package no-such-dist"].remedy


def test_a_transport_that_cannot_be_used_is_named_with_the_reason(monkeypatch):
    monkeypatch.setattr("common.kv.transports.shm.FOLDER", Path("/gone"))
    found = {finding.name: finding for finding in checks.check_transports()}
    assert found["transports"].message.endswith("tcp")
    assert "/gone is not there" in found["transport shm"].message
    assert found["transport shm"].remedy
