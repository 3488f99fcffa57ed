"""Deliveries, from the read to the settle: what the dispatcher adds to what it dispatches."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from uuid import UUID, uuid4

import aiohttp

from benchmarks import reference_loop
from benchmarks.rows import Figure, Ground, Row, Unbalanced, at_least, reconcile
from benchmarks.sink import sink
from connectors import Opening, kinds
from connectors.settings import Reference
from observability.tracing import Tracing
from outbox.event import Connector, Delivered, Delivery, Outcome, Retry
from tests.house import House, house_on

COUNT = 20_000  # deliveries a round
PAYLOAD = '{"id":1,"note":"' + "x" * 280 + '"}'  # 300 bytes
SOME = 500  # events in one transaction, while filling
AT_ONCE = 200
POSTS = 5_000  # a round
POSTS_AT_ONCE = 50
OUTAGE = 100_000  # deliveries that wait at its end
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


async def drain(house: House, name: str, accepted: set[UUID], partner: Partner, at_once: int = AT_ONCE) -> float:
    """Deliveries a second, from the start of the dispatcher until the last one is settled."""
    began = time.monotonic()
    async with house.dispatching(house.target(name, partner, concurrency=at_once)):
        await drained(house, lambda: len(partner.taken) >= len(accepted))
        took = time.monotonic() - began
    reconcile(accepted, partner.taken)
    await recorded(house)
    return len(accepted) / took


async def drained(house: House, nearly: Callable[[], bool]) -> None:
    """Asked only towards the end: counting costs, too."""
    while not nearly() or not await house.is_drained():
        await asyncio.sleep(0.005)


async def recorded(house: House) -> None:
    if (told := await house.count("attempts")) != await house.count("events"):
        raise Unbalanced(f"{told} attempts were recorded")


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


# ── by HTTP ──────────────────────────────────────────────────────────────────────────────────────────


async def by_http(ground: Ground) -> Figure:
    values, limits = [], []
    owed: list[object] = []
    async with house_on(ground.dsn) as house:
        await house.destination("ledger")
        with sink() as partner:
            url = f"http://127.0.0.1:{partner.port}/events"
            for _ in range(ground.rounds):
                limits.append(await bare_client(url, owed))
                accepted = await fill(house, "ledger", POSTS)
                owed += map(str, accepted)
                connector = Through(http(url))
                values.append(await drain(house, "ledger", accepted, connector, POSTS_AT_ONCE))
                await connector.close()
    reconcile(owed, partner.taken)
    return Figure(values, limits)


class Through(Partner):
    """Counts what a connector delivers."""

    def __init__(self, connector: Connector) -> None:
        super().__init__()
        self._connector = connector

    async def deliver(self, delivery: Delivery) -> Outcome:
        outcome = await self._connector.deliver(delivery)
        self.taken.append(delivery.event.id)
        return outcome

    async def close(self) -> None:
        await self._connector.close()


def http(url: str) -> Connector:
    """As the configuration opens it."""
    kind = kinds()["http"]
    secret = Reference(origin="env:OUT_SECRET", text="whsec_" + "c2VjcmV0" * 4)
    settings = kind.settings.model_validate({"url": url, "secret": secret, "allow": ["127.0.0.1/32"]})
    return kind.connect(
        Opening(
            destination="ledger",
            settings=settings,
            system=None,
            timeout=timedelta(seconds=10),
            concurrency=POSTS_AT_ONCE,
            tracing=Tracing.start(None, 0.0, "bench"),
            version="bench",
        )
    )


async def bare_client(url: str, owed: list[object]) -> float:
    """Posts a second: the same bytes, by a session that is kept."""
    ids = [str(uuid4()) for _ in range(POSTS)]
    left = iter(ids)
    owed += ids
    body = PAYLOAD.encode() + b" " * 200  # a CloudEvent's attributes

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=POSTS_AT_ONCE)) as session:

        async def worker() -> None:
            for each in left:
                headers = {"webhook-id": each, "content-type": "application/json"}
                async with session.post(url, data=body, headers=headers) as answer:
                    await answer.read()

        began = time.monotonic()
        await asyncio.gather(*(worker() for _ in range(POSTS_AT_ONCE)))
        return POSTS / (time.monotonic() - began)


# ── after an outage ──────────────────────────────────────────────────────────────────────────────────


class Away(Partner):
    """Needs 5 ms for each; while it is `away` it says 503, and it notes how many were there at once, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.came_back: float | None = None
        self.at_once = 0
        self.most = 0
        self.arrivals: list[tuple[float, int]] = []  # since it came back: seconds, and how many were there then

    async def deliver(self, delivery: Delivery) -> Outcome:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        if self.came_back is not None:
            self.arrivals.append((time.monotonic() - self.came_back, self.at_once))
        try:
            await asyncio.sleep(0.005)
            if self.away:
                return Retry("answered 503", status=503)
            self.taken.append(delivery.event.id)
            return DELIVERED
        finally:
            self.at_once -= 1

    def come_back(self) -> None:
        self.away, self.came_back = False, time.monotonic()


async def from_the_first(house: House, partner: Away) -> float:
    """Deliveries a second, from the first one that was taken until the last one is settled."""
    while not partner.taken:
        await asyncio.sleep(0.001)
    began = time.monotonic()
    await drained(house, lambda: len(partner.taken) >= OUTAGE)
    return OUTAGE / (time.monotonic() - began)


async def after_an_outage(ground: Ground) -> Figure:
    """Beside the same number without one; both from the first delivery to the last settle."""
    values, limits = [], []
    async with house_on(ground.dsn) as house:
        await house.destination("ledger")
        for _ in range(ground.rounds):
            accepted, steady = await fill(house, "ledger", OUTAGE), Away()
            async with house.dispatching(house.target("ledger", steady, concurrency=AT_ONCE)):
                limits.append(await from_the_first(house, steady))
            reconcile(accepted, steady.taken)
            accepted = await fill(house, "ledger", OUTAGE)
            partner = Away()
            partner.away = True
            async with house.dispatching(house.target("ledger", partner, concurrency=AT_ONCE)):
                await asyncio.sleep(5)
                partner.come_back()
                values.append(await from_the_first(house, partner))
            reconcile(accepted, partner.taken)
            first = partner.arrivals[0][0]
            early = max(n for at, n in partner.arrivals if at < first + 0.05)
            await house.intake.execute("TRUNCATE attempts, events")  # those of the outage are more than its events
            if partner.most > AT_ONCE or early > AT_ONCE // 4:
                raise Unbalanced(f"a herd: {early} at once within 50 ms, {partner.most} at the most")
    return Figure(values, limits, note=f"{early} at once within 50 ms, {max(partner.most, steady.most)} at the most")


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
        seconds=30,
        take=slow,
    ),
    Row(
        name="deliver-http",
        what=f"posts by the connector `http`, signed, egress guarded, {POSTS_AT_ONCE} at a time, from the read to the settle",
        unit="/s",
        limit="a bare aiohttp client",
        goals=(at_least(0.7),),
        seconds=30,
        take=by_http,
    ),
    Row(
        name="drain",
        what=f"{OUTAGE:,} deliveries of 5 ms after an outage, {AT_ONCE} at a time",
        unit="/s",
        limit="the same without an outage",
        goals=(at_least(0.9),),
        seconds=100,
        take=after_an_outage,
        long=True,
        rounds=3,
    ),
)
