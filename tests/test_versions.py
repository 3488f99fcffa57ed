"""An older and a newer release side by side on one database, and the schema changing under both of them."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import pytest

from chaos.release import NEWER, Release
from outbox.database import shipped_migrations, this_program
from tests.program import Partner, Program, configuration, ended_with, partner, until
from tests.test_rolling import sending, sent_twice

NEXT = len(shipped_migrations()) + 1

EXPAND = {  # what the older release does not know, and need not know
    "column": "ALTER TABLE events ADD COLUMN remark text;\nALTER TABLE pending ADD COLUMN remark text DEFAULT 'none';\n",
    "index": (
        "-- outside of a transaction\n"
        "CREATE INDEX CONCURRENTLY IF NOT EXISTS pending_by_remark ON pending (remark, event_id);\n"
    ),
}


def migrate(release: Release, program: Program) -> str:
    status, said = asyncio.run(release.migrate(program.path, program.environ))
    assert status == 0, said
    return said


@pytest.fixture(scope="module")
def sink() -> Iterator[Partner]:
    with partner() as sink:
        yield sink


@contextmanager
def waits_for_tables(dsn: str) -> Iterator[list[float]]:
    """How long anybody waited for a table, in seconds, by looking often."""
    over, seen = threading.Event(), [0.0]

    async def look() -> None:
        connection = await asyncpg.connect(dsn)
        while not over.is_set():
            sql = """
                SELECT extract(epoch FROM max(clock_timestamp() - waitstart))::float8
                  FROM pg_locks WHERE NOT granted AND locktype = 'relation'
            """
            seen.append(await connection.fetchval(sql) or 0.0)
            await asyncio.sleep(0.02)
        await connection.close()

    looking = threading.Thread(target=lambda: asyncio.run(look()))
    looking.start()
    try:
        yield seen
    finally:
        over.set()
        looking.join()


@contextmanager
def read_for_long(dsn: str, seconds: float) -> Iterator[None]:
    """As a dump does: its locks stand in the way of every change of a table."""

    async def read() -> None:
        connection = await asyncpg.connect(dsn)
        async with connection.transaction():
            await connection.fetch("SELECT count(*) FROM sluicegate.pending, sluicegate.events")
            began.set()
            await asyncio.sleep(seconds)
        await connection.close()

    began = threading.Event()
    reading = threading.Thread(target=lambda: asyncio.run(read()))
    reading.start()
    try:
        assert began.wait(30)
        yield
    finally:
        reading.join()


def test_two_releases_work_side_by_side_while_the_schema_grows_and_the_older_one_is_refused_when_it_must_be(
    tmp_path: Path, dsn: str, sink: Partner
) -> None:
    release = Release(tmp_path / "newer")
    for name, sql in EXPAND.items():
        release.bring(name, sql, runs_from=this_program())
    text = configuration(partner=sink.address, database="env:DATABASE")
    old = Program(tmp_path, text, name="old", environ={"DATABASE": dsn})
    new = Program(tmp_path, text, name="new", environ={"DATABASE": dsn, **release.environ})
    with ended_with(old, new):
        new.start()
        assert new.ended(60) != 0
        assert f"{NEXT:04}_column, {NEXT + 1:04}_index is still to be applied; run `sluicegate migrate`" in new.output

        old.start().ready(60)
        with sending(old) as to_the_old:
            until(lambda: len(to_the_old.events) > 20, 30, "some load")
            with waits_for_tables(dsn) as waits, read_for_long(dsn, 3):
                told = migrate(release, new)
            assert "column" in told
            assert "index" in told
            assert 0 < max(waits) < 2
            new.start().ready(60)
            until(lambda: new.get("/ready").json["version"] == NEWER, 5, "the newer release")
            with sending(new) as to_the_new:
                until(lambda: len(to_the_new.events) > 20, 30, "load on both")
            so_far = len(to_the_old.events)
            until(lambda: len(to_the_old.events) > so_far + 20, 30, "some load")
        with sending(new) as to_the_new_alone:
            assert old.stop(within=60) == 0
            until(lambda: len(to_the_new_alone.events) > 20, 30, "load on the newer one alone")
            old.start().ready(60)
        with sending(old) as after_the_way_back:  # rolled back
            assert new.stop(within=60) == 0
            until(lambda: len(after_the_way_back.events) > 20, 30, "load on the older one alone")
        everybody = (to_the_old, to_the_new, to_the_new_alone, after_the_way_back)
        assert [senders.troubles for senders in everybody] == [[]] * 4
        assert {status for senders in everybody for status in senders.answers} == {202}
        accepted = {event for senders in everybody for event in senders.events}
        until(lambda: accepted <= sink.events(), 60, "deliveries")
        assert sent_twice(sink) == []

        release.bring("contract", "ALTER TABLE pending DROP COLUMN remark;\n", runs_from=NEWER)
        assert "contract" in migrate(release, new)
        assert old.stop(within=60) == 0
        old.begin_a_new_page()
        old.start()
        assert old.ended(60) != 0
        assert f"the schema no longer runs sluicegate {this_program()}" in old.output
        assert f"Install {NEWER} or later" in old.output
        new.start().ready(60)
        event = new.accept()
        until(lambda: event in sink.events(), 30, "delivery")
