"""The outbox: every query that changes it.

Three doors: `add` for what was accepted, `lease` (and `read`) for who delivers it, `settle` for what came of it.
Each is one statement in autocommit (a settle is two, where not all was simply delivered), so that a program that stalls never holds a lock that another one needs.
Locks are taken in the order lanes, pending, the rest.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum
from hashlib import blake2b
from typing import Any
from uuid import UUID

import msgspec
from asyncpg import Record, UniqueViolationError

from observability.failpoints import failpoint
from outbox.database import Database, Unavailable
from outbox.event import Delivery, Event, OutcomeKind
from outbox.retry import Verdict

WAKE = "sluicegate_wake"  # a notification: "lane@microseconds,lane@microseconds" since the epoch, or only "lane"
DESTINATIONS = "sluicegate_destinations"  # a notification: a hold began or ended
ALIVE = 0x51C0  # the class of the advisory locks that say: this dispatcher's process lives


class Tally(IntEnum):
    """What the books count; the numbers are on disk and stay."""

    UNROUTED = 0
    ROUTED = 1
    OWED = 2
    DELIVERED = 3
    DEAD = 4
    DISCARDED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A destination as the database knows it; `lanes` by shard.

    A subject is placed by the first `shards` of them, whose number is frozen when it is made; further lanes may come.
    """

    id: int
    name: str
    shards: int
    lanes: tuple[int, ...]

    def place(
        self, event: UUID, subject: str | None, *, ordered: bool, party: int | None = None
    ) -> tuple[int, int | None]:
        """The lane of a delivery, and the key that keeps its subject in order (None: no order).

        Lanes take turns, so what needs no order goes into that of its `party` (a number of whoever sent it; None: any
        lane): a flood of one party does not stand in the way of another's.
        """
        if not ordered or subject is None:
            if len(self.lanes) == 1:
                return self.lanes[0], None
            return self.lanes[(event.int if party is None else party) % len(self.lanes)], None
        key = order_key(subject)
        return self.lanes[key % self.shards], key


def order_key(subject: str) -> int:
    """The hash `blake2b-64` of the table `destinations`: signed, big-endian.

    Frozen, for a row that waits was placed by it: `purchase.order/42` is 229428313676700422.
    """
    return int.from_bytes(blake2b(subject.encode(), digest_size=8).digest(), "big", signed=True)


class Debt(msgspec.Struct, frozen=True, kw_only=True):
    """One delivery that an event owes from the start.  (A Struct, as others here of which each event has one.)"""

    lane: int
    destination: int
    key: int | None
    give_up: timedelta | None


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """An event at the door, with all that is written of it in one statement."""

    event: Event
    data: str  # event.data as JSON
    same: UUID  # keyed digest of what makes two posts the same event
    digest: UUID  # keyed digest of the raw body
    debts: tuple[Debt, ...]


class Stored(msgspec.Struct, frozen=True):
    """It is new, and durable."""

    event: UUID
    due_at: datetime | None  # of its deliveries that somebody is to be woken for; None where there are none


class Seen(msgspec.Struct, frozen=True):
    """It was there: this is the first one, and the digest of the body that it came with."""

    event: UUID
    digest: UUID | None  # None where the first has outlived its retention


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """Where the dedup keys of this minute go: into `current`, after a look into `before`.

    Near the border between two buckets the key goes into both, first into `before` and, if it won that, into `current`:
    so two gateways whose clocks disagree about the border still agree about the key.
    """

    before: datetime
    current: datetime
    border: bool


@dataclass(frozen=True, slots=True)
class Peer:
    """A dispatcher whose lease runs, with the destinations that it knows."""

    number: int
    present: bool  # it holds its advisory lock; else it was killed, or its line is being drawn again
    silent: timedelta  # since it renewed its lease last, if that is as long as ours
    leaving: bool
    knows: frozenset[int]


@dataclass(frozen=True, slots=True)
class Beat:
    """What a dispatcher learns when it renews its lease."""

    seen: bool  # the server that is written to knows the line of this dispatcher: else that leads to another server
    up: timedelta  # since the server was started
    peers: Sequence[Peer]
    lanes: Mapping[int, int]  # how many each destination has by now, which may be more than a configuration told


@dataclass(frozen=True, slots=True)
class Lane:
    """A lane that a dispatcher leased; the epoch is its fence."""

    number: int
    destination: int
    epoch: int
    vanished: bool = False  # its owner before did not give it back


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Read this lane from behind (`due_at`, `event`), at most `room` rows, past the keys that are `closed` in it."""

    lane: int
    due_at: datetime
    event: UUID
    room: int
    closed: tuple[int, ...] = ()


class Taken(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A delivery as it was read, and where from.

    A struct, as is `Settlement`: made in a tenth of the time of a frozen dataclass, once a delivery.
    """

    lane: int
    place: tuple[int, int]  # the row's ctid
    event: Event | None  # None: the row has no event, which is an alarm
    event_id: UUID
    due_at: datetime
    owed_since: datetime
    key: int | None
    not_before: datetime | None
    give_up: timedelta | None
    attempts: int
    spared: int


