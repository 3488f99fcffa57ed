"""What those who post wait for while partitions come and go, beside somebody's dump and somebody's VACUUM FREEZE."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta
from statistics import median

import asyncpg

from benchmarks.rows import Figure, Ground, Row, Unbalanced, at_most
from outbox.database import Unavailable
from outbox.intake_batch import IntakeBatch
from tests.house import DAY, House, house_on

RATE = 200  # arrivals a second
SECONDS = 4  # with, and as long without, in turns
LONG_PAST = 60 * DAY  # where nothing arrives: of its days partitions are made and dropped again


async def waits(ground: Ground) -> Figure:
    values, limits, slowest = [], [], []
    async with house_on(ground.dsn) as house:
        await house.destination("ledger")
        await arrive(house)
        for number in range(ground.rounds):
            async with beside(ground.dsn):
                limits.append(p99(await arrive(house)))
            async with beside(ground.dsn, coming_and_going=LONG_PAST + number * 20 * DAY):
                took = await arrive(house)
            values.append(p99(took))
            slowest.append(max(took))
        arrived = (2 * ground.rounds + 1) * RATE * SECONDS
        if not await house.count("events") == await house.count("pending") == arrived:
            raise Unbalanced(f"of {arrived} that were accepted not all are there")
    return Figure(values, limits, note=f"the longest wait of a round {1000 * median(slowest):.0f} ms")


async def longest_wait(ground: Ground) -> Figure:
    figures = []
    async with house_on(ground.dsn) as house:
        await house.destination("ledger")
        await arrive(house)
        for number in range(ground.rounds):
            async with beside(ground.dsn, coming_and_going=LONG_PAST + number * 20 * DAY):
                figures.append(1000 * max(await arrive(house)))
    return Figure(figures)


async def arrive(house: House) -> list[float]:
    """Seconds from when each was due until it was durable, at a fixed rate whatever becomes of the ones before."""
    batch = IntakeBatch(house.outbox, buckets=house.buckets, wake=lambda _: None, sizes=lambda _: None)

    async def one(due: float) -> float:
        await asyncio.sleep(due - time.monotonic())
        await batch.add(house.arrival("ledger"))
        return time.monotonic() - due

    began = time.monotonic() + 0.01
    took = await asyncio.gather(*(one(began + number / RATE) for number in range(RATE * SECONDS)))
    await batch.close()
    return took


def p99(took: list[float]) -> float:
    return 1000 * sorted(took)[len(took) * 99 // 100]


@asynccontextmanager
async def beside(dsn: str, *, coming_and_going: timedelta | None = None) -> AsyncIterator[None]:
    """A dump and a VACUUM, and partitions so long ago, in a process of its own; raises if it could not do it."""
    days = str(coming_and_going // DAY) if coming_and_going else ""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.partitions", dsn, days),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin
    assert process.stdout
    await process.stdout.readline()  # the dump has begun
    try:
        yield
    finally:
        process.stdin.close()
        left, _ = await process.communicate()
    if process.returncode != 0 or left != b"gone\n":
        raise Unbalanced("the partitions were not made and dropped")


# ── in the process ──────────────────────────────────────────────────────────────────────────────────


async def disturb(dsn: str, past: timedelta | None) -> None:
    """Partitions are made and their dropping begins while the dump runs; it can end when the dump has."""
    async with house_on(dsn) as house:
        over = asyncio.Event()
        vacuuming = asyncio.create_task(vacuum(dsn, over))
        async with dump(dsn):
            print("dumping", flush=True)
            dumped = asyncio.create_task(asyncio.sleep(SECONDS / 2))
            coming_and_going = asyncio.create_task(come_and_go(house, house.clock.now() - past)) if past else None
            await dumped
        await asyncio.to_thread(sys.stdin.read)
        over.set()
        await vacuuming
        if coming_and_going:
            await coming_and_going
    print("gone")


async def come_and_go(house: House, then: datetime) -> None:
    await house.partitions.ensure(then)
    await drop(house, then + 20 * DAY)


async def drop(house: House, by: datetime) -> None:
    for table in ("events", "attempts"):
        while partitions := await house.partitions.over(table, by):
            with suppress(Unavailable):  # as the running service does: it comes again
                await house.partitions.drop(table, partitions[0])


async def vacuum(dsn: str, over: asyncio.Event) -> None:
    connection = await asyncpg.connect(dsn, server_settings={"search_path": "sluicegate"})
    while not over.is_set():
        for table in ("pending", "events", "attempts", "dedup"):
            await connection.execute(f"VACUUM FREEZE {table}")
    await connection.close()


@asynccontextmanager
async def dump(dsn: str) -> AsyncIterator[None]:
    """As pg_dump does: one snapshot, and a lock on each table."""
    connection = await asyncpg.connect(dsn, server_settings={"search_path": "sluicegate"})
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        await connection.execute("LOCK TABLE events, attempts, dedup, pending IN ACCESS SHARE MODE")
        await connection.fetchval("SELECT count(*) FROM events")
        yield
    await connection.close()


ROWS = (
    Row(
        name="partitions",
        what="accepted, durable, p99, beside a snapshot and VACUUM FREEZE, while partitions come and go",
        unit="ms",
        limit="the snapshot and VACUUM FREEZE alone",
        goals=(at_most(1.3),),
        seconds=55,
        take=waits,
    ),
    Row(
        name="partitions-longest",
        what="the longest wait meanwhile",
        unit="ms",
        goals=(at_most(100, "ms"),),
        seconds=35,
        long=True,
        take=longest_wait,
    ),
)

if __name__ == "__main__":
    asyncio.run(disturb(sys.argv[1], int(sys.argv[2]) * DAY if sys.argv[2] else None))
