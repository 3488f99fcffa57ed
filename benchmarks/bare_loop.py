"""The least that a way from the door to the partner can be: accept, commit one row, answer, post.  Prints its port.

    python -m benchmarks.bare_loop DSN SINK

Nothing proves who posts, nothing is left out of what is kept, nothing is known twice, and what is not posted when it
ends is lost.
"""

import asyncio
import sys
from uuid import uuid4

import asyncpg
import uvloop
from aiohttp import ClientSession, web


async def serve(dsn: str, sink: str) -> None:
    posting: set[asyncio.Task[None]] = set()
    async with asyncpg.create_pool(dsn, min_size=4, max_size=4) as pool, ClientSession() as session:
        await pool.execute("CREATE TABLE IF NOT EXISTS bare_loop (id uuid PRIMARY KEY, body bytea NOT NULL)")

        async def accept(request: web.Request) -> web.Response:
            body, name = await request.read(), uuid4()
            await pool.execute("INSERT INTO bare_loop (id, body) VALUES ($1, $2)", name, body)
            task = asyncio.create_task(post(str(name), body))
            posting.add(task)
            task.add_done_callback(posting.discard)
            return web.Response(status=202, body=b'{"id":"%b"}' % str(name).encode())

        async def post(name: str, body: bytes) -> None:
            async with session.post(sink, data=body, headers={"webhook-id": name}) as answer:
                await answer.read()

        application = web.Application()
        application.router.add_post("/hooks/odoo", accept)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.to_thread(sys.stdin.read)  # until whoever started it is gone
        await runner.cleanup()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as here:
        here.run(serve(*sys.argv[1:]))
