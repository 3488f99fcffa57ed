"""Processes of the program that are killed, stopped and restarted."""

import asyncio
import random
import signal
import time

from chaos.faults import fault
from chaos.ledger import Said
from chaos.partner import WELL, Mood
from chaos.program import Program
from chaos.stage import KEEPER, MANNERS, Plan, Stage

KILLS = 2  # a row
LEASE = 10.0  # seconds
ONE = Plan(dispatchers=1)


async def die_at(stage: Stage, program: Program, failpoint: str, *, nth: int = 20) -> None:
    """Killed there on the `nth` pass, more or less; the supervisor starts it again."""
    chance = random.Random(f"{stage.seed} {failpoint}")
    lives = [f"{failpoint}=exit@{chance.randint(nth // 2, nth)}" for _ in range(KILLS)]
    await program.again(*lives)
    for _ in range(KILLS):
        async with stage.disturb(failpoint):
            status = await program.dies()
        stage.demand(status == 137, f"{program.name} ended with {status} at {failpoint}")
    await stage.recovered()


@fault(1, "kill -9 of the gateway before the commit", ONE)
async def before_the_commit(stage: Stage) -> None:
    await die_at(stage, stage.gateway, "intake.before_commit")


@fault(2, "kill -9 of the gateway between commit and answer", ONE)
async def between_commit_and_answer(stage: Stage) -> None:
    await die_at(stage, stage.gateway, "intake.committed")

    async def recognised() -> bool:
        return sum(sent.duplicate for sent in stage.sent()) >= KILLS

    await stage.until(recognised, 30, "who sends again after a lost answer is told the first id")
    stage.note = f"{sum(sent.duplicate for sent in stage.sent())} sent again and recognised"


@fault(4, "kill -9 of a dispatcher before it sends")
async def before_it_sends(stage: Stage) -> None:
    await die_at(stage, stage.dispatcher, "dispatch.before_attempt")


@fault(5, "kill -9 of a dispatcher in the middle of deliveries")
async def in_the_middle(stage: Stage) -> None:
    await stage.partners.feel(KEEPER, Mood(delay=0.3))
    for _ in range(KILLS):
        await asyncio.sleep(0.7)
        async with stage.disturb("kill"):
            stage.dispatcher.kill()
            await stage.dispatcher.dies()
        await stage.recovered()
        await stage.dispatcher.ready()
    await stage.partners.feel(KEEPER, WELL)


@fault(6, "kill -9 of a dispatcher after the partner's yes, before it is written")
async def after_the_yes(stage: Stage) -> None:
    await die_at(stage, stage.dispatcher, "dispatch.answered")


@fault(7, "SIGSTOP of a dispatcher past its lease, then SIGCONT")
async def stopped_past_its_lease(stage: Stage) -> None:
    zombie = stage.dispatcher
    lost = await zombie.metric("sluicegate_fenced_total")
    owned = await zombie.metric("sluicegate_lanes_owned")
    async with stage.disturb("stop", aftermath=2):
        zombie.send_signal(signal.SIGSTOP)
        await asyncio.sleep(12)
        await stage.recovered(at_most=2)
        zombie.send_signal(signal.SIGCONT)
        await asyncio.sleep(1.5)
    fenced = await zombie.metric("sluicegate_fenced_total") - lost
    stage.demand(fenced >= 1, "the one that woke up learns that its lanes are lost")
    stage.note = f"{fenced:.0f} of its {owned:.0f} lanes fenced"


@fault(8, "dispatchers that reach for the same lanes at the same moment", Plan(dispatchers=3))
async def race_for_lanes(stage: Stage) -> None:
    for _ in range(2):
        async with stage.disturb("all dispatchers restart", aftermath=1):
            await asyncio.gather(*(d.again("dispatch.before_lease=sleep(0.3)") for d in stage.dispatchers))
            await asyncio.gather(*(d.ready() for d in stage.dispatchers))
        await stage.recovered()
    owned = sum([await d.metric("sluicegate_lanes_owned") for d in stage.dispatchers])
    stage.demand(owned == 18, f"18 lanes have one owner each, not {owned:.0f}")


