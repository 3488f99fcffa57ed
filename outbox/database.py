"""Postgres, with manners: a pool whose calls end in time, and the schema that this program works on."""

import asyncio
import hashlib
import importlib.metadata
import importlib.resources
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import asyncpg
import structlog
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from observability.failpoints import failpoint
from observability.names import LogEvent
from outbox.ending import end
from outbox.primary import Primary

SCHEMA = "sluicegate"
OLDEST_POSTGRES = 14
PATIENCE = timedelta(seconds=10)  # for a statement
LONGEST_WAIT = timedelta(seconds=5)  # for a connection
LAST_WAIT = timedelta(seconds=1)  # at the end, for calls under way and for servers to hang up
LOOKED_AT = 1000  # after so many calls the pool sees a connection

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.pool.PoolConnectionProxy[asyncpg.Record]
    Session: TypeAlias = asyncpg.Connection[asyncpg.Record]
    Borrowed: TypeAlias = tuple[asyncpg.Pool[asyncpg.Record], Connection]  # and the pool that it goes back to
else:  # where it runs, asyncpg's classes take no parameter
    Connection, Session = asyncpg.pool.PoolConnectionProxy, asyncpg.Connection

log = structlog.get_logger()


class Unavailable(Exception):  # noqa: N818 — a state of Postgres, not a mistake
    """Postgres cannot be reached, or did not answer in time, or had no connection free: asking later may help.

    The message names the kind of trouble and repeats no value.
    """


class ReadOnly(Unavailable):
    """A Postgres is there, and it only reads: a standby, or a primary that was told to.  The primary is waited for."""


class UnsuitableError(Exception):
    """This Postgres, or the schema in it, cannot be used as it is; the message says what to do."""


