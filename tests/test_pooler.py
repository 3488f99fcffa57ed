"""A pooler between the program and its Postgres: one that lends connections is refused with the mend, a fair one is not."""

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from outbox.database import SESSION, Database, UnsuitableError, migrations_pending
from outbox.pooler import refuse_pooler
from tests import pgbouncer
from tests.house import Partner, house_on
from tests.program import COMMAND, Program, configuration, ended_with, partner
from tests.way import Lending, Pooler, opened


def directory(dsn: str) -> str:
    (sockets,) = parse_qs(urlsplit(dsn).query)["host"]
    return sockets


def at(port: int, dsn: str) -> str:
    return f"postgresql://sluicegate@127.0.0.1:{port}{urlsplit(dsn).path}?sslmode=disable"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def through(stack: ExitStack, lending: Lending, dsn: str) -> str:
    way = stack.enter_context(opened(Pooler(Path(directory(dsn)) / ".s.PGSQL.5432", lending)))
    return at(way.port, dsn)


async def test_a_pooler_that_lends_connections_for_a_transaction_is_refused_with_the_mend(
    dsn: str, stack: ExitStack
) -> None:
    for _ in range(3):
        with pytest.raises(UnsuitableError, match=r"pooler.*(lends connections|loses prepared).*pool_mode = session"):
            await refuse_pooler(through(stack, "transaction", dsn))


async def test_a_pooler_that_loses_prepared_statements_only_is_refused_too(dsn: str, stack: ExitStack) -> None:
    with pytest.raises(UnsuitableError, match="loses prepared statements"):
        await refuse_pooler(through(stack, "forgetful", dsn))


async def test_through_a_pool_in_session_mode_all_goes_well(dsn: str, stack: ExitStack) -> None:
    """It takes no settings with the first packet: they hold all the same."""
    way = through(stack, "session", dsn)
    await refuse_pooler(way)
    await all_goes_well(way)


async def test_a_busy_postgres_is_not_taken_for_a_pooler(dsn: str) -> None:
    database = await Database.connect(dsn, size=6)
    busy = [asyncio.create_task(keep_busy(database)) for _ in range(6)]
    await asyncio.gather(*(refuse_pooler(dsn) for _ in range(8)))
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, return_exceptions=True)
    await database.close()


def test_the_program_does_not_begin_behind_a_pooler_that_lends_connections(
    dsn: str, tmp_path: Path, stack: ExitStack
) -> None:
    way = through(stack, "transaction", dsn)
    program = Program(tmp_path, configuration(partner="http://127.0.0.1:9", database="env:DSN"), environ={"DSN": way})
    with ended_with(program):
        assert program.start().ended() != 0
        assert "pool_mode = session" in program.output


async def test_check_fails_behind_a_pooler_that_lends_connections_and_says_the_mend(
    dsn: str, tmp_path: Path, stack: ExitStack
) -> None:
    """All else is as it should be: in session mode the same is good."""
    status, said = await typed("check", through(stack, "transaction", dsn), tmp_path)
    assert (status, said.count("FAILS")) == (1, 1), said
    [told] = [line for line in said.splitlines() if line.startswith("FAILS  database: ")]
    assert "pool_mode = session" in told
    status, said = await typed("check", through(stack, "session", dsn), tmp_path)
    assert (status, "ok     database: reachable, migrated" in said) == (0, True), said


async def test_migrate_applies_nothing_through_a_pooler_that_lends_connections_and_says_the_mend(
    empty_dsn: str, tmp_path: Path, stack: ExitStack
) -> None:
    pending = await migrations_pending(empty_dsn)
    status, said = await typed("migrate", through(stack, "transaction", empty_dsn), tmp_path)
    assert (status, "pool_mode = session" in said) == (1, True), said
    assert await migrations_pending(empty_dsn) == pending != []
    status, said = await typed("migrate", through(stack, "session", empty_dsn), tmp_path)
    assert (status, await migrations_pending(empty_dsn)) == (0, []), said


@pytest.mark.parametrize("mode", ["transaction", "statement", "session", "swallowing"])
async def test_of_the_real_pgbouncer_only_session_mode_is_taken(dsn: str, stack: ExitStack, mode: str) -> None:
    """Where it cannot be had, the end of the run says so."""
    if (program := pgbouncer.found()) is None:
        return
    settings = {"pool_mode": "session" if mode == "swallowing" else mode}
    if mode == "swallowing":
        settings["ignore_startup_parameters"] = ", ".join([*SESSION, "statement_timeout"])
    way = at(stack.enter_context(pgbouncer.serving(program, directory(dsn), **settings)), dsn)
    match mode:
        case "session":
            await refuse_pooler(way)
            await all_goes_well(way)
        case "swallowing":
            with pytest.raises(UnsuitableError, match="ignore_startup_parameters"):
                await refuse_pooler(way)
        case _:
            with pytest.raises(UnsuitableError, match="for one transaction or statement at a time"):
                await refuse_pooler(way)


async def typed(command: str, way: str, folder: Path) -> tuple[int, str]:
    """Its exit status, and what it says, where the one destination answers."""
    with partner() as ledger:
        program = Program(folder, configuration(partner=ledger.address, database="env:DSN"), environ={"DSN": way})
        ended = await asyncio.to_thread(
            subprocess.run,
            [*COMMAND, command, "--config", str(program.path)],
            env=program.environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    return ended.returncode, ended.stdout + ended.stderr


async def all_goes_well(way: str) -> None:
    async with house_on(way) as house:
        for name in ("search_path", "lock_timeout", "synchronous_commit"):
            assert await house.intake.fetchval("SELECT current_setting($1)", name) == SESSION[name]
        assert await house.intake.fetchval("SHOW enable_seqscan") == "off"
        await house.destination("supplier")
        partner = Partner()
        async with house.dispatching(house.target("supplier", partner)):
            await house.accept("supplier")
            await house.drained()
        assert len(partner.asked) == 1


async def keep_busy(database: Database) -> None:
    while True:
        async with database.transaction() as connection:
            await connection.fetchval("SELECT count(*) FROM generate_series(1, 1000)")
