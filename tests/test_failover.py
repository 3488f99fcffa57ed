"""The server changes under open sockets: it is killed, made read-only, falls silent, and another one takes over."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest

from outbox.database import Database, Unavailable
from outbox.presence import Presence
from outbox.store import Outbox, Seen
from tests.house import House, house_on
from tests.house import until as house_until
from tests.postgres import Postgres, folder_of_servers
from tests.postgres import ended_with as ended
from tests.program import Partner, Program, configuration, ended_with, order, partner, until
from tests.way import Deaf, Switch, opened

MIGRATE = "import asyncio, os; from outbox.database import migrate; asyncio.run(migrate(os.environ['DSN']))"


@pytest.fixture(scope="module")
def made() -> Iterator[Postgres]:
    """A server with the schema in place, stopped, to be copied."""
    with folder_of_servers() as folder:
        server = Postgres(folder, "made")
        with ended(server):
            server.make()
            dsn = server.dsn("sluicegate", user="sluicegate")
            subprocess.run([sys.executable, "-c", MIGRATE], env={**os.environ, "DSN": dsn}, check=True)
            server.stop()
            yield server


@dataclass
class Pair:
    """A primary and its standby, and the name that leads to the one that is meant."""

    primary: Postgres
    standby: Postgres
    name: Switch

    def fail_over(self) -> None:
        self.primary.kill()
        self.name.cut()
        self.standby.promote()
        self.name.lead_to(self.standby.port)

    @property
    def dsn(self) -> str:
        return self.primary.dsn("sluicegate", user="sluicegate", port=self.name.port)

    @property
    def environ(self) -> dict[str, str]:
        return {"DSN": self.dsn}


@pytest.fixture
def pair(made: Postgres) -> Iterator[Pair]:
    with folder_of_servers() as folder:
        primary, standby = Postgres(folder, "primary"), Postgres(folder, "standby")
        with ended(primary, standby), opened(Switch(primary.port)) as name:
            primary.twin_of(made).start()
            standby.twin_of(made, standby_of=primary).start()
            primary.execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
            primary.execute("SELECT pg_reload_conf()")
            until(
                lambda: primary.fetchval("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"), 10, "standby"
            )
            yield Pair(primary, standby, name)


@pytest.fixture
def sink() -> Iterator[Partner]:
    with partner() as sink:
        yield sink


@contextmanager
def running(folder: Path, sink: Partner, pair: Pair) -> Iterator[Program]:
    program = Program(folder, configuration(partner=sink.address, database="env:DSN"), environ=pair.environ)
    with ended_with(program):
        program.start()
        yield program


@dataclass
class Senders:
    """They post as fast as they are answered, each its own orders, and know what was acknowledged."""

    program: Program
    accepted: dict[str, bytes] = field(default_factory=dict)
    refused: int = 0
    stopping: bool = False

    def post(self) -> None:
        while not self.stopping:
            body = order()
            try:
                answer = self.program.post(body)
            except (OSError, HTTPException):
                continue
            if answer.status == 202:
                self.accepted[str(answer.json["id"])] = body
            else:
                assert answer.status == 503, answer
                self.refused += 1
                time.sleep(0.02)

    def await_more(self, number: int) -> None:
        wanted = len(self.accepted) + number
        until(lambda: len(self.accepted) >= wanted, 30, "acknowledgement")


@contextmanager
def sending(program: Program, number: int = 4) -> Iterator[Senders]:
    senders = Senders(program)
    threads = [threading.Thread(target=senders.post, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield senders
    finally:
        senders.stopping = True
        for thread in threads:
            thread.join()


def test_a_synchronous_standby_that_takes_over_has_all_that_was_acknowledged(
    tmp_path: Path, sink: Partner, pair: Pair
) -> None:
    with running(tmp_path, sink, pair) as program:
        program.ready()
        with sending(program) as senders:
            senders.await_more(100)
            pair.fail_over()
            senders.await_more(50)
        until(lambda: set(senders.accepted) <= sink.events(), 20, "delivery of all that was acknowledged")
        left = [line["reason"] for line in program.log("postgres.left")]
        assert 1 <= len(left) <= 6, left
        keys = {(received.event, received.key) for received in list(sink.received)}
        assert len({event for event, _ in keys}) == len(keys), "sent twice under another key"
        assert program.stop() == 0


def test_a_primary_that_was_made_read_only_is_left_by_every_connection_and_its_successor_found(
    tmp_path: Path, sink: Partner, pair: Pair
) -> None:
    """Nobody cuts a socket: on the old one reads, LISTEN and locks would go on for ever."""
    with running(tmp_path, sink, pair) as program:
        program.ready()
        program.accept()
        pair.primary.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        pair.primary.execute("SELECT pg_reload_conf()")
        until(
            lambda: "only reads" in str(program.get("/ready").json["missing"]), 10, "word of a server that only reads"
        )
        assert program.post(order()).status == 503
        pair.standby.promote()
        pair.name.lead_to(pair.standby.port)
        program.ready()
        event = program.accept()
        until(lambda: event in sink.events(), 10, "delivery")
        there = "SELECT nullif(count(*), 0) FROM pg_stat_activity WHERE usename = 'sluicegate'"
        until(lambda: pair.primary.fetchval(there) is None, 15, "server that nobody is connected to")
        assert program.metric('sluicegate_presence_lost_total{reason="elsewhere"}') >= 1


async def test_what_only_the_primary_has_is_not_acknowledged_to_a_sender_that_asks_again(pair: Pair) -> None:
    """The wait for a standby that is away was broken off, so the event is to be seen: it is not safe for that."""
    database = await Database.connect(pair.dsn, size=2, patience=timedelta(seconds=0.5))
    try:
        async with house_on(pair.dsn) as house:
            outbox = Outbox(intake=database, dispatch=database)
            first, again = house.arrival(), house.arrival()
            again = msgspec.structs.replace(first, event=again.event)
            pair.standby.stop()
            with pytest.raises(Unavailable):
                await outbox.add([first], house.buckets())
            pair.primary.execute("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
            await house_until(lambda: is_seen(house), 10, "event")
            with pytest.raises(Unavailable):
                await outbox.add([again], house.buckets())
            pair.standby.start()
            assert await outbox.add([again], house.buckets()) == [Seen(first.event.id, first.digest)]
    finally:
        await database.close()


async def is_seen(house: House) -> bool:
    return await house.count("events") == 1


@dataclass
class Line:
    """A process' line to the others, by a way that can go wrong."""

    database: Database
    heard: asyncio.Event
    lost: list[str]


