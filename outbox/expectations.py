"""What is expected of sources and destinations, and when it does not come.

    heard ──a whole `every` of open time without a post──> silent ──a post──> heard
    in time ──its oldest waits for longer than `within`──> late ──waits for less than half of it──> in time

Several processes may watch the same: a state changes by one statement that says what it was, and the statement that
changes it writes down what is to be told of it.  Time in which nobody watched does not count: a source cannot post to
a program that is down, so after a break of a minute each is silent only after a whole `every` of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from outbox.cadence import Cadence, in_words
from outbox.database import Database
from outbox.records import Standing

BREAK = timedelta(minutes=1)  # nobody watched for so long: the watch begins anew
GRACE = timedelta(
    seconds=20
)  # what a door has heard is in its memory for some seconds, and may be stuck there for more
OFTEN_ENOUGH = timedelta(seconds=5)  # to write down that somebody watches

Party = tuple[str, str]
"""A source, and one of its facilities; "" is the source as a whole, or what has no facility."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """A source, or one facility of it, and whether it posts as expected."""

    source: str
    facility: str | None
    heard_at: datetime | None
    expected: str | None  # in words; None: nothing is
    silent_since: datetime | None  # when it was heard last, or the watch began; None: it is heard
    overdue_since: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Something changed its state just now, by our hand."""

    source: str
    facility: str | None
    silent: bool
    since: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class LateTurn:
    destination: str
    late: bool
    waiting: int
    oldest: timedelta
    state: str


