"""Random kills, for the lines that nobody thought of."""

import asyncio
import os
import random
import time

from chaos.faults import fault
from chaos.stage import Plan, Stage

KILLS = int(os.environ.get("CHAOS_KILLS", "200"))
PATIENCE = 40 * 60
NAMES = {"gateway": "gateway", "dispatcher": "dispatcher", "all": "both in one"}


@fault(
    "kills",
    f"{KILLS} times kill -9 of gateways, dispatchers, programs that are both, and Postgres at random",
    Plan(gateways=1, dispatchers=2, wholes=1, rate=20),
)
async def random_kills(stage: Stage) -> None:
    chance = random.Random(stage.seed)
    killed: dict[str, int] = {}
    returns: list[asyncio.Task[None]] = []
    until = time.monotonic() + PATIENCE
    while sum(killed.values()) < KILLS and time.monotonic() < until:
        await asyncio.sleep(chance.expovariate(1.5))
        victim = chance.choice([*stage.programs, None])
        if victim is not None and chance.random() < 0.6 and not await victim.is_ready():
            continue  # most of them while they work, and some while they start
        if victim is None:
            returns.append(asyncio.create_task(until_it_is_back(stage)))
            stage.postgres.kill_a_backend(chance.choice) if chance.random() < 0.5 else stage.postgres.kill()
            killed["Postgres"] = killed.get("Postgres", 0) + 1
        elif victim.alive:
            async with stage.disturb("kill", aftermath=0.5, struck=victim):  # what was on its way is still to come
                victim.kill()
            killed[NAMES[victim.role]] = killed.get(NAMES[victim.role], 0) + 1
    stage.injected = sum(killed.values())
    stage.demand(stage.injected >= KILLS, f"{KILLS} kills within {PATIENCE / 60:.0f} minutes")
    await asyncio.gather(*returns)
    await asyncio.gather(*(program.ready() for program in stage.programs))
    await stage.recovered(within=60)
    stage.note = ", ".join(f"{n} × {name}" for name, n in sorted(killed.items()))


async def until_it_is_back(stage: Stage) -> None:
    """However long Postgres recovers: what was in flight when it went is settled, or sent again, when it is back."""
    async with stage.disturb("Postgres", aftermath=2):
        await asyncio.sleep(0.2)
        await stage.postgres.back(within=300)
