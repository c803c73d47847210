"""How workers start, refuse to start, and stop."""

import asyncio
import shutil
import signal

import pytest

from tests.workers.support import until

ROLES = ("prefill", "decode")


async def exit_of(worker):
    code = await asyncio.to_thread(worker.process.wait, 40)
    return code, worker.text().splitlines()


@pytest.mark.parametrize("role", ROLES)
async def test_a_truncated_checkpoint_ends_the_process_with_a_line_that_names_it(
    role, start, model, tmp_path
):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, lines = await exit_of(start(role, model=broken, ready=False))
    assert code == 2
    assert lines[-1].startswith("error: ")
    assert "model.safetensors" in lines[-1]
    assert not any("Traceback" in line for line in lines)


async def test_a_folder_that_does_not_exist_is_refused(start, tmp_path):
    code, lines = await exit_of(start("decode", model=tmp_path / "nope", ready=False))
    assert code == 2
    assert str(tmp_path / "nope") in lines[-1]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--block-size", "0"), "block_size is 0"),
        (("--max-model-len", "4096"), "max_model_len is 4096"),
        (("--dtype", "float8"), "float8"),
        (("--kvstore", "nowhere"), "--kvstore"),
        (("--transports", "tcp,pigeon"), "--transports"),
    ],
)
async def test_a_setting_that_cannot_work_is_refused_by_name(start, flags, text):
    code, lines = await exit_of(start("decode", flags=flags, ready=False))
    assert code == 2
    assert text in lines[-1]


async def test_a_port_in_use_is_refused(start, prefill):
    port = prefill.address.rpartition(":")[2]
    code, lines = await exit_of(start("prefill", flags=("--port", port), ready=False))
    assert code == 2
    assert f"127.0.0.1:{port}" in lines[-1]


@pytest.mark.parametrize("role", ROLES)
async def test_an_idle_worker_exits_with_zero_on_sigterm(role, start):
    worker = start(role)
    worker.process.send_signal(signal.SIGTERM)
    code, _ = await exit_of(worker)
    assert code == 0


async def test_a_worker_that_is_still_loading_exits_with_zero_on_sigterm(start):
    worker = start("decode", ready=False)
    await until(lambda: worker.events("listening"), "listening", 40)
    worker.process.send_signal(signal.SIGTERM)
    code, _ = await exit_of(worker)
    assert code == 0
