"""What happens to Postgres, and to the way there."""

import asyncio
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import asyncpg

from chaos.faults import fault
from chaos.ledger import Said
from chaos.load import order, signed
from chaos.postgres import why_no_file_system
from chaos.program import Program
from chaos.stage import Plan, Stage

PROXIED = Plan(proxied=("gateway", "dispatcher"))
TIMES = 2
ROOM = 192  # MiB for a whole cluster


@fault(3, "the answer to a commit is lost", Plan(proxied=("gateway",)))
async def lost_answer(stage: Stage) -> None:
    async with stage.disturb("cut"):
        stage.line.becomes(stage.line.weather.like(cut_after=b"shop.order.paid", times=8))
        await stage.until(lambda: nothing_left_to_cut(stage), 20, "eight commits lose their answers")
    stage.injected = stage.line.cuts
    await stage.recovered()
    await stage.load.end()
    sent = stage.sent()
    doubtful = {line.n for line in sent if line.said is Said.UNKNOWN}
    told_again = {line.n for line in sent if line.duplicate}
    stage.demand(all(line.status in {None, 503} for line in sent if line.said is Said.UNKNOWN), "it says 503, no other")
    stage.demand(doubtful & told_again, "what was stored all the same is recognised")
    stage.note = f"{len(doubtful)} answered 503, {len(told_again)} of them were stored and recognised"


async def nothing_left_to_cut(stage: Stage) -> bool:
    return stage.line.weather.times == 0


@fault("11a", "Postgres restarts, fast")
async def restarts_fast(stage: Stage) -> None:
    await restarts(stage, signal.SIGINT)


@fault("11b", "Postgres restarts, immediate")
async def restarts_immediately(stage: Stage) -> None:
    await restarts(stage, signal.SIGQUIT)


@fault("11c", "kill -9 of Postgres")
async def killed(stage: Stage) -> None:
    await restarts(stage, signal.SIGKILL)


@fault("11d", "kill -9 of one backend, so that Postgres recovers")
async def backend_killed(stage: Stage) -> None:
    chance = random.Random(stage.seed)
    for _ in range(TIMES):
        await asyncio.sleep(1)
        async with stage.disturb("backend", aftermath=5):
            stage.postgres.kill_a_backend(chance.choice)
            await asyncio.sleep(0.1)
            await stage.postgres.back()
        await stage.recovered(at_most=5)


async def restarts(stage: Stage, number: signal.Signals) -> None:
    for _ in range(TIMES):
        await asyncio.sleep(1)
        async with stage.disturb(number.name, aftermath=5):
            stage.postgres.send_signal(number, only_first=True)
            await asyncio.sleep(0.1)
            await stage.postgres.back()
        await stage.recovered(at_most=5)


@fault("11e", "Postgres is away for longer than a lease")
async def away(stage: Stage) -> None:
    async with stage.disturb("away", aftermath=5):
        async with stage.postgres.away():
            await asyncio.sleep(12)
            await says_unavailable(stage)
        await stage.postgres.back()
    await stage.recovered(at_most=5)


@fault(12, "Postgres frozen: every process of it stopped")
async def frozen(stage: Stage) -> None:
    async with stage.disturb("frozen", aftermath=5):
        async with stage.postgres.frozen():
            await asyncio.sleep(1)
            await says_unavailable(stage)
            await is_not_ready(stage)
            await asyncio.sleep(4)
        await stage.postgres.back()
    await stage.recovered(at_most=5)


@fault(13, "a black hole between the program and Postgres", PROXIED)
async def black_hole(stage: Stage) -> None:
    async with stage.disturb("black hole", aftermath=5):
        stage.line.becomes(stage.line.weather.like(black_hole=True))
        await asyncio.sleep(1)
        await says_unavailable(stage)
        await is_not_ready(stage)
        await asyncio.sleep(4)
        stage.line.becomes(stage.line.weather.like(black_hole=False))
    await stage.recovered(at_most=5)