class Database:
    """A pool of connections that all behave alike, however the server is configured.

    Every call ends in time.  asyncpg waits without a limit for a query to be cancelled, so a connection on which
    a call was late or was cancelled is cut and never given back.
    """

    def __init__(
        self,
        pool: "asyncpg.Pool[asyncpg.Record]",
        address: "Address",
        *,
        size: int,
        waited: Callable[[timedelta], None] | None,
    ) -> None:
        self._pool = pool
        self._kept: list[Connection] = []  # free ones: the way through the pool costs as much as two short statements
        self._wanted = 0  # callers that wait for the pool
        self._calls = 0
        self._closing = False
        self._address = address
        self._size = size
        self._left = address.primary.left
        self._waited = waited
        self._retiring: set[asyncio.Task[None]] = set()

    @classmethod
    async def connect(
        cls,
        dsn: str,
        *,
        size: int = 8,
        application: str = "sluicegate",
        pinned: bool = False,
        patience: timedelta = PATIENCE,
        wait: timedelta = LONGEST_WAIT,
        waited: Callable[[timedelta], None] | None = None,
        primary: Primary | None = None,
    ) -> Self:
        """Open `size` connections; `pinned` ones keep to the plans that suit a queue.

        `patience` is how long a statement may take, unless a call says less; `wait`, how long a caller waits for a
        connection.  `waited` is told how long each one did.  Pools that share a `primary` leave it together.
        """
        address = Address(
            dsn=dsn,
            application=application,
            pinned=pinned,
            patience=patience,
            wait=wait,
            primary=primary or Primary(),
        )
        with address.connecting():
            pool = await address.pool(size, opened=size)
        return cls(pool, address, size=size, waited=waited)

    async def fetch(self, sql: str, *arguments: object, timeout: timedelta | None = None) -> list[asyncpg.Record]:
        async with self.connection() as connection:
            return await connection.fetch(sql, *arguments, timeout=seconds(timeout))

    async def fetchrow(self, sql: str, *arguments: object, timeout: timedelta | None = None) -> asyncpg.Record | None:
        async with self.connection() as connection:
            return await connection.fetchrow(sql, *arguments, timeout=seconds(timeout))

    async def fetchval(self, sql: str, *arguments: object, timeout: timedelta | None = None) -> Any:
        async with self.connection() as connection:
            return await connection.fetchval(sql, *arguments, timeout=seconds(timeout))

    async def execute(self, sql: str, *arguments: object, timeout: timedelta | None = None) -> str:
        async with self.connection() as connection:
            return await connection.execute(sql, *arguments, timeout=seconds(timeout))

    def connection(self) -> "Call":
        """A connection for a few calls.  It goes back as it is: what is set in a session, or listened to, stays so."""
        return Call(self._acquire, self._return)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Commits at the end, rolls back if the block raises.

        Not asyncpg's own block, which would wait for a ROLLBACK on a connection that has stopped answering.
        """
        async with self.connection() as connection:
            transaction = connection.transaction()
            await transaction.start()
            try:
                yield connection
            except BaseException as error:
                if not is_unsure(error) and not is_gone(connection):
                    await transaction.rollback()
                raise
            await transaction.commit()

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """A connection beside the pool, for what lasts as long as its session: LISTEN, advisory locks."""
        async with self._address.session() as session:
            yield session

    @property
    def left(self) -> int:
        """How often the primary was left: at another count it may be another server, with another clock."""
        return self._address.primary.left

    async def close(self) -> None:
        """Wait a little for the calls under way, and cut what is left."""
        self._closing = True
        await close_pool(self._pool, LAST_WAIT, self._kept)
        await end(*self._retiring)

    async def _acquire(self) -> "Borrowed":
        """A free connection; one that was lost is opened again, with a few quick tries while Postgres restarts."""
        if self._kept and self._left == self._address.primary.left and not is_gone(self._kept[-1]):
            if self._waited:
                self._waited(timedelta(0))
            return self._pool, self._kept.pop()
        began = time.monotonic()
        with self._address.connecting():
            try:
                pool, connection = await self._take()
            except REPAIRABLE:
                async for attempt in quick_tries():
                    with attempt:
                        pool, connection = await self._take()
        if self._waited:
            self._waited(timedelta(seconds=time.monotonic() - began))
        return pool, connection

    async def _take(self) -> "Borrowed":
        """One that was opened since the primary was left last."""
        if self._left != self._address.primary.left:
            await self._retire()
        pool = self._pool
        while self._kept:
            connection = self._kept.pop()
            if not is_gone(connection):
                return pool, connection
            await give_back(pool, connection)
        self._wanted += 1
        try:
            return pool, await pool.acquire(timeout=self._address.wait.total_seconds())
        finally:
            self._wanted -= 1

    async def _return(
        self, pool: "asyncpg.Pool[asyncpg.Record]", connection: Connection, error: BaseException | None
    ) -> None:
        """`error`: what the calls ended by; raises Unavailable from it where that is what it means."""
        try:
            if error is not None:
                if is_unsure(error):
                    cut(connection)
                if isinstance(error, BROKEN):
                    self._address.primary.leave(type(error).__name__)
                if reason := why_unavailable(error, connection):
                    raise Unavailable(reason) from error
        finally:
            if error is not None or not self._keep(pool, connection):
                await give_back(pool, connection)

    def _keep(self, pool: "asyncpg.Pool[asyncpg.Record]", connection: Connection) -> bool:
        """For whoever comes next; now and then the pool gets it, which replaces one that has served long."""
        self._calls += 1
        if self._wanted or self._closing or pool is not self._pool or self._calls % LOOKED_AT == 0:
            return False
        if is_gone(connection) or connection.is_in_transaction():
            return False
        self._kept.append(connection)
        return True

    async def _retire(self) -> None:
        """Begin with a pool that is empty.  Who has a connection of the old one may end what it does, all others go."""
        self._left = self._address.primary.left
        retired, self._pool = self._pool, await self._address.pool(self._size)
        kept, self._kept = self._kept, []
        task = asyncio.create_task(close_pool(retired, self._address.patience, kept))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)


class Call:
    """A connection while it is used.  (No generator, as each statement makes one.)"""

    __slots__ = ("_acquire", "_borrowed", "_return")

    def __init__(self, acquire: "Callable[[], Awaitable[Borrowed]]", return_: "Callable[..., Awaitable[None]]") -> None:
        self._acquire = acquire
        self._return = return_

    async def __aenter__(self) -> Connection:
        self._borrowed = await self._acquire()
        return self._borrowed[1]

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        await self._return(*self._borrowed, error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """How to reach Postgres, and how a session there behaves."""

    dsn: str
    application: str = "sluicegate"
    pinned: bool = False
    patience: timedelta = PATIENCE
    wait: timedelta = LONGEST_WAIT
    primary: Primary = field(default_factory=Primary)

    def arguments(self) -> dict[str, Any]:
        """For asyncpg.  The settings go out with the first packet, so neither a role's nor RESET's come before them."""
        settings = SESSION | {
            "application_name": self.application,
            "statement_timeout": f"{round(self.patience.total_seconds() * 1000)}ms",
        }
        return {
            "dsn": self.dsn,
            "timeout": self.wait.total_seconds(),
            "command_timeout": self.patience.total_seconds() + 1,  # the server's own limit comes first
            "max_cached_statement_lifetime": 0,
            "target_session_attrs": "read-write",  # whatever the DSN says: all that is done here writes
            "server_settings": settings | PINS if self.pinned else settings,
        }

    def pool(self, size: int, *, opened: int = 0) -> "asyncpg.Pool[asyncpg.Record]":
        """To be awaited, which opens so many of its connections."""
        return asyncpg.create_pool(
            **self.arguments(),
            init_size=opened,
            min_size=0,  # who needs a connection opens it again, with a word about what is wrong
            max_size=size,
            max_inactive_connection_lifetime=0,
            connect=self.primary.connect,
            init=refuse_unsuitable,
            reset=leave_as_it_is,
        )

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        with self.connecting():
            session = await self.primary.connect(**self.arguments())
        try:
            await refuse_unsuitable(session)
            yield session
        except BaseException as error:
            if isinstance(error, BROKEN):
                self.primary.leave(type(error).__name__)
            if reason := why_unavailable(error, session):
                raise Unavailable(reason) from error
            raise
        finally:
            session.terminate()

    @contextmanager
    def connecting(self) -> Iterator[None]:
        """While connecting, whatever is said is about the connection, so it is there or it is not."""
        try:
            yield
        except asyncpg.ClientConfigurationError as error:
            raise UnsuitableError(f"database: this is no address of a Postgres: {error}") from error
        except asyncpg.TargetServerAttributeNotMatched as error:
            raise ReadOnly("Postgres only reads here: it is a standby, or a primary that may not write") from error
        except TimeoutError as error:
            raise Unavailable(
                f"no connection to Postgres became free within {self.wait.total_seconds():g} s"
            ) from error
        except (OSError, asyncpg.InterfaceError, asyncpg.PostgresError, asyncpg.InternalClientError) as error:
            reason, *_ = str(error).splitlines() or [type(error).__name__]
            raise Unavailable(f"no connection to Postgres: {reason}") from error


SESSION = {
    "search_path": SCHEMA,
    "synchronous_commit": "on",
    "default_transaction_isolation": "read committed",
    "timezone": "UTC",
    "jit": "off",
    "lock_timeout": "5s",
    "idle_in_transaction_session_timeout": "30s",
    "tcp_keepalives_idle": "15",  # a machine that vanished must not keep its locks for hours
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}

# On a queue that was analysed while it was empty, Postgres would change its mind about how to read it.
PINS = {
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "plan_cache_mode": "force_generic_plan",
}


async def refuse_unsuitable(session: Session) -> None:
    """Judges by what the server told on connecting, so it costs nothing."""
    version, encoding = session.get_server_version(), session.get_settings().server_encoding
    if version.major < OLDEST_POSTGRES:
        raise UnsuitableError(
            f"database: this is Postgres {version.major}, and sluicegate needs {OLDEST_POSTGRES} or later. Upgrade the "
            "server, or set `database: embedded`."
        )
    if encoding != "UTF8":
        raise UnsuitableError(
            f"database: it is encoded in {encoding}, which cannot hold every text. Create one with ENCODING 'UTF8' "
            "TEMPLATE template0, and name that one."
        )


async def leave_as_it_is(session: Session) -> None:
    """In place of asyncpg's reset whenever one is given back: that is a round trip, and nothing here leaves a trace."""


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────

