"""Calls that end, whatever Postgres and the network do, and a schema that is never used half-made."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest
import pytest_asyncio

from outbox.database import (
    Database,
    Migration,
    Unavailable,
    UnsuitableError,
    migrate,
    migrations_pending,
    shipped_migrations,
)
from outbox.primary import REST
from tests.way import Holding, Way, opened

SOON = timedelta(seconds=0.3)


class Relay:
    """A way to Postgres over TCP that can fall silent, refuse, and pretend to be older than it is."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._speaking = asyncio.Event()
        self._speaking.set()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.open = 0  # connections whose client has not hung up
        self.replacing = (b"", b"")

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        assert self._server
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._server = None

    def fall_silent(self) -> None:
        self._speaking.clear()

    def speak(self) -> None:
        self._speaking.set()

    async def close(self) -> None:
        if self._server:
            await self.refuse()
        self.speak()
        await until(lambda: self.open == 0)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self.open += 1
        inner, outer = await asyncio.open_unix_connection(str(self.socket))
        both_ways = [
            asyncio.create_task(self._pass_on(reader, outer, (b"", b""))),
            asyncio.create_task(self._pass_on(inner, writer, self.replacing)),
        ]
        await asyncio.wait(both_ways, return_when=asyncio.FIRST_COMPLETED)
        for way in both_ways:
            way.cancel()
        for end in (writer, outer):
            end.close()
        self.open -= 1
        self._writers.discard(writer)

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, replacing: tuple[bytes, bytes]
    ) -> None:
        with suppress(ConnectionError):
            while said := await reader.read(65536):
                await self._speaking.wait()
                writer.write(said.replace(*replacing) if replacing[0] else said)
                await writer.drain()


@pytest_asyncio.fixture
async def relay(dsn: str) -> AsyncIterator[Relay]:
    (sockets,) = parse_qs(urlsplit(dsn).query)["host"]
    relay = Relay(Path(sockets) / ".s.PGSQL.5432")
    await relay.listen()
    yield relay
    await relay.close()


def through(relay: Relay | Way, dsn: str) -> str:
    return f"postgresql://sluicegate@127.0.0.1:{relay.port}{urlsplit(dsn).path}?sslmode=disable"


@asynccontextmanager
async def database_at(dsn: str, **manners: Any) -> AsyncIterator[Database]:
    database = await Database.connect(dsn, **manners)
    try:
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def ending_within(seconds: float) -> AsyncIterator[None]:
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < seconds, f"it took {took:.1f} s"


# ── calls end in time ───────────────────────────────────────────────────────────────────────────────


async def test_a_call_on_a_link_that_fell_silent_ends_in_time_and_its_connection_is_cut(dsn: str, relay: Relay) -> None:
    async with database_at(through(relay, dsn), size=2) as database:
        relay.fall_silent()
        async with ending_within(2):
            with pytest.raises(Unavailable, match="did not answer in time"):
                await database.fetchval("SELECT 1", timeout=SOON)
        relay.speak()
        await until(lambda: relay.open == 1)
        assert await database.fetchval("SELECT 1") == 1


async def test_a_transaction_on_a_link_that_fell_silent_ends_in_time(dsn: str, relay: Relay) -> None:
    async def in_a_transaction(database: Database) -> None:
        async with database.transaction() as connection:
            relay.fall_silent()
            await connection.execute("SELECT 1", timeout=SOON.total_seconds())

    async with database_at(through(relay, dsn), size=1) as database:
        async with ending_within(2):
            with pytest.raises(Unavailable):
                await in_a_transaction(database)
        relay.speak()
        assert await database.fetchval("SELECT 1") == 1


async def test_a_caller_that_gives_up_is_let_go_at_once_and_its_connection_is_cut(dsn: str, relay: Relay) -> None:
    async with database_at(through(relay, dsn), size=1) as database:
        relay.fall_silent()
        async with ending_within(2):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(SOON.total_seconds()):
                    await database.fetchval("SELECT 1")
        relay.speak()
        await until(lambda: relay.open == 0)
        assert await database.fetchval("SELECT 1") == 1


async def test_a_cancelled_call_never_gives_its_connection_to_the_next_one(dsn: str) -> None:
    async with database_at(dsn, size=1) as database:
        before = await database.fetchval("SELECT pg_backend_pid()")
        call = asyncio.create_task(database.execute("SELECT pg_sleep(60)"))
        await asyncio.sleep(0.1)
        call.cancel()
        async with ending_within(2):
            with pytest.raises(asyncio.CancelledError):
                await call
            assert await database.fetchval("SELECT pg_backend_pid()") != before