@fault("13b", "every connection to Postgres is reset at once", PROXIED)
async def all_reset(stage: Stage) -> None:
    for _ in range(10):
        async with stage.disturb("reset", aftermath=3):
            stage.line.reset_all()
        await asyncio.sleep(0.5)
    await stage.recovered(at_most=5)


async def says_unavailable(stage: Stage) -> None:
    """A 503 with Retry-After in time; never yes, never a hang."""
    n = stage.load.number()
    body = order(n)
    began = time.monotonic()
    sent = await stage.load.post(n, body, headers=signed(body, id=stage.load.id_of(n)))
    took = time.monotonic() - began
    stage.demand(sent.status == 503, f"a post is answered 503, not {sent.status}")
    stage.demand(stage.in_time(took, 3.5), f"in 3 s, not in {took:.1f}")
    stage.note = f"503 in {took:.1f} s"


async def is_not_ready(stage: Stage) -> None:
    began = time.monotonic()
    while await stage.gateway.is_ready() and time.monotonic() - began < 6:
        await asyncio.sleep(0.1)
    took = time.monotonic() - began
    stage.demand(stage.in_time(took, 5), f"/ready says so within 5 s, not {took:.1f}")


@fault(14, "the disk of Postgres is full", Plan(tmpfs=ROOM, rate=60), why_not=why_no_file_system)
async def disk_full(stage: Stage) -> None:
    place = Path(stage.postgres.folder)
    stone = place / "stone"
    async with stage.disturb("disk full", aftermath=8):
        fill(stone)
        began = time.monotonic()
        while time.monotonic() - began < 25 and not [s for s in stage.sent() if s.status == 503]:
            fill(stone)
            await asyncio.sleep(0.5)
        await asyncio.sleep(2)
        answered = {sent.status for sent in stage.sent()[-20:]}
        stone.unlink()
        await stage.postgres.back()
    stage.demand(answered <= {503, None, 202}, f"senders hear 503 and nothing worse: {answered}")
    stage.demand(503 in {sent.status for sent in stage.sent()}, "senders hear 503")
    await stage.recovered(at_most=10)


