"""The containers' health check: Ready is exit code 0, anything else is 1 and a reason."""

import asyncio

from aiohttp import web

from baton.cli.ports import any_free
from common.rpc.probe import main, probe
from common.rpc.server import RpcServer


async def test_a_grpc_service_is_ready_only_while_it_says_serving():
    server = RpcServer("127.0.0.1", 0)
    port = await server.start()
    address = f"127.0.0.1:{port}"
    try:
        assert await asyncio.to_thread(probe, address) == f"{address}: NOT_SERVING"
        await server.set_serving()
        assert await asyncio.to_thread(probe, address) is None
        assert await asyncio.to_thread(main, [address]) == 0
    finally:
        await server.stop(0)


async def test_an_http_service_is_ready_only_when_it_answers_200():
    status = 503

    async def ready(_request: web.Request) -> web.Response:
        return web.Response(status=status)

    app = web.Application()
    app.router.add_get("/ready", ready)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/ready"
    try:
        assert await asyncio.to_thread(probe, url) == f"{url}: HTTP 503"
        status = 200
        assert await asyncio.to_thread(probe, url) is None
    finally:
        await runner.cleanup()


def test_where_nothing_listens_the_reason_is_said(capsys):
    port = any_free()
    assert main([f"127.0.0.1:{port}", "--timeout-s", "2"]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err
    assert main([f"http://127.0.0.1:{port}/ready", "--timeout-s", "2"]) == 1
    assert f"127.0.0.1:{port}" in capsys.readouterr().err
