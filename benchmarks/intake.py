"""Durable intake over HTTP: HMAC, policy, dedup, routes, one delivery, one transaction; beside a bare aiohttp that answers 202.

The program, the bare server and the load generator are processes of their own.  In each round both servers are posted
the same bytes, in turns, and at the end each 202 has its row.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import asyncpg

from benchmarks.load import Generator, Posted, generator
from benchmarks.rows import Figure, Ground, NotRun, Row, Unbalanced, at_least, at_most
from tests.program import Program, ended_with
from tests.serving import CONFIGURATION, ENVIRON

WARM_UP = 1_000
CORES_FOR_WORKERS = 4  # two workers, Postgres and the load


async def accepted_per_second(ground: Ground, connections: int) -> Figure:
    taken = await beside_bare(ground, connections)
    p99 = median(ours.p99 / bare.p99 for bare, ours in taken)
    return Figure(
        [ours.per_second for _, ours in taken], [bare.per_second for bare, _ in taken], note=f"p99 {p99:.1f} ×"
    )


async def slowest_hundredth(ground: Ground, connections: int) -> Figure:
    taken = await beside_bare(ground, connections)
    return Figure([ours.p99 * 1000 for _, ours in taken], [bare.p99 * 1000 for bare, _ in taken])


async def two_workers(ground: Ground) -> Figure:
    """Beside one worker, in turns."""
    if (cores := os.cpu_count() or 1) < CORES_FOR_WORKERS:
        raise NotRun(f"two workers, Postgres and the load want {CORES_FOR_WORKERS} cores, and here are {cores}")
    with generator() as load, program(ground, "one") as one, program(ground, "two", workers=2) as two:
        taken = await asyncio.to_thread(alternately, load, one.port, two.port, 64, ground.rounds, same=False)
        await reconcile(ground.dsn, 2 * WARM_UP + sum(alone.requests + both.requests for alone, both in taken))
    return Figure([both.per_second for _, both in taken], [alone.per_second for alone, _ in taken])


async def beside_bare(ground: Ground, connections: int) -> list[tuple[Posted, Posted]]:
    with generator() as load, bare() as limit, program(ground, "serve") as ours:
        taken = await asyncio.to_thread(alternately, load, limit, ours.port, connections, ground.rounds)
        await reconcile(ground.dsn, WARM_UP + sum(mine.requests for _, mine in taken))
    return taken


@contextmanager
def bare() -> Iterator[int]:
    """The port of a bare server."""
    command = [sys.executable, "-m", "benchmarks.bare"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        yield int(process.stdout.readline())
        process.terminate()


@contextmanager
def program(ground: Ground, name: str, *, workers: int = 1) -> Iterator[Program]:
    """`sluicegate serve` as a gateway alone, as its users start it; one destination, not in order, is owed each event."""
    text = CONFIGURATION.format(dsn="env:DSN", partner="http://127.0.0.1:9", more="").replace(", order: subject", "")
    folder = Path(ground.folder) / name
    folder.mkdir()
    made = Program(
        folder, text.replace("127.0.0.1:0", "127.0.0.1:PORT"), "--role", "gateway", "--workers", str(workers),
        environ={**ENVIRON, "DSN": ground.dsn},
    )  # fmt: skip
    with ended_with(made):
        made.start().ready()
        yield made


def alternately(
    load: Generator, limit: int, ours: int, connections: int, rounds: int, *, same: bool = True
) -> list[tuple[Posted, Posted]]:
    """Round for round, who is first changing, the `same` bytes to both."""

    def post(order: tuple[int, int], requests: int) -> tuple[Posted, Posted]:
        posted = {
            port: load.post(port, connections=connections, requests=requests, fresh=port == order[0] or not same)
            for port in order
        }
        return posted[limit], posted[ours]

    post((limit, ours), WARM_UP)
    requests = 8_000 if connections >= 64 else 4_000
    return [post((limit, ours) if number % 2 else (ours, limit), requests) for number in range(rounds)]


async def reconcile(dsn: str, accepted: int) -> None:
    """Each 202 is an event, and its delivery waits."""
    connection = await asyncpg.connect(dsn)
    try:
        events = await connection.fetchval("SELECT count(*) FROM sluicegate.events")
        waiting = await connection.fetchval("SELECT count(*) FROM sluicegate.pending")
    finally:
        await connection.close()
    if not events == waiting == accepted:
        raise Unbalanced(f"{accepted} answered by 202, {events} stored, {waiting} waiting")


def row(connections: int, goal: float) -> Row:
    return Row(
        name=f"intake-{connections}",
        what=f"accepted, durable, {connections} connections, one process",
        unit="/s",
        limit="bare aiohttp 202",
        goals=(at_least(goal),),
        seconds=25,
        take=lambda ground: accepted_per_second(ground, connections),
    )


ROWS = (
    row(8, 0.3),
    row(64, 0.5),
    row(256, 0.5),
    Row(
        name="intake-64-p99",
        what="accepted, durable, 64 connections: the slowest hundredth waits",
        unit="ms",
        limit="bare aiohttp 202",
        goals=(at_most(3),),
        seconds=25,
        take=lambda ground: slowest_hundredth(ground, 64),
    ),
    Row(
        name="intake-workers",
        what="accepted, durable, 64 connections, two workers",
        unit="/s",
        limit="one worker",
        goals=(at_least(1.5),),
        seconds=25,
        may_not_run=f"with less than {CORES_FOR_WORKERS} cores",
        take=two_workers,
    ),
)