def fill(stone: Path) -> None:
    """What is left of the disk, to the last byte."""
    with suppress(OSError), stone.open("ab", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


@fault(15, "no connection to Postgres is to be had")
async def no_connections(stage: Stage) -> None:
    name = stage.database
    async with stage.disturb("no connections", aftermath=5):
        await stage.postgres.order("ALTER ROLE sluicegate CONNECTION LIMIT 0")
        await stage.postgres.order(
            f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = '{name}'"
        )
        await asyncio.sleep(1)
        await says_unavailable(stage)
        await asyncio.sleep(3)
        await stage.postgres.order("ALTER ROLE sluicegate CONNECTION LIMIT -1")
    await stage.recovered(at_most=5)


@fault(16, "Postgres answers 200 ms later", Plan(proxied=("gateway", "dispatcher"), rate=50))
async def slow(stage: Stage) -> None:
    stage.injected += 1
    stage.line.becomes(stage.line.weather.like(delay=0.1))  # each way
    began = time.time()
    await asyncio.sleep(10)
    took = sorted(seconds for at, seconds in stage.load.took if at > began)
    stage.line.becomes(stage.line.weather.like(delay=0.0))
    await stage.recovered()
    p99 = took[int(len(took) * 0.99)] if took else float("inf")
    stage.demand(len(took) > 300, f"the same number is taken in the same time, not {len(took)}")
    stage.demand(stage.in_time(p99, 2), f"p99 {p99:.2f} s: slower, and no collapse")
    stage.note = f"p99 {p99 * 1000:.0f} ms meanwhile"


@fault(18, "deadlocks and locks of other sessions")
async def deadlocks(stage: Stage) -> None:
    """Somebody locks in the wrong order, again and again: whoever is the victim, nothing is lost."""
    until = time.monotonic() + 8
    chance = random.Random(stage.seed)
    while time.monotonic() < until:
        connection = await asyncpg.connect(stage.dsn)
        try:
            with suppress(asyncpg.PostgresError):
                async with connection.transaction(), stage.disturb("locks", aftermath=2):
                    await connection.execute("SET LOCAL lock_timeout = '3s'")
                    await connection.execute("SELECT FROM sluicegate.pending LIMIT 50 FOR UPDATE")
                    await asyncio.sleep(chance.uniform(0.05, 0.3))
                    await connection.execute("SELECT FROM sluicegate.lanes FOR UPDATE")
                    await connection.execute("LOCK TABLE sluicegate.dedup IN SHARE ROW EXCLUSIVE MODE")
                    await asyncio.sleep(chance.uniform(0.05, 0.3))
        finally:
            await connection.close()
    await stage.recovered()


@fault(19, "the line on which a dispatcher lives and listens is cut")
async def no_listening(stage: Stage) -> None:
    for _ in range(5):
        async with stage.disturb("presence", aftermath=4):
            await stage.postgres.order(
                """
                SELECT count(pg_terminate_backend(pid))
                  FROM pg_locks
                 WHERE locktype = 'advisory' AND classid = 20928
                   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                """,
                database=stage.database,
            )
        await stage.recovered(at_most=3)


@fault("20a", "the clock of the program is an hour ahead", Plan(dispatchers=1))
async def an_hour_ahead(stage: Stage) -> None:
    await wrong_clock(stage, 3600)


@fault("20b", "the clock of the program is an hour behind", Plan(dispatchers=1))
async def an_hour_behind(stage: Stage) -> None:
    await wrong_clock(stage, -3600)


async def wrong_clock(stage: Stage, seconds: int) -> None:
    """It jumps while the program runs: what is signed is judged by it, nothing else is, and somebody is told."""
    clock = stage.folder / "clock"
    clock.write_text("0")
    for program in stage.programs:
        program.set_environ(CHAOS_CLOCK=str(clock), PYTHONPATH=str(Path(__file__).parent.parent / "clock"))
    await asyncio.gather(*(program.again() for program in stage.programs))
    await asyncio.gather(*(program.ready() for program in stage.programs))
    await stage.recovered()
    stage.injected += 1
    clock.write_text(str(seconds))
    n = stage.load.number()
    body = order(n)
    sent = await stage.load.post(n, body, headers=signed(body, id=stage.load.id_of(n)))
    stage.demand(sent.said is Said.REFUSED, f"what cannot be judged is refused, not {sent.status}")
    again = stage.load.number()
    body = order(again)
    sent = await stage.load.post(
        again, body, headers=signed(body, id=stage.load.id_of(again), at=time.time() + seconds)
    )
    stage.demand(sent.said is Said.OK, f"what is fresh by that clock is taken, not {sent.status}")
    for name in sorted(stage.partners.names):
        await stage.until(lambda name=name: stage.partners.has(name, again), 5, f"it is delivered to {name}")  # type: ignore[misc]
    for program in stage.programs:
        await stage.until(lambda program=program: tells_of_clock(program, seconds), 60, f"{program.name} tells of it")  # type: ignore[misc]
    clock.write_text("0")
    await stage.recovered()
    [when] = await stored_times(stage, again)
    stage.demand(abs(when - time.time()) < 60, "its id and its times are those of the database's clock")


async def tells_of_clock(program: Program, seconds: int) -> bool:
    """By its metric, which is what is to be added to its clock, and as an alarm."""
    offset = await program.metric("sluicegate_clock_offset_seconds")
    return abs(offset + seconds) < 60 and '"clock.skewed"' in program.said()


async def stored_times(stage: Stage, n: int) -> list[float]:
    connection = await asyncpg.connect(stage.dsn)
    try:
        rows = await connection.fetch(
            """
            SELECT extract(epoch FROM sluicegate.event_at(id))::float8 AS at
              FROM sluicegate.events
             WHERE (data ->> 'id')::bigint = $1
            """,
            n,
        )
    finally:
        await connection.close()
    return [row["at"] for row in rows]
