"""oban for Python, filled and drained; runs in an environment of its own."""

import asyncio
import json
import sys
import time

import uvloop
from oban import Oban, worker
from oban.schema import install

delivered = []


@worker(queue="default")
class Job:
    async def process(self, job) -> None:
        delivered.append(job.id)


async def main(dsn: str, count: int, at_once: int) -> None:
    pool = await Oban.create_pool(dsn, min_size=4, max_size=20)
    async with pool.connection() as connection:
        rows = await (await connection.execute("SELECT to_regclass('oban_jobs')")).fetchone()
    if rows[0] is None:
        await install(pool)
    client = Oban(pool=pool)
    jobs = []
    while len(jobs) < count:
        jobs += await client.enqueue_many(
            [Job.new({"payload": "x" * 300}) for _ in range(min(1000, count - len(jobs)))]
        )
    server = Oban(pool=pool, name="server", queues={"default": at_once})
    began = time.monotonic()
    await server.start()
    while True:
        await asyncio.sleep(0.02)
        if len(delivered) < count:
            continue
        async with pool.connection() as connection:
            left = await (
                await connection.execute("SELECT count(*) FROM oban_jobs WHERE state IN ('available', 'executing')")
            ).fetchone()
        if not left[0]:
            break
    seconds = time.monotonic() - began
    await server.stop()
    await pool.close()
    print(json.dumps({"seconds": seconds, "accepted": [job.id for job in jobs], "delivered": delivered}))


uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
