"""The least that an aiohttp server can do with a post: read its body, answer 202.  Prints its port.

python -m benchmarks.bare
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable

import uvloop
from aiohttp import web


async def serve(accept: Callable[[web.Request], Awaitable[web.Response]]) -> None:
    """Posts to /hooks/odoo, until whoever started it is gone."""
    application = web.Application()
    application.router.add_post("/hooks/odoo", accept)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


async def accept(request: web.Request) -> web.Response:
    await request.read()
    return web.Response(status=202)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as here:
        here.run(serve(accept))
