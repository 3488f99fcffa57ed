"""The limit of dispatch: the least that a queue on Postgres can be, in Python.

A row is leased (`FOR UPDATE SKIP LOCKED`, 200 at a time), handed to one of many workers, and deleted in batches: no
log of attempts, no fence, no books, no retries, no order, no trace.  Nothing that is worth having, and all speed.
"""

import asyncio
from collections.abc import Awaitable, Callable

import asyncpg

BATCH = 200
LEASE_SECONDS = 30

SCHEMA = """
CREATE TABLE IF NOT EXISTS reference_queue (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    payload text NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);
CREATE INDEX IF NOT EXISTS reference_ready ON reference_queue (run_at, id);
"""
FILL = "INSERT INTO reference_queue (payload) SELECT $2 FROM generate_series(1, $1) RETURNING id"
CLAIM = """
WITH due AS MATERIALIZED (
    SELECT id FROM reference_queue WHERE run_at <= now() ORDER BY run_at, id LIMIT $1 FOR UPDATE SKIP LOCKED
)
UPDATE reference_queue AS q
   SET run_at = now() + make_interval(secs => $2)
  FROM due
 WHERE q.id = due.id
RETURNING q.id, q.payload
"""
FORGET = "DELETE FROM reference_queue WHERE id = ANY ($1::bigint[])"


async def fill(dsn: str, count: int, payload: str) -> set[int]:
    connection = await asyncpg.connect(dsn)
    await connection.execute(SCHEMA)
    rows = await connection.fetch(FILL, count, payload)
    await connection.close()
    return {row["id"] for row in rows}


async def drain(dsn: str, count: int, workers: int, deliver: Callable[[int, str], Awaitable[None]]) -> None:
    """Until `count` are delivered and deleted."""
    claiming, forgetting = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    waiting: asyncio.Queue[tuple[int, str]] = asyncio.Queue(2 * BATCH)
    done: list[int] = []
    came = asyncio.Event()

    async def claim() -> None:
        while rows := await claiming.fetch(CLAIM, BATCH, LEASE_SECONDS):
            for row in rows:
                await waiting.put((row["id"], row["payload"]))

    async def work() -> None:
        while True:
            id, payload = await waiting.get()  # noqa: A001
            await deliver(id, payload)
            done.append(id)
            came.set()

    async def forget() -> None:
        forgotten = 0
        while forgotten < count:
            await came.wait()
            came.clear()
            batch = done.copy()
            done.clear()
            await forgetting.execute(FORGET, batch)
            forgotten += len(batch)

    tasks = [asyncio.create_task(claim()), *(asyncio.create_task(work()) for _ in range(workers))]
    await forget()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await claiming.close()
    await forgetting.close()
