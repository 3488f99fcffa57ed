"""pgqueuer, filled and drained; runs in an environment of its own."""

import json
import sys
import time
from datetime import timedelta

import asyncpg
import uvloop
from pgqueuer import AsyncpgPoolDriver, Queries, QueueManager
from pgqueuer.types import QueueExecutionMode


async def main(dsn: str, count: int, at_once: int) -> None:
    async with asyncpg.create_pool(dsn, min_size=4, max_size=4) as pool:
        driver = AsyncpgPoolDriver(pool)
        queries = Queries(driver)
        if not await queries.schema_is_installed():
            await queries.install()
        accepted = []
        for _ in range(0, count, 1000):
            some = min(1000, count - len(accepted))
            accepted += await queries.enqueue(["job"] * some, [b"x" * 300] * some, [0] * some)
        delivered = []
        manager = QueueManager(queries)

        @manager.entrypoint("job")
        async def job(job) -> None:
            delivered.append(job.id)

        began = time.monotonic()
        await manager.run(batch_size=at_once, dequeue_timeout=timedelta(seconds=1), mode=QueueExecutionMode.drain)
        seconds = time.monotonic() - began
    print(json.dumps({"seconds": seconds, "accepted": accepted, "delivered": delivered}))


uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
