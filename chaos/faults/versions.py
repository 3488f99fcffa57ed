"""A release that follows another, with its schema, while orders come in."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from chaos.faults import fault
from chaos.program import Program
from chaos.release import NEWER, Release
from chaos.stage import Plan, Stage
from outbox.database import this_program

LONGEST_WAIT = 2.0  # seconds, of anybody for a table
EXPAND = "ALTER TABLE events ADD COLUMN remark text;\nALTER TABLE pending ADD COLUMN remark text DEFAULT 'none';\n"
INDEX = (
    "-- outside of a transaction\n"
    "CREATE INDEX CONCURRENTLY IF NOT EXISTS pending_by_remark ON pending (remark, event_id);\n"
)
CONTRACT = "ALTER TABLE pending DROP COLUMN remark;\nALTER TABLE events DROP COLUMN remark;\n"


@fault(42, "a migration under traffic, and two releases side by side", Plan(rate=60, gateways=2))
async def migrated(stage: Stage) -> None:
    """Expand beside a dump, both releases at work, the older one gone, contract: 180 deliveries a second all the while."""
    newer = Release(stage.folder / "newer")
    newer.bring("remark", EXPAND, runs_from=this_program())
    newer.bring("remark_index", INDEX, runs_from=this_program())
    async with waits(stage.dsn) as longest, dump(stage.dsn, 3):
        await migrate(stage, newer)
    await asyncio.gather(*(becomes(program, newer) for program in (stage.gateways[1], stage.dispatchers[1])))
    await asyncio.sleep(3)
    await stage.recovered(at_most=2)
    await asyncio.gather(*(becomes(program, newer) for program in (stage.gateways[0], stage.dispatchers[0])))
    newer.bring("no_remark", CONTRACT, runs_from=NEWER)
    async with waits(stage.dsn) as further, dump(stage.dsn, 1):
        await migrate(stage, newer)
    await stage.recovered(at_most=2)
    waited = max(*longest, *further)
    stage.demand(stage.in_time(waited, LONGEST_WAIT), f"nobody waits for a table for {waited:.1f} s")
    broken = sum(sent.status is not None and sent.status >= 500 for sent in stage.sent())
    stage.demand(broken == 0, f"{broken} senders were answered 5xx")
    await stage.load.end()
    stage.demand(not stage.sent_again(), "nothing is sent twice, for nothing was killed")
    stage.note = f"waited {waited:.2f} s for a table at most"


async def migrate(stage: Stage, release: Release) -> None:
    stage.injected += 1
    status, said = await release.migrate(stage.gateway.configuration, stage.environ)
    stage.demand(status == 0, f"the migration ended with {status}: {said[-300:]}")


async def becomes(program: Program, release: Release) -> None:
    program.set_environ(**release.environ)
    await program.again()
    await program.ready()


@asynccontextmanager
async def dump(dsn: str, seconds: float) -> AsyncIterator[None]:
    """Its locks stand in the way of every change of a table, for so long."""
    connection = await asyncpg.connect(dsn)
    transaction = connection.transaction(isolation="repeatable_read")
    await transaction.start()
    await connection.fetch("SELECT FROM sluicegate.pending, sluicegate.events LIMIT 1")

    async def end() -> None:
        await asyncio.sleep(seconds)
        await transaction.rollback()

    ending = asyncio.create_task(end())
    try:
        yield
    finally:
        await ending
        await connection.close()


@asynccontextmanager
async def waits(dsn: str) -> AsyncIterator[list[float]]:
    """How long somebody was waiting for a table, in seconds, by looking often."""
    seen = [0.0]
    connection = await asyncpg.connect(dsn)

    async def look() -> None:
        while True:
            seen.append(
                await connection.fetchval(
                    """
                    SELECT coalesce(extract(epoch FROM max(clock_timestamp() - waitstart))::float8, 0)
                      FROM pg_locks
                     WHERE NOT granted
                       AND locktype = 'relation'
                    """
                )
            )
            await asyncio.sleep(0.02)

    looking = asyncio.create_task(look())
    try:
        yield seen
    finally:
        looking.cancel()
        await asyncio.wait([looking])
        await connection.close()