async def test_closing_does_not_wait_for_a_link_that_fell_silent(dsn: str, relay: Relay) -> None:
    database = await Database.connect(through(relay, dsn), size=2)
    relay.fall_silent()
    async with ending_within(8):
        await database.close()


async def test_a_statement_that_takes_too_long_is_ended_by_the_server(dsn: str) -> None:
    async with database_at(dsn, size=1, patience=SOON) as database:
        before = await database.fetchval("SELECT pg_backend_pid()")
        with pytest.raises(Unavailable, match="QueryCanceledError"):
            await database.execute("SELECT pg_sleep(60)")
        assert await database.fetchval("SELECT pg_backend_pid()") == before


async def test_when_no_connection_is_free_the_caller_is_told_in_time(dsn: str) -> None:
    async with database_at(dsn, size=1, wait=SOON) as database:
        async with database.connection(), ending_within(2):
            with pytest.raises(Unavailable, match=r"became free within 0\.3 s"):
                await database.fetchval("SELECT 1")
        assert await database.fetchval("SELECT 1") == 1


async def test_how_long_callers_wait_for_a_connection_is_told(dsn: str) -> None:
    waits: list[timedelta] = []
    async with database_at(dsn, size=1, waited=waits.append) as database:
        sleeping = asyncio.create_task(database.execute("SELECT pg_sleep(0.2)"))
        await asyncio.sleep(0.05)
        await database.fetchval("SELECT 1")
        await sleeping
    assert waits[0] < timedelta(seconds=0.1) < waits[1]


# ── Postgres comes and goes ─────────────────────────────────────────────────────────────────────────


async def test_while_postgres_is_away_callers_are_told_and_it_is_found_again(dsn: str, relay: Relay) -> None:
    async with database_at(through(relay, dsn), size=2) as database:
        await relay.refuse()
        await asyncio.sleep(0.05)
        for _ in range(3):
            async with ending_within(3):
                with pytest.raises(Unavailable, match="no connection to Postgres"):
                    await database.fetchval("SELECT 1")
        await relay.listen()
        assert await database.fetchval("SELECT 1") == 1


async def test_a_moment_without_postgres_is_bridged(dsn: str, relay: Relay) -> None:
    async with database_at(through(relay, dsn), size=1) as database:
        await relay.refuse()
        await asyncio.sleep(0.05)
        call = asyncio.create_task(database.fetchval("SELECT 1"))
        await asyncio.sleep(0.1)
        await relay.listen()
        assert await call == 1


async def test_a_connection_that_the_server_ends_is_replaced(dsn: str, database: Database) -> None:
    sleeping = asyncio.create_task(database.execute("SELECT pg_sleep(60)"))
    await asyncio.sleep(0.1)
    async with database.session() as session:
        await session.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = user AND pid <> pg_backend_pid()"
        )
    with pytest.raises(Unavailable):
        await sleeping
    await asyncio.sleep(0.05)
    assert [await database.fetchval("SELECT $1::int", number) for number in range(8)] == list(range(8))


async def test_a_session_that_ended_behind_a_pooler_takes_its_connection_with_it(dsn: str, relay: Relay) -> None:
    with opened(Holding(relay.socket)) as pooler:
        async with database_at(through(pooler, dsn), size=1) as database:
            sleeping = asyncio.create_task(database.execute("SELECT pg_sleep(60)"))
            await asyncio.sleep(0.1)
            await end_all_sessions(dsn)
            with pytest.raises(Unavailable, match="AdminShutdownError"):
                await sleeping
            assert await database.fetchval("SELECT 1") == 1
            assert database.left == 1


async def test_the_errors_of_many_connections_tell_of_one_change(dsn: str) -> None:
    async with database_at(dsn, size=4) as database:
        for change in (1, 2):
            sleeping = [asyncio.create_task(database.execute("SELECT pg_sleep(60)")) for _ in range(4)]
            await asyncio.sleep(0.2)
            await end_all_sessions(dsn)
            ended = await asyncio.gather(*sleeping, return_exceptions=True)
            assert [type(error) for error in ended] == [Unavailable] * 4
            assert database.left == change
            await asyncio.sleep(REST)


async def end_all_sessions(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        """
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity
         WHERE usename = user AND datname = current_database() AND pid <> pg_backend_pid()
        """
    )
    await connection.close()


