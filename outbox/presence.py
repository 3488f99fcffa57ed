"""A process' line to the others: it says that this one lives, and hears what is new.

One connection beside any pool.  It holds an advisory lock, which Postgres lets go the moment the process is killed,
and listens.  A line that went dead is drawn again; meanwhile the polls find what it would have said.
"""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from random import uniform

import asyncpg
import structlog

from observability.names import LogEvent
from outbox.database import Database, Unavailable, UnsuitableError
from outbox.ending import end
from outbox.store import ALIVE, DESTINATIONS, WAKE

log = structlog.get_logger()

PROBE = timedelta(seconds=2)  # a line on which nothing is heard is asked whether it still is one
DEAD = (Unavailable, UnsuitableError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)


class Presence:
    """Draws the line, and draws it again for as long as it is wanted."""

    def __init__(
        self,
        database: Database,
        *,
        dispatcher: int,
        woken: Callable[[str], None],
        destinations_changed: Callable[[], None],
    ) -> None:
        self._database = database
        self._dispatcher = dispatcher
        self._woken = woken
        self._destinations_changed = destinations_changed
        self._drawn = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Present when it returns; raises Unavailable after a while."""
        self._keeping = asyncio.create_task(self._keep())
        try:
            async with asyncio.timeout(5):
                await self._drawn.wait()
        except TimeoutError as error:
            await self.close()
            raise Unavailable("no connection to listen on") from error

    async def close(self) -> None:
        if self._keeping is not None:
            await end(self._keeping)

    async def _keep(self) -> None:
        while True:
            try:
                async with self._database.session() as connection:
                    await self._draw(connection)
                    while True:
                        await asyncio.sleep(PROBE.total_seconds())
                        await connection.execute("SELECT", timeout=PROBE.total_seconds())
            except DEAD:
                log.warning(LogEvent.PRESENCE_LOST)
                await asyncio.sleep(uniform(0.1, 0.5))  # noqa: S311  spread, not a secret

    async def _draw(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        await connection.execute("SELECT pg_advisory_lock($1, $2)", ALIVE, self._dispatcher)
        await connection.add_listener(WAKE, lambda *heard: self._woken(str(heard[3])))
        await connection.add_listener(DESTINATIONS, lambda *_: self._destinations_changed())
        self._drawn.set()
        self._woken("")  # what was said while there was no line was not heard
        self._destinations_changed()
