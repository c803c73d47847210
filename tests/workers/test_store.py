"""Workers with a KV store: what one computed, another loads."""

from tests.engine.zoo import random_prompt
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
