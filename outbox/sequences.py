"""The numbers that senders give their messages: what is missing is told, though nobody knows what it was.

    1 2 3 . . 6 7        a gap 4–5 is noticed when 6 comes; it may still be under way, and is told after a minute
    1 2 3 4 5 6 7        it is filled: told, if the gap was
    1 2 3 4 5 6 1 2      the sender began again at 0 or 1: a new count, and what was missing before stays missing

They are counted in the background from the events that were stored, by one process at a time and each event at least
once: counting it twice changes nothing.  Numbers are identifiers of messages and say nothing of what is in them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import msgspec

from outbox.clock import instant_of
from outbox.database import Connection, Database

PATIENCE = timedelta(seconds=60)  # with a gap, for messages overtake each other
MOST_HOLES = 1000  # of one count; the lowest are given up beyond that
OVERTAKEN = timedelta(seconds=2)  # by so much the first message of a new count may come after the next ones
AT_ONCE = 20_000  # events a transaction
LATE = timedelta(seconds=10)  # by so much an event may be older than the transaction that it is stored in
LATEST = timedelta(minutes=10)  # a transaction that writes for longer than that is not waited for

LOWEST = UUID(int=0)

Hole = tuple[int, int]
"""From the first to the last number, both of them missing."""


@dataclass(slots=True)
class Gap:
    """What was noticed at once, and what of it is still missing."""

    first: int
    last: int
    missing: list[Hole]
    noticed_at: datetime
    told: bool = False


@dataclass(slots=True)
class Count:
    """What was seen of one sender: all from first to last, but what is missing."""

    first: int
    last: int
    began: UUID  # the event that it began with: older ones belong to the count before
    latest: UUID  # the newest event that was counted
    gaps: list[Gap] = field(default_factory=list)
    told: list["Told"] = field(default_factory=list)  # what is to be told of it

    def add(self, numbers: Sequence[tuple[UUID, int]], now: datetime) -> None:
        """Numbers of events in the order in which they were accepted; some of them may have been counted before."""
        newest, again = self.latest, list[tuple[UUID, int]]()
        for event, number in numbers:
            if event < self.began:
                continue
            if event > newest and number <= 1 and (number < self.first or self._has(number)):
                self._restart(event, number)
                for one, overtaken in again:
                    if instant_of(event) - instant_of(one) <= OVERTAKEN:
                        self._see(overtaken, now)
                again.clear()
            elif event > newest and self._has(number):
                again.append((event, number))
            else:
                self._see(number, now)
            self.latest = max(self.latest, event)
        self._fill()
        self._give_up()

    def tell(self, now: datetime) -> None:
        """The gaps that nothing fills."""
        for gap in self.gaps:
            if not gap.told and now - gap.noticed_at >= PATIENCE:
                gap.told = True
                missing = sum(last - first + 1 for first, last in gap.missing)
                self.told.append(Told("gap", gap.missing[0][0], gap.missing[-1][1], missing))

    @property
    def missing(self) -> int:
        return sum(last - first + 1 for gap in self.gaps for first, last in gap.missing)

    def _has(self, number: int) -> bool:
        if not self.first <= number <= self.last:
            return False
        return not any(first <= number <= last for gap in self.gaps for first, last in gap.missing)

    def _see(self, number: int, now: datetime) -> None:
        if number > self.last:
            if number > self.last + 1:
                self.gaps.append(Gap(self.last + 1, number - 1, [(self.last + 1, number - 1)], now))
            self.last = number
        elif number < self.first:
            if number < self.first - 1:
                self.gaps.insert(0, Gap(number + 1, self.first - 1, [(number + 1, self.first - 1)], now))
            self.first = number
        else:
            for gap in self.gaps:
                if gap.first <= number <= gap.last:
                    gap.missing = [part for hole in gap.missing for part in _without(hole, number)]

    def _restart(self, event: UUID, number: int) -> None:
        self.told.append(Told("restarted", number, self.last, 0))
        self.first = self.last = number
        self.began = self.latest = event
        self.gaps = []

    def _fill(self) -> None:
        self.told += [Told("filled", gap.first, gap.last, 0) for gap in self.gaps if gap.told and not gap.missing]
        self.gaps = [gap for gap in self.gaps if gap.missing]

    def _give_up(self) -> None:
        """A sender that numbers at random must not fill the memory: the lowest are not looked for any more."""
        if sum(len(gap.missing) for gap in self.gaps) <= MOST_HOLES:
            return
        lost: list[Hole] = []
        while sum(len(gap.missing) for gap in self.gaps) > MOST_HOLES // 2:
            lost += self.gaps.pop(0).missing
        self.told.append(Told("given_up", lost[0][0], lost[-1][1], sum(last - first + 1 for first, last in lost)))


@dataclass(frozen=True, slots=True)
class Told:
    """`restarted`: from `first` on, after `last`; else: numbers from first to last, so many of which are missing."""

    what: str  # gap, filled, restarted, given_up
    first: int
    last: int
    missing: int
    source: str = ""
    facility: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """How far one facility of a source has counted, and how much of that is missing."""

    source: str
    facility: str | None
    first: int
    last: int
    missing: int
    gaps: int


class Sequences:
    """What every sender counts."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def count(self, fields: Mapping[str, str]) -> list[Told]:
        """Count on, by the field that holds the number of each source; what has come to light.

        Nothing where another process is at it.
        """
        told: list[Told] = []
        more = bool(fields)
        while more:
            async with self._database.transaction() as connection:
                some, more = await _Counting(connection, fields).go_on()
            told += some
        return told

    async def counted(self, sources: Sequence[str]) -> list[Counted]:
        rows = await self._database.fetch(
            """
            SELECT s.source, s.facility, s.first, s.last, count(g) AS gaps,
                   coalesce(sum((SELECT sum(upper(hole) - lower(hole)) FROM unnest(g.missing) AS hole)), 0)::bigint AS missing
              FROM sequences AS s
              LEFT JOIN sequence_gaps AS g ON (g.source, g.facility) = (s.source, s.facility)
             WHERE s.source = ANY ($1::text[])
             GROUP BY s.source, s.facility
             ORDER BY s.source, s.facility
            """,
            list(sources),
        )
        return [
            Counted(
                source=row["source"],
                facility=row["facility"] or None,
                first=row["first"],
                last=row["last"],
                missing=row["missing"],
                gaps=row["gaps"],
            )
            for row in rows
        ]