async def test_a_former_primary_is_left(database: Database) -> None:
    await database.execute("SET default_transaction_read_only = on")
    with pytest.raises(Unavailable, match="ReadOnly"):
        await database.execute("CREATE TABLE here (x int)")
    assert await database.fetchval("SHOW default_transaction_read_only") == "off"


async def test_a_wrong_address_is_told_without_the_password(server: str) -> None:
    (sockets,) = parse_qs(urlsplit(server).query)["host"]
    with pytest.raises(Unavailable, match='database "nowhere" does not exist') as told:
        await Database.connect(f"postgresql://sluicegate:secret-word@/nowhere?host={sockets}")
    assert "secret-word" not in str(told.value)
    with pytest.raises(UnsuitableError, match="no address of a Postgres"):
        await Database.connect("http://somewhere")


# ── connections behave alike ────────────────────────────────────────────────────────────────────────


async def test_a_servers_own_settings_do_not_change_how_a_connection_behaves(dsn: str, server: str) -> None:
    name = urlsplit(dsn).path.removeprefix("/")
    async with database_at(dsn, size=1) as database:
        for habit in ("synchronous_commit = off", "search_path = public", "timezone = 'Asia/Tokyo'", "jit = on"):
            await database.execute(f"ALTER DATABASE {name} SET {habit}")
        await database.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = serializable")
    async with database_at(dsn, size=1) as database:
        await database.execute("RESET ALL")
        for setting, value in {
            "search_path": "sluicegate",
            "synchronous_commit": "on",
            "default_transaction_isolation": "read committed",
            "timezone": "UTC",
            "jit": "off",
            "statement_timeout": "10s",
            "lock_timeout": "5s",
            "idle_in_transaction_session_timeout": "30s",
            "application_name": "sluicegate",
            "enable_seqscan": "on",
        }.items():
            assert await database.fetchval("SELECT current_setting($1)", setting) == value
    async with database_at(dsn, size=1, pinned=True) as database:
        for setting, value in {"enable_seqscan": "off", "plan_cache_mode": "force_generic_plan"}.items():
            assert await database.fetchval("SELECT current_setting($1)", setting) == value


async def test_a_data_error_stays_what_it_is_and_the_connection_stays_open(dsn: str) -> None:
    async with database_at(dsn, size=1) as database:
        before = await database.fetchval("SELECT pg_backend_pid()")
        with pytest.raises(asyncpg.DivisionByZeroError):
            await database.fetchval("SELECT 1 / 0")
        with pytest.raises(asyncpg.DataError):
            await database.fetchval("SELECT $1::int", "one")
        with pytest.raises(asyncpg.DataError):
            await database.fetchval("SELECT $1::text", "\ud800")
        assert await database.fetchval("SELECT pg_backend_pid()") == before


async def test_a_transaction_is_there_as_a_whole_or_not_at_all(database: Database) -> None:
    async with database.transaction() as connection:
        await connection.execute("CREATE TABLE numbers (n int)")
    with suppress(RuntimeError):
        async with database.transaction() as connection:
            await connection.execute("INSERT INTO numbers VALUES (1)")
            raise RuntimeError
    assert await database.fetch("SELECT n FROM numbers") == []


async def test_a_transaction_left_open_is_nobodys_next(dsn: str) -> None:
    async with database_at(dsn, size=1) as database:
        async with database.connection() as connection:
            await connection.execute("BEGIN; CREATE TABLE numbers (n int)")
        assert await database.fetchval("SELECT to_regclass('numbers')") is None


async def test_json_is_text(database: Database) -> None:
    assert await database.fetchval("""SELECT '{"a": 1}'::json""") == '{"a": 1}'


async def test_a_session_of_its_own_behaves_alike_and_ends(database: Database) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    async with database.session() as session:
        assert await session.fetchval("SHOW search_path") == "sluicegate"
        assert await session.fetchval("SELECT pg_try_advisory_lock(7)")
        await session.add_listener("channel", lambda *said: heard.put_nowait(said[-1]))
        await database.execute("NOTIFY channel, 'word'")
        assert await asyncio.wait_for(heard.get(), 5) == "word"
    await until_true(database, "SELECT pg_try_advisory_lock(7)")


async def test_a_postgres_that_is_too_old_is_refused(dsn: str, relay: Relay) -> None:
    relay.replacing = (b"server_version\x0018.6", b"server_version\x0013.6")
    with pytest.raises(UnsuitableError, match=r"this is Postgres 13, and sluicegate needs 14 or later. Upgrade"):
        await Database.connect(through(relay, dsn), size=2)
    with pytest.raises(UnsuitableError, match="this is Postgres 13"):
        await migrate(through(relay, dsn))


