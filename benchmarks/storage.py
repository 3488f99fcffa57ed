"""What reading costs when much waits, and when somebody's old transaction keeps the dead from being cleared away."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from statistics import median
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg

from benchmarks.dispatch import PAYLOAD, Partner
from benchmarks.rows import Figure, Ground, Row, at_most, reconcile
from outbox.database import migrate
from outbox.lanes import BEGINNING, LOWEST
from outbox.store import Destination, Outbox, Reading, Taken
from tests.house import House, house_on

FEW = 1_000
READ = 200
WINDOWS = FEW // READ  # the reads of one pass: as much is looked at, however much waits
PASSES = 10
WITH_EVENTS = 100_000  # of what waits; the rest is never read here

BATCH, EVERY = 200, timedelta(milliseconds=100)  # the churn under an old transaction: 2,000 deliveries a second
WARM_UP, CHURN, EDGE = 2, 15, 5  # seconds


# ── reading, when much waits ────────────────────────────────────────────────────────────────────────


async def beside_few(ground: Ground, many: int) -> Figure:
    """A pass reads the first thousand, 200 at a time; in turns on two databases of one server, both of them warm."""
    values, limits = [], []
    async with house_with(ground, FEW) as few, house_with(ground, many) as crowded:
        for number in range(ground.rounds + 1):
            passes = [(await one_pass(few), await one_pass(crowded)) for _ in range(PASSES)]
            if number:  # the first round warms
                limits.append(1000 * median(beside for beside, _ in passes) / WINDOWS)
                values.append(1000 * median(here for _, here in passes) / WINDOWS)
    return Figure(values, limits)


async def one_pass(house: House) -> float:
    """Seconds, by the read of the dispatcher; each read is to find its 200, with their events."""
    [lane] = house.destinations["ledger"].lanes
    due_at, event = BEGINNING, LOWEST
    began = time.perf_counter()
    for _ in range(WINDOWS):
        rows = await house.outbox.read([Reading(lane=lane, due_at=due_at, event=event, room=READ)])
        due_at, event = rows[-1].due_at, rows[-1].event_id
        assert len(rows) == READ
        assert all(row.event for row in rows)
    return time.perf_counter() - began


@asynccontextmanager
async def house_with(ground: Ground, waiting: int) -> AsyncIterator[House]:
    """A database of its own, in which so many deliveries wait for one destination; all of them are due."""
    dsn = await made(ground, f"waiting_{waiting}")
    async with house_on(dsn) as house:
        await house.destination("ledger")
        await fill(house, "ledger", waiting, events=WITH_EVENTS)
        yield house


async def made(ground: Ground, name: str) -> str:
    """The address of a new database on the same server, with the schema in it."""
    server = urlsplit(ground.dsn)
    superuser = await asyncpg.connect(server._replace(netloc="postgres@", path="/postgres").geturl())
    await superuser.execute(f"CREATE DATABASE {name} OWNER sluicegate")
    await superuser.close()
    dsn = server._replace(netloc="sluicegate@", path=f"/{name}").geturl()
    await migrate(dsn)
    return dsn


async def fill(house: House, name: str, waiting: int, *, events: int) -> None:
    """In one statement each and one transaction, since by the door it would take an hour; the first so many have events."""
    connection = await asyncpg.connect(house.dsn, server_settings={"search_path": "sluicegate"})
    destination = house.destinations[name]
    async with connection.transaction():
        await insert(connection, destination, waiting, events)
    await connection.execute("VACUUM (ANALYZE) pending")
    await connection.execute("VACUUM (ANALYZE) events")
    await connection.close()


async def insert(connection: asyncpg.Connection, destination: Destination, waiting: int, events: int) -> None:
    await connection.execute(
        """
        INSERT INTO pending (event_id, lane, due_at, owed_since)
        SELECT uuidv7(), $1, clock_timestamp(), clock_timestamp()
          FROM generate_series(1, $2::int)
        """,
        destination.lanes[0],
        waiting,
    )
    await connection.execute(
        """
        INSERT INTO events (id, source, type, subject, time, received_at, policy, policy_version, digest, owed, data)
        SELECT event_id, 'shop', 'shop.order.paid', 'order/1', due_at, due_at, 'order', 1, event_id, ARRAY[$1::smallint],
               $2::json
          FROM (SELECT event_id, due_at FROM pending ORDER BY due_at, event_id LIMIT $3) AS owing
        """,
        destination.id,
        PAYLOAD,
        events,
    )
    await connection.execute(
        "INSERT INTO tally (day, what, destination, n) VALUES (current_date, 1, 0, $1), (current_date, 2, $2, $1)",
        waiting,
        destination.id,
    )


# ── reading, while an old transaction stays open ────────────────────────────────────────────────────


@dataclass
class Timed:
    """An outbox whose reads of a batch are timed: (when, how long), in seconds."""

    outbox: Outbox
    reads: list[tuple[float, float]] = field(default_factory=list)

    def __getattr__(self, name: str) -> object:
        return getattr(self.outbox, name)

    async def read(self, readings: Sequence[Reading]) -> list[Taken]:
        began = time.monotonic()
        rows = await self.outbox.read(readings)
        if len(rows) >= BATCH // 2:
            self.reads.append((began, time.monotonic() - began))
        return rows


async def beside_an_old_one(ground: Ground, *, writes: bool) -> Figure:
    """Each of the last seconds beside each of the first, in one run at a fixed rate."""
    async with house_on(ground.dsn) as house:
        await house.destination("ledger")
        timed, partner = Timed(house.outbox), Partner()
        house.outbox = timed  # type: ignore[assignment]  # it is one, but for what is timed
        async with house.dispatching(house.target("ledger", partner, concurrency=BATCH)):
            accepted = await churn(house, WARM_UP)
            async with open_transaction(house.dsn, writes=writes):
                began = time.monotonic()
                accepted += await churn(house, CHURN)
                await house.drained(20)
                slowest = max(took for at, took in timed.reads if at >= began)
        reconcile(accepted, partner.taken)
    by_second: list[list[float]] = [[] for _ in range(CHURN)]
    for at, took in timed.reads:
        if 0 <= at - began < CHURN:
            by_second[int(at - began)].append(took * 1000)
    medians = [median(took) for took in by_second]
    return Figure(medians[-EDGE:], medians[:EDGE], note=f"the slowest {slowest * 1000:.0f} ms")


async def churn(house: House, seconds: float) -> list[UUID]:
    """A batch is due each tenth of a second, however long the last one took."""
    accepted: list[UUID] = []
    began = time.monotonic()
    for number in range(round(seconds / EVERY.total_seconds())):
        await asyncio.sleep(began + number * EVERY.total_seconds() - time.monotonic())
        arrivals = [house.arrival("ledger", data=PAYLOAD) for _ in range(BATCH)]
        stored = await house.outbox.add(arrivals, house.buckets())
        accepted += [answer.event for answer in stored]
        [dispatcher] = house.dispatchers
        dispatcher.wake({house.destinations["ledger"].lanes[0]: stored[0].due_at})  # type: ignore[dict-item,union-attr]
    return accepted


@asynccontextmanager
async def open_transaction(dsn: str, *, writes: bool) -> AsyncIterator[None]:
    """Somebody's report, or somebody's forgotten COMMIT: as long as it is open, nothing that dies is cleared away."""
    connection = await asyncpg.connect(dsn, server_settings={"search_path": "sluicegate"})
    try:
        async with connection.transaction(isolation="repeatable_read"):
            await connection.fetchval("SELECT count(*) FROM pending")
            if writes:
                await connection.execute("CREATE TABLE somebodys (n int)")
            yield
    finally:
        await connection.close()


ROWS = (
    Row(
        name="read-100k",
        what="read of 200 due deliveries, 100,000 waiting",
        unit="ms",
        limit="1,000 waiting",
        goals=(at_most(1.2),),
        seconds=10,
        take=lambda ground: beside_few(ground, 100_000),
    ),
    Row(
        name="read-10M",
        what="read of 200 due deliveries, 10,000,000 waiting",
        unit="ms",
        limit="1,000 waiting",
        goals=(at_most(1.2),),
        seconds=240,
        take=lambda ground: beside_few(ground, 10_000_000),
        long=True,
    ),
    Row(
        name="read-snapshot",
        what="read of 200, last 5 s of 15 s at 2,000/s beside a REPEATABLE READ snapshot",
        unit="ms",
        limit="the first 5 s",
        goals=(at_most(1.3),),
        seconds=22,
        take=lambda ground: beside_an_old_one(ground, writes=False),
    ),
    Row(
        name="read-writer",
        what="the same beside a transaction that has written",
        unit="ms",
        limit="the first 5 s",
        goals=(at_most(1.3),),
        seconds=22,
        take=lambda ground: beside_an_old_one(ground, writes=True),
    ),
)
