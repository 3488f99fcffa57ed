"""Everything at once, for some seconds: partners of every mood, reloads, holds, dispatchers that come and go.

Nobody is killed, so there is no excuse: each delivery is made once, in order where that is asked for.
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID

import pytest
import pytest_asyncio
from msgspec.structs import replace

from outbox.destinations import Destinations
from outbox.event import Blocked, Delivered, Delivery, Duplicate, Outcome, Pending, Retry, Unknown
from outbox.records import Records
from outbox.retry import Schedule
from outbox.store import Arrival, Debt, Stored
from tests.house import House, Partner, house_on, until

SHARDS = {"orders": 4, "stock": 2, "ledger": 1, "chat": 3}
IN_ORDER = {"orders", "stock"}
SHORT = Schedule(first=timedelta(milliseconds=30), cap=timedelta(milliseconds=300), give_up=timedelta(minutes=10))


@pytest_asyncio.fixture
async def house(dsn: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    for module in ("retry", "gate"):  # so that in its seconds a destination is held and open again, more than once
        monkeypatch.setattr(f"outbox.{module}.CONFIRM_BLOCKED", timedelta(seconds=0.5))
    monkeypatch.setattr("outbox.gate.SHORTEST_HOLD", timedelta(seconds=1))
    async with house_on(dsn) as house:
        yield house


@dataclass
class Soak:
    house: House
    chance: random.Random
    calm: bool = False
    over: bool = False
    owed: dict[tuple[str, str | None], list[UUID]] = field(default_factory=lambda: defaultdict(list))
    made: dict[tuple[str, str | None], list[UUID]] = field(default_factory=lambda: defaultdict(list))
    at_once: dict[tuple[str, str | None], int] = field(default_factory=lambda: defaultdict(int))
    lives: list[AsyncExitStack] = field(default_factory=list)
    partners: dict[str, Partner] = field(default_factory=dict)

    async def moody(self, delivery: Delivery) -> Outcome:
        place = (delivery.destination, delivery.event.subject)
        self.at_once[place] += 1
        assert delivery.destination not in IN_ORDER or self.at_once[place] == 1, "two of one subject at once"
        await asyncio.sleep(self.chance.choice([0, 0, 0.002, 0.01]))
        self.at_once[place] -= 1
        mood = 0 if self.calm else self.chance.randrange(20)
        if mood < 14:
            self.made[place].append(delivery.event.id)
            return self.chance.choice([Delivered(status=200), Duplicate()])
        return {
            14: Retry("500", status=500), 15: Retry("503", status=503), 16: Unknown("no answer"),
            17: Retry("429", after=timedelta(milliseconds=200), whole_destination=True, status=429),
            18: Pending("taken", until=self.house.clock.now() + timedelta(milliseconds=300)),
            19: self.chance.choice([Blocked("credentials: 401", 401), None]),
        }[mood]  # fmt: skip

    def targets(self, *without: str) -> list:
        return [
            self.house.target(
                name, partner, schedule=SHORT,
                concurrency=self.chance.choice([1, 3, 8]), per_second=self.chance.choice([None, None, 100]),
            )
            for name, partner in self.partners.items() if name not in without
        ]  # fmt: skip

    def arrival(self, sender: str) -> tuple[Arrival, list[str]]:
        names = self.chance.sample(list(SHARDS), self.chance.choice([1, 2, 4]))
        arrival = self.house.arrival(subject=f"{sender}/{self.chance.randrange(4)}")
        debts = []
        for name in names:
            destination = self.house.destinations[name]
            lane, key = destination.place(arrival.event.id, arrival.event.subject, ordered=name in IN_ORDER)
            debts.append(Debt(lane=lane, destination=destination.id, key=key, give_up=None))
        return replace(arrival, debts=tuple(debts)), names

    async def accept(self, sender: str) -> None:
        """Subjects of its own: between two who send at the same time there is no order."""
        while not self.over:
            arrivals = [self.arrival(sender) for _ in range(self.chance.choice([1, 1, 5]))]
            answers = await self.house.outbox.add([arrival for arrival, _ in arrivals], self.house.buckets())
            for (arrival, names), answer in zip(arrivals, answers, strict=True):
                assert isinstance(answer, Stored)
                for name in names:
                    self.owed[name, arrival.event.subject].append(answer.event)
                if self.chance.random() < 0.8:  # else a poll finds it
                    for dispatcher in self.house.dispatchers:
                        dispatcher.wake({debt.lane: answer.due_at for debt in arrival.debts})
            await asyncio.sleep(self.chance.random() * 0.05)

    async def disturb(self) -> None:
        deeds = [self.reload, self.reload_without, self.hold, self.come, self.go, self.lock_lanes]
        while not self.over:
            await self.chance.choice(deeds)()
            await asyncio.sleep(self.chance.random() * 0.15)

    async def reload(self) -> None:
        self.chance.choice(self.house.dispatchers).retarget(self.targets())

    async def reload_without(self) -> None:
        dispatcher = self.chance.choice(self.house.dispatchers)
        dispatcher.retarget(self.targets(self.chance.choice(list(SHARDS))))
        await asyncio.sleep(self.chance.random() * 0.5)
        dispatcher.retarget(self.targets())

    async def hold(self) -> None:
        people, name = Destinations(self.house.intake), self.chance.choice(list(SHARDS))
        await people.hold(name, until=None, reason="a test", by="anna")
        await asyncio.sleep(self.chance.random() * 0.5)
        await people.release(name, by="anna", reason="it goes on")

    async def come(self) -> None:
        if len(self.lives) < 3:
            life = AsyncExitStack()
            await life.enter_async_context(self.house.dispatching(*self.targets()))
            self.lives.append(life)

    async def go(self) -> None:
        if len(self.lives) > 1:
            await self.lives.pop(self.chance.randrange(len(self.lives))).aclose()

    async def lock_lanes(self) -> None:
        async with self.house.intake.transaction() as operator:
            await operator.execute("SELECT FROM lanes ORDER BY lane FOR UPDATE")
            await asyncio.sleep(self.chance.random() * 0.3)


@pytest.mark.parametrize("seed", [1, 2])
async def test_whatever_goes_on_each_delivery_is_made_once_and_in_its_order(house: House, seed: int) -> None:
    soak = Soak(house, random.Random(seed))
    for name, shards in SHARDS.items():
        await house.destination(name, shards=shards)
        soak.partners[name] = Partner(soak.moody)
    await soak.come()
    await soak.come()
    working = [asyncio.create_task(work) for work in (soak.accept("one"), soak.accept("two"), soak.disturb())]
    await asyncio.sleep(6)
    soak.over = True
    await asyncio.gather(*working)
    soak.calm = True
    for name in SHARDS:
        await Destinations(house.intake).release(name, by="anna", reason="the end")
    for dispatcher in house.dispatchers:
        dispatcher.retarget([house.target(name, partner, schedule=SHORT) for name, partner in soak.partners.items()])
    await until(house.is_drained, 60, "empty queue")
    for life in soak.lives:
        await life.aclose()
    for place, owed in soak.owed.items():
        assert sorted(soak.made[place]) == sorted(owed), place
        if place[0] in IN_ORDER:
            assert soak.made[place] == owed, place
    assert (await Records(house.intake).books()).balanced