async def test_a_database_that_cannot_hold_every_text_is_refused(server: str, dsn: str) -> None:
    (name,) = {f"{urlsplit(dsn).path.removeprefix('/')}_ascii"}
    superuser = urlsplit(server)._replace(netloc="postgres@", path="/postgres").geturl()
    connection = await asyncpg.connect(superuser)
    await connection.execute(
        f"CREATE DATABASE {name} OWNER sluicegate ENCODING 'SQL_ASCII' LOCALE 'C' LOCALE_PROVIDER libc TEMPLATE template0"
    )
    try:
        with pytest.raises(UnsuitableError, match=r"encoded in SQL_ASCII.*ENCODING 'UTF8'"):
            await Database.connect(urlsplit(dsn)._replace(path=f"/{name}").geturl())
    finally:
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await connection.close()


# ── the schema ──────────────────────────────────────────────────────────────────────────────────────

FIRST = Migration.of("0001_first", "-- runs_from: 0.1.0\nCREATE TABLE first (n int);\nCREATE TABLE also (n int);\n")
SECOND = Migration.of("0002_second", "-- runs_from: 0.1.0\nALTER TABLE first ADD COLUMN m int;\n")
INDEX = "CREATE INDEX CONCURRENTLY IF NOT EXISTS first_n ON first (n);\n"
INDEXED = Migration.of("0002_index", "-- runs_from: 0.1.0\n-- outside of a transaction\n" + INDEX)
THIRD = Migration.of("0003_third", "-- runs_from: 0.3.0\nALTER TABLE first DROP COLUMN n;\n")


async def test_an_empty_database_is_brought_to_the_shipped_schema_once(empty_dsn: str) -> None:
    shipped = [migration.name for migration in shipped_migrations()]
    assert shipped[0] == "0001_outbox"
    assert await migrations_pending(empty_dsn) == shipped
    assert await migrate(empty_dsn) == shipped
    assert await migrations_pending(empty_dsn) == []
    assert await migrate(empty_dsn) == []


async def test_everything_lies_in_the_schema_sluicegate(database: Database) -> None:
    elsewhere = await database.fetchval(
        """
        SELECT count(*) FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
         WHERE nspname NOT IN ('sluicegate', 'information_schema') AND nspname NOT LIKE 'pg\\_%'
        """
    )
    assert elsewhere == 0
    assert await database.fetchval("SELECT to_regclass('sluicegate.pending') IS NOT NULL")


async def test_the_shipped_migrations_are_numbered_without_a_gap() -> None:
    assert [migration.number for migration in shipped_migrations()] == list(range(1, len(shipped_migrations()) + 1))


async def test_of_programs_that_migrate_at_once_one_does_it(empty_dsn: str) -> None:
    done = await asyncio.gather(*(migrate(empty_dsn, migrations=[FIRST, INDEXED]) for _ in range(4)))
    assert sorted(done) == [[], [], [], ["0001_first", "0002_index"]]


async def test_a_migration_that_fails_leaves_nothing_of_itself(empty_dsn: str) -> None:
    failing = Migration.of("0002_failing", "-- runs_from: 0.1.0\nCREATE TABLE half (n int);\nSELECT 1 / 0;\n")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate(empty_dsn, migrations=[FIRST, failing])
    assert await migrations_pending(empty_dsn, migrations=[FIRST, failing]) == ["0002_failing"]
    async with database_at(empty_dsn, size=1) as database:
        assert await database.fetchval("SELECT to_regclass('half')") is None
        assert await database.fetchval("SELECT to_regclass('first')") is not None
    assert await migrate(empty_dsn, migrations=[FIRST, SECOND]) == ["0002_second"]


async def test_a_table_in_use_is_waited_for_without_a_queue_behind(empty_dsn: str) -> None:
    await migrate(empty_dsn, migrations=[FIRST])
    async with database_at(empty_dsn, size=3) as database:
        async with database.transaction() as reader:
            await reader.execute("SELECT n FROM first")
            migrating = asyncio.create_task(migrate(empty_dsn, migrations=[FIRST, SECOND]))
            for _ in range(4):
                await asyncio.sleep(0.7)
                async with ending_within(3):
                    await database.execute("INSERT INTO first VALUES (1)")
        assert await migrating == ["0002_second"]


