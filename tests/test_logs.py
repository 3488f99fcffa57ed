"""The log: what it says, and what never gets into it."""

import asyncio
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg
import pytest
import structlog
from aiohttp import ClientSession, web

from observability.line_writer import QUEUE, LineWriter
from observability.logs import Level, Logs, configure, log_sparingly
from observability.names import LogEvent
from observability.tracing import Tracing

CANARY = "PATIENT-SMITH-1980"
ROOT = Path(__file__).parent.parent
log = structlog.get_logger()


def test_a_line_is_a_name_and_facts() -> None:
    event = uuid4()
    with logged() as lines:
        log.info(
            LogEvent.DELIVERY_SETTLED,
            event_id=event,
            destination="odoo",
            attempt=3,
            due_in=timedelta(seconds=8),
            at=datetime(2026, 7, 14, 12, tzinfo=UTC),
            peer=ip_address("10.20.0.1"),
            lanes=(1, 2),
            cause=None,
        )
    (line,) = lines
    assert line.pop("ts").endswith("Z")
    assert line == {
        "level": "info",
        "event": "delivery.settled",
        "event_id": str(event),
        "destination": "odoo",
        "attempt": 3,
        "due_in": 8.0,
        "at": "2026-07-14T12:00:00+00:00",
        "peer": "10.20.0.1",
        "lanes": [1, 2],
        "cause": None,
    }


def test_people_read_the_same_on_one_line() -> None:
    with written(form="console") as text:
        log.warning(LogEvent.DESTINATION_HELD, destination="odoo", reason="credentials: refused")
    (line,) = text().splitlines()
    assert line.split(maxsplit=1)[1] == 'warning destination.held destination=odoo reason="credentials: refused"'


def test_what_is_no_fact_is_told_by_its_type_alone() -> None:
    @dataclass
    class Payload:
        patient: str

    with written() as text:
        log.info(
            LogEvent.EVENT_UNROUTED,
            payload={"patient": CANARY},
            body=CANARY.encode(),
            decoded=Payload(CANARY),
            nested=[{"patient": CANARY}, Payload(CANARY)],
            raised=ValueError(CANARY),
        )
    assert CANARY not in text()
    line = json.loads(text())
    assert (line["payload"], line["body"], line["raised"]) == ("<dict>", "<bytes>", "<ValueError>")


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_fact_cannot_forge_a_second_line(form: str) -> None:
    with written(form=form) as text:
        log.info(
            LogEvent.REQUEST_REFUSED, source="odoo\n2026-01-01T00:00:00Z info event.unrouted\x1b[2K\x85", at="x" * 9_999
        )
    assert len(text().splitlines()) == 1
    assert len(text()) < 500
    assert "\x1b" not in text()


def test_a_sentence_is_no_name() -> None:
    sentence = f"could not read {CANARY}"
    with logged() as lines:
        log.info(sentence)
        for event in LogEvent:
            log.info(event)
    assert [line["event"] for line in lines] == ["unnamed", *LogEvent]


def test_an_exception_is_told_by_type_and_place_and_not_by_its_words() -> None:
    def inner() -> None:
        patient = CANARY
        raise KeyError(patient)

    with written() as text:
        try:
            try:
                inner()
            except KeyError as error:
                raise ExceptionGroup(CANARY, [OSError(CANARY), ValueError(CANARY)]) from error
        except ExceptionGroup:
            log.exception(LogEvent.TASK_FAILED, task="sweep")
    assert CANARY not in text()
    line = json.loads(text())
    assert line["level"] == "error"
    assert line["error"] == "ExceptionGroup"
    assert line["stack"][0].split()[1].startswith("test_an_exception_is_told")
    assert [cause.split()[0] for cause in line["because"]] == ["KeyError", "OSError", "ValueError"]
    assert line["because"][0].endswith("inner")


