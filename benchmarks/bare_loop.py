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

from benchmarks import bare


async def loop(dsn: str, sink: str) -> None:
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

        await bare.serve(accept)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as here:
        here.run(loop(*sys.argv[1:]))
