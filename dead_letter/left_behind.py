"""What waits for a destination that nobody delivers to any more: sent elsewhere, or laid aside, by a person."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID, uuid4

from asyncpg import Record

from dead_letter.audit import note
from outbox.database import Connection, Database, Unavailable
from outbox.destinations import UnknownDestinationError
from outbox.store import WAKE, Destination

AT_ONCE = 100_000  # deliveries that one deed takes; done again, it takes the next
BATCH = 1_000  # of these in one transaction


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """A destination that deliveries may be reassigned to, as the configuration has it."""

    name: str
    ordered: bool  # a route asks for order there
    receives: frozenset[tuple[str, int]] | None  # policies and versions whose events it may get; None: any


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftPreview:
    """What a reassignment or discard would take."""

    count: int
    made: int  # new deliveries; the other events owe the new destination already
    oldest: datetime | None
    dead: int  # dead letters of the destination, which are not taken
    more: bool  # beyond what is taken at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What a reassignment or discard took."""

    id: UUID  # the audit names it
    count: int
    made: int  # new deliveries; the other events owed the new destination already
    more: bool  # do it again for the rest


class CannotMoveError(Exception):
    """What waits cannot be taken now; says why, and what to do about it."""


Write = Callable[[Connection, Sequence[Record]], Awaitable[int]]