class Settlement(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What came of one attempt, to be written."""

    lane: int
    epoch: int
    taken: Taken
    destination: int
    verdict: Verdict
    delay: timedelta
    spared: bool
    outcome: int
    status: int | None
    reason: str | None
    receipt: str | None
    at: datetime
    took: timedelta
    trace: str | None  # its trace's id, in hex
    cause: str | None  # of a dead letter


@dataclass(frozen=True, slots=True)
class Settled:
    """`done` by position in what was given, with when the retries are due; `standing`: the epochs that still hold."""

    done: Mapping[int, datetime | None]
    standing: frozenset[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Standing:
    """How a destination stands: held until then, or to be left alone until then."""

    held_until: datetime | None
    held_by: str | None
    not_before: datetime | None


class Outbox:
    """Deliveries that still have somewhere to go.

    `intake` writes what arrives, `dispatch` delivers it.  Both have their plans pinned, since on tables that were
    analysed while they were empty Postgres changes its mind otherwise.
    """

    def __init__(self, *, intake: Database, dispatch: Database) -> None:
        self._intake = intake
        self._dispatch = dispatch
        self._take: Callable[[Taken], bool] | None = None

    # ── add ──────────────────────────────────────────────────────────────────────────────────────

    def hand_over_to(self, take: Callable[[Taken], bool]) -> None:
        """A dispatcher in this process, which says whether it takes what was stored just now: then nobody reads it."""
        self._take = take

    async def add(self, arrivals: Sequence[Arrival], buckets: Buckets) -> list[Stored | Seen]:
        """Store what is new, in one transaction; recognise what is not.

        Raises Unavailable when Postgres cannot say; then it is unknown whether the arrivals were stored.
        """
        answers: dict[UUID, Stored | Seen] = {}
        waiting = list(arrivals)
        while waiting:
            new = await self._insert(waiting, buckets)
            answers |= {event: Stored(event, due_at) for event, due_at in new.items()}
            lost = [a for a in waiting if a.event.id not in new]
            first = await self._firsts(lost, buckets) if lost else {}
            answers |= {a.event.id: first[a.same] for a in lost if a.same in first}
            waiting = [
                a for a in lost if a.same not in first
            ]  # the first one's transaction was undone: now we are first
        return [answers[a.event.id] for a in arrivals]

    async def _insert(self, arrivals: Sequence[Arrival], buckets: Buckets) -> dict[UUID, datetime | None]:
        """The one statement of intake.  What all of a batch have in common is told once, or not at all: see `_settle`.

        `due_at` is read off the clock after the dedup keys are in, so that it is never older than the
        moment its transaction showed itself as a writer: sweeps rely on it.
        """
        events = [a.event for a in arrivals]
        owing = [(a.event.id, debt) for a in arrivals for debt in a.debts]
        rows = await self._intake.fetch(
            """
            WITH won_before AS (
                INSERT INTO dedup (bucket, key, event_id)
                SELECT $20, same, id
                  FROM unnest($14::uuid[], $1::uuid[]) WITH ORDINALITY AS arrived (same, id, ord)
                 WHERE $22
                 ORDER BY same, ord
                    ON CONFLICT DO NOTHING
                RETURNING event_id
            ), won AS (
                INSERT INTO dedup (bucket, key, event_id)
                SELECT $21, same, id
                  FROM unnest($14::uuid[], $1::uuid[]) WITH ORDINALITY AS arrived (same, id, ord)
                 WHERE CASE WHEN $22
                            THEN id = ANY (ARRAY(SELECT event_id FROM won_before))
                            ELSE NOT EXISTS (SELECT FROM dedup AS old WHERE old.bucket = $20 AND old.key = arrived.same)
                       END
                 ORDER BY same, ord
                    ON CONFLICT DO NOTHING
                RETURNING event_id
            ), stored AS (
                INSERT INTO events (id, source, type, subject, facility, time, received_at, traceparent, policy, policy_version,
                                    digest, owed, data)
                SELECT id, coalesce(source, ($2::text[])[1]), type, subject, facility, time, to_timestamp(received_at),
                       traceparent, coalesce(policy, ($8::text[])[1]), coalesce(policy_version, ($9::int[])[1]),
                       digest, owed::smallint[], data
                  FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::timestamptz[],
                              $7::float8[], $8::text[], $9::int[], $10::text::text[], $11::uuid[], $12::text[],
                              $13::json[])
                    AS arrived (id, source, type, subject, facility, time,
                                received_at, policy, policy_version, traceparent, digest, owed,
                                data)
                 WHERE id = ANY (ARRAY(SELECT event_id FROM won))
            ), owing AS (
                INSERT INTO pending (event_id, lane, key, give_up, due_at, owed_since)
                SELECT o.event_id, o.lane, o.key, o.give_up, clock_timestamp(), clock_timestamp()
                  FROM unnest($15::uuid[], $16::text::int[], $17::bigint[], $18::int[]) AS o (event_id, lane, key, give_up)
                 WHERE o.event_id = ANY (ARRAY(SELECT event_id FROM won))
                RETURNING event_id, lane, ctid AS place, due_at
            ), counted AS (
                INSERT INTO tally (day, what, destination, n)
                SELECT event_day(event_id), what, destination, count(*)
                  FROM (SELECT event_id, CASE WHEN owed = '{}' THEN 0 ELSE 1 END AS what, 0 AS destination
                          FROM unnest($1::uuid[], $12::text[]) AS arrived (event_id, owed)
                         UNION ALL
                        SELECT event_id, 2, destination
                          FROM unnest($15::uuid[], $19::text::smallint[]) AS o (event_id, destination)) AS each
                 WHERE event_id = ANY (ARRAY(SELECT event_id FROM won))
                 GROUP BY 1, 2, 3
            )
            SELECT event_id, lane, place, due_at FROM owing
             UNION ALL
            SELECT event_id, NULL, NULL, NULL FROM won WHERE $23
            """,
            [e.id for e in events],
            _once([e.source for e in events]),
            [e.type for e in events],
            [e.subject for e in events],
            [e.facility for e in events],
            [e.time for e in events],
            [e.received_at.timestamp() for e in events],
            _once([e.policy for e in events]),
            _once([e.policy_version for e in events]),
            "{" + ",".join([e.traceparent or "NULL" for e in events]) + "}",
            [a.digest for a in arrivals],
            ["{" + ",".join([str(debt.destination) for debt in a.debts]) + "}" for a in arrivals],
            [a.data for a in arrivals],
            [a.same for a in arrivals],
            [event for event, _ in owing],
            _numbers([debt.lane for _, debt in owing]),
            _unless_all([debt.key for _, debt in owing], None),
            _unless_all([None if debt.give_up is None else in_seconds(debt.give_up) for _, debt in owing], None),
            _numbers([debt.destination for _, debt in owing]),
            buckets.before,
            buckets.current,
            buckets.border,
            not all(a.debts for a in arrivals),
        )
        return dict.fromkeys(row[0] for row in rows) | self._hand_over(arrivals, rows)

    def _hand_over(self, arrivals: Sequence[Arrival], rows: Sequence[Record]) -> dict[UUID, datetime]:
        """By event, when those of its deliveries are due that nobody here took."""
        arrived = {a.event.id: a for a in arrivals}
        due: dict[UUID, datetime] = {}
        for event_id, lane, place, due_at in rows:
            if lane is None:
                continue
            if self._take and self._take(_fresh(arrived[event_id], lane, place, due_at)):
                failpoint("intake.handed_over")
                continue
            due[event_id] = min(due.get(event_id, due_at), due_at)
        return due

    async def _firsts(self, lost: Sequence[Arrival], buckets: Buckets) -> dict[UUID, Seen]:
        """Who came first, by dedup key; the newest bucket speaks.  One by one: a join would be made by a scan of all events.

        It commits something, too: where a synchronous standby is away, a first one whose own wait was broken off is
        to be seen here and not yet there, and this waits until both have it.
        """
        rows = await self._intake.fetch(
            """
              WITH committed AS MATERIALIZED (SELECT pg_logical_emit_message(true, 'sluicegate', '') AS at)
            SELECT first.key, first.event_id, (SELECT at FROM committed),
                   coalesce((SELECT digest FROM events WHERE id = first.event_id),
                            (SELECT digest FROM carried_events WHERE id = first.event_id)) AS digest
              FROM unnest($1::uuid[]) AS lost (key)
             CROSS JOIN LATERAL (
                   SELECT key, event_id
                     FROM dedup
                    WHERE bucket IN ($2, $3)
                      AND key = lost.key
                    ORDER BY bucket DESC
                    LIMIT 1
                   ) AS first
            """,
            [a.same for a in lost],
            buckets.before,
            buckets.current,
        )
        return {row["key"]: Seen(row["event_id"], row["digest"]) for row in rows}

    # ── lease ────────────────────────────────────────────────────────────────────────────────────

    async def register(self, name: str, lease: timedelta) -> int:
        """A dispatcher introduces itself; its number is the owner of lanes."""
        number: int = await self._dispatch.fetchval(
            "INSERT INTO dispatchers (name, lease_until) VALUES ($1, clock_timestamp() + $2) RETURNING id", name, lease
        )
        return number

    async def beat(
        self, dispatcher: int, lease: timedelta, *, leaving: bool = False, knows: Collection[int] = ()
    ) -> Beat | None:
        """Renew the lease, and say which destinations this one `knows`.  None: ours was struck off, register again."""
        rows = await self._dispatch.fetch(
            """
            WITH mine AS (
                UPDATE dispatchers
                   SET lease_until = clock_timestamp() + $2, leaving = $3, destinations = $4
                 WHERE id = $1
                RETURNING id
            ), struck AS (
                DELETE FROM dispatchers
                 WHERE lease_until < clock_timestamp() - interval '1 minute'
                   AND id <> $1
            ), present AS MATERIALIZED (
                SELECT id FROM present_dispatchers
            )
            SELECT mine.id IN (SELECT id FROM present) AS seen,
                   clock_timestamp() - pg_postmaster_start_time() AS up, counted.lanes,
                   d.id, d.id IN (SELECT id FROM present) AS present, d.leaving, d.destinations,
                   $2 - (d.lease_until - clock_timestamp()) AS silent
              FROM mine
             CROSS JOIN (SELECT json_object_agg(destination, n) AS lanes
                           FROM (SELECT destination, count(*) AS n FROM lanes GROUP BY destination) AS each) AS counted
              LEFT JOIN dispatchers AS d ON d.id <> mine.id AND d.lease_until > clock_timestamp()
            """,
            dispatcher,
            lease,
            leaving,
            sorted(knows),
        )
        if not rows:
            return None
        peers = [
            Peer(row["id"], row["present"], row["silent"], row["leaving"], frozenset(row["destinations"]))
            for row in rows
            if row["id"] is not None
        ]
        lanes = msgspec.json.decode(rows[0]["lanes"] or "{}", type=dict[int, int])
        return Beat(rows[0]["seen"], rows[0]["up"], peers, lanes)

    async def lease(
        self, dispatcher: int, destinations: Sequence[int], most: int, *, gone: Collection[int] = ()
    ) -> list[Lane]:
        """Take over lanes that nobody owns who lives, `most` of them; each gets a new epoch.

        An owner whose lease runs lives, unless it is one of those that are known to be `gone` and its advisory lock is
        still free: that is also free for a moment when Postgres was started again, or only the connection was cut.
        """
        rows = await self._dispatch.fetch(
            """
            WITH free AS MATERIALIZED (
                SELECT lane, owner
                  FROM lanes
                 WHERE destination = ANY ($2::smallint[])
                   AND (   owner IS NULL
                        OR owner <> $1
                       AND owner NOT IN (SELECT id
                                           FROM dispatchers
                                          WHERE lease_until > clock_timestamp()
                                            AND (id <> ALL ($4::int[]) OR id IN (SELECT id FROM present_dispatchers))))
                 ORDER BY lane
                 LIMIT $3
                   FOR UPDATE SKIP LOCKED
            )
            UPDATE lanes
               SET owner = $1,  -- its epoch is also later than any that was given on a primary which is lost
                   epoch = greatest(epoch + 1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)
              FROM free
             WHERE lanes.lane = free.lane
            RETURNING lanes.lane, lanes.destination, lanes.epoch, free.owner IS NOT NULL AS vanished
            """,
            dispatcher,
            list(destinations),
            most,
            list(gone),
        )
        return [Lane(row["lane"], row["destination"], row["epoch"], row["vanished"]) for row in rows]

    async def owned(self, dispatcher: int) -> dict[tuple[int, int], Lane]:
        """What is this dispatcher's, by lane and epoch; who owned it before is not told."""
        rows = await self._dispatch.fetch("SELECT lane, destination, epoch FROM lanes WHERE owner = $1", dispatcher)
        return {
            (row["lane"], row["epoch"]): Lane(row["lane"], row["destination"], row["epoch"], vanished=True)
            for row in rows
        }

    async def give_back(self, lanes: Sequence[Lane]) -> None:
        """Nothing of these is in flight: whoever wants them may take them, without careful mode."""
        await self._dispatch.execute(
            """
            UPDATE lanes
               SET owner = NULL
              FROM unnest($1::int[], $2::bigint[]) AS given (lane, epoch)
             WHERE (lanes.lane, lanes.epoch) = (given.lane, given.epoch)
            """,
            [lane.number for lane in lanes],
            [lane.epoch for lane in lanes],
        )

    async def leave(self, dispatcher: int) -> None:
        await self._dispatch.execute("DELETE FROM dispatchers WHERE id = $1", dispatcher)

    # ── read ─────────────────────────────────────────────────────────────────────────────────────

    async def read(self, readings: Sequence[Reading]) -> list[Taken]:
        """What is due in these lanes, in the order of their queues, past the keys that are closed in each.

        A row in order comes even when its `not_before` is not reached: its owner must know that its key is closed.
        It ends at now(), which an index can end at: clock_timestamp() would have it look at all that is due later.
        """
        rows = await self._dispatch.fetch(
            """
            WITH wanted AS MATERIALIZED (
                SELECT lane, due_at, event_id, room, closed::bigint[] AS closed
                  FROM unnest($1::int[], $2::timestamptz[], $3::uuid[], $4::int[], $5::text[])
                    AS w (lane, due_at, event_id, room, closed)
            )
            SELECT p.*, e.id, e.source, e.type, e.subject, e.facility, e.time, e.data, e.policy, e.policy_version,
                   e.received_at, e.traceparent
              FROM wanted
             CROSS JOIN LATERAL (
                   SELECT p.ctid AS place, p.lane, p.event_id, p.due_at, p.owed_since, p.key, p.not_before, p.give_up,
                          p.attempts, p.spared
                     FROM pending AS p
                    WHERE p.lane = wanted.lane
                      AND p.due_at <= now()
                      AND (p.due_at, p.event_id) > (wanted.due_at, wanted.event_id)
                      AND (p.key IS NULL OR p.key <> ALL (wanted.closed))
                    ORDER BY p.due_at, p.event_id
                    LIMIT wanted.room
                   ) AS p
              LEFT JOIN events AS e ON e.id = p.event_id
            """,
            [r.lane for r in readings],
            [r.due_at for r in readings],
            [r.event for r in readings],
            [r.room for r in readings],
            ["{" + ",".join(map(str, r.closed)) + "}" for r in readings],
        )
        return await self._taken(rows)

    async def next_of_keys(self, keys: Sequence[tuple[int, int]]) -> list[Taken]:
        """The first in the queue of each (lane, key)."""
        rows = await self._dispatch.fetch(
            """
            SELECT p.*, e.id, e.source, e.type, e.subject, e.facility, e.time, e.data, e.policy, e.policy_version,
                   e.received_at, e.traceparent
              FROM unnest($1::int[], $2::bigint[]) AS wanted (lane, key)
             CROSS JOIN LATERAL (
                   SELECT p.ctid AS place, p.lane, p.event_id, p.due_at, p.owed_since, p.key, p.not_before, p.give_up,
                          p.attempts, p.spared
                     FROM pending AS p
                    WHERE p.lane = wanted.lane
                      AND p.key = wanted.key
                      AND p.due_at <= now()
                    ORDER BY p.due_at, p.event_id
                    LIMIT 1
                   ) AS p
              LEFT JOIN events AS e ON e.id = p.event_id
            """,
            [lane for lane, _ in keys],
            [key for _, key in keys],
        )
        return await self._taken(rows)

    async def _taken(self, rows: Sequence[Record]) -> list[Taken]:
        """Rows with their events; one that has none may have been carried over when its partition was dropped."""
        lacking = [row["event_id"] for row in rows if row["id"] is None]
        carried: dict[UUID, Record] = {}
        if lacking:
            found = await self._dispatch.fetch("SELECT * FROM carried_events WHERE id = ANY ($1::uuid[])", lacking)  # fmt: skip
            carried = {row["id"]: row for row in found}
        return [_taken(row, row if row["id"] is not None else carried.get(row["event_id"])) for row in rows]

    async def oldest_writer(self) -> datetime:
        """Whatever is not visible now will have a `due_at` after this.

        A row's `due_at` is read off the clock when its transaction is known as a writer, so a transaction that is
        not one yet will write later than now.
        """
        at: datetime = await self._dispatch.fetchval(
            """
            SELECT least(
                   clock_timestamp(),
                   (SELECT min(xact_start)
                      FROM pg_stat_activity
                     WHERE backend_xid IS NOT NULL
                       AND datname = current_database()),
                   (SELECT min(prepared)
                      FROM pg_prepared_xacts
                     WHERE database = current_database())
                   ) - interval '1 second'
            """
        )
        return at

    # ── settle ───────────────────────────────────────────────────────────────────────────────────

    async def settle(self, done: Sequence[Settlement]) -> Settled:
        """Write what came of these, for those that still stand where they were taken from, while their lane is ours.

        A dispatcher that slept through its lease learns it here (its epoch does not stand), before it can undo the
        work of its successor.  A lane that somebody has locked is skipped: its epoch stands, settle it again.

        An attempt that is told of already (what was restored may not fit together) keeps nothing from being settled;
        but to look for one costs a record of the log each time, so it is done where it was found to be needed.
        """
        if not all(
            s.outcome == OutcomeKind.DELIVERED and s.verdict == Verdict.DELIVERED and s.reason is None for s in done
        ):
            return await self._settle_whatever(done)
        gone = await self._settle_delivered(done)
        left = [n for n in range(len(done)) if n not in gone]
        if not left:
            return Settled(dict.fromkeys(gone), frozenset((s.lane, s.epoch) for s in done))
        try:
            rest = await self._settle_whatever([done[n] for n in left])
        except Unavailable:
            if not gone:
                raise
            rest = Settled({}, frozenset((s.lane, s.epoch) for s in done))  # these stand, and are settled the next time
        return Settled(dict.fromkeys(gone) | {left[n]: again for n, again in rest.done.items()}, rest.standing)

    async def _settle_delivered(self, done: Sequence[Settlement]) -> set[int]:
        """What nearly all are: delivered, not told of yet, not carried over.  Those that are gone, by position; the rest stands.

        It could be left to the statement for whatever comes, but that has three times as many parts, and Postgres makes
        each of them ready, whether there is something for it or not: twice the work, for one that comes alone.
        """
        try:
            rows = await self._dispatch.fetch(
                """
                WITH fence AS MATERIALIZED (
                    SELECT lane, carried_below
                      FROM lanes
                     WHERE (lane, epoch) IN (SELECT lane, epoch FROM unnest($1::int[], $2::bigint[]) AS held (lane, epoch))
                       FOR SHARE SKIP LOCKED
                ), gone AS (
                    DELETE FROM pending AS p
                     USING unnest($3::text::int[], $4::text::tid[], $5::text::uuid[], $6::text::int[], $7::float8[],
                                  $8::text::int[], $9::text::uuid[], $10::text::int[], $11::text[], $12::text::int[])
                      WITH ORDINALITY
                        AS given (lane, place, event_id, destination, at,
                                  took_ms, trace_id, status, receipt, attempts, ord)
                     WHERE p.ctid = given.place
                       AND (p.event_id, p.lane, p.attempts) = (given.event_id, given.lane, coalesce(given.attempts, 0))
                       AND given.lane = ANY (ARRAY(SELECT lane FROM fence))
                       AND given.event_id >= (SELECT carried_below FROM fence ORDER BY carried_below DESC LIMIT 1)
                    RETURNING given.event_id, destination, p.attempts + 1 AS number, at, status, took_ms, trace_id, receipt, ord
                ), told AS (
                    INSERT INTO attempts (event_id, destination, number, at, outcome, status, took_ms, trace_id, receipt)
                    SELECT event_id, destination, number, to_timestamp(at), 0 /* delivered */, status, took_ms, trace_id, receipt
                      FROM gone
                ), counted AS (
                    INSERT INTO tally (day, what, destination, n)
                    SELECT event_day(event_id), 3, destination, count(*)
                      FROM gone
                     GROUP BY 1, 3
                )
                SELECT ord FROM gone
                """,
                *_what_was_tried(done),
                _unless_all([s.receipt for s in done], None),
                _numbers(_unless_all([s.taken.attempts for s in done], 0)),
            )
        except UniqueViolationError:
            return set()
        return {row[0] - 1 for row in rows}

    async def _settle_whatever(self, done: Sequence[Settlement]) -> Settled:
        """Any verdict; one that is told of already, and one that was carried over when its partition was dropped."""
        try:
            return await self._settle(done, some_are_told=False)
        except UniqueViolationError:
            return await self._settle(done, some_are_told=True)

    async def _settle(self, done: Sequence[Settlement], *, some_are_told: bool) -> Settled:
        """What most have in common is left out, and comes back as nulls; asyncpg would look into each value of an array."""
        row = await self._dispatch.fetchrow(
            """
            WITH given AS MATERIALIZED (
                SELECT lane, place, event_id, destination, at, took_ms, trace_id, status, reason, receipt, cause, ord,
                       coalesce(attempts, 0) AS attempts, coalesce(verdict, 0) AS verdict, coalesce(outcome, 0) AS outcome,
                       coalesce(delay, 0) AS delay, coalesce(spare, 0) AS spare
                  FROM unnest($3::text::int[], $4::text::tid[], $5::text::uuid[], $6::text::int[], $7::float8[],
                              $8::text::int[], $9::text::uuid[], $10::text::int[], $11::text[], $12::text[],
                              $13::text[], $14::text::int[], $15::int[], $16::int[], $17::float8[], $18::int[])
                  WITH ORDINALITY
                    AS g (lane, place, event_id, destination, at,
                          took_ms, trace_id, status, reason, receipt,
                          cause, attempts, verdict, outcome, delay, spare, ord)
            ), fence AS MATERIALIZED (
                SELECT lane, carried_below
                  FROM lanes
                 WHERE (lane, epoch) IN (SELECT lane, epoch FROM unnest($1::int[], $2::bigint[]) AS held (lane, epoch))
                   FOR SHARE SKIP LOCKED
            ), ours AS MATERIALIZED (
                SELECT given.*, given.event_id < (SELECT carried_below FROM fence ORDER BY carried_below DESC LIMIT 1) AS carried
                  FROM given
                 WHERE lane = ANY (ARRAY(SELECT lane FROM fence))
            ), gone AS (
                DELETE FROM pending AS p
                 USING ours
                 WHERE p.ctid = ours.place
                   AND (p.event_id, p.lane, p.attempts) = (ours.event_id, ours.lane, ours.attempts)
                   AND ours.verdict <> 1
                RETURNING ours.*, p.key, p.give_up, NULL::timestamptz AS again
            ), later AS (
                UPDATE pending AS p
                   SET attempts = p.attempts + 1,
                       spared = p.spared + ours.spare,
                       due_at = CASE WHEN p.key IS NULL THEN clock_timestamp() + make_interval(secs => ours.delay) ELSE p.due_at END,
                       not_before = CASE WHEN p.key IS NULL THEN NULL ELSE clock_timestamp() + make_interval(secs => ours.delay) END
                  FROM ours
                 WHERE p.ctid = ours.place
                   AND (p.event_id, p.lane, p.attempts) = (ours.event_id, ours.lane, ours.attempts)
                   AND ours.verdict = 1
                RETURNING ours.*, p.key, p.give_up, coalesce(p.not_before, p.due_at) AS again
            ), settled AS MATERIALIZED (
                SELECT * FROM gone
                 UNION ALL
                SELECT * FROM later
            ), told AS (
                INSERT INTO attempts (event_id, destination, number, at, outcome, status, took_ms, trace_id, reason, receipt)
                SELECT event_id, destination, attempts + 1, to_timestamp(at), outcome, status, took_ms, trace_id, reason, receipt
                  FROM settled
                 WHERE NOT carried
                   AND NOT $19
            ), told_unless_there AS (
                INSERT INTO attempts (event_id, destination, number, at, outcome, status, took_ms, trace_id, reason, receipt)
                SELECT event_id, destination, attempts + 1, to_timestamp(at), outcome, status, took_ms, trace_id, reason, receipt
                  FROM settled
                 WHERE NOT carried
                   AND $19
                    ON CONFLICT DO NOTHING
            ), told_of_carried AS (
                INSERT INTO carried_attempts (event_id, destination, number, at, outcome, status, took_ms, trace_id, reason, receipt)
                SELECT event_id, destination, attempts + 1, to_timestamp(at), outcome, status, took_ms, trace_id, reason, receipt
                  FROM settled
                 WHERE carried
                    ON CONFLICT DO NOTHING
            ), buried AS (
                INSERT INTO dead_letters (event_id, destination, cause, outcome, status, reason, attempts, lane, key, give_up)
                SELECT event_id, destination, cause, outcome, status, reason, attempts + 1, lane, key, give_up
                  FROM settled
                 WHERE verdict = 2
                    ON CONFLICT DO NOTHING
                RETURNING event_id, destination
            ), counted AS (
                INSERT INTO tally (day, what, destination, n)
                SELECT event_day(event_id), 3, destination, count(*)
                  FROM settled
                 WHERE verdict = 0
                 GROUP BY 1, 3
                 UNION ALL
                SELECT event_day(event_id), 4, destination, count(*)
                  FROM buried
                 GROUP BY 1, 3
            )
            SELECT ARRAY(SELECT ord FROM settled ORDER BY ord) AS ords,
                   ARRAY(SELECT again FROM settled ORDER BY ord) AS again,
                   ARRAY(SELECT (l.lane, l.epoch) FROM lanes AS l WHERE l.lane = ANY ($1)) AS standing
            """,
            *_what_was_tried(done),
            _unless_all([s.reason for s in done], None),
            _unless_all([s.receipt for s in done], None),
            _unless_all([s.cause for s in done], None),
            _numbers(_unless_all([s.taken.attempts for s in done], 0)),
            _unless_all([s.verdict for s in done], Verdict.DELIVERED),
            _unless_all([s.outcome for s in done], OutcomeKind.DELIVERED),
            _unless_all([s.delay.total_seconds() for s in done], 0),
            _unless_all([int(s.spared) for s in done], 0),
            some_are_told,
        )
        assert row is not None
        return Settled(
            done={ord_ - 1: again for ord_, again in zip(row["ords"], row["again"], strict=True)},
            standing=frozenset((lane, epoch) for lane, epoch in row["standing"]),
        )

    async def places(self, taken: Sequence[Taken]) -> dict[tuple[int, UUID], tuple[int, int]]:
        """Where the rows of these stand now, by (lane, event): a vacuum or another hand may have moved them."""
        rows = await self._dispatch.fetch(
            """
            SELECT p.lane, p.event_id, p.ctid AS place
              FROM unnest($1::uuid[], $2::int[], $3::int[]) AS wanted (event_id, lane, attempts)
              JOIN pending AS p
                ON (p.event_id, p.lane, p.attempts) = (wanted.event_id, wanted.lane, wanted.attempts)
            """,
            [t.event_id for t in taken],
            [t.lane for t in taken],
            [t.attempts for t in taken],
        )
        return {(row["lane"], row["event_id"]): row["place"] for row in rows}

    # ── careful mode ─────────────────────────────────────────────────────────────────────────────

    async def marked(self, lanes: Sequence[int]) -> dict[int, set[UUID]]:
        """By lane, those that were about to be tried, and nobody lived to tell."""
        marked: dict[int, set[UUID]] = {lane: set() for lane in lanes}
        for row in await self._dispatch.fetch("SELECT lane, event_id FROM suspects WHERE lane = ANY ($1)", lanes):
            marked[row["lane"]].add(row["event_id"])
        return marked

    async def suspect(self, taken: Taken) -> int:
        """Write down that this one is about to be tried; how often it was, and nobody lived to tell."""
        kills: int = await self._dispatch.fetchval(
            """
            INSERT INTO suspects AS s (event_id, lane)
            VALUES ($1, $2)
                ON CONFLICT (event_id, lane) DO UPDATE SET kills = s.kills + 1
            RETURNING kills
            """,
            taken.event_id,
            taken.lane,
        )
        failpoint("dispatch.suspected")
        return kills

    async def clear(self, taken: Taken) -> None:
        """It was tried, and whoever tried it lived to tell."""
        await self._dispatch.execute(
            "DELETE FROM suspects WHERE (event_id, lane) = ($1, $2)", taken.event_id, taken.lane
        )

    # ── destinations ─────────────────────────────────────────────────────────────────────────────

    async def ensure_destinations(
        self, shards: Mapping[str, int], lanes: Mapping[str, int] | None = None
    ) -> dict[str, Destination]:
        """Make those that are new; how many shards one has stays as it was made, and it gets as many `lanes` as it needs."""
        await self._intake.execute(
            """
            WITH made AS (
                INSERT INTO destinations (name, shards)
                SELECT name, shards
                  FROM unnest($1::text[], $2::smallint[]) AS wanted (name, shards)
                 WHERE name NOT IN (SELECT name FROM destinations)
                 ORDER BY name
                    ON CONFLICT (name) DO NOTHING
                RETURNING id, shards
            )
            INSERT INTO lanes (destination, shard, carried_below)
            SELECT id, shard, coalesce((SELECT carried_below FROM lanes ORDER BY carried_below DESC LIMIT 1), event_floor('epoch'))
              FROM made, generate_series(0, shards - 1) AS shard
             ORDER BY id, shard
            """,
            list(shards),
            list(shards.values()),
        )
        await self._intake.execute(
            """
            INSERT INTO lanes (destination, shard, carried_below)
            SELECT d.id, further, (SELECT carried_below FROM lanes ORDER BY carried_below DESC LIMIT 1)
              FROM unnest($1::text[], $2::int[]) AS wanted (name, lanes)
              JOIN destinations AS d ON d.name = wanted.name
             CROSS JOIN generate_series(d.shards, wanted.lanes - 1) AS further
             WHERE NOT EXISTS (SELECT FROM lanes AS l WHERE (l.destination, l.shard) = (d.id, further))
             ORDER BY d.id, further
                ON CONFLICT DO NOTHING
            """,
            list(lanes or {}),
            list((lanes or {}).values()),
        )
        rows = await self._intake.fetch(
            """
            SELECT d.id, d.name, d.shards, array_agg(l.lane ORDER BY l.shard) AS lanes
              FROM destinations AS d
              JOIN lanes AS l ON l.destination = d.id
             WHERE d.name = ANY ($1::text[])
             GROUP BY d.id
            """,
            list(shards),
        )
        return {
            row["name"]: Destination(id=row["id"], name=row["name"], shards=row["shards"], lanes=tuple(row["lanes"]))
            for row in rows
        }

    async def standings(self) -> dict[int, Standing]:
        """The destinations that are held or to be left alone, by number; for ever is a hundred years."""
        rows = await self._dispatch.fetch(
            """
            SELECT id, held_by, not_before,
                   CASE WHEN held_until IS NOT NULL  -- least() would pass over a null
                        THEN least(held_until, clock_timestamp() + interval '100 years')
                    END AS held_until
              FROM destinations
             WHERE held_until > clock_timestamp()
                OR not_before > clock_timestamp()
            """
        )
        return {row["id"]: Standing(row["held_until"], row["held_by"], row["not_before"]) for row in rows}

    async def leave_alone(self, destination: int, until: datetime) -> None:
        """The whole destination backs off, for whoever owns its lanes next, too."""
        await self._dispatch.execute(
            "UPDATE destinations SET not_before = greatest(not_before, $2) WHERE id = $1", destination, until
        )

    async def hold_for_cause(self, destination: int, until: datetime, reason: str) -> None:
        """The program holds a destination that is blocked; it never touches a person's hold."""
        await self._dispatch.execute(
            """
            UPDATE destinations
               SET held_until = $2, held_by = 'program', held_reason = $3
             WHERE id = $1
               AND (held_until IS NULL OR held_until < clock_timestamp() OR held_by = 'program')
            """,
            destination,
            until,
            reason,
        )

    async def notify(self, channel: str, payload: str) -> None:
        await self._dispatch.execute("SELECT pg_notify($1, $2)", channel, payload)