# After these a connection is of no use any more.
BROKEN = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.DatabaseDroppedError,
    asyncpg.IdleSessionTimeoutError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.ReadOnlySQLTransactionError,  # it was the primary once
    asyncpg.InternalClientError,  # what asyncpg says when the server cut the connection just before
)

# After these it is as good as before, and the same call may do better later.
BUSY = (
    asyncpg.QueryCanceledError,
    asyncpg.InsufficientResourcesError,
    asyncpg.LockNotAvailableError,
    asyncpg.TransactionRollbackError,
)

# What a Postgres that restarts, or hands over to another one, answers for a moment.
REPAIRABLE = (
    ConnectionError,
    FileNotFoundError,  # its socket
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.TargetServerAttributeNotMatched,  # a standby that is about to be promoted
)


def is_unsure(error: BaseException) -> bool:
    """Whether a call may still be under way on the connection, or never end on it."""
    return not isinstance(error, Exception) or isinstance(error, BROKEN)


def is_gone(connection: Connection | Session) -> bool:
    """Closed, or cut and so out of its pool: then even asking is an error of asyncpg's."""
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:
        return True


def why_unavailable(error: BaseException, connection: Connection | Session) -> str | None:
    if isinstance(error, TimeoutError):
        return "Postgres did not answer in time"
    if isinstance(error, (*BROKEN, *BUSY)) or (isinstance(error, asyncpg.InterfaceError) and is_gone(connection)):
        return f"Postgres did not do it: {type(error).__name__}"
    return None


