"""Workers that prepare the next step while one runs: what goes between them is the same, and
nothing is held when requests end in the middle."""

import asyncio
import signal

from tests.engine.zoo import random_prompt
from tests.workers.support import GatewaySession, is_greedy
from tests.workers.test_handoff import begin_long_prefill

AHEAD = ("--async-scheduling",)


async def steps_ahead(worker):
    return (await worker.idle()).load.counters["steps_ahead"]


async def test_workers_that_step_ahead_hand_over_what_workers_that_wait_do(start, model):
    store = start("kvstore")
    flags = (*AHEAD, "--kvstore", store.address)
    prefill, decode = start(
        "prefill", "decode", flags=(*flags, "--max-num-batched-tokens", "64", "--drain-s", "0")
    )
    async with GatewaySession(decode.address) as session:
        prompts = [random_prompt(n, seed=8000 + n) for n in (5, 129, 144, 161, 300, 700)]
        # Nobody foresees that these stop, nor that those are cancelled.
        settings = [{"max_tokens": 1}, {}, {}, {"stop_token_ids": [*range(0, 199, 9)]}] * 4
        asked = [(p, s) for p, s in zip(prompts * 2, settings, strict=False)]
        replies = [await session.submit(p, candidates=[prefill.address], **s) for p, s in asked]
        gone = [
            await session.submit(random_prompt(n, seed=8100 + n), candidates=[prefill.address])
            for n in (140, 300, 500)
        ]
        for reply in gone:
            await session.cancel(reply.id)
        for (prompt, _), reply in zip(asked, replies, strict=True):
            await reply.end()
            assert reply.error is None
            assert is_greedy(model, prompt, reply.tokens, len(reply.tokens))
            assert 1 <= len(reply.tokens) <= 16
        for reply in gone:
            await reply.end()
        assert await steps_ahead(prefill) > 0
        assert await steps_ahead(decode) > 0
        # Told to leave with a step under way: another goes on with what it told and computed.
        prompt = random_prompt(100, 8200)
        first = await (await session.submit(prompt, max_tokens=400)).has_tokens(40)
        decode.process.send_signal(signal.SIGTERM)
        await first.end()
        assert first.error.leaving
    assert await asyncio.to_thread(decode.process.wait, 20) == 0
    so_far = [*prompt, *first.tokens]
    heir = start("decode", flags=flags)
    async with GatewaySession(heir.address) as session:
        rest = await (await session.submit(so_far, max_tokens=8)).end()
    assert rest.cached == (len(so_far) - 1) // 16 * 16
    assert is_greedy(model, prompt, [*first.tokens, *rest.tokens], len(first.tokens) + 8)
    await heir.idle()


async def test_a_prefill_worker_that_steps_ahead_may_be_cancelled_and_killed(start, model):
    decode = start("decode", flags=AHEAD)
    prefill = start("prefill", flags=(*AHEAD, "--max-num-batched-tokens", "1"))
    async with GatewaySession(decode.address) as session:
        _, reply = await begin_long_prefill(session, prefill, 8300)
        await session.cancel(reply.id)
        await reply.end(timeout_s=2)
        await asyncio.gather(prefill.idle(1.0), decode.idle(1.0))
        prompt, reply = await begin_long_prefill(session, prefill, 8400)
        prefill.stop(kill=True)
        await reply.end()
        assert reply.error is None
        assert is_greedy(model, prompt, reply.tokens, 64)
    await decode.idle()