def in_seconds(limit: timedelta) -> int:
    return max(1, round(limit.total_seconds()))


def _what_was_tried(done: Sequence[Settlement]) -> tuple[Any, ...]:
    """What both statements of a settle begin with: lanes and their epochs, then columns with a value for each attempt.

    Of two epochs of one lane the older is over, whatever the newer one may do: it comes without a lane.
    """
    held = dict(sorted({(s.lane, s.epoch) for s in done}))
    return (
        list(held),
        list(held.values()),
        _numbers([s.lane if held[s.lane] == s.epoch else None for s in done]),
        "{" + ",".join([f'"({block},{offset})"' for block, offset in [s.taken.place for s in done]]) + "}",
        "{" + ",".join([str(s.taken.event_id) for s in done]) + "}",
        _numbers([s.destination for s in done]),
        [s.at.timestamp() for s in done],
        _numbers([round(s.took.total_seconds() * 1000) for s in done]),
        "{" + ",".join([s.trace or "NULL" for s in done]) + "}",
        _numbers(_unless_all([s.status for s in done], None)),
    )


def _once(values: list[Any]) -> list[Any]:
    """Only the first where all are the same."""
    return values[:1] if values.count(values[0]) == len(values) else values


def _unless_all(values: list[Any], usual: object) -> list[Any]:
    """Empty where each of them is the usual one."""
    return [] if values.count(usual) == len(values) else values


