"""Every failpoint, and death there."""

import asyncio
import os
import subprocess
import sys

import asyncpg

from chaos.faults import fault
from chaos.program import SLUICEGATE, Program
from chaos.stage import Plan, Stage
from observability.failpoints import POINTS, VARIABLE


@fault("sweep", "kill -9 at every failpoint", Plan(rate=20, wholes=1))
async def every_failpoint(stage: Stage) -> None:
    for point in POINTS:
        match point.partition(".")[0]:
            case _ if point == "intake.handed_over":
                await die_handing_over(stage, f"{point}=exit@5")
            case "intake" | "wake":
                await die(stage, stage.gateway, f"{point}=exit@5")
            case "partitions":
                await die_in_upkeep(stage, point)
            case "migrations":
                await die_in_migrate(stage, point)
            case _ if point == "dispatch.suspected":
                await die_as_careful_successor(stage)
            case _ if point == "dispatch.before_give_back":
                await die_while_stopping(stage)
            case _ if point in {"dispatch.before_lease", "dispatch.leased", "upkeep.before_task"}:
                await die(stage, stage.dispatcher, f"{point}=exit@1")
            case _:
                await die(stage, stage.dispatcher, f"{point}=exit@5")
    await asyncio.gather(*(program.ready() for program in stage.programs))
    await stage.recovered()
    stage.note = f"{len(POINTS)} failpoints"


async def die(stage: Stage, program: Program, failpoint: str) -> None:
    await program.again(failpoint)
    async with stage.disturb(failpoint, aftermath=2):
        try:
            status = await program.dies(within=90)
        except TimeoutError:
            stage.demand(False, f"nobody came by {failpoint}")  # noqa: FBT003
            return
    stage.demand(status == 137, f"{program.name} ended with {status} at {failpoint}")


async def die_handing_over(stage: Stage, failpoint: str) -> None:
    """With no other dispatcher there, so that it owns lanes that need no order."""
    whole = stage.wholes[0]
    await whole.again(failpoint)
    async with stage.disturb(failpoint, aftermath=2):
        for dispatcher in stage.dispatchers:
            await dispatcher.stop()
        try:
            await whole.dies(within=90)
        except TimeoutError:
            stage.demand(False, f"nobody came by {failpoint}")  # noqa: FBT003
        for dispatcher in stage.dispatchers:
            await dispatcher.again()


async def die_as_careful_successor(stage: Stage) -> None:
    """It takes over what another one had in flight when that was killed, and dies of the first."""
    first, second = stage.dispatchers[:2]
    await second.again("dispatch.suspected=exit@1")
    await asyncio.gather(first.ready(), second.ready())
    async with stage.disturb("dispatch.suspected", aftermath=2):
        first.kill()
        await first.dies()
        try:
            await second.dies(within=90)
        except TimeoutError:
            stage.demand(False, "nobody came by dispatch.suspected")  # noqa: FBT003


async def die_while_stopping(stage: Stage) -> None:
    await stage.dispatcher.again("dispatch.before_give_back=exit@1")
    await stage.dispatcher.ready()
    async with stage.disturb("dispatch.before_give_back", aftermath=2):
        status = await stage.dispatcher.stop()
    stage.demand(status == 137, f"it ended with {status} at dispatch.before_give_back")
    stage.dispatcher.start()
    stage.dispatcher.supervise()


async def die_in_upkeep(stage: Stage, point: str) -> None:
    """In a process of its own, for in a service it would come by once an hour; and on a database of its own.

    A service there could drop what is laid out before this one comes.
    """
    name = await stage.postgres.create()
    dsn = stage.postgres.dsn(name)
    await lay_out_old_partitions(dsn)
    command = [sys.executable, "-m", "chaos.upkeep", dsn]
    async with stage.disturb(point):
        status = await in_its_own_process(command, f"{point}=exit@1")
    stage.demand(status == 137, f"upkeep ended with {status} at {point}")
    status = await in_its_own_process(command, "")
    stage.demand(status == 0, f"upkeep that follows a death at {point} ended with {status}")
    connection = await asyncpg.connect(dsn)
    try:
        left = await connection.fetchval(
            "SELECT count(*) FROM pg_class WHERE relname LIKE 'events_202001%' AND relkind = 'r'"
        )
    finally:
        await connection.close()
    stage.demand(left == 0, f"{left} old partitions are still there")
    await stage.postgres.drop(name)


async def lay_out_old_partitions(dsn: str) -> None:
    """Their days are long over."""
    connection = await asyncpg.connect(dsn)
    try:
        for day in (1, 2):
            await connection.execute(
                f"""
                SET search_path = sluicegate;
                CREATE TABLE events_2020010{day} (LIKE events INCLUDING ALL);
                ALTER TABLE events ATTACH PARTITION events_2020010{day}
                  FOR VALUES FROM (event_floor('2020-01-0{day} 00:00Z')) TO (event_floor('2020-01-0{day + 1} 00:00Z'))
                """
            )
    finally:
        await connection.close()


async def die_in_migrate(stage: Stage, point: str) -> None:
    name = await stage.postgres.create(empty=True)
    path = stage.folder / "migrate.yaml"
    path.write_text(f"database: {stage.postgres.dsn(name)}\nkey: env:KEY\n")
    command = [SLUICEGATE, "migrate", "--config", str(path)]
    async with stage.disturb(point):
        status = await in_its_own_process(command, f"{point}=exit@1", **stage.environ)
    stage.demand(status == 137, f"migrate ended with {status} at {point}")
    status = await in_its_own_process(command, "", **stage.environ)
    stage.demand(status == 0, f"the migrate that follows ended with {status}")
    await stage.postgres.drop(name)


async def in_its_own_process(command: list[str], failpoints: str, **environ: str) -> int:
    armed = {VARIABLE: failpoints} if failpoints else {}
    process = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, **environ, **armed}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return await process.wait()
