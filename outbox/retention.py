"""What is kept, for how long, and what is still owed when its days are over.

An event with a waiting, held or dead delivery outlives its partition: it and its attempts are copied into small tables
of their own first, and `lanes.carried_below` says so to every settle.  The books stay balanced at each step.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from outbox.database import Connection, Database
from outbox.partitions import Partition, Partitions

BOOKKEEPING = 0x51C1  # the advisory lock of whoever rewrites tally rows
SETTLED_FOR = timedelta(hours=1)  # after its end, before a day is proven
PATIENCE = timedelta(minutes=5)  # with a statement over a whole day


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """How long: events with their attempts; what was decided about dead letters; the audit trail."""

    events: timedelta
    dead_letters: timedelta
    audit: timedelta


class Retention:
    def __init__(self, database: Database, partitions: Partitions, keep: Keep) -> None:
        self._database = database
        self._partitions = partitions
        self._keep = keep

    async def run(self, now: datetime) -> list[str]:
        """Drop what is over at this instant; the names of the partitions that went."""
        went = []
        for partition in await self._partitions.over("events", now - self._keep.events):
            if not partition.leaving:
                await self._carry_over(partition, now)
            await self._partitions.drop("events", partition)
            went.append(partition.name)
        for partition in await self._partitions.over("attempts", now - self._keep.events):
            await self._partitions.drop("attempts", partition)
            went.append(partition.name)
        await self._let_go(now)
        await self._forget(now)
        return went + await self._partitions.drop_old_buckets(now)

    async def _carry_over(self, partition: Partition, now: datetime) -> None:
        """Copy what is owed; what changes meanwhile is copied with every settle kept out, which takes a moment only.

        A settle skips lanes that are locked, and afterwards reads `carried_below` off the row that it locks itself:
        it cannot write an attempt into a partition that is about to go.
        """
        async with self._at_length() as connection:
            await self._copy(connection, partition, now)
        async with self._at_length() as connection:
            await connection.execute("SELECT pg_advisory_xact_lock($1)", BOOKKEEPING)
            await connection.execute("SELECT FROM lanes ORDER BY lane FOR UPDATE")
            await connection.execute(
                "UPDATE lanes SET carried_below = event_floor($1) WHERE carried_below < event_floor($1)", partition.ends
            )
            await self._copy(connection, partition, now)
            await connection.execute(_FORGET_DISCARDS, partition.begins, partition.ends)
            await connection.execute(_FORGET_REASSIGNED, partition.begins, partition.ends)
            await connection.execute(_COUNT_AGAIN, partition.begins, partition.ends)

    async def _copy(self, connection: Connection, partition: Partition, now: datetime) -> None:
        """The events that somebody still has to do with, found from there: nearly all of the partition is done with."""
        await connection.execute(
            """
            WITH wanted AS MATERIALIZED (
                SELECT event_id FROM pending WHERE event_id >= event_floor($1) AND event_id < event_floor($2)
                 UNION
                SELECT event_id FROM dead_letters WHERE event_id >= event_floor($1) AND event_id < event_floor($2)
                 UNION
                SELECT event_id
                  FROM discards
                 WHERE event_id >= event_floor($1) AND event_id < event_floor($2)
                   AND at > $3
            )
            INSERT INTO carried_events
            SELECT e.*
              FROM wanted AS w
              JOIN events AS e ON e.id = w.event_id
             WHERE e.id >= event_floor($1) AND e.id < event_floor($2)
               AND NOT EXISTS (SELECT FROM carried_events AS c WHERE c.id = w.event_id)
                ON CONFLICT DO NOTHING
            """,
            partition.begins,
            partition.ends,
            now - self._keep.dead_letters,
            timeout=PATIENCE.total_seconds(),
        )
        await connection.execute(
            """
            INSERT INTO carried_attempts
            SELECT a.*
              FROM carried_events AS c
              JOIN attempts AS a ON a.event_id = c.id
             WHERE c.id >= event_floor($1) AND c.id < event_floor($2)
               AND a.event_id >= event_floor($1) AND a.event_id < event_floor($2)
                ON CONFLICT DO NOTHING
            """,
            partition.begins,
            partition.ends,
            timeout=PATIENCE.total_seconds(),
        )

    @asynccontextmanager
    async def _at_length(self) -> AsyncIterator[Connection]:
        """A transaction whose statements may take their time."""
        async with self._database.transaction() as connection:
            await connection.execute("SELECT set_config('statement_timeout', $1, true)", f"{PATIENCE.seconds}s")
            yield connection

    async def _let_go(self, now: datetime) -> None:
        """Carried events that owe nothing any more go, a day at a time."""
        days = await self._database.fetch(
            """
            SELECT DISTINCT event_day(e.id)::timestamp AT TIME ZONE 'UTC' AS day
              FROM carried_events AS e
             WHERE NOT EXISTS (SELECT FROM pending AS p WHERE p.event_id = e.id)
               AND NOT EXISTS (SELECT FROM dead_letters AS d WHERE d.event_id = e.id)
               AND NOT EXISTS (SELECT FROM discards AS d WHERE d.event_id = e.id AND d.at > $1)
            """,
            now - self._keep.dead_letters,
        )
        for day in (row["day"] for row in days):
            async with self._at_length() as connection:
                await connection.execute("SELECT pg_advisory_xact_lock($1)", BOOKKEEPING)
                await connection.execute("SELECT FROM lanes ORDER BY lane FOR UPDATE")
                await connection.execute(
                    """
                    WITH gone AS (
                        DELETE FROM carried_events AS e
                         WHERE e.id >= event_floor($1) AND e.id < event_floor($2)
                           AND NOT EXISTS (SELECT FROM pending AS p WHERE p.event_id = e.id)
                           AND NOT EXISTS (SELECT FROM dead_letters AS d WHERE d.event_id = e.id)
                           AND NOT EXISTS (SELECT FROM discards AS d WHERE d.event_id = e.id AND d.at > $3)
                        RETURNING e.id
                    )
                    DELETE FROM carried_attempts AS a
                     USING gone
                     WHERE a.event_id = gone.id
                    """,
                    day,
                    day + timedelta(days=1),
                    now - self._keep.dead_letters,
                    timeout=PATIENCE.total_seconds(),
                )
                await connection.execute(_FORGET_DISCARDS, day, day + timedelta(days=1))
                await connection.execute(_FORGET_REASSIGNED, day, day + timedelta(days=1))
                await connection.execute(_COUNT_AGAIN, day, day + timedelta(days=1))

    async def _forget(self, now: datetime) -> None:
        """What has no partitions."""
        await self._database.execute("DELETE FROM rejections WHERE at < $1", now - self._keep.events)
        await self._database.execute("DELETE FROM dropped_keys WHERE last_seen < $1", now - self._keep.events)
        await self._database.execute("DELETE FROM audit WHERE at < $1", now - self._keep.audit)
        await self._database.execute(
            "DELETE FROM suspects AS s WHERE NOT EXISTS (SELECT FROM pending AS p WHERE (p.event_id, p.lane) = (s.event_id, s.lane))"
        )

    # ── the books ────────────────────────────────────────────────────────────────────────────────

    async def roll_up(self) -> None:
        """Sum up the tally where many rows say the same."""
        async with self._database.transaction() as connection:
            await connection.execute("SELECT pg_advisory_xact_lock($1)", BOOKKEEPING)
            await connection.execute(
                """
                WITH crowded AS (
                    SELECT day, what, destination
                      FROM tally
                     GROUP BY day, what, destination
                    HAVING count(*) > 50
                ), gone AS (
                    DELETE FROM tally AS t
                     USING crowded AS c
                     WHERE (t.day, t.what, t.destination) = (c.day, c.what, c.destination)
                    RETURNING t.day, t.what, t.destination, t.n
                )
                INSERT INTO tally (day, what, destination, n)
                SELECT day, what, destination, sum(n)
                  FROM gone
                 GROUP BY day, what, destination
                """
            )

    async def prove(self, now: datetime) -> list[datetime]:
        """Days that are over and not proven yet: owed = ended + outstanding, id by id.  Those where it does not hold.

        Not those that are being carried over: what is left of them is not whole any more.
        """
        proven = {row["day"] for row in await self._database.fetch("SELECT day FROM proofs")}
        carried = await self._database.fetchval("SELECT max(event_at(carried_below)) FROM lanes")
        wrong = []
        for partition in await self._partitions.of("events"):
            if partition.ends > now - SETTLED_FOR or partition.begins.date() in proven:
                continue
            if partition.leaving or (carried is not None and partition.ends <= carried):
                continue
            async with self._at_length() as connection:
                row = await connection.fetchrow(
                    _PROVE, partition.begins, partition.ends, timeout=PATIENCE.total_seconds()
                )
            if row is not None and (row["missing"] or row["surplus"]):  # None: another process has just done it
                wrong.append(partition.begins)
        return wrong


_FORGET_DISCARDS = """
    DELETE FROM discards AS d
     WHERE d.event_id >= event_floor($1) AND d.event_id < event_floor($2)
       AND NOT EXISTS (SELECT FROM carried_events AS c WHERE c.id = d.event_id)