def _numbers(values: Iterable[int | None]) -> str:
    """An array as Postgres writes it."""
    return "{" + ",".join(["NULL" if value is None else f"{value:d}" for value in values]) + "}"


def _fresh(arrival: Arrival, lane: int, place: tuple[int, int], due_at: datetime) -> Taken:
    """A delivery as it was stored just now: what a read would say of it."""
    [debt] = [debt for debt in arrival.debts if debt.lane == lane]
    return Taken(
        lane=lane,
        place=place,
        event=arrival.event,
        event_id=arrival.event.id,
        due_at=due_at,
        owed_since=due_at,
        key=debt.key,
        not_before=None,
        give_up=None if debt.give_up is None else timedelta(seconds=in_seconds(debt.give_up)),
        attempts=0,
        spared=0,
    )


def _taken(row: Record, event: Record | None) -> Taken:
    place, lane, event_id, due_at, owed_since, key, not_before, give_up, attempts, spared = row[:10]
    return Taken(
        lane=lane,
        place=place,
        event=None if event is None else event_of(event),
        event_id=event_id,
        due_at=due_at,
        owed_since=owed_since,
        key=key,
        not_before=not_before,
        give_up=None if give_up is None else timedelta(seconds=give_up),
        attempts=attempts,
        spared=spared,
    )


def event_of(row: Record) -> Event:
    """A row of `events` as what it means."""
    return Event(
        id=row["id"],
        source=row["source"],
        type=row["type"],
        subject=row["subject"],
        facility=row["facility"],
        time=row["time"],
        data=msgspec.json.decode(row["data"]),
        policy=row["policy"],
        policy_version=row["policy_version"],
        received_at=row["received_at"],
        traceparent=row["traceparent"],
    )


def delivery_of(taken: Taken, destination: str, give_up: timedelta) -> Delivery:
    """What a connector is handed."""
    assert taken.event is not None
    return Delivery(
        event=taken.event,
        destination=destination,
        attempt=taken.attempts + 1,
        deadline=taken.owed_since + (taken.give_up or give_up),
    )
