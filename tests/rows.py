"""Rows as the program would have written them, for tests of what reads and repairs them: the books are kept."""

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

from outbox.database import Database
from outbox.event import OutcomeKind
from outbox.store import Tally


def uuid7(at: datetime) -> UUID:
    milliseconds = int(at.timestamp() * 1000)
    return UUID(bytes=milliseconds.to_bytes(6, "big") + bytes([0x70 | os.urandom(1)[0] & 15]) + os.urandom(9))


class Rows:
    """Writes events and moves their deliveries from state to state."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._now = datetime.now(UTC)

    async def open(self, *destinations: str, partitions: bool = True) -> "Rows":
        """Partitions for every day, and these destinations."""
        for table in ("events", "attempts") if partitions else ():
            await self._database.execute(f"CREATE TABLE {table}_all PARTITION OF {table} DEFAULT")
        for name in destinations:
            await self._database.execute(
                """
                WITH made AS (INSERT INTO destinations (name, shards) VALUES ($1, 1) RETURNING id)
                INSERT INTO lanes (destination, shard) SELECT id, 0 FROM made
                """,
                name,
            )
        return self

    async def event(
        self,
        *owed: str,
        type: str = "shop.order.paid",  # noqa: A002
        source: str = "shop",
        subject: str | None = "order/42",
        facility: str | None = "north",
        ago: timedelta = timedelta(0),
        trace: str | None = None,
    ) -> UUID:
        """An event that was accepted, with a delivery waiting for each of `owed`.  Later calls are later events."""
        self._now += timedelta(milliseconds=2)
        at = self._now - ago
        event = uuid7(at)
        await self._database.execute(
            """
            INSERT INTO events (id, source, type, subject, facility, time, received_at, traceparent, policy,
                                policy_version, digest, owed, data)
            SELECT $1, $2, $3, $4, $5, $6, $6, $7, 'order', 1, $8,
                   ARRAY(SELECT d.id FROM unnest($9::text[]) WITH ORDINALITY AS o (name, n)
                           JOIN destinations AS d ON d.name = o.name ORDER BY o.n), $10
            """,
            event,
            source,
            type,
            subject,
            facility,
            at,
            trace,
            uuid4(),
            list(owed),
            json.dumps({"id": 42, "total": "42.50"}),
        )
        await self._tally(event, Tally.ROUTED if owed else Tally.UNROUTED)
        for name in owed:
            await self._database.execute(
                """
                INSERT INTO pending (event_id, due_at, owed_since, lane)
                SELECT $1, $2, $2, lane FROM lanes JOIN destinations AS d ON d.id = destination WHERE name = $3
                """,
                event,
                at,
                name,
            )
            await self._tally(event, Tally.OWED, name)
        return event

    async def tried(
        self, event: UUID, destination: str, outcome: OutcomeKind = OutcomeKind.RETRY, status: int = 503
    ) -> None:
        """One attempt more, after which the delivery still waits."""
        await self._database.execute(
            """
            WITH counted AS (
                UPDATE pending SET attempts = attempts + 1
                 WHERE event_id = $1
                   AND lane IN (SELECT lane FROM lanes JOIN destinations AS d ON d.id = destination WHERE d.name = $2)
                RETURNING attempts
            )
            INSERT INTO attempts (event_id, at, trace_id, took_ms, destination, number, outcome, status, reason)
            SELECT $1, clock_timestamp(), $3, 12, d.id, counted.attempts, $4, $5, $6
              FROM counted, destinations AS d WHERE d.name = $2
            """,
            event,
            destination,
            uuid4(),
            int(outcome),
            status,
            None if outcome is OutcomeKind.DELIVERED else f"HTTP {status}",
        )

    async def delivered(self, event: UUID, destination: str) -> None:
        await self.tried(event, destination, OutcomeKind.DELIVERED, 200)
        await self._gone(event, destination)
        await self._tally(event, Tally.DELIVERED, destination)

    async def dead(
        self, event: UUID, destination: str, outcome: OutcomeKind = OutcomeKind.REFUSED, status: int = 400
    ) -> None:
        await self.tried(event, destination, outcome, status)
        await self._database.execute(
            """
            INSERT INTO dead_letters (event_id, destination, cause, outcome, status, reason, attempts, lane, key, give_up)
            SELECT p.event_id, d.id, $3, $4, $5, $6, p.attempts, p.lane, p.key, p.give_up
              FROM pending AS p JOIN lanes USING (lane) JOIN destinations AS d ON d.id = lanes.destination
             WHERE p.event_id = $1 AND d.name = $2
            """,
            event,
            destination,
            f"{destination}:{outcome.word}:{status}",
            int(outcome),
            status,
            f"HTTP {status}",
        )
        await self._gone(event, destination)
        await self._tally(event, Tally.DEAD, destination)

    async def letter(self, destination: str = "picky", **about: object) -> UUID:
        """An event whose one delivery is dead."""
        event = await self.event(destination, **about)  # type: ignore[arg-type]
        await self.dead(event, destination)
        return event

    async def rejected(self, source: str, reason: str, count: int, at: datetime) -> None:
        await self._database.execute(
            "INSERT INTO rejections (at, source, reason, n, digests) VALUES ($1, $2, $3, $4, $5)",
            at,
            source,
            reason,
            count,
            [uuid4()],
        )

    async def count(self, table: str) -> int:
        return int(await self._database.fetchval(f"SELECT count(*) FROM {table}"))

    async def _gone(self, event: UUID, destination: str) -> None:
        await self._database.execute(
            """
            DELETE FROM pending USING lanes, destinations AS d
             WHERE pending.lane = lanes.lane AND lanes.destination = d.id AND event_id = $1 AND d.name = $2
            """,
            event,
            destination,
        )

    async def _tally(self, event: UUID, what: Tally, destination: str | None = None) -> None:
        await self._database.execute(
            """
            INSERT INTO tally (day, what, destination, n)
            SELECT event_day($1), $2, coalesce((SELECT id FROM destinations WHERE name = $3), 0), 1
            """,
            event,
            int(what),
            destination,
        )


def ids(items: Sequence[object]) -> list[UUID]:
    return [item.id for item in items]  # type: ignore[attr-defined]