async def test_what_postgres_says_about_a_value_stays_out(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute("CREATE TABLE patients (name text PRIMARY KEY)")
    with written() as text:
        for _ in range(2):
            try:
                await connection.execute("INSERT INTO patients VALUES ($1)", CANARY)
            except asyncpg.UniqueViolationError:
                log.exception(LogEvent.TASK_FAILED, task="insert")
    await connection.close()
    assert CANARY not in text()
    assert json.loads(text())["error"] == "asyncpg.exceptions.UniqueViolationError"


async def test_no_header_url_token_or_message_of_a_request_reaches_the_log() -> None:
    async def fail(request: web.Request) -> web.Response:
        raise ValueError(request.match_info["token"])

    with everything_on(), written(level="debug") as text:
        app = web.Application()
        app.router.add_post("/hooks/odoo/{token}", fail)
        runner = web.AppRunner(app, access_log=logging.getLogger("aiohttp.access"))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site.port
        for request in (
            f"POST /hooks/odoo/x HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {CANARY}\x00\r\n\r\n",
            f"POST /hooks/odoo/{CANARY}\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
            f"{CANARY} / HTTP/1.1\r\nHost: a\r\n\r\n",
            f"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {CANARY}\r\n\r\n",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request.encode("latin-1"))
            assert b" 400 " in await reader.readline()
            writer.close()
            await writer.wait_closed()
        async with (
            ClientSession() as session,
            session.post(f"http://127.0.0.1:{port}/hooks/odoo/{CANARY}", headers={"Authorization": CANARY}) as answer,
        ):
            assert answer.status == 500
        await runner.cleanup()
    assert "aiohttp.server" in text()
    assert "aiohttp.access" in text()
    assert '"error":"ValueError"' in text()
    assert CANARY not in text()


async def test_what_asyncio_would_print_of_a_lost_task_stays_out() -> None:
    async def fail(patient: str) -> None:
        raise ValueError(patient)

    loop = asyncio.get_running_loop()
    with written() as text:
        loop.set_exception_handler(text.logs.loop_failed)
        task = asyncio.create_task(fail(CANARY), name="sweep")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        del task
        loop.call_soon(int, CANARY)
        await asyncio.sleep(0.01)
        loop.set_exception_handler(None)
        loop.call_soon(int, CANARY)
        await asyncio.sleep(0.01)
    assert CANARY not in text()
    lines = [json.loads(line) for line in text().splitlines()]
    assert [line["error"] for line in lines] == ["ValueError"] * 3
    assert lines[0]["task"] == "sweep"
    assert lines[2]["logger"] == "asyncio"


def test_what_a_thread_a_finalizer_or_a_warning_would_print_stays_out() -> None:
    class Finalized:
        def __del__(self) -> None:
            raise ValueError(CANARY)

    def fail() -> None:
        raise OSError(CANARY)

    with written() as text, warnings.catch_warnings():
        thread = threading.Thread(target=fail, name="sweeper")
        thread.start()
        thread.join()
        Finalized()
        warnings.simplefilter("always")
        warnings.showwarning(UserWarning(CANARY), UserWarning, str(ROOT / "gateway/app.py"), 7)
    assert CANARY not in text()
    lines = [json.loads(line) for line in text().splitlines()]
    assert [line["error"] for line in lines] == ["OSError", "ValueError", "UserWarning"]
    assert lines[2]["at"].endswith("gateway/app.py:7")


def test_a_program_that_dies_of_an_exception_says_so_without_its_words() -> None:
    ended = run(
        f"""
        from observability.logs import configure
        configure()
        raise ValueError("{CANARY}")
        """
    )
    assert ended.returncode == 1
    assert CANARY not in ended.stdout + ended.stderr
    assert json.loads(ended.stdout)["error"] == "ValueError"


def test_a_thousand_of_the_same_are_one_line_that_counts_them() -> None:
    with logged() as lines:
        for _ in range(1_000):
            log_sparingly(LogEvent.REQUEST_REFUSED, source="odoo")
        log_sparingly(LogEvent.POSTGRES_AWAY)
        time.sleep(1)
        log_sparingly(LogEvent.REQUEST_REFUSED, source="odoo")
    assert [(line["event"], line.get("left_out")) for line in lines] == [
        ("request.refused", None),
        ("postgres.away", None),
        ("request.refused", 999),
    ]


def test_a_line_names_the_trace_that_it_belongs_to() -> None:
    tracing = Tracing.start(None, 1, "0.1")
    with logged() as lines:
        with tracing.attempt(uuid4(), "odoo", 1, None, timedelta(0)) as attempt:
            log.info(LogEvent.DELIVERY_SETTLED)
        log.info(LogEvent.DELIVERY_SETTLED)
    assert UUID(lines[0]["trace_id"]) == attempt.trace_id
    assert "trace_id" not in lines[1]


def test_standard_output_that_nobody_reads_holds_nobody_up_and_its_lines_are_counted() -> None:
    reading, writing = os.pipe()
    dropped: list[int] = []
    with os.fdopen(writing, "w") as stream:
        logs = configure("json", to=stream, dropped=dropped.append)
        began = time.monotonic()
        for number in range(3 * QUEUE):
            log.info(LogEvent.EVENT_UNROUTED, number=number)
        assert time.monotonic() - began < 10
        assert sum(dropped) >= QUEUE, "they are counted while nobody reads"
        read: list[bytes] = []
        drain = threading.Thread(target=lambda: read.extend(iter(lambda: os.read(reading, 65_536), b"")))
        drain.start()
        log_when_there_is_room(read)
        logs.close()
    drain.join()
    os.close(reading)
    lines = [json.loads(line) for line in b"".join(read).splitlines()]
    accepted = [line for line in lines if line["event"] == "event.unrouted"]
    assert len(accepted) + sum(dropped) == 3 * QUEUE
    assert any(line["event"] == "log.lines_dropped" for line in lines)


def test_lines_of_several_writers_to_one_pipe_stay_whole() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        writers = [LineWriter(stream, dropped=lambda _: None) for _ in range(2)]
        for number in range(2000):
            for name, writer in zip("ab", writers, strict=True):
                writer.write(f"{name * 300} {number}")
        read: list[bytes] = []
        drain = threading.Thread(target=lambda: read.extend(iter(lambda: os.read(reading, 5000), b"")))
        drain.start()
        for writer in writers:
            writer.close(within=timedelta(seconds=5))
    drain.join()
    os.close(reading)
    lines = b"".join(read).decode().splitlines()
    assert sorted(lines) == sorted(f"{name * 300} {number}" for name in "ab" for number in range(2000))


def test_a_program_whose_output_is_stuck_still_ends() -> None:
    reading, writing = os.pipe()
    began = time.monotonic()
    program = subprocess.Popen(
        [sys.executable, "-c", FLOOD], stdout=writing, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    _, errors = program.communicate(timeout=30)
    os.close(writing)
    os.close(reading)
    assert (program.returncode, errors) == (0, "")
    assert time.monotonic() - began < 15


def test_a_reader_that_went_away_costs_lines_and_nothing_else() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    dropped: list[int] = []
    with os.fdopen(writing, "w") as stream, configure("json", to=stream, dropped=dropped.append):
        log.info(LogEvent.SERVE_READY)
    assert sum(dropped) >= 1


def test_at_the_end_every_way_out_is_given_back() -> None:
    def ways() -> tuple[object, ...]:
        root = logging.getLogger()
        return (
            sys.excepthook,
            threading.excepthook,
            sys.unraisablehook,
            warnings.showwarning,
            tuple(root.handlers),
            root.level,
            structlog.get_config(),
        )

    before = ways()
    with configure("json", to=io.StringIO()):
        assert ways() != before
    assert ways() == before


FLOOD = """
import structlog
from observability.logs import configure
from observability.names import LogEvent
with configure("json"):
    for number in range(20_000):
        structlog.get_logger().info(LogEvent.EVENT_UNROUTED, number=number)
"""


class Written:
    """What has been written; complete once the log is closed."""

    def __init__(self, logs: Logs, stream: io.StringIO) -> None:
        self.logs = logs
        self._stream = stream

    def __call__(self) -> str:
        return self._stream.getvalue()


@contextmanager
def written(*, form: str = "json", level: Level = "info") -> Iterator[Written]:
    stream = io.StringIO()
    with configure("json" if form == "json" else "console", level=level, to=stream) as logs:
        yield Written(logs, stream)


@contextmanager
def logged() -> Iterator[list[dict[str, str]]]:
    lines: list[dict[str, str]] = []
    with written() as text:
        yield lines
    lines.extend(json.loads(line) for line in text().splitlines())


@contextmanager
def everything_on() -> Iterator[None]:
    """Loggers as someone would turn them up to find a fault."""
    names = ("aiohttp.server", "aiohttp.access", "asyncio")
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)
    yield
    for name in names:
        logging.getLogger(name).setLevel(logging.NOTSET)


def log_when_there_is_room(read: list[bytes]) -> None:
    deadline = time.monotonic() + 10
    while b"log.lines_dropped" not in b"".join(read[-2:]) and time.monotonic() < deadline:
        time.sleep(0.01)


def run(program: str) -> subprocess.CompletedProcess[str]:
    code = "\n".join(line.strip() for line in program.splitlines())
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, cwd=ROOT, check=False
    )
