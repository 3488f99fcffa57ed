"""Back-up and restore, for real: a dump, and a base back-up with the log to a point in time; then the program goes on.

What was delivered after the point that was restored to is delivered again, and always under the key that it had.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.console import blocks
from tests.postgres import Postgres, folder_of_servers
from tests.postgres import ended_with as ended
from tests.program import Partner, Program, configuration, ended_with, order, partner, signed, until

PAGE = Path(__file__).parent.parent / "docs/how-to/backup-and-restore.md"
MIGRATE = "import asyncio, os; from outbox.database import migrate; asyncio.run(migrate(os.environ['DSN']))"


Posts = dict[str, tuple[bytes, dict[str, str]]]
"""By the event that each was accepted as."""


@pytest.fixture
def folder() -> Iterator[Path]:
    with folder_of_servers() as folder:
        yield folder


@pytest.fixture
def sink() -> Iterator[Partner]:
    with partner() as sink:
        yield sink


@contextmanager
def running(folder: Path, sink: Partner, dsn: str) -> Iterator[Program]:
    """On a database that is there; the key of digests comes from the environment, as it must for a restore."""
    folder.mkdir()
    program = Program(folder, configuration(partner=sink.address, database="env:DSN"), environ={"DSN": dsn})
    with ended_with(program):
        program.start().ready()
        yield program


def keys(sink: Partner, event: str) -> set[str]:
    return {received.key for received in list(sink.received) if received.event == event}


def settled(server: Postgres, event: str) -> bool:
    return server.fetchval(f"SELECT 1 FROM sluicegate.pending WHERE event_id = '{event}'", "sluicegate") is None


def posted(program: Program, body: bytes, headers: dict[str, str]) -> str:
    return str(program.post(body, **headers).json["id"])


def goes_on(program: Program, sink: Partner, delivered: Posts, waiting: Posts, lost: Posts, *, key: str) -> None:
    """From the point that was restored to: what it was owed, what it has, what came after."""
    until(lambda: waiting.keys() <= sink.events(), 20, "delivery of what had not been delivered at the point")
    assert {received.key for received in list(sink.received)} == {key}
    for event, (body, headers) in (delivered | waiting).items():
        again = program.post(body, **headers)
        assert (again.status, again.json) == (200, {"id": event, "duplicate": True})
    assert not delivered.keys() & sink.events(), "it was delivered before the point"
    for body, headers in lost.values():
        assert program.post(body, **headers).status == 202, "nobody remembers what came after the point"
    until(lambda: len(sink.events()) == 2, 20, "delivery of it, under an id of its own")
    assert not lost.keys() & sink.events()
    assert program.stop() == 0


@pytest.fixture
def server(folder: Path) -> Iterator[Postgres]:
    """One that keeps its log beside it, as point-in-time recovery asks for."""
    server = Postgres(folder)
    archive = folder / "archive"
    archive.mkdir(mode=0o777)
    with ended(server):
        server.make()
        server.configure(archive_mode="on", archive_command=f"cp %p {archive}/%f")
        server.stop()
        server.start()
        dsn = server.dsn("sluicegate", user="sluicegate")
        subprocess.run([sys.executable, "-c", MIGRATE], env={**os.environ, "DSN": dsn}, check=True)
        yield server


def test_after_a_restore_what_was_delivered_since_is_sent_again_under_the_same_key_and_nothing_else(
    tmp_path: Path, folder: Path, sink: Partner, server: Postgres
) -> None:
    one, two, three = ((body := order(), signed(body)) for _ in range(3))
    with running(tmp_path / "before", sink, server.dsn("sluicegate", user="sluicegate")) as program:
        delivered = posted(program, *one)
        until(lambda: delivered in sink.events() and settled(server, delivered), 20, "delivery")
        copy = Postgres(folder, "copy").copy_of(server)
        sink.mood = lambda _: 503
        waiting = posted(program, *two)
        until(lambda: waiting in sink.events(), 20, "attempt")
        dump = str(folder / "dump")
        server.run("pg_dump", "-Fc", "-f", dump, "-d", server.dsn("sluicegate"))
        server.execute("SELECT pg_create_restore_point('here')")
        sink.mood = lambda _: 200
        until(lambda: settled(server, waiting), 20, "delivery after the point")
        lost = posted(program, *three)
        until(lambda: lost in sink.events() and settled(server, lost), 20, "delivery of what the back-up does not hold")
        assert program.stop() == 0
    server.execute("SELECT pg_switch_wal()")
    (first,) = keys(sink, waiting)

    def shows(folder: Path, dsn: str) -> None:
        sink.received.clear()
        with running(folder, sink, dsn) as program:
            goes_on(program, sink, {delivered: one}, {waiting: two}, {lost: three}, key=first)

    with ended(copy):
        server.execute("CREATE DATABASE again OWNER sluicegate")
        server.run("pg_restore", "--exit-on-error", "-d", server.dsn("again"), dump)
        shows(tmp_path / "from-the-dump", server.dsn("again", user="sluicegate"))
        server.stop()
        copy.configure(
            restore_command=f"cp {folder}/archive/%f %p", recovery_target_name="here", recovery_target_action="promote",
            archive_mode="off",
        )  # fmt: skip
        (copy.folder / "recovery.signal").touch()
        copy.start()
        until(lambda: copy.fetchval("SELECT pg_is_in_recovery()") == "f", 20, "end of the recovery")
        shows(tmp_path / "at-the-point", copy.dsn("sluicegate", user="sluicegate"))


def test_the_commands_of_the_page_bring_the_embedded_database_back(tmp_path: Path, sink: Partner) -> None:
    at_work, stopped = (block.text for block in blocks(PAGE.read_text()) if "sluicegate postgres" in block.text)
    program = Program(tmp_path, configuration(partner=sink.address))

    def typed(text: str) -> str:
        environ = {**program.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = ["bash", "--noprofile", "--norc", "-ec", text]
        return subprocess.run(command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout

    def is_delivered(event: str) -> bool:
        (delivery,) = json.loads(typed(f"sluicegate events show {event} --json"))["deliveries"]
        return bool(delivery["state"] == "delivered")

    one, two, three = ((body := order(), signed(body)) for _ in range(3))
    with ended_with(program):
        program.start().ready()
        delivered = posted(program, *one)
        until(lambda: is_delivered(delivered), 20, "delivery")
        sink.mood = lambda _: 503
        waiting = posted(program, *two)
        until(lambda: waiting in sink.events(), 20, "attempt")
        typed(at_work)
        sink.mood = lambda _: 200
        lost = posted(program, *three)
        until(lambda: is_delivered(waiting) and is_delivered(lost), 20, "delivery after the dump")
        assert program.stop() == 0
        (key,) = keys(sink, waiting)
        sink.received.clear()
        typed(stopped)
        program.start().ready()
        goes_on(program, sink, {delivered: one}, {waiting: two}, {lost: three}, key=key)
