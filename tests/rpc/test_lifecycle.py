import signal
import subprocess
import sys
import textwrap
import time

import pytest

SERVICE = """
import asyncio, sys, threading
from common.errors import CheckpointError, ConfigError
from common.rpc.server import RpcServer, run_service
from common.telemetry import logging

class App:
    def __init__(self, lifecycle):
        self.lifecycle = lifecycle
    async def startup(self):
        {startup}
        print("up", flush=True)
    async def drain(self, deadline_s):
        print("drain", deadline_s, flush=True)
        {drain}
    async def shutdown(self):
        print("down", flush=True)

logging.setup("test")
sys.exit(run_service(App, drain_s=7.0, exit_with_parent={parent}))
"""


def start(startup="pass", drain="pass", parent=False):
    code = SERVICE.format(startup=startup, drain=drain, parent=parent)
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    out, err = process.communicate(timeout=20)
    return process.returncode, out.splitlines(), err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_shuts_down_and_exits_with_zero(number):
    process = start()
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert end(process)[:2] == (0, ["drain 7.0", "down"])


def test_a_signal_while_starting_ends_the_start():
    process = start(startup='print("starting", flush=True); await asyncio.sleep(60)')
    assert process.stdout.readline() == "starting\n"
    process.send_signal(signal.SIGTERM)
    code, out, _ = end(process)
    assert code == 0
    assert out[-1] == "down"
    assert "up" not in out


def test_a_second_signal_ends_the_process_at_once():
    process = start(drain="await asyncio.sleep(60)")
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "drain 7.0\n"
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)  # signals that come at once are one
    assert end(process)[0] == 128 + signal.SIGINT


def test_one_stop_that_comes_as_several_signals_still_drains():
    process = start(drain="await asyncio.sleep(0.3)")
    assert process.stdout.readline() == "up\n"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        process.send_signal(number)
    assert end(process)[:2] == (0, ["drain 7.0", "down"])


@pytest.mark.parametrize("kind", ["CheckpointError", "ConfigError"])
def test_a_start_that_cannot_work_prints_one_line_and_exits_with_two(kind):
    code, out, err = end(start(startup=f'raise {kind}("x.safetensors is cut short; get it anew")'))
    assert code == 2
    assert out == ["down"]
    assert err.splitlines() == ["error: x.safetensors is cut short; get it anew"]


def test_a_crash_exits_with_one_and_logs_the_traceback():
    code, _, err = end(start(startup='raise RuntimeError("bug")'))
    assert code == 1
    assert "Traceback" in err
    assert err.splitlines()[-1] == "error: bug"


def test_an_error_told_from_another_thread_ends_the_service():
    process = start(
        startup='threading.Timer(0.05, self.lifecycle.fail, [ConfigError("engine died")]).start()'
    )
    code, out, err = end(process)
    assert code == 2
    assert out == ["up", "down"]
    assert err.splitlines()[-1] == "error: engine died"


def test_a_child_ends_when_its_parent_dies(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(SERVICE.format(startup="pass", drain="pass", parent=True)))
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time\n"
            f"child = subprocess.Popen([sys.executable, {str(script)!r}], stdout=subprocess.PIPE)\n"
            "child.stdout.readline()\n"
            "print(child.pid, flush=True)\n"
            "time.sleep(60)\n",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate(timeout=10)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and running(child):
        time.sleep(0.02)  # the end of another's child is told to nobody
    assert not running(child)


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
