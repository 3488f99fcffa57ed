"""A neighbour at 100 × its normal rate, and what its victim notices: p95 with the flood beside p95 without, in turns.

Both post in an open loop, timed from when each post was due: a neighbour that is answered late opens another connection.
A process of its own for each, `tests.flood`.  What was really offered is in the note, and a flood that fell short of
nine tenths of its rate is no figure.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from uuid import UUID, uuid4

import asyncpg
import msgspec

from benchmarks.rows import Figure, Ground, Row, Unbalanced, at_most, reconcile
from outbox.event import Delivered, Delivery, Outcome
from outbox.store import Arrival, Debt
from tests.flood import Posted, Posting
from tests.house import House, Partner, house_on
from tests.serving import CONFIGURATION, order, serving, sign

SECONDS = 3.0  # a measurement
NORMAL = 20  # posts a second, of the victim and of its neighbour
FLOOD = 100 * NORMAL
OFFERED = 0.9  # of that, at least
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


async def beside_a_source(ground: Ground) -> Figure:
    return await at_the_door(ground, "neighbour", 1)


async def beside_a_facility(ground: Ground) -> Figure:
    return await at_the_door(ground, "odoo", 2)


async def at_the_door(ground: Ground, neighbour: str, company: int) -> Figure:
    values, limits = [], []
    floods: list[Posted] = []
    accepted: list[UUID] = []
    async with serving(ground.folder, ground.dsn, "http://127.0.0.1:9", configured=CONFIGURED) as program:
        port = program.service.port
        assert port is not None
        with sender() as victim, sender() as other:

            async def measured(rate: int) -> tuple[float, Posted]:
                told, about = await asyncio.gather(
                    asyncio.to_thread(ask, victim, posting(port, "odoo", 1, NORMAL)),
                    asyncio.to_thread(ask, other, posting(port, neighbour, company, rate)),
                )
                if told.answers.keys() != {202}:
                    raise RuntimeError(f"the victim was not accepted: {told.answers}")
                accepted.extend(UUID(json.loads(body)["id"]) for body in told.accepted + about.accepted)
                return p95(told.took) * 1000, about

            await measured(NORMAL)
            for _ in range(ground.rounds):
                limits.append((await measured(NORMAL))[0])
                took, flood = await measured(FLOOD)
                values.append(took)
                floods.append(flood)
    await each_is_stored(ground.dsn, accepted)
    return Figure(values, limits, note=note_of(floods))


async def each_is_stored(dsn: str, accepted: Sequence[UUID]) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        stored = await connection.fetch("SELECT id FROM sluicegate.events")
    finally:
        await connection.close()
    reconcile(accepted, [row["id"] for row in stored])


def note_of(floods: Sequence[Posted]) -> str:
    least = min(flood.offered for flood in floods)
    if least < OFFERED * FLOOD:
        raise Unbalanced(f"{least:.0f}/s were offered, and not {FLOOD}/s")
    answers = sum((Counter(flood.answers) for flood in floods), Counter[int]())
    most = max(flood.connections for flood in floods)
    return f"{least:.0f}/s offered over {most} connections and answered {dict(sorted(answers.items()))}"


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
        ("source", "another source", 55, beside_a_source),
        ("facility", "another facility of the same source", 60, beside_a_facility),
        ("destination", "another source in the same destination", 40, in_a_destination),
    )
)


# ── the processes that post ─────────────────────────────────────────────────────────────────────────


@contextmanager
def sender() -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "tests.flood"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        assert process.stdin
        process.stdin.close()


def ask(process: "subprocess.Popen[bytes]", told: Posting) -> Posted:
    assert process.stdin
    assert process.stdout
    process.stdin.write(msgspec.json.encode(told) + b"\n")
    process.stdin.flush()
    return msgspec.json.decode(process.stdout.readline(), type=Posted, strict=False)


def posting(port: int, source: str, company: int, rate: int) -> Posting:
    """For as long as a measurement takes."""
    requests = [request(source, company) for _ in range(int(rate * SECONDS))]
    return Posting(port=port, rate=rate, requests=requests)


def request(source: str, company: int) -> bytes:
    body = json.dumps(order(id=uuid4().int % 10**9 + 1, amount_total=1, company_id=company)).encode()
    head = [f"{name}: {value}\r\n" for name, value in sign(body, id=os.urandom(12).hex()).items()]
    first = f"POST /hooks/{source} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    return "".join([first, *head, f"Content-Length: {len(body)}\r\n\r\n"]).encode() + body