class LeftBehind:
    """Takes deliveries only while nobody can have them in flight.

    Each batch is one transaction: it locks the lanes of the destination, sees that no dispatcher whose lease runs owns one, and
    gives them a new epoch, so that whoever owned one and only sleeps can settle nothing any more.  A dispatcher that
    wants a lane meanwhile passes over it, and finds it emptied later.  What is cut off has done some whole batches,
    and the same again does the rest.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def preview(self, name: str, home: Home | None = None) -> LeftPreview:
        """Changes nothing; raises for what would be refused, but for a dispatcher that still delivers there."""
        old = await self._destination(name)
        new = await self._known(home) if home else None
        rows = await self._database.fetch(
            """
            WITH waiting AS MATERIALIZED (
                SELECT event_id, owed_since
                  FROM pending
                 WHERE lane = ANY ($1::int[])
                 LIMIT $3
            )
            SELECT event.policy, event.policy_version, count(*) AS n, min(waiting.owed_since) AS oldest,
                   count(*) FILTER (
                   WHERE EXISTS (SELECT
                                   FROM discards AS d
                                  WHERE (d.event_id, d.destination, d.cause) = (waiting.event_id, $2, 'reassigned'))
                      OR NOT $2 = ANY (event.owed)
                         AND NOT EXISTS (SELECT
                                           FROM reassigned AS r
                                          WHERE (r.event_id, r.destination) = (waiting.event_id, $2))) AS made
              FROM waiting
              LEFT JOIN LATERAL (
                   SELECT policy, policy_version, owed FROM events WHERE id = waiting.event_id
                    UNION ALL
                   SELECT policy, policy_version, owed FROM carried_events WHERE id = waiting.event_id
                    LIMIT 1) AS event ON true
             GROUP BY event.policy, event.policy_version
            """,
            list(old.lanes),
            new.id if new else 0,
            AT_ONCE + 1,
        )
        if home:
            rows = [row for row in rows if row["policy"] is not None]
            _refuse_what_is_too_sensitive(rows, home)
        count = sum(row["n"] for row in rows)
        return LeftPreview(
            count=min(count, AT_ONCE),
            made=min(sum(row["made"] for row in rows), AT_ONCE) if home else 0,
            oldest=min((row["oldest"] for row in rows), default=None),
            dead=await self._database.fetchval("SELECT count(*) FROM dead_letters WHERE destination = $1", old.id),
            more=count > AT_ONCE,
        )

    async def reassign(self, name: str, home: Home, *, reason: str, actor: str) -> Moved:
        """Each delivery is discarded, as `reassigned`, and its event owes one to the new destination from now on.

        In the order of the queue, each at its own place there, behind what waits there already.  An event that owes or
        owed the new destination gets no second delivery, unless that one was itself reassigned and never made: then
        it waits again, with its tries counted on.
        """
        old, new = await self._destination(name), await self._known(home)
        await self.preview(name, home)  # refuses before the first batch what a later one would be refused for
        last: datetime | None = None

        async def send(connection: Connection, batch: Sequence[Record]) -> int:
            nonlocal last
            _refuse_what_is_too_sensitive(batch, home)
            places = [
                new.place(
                    row["event_id"],
                    row["subject"],
                    ordered=home.ordered or row["key"] is not None,
                    party=old.id,  # a lane for all that needs no order: it does not stand in the way of what comes in
                )
                for row in batch
            ]
            written = await connection.fetchrow(
                """
                WITH chosen AS MATERIALIZED (
                    SELECT event_id, lane, new_lane, key, give_up, ord
                      FROM unnest($1::uuid[], $2::int[], $3::int[], $4::bigint[], $5::int[])
                      WITH ORDINALITY AS c (event_id, lane, new_lane, key, give_up, ord)
                ), gone AS (
                    DELETE FROM pending AS p
                     USING chosen AS c
                     WHERE (p.event_id, p.lane) = (c.event_id, c.lane)
                    RETURNING c.event_id, c.new_lane, c.key, c.give_up, c.ord
                ), laid_aside AS (
                    INSERT INTO discards (event_id, destination, actor, reason, cause)
                    SELECT event_id, $6, $8, $9, 'reassigned'
                      FROM gone
                     ORDER BY event_id
                ), revived AS (
                    DELETE FROM discards AS d
                     USING gone
                     WHERE (d.event_id, d.destination, d.cause) = (gone.event_id, $7, 'reassigned')
                    RETURNING d.event_id
                ), fresh AS (
                    INSERT INTO reassigned (event_id, destination, origin)
                    SELECT event_id, $7, $6
                      FROM gone
                     WHERE NOT EXISTS (SELECT FROM events AS e WHERE e.id = gone.event_id AND $7 = ANY (e.owed))
                       AND NOT EXISTS (SELECT FROM carried_events AS e WHERE e.id = gone.event_id AND $7 = ANY (e.owed))
                     ORDER BY event_id
                        ON CONFLICT DO NOTHING
                    RETURNING event_id
                ), sent AS (
                    INSERT INTO pending (event_id, due_at, owed_since, key, lane, give_up, attempts, spared)
                    SELECT gone.event_id, moment.at + gone.ord * interval '1 microsecond', moment.at,
                           gone.key, gone.new_lane, gone.give_up, tried.n, tried.n
                      FROM gone
                     CROSS JOIN (SELECT greatest(statement_timestamp(), $10::timestamptz) AS at) AS moment
                     CROSS JOIN LATERAL (
                           SELECT coalesce(greatest((SELECT max(number)
                                                       FROM attempts AS a
                                                      WHERE (a.event_id, a.destination) = (gone.event_id, $7)),
                                                    (SELECT max(number)
                                                       FROM carried_attempts AS a
                                                      WHERE (a.event_id, a.destination) = (gone.event_id, $7))),
                                           0) AS n) AS tried
                     WHERE gone.event_id IN (SELECT event_id FROM fresh UNION ALL SELECT event_id FROM revived)
                     ORDER BY gone.ord
                    RETURNING due_at
                ), counted AS (
                    INSERT INTO tally (day, what, destination, n)
                    SELECT event_day(event_id), 5, $6, count(*) FROM gone GROUP BY 1
                     UNION ALL
                    SELECT event_day(event_id), 2, $7, count(*) FROM fresh GROUP BY 1
                     UNION ALL
                    SELECT event_day(event_id), 5, $7, -count(*) FROM revived GROUP BY 1
                )
                SELECT count(*) AS made, max(due_at) AS last FROM sent
                """,
                [row["event_id"] for row in batch],
                [row["lane"] for row in batch],
                [lane for lane, _ in places],
                [key for _, key in places],
                [row["give_up"] for row in batch],
                old.id,
                new.id,
                actor,
                f"reassigned to {new.name}: {reason}",
                last,
            )
            assert written is not None
            last = written["last"] or last
            return int(written["made"])

        moved = await self._take(old, send, "destination.reassign", reason=reason, actor=actor, home=home)
        with suppress(Unavailable):  # whoever misses it finds the deliveries by the poll
            await self._database.execute("SELECT pg_notify($1, $2)", WAKE, ",".join(map(str, new.lanes)))
        return moved

    async def discard(self, name: str, *, reason: str, actor: str) -> Moved:
        """These deliveries will never be made, and the reason stands with each of them."""
        old = await self._destination(name)

        async def lay_aside(connection: Connection, batch: Sequence[Record]) -> int:
            await connection.execute(
                """
                WITH gone AS (
                    DELETE FROM pending AS p
                     USING unnest($1::uuid[], $2::int[]) AS c (event_id, lane)
                     WHERE (p.event_id, p.lane) = (c.event_id, c.lane)
                    RETURNING p.event_id
                ), kept AS (
                    INSERT INTO discards (event_id, destination, actor, reason)
                    SELECT event_id, $3, $4, $5
                      FROM gone
                     ORDER BY event_id
                )
                INSERT INTO tally (day, what, destination, n)
                SELECT event_day(event_id), 5, $3, count(*)
                  FROM gone
                 GROUP BY 1
                """,
                [row["event_id"] for row in batch],
                [row["lane"] for row in batch],
                old.id,
                actor,
                reason,
            )
            return 0

        return await self._take(old, lay_aside, "destination.discard", reason=reason, actor=actor)

    async def _take(
        self, old: Destination, write: Write, action: str, *, reason: str, actor: str, home: Home | None = None
    ) -> Moved:
        """Batch after batch, until nothing is left; somebody may come back to the destination in between."""
        deed, count, made, after = uuid4(), 0, 0, None
        while count < AT_ONCE:
            try:
                async with self._database.transaction() as connection:
                    await _close(connection, old)
                    batch = await _next(connection, old, after, min(BATCH, AT_ONCE - count), orphans=home is None)
                    if not batch:
                        break
                    new = await write(connection, batch)
                    detail = {
                        "id": deed,
                        **({"to": home.name, "made": new} if home else {}),
                        "count": len(batch),
                        "deliveries": [f"{row['event_id']}/{old.name}" for row in batch],
                    }
                    await note(connection, actor=actor, action=action, target=old.name, reason=reason, detail=detail)
            except CannotMoveError:
                if not count:
                    raise
                break  # what was done is told; who does the rest is told why not
            count, made = count + len(batch), made + new
            after = (batch[-1]["lane"], batch[-1]["due_at"], batch[-1]["event_id"])
        left = await self._database.fetchval(
            "SELECT EXISTS (SELECT FROM pending WHERE lane = ANY ($1::int[]))", list(old.lanes)
        )
        return Moved(id=deed, count=count, made=made, more=left)

    async def _known(self, home: Home) -> Destination:
        try:
            return await self._destination(home.name)
        except UnknownDestinationError:
            problem = (
                f"No `sluicegate serve` has run with {home.name} in its configuration yet: start or reload one first."
            )
            raise CannotMoveError(problem) from None

    async def _destination(self, name: str) -> Destination:
        row = await self._database.fetchrow(
            """
            SELECT d.id, d.shards, array_agg(l.lane ORDER BY l.shard) AS lanes
              FROM destinations AS d
              JOIN lanes AS l ON l.destination = d.id
             WHERE d.name = $1
             GROUP BY d.id
            """,
            name,
        )
        if row is None:
            known = await self._database.fetch("SELECT name FROM destinations ORDER BY name")
            raise UnknownDestinationError(name, [each["name"] for each in known])
        return Destination(id=row["id"], name=name, shards=row["shards"], lanes=tuple(row["lanes"]))


async def _close(connection: Connection, old: Destination) -> None:
    """Until the end of this transaction nobody can lease its lanes, and nobody whose lease runs has one.

    Not only of who is present: a connection that was cut says nothing of the process, which may deliver just now.
    """
    await connection.execute("SELECT FROM lanes WHERE destination = $1 ORDER BY lane FOR UPDATE", old.id)
    serving = await connection.fetch(
        """
        SELECT DISTINCT d.name
          FROM lanes AS l
          JOIN dispatchers AS d ON d.id = l.owner
         WHERE l.destination = $1
           AND d.lease_until > clock_timestamp()
         ORDER BY d.name
        """,
        old.id,
    )
    if serving:
        who = ", ".join(row["name"] for row in serving)
        raise CannotMoveError(
            f"{old.name} is still delivered to, by {who}: give that process the file without it, or with "
            "`retired: true` as its only key, and do this again; if it was killed, in ten seconds."
        )
    await connection.execute("UPDATE lanes SET epoch = epoch + 1 WHERE destination = $1", old.id)


async def _next(
    connection: Connection, old: Destination, after: tuple[int, datetime, UUID] | None, most: int, *, orphans: bool
) -> Sequence[Record]:
    """The next that wait, lane by lane in the order of the queue; one without its event stays, unless `orphans` go too."""
    return await connection.fetch(
        """
        SELECT p.lane, p.due_at, p.event_id, p.key, p.give_up, e.subject, e.policy, e.policy_version
          FROM pending AS p
          LEFT JOIN LATERAL (
               SELECT id, subject, policy, policy_version FROM events WHERE id = p.event_id
                UNION ALL
               SELECT id, subject, policy, policy_version FROM carried_events WHERE id = p.event_id
                LIMIT 1) AS e ON true
         WHERE p.lane = ANY ($1::int[])
           AND ($2::int IS NULL OR (p.lane, p.due_at, p.event_id) > ($2, $3::timestamptz, $4::uuid))
           AND ($6 OR e.id IS NOT NULL)
         ORDER BY p.lane, p.due_at, p.event_id
         LIMIT $5
        """,
        list(old.lanes),
        *(after or (None, None, None)),
        most,
        orphans,
    )


def _refuse_what_is_too_sensitive(rows: Sequence[Record], home: Home) -> None:
    """Closed where it cannot be told: the class of a version that is no longer in the file is not known."""
    for row in rows:
        if home.receives is not None and (row["policy"], row["policy_version"]) not in home.receives:
            raise CannotMoveError(
                f"{home.name} may not receive what version {row['policy_version']} of policy {row['policy']} keeps, or "
                "that version is not in the file any more: let it receive every class (`receives: document`) for as "
                "long as this takes, name another destination, or discard what waits."
            )
