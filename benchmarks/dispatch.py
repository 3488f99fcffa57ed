"""Deliveries, from the read to the settle: what the dispatcher adds to what it dispatches."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from uuid import UUID

from benchmarks import reference_loop
from benchmarks.rows import Figure, Ground, Row, Unbalanced, at_least, reconcile
from outbox.event import Delivered, Delivery, Outcome
from tests.house import House, house_on

COUNT = 20_000  # deliveries a round
PAYLOAD = '{"id":1,"note":"' + "x" * 280 + '"}'  # 300 bytes
SOME = 500  # events in one transaction, while filling
AT_ONCE = 200
DELIVERED = Delivered()


class Partner:
    """Takes everything, after `work`."""

    keeps_keys = True

    def __init__(self, work: Callable[[], Awaitable[None]] | None = None) -> None:
        self.taken: list[UUID] = []
        self.work = work

    async def deliver(self, delivery: Delivery) -> Outcome:
        if self.work is not None:
            await self.work()
        self.taken.append(delivery.event.id)
        return DELIVERED

    async def check(self) -> Outcome:
        return DELIVERED

    async def lookup(self, delivery: Delivery) -> Outcome | None:  # noqa: ARG002
        return None

    async def close(self) -> None:
        pass


async def fill(house: House, name: str, count: int) -> set[UUID]:
    accepted: set[UUID] = set()
    while len(accepted) < count:
        arrivals = [house.arrival(name, data=PAYLOAD) for _ in range(min(SOME, count - len(accepted)))]
        await house.outbox.add(arrivals, house.buckets())
        accepted |= {arrival.event.id for arrival in arrivals}
    return accepted


async def drain(house: House, name: str, accepted: set[UUID], partner: Partner) -> float:
    """Deliveries a second, from the start of the dispatcher until the last one is settled."""
    target = house.target(name, partner, concurrency=AT_ONCE)
    began = time.monotonic()
    async with house.dispatching(target):
        while len(partner.taken) < len(accepted) or not await house.is_drained():
            await asyncio.sleep(0.005)
        took = time.monotonic() - began
    reconcile(accepted, partner.taken)
    if (told := await house.count("attempts")) != await house.count("events"):
        raise Unbalanced(f"{told} attempts were recorded")
    return len(accepted) / took


async def reference(dsn: str, count: int, work: Callable[[], Awaitable[None]] | None = None) -> float:
    accepted = await reference_loop.fill(dsn, count, PAYLOAD)
    taken: list[int] = []

    async def deliver(id: int, payload: str) -> None:  # noqa: A002, ARG001
        if work is not None:
            await work()
        taken.append(id)

    began = time.monotonic()
    await reference_loop.drain(dsn, count, AT_ONCE, deliver)
    took = time.monotonic() - began
    reconcile(accepted, taken)
    return count / took


async def alone(count: int, work: Callable[[], Awaitable[None]]) -> float:
    """Asyncio and nothing else: so many workers, and a list to work off."""
    left = iter(range(count))

    async def worker() -> None:
        for _ in left:
            await work()

    began = time.monotonic()
    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return count / (time.monotonic() - began)


async def ten_milliseconds() -> None:
    await asyncio.sleep(0.01)


async def noop(ground: Ground) -> Figure:
    values, limits = [], []
    async with house_on(ground.dsn) as house:
        await house.destination("ledger")
        for _ in range(ground.rounds):
            limits.append(await reference(ground.dsn, COUNT))
            values.append(await drain(house, "ledger", await fill(house, "ledger", COUNT), Partner()))
    return Figure(values, limits)


async def slow(ground: Ground) -> Figure:
    values, limits = [], []
    async with house_on(ground.dsn) as house:
        await house.destination("ledger")
        for _ in range(ground.rounds):
            limits.append(await alone(COUNT, ten_milliseconds))
            accepted = await fill(house, "ledger", COUNT)
            values.append(await drain(house, "ledger", accepted, Partner(ten_milliseconds)))
    return Figure(values, limits)


ROWS = (
    Row(
        name="dispatch-noop",
        what="deliveries of nothing, 200 at a time, attempts recorded, fenced",
        unit="/s",
        limit="an 80-line loop",
        goals=(at_least(0.5),),
        seconds=40,
        take=noop,
    ),
    Row(
        name="dispatch-10ms",
        what="deliveries of 10 ms, 200 at a time",
        unit="/s",
        limit="asyncio alone",
        goals=(at_least(0.9),),
        seconds=40,
        take=slow,
    ),
)
