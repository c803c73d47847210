"""The nixl transport, in processes of its own: two copies of UCX cannot be in one."""

import os
import subprocess
import sys

import pytest

from common.errors import ConfigError
from common.kv.transports import parse_names
from common.kv.transports.nixl import missing
from tests.kv.transports.support import ROOT, need, python

pytestmark = pytest.mark.timeout(200)
FOLDER = "tests/kv/transports"


@pytest.mark.parametrize(("file", "least"), [("test_every.py", 17), ("nixl_alone.py", 24)])
def test_nixl_keeps_what_every_transport_and_what_only_it_promises(file, least):
    need("nixl")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{FOLDER}/{file}"],
        cwd=ROOT,
        env={**os.environ, "TRANSPORTS_UNDER_TEST": "nixl"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-1].split()
    assert summary[1] == "passed"
    assert int(summary[0]) >= least
    assert "skipped" not in summary


def test_importing_the_transports_does_not_load_nixl():
    code = (
        "import common.kv.transports, sys; "
        "sys.exit(any(name.startswith('nixl_cu') for name in sys.modules))"
    )
    assert python(code).returncode == 0


def test_a_link_loads_the_bindings_and_not_what_pickles_and_resets_logging():
    need("nixl")
    done = python(
        "import asyncio, logging, sys\n"
        "from tests.kv.transports.support import Inbox, ends\n"
        "kept = logging.FileHandler('/dev/null')\n"
        "async def main():\n"
        "    async with ends('nixl') as (receiver, sender):\n"
        "        await (await sender.open(await receiver.listen(Inbox()))).probe()\n"
        "asyncio.run(main())\n"
        "print([name for name in sys.modules if name.startswith('nixl_cu')])\n"
        "assert kept.stream is not None and logging.raiseExceptions\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] in ("['nixl_cu12._bindings']", "['nixl_cu13._bindings']")


def test_without_the_package_nixl_is_not_offered_and_the_log_says_why():
    done = python(
        "import importlib.util as u; u.find_spec = lambda name: None\n"
        "from common.kv.transports import DataPlane; print(list(DataPlane(['nixl', 'tcp'])._sides))"
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "transport_unavailable" in done.stdout
    assert "nixl-cu12" in done.stdout


def test_a_process_forked_from_one_that_used_nixl_is_told_so_and_takes_tcp():
    need("nixl")
    done = python(
        "import asyncio, os, sys\n"
        "from common.kv.transports import DataPlane, plane\n"
        "plane.OPEN_S = 20.0\n"
        "from tests.kv.transports.support import Inbox\n"
        "async def used():\n"
        "    receiver, sender = DataPlane(['nixl', 'tcp']), DataPlane(['nixl', 'tcp'])\n"
        "    port = await receiver.listen('127.0.0.1', 0, Inbox())\n"
        "    link = await sender.connect(f'127.0.0.1:{port}')\n"
        "    assert await (await link.send(b'', bytes(1_000_000))) == 0\n"
        "    await sender.close()\n"
        "    await receiver.close()\n"
        "    return link.transport\n"
        "assert asyncio.run(used()) == 'nixl'\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if asyncio.run(used()) == 'tcp' else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loaded before this process was forked" in done.stdout


def test_the_machine_says_whether_it_has_the_package():
    assert missing() is None or "nixl-cu12" in missing()


@pytest.mark.parametrize(("first", "second"), [("nixl", "ucx"), ("ucx", "nixl")])
def test_a_process_that_has_one_ucx_loads_no_other_and_takes_tcp(first, second):
    need("nixl")
    need("ucx")
    done = python(
        "import asyncio\n"
        "from common.kv.transports import DataPlane, plane\n"
        "plane.OPEN_S = 20.0\n"
        "from tests.kv.transports.support import Inbox\n"
        "async def used(name):\n"
        "    receiver, sender = DataPlane([name, 'tcp']), DataPlane([name, 'tcp'])\n"
        "    port = await receiver.listen('127.0.0.1', 0, Inbox())\n"
        "    link = await sender.connect(f'127.0.0.1:{port}')\n"
        "    assert await (await link.send(b'', bytes(1_000_000))) == 0\n"
        "    await sender.close()\n"
        "    await receiver.close()\n"
        "    return link.transport\n"
        f"assert asyncio.run(used({first!r})) == {first!r}\n"
        f"assert asyncio.run(used({second!r})) == 'tcp'\n"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{first} has loaded a UCX of its own" in done.stdout


def test_the_setting_names_one_of_them():
    assert parse_names("shm,nixl,tcp") == ("shm", "nixl", "tcp")
    with pytest.raises(ConfigError, match="leave one of them out"):
        parse_names("shm,ucx,nixl,tcp")
