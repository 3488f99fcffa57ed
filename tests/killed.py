"""A process that dispatches, and dies when it is asked for a certain delivery; then another, as often as it is told.

`python -m tests.killed DSN POISON LIVES DESTINATION…` tells the status of each.  It forks, so that a life costs no start.
"""

import asyncio
import os
import sys
from datetime import timedelta
from uuid import UUID

from outbox.event import Delivered, Delivery, Outcome
from tests.house import Partner, house_on, until

LONG = 0.2  # seconds in which whatever began beside the poison is in flight


async def deliver(dsn: str, poison: UUID, names: list[str]) -> None:
    async def mood(delivery: Delivery) -> Outcome:
        await asyncio.sleep(LONG / 2 if delivery.event.id == poison else LONG)
        if delivery.event.id == poison:
            os._exit(137)
        return Delivered()

    async with house_on(dsn) as house:
        for name in names:
            await house.destination(name)
        targets = [house.target(name, Partner(mood), concurrency=2) for name in names]
        async with house.dispatching(*targets, lease=timedelta(seconds=30)):
            await until(house.is_drained, 20)


def main(dsn: str, poison: UUID, lives: int, names: list[str]) -> None:
    for _ in range(lives):
        if (child := os.fork()) == 0:
            os.dup2(2, 1)  # what it logs
            asyncio.run(deliver(dsn, poison, names))
            os._exit(0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")


if __name__ == "__main__":
    main(sys.argv[1], UUID(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