class _Counting:
    """One transaction of it."""

    def __init__(self, connection: Connection, fields: Mapping[str, str]) -> None:
        self._connection = connection
        self._fields = fields

    async def go_on(self) -> tuple[list[Told], bool]:
        """What has come to light, and whether there is more to count."""
        begin = await self._begin()
        if begin is None:
            return [], False
        since, now = begin
        rows, until, more = await self._events(since)
        counts = await self._counts()
        told: list[Told] = []
        changed: dict[tuple[str, str], Count] = {}
        for party, numbers in rows.items():
            if party not in counts:
                event, number = numbers[0]
                counts[party] = Count(number, number, LOWEST, event)
            counts[party].add(numbers, now)
            changed[party] = counts[party]
        for party, count in counts.items():
            count.tell(now)
            if count.told:
                changed[party] = count
            told += [replace(one, source=party[0], facility=party[1] or None) for one in count.told]
        await self._write(changed)
        await self._announce(told)
        await self._connection.execute(
            "UPDATE counted_sources SET counted_to = greatest(counted_to, $2) WHERE source = ANY ($1::text[])",
            list(self._fields),
            until,
        )
        return told, more

    async def _begin(self) -> tuple[datetime, datetime] | None:
        """Since when events are to be counted, and now; None where another process counts.

        A source that is new here, or has another field, or was not counted for a while, begins now.
        """
        await self._connection.execute(
            """
            INSERT INTO counted_sources (source, field, since, counted_to)
            SELECT source, field, clock_timestamp(), 'epoch'
              FROM unnest($1::text[], $2::text[]) AS told (source, field)
             ORDER BY source
                ON CONFLICT DO NOTHING
            """,
            list(self._fields),
            list(self._fields.values()),
        )
        rows = await self._connection.fetch(
            """
            SELECT source, field, counted_to, clock_timestamp() AS now
              FROM counted_sources
             WHERE source = ANY ($1::text[])
             ORDER BY source
               FOR UPDATE SKIP LOCKED
            """,
            list(self._fields),
        )
        if len(rows) < len(self._fields):
            return None
        now: datetime = rows[0]["now"]
        furthest = max(row["counted_to"] for row in rows)
        if furthest.year < 2000:  # all of them are new
            furthest = now
        anew = [r["source"] for r in rows if r["field"] != self._fields[r["source"]] or r["counted_to"] < furthest]
        if anew:
            await self._begin_anew(anew, furthest)
        return furthest, now

    async def _begin_anew(self, sources: list[str], at: datetime) -> None:
        for sql in (
            "DELETE FROM sequence_gaps WHERE source = ANY ($1::text[])",
            "DELETE FROM sequences WHERE source = ANY ($1::text[])",
        ):
            await self._connection.execute(sql, sources)
        await self._connection.execute(
            """
            UPDATE counted_sources AS c
               SET field = told.field, since = clock_timestamp(), counted_to = $3
              FROM unnest($1::text[], $2::text[]) AS told (source, field)
             WHERE c.source = told.source
            """,
            sources,
            [self._fields[source] for source in sources],
            at,
        )

    async def _events(self, since: datetime) -> tuple[dict[tuple[str, str], list[tuple[UUID, int]]], datetime, bool]:
        """The numbers by party; until when all that can still come was seen; whether there is more.

        Once more those of the last seconds: a transaction that is open may still bring some of that time.
        """
        row = await self._connection.fetchrow(
            """
            WITH seen AS MATERIALIZED (
                SELECT id, source, facility, data
                  FROM events
                 WHERE id >= event_floor($1)
                 ORDER BY id
                 LIMIT $4
            ), numbered AS MATERIALIZED (
                SELECT seen.id, seen.source, coalesce(seen.facility, '') AS facility, seen.data ->> told.field AS number
                  FROM seen
                  JOIN unnest($2::text[], $3::text[]) AS told (source, field) ON told.source = seen.source
                  JOIN counted_sources AS c ON c.source = seen.source AND seen.id >= event_floor(c.since)
            )
            SELECT (SELECT count(*) FROM seen) AS n,
                   (SELECT id FROM seen ORDER BY id DESC LIMIT 1) AS last,
                   least(clock_timestamp() - $5::interval,
                         greatest(clock_timestamp() - $6::interval,
                                  (SELECT min(xact_start)
                                     FROM pg_stat_activity
                                    WHERE backend_xid IS NOT NULL
                                      AND pid <> pg_backend_pid()
                                      AND datname = current_database()) - $5::interval)) AS settled,
                   ARRAY(SELECT (id, source, facility, number::bigint)
                           FROM numbered
                          WHERE number ~ '^[0-9]{1,18}$'
                          ORDER BY id) AS numbers
            """,
            since,
            list(self._fields),
            list(self._fields.values()),
            AT_ONCE,
            LATE,
            LATEST,
        )
        assert row is not None
        found: dict[tuple[str, str], list[tuple[UUID, int]]] = {}
        for event, source, facility, number in row["numbers"]:
            found.setdefault((source, facility), []).append((event, number))
        if row["n"] < AT_ONCE:
            return found, row["settled"], False
        last = instant_of(row["last"])
        return found, min(row["settled"], last), last < row["settled"]

    async def _counts(self) -> dict[tuple[str, str], Count]:
        counts = {
            (row["source"], row["facility"]): Count(row["first"], row["last"], row["began"], row["latest"])
            for row in await self._connection.fetch(
                "SELECT source, facility, first, last, began, latest FROM sequences WHERE source = ANY ($1::text[])",
                list(self._fields),
            )
        }
        for row in await self._connection.fetch(
            """
            SELECT source, facility, first, last, missing, noticed_at, told
              FROM sequence_gaps
             WHERE source = ANY ($1::text[])
             ORDER BY source, facility, first
            """,
            list(self._fields),
        ):
            missing = [(hole.lower, hole.upper - 1) for hole in row["missing"]]
            gap = Gap(row["first"], row["last"], missing, row["noticed_at"], row["told"])
            counts[row["source"], row["facility"]].gaps.append(gap)
        return counts

    async def _write(self, counts: Mapping[tuple[str, str], Count]) -> None:
        if not counts:
            return
        sources, facilities = [source for source, _ in counts], [facility for _, facility in counts]
        await self._connection.execute(
            """
            INSERT INTO sequences AS s (source, facility, first, last, began, latest)
            SELECT source, facility, first, last, began, latest
              FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::uuid[], $6::uuid[])
                AS c (source, facility, first, last, began, latest)
                ON CONFLICT (source, facility) DO UPDATE
               SET first = excluded.first, last = excluded.last, began = excluded.began, latest = excluded.latest
             WHERE (s.first, s.last, s.latest) <> (excluded.first, excluded.last, excluded.latest)
            """,
            sources,
            facilities,
            [count.first for count in counts.values()],
            [count.last for count in counts.values()],
            [count.began for count in counts.values()],
            [count.latest for count in counts.values()],
        )
        await self._connection.execute(
            """
            DELETE FROM sequence_gaps
             WHERE (source, facility) IN (SELECT source, facility FROM unnest($1::text[], $2::text[]) AS c (source, facility))
            """,
            sources,
            facilities,
        )
        await self._connection.executemany(
            """
            INSERT INTO sequence_gaps (source, facility, first, last, missing, noticed_at, told)
            VALUES ($1, $2, $3, $4, $5, $6, $7)
            """,
            [
                (*party, gap.first, gap.last, _multirange(gap.missing), gap.noticed_at, gap.told)
                for party, count in counts.items()
                for gap in count.gaps
            ],
        )

    async def _announce(self, told: Sequence[Told]) -> None:
        await self._connection.executemany(
            "INSERT INTO announcements (type, subject, facility, data) VALUES ($1, $2, $3, $4)",
            [
                (f"sluicegate.sequence.{one.what}", f"source/{one.source}", one.facility, msgspec.json.encode(_data(one)).decode())
                for one in told
            ],
        )  # fmt: skip


def _data(told: Told) -> dict[str, Any]:
    found = {"source": told.source, "facility": told.facility, "first": told.first, "last": told.last}
    counted = {"missing": told.missing} if told.missing else {}
    return {key: value for key, value in (found | counted).items() if value is not None}


def _without(hole: Hole, number: int) -> list[Hole]:
    first, last = hole
    if not first <= number <= last:
        return [hole]
    return [part for part in ((first, number - 1), (number + 1, last)) if part[0] <= part[1]]


def _multirange(holes: Sequence[Hole]) -> list["asyncpg.Range[int]"]:
    return [asyncpg.Range(first, last + 1) for first, last in holes]
