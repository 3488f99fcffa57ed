"""Partitions: made ahead, dropped when their days are over, never at the cost of those who write meanwhile.

One partition a transaction, made beside its table and then attached, detached concurrently and then dropped, always
with a short lock_timeout: the plain forms stop intake for as long as somebody's dump runs.
"""

import asyncio
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from random import random

import asyncpg

from observability.failpoints import failpoint
from outbox.database import SESSION, Database, Unavailable
from outbox.store import Buckets

AHEAD = 7  # days for which events find a partition
BORDER = timedelta(minutes=1)  # around it a dedup key goes into both buckets; far more than a statement may take
LEAST = {
    "events": 2,
    "attempts": 2,
    "dedup": 1,
}  # ahead; with less, somebody has to find out what keeps them from being made
PATIENCE = timedelta(milliseconds=50)  # how long a lock is waited for, each time, and so whoever queues up behind us
TRIES = 70
BREATH = timedelta(milliseconds=50)  # after each, since all who write have to plan anew then
GONE = (asyncpg.UndefinedTableError, asyncpg.ObjectNotInPrerequisiteStateError)  # somebody was quicker
MAKING = 0x51C2  # the advisory lock of whoever makes a partition
DAILY = ("events", "attempts")
DAY = timedelta(days=1)
UNBELIEVED = 3 * DAY  # after a gap the first partition is of the day before, so for two days and some hours


@dataclass(frozen=True, slots=True)
class Partition:
    """Holds from `begins` up to `ends`."""

    name: str
    begins: datetime
    ends: datetime
    leaving: bool  # its detach was begun, and may be over


class Partitions:
    """Knows which partitions there are; whatever instant it speaks of is the database's."""

    def __init__(self, database: Database, *, dedup: timedelta) -> None:
        self._database = database
        self._dedup = dedup
        self._buckets: list[Partition] = []

    async def ensure(self, now: datetime) -> dict[str, int]:
        """Make what is missing of the days and buckets ahead; how many are there then, as `ahead` counts."""
        today = _midnight(now)
        days = [today + DAY * n for n in range(-1, AHEAD + 1)]
        for table in DAILY:
            there = {p.begins for p in await self.of(table)}
            if not there:  # a new database, where nobody writes yet
                await self._make(table, *(_of_day(table, day) for day in days))
                there = {p.begins for p in await self.of(table)}
            for day in days:
                if day not in there:
                    await self._make(table, _of_day(table, day))
                    await asyncio.sleep(BREATH.total_seconds())
        await self._ensure_buckets(today, now)
        return await self.ahead(now)

    async def ahead(self, now: datetime) -> dict[str, int]:
        """How many partitions are there beyond the present one, by table."""
        counted = {table: await self.of(table) for table in (*DAILY, "dedup")}
        return {table: sum(p.begins > now for p in partitions) for table, partitions in counted.items()}

    async def leapt(self, now: datetime) -> timedelta | None:
        """Over how many days the clock went without any of the program's, if that was within the last two days.

        Partitions are made a week ahead, without a gap, by whatever runs.  So a gap before the present ones says that
        nothing ran for longer than that; or that the clock is wrong, and what it calls over is not.
        """
        days = [p for p in await self.of("events") if p.begins <= now]
        for before, after in reversed(list(pairwise(days))):
            if before.ends < after.begins:
                return after.begins - before.ends if now < after.begins + UNBELIEVED else None
        return None

    async def _ensure_buckets(self, today: datetime, now: datetime) -> None:
        """The present bucket, the one before it from the very start, and one to come."""
        buckets = await self.of("dedup")
        if not buckets:
            buckets = [self._bucket(today + self._dedup * n) for n in (-1, 0, 1)]
            await self._make("dedup", *buckets)
        while sum(b.begins > now for b in buckets) < 1:
            buckets.append(self._bucket(buckets[-1].ends))
            await self._make("dedup", buckets[-1])
        self._buckets = buckets

    def _bucket(self, begins: datetime) -> Partition:
        return Partition(f"dedup_{begins:%Y%m%d%H%M}", begins, begins + self._dedup, leaving=False)

    def buckets(self, now: datetime) -> Buckets:
        """Where dedup keys go at this instant."""
        for before, current in zip(self._buckets, self._buckets[1:], strict=False):
            if current.begins - BORDER <= now < current.ends - BORDER:
                border = now < current.begins + BORDER
                return Buckets(before=before.begins, current=current.begins, border=border)
        raise RuntimeError(f"no dedup partition for {now:%Y-%m-%d %H:%M}: partitions were not made ahead")

    async def of(self, table: str) -> list[Partition]:
        """The partitions of a table, the oldest first."""
        rows = await self._database.fetch(
            """
            SELECT c.relname AS name, pg_get_expr(c.relpartbound, c.oid) AS bound, i.inhdetachpending AS leaving
              FROM pg_inherits AS i
              JOIN pg_class AS c ON c.oid = i.inhrelid
             WHERE i.inhparent = $1::regclass
            """,
            table,
        )
        return sorted((_partition(row) for row in rows), key=lambda p: p.begins)

    async def over(self, table: str, by: datetime) -> list[Partition]:
        """Those that ended by then, the oldest first; also the ones that were detached, by a process that died then."""
        rows = await self._database.fetch(
            """
            SELECT relname AS name
              FROM pg_class
             WHERE relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = $1::regclass)
               AND relkind = 'r'
               AND NOT relispartition
               AND relname ~ $2
            """,
            table,
            f"^{table}_[0-9]+$",
        )
        length = self._dedup if table == "dedup" else DAY
        detached = [
            Partition(row["name"], at, at + length, leaving=True) for row in rows if (at := _began(row["name"]))
        ]
        partitions = [p for p in [*await self.of(table), *detached] if p.ends <= by]
        return sorted(partitions, key=lambda p: p.begins)

    async def _make(self, table: str, *partitions: Partition) -> None:
        """In one transaction: several only where nobody writes."""
        failpoint("partitions.before_make")
        await self._patiently(
            f"SELECT pg_advisory_xact_lock({MAKING});" + "".join(_made(table, each) for each in partitions),
            done_already=(asyncpg.WrongObjectTypeError,),  # it is a partition
        )

    async def drop(self, table: str, partition: Partition) -> None:
        """From wherever it was left off; a detach that had to wait is pending, and can only be finalized."""
        failpoint("partitions.before_drop")
        if not partition.leaving:
            await self._patiently(f"ALTER TABLE {table} DETACH PARTITION {partition.name} CONCURRENTLY", GONE)
            await asyncio.sleep(BREATH.total_seconds())
        await self._patiently(f"ALTER TABLE {table} DETACH PARTITION {partition.name} FINALIZE", GONE)
        failpoint("partitions.detached")
        await self._patiently(f"DROP TABLE IF EXISTS {partition.name}")
        await asyncio.sleep(BREATH.total_seconds())

    async def drop_old_buckets(self, now: datetime) -> list[str]:
        """Those before the one before the present one."""
        old = await self.over("dedup", self.buckets(now).before)
        for partition in old:
            await self.drop("dedup", partition)
        return [p.name for p in old]

    async def _patiently(self, sql: str, done_already: tuple[type[asyncpg.PostgresError], ...] = ()) -> None:
        """Run it with a short lock_timeout, as often as it takes."""
        for attempt in range(TRIES):
            try:
                async with self._database.connection() as connection:
                    await connection.execute(f"SET lock_timeout = {PATIENCE // timedelta(milliseconds=1)}")
                    try:
                        await connection.execute(sql)
                    finally:
                        await connection.execute(f"SET lock_timeout = '{SESSION['lock_timeout']}'")
            except Unavailable as error:
                if attempt == TRIES - 1 or not isinstance(error.__cause__, asyncpg.LockNotAvailableError):
                    raise
                await asyncio.sleep(0.05 + random() * 0.2)  # noqa: S311  spread, not a secret
            except done_already:
                return
            else:
                return


