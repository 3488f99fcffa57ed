"""What an event costs, in units that no machine changes: statements, bytes of write-ahead log, dead rows."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest_asyncio

from outbox.database import Connection, Database
from outbox.intake_batch import IntakeBatch
from outbox.store import Arrival, Outbox
from outbox.waking import Waker
from tests.house import House, Partner, house_on, until

BATCH, BATCHES = 25, 40
EVENTS = BATCH * BATCHES
A_SECOND = 8  # statements, whatever there is to do: beats, sweeps, polls
DATA = '{"id":4711,"name":"P00042","state":"purchase","amount":"1250.00","currency":"EUR","partner":"%s"}' % ("x" * 180)


class Counting(Database):
    """Counts what it sends, by the first words of the statement."""

    def __init__(self, *arguments, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        self.sent: Counter[str] = Counter()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        async with super().connection() as connection:
            connection.add_query_logger(self._note)
            try:
                yield connection
            finally:
                connection.remove_query_logger(self._note)

    def _note(self, record) -> None:
        """But for what asyncpg asks once on each connection."""
        if "typeinfo" in record.query or "cur, set_config" in record.query:
            return
        self.sent[" ".join(record.query.split()[:6])] += 1


@dataclass
class Meter:
    """Reads what the server counts."""

    superuser: Database
    database: Counting

    async def wal(self) -> str:
        return await self.superuser.fetchval("SELECT pg_current_wal_insert_lsn()::text")

    async def wal_since(self, start: str) -> int:
        """Bytes, without the images of whole pages that follow on a checkpoint."""
        return await self.superuser.fetchval(
            "SELECT sum(record_size)::bigint FROM pg_get_wal_stats($1::text::pg_lsn, pg_current_wal_insert_lsn())",
            start,
        )

    async def died(self) -> int:
        return await self.superuser.fetchval("SELECT sum(n_tup_del + n_tup_upd)::bigint FROM pg_stat_user_tables")


@pytest_asyncio.fixture
async def house(dsn: str) -> AsyncIterator[House]:
    async with house_on(dsn) as house:
        yield house


@pytest_asyncio.fixture
async def meter(house: House) -> AsyncIterator[Meter]:
    superuser = await Database.connect(urlsplit(house.dsn)._replace(netloc="postgres@").geturl(), size=1)
    await superuser.execute("CREATE EXTENSION pg_walinspect SCHEMA public")
    await superuser.execute("SET search_path = sluicegate, public")
    database = await Counting.connect(house.dsn, size=4, pinned=True)
    house.outbox = Outbox(intake=database, dispatch=database)
    yield Meter(superuser, database)
    await database.close()
    await superuser.close()


def intake(house: House, waker: Waker) -> IntakeBatch:
    return IntakeBatch(house.outbox, buckets=house.buckets, wake=waker.wake, sizes=lambda _: None, connections=1)


async def test_an_event_with_one_delivery_costs_few_statements_little_log_and_two_dead_rows(
    house: House, meter: Meter
) -> None:
    await house.destination("ledger")
    partner = Partner()
    async with house.dispatching(house.target("ledger", partner, concurrency=50)) as dispatcher:
        waker = Waker(house.outbox)
        waker.dispatch_here(dispatcher.wake)
        batch = intake(house, waker)
        await asyncio.gather(*(batch.add(house.arrival("ledger", data=DATA)) for _ in range(BATCH)))
        await house.drained()
        await asyncio.sleep(1.2)
        start, died = await meter.wal(), await meter.died()
        meter.database.sent.clear()
        for n in range(BATCHES):
            await asyncio.gather(*(batch.add(house.arrival("ledger", data=DATA)) for _ in range(BATCH)))
            await until(lambda: len(partner.asked) == (n + 2) * BATCH)  # noqa: B023
        await house.drained()
        log, sent = await meter.wal_since(start), meter.database.sent.total()
        await asyncio.sleep(1.2)
        died = await meter.died() - died
    assert sent <= 0.5 * EVENTS, meter.database.sent
    assert log <= 1700 * EVENTS, log / EVENTS
    assert died <= 2 * EVENTS, died / EVENTS


async def test_each_further_delivery_of_an_event_costs_a_third_of_the_log(house: House, meter: Meter) -> None:
    names = [f"ledger-{n}" for n in range(3)]
    for name in names:
        await house.destination(name)
    partner = Partner()
    async with house.dispatching(*(house.target(name, partner, concurrency=50) for name in names)) as dispatcher:
        waker = Waker(house.outbox)
        waker.dispatch_here(dispatcher.wake)
        batch = intake(house, waker)

        async def log(*to: str) -> float:
            """Bytes an event."""
            start = await meter.wal()
            for _ in range(BATCHES // 2):
                asked = len(partner.asked)
                await asyncio.gather(*(batch.add(house.arrival(*to, data=DATA)) for _ in range(BATCH)))
                await until(lambda: len(partner.asked) == asked + BATCH * len(to))  # noqa: B023
            await house.drained()
            return await meter.wal_since(start) / (BATCH * (BATCHES // 2))

        await log(*names)  # pages are begun
        one, three = await log(*names[:1]), await log(*names)
    assert (three - one) / 2 <= 600, (one, three)


async def test_an_event_that_comes_alone_costs_three_statements(house: House, meter: Meter) -> None:
    """Also one in order, as long as nothing else waits for its subject."""
    await house.destination("ledger", shards=4)
    took = await a_hundred_alone(
        house, meter, lambda n: house.arrival("ledger", subject=f"order/{n % 3}", ordered=True)
    )
    assert meter.database.sent.total() <= 3 * 100 + A_SECOND * (took + 1), meter.database.sent


async def test_an_event_that_needs_no_order_costs_two_where_it_was_stored(house: House, meter: Meter) -> None:
    """It is handed over, and not read."""
    await house.destination("ledger")
    took = await a_hundred_alone(house, meter, lambda _: house.arrival("ledger"))
    assert meter.database.sent.total() <= 2 * 100 + A_SECOND * (took + 1), meter.database.sent


async def a_hundred_alone(house: House, meter: Meter, made: Callable[[int], Arrival]) -> float:
    """Each stored when the one before is delivered, by a program that is door and dispatcher; the seconds that it took."""
    partner = Partner()
    async with house.dispatching(house.target("ledger", partner)) as dispatcher:
        house.outbox.hand_over_to(dispatcher.take)
        waker = Waker(house.outbox)
        waker.dispatch_here(dispatcher.wake)
        batch = intake(house, waker)
        await asyncio.sleep(1.5)
        meter.database.sent.clear()
        began = time.monotonic()
        for n in range(100):
            await batch.add(made(n))
            await until(lambda: len(partner.asked) == n + 1)  # noqa: B023
        await house.drained()
        return time.monotonic() - began


async def test_a_service_that_has_nothing_to_do_hardly_asks_the_database(house: House, meter: Meter) -> None:
    for n in range(5):
        await house.destination(f"shop-{n}", shards=4)
    targets = [house.target(f"shop-{n}", Partner()) for n in range(5)]
    async with house.dispatching(*targets) as dispatcher:
        await until(lambda: len(dispatcher._lanes) == 20)
        await asyncio.sleep(1)
        meter.database.sent.clear()
        await asyncio.sleep(3)
        assert meter.database.sent.total() <= 3 * A_SECOND, meter.database.sent
