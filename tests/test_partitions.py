"""Partitions come and go beside those who write, whatever else goes on: other processes, dumps, crashes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from datetime import timedelta

import pytest
import pytest_asyncio

from outbox import partitions
from outbox.database import Database, Unavailable, migrate
from outbox.partitions import Partitions
from outbox.retention import Keep, Retention
from tests.house import DAY, House, house_on

KEEP = Keep(events=30 * DAY, dead_letters=30 * DAY, audit=365 * DAY)


@pytest.fixture(autouse=True)
def without_a_breath(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "BREATH", timedelta(0))  # nobody here has to plan anew in peace


@pytest_asyncio.fixture
async def house(dsn: str) -> AsyncIterator[House]:
    async with house_on(dsn) as house:
        yield house


async def names(database: Database) -> set[str]:
    rows = await database.fetch(
        "SELECT relname FROM pg_class WHERE relkind = 'r' AND relname ~ '^(events|attempts|dedup)_[0-9]+$'"
    )
    return {row["relname"] for row in rows}


async def test_several_processes_that_start_at_once_make_each_partition_once(empty_dsn: str) -> None:
    await migrate(empty_dsn)
    async with AsyncExitStack() as stack:
        databases = []
        for _ in range(4):
            database = await Database.connect(empty_dsn, size=1)
            stack.push_async_callback(database.close)
            databases.append(database)
        now = await databases[0].fetchval("SELECT clock_timestamp()")
        ahead = await asyncio.gather(*(Partitions(d, dedup=7 * DAY).ensure(now) for d in databases))
        assert ahead == [{"events": 7, "attempts": 7, "dedup": 1}] * 4


async def test_partitions_are_made_and_dropped_while_somebodys_dump_runs(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "TRIES", 10)  # so it gives up sooner, and comes again when the dump is over
    past = house.clock.now() - 60 * DAY
    await house.partitions.ensure(past)
    old = {
        name for name in await names(house.intake) if name < f"events_{past + 20 * DAY:%Y%m%d}" and name[:6] == "events"
    }
    assert old
    retention = Retention(house.intake, house.partitions, KEEP)
    async with house.dispatch.transaction() as dump:
        await dump.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        await dump.execute("LOCK TABLE events, attempts, dedup IN ACCESS SHARE MODE")
        await house.partitions.ensure(house.clock.now() + DAY)
        running = asyncio.create_task(retention.run(house.clock.now()))
        for _ in range(20):
            await house.outbox.add([house.arrival()], house.buckets())
            await asyncio.sleep(0.05)
        with suppress(Unavailable):
            await running
    await retention.run(house.clock.now())
    assert not old & await names(house.intake)


async def test_what_was_detached_when_the_process_died_is_dropped_by_the_next(house: House) -> None:
    past = house.clock.now() - 60 * DAY
    await house.partitions.ensure(past)
    left = f"events_{past:%Y%m%d}"
    await house.intake.execute(f"ALTER TABLE events DETACH PARTITION {left} CONCURRENTLY")
    await Retention(house.intake, house.partitions, KEEP).run(house.clock.now())
    assert left not in await names(house.intake)


async def test_several_processes_may_keep_and_prove_at_once(dsn: str) -> None:
    async with AsyncExitStack() as stack:
        houses = [await stack.enter_async_context(house_on(dsn)) for _ in range(3)]
        now = houses[0].clock.now()
        await houses[0].partitions.ensure(now - 60 * DAY)
        retentions = [Retention(house.intake, house.partitions, KEEP) for house in houses]
        assert await asyncio.gather(*(retention.prove(now) for retention in retentions)) == [[], [], []]
        await asyncio.gather(*(retention.run(now) for retention in retentions))
        await asyncio.gather(*(retention.roll_up() for retention in retentions))
        kept = f"{now - 32 * DAY:%Y%m%d}"
        assert all(name.rpartition("_")[2] > kept for name in await names(houses[0].intake) if name[:5] != "dedup")
