"""Who works on this database, and by which configuration: what every process says of itself, and sees of the others."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import uuid4

from outbox.database import Database

PATIENCE = timedelta(minutes=5)  # with a deploy, during which configurations differ
SILENT = timedelta(seconds=45)  # a process that said nothing for so long is not there
AGAIN = timedelta(minutes=2)  # one that comes within so long of the last with its configuration goes on where that was


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One of the fleet."""

    name: str  # host:pid
    role: str
    digest: str  # of its configuration
    since: datetime  # it, or another that it followed, works by this one
    seen_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How many processes work by each configuration, and for how long they have not all worked by the same."""

    processes: Mapping[str, int]
    differed_for: timedelta

    @property
    def broken(self) -> bool:
        """For longer than a deploy may take."""
        return self.differed_for >= PATIENCE


class Fleet:
    """Every time is the database's."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._id = uuid4()

    async def report(self, *, name: str, role: str, digest: str) -> Agreement:
        """Say that this process is there, forget those that are not, and look at the others.

        A configuration is as old as its first process, as long as there is always another soon: one that is restarted
        again and again differs for as long as one that is not.
        """
        await self._database.execute(
            """
            WITH gone AS (
                DELETE FROM processes WHERE seen_at < clock_timestamp() - $5::interval AND id <> $1
            ), there AS (
                SELECT min(since) AS since
                  FROM processes
                 WHERE digest = $4
                   AND seen_at >= clock_timestamp() - $5::interval
            )
            INSERT INTO processes AS p (id, name, role, digest, since)
            SELECT $1, $2, $3, $4, coalesce(since, clock_timestamp())
              FROM there
                ON CONFLICT (id) DO UPDATE
               SET seen_at = clock_timestamp(),
                   digest = excluded.digest,
                   since = CASE WHEN p.digest = excluded.digest THEN p.since ELSE excluded.since END
            """,
            self._id,
            name,
            role,
            digest,
            SILENT + AGAIN,
        )
        return await self.agreement()

    async def agreement(self) -> Agreement:
        """They differ since the second of the configurations came."""
        processes = await self.processes()
        first: dict[str, datetime] = {}
        for process in processes:
            first[process.digest] = min(first.get(process.digest, process.since), process.since)
        others = sorted(first.values())[1:]
        now: datetime = await self._database.fetchval("SELECT clock_timestamp()")
        return Agreement(
            processes=Counter(process.digest for process in processes),
            differed_for=now - others[0] if others else timedelta(0),
        )

    async def processes(self) -> list[Process]:
        """Those that are there, by name."""
        rows = await self._database.fetch(
            """
            SELECT name, role, digest, since, seen_at
              FROM processes
             WHERE seen_at >= clock_timestamp() - $1::interval
             ORDER BY name, since
            """,
            SILENT,
        )
        return [Process(**dict(row)) for row in rows]

    async def leave(self) -> None:
        """It is not there any more, and is remembered for a while."""
        await self._database.execute(
            "UPDATE processes SET seen_at = clock_timestamp() - $2::interval WHERE id = $1", self._id, SILENT
        )
