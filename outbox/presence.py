"""A process' line to the others: it says that this one lives, and hears what is new.

One connection beside any pool.  It holds an advisory lock, which Postgres lets go the moment the process is killed,
and listens.  A line that is cut is drawn again at once, before the others believe that its process is gone.  Every two
seconds it says something to itself: a line on which that is not heard is dead, whatever its socket says, and is drawn
again, too; meanwhile the polls find what it would have said.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import count
from random import uniform

import asyncpg

from observability.logs import log_sparingly
from observability.names import LogEvent
from outbox.database import Database, Unavailable, UnsuitableError
from outbox.ending import end
from outbox.primary import Session
from outbox.store import ALIVE, DESTINATIONS, WAKE

PROBE = timedelta(seconds=2)  # between what a line says to itself, and how long it may take to hear it
DEAD = (Unavailable, UnsuitableError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)


class Presence:
    """Draws the line, and draws it again for as long as it is wanted; `lost` is told why one was given up."""

    def __init__(
        self,
        database: Database,
        *,
        dispatcher: int,
        woken: Callable[[str], None],
        destinations_changed: Callable[[], None],
        lost: Callable[[str], None],
    ) -> None:
        self._database = database
        self._dispatcher = dispatcher
        self._woken = woken
        self._destinations_changed = destinations_changed
        self._tell_lost = lost
        self._drawn = asyncio.Event()
        self._elsewhere = asyncio.Event()
        self._said = count()
        self._heard: asyncio.Queue[str] = asyncio.Queue()
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

    def redraw(self) -> None:
        """The line leads to another server than the one that is written to."""
        self._elsewhere.set()

    async def close(self) -> None:
        if self._keeping is not None:
            await end(self._keeping)

    async def _keep(self) -> None:
        while True:
            try:
                async with self._database.session() as connection:
                    await self._draw(connection)
                    while not await self._is_elsewhere():
                        await self._say_something(connection)
                    reason = "cut" if connection.is_closed() else "elsewhere"
            except DEAD as error:
                reason = type(error.__cause__ or error).__name__
            self._tell_lost(reason)
            log_sparingly(LogEvent.PRESENCE_LOST, reason=reason)
            await asyncio.sleep(uniform(0.05, 0.25))  # noqa: S311  spread, not a secret

    async def _draw(self, connection: Session) -> None:
        await connection.execute("SELECT pg_advisory_lock($1, $2)", ALIVE, self._dispatcher)
        await connection.add_listener(WAKE, lambda *heard: self._woken(str(heard[3])))
        await connection.add_listener(DESTINATIONS, lambda *_: self._destinations_changed())
        await connection.add_listener(self._ear, lambda *heard: self._heard.put_nowait(str(heard[3])))
        self._elsewhere.clear()
        connection.add_termination_listener(lambda _: self._elsewhere.set())
        self._drawn.set()
        self._woken("")  # what was said while there was no line was not heard
        self._destinations_changed()

    async def _is_elsewhere(self) -> bool:
        """After a while without a word, or at once."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PROBE.total_seconds()):
                await self._elsewhere.wait()
        return self._elsewhere.is_set()

    async def _say_something(self, connection: Session) -> None:
        """Raises TimeoutError where it is not heard in time: nothing else would be."""
        word = str(next(self._said))
        async with asyncio.timeout(PROBE.total_seconds()):
            await connection.execute("SELECT pg_notify($1, $2)", self._ear, word)
            while await self._heard.get() != word:
                pass

    @property
    def _ear(self) -> str:
        """A channel that nobody else listens to."""
        return f"sluicegate_{self._dispatcher}"
