"""A neighbour at 100 × its normal rate, and what its victim notices: p95 with the flood beside p95 without, in turns.

The victim posts in an open loop, timed from when each post was due; the neighbour offers as much as its connections let
it.  A process of its own for each: `python -m benchmarks.isolation`, one order a line on standard input, both are JSON.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID, uuid4

import msgspec

from benchmarks.rows import Figure, Ground, Row, at_most
from outbox.event import Delivered, Delivery, Outcome
from outbox.store import Arrival, Debt
from tests.house import House, Partner, house_on
from tests.serving import CONFIGURATION, order, serving, sign

SECONDS = 3.0  # a measurement
NORMAL = 20  # posts a second, of the victim and of its neighbour
FLOOD = 100 * NORMAL
CONNECTIONS = 64  # of the neighbour
BACKLOG = 3000  # deliveries of the neighbour that wait in one destination
LIMIT = f"{2 * NORMAL}/s"

CONFIGURED = (
    CONFIGURATION.replace("of: {{1: north}}", "of: {{1: north, 2: south}}")
    .replace("facilities:\n", "facilities:\n  south: {{name: South Clinic}}\n")
    .replace(
        "sources:\n",
        "sources:\n  neighbour: {{scheme: standard-webhooks, secrets: [env:SHOP_SECRET], accepts: [purchase-order], "
        f"limit: {LIMIT}}}}}\n",
    )
    .replace("body: 64KiB}}", f"facility_limit: {LIMIT}}}}}")
)


class Order(msgspec.Struct, frozen=True, kw_only=True):
    port: int
    source: str
    company: int
    rate: int
    connections: int


class Posted(msgspec.Struct, frozen=True, kw_only=True):
    answers: dict[int, int]  # how many of each status
    p95: float


async def beside_a_source(ground: Ground) -> Figure:
    return await at_the_door(ground, "neighbour", 1)


async def beside_a_facility(ground: Ground) -> Figure:
    return await at_the_door(ground, "odoo", 2)


async def at_the_door(ground: Ground, neighbour: str, company: int) -> Figure:
    values, limits, refused = [], [], Counter[int]()
    async with serving(ground.folder, ground.dsn, "http://127.0.0.1:9", configured=CONFIGURED) as program:
        port = program.service.port
        assert port is not None
        with sender() as victim, sender() as other:

            async def measured(rate: int, connections: int) -> Posted:
                ordered = Order(port=port, source="odoo", company=1, rate=NORMAL, connections=4)
                flood = Order(port=port, source=neighbour, company=company, rate=rate, connections=connections)
                told, about = await asyncio.gather(
                    asyncio.to_thread(ask, victim, ordered), asyncio.to_thread(ask, other, flood)
                )
                if told.answers.keys() != {202}:
                    raise RuntimeError(f"the victim was not accepted: {told.answers}")
                refused.update({status: n for status, n in about.answers.items() if connections == CONNECTIONS})
                return told

            await measured(NORMAL, 4)
            for _ in range(ground.rounds):
                limits.append((await measured(NORMAL, 4)).p95 * 1000)
                values.append((await measured(FLOOD, CONNECTIONS)).p95 * 1000)
    return Figure(values, limits, note=f"the neighbour was answered {dict(sorted(refused.items()))}")


async def in_a_destination(ground: Ground) -> Figure:
    """From the commit to the partner, who takes 5 ms, of one party behind the backlog of another."""
    values, limits = [], []
    async with house_on(ground.dsn) as house:
        house.destinations |= await house.outbox.ensure_destinations({"ledger": 1}, {"ledger": 2})
        for _ in range(ground.rounds):
            limits.append(await delivered(house, 0))
            values.append(await delivered(house, BACKLOG))
    return Figure(values, limits)


async def delivered(house: House, backlog: int) -> float:
    accepted: dict[UUID, float] = {}
    took: list[float] = []

    async def work(delivery: Delivery) -> Outcome:
        if (at := accepted.get(delivery.event.id)) is not None:
            took.append(time.perf_counter() - at)
        await asyncio.sleep(0.005)
        return Delivered()

    for _ in range(backlog // 500):
        await house.outbox.add([arrival(house, "flood", 0) for _ in range(500)], house.buckets())
    async with house.dispatching(house.target("ledger", Partner(work), concurrency=8)) as dispatcher:
        await asyncio.sleep(0.3)
        for _ in range(30):
            mine = arrival(house, "victim", 1)
            await house.outbox.add([mine], house.buckets())
            accepted[mine.event.id] = time.perf_counter()
            dispatcher.wake({lane: house.clock.now() for lane in house.destinations["ledger"].lanes})
            await asyncio.sleep(1 / NORMAL)
        await house.drained(60)
    if len(took) != len(accepted):
        raise RuntimeError(f"{len(took)} of {len(accepted)} were delivered")
    return p95(took) * 1000


def arrival(house: House, source: str, party: int) -> Arrival:
    made, ledger = house.arrival(), house.destinations["ledger"]
    lane, key = ledger.place(made.event.id, None, ordered=False, party=party)
    debt = Debt(lane=lane, destination=ledger.id, key=key, give_up=None)
    return msgspec.structs.replace(made, event=msgspec.structs.replace(made.event, source=source), debts=(debt,))


def p95(took: list[float]) -> float:
    return sorted(took)[len(took) * 95 // 100]


ROWS = tuple(
    Row(
        name=f"isolation-{name}",
        what=f"p95 beside {what} at 100 ×",
        unit="ms",
        limit="p95 beside one at its normal rate",
        goals=(at_most(1.2),),
        long=name != "source",  # so that all the default rows stay within ten minutes
        seconds=seconds,
        take=take,
    )
    for name, what, seconds, take in (
        ("source", "another source", 40, beside_a_source),
        ("facility", "another facility of the same source", 40, beside_a_facility),
        ("destination", "another source in the same destination", 40, in_a_destination),
    )
)


# ── the processes that post ─────────────────────────────────────────────────────────────────────────


@contextmanager
def sender() -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "benchmarks.isolation"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        assert process.stdin
        process.stdin.close()


def ask(process: "subprocess.Popen[bytes]", told: Order) -> Posted:
    assert process.stdin
    assert process.stdout
    process.stdin.write(msgspec.json.encode(told) + b"\n")
    process.stdin.flush()
    return msgspec.json.decode(process.stdout.readline(), type=Posted, strict=False)


async def post(told: Order) -> Posted:
    """At this rate for a while, or as fast as the connections answer."""
    answers: Counter[int] = Counter()
    took: list[float] = []
    began = time.perf_counter()
    turn = iter(range(int(told.rate * SECONDS)))

    async def work() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", told.port)
        for number in turn:
            due = began + number / told.rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if time.perf_counter() > began + SECONDS:
                break
            writer.write(request(told))
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0))
            answers[int(head[9:12])] += 1
            took.append(time.perf_counter() - due)
        writer.close()

    await asyncio.gather(*(work() for _ in range(told.connections)))
    return Posted(answers=dict(answers), p95=p95(took))


def request(told: Order) -> bytes:
    body = json.dumps(order(id=uuid4().int % 10**9 + 1, amount_total=1, company_id=told.company)).encode()
    head = [f"{name}: {value}\r\n" for name, value in sign(body, id=os.urandom(12).hex()).items()]
    first = f"POST /hooks/{told.source} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    return "".join([first, *head, f"Content-Length: {len(body)}\r\n\r\n"]).encode() + body


if __name__ == "__main__":
    for line in sys.stdin.buffer:
        posted = asyncio.run(post(msgspec.json.decode(line, type=Order)))
        print(msgspec.json.encode(posted).decode(), flush=True)