def _of_day(table: str, day: datetime) -> Partition:
    return Partition(f"{table}_{day:%Y%m%d}", day, day + DAY, leaving=False)


def _made(table: str, partition: Partition) -> str:
    """The SQL that makes one: empty, so no CHECK of its bounds is needed to attach it, which each statement would pay for."""
    lower, upper = _bounds(table, partition)
    return f"""
    CREATE TABLE IF NOT EXISTS {partition.name} (LIKE {table} INCLUDING ALL);
    ALTER TABLE {table} ATTACH PARTITION {partition.name} FOR VALUES FROM ('{lower}') TO ('{upper}');
    """


def _midnight(now: datetime) -> datetime:
    return now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _bounds(table: str, partition: Partition) -> Sequence[str]:
    if table == "dedup":
        return partition.begins.isoformat(), partition.ends.isoformat()
    return _floor(partition.begins), _floor(partition.ends)


def _floor(at: datetime) -> str:
    """The least UUID of version 7 of an instant, as `event_floor` makes it."""
    text = f"{round(at.timestamp() * 1000):012x}".ljust(32, "0")
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _partition(row: asyncpg.Record) -> Partition:
    bounds = re.findall(r"'([^']+)'", row["bound"])
    return Partition(row["name"], _instant(bounds[0]), _instant(bounds[1]), row["leaving"])


def _began(name: str) -> datetime | None:
    """When a table that is called like a partition of ours began to take rows."""
    _, _, digits = name.rpartition("_")
    with suppress(ValueError):
        return datetime.strptime(digits, "%Y%m%d" if len(digits) == 8 else "%Y%m%d%H%M").replace(tzinfo=UTC)
    return None


def _instant(bound: str) -> datetime:
    if re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-.*", bound):
        return datetime.fromtimestamp(int(bound.replace("-", "")[:12], 16) / 1000, UTC)
    return datetime.fromisoformat(bound)
