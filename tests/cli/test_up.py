"""`baton up` with real processes: all of them start, serve, and end together."""

import os
import signal
import subprocess
import sys

import httpx
import pytest

from baton.cli.locate import model_folder
from baton.cli.mesh import MeshPlan, specs
from common.errors import ConfigError
from tests.cli.conftest import MODEL, READY_S, alive, baton, wait_until

QUESTION = "codes: river=4821 stone=7733. What is the code of river?"
STOP_S = 60.0


def test_up_serves_then_chat_answers_then_ctrl_c_stops_every_process(start_up):
    up = start_up("--decode=2")
    url = up.wait_ready()
    children = up.children()
    roles = sorted(c.split("services.")[1].split(".")[0] for c in children.values())
    assert roles == ["decode", "decode", "gateway", "kvstore", "prefill"]
    state = httpx.get(f"{url}/debug/state").json()
    ready = [w["role"] for w in state["workers"] if w["status"] == "ready"]
    assert sorted(ready) == ["decode", "decode", "kvstore", "prefill"]

    answered = baton("chat", f"--url={url}", "--temperature=0", QUESTION)
    assert answered.stdout == "4821\n"
    assert "TTFT" in answered.stderr
    assert "tokens/s" in answered.stderr
    piped = baton("chat", f"--url={url}", "--temperature=0", input=QUESTION)
    assert piped.stdout == "4821\n"
    online = baton("generate", f"--url={url}", "--chat", "--temperature=0", QUESTION)
    assert online.stdout == "4821\n"
    unknown = baton("chat", f"--url={url}", "--model=nobody", "hello")
    assert unknown.returncode == 1
    assert "nobody" in unknown.stderr

    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(STOP_S) == 0
    assert not [pid for pid in children if alive(pid)]
    assert "ready after" in up.progress
    assert "killed" not in up.progress
    assert (up.log_dir / "gateway.log").stat().st_size > 0


@pytest.mark.parametrize("role", ["prefill", "gateway"])
def test_when_one_service_dies_all_stop_and_the_exit_code_says_so(start_up, role):
    up = start_up()
    up.wait_ready()
    children = up.children()
    os.kill(up.child(role), signal.SIGKILL)
    assert up.process.wait(STOP_S) == 1
    assert not [pid for pid in children if alive(pid)]
    assert "the last lines of" in up.progress
    assert f"{role}" in up.progress.splitlines()[-1]
    assert "SIGKILL" in up.progress.splitlines()[-1]


def test_services_end_when_up_itself_is_killed(start_up):
    up = start_up()
    up.wait_ready()
    children = up.children()
    assert len(children) == 4
    up.process.kill()
    up.process.wait()
    wait_until(lambda: not any(alive(pid) for pid in children), STOP_S, "the services end")


def test_ctrl_c_while_loading_stops_cleanly(start_up):
    up = start_up()
    wait_until(lambda: len(up.children()) == 4, 60, "the services start")
    children = up.children()
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(STOP_S) == 0
    assert not [pid for pid in children if alive(pid)]
    assert up.url == ""


def test_a_service_that_cannot_start_ends_up_with_its_own_last_words(start_up, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in MODEL.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    up = start_up(f"--model={folder}")
    assert up.process.wait(READY_S) == 1
    assert "model.safetensors" in up.progress


def test_a_taken_port_is_refused_with_the_port_and_the_remedy(taken_port):
    refused = baton("up", f"--port={taken_port}", "--grpc-port=0")
    assert refused.returncode == 1
    assert f"port {taken_port} is taken" in refused.stderr
    assert f"baton up --port {taken_port + 1}" in refused.stderr


def test_a_missing_model_folder_is_refused_with_its_name(tmp_path):
    refused = baton("up", f"--model={tmp_path}/nothing")
    assert refused.returncode == 1
    assert f"{tmp_path}/nothing does not exist" in refused.stderr


@pytest.mark.parametrize("flag", ["--decode=0", "--prefill=-1", "--kvstore=65"])
def test_numbers_of_replicas_out_of_range_are_refused(flag):
    refused = baton("up", flag)
    assert refused.returncode == 1
    assert flag.split("=")[0] in refused.stderr


def test_worker_flags_after_the_dashes_reach_prefill_and_decode_only():
    plan = MeshPlan(
        model=MODEL, http_port=1, grpc_port=2, cores=4, worker_flags=("--kv-dtype=fp8_e4m3",)
    )
    by_role = {s.role: s.flags for s in specs(plan, iter(range(7100, 7200)))}
    having = {role for role, flags in by_role.items() if "--kv-dtype=fp8_e4m3" in flags}
    assert having == {"prefill", "decode"}
    assert "--threads=2" in by_role["decode"]


def test_the_file_of_keys_is_the_gateways_alone():
    file = MODEL / "keys"
    plan = MeshPlan(model=MODEL, http_port=1, grpc_port=2, api_keys_file=file)
    having = [s.role for s in specs(plan, iter(range(7100, 7200))) if str(file) in str(s.flags)]
    assert having == ["gateway"]


def test_every_replica_has_a_port_of_its_own_and_the_gateway_knows_all():
    plan = MeshPlan(model=MODEL, http_port=1, grpc_port=2, prefill=2, decode=3, kvstore=2)
    services = specs(plan, iter(range(7100, 7200)))
    gateway = services[-1]
    assert gateway.role == "gateway"
    assert "--kvstore=127.0.0.1:7100,127.0.0.1:7101" in gateway.flags
    assert "--prefill=127.0.0.1:7102,127.0.0.1:7103" in gateway.flags
    assert "--decode=127.0.0.1:7104,127.0.0.1:7105,127.0.0.1:7106" in gateway.flags


def test_the_default_model_is_the_variable_then_the_bundled_one(monkeypatch, tmp_path):
    monkeypatch.delenv("BATON_MODEL", raising=False)
    assert model_folder(None) == MODEL
    monkeypatch.setenv("BATON_MODEL", str(tmp_path))
    assert model_folder(None) == tmp_path
    assert model_folder(str(MODEL)) == MODEL
    with pytest.raises(ConfigError, match="does not exist"):
        model_folder(str(tmp_path / "gone"))


def test_serve_runs_the_service_that_it_names():
    shown = baton("serve", "kvstore", "--help")
    assert shown.returncode == 0
    assert "--max-bytes" in shown.stdout
    assert baton("serve", "nobody").returncode == 2


def test_serve_ends_on_sigterm_with_code_zero(tmp_path):
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "baton.cli.main", "serve", "kvstore", "--port=0"],
            stdout=out,
            stderr=out,
        )
    try:
        wait_until(lambda: '"ready"' in log.read_text(), 60, "the kvstore is ready")
        process.terminate()
        assert process.wait(STOP_S) == 0
    finally:
        process.kill()