async def give_back(pool: "asyncpg.Pool[asyncpg.Record]", connection: Connection) -> None:
    with suppress(*BROKEN, asyncpg.InterfaceError):  # one that was cut has left the pool already
        if connection.is_in_transaction():
            connection.terminate()
        await pool.release(connection, timeout=1)


async def close_pool(pool: "asyncpg.Pool[asyncpg.Record]", patience: timedelta, kept: list[Connection]) -> None:
    """With those that were kept out of it."""
    try:
        async with asyncio.timeout(patience.total_seconds()):
            while kept:
                await give_back(pool, kept.pop())
            await pool.close()
    except BaseException as error:
        pool.terminate()
        if not isinstance(error, (TimeoutError, *BROKEN, asyncpg.InterfaceError)):
            raise


def cut(connection: Connection) -> None:
    with suppress(asyncpg.InterfaceError):
        connection.terminate()


def quick_tries() -> AsyncRetrying:
    return AsyncRetrying(
        retry=retry_if_exception_type(REPAIRABLE),
        wait=wait_random_exponential(multiplier=0.02, max=0.2),
        stop=stop_after_delay(1),
        reraise=True,
    )


def seconds(timeout: timedelta | None) -> float | None:
    return None if timeout is None else timeout.total_seconds()


# ── the schema ──────────────────────────────────────────────────────────────────────────────────────


