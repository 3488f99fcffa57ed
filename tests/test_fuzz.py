"""Requests that were tampered with, against the program itself.  `make fuzz` sends 100,000 (REQUESTS=, SEED=)."""

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import pytest

from tests.mutations import METER, SOURCES, Hostile
from tests.program import CANARY, Partner, Program, configuration, ended_with, order, partner
from tests.wire import connected, post

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "1500"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
CONNECTIONS = 300
PATIENCE = 1.5  # seconds for an answer: a flood of what is refused is answered up to 0.9 s late
LONGEST = 16.0  # seconds until whatever is left of a request is answered, or parted from
WATCHED = 40  # of those that were not answered, so many are waited for to their end
GROWTH = 48  # MiB


@pytest.fixture
def sink() -> Iterator[Partner]:
    with partner() as sink:
        yield sink


@dataclass
class Told:
    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    silent: int = 0
    parted: int = 0
    watched: list[asyncio.Task[float]] = field(default_factory=list)
    repeated: int = 0


@pytest.mark.timeout(1800)
async def test_whatever_is_sent_nothing_fails_hangs_grows_or_is_believed_that_nobody_signed(
    dsn: str, sink: Partner, tmp_path: Path
) -> None:
    text = configuration(partner=sink.address, database="env:DSN", sources=SOURCES)
    environ = {"DSN": dsn, "METER": METER, "LOGIN": "erp", "CRM": "partner.crm-key-of-32-bytes-000000000000"}
    program = Program(tmp_path, text, environ=environ)
    with ended_with(program):
        program.start().ready()
        hostile, told, began = Hostile(SEED), Told(), time.monotonic()
        await shoot(program, hostile, told, REQUESTS // 5)
        before = resident(program)
        goes_on = asyncio.create_task(goes_on_taking(program))
        await shoot(program, hostile, told, REQUESTS - REQUESTS // 5)
        slowest = await goes_on
        ended = await asyncio.gather(*told.watched)
        grown = resident(program) - before
        took = time.monotonic() - began
        program.accept()
        rows = await believed(dsn)
        print(  # noqa: T201  what it did
            f"\n{REQUESTS} requests of seed {SEED} in {took:.0f} s: {dict(sorted(told.statuses.items()))}, "
            f"{told.parted} parted from, {told.silent} left unfinished; {len(rows)} events of {len(hostile.genuine)} that were "
            f"signed; {grown:+.1f} MiB; the slowest good post took {slowest * 1000:.0f} ms; {dict(told.kinds.most_common())}"
        )
        assert sum(told.statuses.values()) > REQUESTS // 2, "most of them were answered"
        assert {202, 400, 401, 415, 422} <= told.statuses.keys(), "and in many ways"
        assert max(told.statuses) < 500
        assert not told.repeated, "an answer repeats nothing"
        assert all(seconds < LONGEST for seconds in ended), "whatever was left unfinished has ended"
        assert slowest < 5, "meanwhile whoever means well is served"
        assert grown < GROWTH
        assert rows.total() == len(rows), "each once"
        assert {row for row in rows if row[0] not in {"shop", "trusting"}} <= hostile.genuine
        assert rows.keys() - hostile.genuine == {row for row in rows if row[0] == "trusting" or row[1] > 10**7}
        assert program.stop() == 0
        assert CANARY not in program.output
        for event in ("request.failed", "process.failed", "task.failed"):
            assert not program.log(event), event


async def shoot(program: Program, hostile: Hostile, told: Told, number: int) -> None:
    left = iter(range(number))

    async def one_after_another() -> None:
        for _ in left:
            shot = hostile.shot()
            told.kinds[shot.kind] += 1
            await fire(program, shot.raw, told)

    await asyncio.gather(*(one_after_another() for _ in range(min(CONNECTIONS, number))))


async def fire(program: Program, raw: bytes, told: Told) -> None:
    """On a connection of its own, which is all that can be told apart when a request is half of one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", program.port)
    try:
        writer.write(raw)
        try:
            async with asyncio.timeout(PATIENCE):
                heard = await reader.readuntil(b"\r\n\r\n")
        except TimeoutError:
            told.silent += 1
            if len(told.watched) < WATCHED:
                told.watched.append(asyncio.create_task(until_it_ends(reader, writer)))
                writer = None
            return
        except (ConnectionError, asyncio.IncompleteReadError):
            told.parted += 1
            return
        told.statuses[int(heard.split(b" ", 2)[1])] += 1
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(0.001):
                heard += await reader.read(4096)
        told.repeated += b"anary" in heard
    finally:
        if writer is not None:
            writer.transport.abort()


async def until_it_ends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> float:
    """Seconds until it is answered or closed."""
    began = time.monotonic()
    with suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(LONGEST + 4):
            await reader.read(1)
    writer.transport.abort()
    return time.monotonic() - began


async def goes_on_taking(program: Program, times: int = 20) -> float:
    """The slowest of some good posts, in seconds."""
    slowest = 0.0
    for _ in range(times):
        began = time.monotonic()
        async with connected(program.port) as line:
            await line.send(post(order(id=10**8 + time.monotonic_ns() % 10**8)))
            assert (await line.answer(within=10)).status == 202
        slowest = max(slowest, time.monotonic() - began)
        await asyncio.sleep(0.05)
    return slowest


def resident(program: Program) -> float:
    """MiB."""
    status = Path(f"/proc/{program.running.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def believed(dsn: str) -> Counter[tuple[str, int, str]]:
    """Source, id and status of all that is kept."""
    connection = await asyncpg.connect(dsn)
    rows = await connection.fetch("SELECT source, data FROM sluicegate.events")
    await connection.close()
    kept = [(row["source"], json.loads(row["data"])) for row in rows]
    assert all(data.keys() == {"id", "status"} and isinstance(data["id"], int) and data["id"] >= 1 for _, data in kept)
    assert {data["status"] for _, data in kept} <= {"paid", "sent", "lost"}
    return Counter((source, data["id"], data["status"]) for source, data in kept)
