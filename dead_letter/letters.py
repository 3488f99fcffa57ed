"""Dead letters: deliveries that gave up, found by what went wrong, and sent again or laid aside by a person."""

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated
from uuid import UUID, uuid4

import msgspec
from asyncpg import Record

from dead_letter.audit import note
from dead_letter.mend import mend
from observability.names import Attribute, SpanName
from outbox.database import Connection, Database, Unavailable
from outbox.event import OutcomeKind
from outbox.page import Page, page, place_of
from outbox.store import WAKE

if TYPE_CHECKING:
    from observability.tracing import Tracing  # which brings OpenTelemetry with it

AT_ONCE = 100_000  # letters that one replay or discard takes; run again, it takes the next
BATCH = 1_000  # of these in one transaction

Word = Annotated[str, msgspec.Meta(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+$")]
Instant = Annotated[datetime, msgspec.Meta(tz=True)]


class Select(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    rename={"since": "from", "until": "to"},
):
    """Which dead letters: all that is named must hold.  `from` and `to` bound when they died."""

    events: Annotated[tuple[UUID, ...], msgspec.Meta(min_length=1, max_length=1000)] | None = None
    destination: Word | None = None
    cause: Word | None = None
    subject: Word | None = None
    facility: Word | None = None
    since: Instant | None = None
    until: Instant | None = None

    @property
    def empty(self) -> bool:
        """Nothing is named: everything would match."""
        return self == Select()

    @property
    def single(self) -> bool:
        """One event is named: nobody can match more than they looked at."""
        return self.events is not None and len(set(self.events)) == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """A delivery that gave up."""

    event_id: UUID
    destination: str
    type: str | None
    subject: str | None
    facility: str | None
    cause: str
    outcome: str
    status: int | None
    reason: str
    mend: str
    attempts: int
    died_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """What stopped some deliveries, and what a person should do about it."""

    cause: str
    destination: str
    reason: str
    mend: str
    count: int
    first_seen: datetime
    last_seen: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What a replay or discard would take."""

    count: int
    destinations: dict[str, int]
    causes: dict[str, int]
    oldest: datetime | None
    more: bool  # beyond what is taken at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What a replay or discard took."""

    id: UUID  # the audit names it
    count: int
    more: bool  # run it again for the rest


class EmptySelectionError(ValueError):
    """A selection that names nothing would match everything; whoever means that says so."""


class DeadLetters:
    """Find what could not be delivered, and send it again or lay it aside.

    A repair takes a frozen snapshot: what dies, or dies again, while it runs is not in it.  It goes in batches,
    each of which is one transaction with its books and its audit row, so that one that is cut off has done some
    whole batches, and the same again does the rest.
    """

    def __init__(self, database: Database, *, tracing: "Tracing | None" = None) -> None:
        self._database = database
        self._tracing = tracing

    async def letters(self, select: Select, *, cursor: str | None = None, limit: int = 50) -> Page[Letter]:
        """The newest first."""
        before = place_of(cursor, tuple[datetime, UUID, int]) or (None, None, None)
        rows = await self._database.fetch(
            """
            SELECT letter.event_id, letter.destination, destinations.name, letter.cause, letter.outcome, letter.status,
                   letter.reason, letter.attempts, letter.died_at, event.type, event.subject, event.facility
              FROM dead_letters AS letter
              JOIN destinations ON destinations.id = letter.destination
              LEFT JOIN LATERAL (
                   SELECT type, subject, facility FROM events WHERE id = letter.event_id
                    UNION ALL
                   SELECT type, subject, facility FROM carried_events WHERE id = letter.event_id
                    LIMIT 1) AS event ON true
             WHERE ($1::timestamptz IS NULL
                    OR letter.died_at <= $1 AND (letter.died_at, letter.event_id, letter.destination) < ($1, $2, $3))
               AND ($4::uuid[] IS NULL OR letter.event_id = ANY($4))
               AND ($5::text IS NULL OR destinations.name = $5)
               AND ($6::text IS NULL OR letter.cause = $6)
               AND ($7::text IS NULL OR letter.event_id IN (
                    SELECT id FROM events WHERE subject = $7
                     UNION ALL
                    SELECT id FROM carried_events WHERE subject = $7))
               AND ($8::text IS NULL OR event.facility = $8)
               AND ($9::timestamptz IS NULL OR letter.died_at >= $9)
               AND ($10::timestamptz IS NULL OR letter.died_at < $10)
             ORDER BY letter.died_at DESC, letter.event_id DESC, letter.destination DESC
             LIMIT $11
            """,
            *before,
            *_named(select),
            limit + 1,
        )
        return page(rows, limit, item=_letter, place=lambda row: (row["died_at"], row["event_id"], row["destination"]))

    async def causes(self, select: Select, *, cursor: str | None = None, limit: int = 50) -> Page[Cause]:
        """What went wrong, each thing once, the latest first."""
        before = place_of(cursor, tuple[datetime, str]) or (None, None)
        rows = await self._database.fetch(
            """
            SELECT letter.cause, destinations.name, count(*) AS n,
                   min(letter.died_at) AS first_seen, max(letter.died_at) AS last_seen,
                   (array_agg(letter.reason ORDER BY letter.died_at DESC))[1] AS reason,
                   (array_agg(letter.outcome ORDER BY letter.died_at DESC))[1] AS outcome,
                   (array_agg(letter.status ORDER BY letter.died_at DESC))[1] AS status
              FROM dead_letters AS letter
              JOIN destinations ON destinations.id = letter.destination
             WHERE ($3::uuid[] IS NULL OR letter.event_id = ANY($3))
               AND ($4::text IS NULL OR destinations.name = $4)
               AND ($5::text IS NULL OR letter.cause = $5)
               AND ($6::text IS NULL OR letter.event_id IN (
                    SELECT id FROM events WHERE subject = $6
                     UNION ALL
                    SELECT id FROM carried_events WHERE subject = $6))
               AND ($7::text IS NULL
                    OR EXISTS (SELECT FROM events WHERE id = letter.event_id AND facility = $7)
                    OR EXISTS (SELECT FROM carried_events WHERE id = letter.event_id AND facility = $7))
               AND ($8::timestamptz IS NULL OR letter.died_at >= $8)
               AND ($9::timestamptz IS NULL OR letter.died_at < $9)
             GROUP BY letter.cause, destinations.name
            HAVING $1::timestamptz IS NULL OR (max(letter.died_at), letter.cause) < ($1, $2)
             ORDER BY last_seen DESC, letter.cause DESC
             LIMIT $10
            """,
            *before,
            *_named(select),
            limit + 1,
        )
        return page(rows, limit, item=_cause, place=lambda row: (row["last_seen"], row["cause"]))

    async def preview(self, select: Select) -> Preview:
        """What `replay` or `discard` would take now.  Changes nothing."""
        _refuse_empty(select)
        rows = await self._database.fetch(
            """
            SELECT taken.name, taken.cause, count(*) AS n, min(taken.died_at) AS oldest
              FROM (SELECT destinations.name, letter.cause, letter.died_at
                      FROM dead_letters AS letter
                      JOIN destinations ON destinations.id = letter.destination
                     WHERE ($1::uuid[] IS NULL OR letter.event_id = ANY($1))
                       AND ($2::text IS NULL OR destinations.name = $2)
                       AND ($3::text IS NULL OR letter.cause = $3)
                       AND ($4::text IS NULL OR letter.event_id IN (
                            SELECT id FROM events WHERE subject = $4
                             UNION ALL
                            SELECT id FROM carried_events WHERE subject = $4))
                       AND ($5::text IS NULL
                            OR EXISTS (SELECT FROM events WHERE id = letter.event_id AND facility = $5)
                            OR EXISTS (SELECT FROM carried_events WHERE id = letter.event_id AND facility = $5))
                       AND ($6::timestamptz IS NULL OR letter.died_at >= $6)
                       AND ($7::timestamptz IS NULL OR letter.died_at < $7)
                     LIMIT $8) AS taken
             GROUP BY taken.name, taken.cause
            """,
            *_named(select),
            AT_ONCE + 1,
        )
        count = sum(row["n"] for row in rows)
        return Preview(
            count=min(count, AT_ONCE),
            destinations=_summed((row["name"], row["n"]) for row in rows),
            causes=_summed((row["cause"], row["n"]) for row in rows),
            oldest=min((row["oldest"] for row in rows), default=None),
            more=count > AT_ONCE,
        )

    async def replay(self, select: Select, *, reason: str, actor: str) -> Repair:
        """Send again: the deliveries wait as they did before, with the same identity and their tries counted on.

        In the order in which their events were accepted, so that where order is asked for it is kept.  They are due
        since this statement, not since its transaction began: that may have waited, while dispatchers read on.
        """

        async def send(connection: Connection, batch: Sequence[Record]) -> Sequence[Record]:
            return await connection.fetch(
                """
                WITH gone AS (
                    DELETE FROM dead_letters AS letter
                     USING unnest($1::uuid[], $2::smallint[]) AS chosen (event_id, destination)
                     WHERE (letter.event_id, letter.destination) = (chosen.event_id, chosen.destination)
                    RETURNING letter.event_id, letter.destination, letter.lane, letter.key, letter.give_up,
                              letter.attempts
                ), sent AS (
                    INSERT INTO pending (event_id, due_at, owed_since, key, lane, give_up, attempts, spared)
                    SELECT event_id, statement_timestamp(), statement_timestamp(), key, lane, give_up, attempts, attempts
                      FROM gone
                     ORDER BY event_id, lane
                    ON CONFLICT (event_id, lane) DO NOTHING
                ), told AS (
                    INSERT INTO tally (day, what, destination, n)
                    SELECT event_day(event_id), 4, destination, -count(*)
                      FROM gone
                     GROUP BY 1, 3
                )
                SELECT gone.event_id, destinations.name, gone.lane,
                       coalesce(event.traceparent, carried.traceparent) AS traceparent
                  FROM gone
                  JOIN destinations ON destinations.id = gone.destination
                  LEFT JOIN events AS event ON event.id = gone.event_id
                  LEFT JOIN carried_events AS carried ON carried.id = gone.event_id
                 ORDER BY gone.event_id, destinations.name
                """,
                *_identities(batch),
            )

        async def sent(rows: Sequence[Record]) -> None:
            await self._wake({row["lane"] for row in rows})
            self._trace(rows)

        return await self._repair(select, "dead-letters.replay", send, sent, reason=reason, actor=actor)

    async def discard(self, select: Select, *, reason: str, actor: str) -> Repair:
        """Lay aside: these deliveries will never be made, and the reason stands with each of them."""

        async def lay_aside(connection: Connection, batch: Sequence[Record]) -> Sequence[Record]:
            return await connection.fetch(
                """
                WITH gone AS (
                    DELETE FROM dead_letters AS letter
                     USING unnest($1::uuid[], $2::smallint[]) AS chosen (event_id, destination)
                     WHERE (letter.event_id, letter.destination) = (chosen.event_id, chosen.destination)
                    RETURNING letter.event_id, letter.destination
                ), kept AS (
                    INSERT INTO discards (event_id, destination, actor, reason)
                    SELECT event_id, destination, $3, $4
                      FROM gone
                     ORDER BY event_id, destination
                ), told AS (
                    INSERT INTO tally (day, what, destination, n)
                    SELECT event_day(event_id), what, destination, sign * count(*)
                      FROM gone
                     CROSS JOIN (VALUES (4, -1), (5, 1)) AS change (what, sign)
                     GROUP BY 1, 2, 3, sign
                )
                SELECT gone.event_id, destinations.name
                  FROM gone
                  JOIN destinations ON destinations.id = gone.destination
                 ORDER BY gone.event_id, destinations.name
                """,
                *_identities(batch),
                actor,
                reason,
            )

        return await self._repair(select, "dead-letters.discard", lay_aside, reason=reason, actor=actor)

    async def _repair(
        self,
        select: Select,
        action: str,
        write: Callable[[Connection, Sequence[Record]], Awaitable[Sequence[Record]]],
        written: Callable[[Sequence[Record]], Awaitable[None]] | None = None,
        *,
        reason: str,
        actor: str,
    ) -> Repair:
        """Batch after batch, each of them whole: its rows, its books and its audit row; `written` comes after the commit."""
        _refuse_empty(select)
        frozen: datetime = await self._database.fetchval("SELECT clock_timestamp()")
        repair, count, after = uuid4(), 0, None
        while count < AT_ONCE:
            async with self._database.transaction() as connection:
                batch = await self._lock(connection, select, frozen, after, min(BATCH, AT_ONCE - count))
                if not batch:
                    return Repair(id=repair, count=count, more=False)
                rows = await write(connection, batch)
                await note(
                    connection,
                    actor=actor,
                    action=action,
                    target=str(batch[0]["event_id"]) if select.single else "dead-letters",
                    reason=reason,
                    detail={
                        "id": repair,
                        "select": select,
                        "count": len(rows),
                        "deliveries": [f"{row['event_id']}/{row['name']}" for row in rows],
                    },
                )
            if written:
                await written(rows)
            count += len(rows)
            after = (batch[-1]["event_id"], batch[-1]["destination"])
        return Repair(id=repair, count=count, more=(await self.preview(select)).count > 0)

    async def _lock(
        self, connection: Connection, select: Select, frozen: datetime, after: tuple[UUID, int] | None, most: int
    ) -> Sequence[Record]:
        """The next letters that match and were dead at that instant, the oldest event first, locked.

        So nothing that dies later, or dies again, is taken; what somebody else takes first is passed over.
        """
        return await connection.fetch(
            """
            SELECT letter.event_id, letter.destination
              FROM dead_letters AS letter
              JOIN destinations ON destinations.id = letter.destination
             WHERE ($1::uuid[] IS NULL OR letter.event_id = ANY($1))
               AND ($2::text IS NULL OR destinations.name = $2)
               AND ($3::text IS NULL OR letter.cause = $3)
               AND ($4::text IS NULL OR letter.event_id IN (
                    SELECT id FROM events WHERE subject = $4
                     UNION ALL
                    SELECT id FROM carried_events WHERE subject = $4))
               AND ($5::text IS NULL
                    OR EXISTS (SELECT FROM events WHERE id = letter.event_id AND facility = $5)
                    OR EXISTS (SELECT FROM carried_events WHERE id = letter.event_id AND facility = $5))
               AND ($6::timestamptz IS NULL OR letter.died_at >= $6)
               AND ($7::timestamptz IS NULL OR letter.died_at < $7)
               AND letter.died_at <= $8
               AND ($9::uuid IS NULL OR (letter.event_id, letter.destination) > ($9, $10))
             ORDER BY letter.event_id, letter.destination
             LIMIT $11
               FOR UPDATE OF letter
            """,
            *_named(select),
            frozen,
            *(after or (None, None)),
            most,
        )

    async def _wake(self, lanes: set[int]) -> None:
        """Tell the dispatchers; whoever misses it finds the deliveries by the poll."""
        with suppress(Unavailable):
            await self._database.execute(
                "SELECT pg_notify($1, $2)", WAKE, ",".join(str(lane) for lane in sorted(lanes))
            )

    def _trace(self, rows: Sequence[Record]) -> None:
        """A span for each delivery that was sent again, linked to the one that created its event."""
        if self._tracing is None:
            return
        for row in rows:
            self._tracing.note(
                SpanName.REPLAY,
                row["traceparent"],
                row["event_id"],
                {Attribute.MESSAGING_DESTINATION_NAME: row["name"], Attribute.REPLAYED: True},
            )


def _refuse_empty(select: Select) -> None:
    if select.empty:
        raise EmptySelectionError("Name what to take: an empty selection would match every dead letter.")


def _named(select: Select) -> tuple[object, ...]:
    """What a selection names, in the order in which the statements above take it."""
    return (
        list(select.events) if select.events is not None else None,
        select.destination,
        select.cause,
        select.subject,
        select.facility,
        select.since,
        select.until,
    )


def _identities(letters: Sequence[Record]) -> tuple[list[UUID], list[int]]:
    return [letter["event_id"] for letter in letters], [letter["destination"] for letter in letters]


def _letter(row: Record) -> Letter:
    return Letter(
        event_id=row["event_id"],
        destination=row["name"],
        type=row["type"],
        subject=row["subject"],
        facility=row["facility"],
        cause=row["cause"],
        outcome=OutcomeKind(row["outcome"]).word,
        status=row["status"],
        reason=row["reason"],
        mend=mend(row["name"], OutcomeKind(row["outcome"]), row["status"], row["cause"]),
        attempts=row["attempts"],
        died_at=row["died_at"],
    )


def _cause(row: Record) -> Cause:
    return Cause(
        cause=row["cause"],
        destination=row["name"],
        reason=row["reason"],
        mend=mend(row["name"], OutcomeKind(row["outcome"]), row["status"], row["cause"]),
        count=row["n"],
        first_seen=row["first_seen"],
        last_seen=row["last_seen"],
    )


def _summed(counts: Iterable[tuple[str, int]]) -> dict[str, int]:
    """By name, the greatest first."""
    sums: Counter[str] = Counter()
    for name, count in counts:
        sums[name] += count
    return dict(sorted(sums.items(), key=lambda item: (-item[1], item[0])))
