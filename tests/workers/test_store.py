"""Workers with a KV store: what one computed, another loads."""

import asyncio

from tests.engine.zoo import random_prompt
from tests.kv.test_conformance import install_example
from tests.workers.support import GatewaySession, is_greedy, until


async def test_a_restarted_worker_finds_the_prefix_in_the_store(start, model):
    store = start("kvstore")
    prompt = random_prompt(200, 11)
    flags = ("--kvstore", store.address)
    first = start("decode", flags=flags)
    async with GatewaySession(first.address) as session:
        reply = await (await session.submit(prompt)).end()
        assert reply.cached == 0

    async def stored():
        return (await store.state()).load.blocks_cached >= 12

    await until(stored, "12 blocks stored")
    first.stop()
    second = start("decode", flags=flags)
    async with GatewaySession(second.address) as session:
        reply = await (await session.submit(prompt)).end()
        assert reply.cached == 192
        assert is_greedy(model, prompt, reply.tokens, 16)
        # Losing the store is a miss, nothing more.
        store.stop(kill=True)
        other = random_prompt(200, 12)
        reply = await (await session.submit(other)).end()
        assert (reply.cached, reply.error) == (0, None)
        assert is_greedy(model, other, reply.tokens, 16)
    await second.idle()


async def test_a_connector_of_a_package_is_used_by_its_name(start, model, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(install_example(tmp_path)))
    flags = ("--kv-connectors", f"folder:{tmp_path / 'kv'},handoff")
    prompt = random_prompt(200, 13)
    for expected in (0, 192):
        decode = start("decode", flags=flags)
        async with GatewaySession(decode.address) as session:
            reply = await (await session.submit(prompt)).end()
            assert (reply.cached, reply.error) == (expected, None)
            assert is_greedy(model, prompt, reply.tokens, 16)
        await until(lambda: len(list((tmp_path / "kv").iterdir())) >= 12, "12 blocks saved")
        decode.stop()


async def test_a_connector_that_is_not_installed_ends_the_process_with_a_line_that_names_it(start):
    decode = start("decode", flags=("--kv-connectors", "nobody,handoff"), ready=False)
    assert await asyncio.to_thread(decode.process.wait, 40) == 2
    assert "no KV connector is named 'nobody'" in decode.text().splitlines()[-1]
