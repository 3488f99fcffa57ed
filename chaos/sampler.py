"""Looks at the books and at the processes each second, while whatever happens happens."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path

import asyncpg

from chaos.checker import Stored
from chaos.ledger import Ledger, Process, Sample
from outbox.ending import end
from outbox.event import OutcomeKind

ENDED_WELL = [int(OutcomeKind.DELIVERED), int(OutcomeKind.DUPLICATE)]
AWAY = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, TimeoutError)


class Sampler:
    """`told` asks the program whether its books balance: True, False, or None where nobody answers."""

    def __init__(
        self,
        path: Path,
        *,
        dsn: str,
        processes: Callable[[], Iterable[tuple[str, int]]],
        told: Callable[[], Awaitable[bool | None]],
    ) -> None:
        self._ledger = Ledger(path)
        self._dsn = dsn
        self._processes = processes
        self._told = told
        self._sampling: asyncio.Task[None] | None = None
        self.finals: list[dict[tuple[str, str], str]] = []

    def start(self) -> None:
        self._sampling = asyncio.create_task(self._keep_sampling())

    async def stop(self) -> None:
        if self._sampling is not None:
            await end(self._sampling)
        self._ledger.close()

    async def _keep_sampling(self) -> None:
        turn = 0
        while True:
            await self.sample(finals=turn % 3 == 0)
            turn += 1
            await asyncio.sleep(1)

    async def sample(self, *, finals: bool = True) -> None:
        rows: dict[str, int] | None = None
        try:
            async with asyncio.timeout(3):
                rows = await books(self._dsn)
                if finals:
                    self.finals.append(final(await stored(self._dsn)))
        except AWAY:
            pass
        told = await self._told()
        held = tuple(p for name, pid in self._processes() if (p := held_by(name, pid)))
        self._ledger.add(Sample(at=time.time(), rows=rows, told=told, processes=held))


def held_by(name: str, pid: int) -> Process | None:
    place = Path(f"/proc/{pid}")
    with suppress(OSError, StopIteration):
        rss = next(line for line in (place / "status").read_text().splitlines() if line.startswith("VmRSS"))
        files = sockets = 0
        for file in (place / "fd").iterdir():
            files += 1
            with suppress(OSError):
                sockets += str(file.readlink()).startswith("socket:")
        return Process(name=name, pid=pid, rss=int(rss.split()[1]) * 1024, files=files, sockets=sockets)
    return None


async def books(dsn: str) -> dict[str, int]:
    """Counted from the rows, in one statement and so in one moment; not by the program's own books."""
    connection = await asyncpg.connect(dsn, timeout=2)
    try:
        row = await connection.fetchrow(
            """
            SELECT (SELECT coalesce(sum(cardinality(owed)), 0) FROM sluicegate.events) AS owed,
                   (SELECT count(*) FROM sluicegate.pending) AS pending,
                   (SELECT count(*) FROM sluicegate.dead_letters) AS dead,
                   (SELECT count(*) FROM sluicegate.discards) AS discarded,
                   (SELECT count(*)
                      FROM (SELECT DISTINCT ON (event_id, destination) event_id, destination, outcome
                              FROM sluicegate.attempts
                             ORDER BY event_id, destination, number DESC) AS last
                     WHERE outcome = ANY ($1::smallint[])
                       AND NOT EXISTS (SELECT
                                         FROM sluicegate.pending AS p
                                         JOIN sluicegate.lanes AS l USING (lane)
                                        WHERE (p.event_id, l.destination) = (last.event_id, last.destination))
                       AND NOT EXISTS (SELECT
                                         FROM sluicegate.discards AS d
                                        WHERE (d.event_id, d.destination) = (last.event_id, last.destination))
                   ) AS delivered
            """,
            ENDED_WELL,
        )
        assert row is not None
        return {name: int(value) for name, value in row.items()}
    finally:
        await connection.close(timeout=2)


async def stored(dsn: str) -> list[Stored]:
    """Every event, and where each of its deliveries stands: in one place, or the place's name tells more than one."""
    connection = await asyncpg.connect(dsn, timeout=5)
    try:
        rows = await connection.fetch(
            """
            SELECT e.id::text AS event, (e.data ->> 'id')::bigint AS n, d.name AS destination,
                   concat_ws(' and ',
                             CASE WHEN p.event_id IS NOT NULL
                                  THEN CASE WHEN d.held_until > clock_timestamp() THEN 'held' ELSE 'waiting' END END,
                             CASE WHEN dead.event_id IS NOT NULL THEN 'dead' END,
                             CASE WHEN gone.event_id IS NOT NULL THEN 'discarded' END,
                             CASE WHEN p.event_id IS NULL AND dead.event_id IS NULL AND gone.event_id IS NULL
                                   AND (SELECT outcome
                                          FROM sluicegate.attempts AS a
                                         WHERE (a.event_id, a.destination) = (e.id, d.id)
                                         ORDER BY number DESC
                                         LIMIT 1) = ANY ($1::smallint[])
                                  THEN 'delivered' END) AS state
              FROM sluicegate.events AS e
              LEFT JOIN LATERAL unnest(e.owed) AS o (destination) ON true
              LEFT JOIN sluicegate.destinations AS d ON d.id = o.destination
              LEFT JOIN (SELECT p.event_id, l.destination
                           FROM sluicegate.pending AS p
                           JOIN sluicegate.lanes AS l USING (lane)) AS p
                     ON (p.event_id, p.destination) = (e.id, d.id)
              LEFT JOIN sluicegate.dead_letters AS dead ON (dead.event_id, dead.destination) = (e.id, d.id)
              LEFT JOIN sluicegate.discards AS gone ON (gone.event_id, gone.destination) = (e.id, d.id)
             WHERE e.data ->> 'id' IS NOT NULL
            """,
            ENDED_WELL,
        )
    finally:
        await connection.close(timeout=2)
    numbers: dict[str, int] = {}
    deliveries: dict[str, dict[str, str | None]] = {}
    for row in rows:
        numbers[row["event"]] = row["n"]
        states = deliveries.setdefault(row["event"], {})
        if row["destination"] is not None:
            states[row["destination"]] = row["state"] or None
    return [Stored(event=event, n=n, deliveries=deliveries[event]) for event, n in numbers.items()]


def final(events: Iterable[Stored]) -> dict[tuple[str, str], str]:
    return {
        (event.event, destination): state
        for event in events
        for destination, state in event.deliveries.items()
        if state in {"delivered", "discarded", "dead"}
    }


async def waiting(dsn: str) -> dict[str, int]:
    """How many deliveries are outstanding, by destination."""
    connection = await asyncpg.connect(dsn, timeout=2)
    try:
        rows = await connection.fetch(
            """
            SELECT d.name, count(*) AS n
              FROM sluicegate.pending AS p
              JOIN sluicegate.lanes AS l USING (lane)
              JOIN sluicegate.destinations AS d ON d.id = l.destination
             GROUP BY d.name
            """
        )
    finally:
        await connection.close(timeout=2)
    return {row["name"]: row["n"] for row in rows}