async def migrate(
    dsn: str, *, program: str | None = None, migrations: "Sequence[Migration] | None" = None
) -> list[str]:
    """Bring the schema to where this program wants it; returns what was applied, by name.

    One program at a time, the others wait for it.  Each migration is there or it is not, and can be asked for again.
    """
    shipped = migrations if migrations is not None else shipped_migrations()
    async with Address(dsn=dsn, application="sluicegate migrate", patience=timedelta(hours=1)).session() as session:
        await session.execute("SET lock_timeout = 0")
        # asked again and again: whoever waited within a statement would be waited for by an index that is being built
        while not await session.fetchval("SELECT pg_try_advisory_lock(hashtext('sluicegate.migrations'))"):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        pending = await outstanding(session, shipped, program or this_program())
        if pending:
            await prepare(session)
        for migration in pending:
            await apply(session, migration)
            log.info(LogEvent.MIGRATION_APPLIED, name=migration.name)
    return [migration.name for migration in pending]


async def migrations_pending(
    dsn: str, *, program: str | None = None, migrations: "Sequence[Migration] | None" = None
) -> list[str]:
    """What `migrate` would apply; raises UnsuitableError if this program must not use the schema at all."""
    shipped = migrations if migrations is not None else shipped_migrations()
    async with Address(dsn=dsn).session() as session:
        return [migration.name for migration in await outstanding(session, shipped, program or this_program())]


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """A numbered file of plain SQL; its first line says `-- runs_from:` the oldest program that may use the result.

    It is one transaction.  An index on a table that is in use is built beside the traffic, which cannot be done in one:
    then the second line is `-- outside of a transaction`, and what follows is one CREATE INDEX CONCURRENTLY IF NOT
    EXISTS, or one DROP INDEX CONCURRENTLY IF EXISTS, and nothing else.
    """

    number: int
    name: str
    sql: str
    runs_from: str
    index: str | None = None  # that is built or dropped outside of a transaction

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()

    @classmethod
    def of(cls, name: str, sql: str) -> Self:
        sql = sql.replace("\r\n", "\n")
        header = re.match(r"-- runs_from: (\d+\.\d+\.\d+)\n", sql)
        if not header:
            raise ValueError(f"{name} does not begin with `-- runs_from: 1.2.3`")
        body, index = sql[header.end() :], None
        if body.startswith("-- outside of a transaction\n"):
            alone = re.fullmatch(OUTSIDE, body)
            if not alone:
                raise ValueError(
                    f"{name}: outside of a transaction there is one `CREATE INDEX CONCURRENTLY IF NOT EXISTS …` or "
                    "`DROP INDEX CONCURRENTLY IF EXISTS …`; what else is to be done is a migration of its own"
                )
            index = alone["index"]
        return cls(number=int(name[:4]), name=name, sql=sql, runs_from=header[1], index=index)


OUTSIDE = (
    r"(--.*\n)+"
    r"(CREATE (UNIQUE )?INDEX CONCURRENTLY IF NOT EXISTS|DROP INDEX CONCURRENTLY IF EXISTS) (?P<index>[a-z0-9_]+)[^;]*;\s*"
)


def shipped_migrations() -> list[Migration]:
    folder = importlib.resources.files("outbox") / "migrations"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".sql")), key=lambda file: file.name)
    return [Migration.of(file.name.removesuffix(".sql"), file.read_text(encoding="utf-8")) for file in files]


def this_program() -> str:
    return importlib.metadata.version("sluicegate")


async def outstanding(session: Session, shipped: Sequence[Migration], program: str) -> list[Migration]:
    """What is still to be applied to a schema in order; a schema that is not in order is refused, with the mend."""
    if not await session.fetchval("SELECT to_regclass('sluicegate.migrations') IS NOT NULL"):
        if foreign := await session.fetchval(
            "SELECT count(*) FROM pg_class WHERE relnamespace = to_regnamespace('sluicegate')"
        ):
            raise UnsuitableError(
                f"the schema `sluicegate` holds {foreign} tables and indexes, but no record of migrations: something "
                "else made it, or it was restored in part. Restore it whole, or name a database without such a schema."
            )
        return list(shipped)
    applied = {
        row["number"]: row
        for row in await session.fetch(
            "SELECT number, name, digest, runs_from, started_at, finished_at FROM migrations"
        )
    }
    refuse_half_migrated(shipped, applied)
    refuse_too_new(applied, program)
    return [migration for migration in shipped if migration.number not in applied]


