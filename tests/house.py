"""An outbox on a real Postgres, and what tests need to put into it and take out of it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from observability.metrics import Metrics
from observability.tracing import Tracing
from outbox.clock import DatabaseClock, Identities
from outbox.database import Database
from outbox.dispatcher import Dispatcher, Target
from outbox.event import Connector, Delivered, Delivery, Event, Outcome
from outbox.partitions import Partitions
from outbox.retry import Schedule
from outbox.store import Arrival, Debt, Destination, Outbox, Stored

DAY = timedelta(days=1)
QUICK = Schedule(first=timedelta(milliseconds=20), cap=timedelta(milliseconds=100), give_up=timedelta(minutes=5))


class Partner:
    """A connector that notes what it is asked and answers as its mood says."""

    keeps_keys = True

    def __init__(self, mood: Callable[[Delivery], Outcome | Awaitable[Outcome]] | None = None) -> None:
        self.asked: list[Delivery] = []
        self.mood = mood or (lambda _: Delivered())

    async def check(self) -> Outcome:
        return Delivered()

    async def deliver(self, delivery: Delivery) -> Outcome:
        self.asked.append(delivery)
        answer = self.mood(delivery)
        return await answer if isinstance(answer, Awaitable) else answer

    async def lookup(self, delivery: Delivery) -> Outcome | None:
        return None

    async def close(self) -> None:
        pass

    @property
    def subjects(self) -> list[str | None]:
        return [delivery.event.subject for delivery in self.asked]


@dataclass
class House:
    """One Postgres database, and the parts of the outbox that a test puts to work on it."""

    dsn: str
    intake: Database
    dispatch: Database
    outbox: Outbox
    clock: DatabaseClock
    identities: Identities
    partitions: Partitions
    destinations: dict[str, Destination] = field(default_factory=dict)
    dispatchers: list[Dispatcher] = field(default_factory=list)

    async def accept(self, *to: str, wake: bool = True, **attributes: Any) -> UUID:
        """Stored, and whoever dispatches here woken; the attributes are those of `arrival`."""
        [answer] = await self.outbox.add([self.arrival(*to, **attributes)], self.buckets())
        assert isinstance(answer, Stored)
        if wake and answer.due_at is not None:
            for dispatcher in self.dispatchers:
                dispatcher.wake({lane: answer.due_at for name in to for lane in self.destinations[name].lanes})
        return answer.event

    def arrival(
        self,
        *to: str,
        subject: str | None = "order/1",
        ordered: bool = False,
        same: UUID | None = None,
        digest: UUID | None = None,
        give_up: timedelta | None = None,
        data: str = '{"id":1}',
        source: str = "shop",
    ) -> Arrival:
        """An event that owes a delivery to each of these."""
        event = Event(
            id=self.identities.next(),
            source=source,
            type="shop.order.paid",
            subject=subject,
            facility=None,
            time=datetime.now(UTC),
            data=json.loads(data),
            policy="order",
            policy_version=1,
            received_at=self.clock.now(),
            traceparent=None,
        )
        debts = []
        for name in to:
            destination = self.destinations[name]
            lane, key = destination.place(event.id, subject, ordered=ordered)
            debts.append(Debt(lane=lane, destination=destination.id, key=key, give_up=give_up))
        return Arrival(event=event, data=data, same=same or uuid4(), digest=digest or uuid4(), debts=tuple(debts))

    def buckets(self):
        return self.partitions.buckets(self.clock.now())

    async def destination(self, name: str, shards: int = 1) -> Destination:
        self.destinations |= await self.outbox.ensure_destinations({name: shards})
        return self.destinations[name]

    def target(
        self,
        name: str,
        partner: Connector,
        *,
        schedule: Schedule = QUICK,
        concurrency: int = 8,
        per_second: float | None = None,
    ) -> Target:
        destination = self.destinations[name]
        return Target(
            number=destination.id, name=name, lanes=len(destination.lanes), connector=partner, schedule=schedule,
            timeout=timedelta(seconds=5), concurrency=concurrency, per_second=per_second,
        )  # fmt: skip

    @asynccontextmanager
    async def dispatching(self, *targets: Target, lease: timedelta = timedelta(seconds=3)) -> AsyncIterator[Dispatcher]:
        tracing = Tracing.start(None, 0.0, "test")
        dispatcher = Dispatcher(
            self.outbox, database=self.dispatch, clock=self.clock, metrics=Metrics(), tracing=tracing, lease=lease
        )
        await dispatcher.start(targets)
        self.dispatchers.append(dispatcher)
        try:
            yield dispatcher
        finally:
            self.dispatchers.remove(dispatcher)
            await dispatcher.stop(timedelta(seconds=5))
            tracing.close()

    async def count(self, table: str) -> int:
        return await self.intake.fetchval(f"SELECT count(*) FROM {table}")

    async def drained(self, within: float = 10) -> None:
        await until(self.is_drained, within, "empty queue")

    async def is_drained(self) -> bool:
        return await self.count("pending") == 0


async def until(probe: Callable[[], object], within: float = 10, what: str = "it") -> None:
    """Waits for what a test expects, as long as it may take on a busy machine."""
    async with asyncio.timeout(within):
        while True:
            found = probe()
            if isinstance(found, Awaitable):
                found = await found
            if found:
                return
            await asyncio.sleep(0.01)


@asynccontextmanager
async def house_on(dsn: str) -> AsyncIterator[House]:
    intake = await Database.connect(dsn, size=4, pinned=True)
    dispatch = await Database.connect(dsn, size=4, pinned=True)
    clock = DatabaseClock()
    await clock.ask(intake)
    partitions = Partitions(intake, dedup=7 * DAY)
    await partitions.ensure(clock.now())
    outbox = Outbox(intake=intake, dispatch=dispatch)
    try:
        yield House(dsn, intake, dispatch, outbox, clock, Identities(clock.seconds), partitions)
    finally:
        await dispatch.close()
        await intake.close()