"""

_FORGET_REASSIGNED = """
    DELETE FROM reassigned AS r
     WHERE r.event_id >= event_floor($1) AND r.event_id < event_floor($2)
       AND NOT EXISTS (SELECT FROM carried_events AS c WHERE c.id = r.event_id)
"""

# The books of a day of which only what was carried over is left.
_COUNT_AGAIN = """
    WITH gone AS (
        DELETE FROM tally WHERE day = ($1::timestamptz AT TIME ZONE 'UTC')::date
    ), counted AS (
        SELECT CASE WHEN owed = '{}' THEN 0 ELSE 1 END AS what, 0 AS destination, count(*) AS n
          FROM carried_events
         WHERE id >= event_floor($1) AND id < event_floor($2)
         GROUP BY 1
         UNION ALL
        SELECT 2, destination, count(*)
          FROM carried_events, unnest(owed) AS destination
         WHERE id >= event_floor($1) AND id < event_floor($2)
         GROUP BY 2
         UNION ALL
        SELECT 2, destination, count(*)
          FROM reassigned
         WHERE event_id >= event_floor($1) AND event_id < event_floor($2)
         GROUP BY 2
         UNION ALL
        SELECT 3, destination, count(*)
          FROM carried_attempts
         WHERE event_id >= event_floor($1) AND event_id < event_floor($2) AND outcome IN (0, 1)
         GROUP BY 2
         UNION ALL
        SELECT 4, destination, count(*)
          FROM dead_letters
         WHERE event_id >= event_floor($1) AND event_id < event_floor($2)
         GROUP BY 2
         UNION ALL
        SELECT 5, destination, count(*)
          FROM discards
         WHERE event_id >= event_floor($1) AND event_id < event_floor($2)
         GROUP BY 2
    )
    INSERT INTO tally (day, what, destination, n)
    SELECT ($1::timestamptz AT TIME ZONE 'UTC')::date, what, destination, n
      FROM counted
