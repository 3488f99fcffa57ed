"""What people read: events with their deliveries, destinations, refusals at the door, and whether the books balance.

Nothing here changes a row.
"""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any, Literal
from uuid import UUID

import msgspec
from asyncpg import Record

from outbox.database import Connection, Database
from outbox.event import OutcomeKind
from outbox.page import Page, page, place_of
from outbox.store import Tally

Whereabouts = Literal["waiting", "held", "delivered", "dead", "discarded", "missing"]
"""A `State`; or `missing`, which cannot be: a delivery that is owed and in none of the tables.  It is shown, not hidden."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """One try of a delivery, and what came of it."""

    number: int
    at: datetime
    outcome: str
    status: int | None
    reason: str | None
    receipt: str | None
    took_ms: int
    trace_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliverySummary:
    """Where a delivery stands."""

    destination: str
    state: Whereabouts


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryRecord:
    """Where a delivery stands, why, and every try for it."""

    destination: str
    state: Whereabouts
    due_at: datetime | None  # when it is tried next, if it waits
    reason: str | None  # why it is held, dead or discarded; of one that waits, what its last try met
    attempts: list[AttemptRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class EventSummary:
    """An event in a list: its CloudEvents attributes, and where its deliveries stand."""

    id: UUID
    source: str
    type: str
    subject: str | None
    facility: str | None
    time: datetime
    received_at: datetime
    policy: str
    policy_version: int
    deliveries: list[DeliverySummary]


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    """One event: its CloudEvents attributes, what its policy kept, and what became of each delivery."""

    specversion: str = "1.0"
    id: UUID
    source: str
    type: str
    subject: str | None
    facility: str | None
    time: datetime
    datacontenttype: str = "application/json"
    received_at: datetime
    trace_id: str | None  # of the span that accepted it
    policy: str
    policy_version: int
    data: dict[str, Any]
    deliveries: list[DeliveryRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a destination is doing."""

    name: str
    state: str  # flowing, backing off, held
    reason: str | None
    held_by: str | None
    until: datetime | None  # when a hold or a back-off ends by itself
    waiting: int  # outstanding deliveries, also while it is held
    oldest_waiting_seconds: float | None
    dead: int
    balanced: bool  # its outstanding and dead deliveries are as many as the books say
    configured: bool  # somebody knows it; if nobody does, it is held


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Refusals at the door within a second, of one source and for one reason."""

    at: datetime
    source: str
    reason: str
    count: int
    digests: list[str]  # keyed digests of some of the bodies: equal bodies are recognised, nothing can be read


@dataclass(frozen=True, slots=True, kw_only=True)
class EventSums:
    accepted: int = 0
    routed: int = 0
    unrouted: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliverySums:
    owed: int = 0
    delivered: int = 0
    waiting: int = 0
    held: int = 0
    dead: int = 0
    discarded: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two numbers that should be one."""

    destination: str | None  # none: it concerns the events
    what: str
    rows: int
    expected: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """The two sums over everything that retention keeps, counted from the rows in one snapshot.

    `sums`: accepted = routed + unrouted, and per destination owed = delivered + waiting + held + dead + discarded,
    where owed is what the routes chose, and what was reassigned there.
    `tally`: the running books, which every change of a state wrote, say the same as the rows.
    `balanced`: both.
    """

    events: EventSums
    deliveries: DeliverySums
    balanced: bool
    sums: bool
    tally: bool
    differences: list[Difference]


COUNTED = {**{book.value: book.name.lower() for book in Tally}, 6: "waiting", 7: "held"}
ENDS = ("delivered", "waiting", "held", "dead", "discarded")
ENDED_WELL = [OutcomeKind.DELIVERED, OutcomeKind.DUPLICATE]
PATIENCE = timedelta(seconds=60)  # with a count of everything