@asynccontextmanager
async def line_by(way: Switch, dsn: str) -> AsyncIterator[Line]:
    through = f"postgresql://sluicegate@127.0.0.1:{way.port}{urlsplit(dsn).path}?sslmode=disable"
    line = Line(await Database.connect(through, size=1), asyncio.Event(), [])
    presence = Presence(
        line.database, dispatcher=7, woken=lambda _: line.heard.set(), destinations_changed=lambda: None,
        lost=line.lost.append,
    )  # fmt: skip
    await presence.open()
    line.heard.clear()
    yield line
    await presence.close()
    await line.database.close()


def socket_of(dsn: str) -> Path:
    (sockets,) = parse_qs(urlsplit(dsn).query)["host"]
    return Path(sockets) / ".s.PGSQL.5432"


async def test_a_line_that_falls_silent_does_not_hear_itself_and_is_drawn_again(dsn: str) -> None:
    """Its socket stays open, and nothing would ever come."""
    with opened(Switch(socket_of(dsn))) as way:
        async with line_by(way, dsn) as line:
            way.fall_silent()
            await house_until(lambda: line.lost, 15, "end of a line that does not hear itself")
            assert line.lost[0] == "TimeoutError"
            assert not line.heard.is_set()
            way.speak()
            await house_until(line.heard.is_set, 15, "new line")


async def test_a_line_that_answers_and_on_which_nothing_is_heard_is_drawn_again(dsn: str) -> None:
    """That every statement works says nothing of what others say."""
    with opened(Deaf(socket_of(dsn))) as way:
        async with line_by(way, dsn) as line:
            way.notifies = False
            await house_until(lambda: line.lost, 15, "end of a line that does not hear itself")
            assert line.lost[0] == "TimeoutError"
            assert await line.database.fetchval("SELECT 1") == 1
            way.notifies = True
            await house_until(line.heard.is_set, 15, "new line")


def test_a_standby_is_waited_for_until_it_is_the_primary(tmp_path: Path, sink: Partner, pair: Pair) -> None:
    pair.name.lead_to(pair.standby.port)
    with running(tmp_path, sink, pair) as program:
        until(lambda: "serve.starting" in program.output, 20, "start")
        until(lambda: program.log("postgres.away"), 20, "word")
        assert program.log("postgres.away")[0]["reason"] == "ReadOnly"
        ready = program.get("/ready")
        assert (ready.status, ready.json["missing"]) == (
            503,
            ["the database only reads: a standby answers, and the primary is waited for"],
        )
        pair.primary.stop()
        pair.standby.promote()
        program.ready()
        event = program.accept()
        until(lambda: event in sink.events(), 10, "delivery")
