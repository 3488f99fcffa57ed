"""How Postgres goes about the statements that run for every event, and for every second without one.

They are explained as they run: by the methods that have them, on connections with the settings of the service.  The
tables are partitioned as after some weeks, and filled; what is waiting, or due later, must cost nothing.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import pytest_asyncio
from msgspec.structs import replace

from outbox.database import Connection, Database
from outbox.lanes import BEGINNING, LOWEST
from outbox.retry import Verdict
from outbox.store import Lane, Outbox, Reading, Seen, Settlement, Taken
from tests.conftest import TEMPLATE, made_of
from tests.house import DAY, House, house_on

pytestmark = pytest.mark.asyncio(loop_scope="module")
WAITING = 5000
LATER = 20_000
HOUR = timedelta(hours=1)
PARTITIONED = ("events_", "attempts_", "dedup_")


class Explaining(Database):
    """Notes the plan of whatever it runs."""

    def __init__(self, *arguments, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        self.plans: list[dict] = []

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        async with super().connection() as connection:
            connection.add_log_listener(self._hear)
            try:
                yield connection
            finally:
                connection.remove_log_listener(self._hear)

    def _hear(self, _, message) -> None:
        _, found, plan = message.message.partition("plan:\n")
        if found:
            self.plans.append(json.loads(plan))


@asynccontextmanager
async def explaining(dsn: str) -> AsyncIterator[Explaining]:
    superuser = urlsplit(dsn)._replace(netloc="postgres@").geturl()
    database = await Explaining.connect(superuser, size=1, pinned=True)
    await database.execute("LOAD 'auto_explain'")
    for setting in ("log_min_duration = 0", "log_analyze = on", "log_buffers = on", "log_format = json"):
        await database.execute(f"SET auto_explain.{setting}")
    await database.execute("SET client_min_messages = log")
    yield database
    await database.close()


@dataclass
class Plan:
    nodes: list[dict]

    def scanned(self) -> list[str]:
        """Tables that were read from one end to the other."""
        return [n["Relation Name"] for n in self.nodes if n["Node Type"] == "Seq Scan" and n["Actual Loops"]]

    def partitions(self) -> set[str]:
        """Partitions that were looked into."""
        return {
            name for n in self.nodes
            if n["Actual Loops"] and (name := n.get("Relation Name", "")).startswith(PARTITIONED) and "Scan" in n["Node Type"]
        }  # fmt: skip

    @property
    def pages(self) -> int:
        """Looked at, all in all."""
        return self.nodes[0]["Shared Hit Blocks"] + self.nodes[0]["Shared Read Blocks"]

    @property
    def passed_over(self) -> int:
        """Rows that were looked at for nothing."""
        return sum(n.get("Rows Removed by Filter", 0) * n["Actual Loops"] for n in self.nodes if "Relation Name" in n)

    @property
    def joined_by(self) -> set[str]:
        return {n["Node Type"] for n in self.nodes if "Join" in n["Node Type"]}


def nodes(plan: dict) -> Iterator[dict]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


@dataclass
class Bench:
    house: House
    database: Explaining
    outbox: Outbox
    lanes: list[Lane]

    async def plans(self, statement: Awaitable) -> tuple[list[Plan], object]:
        self.database.plans.clear()
        answer = await statement
        await asyncio.sleep(0)
        ours = [
            p for p in self.database.plans if "typeinfo_tree" not in p["Query Text"] and "'jit'" not in p["Query Text"]
        ]
        return [Plan(list(nodes(plan["Plan"]))) for plan in ours], answer

    async def plan(self, statement: Awaitable) -> tuple[Plan, object]:
        [plan], answer = await self.plans(statement)
        return plan, answer

    async def read(self, room: int = 16, **closed) -> tuple[Plan, list[Taken]]:
        lanes = [lane.number for lane in self.lanes]
        readings = [Reading(lane=lane, due_at=BEGINNING, event=LOWEST, room=room, **closed) for lane in lanes]
        return await self.plan(self.outbox.read(readings))

    def settlement(self, taken: Taken, verdict: Verdict) -> Settlement:
        [lane] = [lane for lane in self.lanes if lane.number == taken.lane]
        return Settlement(
            lane=lane.number, epoch=lane.epoch, taken=taken, destination=lane.destination, verdict=verdict,
            delay=HOUR, spared=False, outcome=0, status=200, reason="r", receipt="", at=self.house.clock.now(),
            took=HOUR, trace=uuid4().hex, cause="c" if verdict == Verdict.DEAD else None,
        )  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(server: str) -> AsyncIterator[Bench]:
    """Some weeks of partitions; the queue was analysed while it was empty, and is full now."""
    async for dsn in made_of(TEMPLATE, server):
        async for bench in bench_on(dsn):
            yield bench


async def bench_on(dsn: str) -> AsyncIterator[Bench]:
    async with house_on(dsn) as house, explaining(dsn) as database:
        for days in (9, 18, 27):
            await house.partitions.ensure(house.clock.now() - days * DAY)
        await house.intake.execute("VACUUM ANALYZE pending, lanes, events, dedup, attempts")
        destination = await house.destination("orders", shards=4)
        for n in range(WAITING // 500):
            arrivals = [house.arrival("orders", subject=f"order/{n}/{m % 50}", ordered=m % 2 == 0) for m in range(500)]
            await house.outbox.add(arrivals, house.buckets())
        await house.intake.execute(
            """
            INSERT INTO pending (event_id, due_at, owed_since, lane)
            SELECT gen_random_uuid(), now() + interval '1 hour' + n * interval '1 second', now(), $1 + n % 4
              FROM generate_series(1, $2::int) AS n
            """,
            destination.lanes[0],
            LATER,
        )
        outbox = Outbox(intake=database, dispatch=database)
        me = await outbox.register("me", HOUR)
        yield Bench(house, database, outbox, await outbox.lease(me, [destination.id], 4))


async def test_a_read_costs_what_it_returns_whatever_waits_or_is_due_later(bench: Bench) -> None:
    plan, rows = await bench.read()
    assert len(rows) == 64
    assert plan.scanned() == []
    assert plan.joined_by <= {"Nested Loop"}
    assert len(plan.partitions()) == 1
    assert plan.pages < 10 * len(rows)
    everything, _ = await bench.read(room=WAITING)
    assert everything.passed_over == 0


async def test_a_read_past_closed_subjects_stays_a_walk_along_the_queue(bench: Bench) -> None:
    _, rows = await bench.read()
    closed = tuple({row.key for row in rows if row.key is not None})
    plan, others = await bench.read(closed=closed)
    assert not {row.key for row in others} & set(closed)
    assert plan.scanned() == []
    assert plan.pages < 10 * len(others)


async def test_the_next_of_a_subject_is_found_by_its_index(bench: Bench) -> None:
    _, rows = await bench.read(room=50)
    keys = list({(row.lane, row.key) for row in rows if row.key is not None})
    plan, found = await bench.plan(bench.outbox.next_of_keys(keys))
    assert len(found) == len(keys)
    assert plan.scanned() == []
    assert len(plan.partitions()) == 1
    assert plan.pages < 15 * len(keys)


async def test_a_settle_goes_to_its_rows_by_their_places(bench: Bench) -> None:
    _, rows = await bench.read(room=50)
    verdicts = [Verdict.DELIVERED, Verdict.DELIVERED, Verdict.LATER, Verdict.DEAD]
    settlements = [bench.settlement(row, verdicts[n % 4]) for n, row in enumerate(rows)]
    plan, settled = await bench.plan(bench.outbox.settle(settlements))
    assert len(settled.done) == len(rows) == 200
    assert plan.scanned() == []
    assert plan.joined_by <= {"Nested Loop"}
    pending = {n["Node Type"] for n in plan.nodes if n.get("Relation Name") == "pending"}
    assert pending == {"Tid Scan", "ModifyTable"}
    assert plan.pages < 30 * len(rows)


async def test_a_settle_of_what_is_delivered_goes_to_its_rows_by_their_places(bench: Bench) -> None:
    _, rows = await bench.read(room=50)
    settlements = [replace(bench.settlement(row, Verdict.DELIVERED), reason=None) for row in rows]
    plan, settled = await bench.plan(bench.outbox.settle(settlements))
    assert set(settled.done) == set(range(200))
    assert plan.scanned() == []
    assert plan.joined_by <= {"Nested Loop"}
    pending = {n["Node Type"] for n in plan.nodes if n.get("Relation Name") == "pending"}
    assert pending == {"Tid Scan", "ModifyTable"}
    assert plan.pages < 30 * len(rows)


async def test_what_was_moved_is_found_by_its_identity(bench: Bench) -> None:
    _, rows = await bench.read()
    plan, places = await bench.plan(bench.outbox.places(rows))
    assert len(places) == len(rows)
    assert plan.scanned() == []
    assert plan.pages < 6 * len(rows)


async def test_an_event_is_stored_without_looking_at_others(bench: Bench) -> None:
    arrivals = [bench.house.arrival("orders") for _ in range(25)]
    plan, _ = await bench.plan(bench.outbox.add(arrivals, bench.house.buckets()))
    assert plan.scanned() == []
    assert plan.joined_by <= {"Nested Loop"}
    assert plan.pages < 30 * len(arrivals)


async def test_who_came_first_is_found_by_the_identities(bench: Bench) -> None:
    arrivals = [bench.house.arrival("orders") for _ in range(25)]
    await bench.outbox.add(arrivals, bench.house.buckets())
    again = [replace(bench.house.arrival("orders"), same=arrival.same) for arrival in arrivals]
    [insert, firsts], answers = await bench.plans(bench.outbox.add(again, bench.house.buckets()))
    assert all(isinstance(answer, Seen) and answer.digest is not None for answer in answers)
    for plan in (insert, firsts):
        assert plan.scanned() == []
        assert plan.joined_by <= {"Nested Loop"}
        assert plan.pages < 30 * len(again)
    assert {name for name in firsts.partitions() if name.startswith("events")} == {
        f"events_{bench.house.clock.now():%Y%m%d}"
    }
