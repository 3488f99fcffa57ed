"""How long after its commit a delivery leaves, on an idle system.

The limit is what cannot be saved: one read of one row from the same Postgres, over the same kind of connection.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from statistics import median

from benchmarks.rows import Figure, Ground, Row, at_most, reconcile
from outbox.event import Delivered, Delivery, Outcome
from tests.house import House, Partner, house_on

DELIVERIES = 60


class Clocked(Partner):
    """Notes when each delivery came, on the clock that all processes of a machine share."""

    def __init__(self) -> None:
        super().__init__()
        self.at: dict[str, float] = {}

    async def deliver(self, delivery: Delivery) -> Outcome:
        self.at[str(delivery.event.id)] = time.monotonic()
        return Delivered()


async def one_read(house: House) -> float:
    """Seconds, at the median."""
    took = []
    for _ in range(50):
        began = time.monotonic()
        await house.dispatch.fetchval("SELECT 1")
        took.append(time.monotonic() - began)
    return median(took)


def milliseconds(waits: list[float], limits: list[float]) -> Figure:
    return Figure([wait * 1000 for wait in waits], [limit * 1000 for limit in limits])


async def in_one_process(ground: Ground) -> Figure:
    waits, limits = [], []
    async with house_on(ground.dsn) as house:
        await house.destination("ledger")
        partner = Clocked()
        async with house.dispatching(house.target("ledger", partner)):
            await asyncio.sleep(1)
            for _ in range(ground.rounds):
                committed = {}
                for _ in range(DELIVERIES):
                    event = await house.accept("ledger")
                    committed[str(event)] = time.monotonic()
                    await asyncio.sleep(0.02)
                waits.append(median(partner.at[event] - at for event, at in committed.items()))
                limits.append(await one_read(house))
                reconcile(committed, partner.at)
                partner.at.clear()
    return milliseconds(waits, limits)


async def in_two_processes(ground: Ground) -> Figure:
    waits, limits = [], []
    async with house_on(ground.dsn) as house:
        await house.destination("ledger")
        dispatcher = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.wake", ground.dsn],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            env=os.environ,
        )
        assert dispatcher.stdout
        assert dispatcher.stdin
        await asyncio.to_thread(dispatcher.stdout.readline)  # it is at work
        from outbox.waking import Waker  # noqa: PLC0415

        waker = Waker(house.outbox)
        lane = house.destinations["ledger"].lanes[0]
        committed = {}
        for _ in range(ground.rounds * DELIVERIES):
            event = await house.accept("ledger", wake=False)
            committed[str(event)] = time.monotonic()
            waker.wake({lane: house.clock.now()})
            await asyncio.sleep(0.02)
        await waker.close()
        await asyncio.sleep(1)
        dispatcher.stdin.close()
        at = json.loads(await asyncio.to_thread(dispatcher.stdout.read))
        dispatcher.wait()
        reconcile(committed, at)
        events = list(committed)
        for n in range(ground.rounds):
            these = events[n * DELIVERIES : (n + 1) * DELIVERIES]
            waits.append(median(at[event] - committed[event] for event in these))
            limits.append(await one_read(house))
    return milliseconds(waits, limits)


async def dispatch_until_closed(dsn: str) -> None:
    """The other process: delivers until its standard input ends, then prints when each delivery left."""
    async with house_on(dsn) as house:
        await house.destination("ledger")
        partner = Clocked()
        async with house.dispatching(house.target("ledger", partner)):
            print("ready", flush=True)
            await asyncio.to_thread(sys.stdin.read)
    print(json.dumps(partner.at))


ROWS = (
    Row(
        name="wake-here",
        what="commit → leaves, door and dispatcher in one process, median",
        unit="ms",
        limit="one read",
        goals=(at_most(5, "ms"),),
        seconds=15,
        take=in_one_process,
    ),
    Row(
        name="wake-elsewhere",
        what="commit → leaves, door and dispatcher in two processes, median",
        unit="ms",
        limit="one read",
        goals=(at_most(20, "ms"),),
        seconds=20,
        take=in_two_processes,
    ),
)

if __name__ == "__main__":
    import logging

    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    asyncio.run(dispatch_until_closed(sys.argv[1]))