"""

_PROVE = """
    WITH owed AS (
        SELECT id AS event_id, unnest(owed) AS destination
          FROM events
         WHERE id >= event_floor($1) AND id < event_floor($2)
         UNION ALL
        SELECT event_id, destination
          FROM reassigned
         WHERE event_id >= event_floor($1) AND event_id < event_floor($2)
    ), stands AS (
        SELECT p.event_id, l.destination
          FROM pending AS p
          JOIN lanes AS l USING (lane)
         WHERE p.event_id >= event_floor($1) AND p.event_id < event_floor($2)
         UNION ALL
        SELECT event_id, destination
          FROM dead_letters
         WHERE event_id >= event_floor($1) AND event_id < event_floor($2)
         UNION ALL
        SELECT event_id, destination
          FROM discards
         WHERE event_id >= event_floor($1) AND event_id < event_floor($2)
         UNION ALL
        SELECT event_id, destination
          FROM attempts
         WHERE event_id >= event_floor($1) AND event_id < event_floor($2) AND outcome IN (0, 1)
    ), matched AS (
        SELECT coalesce(o.n, 0) AS owed, coalesce(s.n, 0) AS stands
          FROM (SELECT event_id, destination, count(*) AS n FROM owed GROUP BY 1, 2) AS o
          FULL JOIN (SELECT event_id, destination, count(*) AS n FROM stands GROUP BY 1, 2) AS s
            ON (o.event_id, o.destination) = (s.event_id, s.destination)
    )
    INSERT INTO proofs (day, events, owed, missing, surplus)
    SELECT ($1::timestamptz AT TIME ZONE 'UTC')::date,
           (SELECT count(*) FROM events WHERE id >= event_floor($1) AND id < event_floor($2)),
           coalesce(sum(owed), 0),
           coalesce(sum(greatest(owed - stands, 0)), 0),
           coalesce(sum(greatest(stands - owed, 0)), 0)
      FROM matched
        ON CONFLICT (day) DO NOTHING
    RETURNING missing, surplus
"""
