"""Workers with a KV store: what one computed, another loads."""

import asyncio
import signal

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


async def test_ranks_with_caches_of_their_own_save_and_load_whole_blocks(start, model):
    store = start("kvstore")
    prompt = random_prompt(200, 15)
    one = ("--kvstore", store.address)
    two = (*one, "--tensor-parallel", "2", "--private-kv")

    async def stored():
        return (await store.state()).load.blocks_cached >= 12

    for flags, cached in ((two, 0), (one, 192), (two, 192)):
        worker = start("decode", flags=flags)
        async with GatewaySession(worker.address) as session:
            reply = await (await session.submit(prompt)).end()
            assert (reply.cached, reply.error) == (cached, None)
            assert is_greedy(model, prompt, reply.tokens, 16)
        await until(stored, "12 blocks stored")
        worker.stop()


async def test_what_a_drained_worker_had_computed_is_in_the_store_when_it_is_gone(start, model):
    store = start("kvstore")
    prompt = random_prompt(100, 14)
    flags = ("--kvstore", store.address, "--drain-s", "0")
    first = start("decode", flags=flags)
    async with GatewaySession(first.address) as session:
        reply = await (await session.submit(prompt, max_tokens=400)).has_tokens(40)
        first.process.send_signal(signal.SIGTERM)
        await reply.end()
        assert reply.error.leaving
    assert await asyncio.to_thread(first.process.wait, 20) == 0
    so_far = [*prompt, *reply.tokens]
    assert 140 <= len(so_far) < 500
    second = start("decode", flags=flags)

    async def loaded():
        return (await second.state()).load.counters["store_blocks_loaded"]

    before = await loaded()  # by the warm-up
    async with GatewaySession(second.address) as session:
        rest = await (await session.submit(so_far, max_tokens=8)).end()
    # Every block that was full: nothing is in it of the last token, which was not computed.
    full_blocks = (len(so_far) - 1) // 16
    assert rest.cached == 16 * full_blocks
    assert await loaded() - before == full_blocks
    assert is_greedy(model, prompt, [*reply.tokens, *rest.tokens], len(reply.tokens) + 8)


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
