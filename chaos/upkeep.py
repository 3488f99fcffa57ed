"""The product's upkeep of partitions, once, in a process of its own that can be told to die: `python -m chaos.upkeep DSN`."""

import asyncio
import os
import sys
from datetime import timedelta

from observability.failpoints import VARIABLE, arm
from outbox.clock import DatabaseClock
from outbox.database import Database
from outbox.partitions import Partitions
from outbox.retention import Keep, Retention

DAY = timedelta(days=1)


async def main(dsn: str) -> None:
    database = await Database.connect(dsn, size=2)
    try:
        clock = DatabaseClock()
        await clock.ask(database)
        partitions = Partitions(database, dedup=7 * DAY)
        await partitions.ensure(clock.now())
        keep = Keep(events=90 * DAY, dead_letters=90 * DAY, audit=400 * DAY)
        await Retention(database, partitions, keep).run(clock.now())
        await partitions.ensure(clock.now() + DAY)
    finally:
        await database.close()


if __name__ == "__main__":
    arm(os.environ.get(VARIABLE, ""))
    asyncio.run(main(sys.argv[1]))
