"""A Postgres that is there and does not answer: the door sheds, memory stays, and the program can be stopped in time."""

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import ClientOSError, ClientSession, ClientTimeout, TCPConnector

from outbox.database import Unavailable
from outbox.intake_batch import BIGGEST_PART, HEAVIEST_QUEUE, LONGEST_QUEUE, IntakeBatch
from tests.house import House, house_on
from tests.program import Partner, Program, configuration, ended_with, order, partner, signed, until


@pytest.fixture(scope="module")
def sink() -> Iterator[Partner]:
    with partner() as sink:
        yield sink


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, sink: Partner) -> Iterator[Program]:
    program = Program(tmp_path_factory.mktemp("frozen"), configuration(partner=sink.address))
    with ended_with(program):
        yield program


@pytest.fixture
def program(kept: Program) -> Program:
    """At work, with a Postgres that answers."""
    if not kept.alive:
        kept.start()
    kept.ready()
    return kept


def freeze(program: Program) -> None:
    program.signal(program.postgres(), signal.SIGSTOP)


def memory(program: Program) -> float:
    """MiB."""
    status = Path(f"/proc/{program.running.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def test_it_ends_in_time_though_postgres_is_frozen_and_nothing_is_lost(program: Program, sink: Partner) -> None:
    sink.mood = lambda _: 503
    accepted = {program.accept() for _ in range(20)}
    freeze(program)
    assert program.post(order()).status == 503
    began = time.monotonic()
    assert program.stop(within=40) == 0
    assert time.monotonic() - began < 30, "the drain's deadline; 8 s on an idle machine"
    assert program.family() == set(), "a server that was frozen stayed behind"
    sink.mood = lambda _: 200
    sink.received.clear()
    program.start().ready()
    until(lambda: accepted <= sink.events(), 20, "delivery of all that was acknowledged")


async def test_a_thousand_posts_to_a_frozen_postgres_are_told_to_come_back_and_take_no_memory(
    program: Program,
) -> None:
    """Their bodies are 72 MiB."""
    program.accept()
    before = memory(program)
    freeze(program)
    waste = "x" * 60_000
    most = before
    async with ClientSession(connector=TCPConnector(limit=0, force_close=True), timeout=ClientTimeout(60)) as session:

        async def post() -> tuple[int, bool] | None:
            body = order(notes=waste)
            url = f"http://127.0.0.1:{program.port}/hooks/shop"
            try:
                async with session.post(url, data=body, headers=signed(body)) as answer:
                    return answer.status, "retry-after" in answer.headers
            except ClientOSError:  # on a machine that is too busy to take its body in time
                return None

        for _ in range(4):
            answers = await asyncio.gather(*(post() for _ in range(300)))
            assert set(answers) - {None} == {(503, True)}
            most = max(most, memory(program))
    assert most - before < 50, f"{before:.0f} MiB before, {most:.0f} at most"
    program.signal(program.postgres(), signal.SIGCONT)
    program.ready()
    program.accept()


async def test_what_waits_for_postgres_is_bounded_by_its_bytes(dsn: str) -> None:
    async with house_on(dsn) as house:
        batch = IntakeBatch(
            house.outbox, buckets=house.buckets, wake=lambda _: None, sizes=lambda _: None, connections=0
        )
        heavy = json.dumps({"text": "x" * 8000})
        waiting = [asyncio.create_task(batch.add(house.arrival(data=heavy))) for _ in range(HEAVIEST_QUEUE // 8000 + 1)]
        await asyncio.sleep(0)
        await refused(batch, house)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_what_waits_for_postgres_is_bounded_by_its_number(dsn: str) -> None:
    """No party has more than its share of it."""
    async with house_on(dsn) as house:
        batch = IntakeBatch(
            house.outbox, buckets=house.buckets, wake=lambda _: None, sizes=lambda _: None, connections=0
        )
        share = LONGEST_QUEUE // BIGGEST_PART
        arrivals = [house.arrival(source=f"shop-{n}") for n in range(BIGGEST_PART)]
        waiting = [asyncio.create_task(batch.add(arrival)) for arrival in arrivals for _ in range(share)]
        await asyncio.sleep(0)
        await refused(batch, house)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def refused(batch: IntakeBatch, house: House) -> None:
    with pytest.raises(Unavailable, match="too many"):
        await batch.add(house.arrival())