@fault(
    9,
    "a lease that runs out while an attempt is under way",
    Plan(proxied=("dispatcher-1",), manners=MANNERS.replace("3s", "30s, concurrency: 4")),
)
async def lease_runs_out(stage: Stage) -> None:
    """The attempts end later than the lease, with more to do behind them: it starts none of that, and the other does it all."""
    cut_off = stage.dispatcher
    await stage.until(lambda: cut_off.metric("sluicegate_lanes_owned"), 15, "it has its share of the lanes")
    lost = await cut_off.metric("sluicegate_fenced_total")
    for name in stage.partners.names:
        await stage.partners.feel(name, Mood(delay=LEASE + 4))
    await asyncio.sleep(1.5)
    await stage.load.pause()
    async with stage.disturb("no way to Postgres for one dispatcher", aftermath=15):
        stage.line.becomes(stage.line.weather.like(black_hole=True))
        out = time.time() + LEASE
        await asyncio.sleep(LEASE)
        for name in stage.partners.names:
            await stage.partners.feel(name, WELL)
        await asyncio.sleep(4)
        await stage.until(stage.is_drained, 20, "the other takes over and delivers everything")
        await stage.recovered(at_most=2)
        theirs = [receipt for receipt in stage.partners.receipts() if receipt.via == cut_off.name]
        stage.line.becomes(stage.line.weather.like(black_hole=False))
        await asyncio.sleep(1.5)
    outlived = sum(receipt.began < out < receipt.ended for receipt in theirs)
    started = sum(receipt.began > out + 0.5 for receipt in theirs)
    stage.demand(outlived, "attempts were under way when the lease ran out")
    stage.demand(not started, f"without a lease it starts nothing, and started {started}")
    fenced = await cut_off.metric("sluicegate_fenced_total") - lost
    stage.demand(fenced >= 1, "it learns that its lanes are lost")
    stage.note = f"{outlived} attempts outlived the lease, {started} began after it"
    await stage.recovered()


@fault(10, "SIGTERM under load, every process in turn", Plan(gateways=2))
async def rolling_restart(stage: Stage) -> None:
    for program in stage.programs:
        status = await program.stop()
        stage.injected += 1
        stage.demand(status == 0, f"{program.name} ended with {status}")
        program.start()
        await program.ready()
        program.supervise()
    await stage.recovered()
    broken = sum(sent.status is not None and sent.status >= 500 for sent in stage.sent())
    stage.demand(broken == 0, f"{broken} senders were answered 5xx")
    await stage.load.end()
    stage.demand(not stage.sent_again(), "nothing is sent twice, for nothing was killed")


@fault(30, "a delivery that kills its dispatcher", ONE)
async def poison(stage: Stage) -> None:
    n = stage.load.number()
    await stage.partners.feel(KEEPER, Mood(only=n, status=500, how="holds"))
    stage.demand(await stage.load.send(n) is Said.OK, "it is accepted")
    seen = 0

    async def is_at_it_again() -> bool:
        return sum(r.n == n and r.partner == KEEPER for r in stage.partners.receipts()) > seen

    while seen < 4 and not await stage.dead_letters():
        if await stage.until(lambda: anything(is_at_it_again, stage), 20, "it is tried again or buried") and (
            await is_at_it_again()
        ):
            seen += 1
            async with stage.disturb("poison"):
                stage.dispatcher.kill()
                await stage.dispatcher.dies()
    buried = [letter["reason"] for letter in await stage.dead_letters()]
    stage.demand(buried == ["killed the dispatcher"], f"it is a dead letter that says so: {buried}")
    await stage.partners.feel(KEEPER, WELL)
    await stage.recovered()
    stage.note = f"buried after {seen} kills"


async def anything(probe: object, stage: Stage) -> bool:
    return bool(await probe() or await stage.dead_letters())  # type: ignore[operator]