def refuse_half_migrated(shipped: Sequence[Migration], applied: Mapping[int, asyncpg.Record]) -> None:
    last = max(applied, default=0)
    for record in applied.values():
        if record["finished_at"] is None:
            raise UnsuitableError(
                f"the schema is half-migrated: {record['name']} began at {record['started_at']:%Y-%m-%d %H:%M} UTC and did "
                "not finish. Restore the backup from before it, and run `sluicegate migrate` again."
            )
    for migration in shipped:
        row = applied.get(migration.number)
        if row is None and migration.number < last:
            raise UnsuitableError(
                f"the schema is half-migrated: {migration.name} is missing, though later ones are there. Restore the "
                "backup from before them, and run `sluicegate migrate` of one release."
            )
        if row is not None and row["digest"] != migration.digest:
            raise UnsuitableError(
                f"the schema was made by another {row['name']} than this release brings: one of them was changed. "
                "Install the release that made it, or restore a backup that belongs to this one."
            )


def refuse_too_new(applied: Mapping[int, asyncpg.Record], program: str) -> None:
    needed = max((row["runs_from"] for row in applied.values()), key=release, default=program)
    if release(program) < release(needed):
        raise UnsuitableError(
            f"the schema no longer runs sluicegate {program}: a later release has migrated it. Install {needed} or "
            "later, or restore the backup from before."
        )


async def prepare(session: Session) -> None:
    if not await session.fetchval("SELECT to_regnamespace('sluicegate') IS NOT NULL"):
        await session.execute("CREATE SCHEMA sluicegate")
    await session.execute(
        """
        CREATE TABLE IF NOT EXISTS migrations (
            number      integer     PRIMARY KEY,
            name        text        NOT NULL,
            digest      text        NOT NULL,
            runs_from   text        NOT NULL,  -- the oldest program that may use the schema from here on
            started_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
            finished_at timestamptz            -- null: it was not done in one piece, and is not done
        )
        """
    )


async def apply(session: Session, migration: Migration) -> None:
    """A table that is in use is waited for in short turns, so that nobody queues up behind it."""
    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type(asyncpg.LockNotAvailableError),
        wait=wait_random_exponential(multiplier=0.2, max=5),
        stop=stop_after_delay(300),
        reraise=True,
    ):
        with attempt:
            if migration.index:
                await beside_the_traffic(session, migration, migration.index)
            else:
                await in_one_transaction(session, migration)


async def in_one_transaction(session: Session, migration: Migration) -> None:
    """It may take its tables in another order than an intake does, so it gives up before Postgres looks for deadlocks.

    That is a second after somebody began to wait, and the one who is sent away then may be the intake.
    """
    async with session.transaction():
        await session.execute("SET LOCAL lock_timeout = '300ms'")
        await session.execute(migration.sql)
        failpoint("migrations.before_commit")
        await note(session, migration)


async def beside_the_traffic(session: Session, migration: Migration, index: str) -> None:
    """Nobody queues up behind it, so it waits for as long as it takes.  One that was left half-built is built anew."""
    half_built = "SELECT NOT indisvalid FROM pg_index WHERE indexrelid = to_regclass($1)"
    if await session.fetchval(half_built, f"{SCHEMA}.{index}"):
        await session.execute(f"DROP INDEX CONCURRENTLY {index}")
    await session.execute(migration.sql)
    await note(session, migration)


async def note(session: Session, migration: Migration) -> None:
    await session.execute(
        """
        INSERT INTO migrations (number, name, digest, runs_from, started_at, finished_at)
        VALUES ($1, $2, $3, $4, now(), clock_timestamp())
        """,
        migration.number,
        migration.name,
        migration.digest,
        migration.runs_from,
    )


def release(version: str) -> tuple[int, ...]:
    """1.2.3 and 1.2.3rc1 alike as (1, 2, 3)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
