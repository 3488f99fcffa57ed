"""What the program takes before it does anything: the time of a first start, and memory, however much waits."""

import asyncio
import time
from pathlib import Path

from benchmarks.rows import Figure, Ground, Row, Unbalanced, at_most
from benchmarks.sink import sink
from benchmarks.storage import fill
from benchmarks.whole import program
from outbox.embedded import Embedded
from tests.house import house_on

WARM, MUCH = 20_000, 1_000_000
BUSY_FOR = 20  # seconds, with much waiting


async def first_start(ground: Ground) -> Figure:
    """Seconds from the command until /ready says yes; beside the same Postgres, made and started, and nothing else."""
    values, limits = [], []
    for number in range(ground.rounds):
        alone, folder = ground.folder / f"alone-{number}", ground.folder / f"whole-{number}"
        alone.mkdir()
        folder.mkdir()
        began = time.monotonic()
        embedded = await Embedded.start(alone)
        limits.append(time.monotonic() - began)
        await embedded.stop()
        values.append(await asyncio.to_thread(started, folder))
    return Figure(values, limits)


def started(folder: Path) -> float:
    with sink() as partner:
        began = time.monotonic()
        with program(folder, partner, "embedded") as here:
            took = time.monotonic() - began
            here.stop()
    return took


async def memory(ground: Ground) -> Figure:
    """The most that a dispatcher has held, in MB: after a while of deliveries with a million waiting, and before them."""
    async with house_on(ground.dsn) as house:
        with sink() as partner, program(ground.folder, partner, ground.dsn, "--role", "dispatcher") as here:
            await house.destination("approvers")
            await fill(house, "approvers", WARM, events=WARM)
            await asyncio.to_thread(partner.await_count, WARM, 120)
            before = peak(here.running.pid)
            await fill(house, "approvers", MUCH, events=MUCH)
            delivered = partner.count()
            await asyncio.sleep(BUSY_FOR)
            if partner.count() <= delivered:
                raise Unbalanced("nothing was delivered while much waited")
            return Figure([peak(here.running.pid)], [before], note=f"{partner.count() - WARM:,} of them delivered")


def peak(process: int) -> float:
    told = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(told["VmHWM"].split()[0]) / 1024


ROWS = (
    Row(
        name="first-start",
        what="`sluicegate serve` ready, first start with a new database",
        unit="s",
        limit="the Postgres alone",
        goals=(at_most(2, "s"),),
        seconds=20,
        take=first_start,
        postgres=False,
    ),
    Row(
        name="memory",
        what="the most memory of a dispatcher, 1,000,000 waiting",
        unit="MB",
        limit="none waiting",
        goals=(at_most(1.1),),
        seconds=120,
        rounds=1,
        long=True,
        take=memory,
    ),
)