class Expectations:
    """The watch over who posts, and over who takes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # ── sources ──────────────────────────────────────────────────────────────────────────────────

    async def hear(self, heard: Mapping[Party, datetime]) -> None:
        """What a door has heard; an older word than the one that is known changes nothing."""
        parties = sorted(heard)
        await self._database.execute(
            """
            INSERT INTO heard AS h (source, facility, at)
            SELECT source, facility, at
              FROM unnest($1::text[], $2::text[], $3::timestamptz[]) AS told (source, facility, at)
                ON CONFLICT (source, facility) DO UPDATE SET at = excluded.at
             WHERE h.at < excluded.at
            """,
            [source for source, _ in parties],
            [facility for _, facility in parties],
            [heard[party] for party in parties],
        )

    async def watch(self, expected: Mapping[Party, Cadence]) -> tuple[list[Watched], list[Turn]]:
        """How each of them stands, and what has changed just now."""
        await self._go_on_watching(expected)
        stands = await self.standings(expected)
        silent = [w for w in stands if w.silent_since is None and w.overdue_since is not None]
        resumed = [w for w in stands if w.silent_since is not None and _heard_since(w)]
        turns = await self._fall_silent(silent, expected) + await self._resume(resumed)
        if turns:
            stands = await self.standings(expected)
        return stands, turns

    async def _go_on_watching(self, expected: Mapping[Party, Cadence]) -> None:
        parties = sorted(expected)
        await self._database.execute(
            """
            INSERT INTO expectations AS e (source, facility, terms, watched_since, watched_at)
            SELECT source, facility, terms, now(), now()
              FROM unnest($1::text[], $2::text[], $3::text[]) AS told (source, facility, terms)
                ON CONFLICT (source, facility) DO UPDATE
               SET terms = excluded.terms,
                   watched_since = CASE WHEN e.terms = excluded.terms AND e.watched_at > now() - $4::interval
                                        THEN e.watched_since
                                        ELSE now()
                                   END,
                   watched_at = now()
             WHERE e.terms <> excluded.terms
                OR e.watched_at < now() - $5::interval
            """,
            [source for source, _ in parties],
            [facility for _, facility in parties],
            [str(expected[party]) for party in parties],
            BREAK,
            OFTEN_ENOUGH,
        )

    async def standings(self, expected: Mapping[Party, Cadence]) -> list[Watched]:
        """Each that is expected, and each that was heard."""
        rows = await self._database.fetch(
            """
            WITH parties AS (
                SELECT source, facility, true AS expected
                  FROM unnest($1::text[], $2::text[]) AS told (source, facility)
                 UNION
                SELECT source, facility, false
                  FROM heard
                 WHERE (source, facility) NOT IN (SELECT source, facility FROM unnest($1::text[], $2::text[]) AS told (source, facility))
            )
            SELECT p.source, p.facility, p.expected, e.watched_since, e.silent_since, clock_timestamp() AS now,
                   (SELECT max(h.at)
                      FROM heard AS h
                     WHERE h.source = p.source
                       AND (h.facility = p.facility OR p.facility = '' AND p.expected)) AS heard_at
              FROM parties AS p
              LEFT JOIN expectations AS e ON (e.source, e.facility) = (p.source, p.facility) AND p.expected
             ORDER BY p.source, p.facility
            """,
            [source for source, _ in expected],
            [facility for _, facility in expected],
        )
        found = []
        for row in rows:
            cadence = expected.get((row["source"], row["facility"]))
            overdue = None
            if cadence is not None and row["watched_since"] is not None:
                known = max(row["watched_since"], row["heard_at"] or row["watched_since"])
                overdue = cadence.overdue(known, row["now"] - GRACE)
            found.append(
                Watched(
                    source=row["source"],
                    facility=row["facility"] or None,
                    heard_at=row["heard_at"],
                    expected=None if cadence is None else str(cadence),
                    silent_since=row["silent_since"],
                    overdue_since=overdue,
                )
            )
        return found

    async def _fall_silent(self, watched: Sequence[Watched], expected: Mapping[Party, Cadence]) -> list[Turn]:
        """Unless it was heard meanwhile, or another process was quicker."""
        if not watched:
            return []
        rows = await self._database.fetch(
            """
            WITH silent AS (
                UPDATE expectations AS e
                   SET silent_since = coalesce(told.heard_at, e.watched_since)
                  FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::text[]) AS told (source, facility, heard_at, every)
                 WHERE (e.source, e.facility) = (told.source, told.facility)
                   AND e.silent_since IS NULL
                   AND NOT EXISTS (SELECT
                                     FROM heard AS h
                                    WHERE h.source = told.source
                                      AND (h.facility = told.facility OR told.facility = '')
                                      AND h.at > coalesce(told.heard_at, '-infinity'))
                RETURNING e.source, e.facility, e.silent_since, told.every
            ), announced AS (
                INSERT INTO announcements (type, subject, facility, data)
                SELECT 'sluicegate.source.silent', 'source/' || source, nullif(facility, ''),
                       json_strip_nulls(json_build_object('source', source, 'facility', nullif(facility, ''),
                                                          'since', rfc3339(silent_since), 'every', every))
                  FROM silent
            )
            SELECT source, facility, silent_since FROM silent
            """,
            [w.source for w in watched],
            [w.facility or "" for w in watched],
            [w.heard_at for w in watched],
            [in_words(expected[w.source, w.facility or ""].every) for w in watched],
        )
        return [
            Turn(source=row["source"], facility=row["facility"] or None, silent=True, since=row["silent_since"])
            for row in rows
        ]

    async def _resume(self, watched: Sequence[Watched]) -> list[Turn]:
        if not watched:
            return []
        rows = await self._database.fetch(
            """
            WITH resumed AS (
                UPDATE expectations AS e
                   SET silent_since = NULL
                  FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[]) AS told (source, facility, since, heard_at)
                 WHERE (e.source, e.facility, e.silent_since) = (told.source, told.facility, told.since)
                RETURNING e.source, e.facility, told.since, told.heard_at
            ), announced AS (
                INSERT INTO announcements (type, subject, facility, data)
                SELECT 'sluicegate.source.resumed', 'source/' || source, nullif(facility, ''),
                       json_strip_nulls(json_build_object('source', source, 'facility', nullif(facility, ''),
                                                          'since', rfc3339(since), 'heard_at', rfc3339(heard_at)))
                  FROM resumed
            )
            SELECT source, facility, since FROM resumed
            """,
            [w.source for w in watched],
            [w.facility or "" for w in watched],
            [w.silent_since for w in watched],
            [w.heard_at for w in watched],
        )
        return [
            Turn(source=row["source"], facility=row["facility"] or None, silent=False, since=row["since"])
            for row in rows
        ]

    # ── destinations ─────────────────────────────────────────────────────────────────────────────

    async def judge(self, standings: Sequence[Standing], within: Mapping[str, timedelta]) -> list[LateTurn]:
        """Who is late now, or is late no more.

        It is late no more only when its oldest waits for less than half of what it may: one that is as slow as it is
        asked to be would turn every few seconds.
        """
        expected = [s for s in standings if s.name in within]
        late = [s for s in expected if _oldest(s) > within[s.name]]
        recovered = [s for s in expected if _oldest(s) < within[s.name] / 2]
        rows = await self._database.fetch(
            """
            WITH turned AS (
                UPDATE destinations AS d
                   SET late_since = CASE WHEN told.late THEN now() - told.oldest END
                  FROM unnest($1::text[], $2::boolean[], $3::interval[], $4::bigint[], $5::text[], $6::text[])
                    AS told (name, late, oldest, waiting, state, within)
                 WHERE d.name = told.name
                   AND (d.late_since IS NULL) = told.late
                RETURNING told.*
            ), announced AS (
                INSERT INTO announcements (type, subject, data)
                SELECT CASE WHEN late THEN 'sluicegate.destination.late' ELSE 'sluicegate.destination.recovered' END,
                       'destination/' || name,
                       json_strip_nulls(json_build_object(
                           'destination', name, 'state', replace(state, ' ', '_'), 'waiting', waiting,
                           'oldest', CASE WHEN late THEN rfc3339(now() - oldest) END, 'within', within))
                  FROM turned
            )
            SELECT name, late, oldest, waiting, state FROM turned
            """,
            [s.name for s in (*late, *recovered)],
            [True] * len(late) + [False] * len(recovered),
            [_oldest(s) for s in (*late, *recovered)],
            [s.waiting for s in (*late, *recovered)],
            [s.state for s in (*late, *recovered)],
            [in_words(within[s.name]) for s in (*late, *recovered)],
        )
        return [
            LateTurn(
                destination=row["name"],
                late=row["late"],
                waiting=row["waiting"],
                oldest=row["oldest"],
                state=row["state"],
            )
            for row in rows
        ]

    async def late(self) -> dict[str, datetime]:
        """The destinations that are late, and how long since its oldest was owed when that was noticed."""
        rows = await self._database.fetch("SELECT name, late_since FROM destinations WHERE late_since IS NOT NULL")
        return {row["name"]: row["late_since"] for row in rows}


def _heard_since(watched: Watched) -> bool:
    return watched.heard_at is not None and watched.silent_since is not None and watched.heard_at > watched.silent_since


def _oldest(standing: Standing) -> timedelta:
    return timedelta(seconds=standing.oldest_waiting_seconds or 0)