class Records:
    """The read side of the outbox.

    What belongs together is read in one snapshot, so that no delivery is seen between two states.
    """

    def __init__(self, database: Database, *, configured: Callable[[], Collection[str]] | None = None) -> None:
        """`configured` are the destinations that the reader's configuration knows; without it, all that there are.

        What waits for one that neither the reader nor a living dispatcher knows is held: not configured.
        """
        self._database = database
        self._configured = configured

    @property
    def _known(self) -> list[str] | None:
        return None if self._configured is None else list(self._configured())

    async def events(
        self,
        *,
        source: str | None = None,
        type: str | None = None,  # noqa: A002  the word of CloudEvents
        subject: str | None = None,
        facility: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> Page[EventSummary]:
        """The newest first.  `type` may end in `.*` for everything below; `since` and `until` bound the acceptance."""
        before = place_of(cursor, UUID)
        async with self._snapshot() as connection:
            rows = await connection.fetch(
                """
                SELECT id, source, type, subject, facility, time, received_at, policy, policy_version
                  FROM (SELECT id, source, type, subject, facility, time, received_at, policy, policy_version
                          FROM events
                         UNION ALL
                        SELECT id, source, type, subject, facility, time, received_at, policy, policy_version
                          FROM carried_events
                         WHERE NOT EXISTS (SELECT FROM events WHERE events.id = carried_events.id)) AS event
                 WHERE ($1::uuid IS NULL OR id < $1)
                   AND ($2::text IS NULL OR source = $2)
                   AND ($3::text IS NULL OR type = $3)
                   AND ($4::text IS NULL OR starts_with(type, $4))
                   AND ($5::text IS NULL OR subject = $5)
                   AND ($6::text IS NULL OR facility = $6)
                   AND ($7::timestamptz IS NULL OR id >= event_floor($7))
                   AND ($8::timestamptz IS NULL OR id < event_floor($8))
                 ORDER BY id DESC
                 LIMIT $9
                """,
                before,
                source.removeprefix("/sources/") if source else None,
                None if type is None or type.endswith(".*") else type,
                type.removesuffix("*") if type is not None and type.endswith(".*") else None,
                subject,
                facility,
                _in_range(since),
                _in_range(until),
                limit + 1,
            )
            deliveries = await self._deliveries(connection, [row["id"] for row in rows[:limit]])
        return page(
            rows,
            limit,
            item=lambda row: EventSummary(
                **_attributes(row),
                deliveries=[
                    DeliverySummary(destination=found["destination"], state=found["state"])
                    for found in deliveries.get(row["id"], [])
                ],
            ),
            place=lambda row: row["id"],
        )

    async def event(self, event: UUID) -> EventRecord | None:
        """One event with every attempt of every delivery; None if there is none of this id (any more)."""
        async with self._snapshot() as connection:
            row = await connection.fetchrow(
                """
                SELECT id, source, type, subject, facility, time, received_at, traceparent, policy, policy_version, data
                  FROM events
                 WHERE id = $1
                 UNION ALL
                SELECT id, source, type, subject, facility, time, received_at, traceparent, policy, policy_version, data
                  FROM carried_events
                 WHERE id = $1
                 LIMIT 1
                """,
                event,
            )
            if row is None:
                return None
            deliveries = (await self._deliveries(connection, [event])).get(event, [])
            attempts = await self._attempts(connection, event)
        return EventRecord(
            **_attributes(row),
            trace_id=row["traceparent"][3:35] if row["traceparent"] else None,
            data=msgspec.json.decode(row["data"]),
            deliveries=[
                DeliveryRecord(
                    destination=found["destination"],
                    state=found["state"],
                    due_at=found["due_at"],
                    reason=found["reason"] or (tries[-1].reason if found["state"] == "waiting" and tries else None),
                    attempts=tries,
                )
                for found in deliveries
                for tries in [attempts.get(found["destination"], [])]
            ],
        )

    async def standings(self) -> list[Standing]:
        """How each destination is doing, from the small tables and the running books.

        Reads at most 100,000 outstanding deliveries a destination: where there are more, the books say how many,
        and of these the ones that are due first say which is oldest.  Cheap enough for a metric.
        """
        rows = await self._database.fetch(
            """
            WITH unknown AS MATERIALIZED (
                SELECT id
                  FROM destinations
                 WHERE name <> ALL ($2::text[])  -- of null: none
                   AND id NOT IN (SELECT destination FROM served_destinations)
            ), told AS MATERIALIZED (
                SELECT destination,
                       sum(CASE what WHEN 2 THEN n WHEN 3 THEN -n WHEN 4 THEN -n WHEN 5 THEN -n END)::bigint
                           AS outstanding,
                       (sum(n) FILTER (WHERE what = 4))::bigint AS dead
                  FROM tally
                 WHERE what BETWEEN 2 AND 5
                 GROUP BY destination
            ), dead AS MATERIALIZED (
                SELECT destination, count(*) AS n
                  FROM dead_letters
                 GROUP BY destination
            )
            SELECT destinations.name,
                   CASE WHEN destinations.held_until > now() OR unknown.id IS NOT NULL THEN 'held'
                        WHEN destinations.not_before > now() THEN 'backing off'
                        ELSE 'flowing'
                    END AS state,
                   CASE WHEN destinations.held_until > now() THEN destinations.held_reason
                        WHEN unknown.id IS NOT NULL THEN 'not configured'
                    END AS reason,
                   unknown.id IS NULL AS configured,
                   CASE WHEN destinations.held_until > now() THEN destinations.held_by END AS held_by,
                   CASE WHEN destinations.held_until > now() THEN nullif(destinations.held_until, 'infinity')
                        WHEN destinations.not_before > now() THEN destinations.not_before
                    END AS until,
                   CASE WHEN outstanding.n <= $1 THEN outstanding.n
                        ELSE greatest(outstanding.n, told.outstanding)
                    END AS waiting,
                   CASE WHEN outstanding.since IS NOT NULL
                        THEN greatest(extract(epoch FROM now() - outstanding.since), 0)::double precision
                    END AS oldest,
                   coalesce(dead.n, 0) AS dead,
                   coalesce(dead.n, 0) = coalesce(told.dead, 0)
                       AND (outstanding.n > $1 OR outstanding.n = coalesce(told.outstanding, 0)) AS balanced
              FROM destinations
             CROSS JOIN LATERAL (
                   SELECT count(*) AS n, min(first.owed_since) AS since
                     FROM (SELECT pending.owed_since
                             FROM lanes
                            CROSS JOIN LATERAL (
                                  SELECT owed_since
                                    FROM pending
                                   WHERE pending.lane = lanes.lane
                                   ORDER BY due_at, event_id
                                   LIMIT $1 + 1) AS pending
                            WHERE lanes.destination = destinations.id
                            LIMIT $1 + 1) AS first) AS outstanding
              LEFT JOIN unknown ON unknown.id = destinations.id
              LEFT JOIN told ON told.destination = destinations.id
              LEFT JOIN dead ON dead.destination = destinations.id
             ORDER BY destinations.name
            """,
            100_000,
            self._known,
        )
        return [
            Standing(
                name=row["name"],
                state=row["state"],
                reason=row["reason"],
                held_by=row["held_by"],
                until=row["until"],
                waiting=row["waiting"],
                oldest_waiting_seconds=row["oldest"],
                dead=row["dead"],
                balanced=row["balanced"],
                configured=row["configured"],
            )
            for row in rows
        ]

    async def rejections(
        self,
        *,
        source: str | None = None,
        reason: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> Page[Rejection]:
        """What was refused at the door, the newest first."""
        before = place_of(cursor, tuple[datetime, tuple[int, int]]) or (None, None)
        rows = await self._database.fetch(
            """
            SELECT at, source, reason, n, digests, ctid
              FROM rejections
             WHERE ($1::timestamptz IS NULL OR at <= $1 AND (at, ctid) < ($1, $2::tid))
               AND ($3::text IS NULL OR source = $3)
               AND ($4::text IS NULL OR reason = $4)
               AND ($5::timestamptz IS NULL OR at >= $5)
               AND ($6::timestamptz IS NULL OR at < $6)
             ORDER BY at DESC, ctid DESC
             LIMIT $7
            """,
            before[0],
            before[1],
            source,
            reason,
            since,
            until,
            limit + 1,
        )
        return page(
            rows,
            limit,
            item=lambda row: Rejection(
                at=row["at"],
                source=row["source"],
                reason=row["reason"],
                count=row["n"],
                digests=[digest.hex for digest in row["digests"]],
            ),
            place=lambda row: (row["at"], row["ctid"]),
        )

    async def books(self) -> Books:
        """Prove that nothing is lost: both sums from the rows, and the rows against the running books.

        One statement, one snapshot.  Of events below `lanes.carried_below` only the carried rows count, whether
        their partition is gone or about to go.
        """
        async with self._database.transaction() as connection:
            await connection.execute("SELECT set_config('statement_timeout', $1, true)", f"{PATIENCE.seconds}s")
            rows = await connection.fetch(
                """
                WITH here AS MATERIALIZED (
                    SELECT coalesce((SELECT carried_below FROM lanes ORDER BY carried_below DESC LIMIT 1),
                                    event_floor(to_timestamp(0))) AS since
                ), unknown AS MATERIALIZED (
                    SELECT id
                      FROM destinations
                     WHERE name <> ALL ($2::text[])
                       AND id NOT IN (SELECT destination FROM served_destinations)
                ), accepted AS MATERIALIZED (
                    SELECT owed, count(*) AS n
                      FROM events
                     WHERE id >= (SELECT since FROM here)
                     GROUP BY owed
                     UNION ALL
                    SELECT owed, count(*)
                      FROM carried_events
                     WHERE id < (SELECT since FROM here)
                     GROUP BY owed
                ), counted (what, destination, n) AS (
                    SELECT CASE WHEN owed = '{}' THEN 0 ELSE 1 END, 0, n
                      FROM accepted
                     UNION ALL
                    SELECT 2, chosen, n
                      FROM accepted
                     CROSS JOIN LATERAL unnest(owed) AS chosen
                     UNION ALL
                    SELECT 2, destination, count(*)
                      FROM reassigned
                     GROUP BY destination
                     UNION ALL
                    SELECT 3, destination, count(*)
                      FROM attempts
                     WHERE event_id >= (SELECT since FROM here) AND outcome = ANY($1::smallint[])
                     GROUP BY destination
                     UNION ALL
                    SELECT 3, destination, count(*)
                      FROM carried_attempts
                     WHERE event_id < (SELECT since FROM here) AND outcome = ANY($1::smallint[])
                     GROUP BY destination
                     UNION ALL
                    SELECT 4, destination, count(*)
                      FROM dead_letters
                     GROUP BY destination
                     UNION ALL
                    SELECT 5, destination, count(*)
                      FROM discards
                     GROUP BY destination
                     UNION ALL
                    SELECT CASE WHEN destinations.held_until > now() OR destinations.id IN (SELECT id FROM unknown)
                                THEN 7
                                ELSE 6
                            END,
                           destinations.id, outstanding.n
                      FROM (SELECT lane, count(*) AS n FROM pending GROUP BY lane) AS outstanding
                      JOIN lanes USING (lane)
                      JOIN destinations ON destinations.id = lanes.destination
                ), rows AS (
                    SELECT what, destination, sum(n)::bigint AS n
                      FROM counted
                     GROUP BY what, destination
                ), told AS (
                    SELECT what, destination, sum(n)::bigint AS n
                      FROM tally
                     GROUP BY what, destination
                )
                SELECT what, destinations.name AS destination, coalesce(rows.n, 0) AS n, coalesce(told.n, 0) AS told
                  FROM rows
                  FULL JOIN told USING (what, destination)
                  LEFT JOIN destinations ON destinations.id = destination
                 ORDER BY destinations.name NULLS FIRST, what
                """,
                ENDED_WELL,
                self._known,
                timeout=PATIENCE.total_seconds(),
            )
        return _balance(rows)

    @asynccontextmanager
    async def _snapshot(self) -> AsyncIterator[Connection]:
        """A connection whose statements all see one instant, and are planned for the filters that were given."""
        async with self._database.transaction() as connection:
            await connection.execute(
                "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY;"
                " SET LOCAL plan_cache_mode = force_custom_plan"
            )
            yield connection

    async def _deliveries(self, connection: Connection, events: Sequence[UUID]) -> dict[UUID, list[Record]]:
        """Where the deliveries of some events stand, in the order in which their routes named them; then what was reassigned."""
        if not events:
            return {}
        rows = await connection.fetch(
            """
            WITH unknown AS MATERIALIZED (
                SELECT id
                  FROM destinations
                 WHERE name <> ALL ($5::text[])
                   AND id NOT IN (SELECT destination FROM served_destinations)
            )
            SELECT event.id, destinations.name AS destination,
                   CASE WHEN pending.event_id IS NOT NULL AND (destinations.held_until > now() OR unknown.id IS NOT NULL)
                        THEN 'held'
                        WHEN pending.event_id IS NOT NULL THEN 'waiting'
                        WHEN dead_letters.event_id IS NOT NULL THEN 'dead'
                        WHEN discards.event_id IS NOT NULL THEN 'discarded'
                        WHEN last.outcome = ANY($4::smallint[]) THEN 'delivered'
                        ELSE 'missing'
                    END AS state,
                   greatest(pending.due_at, pending.not_before) AS due_at,
                   CASE WHEN pending.event_id IS NOT NULL
                        THEN CASE WHEN destinations.held_until > now() THEN destinations.held_reason
                                  WHEN unknown.id IS NOT NULL THEN 'not configured'
                             END
                        ELSE coalesce(dead_letters.reason, discards.reason)
                    END AS reason
              FROM (SELECT id, owed FROM events WHERE id = ANY($1::uuid[]) AND id BETWEEN $2 AND $3
                     UNION
                    SELECT id, owed FROM carried_events WHERE id = ANY($1::uuid[])) AS event
             CROSS JOIN LATERAL (
                   SELECT destination, place
                     FROM unnest(event.owed) WITH ORDINALITY AS routed (destination, place)
                    UNION ALL
                   SELECT destination, 32768
                     FROM reassigned
                    WHERE reassigned.event_id = event.id) AS chosen
              JOIN destinations ON destinations.id = chosen.destination
              LEFT JOIN unknown ON unknown.id = chosen.destination
              LEFT JOIN LATERAL (
                   SELECT pending.event_id, pending.due_at, pending.not_before
                     FROM pending
                     JOIN lanes USING (lane)
                    WHERE pending.event_id = event.id AND lanes.destination = chosen.destination) AS pending ON true
              LEFT JOIN dead_letters
                ON dead_letters.event_id = event.id AND dead_letters.destination = chosen.destination
              LEFT JOIN discards
                ON discards.event_id = event.id AND discards.destination = chosen.destination
              LEFT JOIN LATERAL (
                   SELECT outcome
                     FROM (SELECT number, outcome
                             FROM attempts
                            WHERE attempts.event_id = event.id AND attempts.destination = chosen.destination
                            UNION ALL
                           SELECT number, outcome
                             FROM carried_attempts
                            WHERE carried_attempts.event_id = event.id
                              AND carried_attempts.destination = chosen.destination) AS tries
                    ORDER BY number DESC
                    LIMIT 1) AS last ON true
             ORDER BY event.id, chosen.place, destinations.name
            """,
            events,
            min(events),
            max(events),
            ENDED_WELL,
            self._known,
        )
        return {event: list(found) for event, found in groupby(rows, key=lambda row: row["id"])}

    async def _attempts(self, connection: Connection, event: UUID) -> dict[str, list[AttemptRecord]]:
        """Every try for an event by destination, in order."""
        rows = await connection.fetch(
            """
            SELECT destinations.name AS destination, number, at, outcome, status, reason, receipt, took_ms, trace_id
              FROM (SELECT destination, number, at, outcome, status, reason, receipt, took_ms, trace_id
                      FROM attempts
                     WHERE event_id = $1
                     UNION
                    SELECT destination, number, at, outcome, status, reason, receipt, took_ms, trace_id
                      FROM carried_attempts
                     WHERE event_id = $1) AS tries
              JOIN destinations ON destinations.id = tries.destination
             ORDER BY destinations.name, number
            """,
            event,
        )
        return {
            destination: [
                AttemptRecord(
                    number=row["number"],
                    at=row["at"],
                    outcome=OutcomeKind(row["outcome"]).word,
                    status=row["status"],
                    reason=row["reason"],
                    receipt=row["receipt"],
                    took_ms=row["took_ms"],
                    trace_id=row["trace_id"].hex if row["trace_id"] else None,
                )
                for row in tries
            ]
            for destination, tries in groupby(rows, key=lambda row: row["destination"])
        }


def _in_range(at: datetime | None) -> datetime | None:
    """The nearest instant that an id can have."""
    return at and min(max(at, datetime(1970, 1, 1, tzinfo=UTC)), datetime(9999, 1, 1, tzinfo=UTC))


def _attributes(row: Record) -> dict[str, Any]:
    """What a list and a single event both tell, as CloudEvents names it."""
    return {
        "id": row["id"],
        "source": f"/sources/{row['source']}",
        "type": row["type"],
        "subject": row["subject"],
        "facility": row["facility"],
        "time": row["time"],
        "received_at": row["received_at"],
        "policy": row["policy"],
        "policy_version": row["policy_version"],
    }


def _balance(rows: Sequence[Record]) -> Books:
    """Compare the counts: sum with sum, and each with what the running books say of it."""
    total: Counter[str] = Counter()
    of: dict[str | None, Counter[str]] = {}  # None: what concerns the events
    untold = []
    for row in rows:
        what = COUNTED[row["what"]]
        total[what] += row["n"]
        of.setdefault(row["destination"], Counter())[what] += row["n"]
        if row["what"] <= Tally.DISCARDED and row["n"] != row["told"]:
            untold.append(
                Difference(destination=row["destination"], what=f"{what} = tally", rows=row["n"], expected=row["told"])
            )
    unequal = [
        Difference(
            destination=destination,
            what="owed = delivered + waiting + held + dead + discarded",
            rows=counted["owed"],
            expected=ended,
        )
        for destination, counted in of.items()
        if counted["owed"] != (ended := sum(counted[what] for what in ENDS))
    ]
    return Books(
        events=EventSums(
            accepted=total["routed"] + total["unrouted"], routed=total["routed"], unrouted=total["unrouted"]
        ),
        deliveries=DeliverySums(owed=total["owed"], **{what: total[what] for what in ENDS}),
        balanced=not unequal and not untold,
        sums=not unequal,
        tally=not untold,
        differences=unequal + untold,
    )