async def test_an_index_is_built_beside_the_traffic_and_one_that_was_left_half_built_is_built_anew(
    empty_dsn: str,
) -> None:
    await migrate(empty_dsn, migrations=[FIRST])
    async with database_at(empty_dsn, size=3) as database:
        async with database.transaction() as writer:
            await writer.execute("INSERT INTO first VALUES (1)")
            migrating = asyncio.create_task(migrate(empty_dsn, migrations=[FIRST, INDEXED]))
            await until_true(database, "SELECT to_regclass('first_n') IS NOT NULL")
            async with ending_within(3):  # what comes meanwhile does not queue up behind it
                await database.execute("INSERT INTO first VALUES (1)")
            killed = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'sluicegate migrate'"
            )
            await database.execute(killed)
            with pytest.raises(Unavailable):
                await migrating
        assert not await database.fetchval("SELECT indisvalid FROM pg_index WHERE indexrelid = 'first_n'::regclass")
        assert await migrations_pending(empty_dsn, migrations=[FIRST, INDEXED]) == ["0002_index"]
        assert await migrate(empty_dsn, migrations=[FIRST, INDEXED]) == ["0002_index"]
        assert await database.fetchval("SELECT indisvalid FROM pg_index WHERE indexrelid = 'first_n'::regclass")
        await database.execute("DELETE FROM migrations WHERE number = 2")  # as if it had been killed at the very end
        assert await migrate(empty_dsn, migrations=[FIRST, INDEXED]) == ["0002_index"]


@pytest.mark.parametrize(
    "sql", ["ALTER TABLE first ADD COLUMN m int;\n", INDEX + INDEX, "CREATE INDEX CONCURRENTLY first_n ON first (n);\n"]
)
def test_only_an_index_is_made_outside_of_a_transaction(sql: str) -> None:
    with pytest.raises(ValueError, match=r"0002_x: outside of a transaction there is one `CREATE INDEX CONCURRENTLY"):
        Migration.of("0002_x", "-- runs_from: 0.1.0\n-- outside of a transaction\n" + sql)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            "UPDATE migrations SET finished_at = NULL WHERE number = 2",
            r"half-migrated: 0002_second began at .* UTC and did not finish. Restore the backup",
        ),
        ("DELETE FROM migrations WHERE number = 1", r"half-migrated: 0001_first is missing.*Restore the backup"),
        (
            "UPDATE migrations SET digest = 'another' WHERE number = 1",
            r"made by another 0001_first than this release brings.*Install the release that made it",
        ),
        ("DROP TABLE migrations", r"holds 2 tables and indexes, but no record of migrations.*Restore it whole"),
        ("UPDATE migrations SET runs_from = '0.10.0'", r"no longer runs sluicegate 0.9.1.*Install 0.10.0 or later"),
    ],
    ids=["unfinished", "gap", "changed", "unrecorded", "too new"],
)
async def test_a_schema_that_is_not_in_order_is_refused_with_the_mend(empty_dsn: str, damage: str, told: str) -> None:
    await migrate(empty_dsn, migrations=[FIRST, SECOND])
    async with database_at(empty_dsn, size=1) as database:
        await database.execute(damage)
    for use in (migrate, migrations_pending):
        with pytest.raises(UnsuitableError, match=told):
            await use(empty_dsn, program="0.9.1", migrations=[FIRST, SECOND])


async def test_an_older_program_runs_on_a_newer_schema_as_long_as_that_says_so(empty_dsn: str) -> None:
    await migrate(empty_dsn, program="0.2.0", migrations=[FIRST, SECOND])
    assert await migrations_pending(empty_dsn, program="0.1.0", migrations=[FIRST]) == []
    await migrate(empty_dsn, program="0.3.0", migrations=[FIRST, SECOND, THIRD])
    assert await migrations_pending(empty_dsn, program="0.3.0rc1", migrations=[FIRST, SECOND]) == []
    with pytest.raises(UnsuitableError, match=r"no longer runs sluicegate 0.2.9.*Install 0.3.0 or later"):
        await migrations_pending(empty_dsn, program="0.2.9", migrations=[FIRST, SECOND])


async def until(holds: object) -> None:
    deadline = time.monotonic() + 10
    assert callable(holds)
    while not holds():
        assert time.monotonic() < deadline, "it did not come to that in 10 s"
        await asyncio.sleep(0.01)


async def until_true(database: Database, sql: str) -> None:
    deadline = time.monotonic() + 10
    while not await database.fetchval(sql):
        assert time.monotonic() < deadline, "it did not come to that in 10 s"
        await asyncio.sleep(0.01)
