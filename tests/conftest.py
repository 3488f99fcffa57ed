"""What every test may ask for: a Postgres of its own session, and in it a fresh database with the schema in place."""

import os
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import asyncpg
import pytest
import pytest_asyncio
from hypothesis import settings

from outbox.database import Database, migrate
from outbox.embedded import Embedded
from outbox.partitions import Partitions
from tests import octokit, pgbouncer

settings.register_profile("deep", max_examples=500, stateful_step_count=60, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

TEMPLATE = "migrated"
LONGEST = (
    "serve", "takeover", "frozen", "demo", "outbox_attacks", "embedded", "door", "cli", "failover", "soak",
    "outbox_model", "backup", "chaos", "docs", "rolling", "database", "odoo", "package", "costs", "tracing", "versions",
    "fleet", "bench", "pooler",
)  # fmt: skip
MEMORY = Path("/dev/shm")
ROOM = 4 * 1024**3
numbers = count(1)


def in_database(server: str, name: str, *, user: str = "sluicegate") -> str:
    """The address of another database on the same server."""
    return urlsplit(server)._replace(netloc=f"{user}@", path=f"/{name}").geturl()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def server() -> AsyncIterator[str]:
    """One embedded Postgres for all tests; its databases are what is fresh.

    No test cuts the power, so it lies in memory where there is room: each test makes a database, and many commit often.
    """
    with TemporaryDirectory(prefix="sluicegate-tests-", dir=MEMORY if has_room(MEMORY) else None) as folder:
        embedded = await Embedded.start(Path(folder))
        await as_superuser(embedded.dsn, f"CREATE DATABASE {TEMPLATE} OWNER sluicegate")
        await migrate(in_database(embedded.dsn, TEMPLATE))
        await make_partitions(in_database(embedded.dsn, TEMPLATE))
        yield embedded.dsn
        await embedded.stop()


async def make_partitions(dsn: str) -> None:
    """Once, and not in each test: those of these days, as a program that starts makes them."""
    database = await Database.connect(dsn, size=1)
    await Partitions(database, dedup=timedelta(days=7)).ensure(datetime.now(UTC))
    await database.close()


def has_room(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > ROOM


@pytest_asyncio.fixture
async def empty_dsn(server: str) -> AsyncIterator[str]:
    """A database in which nothing was done yet."""
    async for dsn in made_of("template1", server):
        yield dsn


@pytest_asyncio.fixture
async def dsn(server: str) -> AsyncIterator[str]:
    """A database with the schema in place and the partitions of these days, and nothing in them."""
    async for dsn in made_of(TEMPLATE, server):
        yield dsn


@pytest_asyncio.fixture
async def database(dsn: str) -> AsyncIterator[Database]:
    database = await Database.connect(dsn, size=4)
    yield database
    await database.close()


async def made_of(template: str, server: str) -> AsyncIterator[str]:
    name = f"test_{next(numbers)}"
    await as_superuser(server, f"CREATE DATABASE {name} TEMPLATE {template} OWNER sluicegate")
    yield in_database(server, name)
    await as_superuser(server, f"DROP DATABASE {name} WITH (FORCE)")


async def as_superuser(server: str, statement: str) -> None:
    connection = await asyncpg.connect(in_database(server, "postgres", user="postgres"))
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that at the end nobody waits for one of them."""
    longest = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: longest.get(item.path.name, len(longest)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What could not be tried here must not look as if it had been."""
    if pgbouncer.LACKING.exists():
        why = " ".join(pgbouncer.LACKING.read_text().split())
        terminalreporter.section("NOT TRIED: the real pgbouncer", red=True, bold=True)
        terminalreporter.line(f"Poolers were stood in for by one of our own. {why}")
    if octokit.LACKING.exists():
        why = " ".join(octokit.LACKING.read_text().split())
        terminalreporter.section("NOT TRIED: the library of GitHub", red=True, bold=True)
        terminalreporter.line(f"It comes from npm's registry, and could not be had. {why}")
