"""Partners that are away, slow, wrong or hostile.  The others must not notice."""

import asyncio
import signal
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median

import asyncpg

from chaos.faults import fault
from chaos.faults.elsewhere import aside, send_aside
from chaos.ledger import Receipt, Said
from chaos.load import OTHER_SECRET
from chaos.partner import WELL, Mood
from chaos.stage import FORGETFUL, IN_ORDER, KEEPER, Plan, Stage

OTHERS = (FORGETFUL, IN_ORDER)
MOST_GROWTH = 60 * 2**20
DEADLINE = 3.0  # seconds of an attempt, as the destinations are configured
LONGEST_HOLD = 20.0  # seconds, of a second one
CAPACITY = 20  # a second
AT_ONCE = 8  # attempts at one destination, as it is by default


async def while_it_feels(
    stage: Stage, mood: Mood, deed: Callable[[], Awaitable[object]], *, names: Collection[str] = (KEEPER,)
) -> None:
    """A repeat that the partner itself caused, by taking and not saying so, is one that was in flight."""
    async with stage.disturb(f"{mood.status} {mood.how}", aftermath=3):
        for name in names:
            await stage.partners.feel(name, mood)
        await deed()
        for name in names:
            await stage.partners.feel(name, WELL)


async def others_go_on(stage: Stage, within: float = 2) -> None:
    took = await stage.recovered(without={KEEPER})
    stage.demand(stage.in_time(took, within), f"the others get theirs within {within:g} s, not {took:.1f}")


@fault("21a", "a partner that answers 500")
async def broken(stage: Stage) -> None:
    async def meanwhile() -> None:
        await asyncio.sleep(4)
        await others_go_on(stage)

    await while_it_feels(stage, Mood(status=500), meanwhile)
    await stage.recovered()
    stage.demand(not await stage.dead_letters(), "none is given up before its time")


async def asked_in(stage: Stage, seconds: float) -> int:
    """How often the keeper is asked in that time."""
    before = len(keepers(stage))
    await asyncio.sleep(seconds)
    return len(keepers(stage)) - before


def keepers(stage: Stage) -> list[Receipt]:
    return [receipt for receipt in stage.partners.receipts() if receipt.partner == KEEPER]


@fault("21b", "Retry-After of every kind: seconds, a date, negative, ten years, garbage", Plan(rate=10))
async def retry_after(stage: Stage) -> None:
    """Each alone, in its own time; none may stop the destination for ever, and none may be answered by a flood."""
    for value in ("1", "Wed, 21 Oct 2015 07:28:00 GMT", "-3", "+3", "1.5", "120junk", ""):
        for status in (429, 503):
            await while_it_feels(
                stage, Mood(status=status, headers={"Retry-After": value}, times=3), lambda: asyncio.sleep(0.6)
            )
    await stage.recovered()
    usual = await asked_in(stage, 3)
    slowed = 0

    async def meanwhile() -> None:
        nonlocal slowed
        await asyncio.sleep(0.5)  # what was in flight
        slowed = await asked_in(stage, 3)

    await while_it_feels(stage, Mood(status=429, headers={"Retry-After": "1"}), meanwhile)
    stage.demand(slowed <= usual / 2, f"429 slows it down: {usual} tries in 3 s, and then {slowed}")
    await stage.recovered()
    before = len(stage.partners.receipts())
    await while_it_feels(
        stage, Mood(status=429, headers={"Retry-After": "315360000"}, times=1), lambda: asyncio.sleep(1.5)
    )
    asked = sum(r.partner == KEEPER for r in stage.partners.receipts()[before:])
    standing = await stage.destination(KEEPER)
    stage.demand(asked <= 5, f"one that says ten years is left alone, and was asked {asked} times")
    stage.note = f"429: {usual} → {slowed} tries in 3 s; ten years: {standing['not_before_hours']:.0f} h at most"
    stage.demand(0 < standing["not_before_hours"] <= 24.1, "and for a day at most")
    stage.undelivered.add(KEEPER)
    await others_go_on(stage)


@fault("22a", "a partner that takes a request and never answers")
async def silent(stage: Stage) -> None:
    async def meanwhile() -> None:
        await asyncio.sleep(7)
        await others_go_on(stage)

    await while_it_feels(stage, Mood(how="holds"), meanwhile)
    await stage.recovered()
    longest = max(r.ended - r.began for r in keepers(stage) if r.status is None)
    stage.demand(stage.in_time(longest, DEADLINE * 1.05), f"an attempt ends after {DEADLINE:g} s, not {longest:.2f}")
    stage.demand(not await stage.dead_letters(), "what may have happened is sent again with the same key")


@fault(
    "22b",
    "a black hole between the program and its partners",
    Plan(
        partners_proxied=True,
        routes=aside(["unconnected", "speechless"]),
        destinations="""  unconnected: {connector: http, url: "https://127.0.0.1:SPARE1/", MANNERS}
  speechless: {connector: http, url: "https://127.0.0.1:SPARE2/", MANNERS}""",
    ),
)
async def black_hole(stage: Stage) -> None:
    """At each stage: for one that is to be connected to, one that has to say hello, and all that are connected."""
    await hangs_before_the_request(stage)
    async with stage.disturb("black hole", aftermath=5):
        stage.partners_line.becomes(stage.partners_line.weather.like(black_hole=True))
        await asyncio.sleep(7)
        stage.partners_line.becomes(stage.partners_line.weather.like(black_hole=False))
    await stage.recovered()
    stage.demand(not await stage.dead_letters(), "none is given up")


async def hangs_before_the_request(stage: Stage) -> None:
    """At TCP, where a queue is full, and at TLS: the deadline is that of the whole attempt."""
    took: list[float] = []

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        began = time.monotonic()
        while await reader.read(65536):
            pass
        took.append(time.monotonic() - began)
        writer.close()

    stage.injected += 2
    server = await asyncio.start_server(say_nothing, "127.0.0.1", stage.spare[1])
    with full_queue(stage.spare[0]):
        for _ in range(3):
            stage.demand((await send_aside(stage)).said is Said.OK, "it is accepted")
        for name in ("unconnected", "speechless"):
            await stage.until(lambda name=name: attempts_at(stage, name), 15, f"{name}: attempts end")  # type: ignore[misc]
            lasted = await attempts_at(stage, name)
            stage.demand(min(lasted) > 1, f"{name}: they hang: {lasted}")
            stage.demand(
                stage.in_time(max(lasted), DEADLINE * 1.05), f"{name}: they end after {DEADLINE:g} s: {lasted}"
            )
        await stage.recovered(at_most=2)
    server.close()
    stage.undelivered |= {"unconnected", "speechless"}
    stage.demand(took and stage.in_time(max(took), DEADLINE * 1.05), f"each hangs up after {DEADLINE:g} s: {took}")


@contextmanager
def full_queue(port: int) -> Iterator[None]:
    """Whoever connects there now gets no answer at all."""
    with socket.socket() as listening, ExitStack() as queued:
        listening.bind(("127.0.0.1", port))
        listening.listen(0)
        for _ in range(3):
            waiting = queued.enter_context(socket.socket())
            waiting.settimeout(0)
            waiting.connect_ex(("127.0.0.1", port))
        yield


async def attempts_at(stage: Stage, name: str) -> list[float]:
    """How many seconds each of them took."""
    connection = await asyncpg.connect(stage.dsn, timeout=5)
    try:
        rows = await connection.fetch(
            """
            SELECT a.took_ms
              FROM sluicegate.attempts AS a
              JOIN sluicegate.destinations AS d ON d.id = a.destination
             WHERE d.name = $1
            """,
            name,
        )
    finally:
        await connection.close(timeout=2)
    return [row["took_ms"] / 1000 for row in rows]


@fault("23a", "an answer of one byte a second")
async def drips(stage: Stage) -> None:
    await bounded(stage, Mood(how="drips"))


@fault("23b", "an answer that never ends")
async def never_ends(stage: Stage) -> None:
    await bounded(stage, Mood(how="never ends", times=40))


@fault("23c", "a gzip bomb as an answer")
async def bombs(stage: Stage) -> None:
    await bounded(stage, Mood(how="bombs", times=40))


async def bounded(stage: Stage, mood: Mood) -> None:
    before = stage.memory(stage.dispatchers)

    async def meanwhile() -> None:
        await asyncio.sleep(6)
        await others_go_on(stage)

    await while_it_feels(stage, mood, meanwhile)
    await stage.recovered()
    growth = stage.memory(stage.dispatchers) - before
    stage.demand(growth < MOST_GROWTH, f"memory is flat, and grew by {growth >> 20} MiB")
    stage.note = f"{growth / 2**20:+.0f} MiB"


@fault("24a", "an answer that stops half-way, then a reset")
async def half_way(stage: Stage) -> None:
    await while_it_feels(stage, Mood(how="stops half-way", times=60), lambda: asyncio.sleep(4))
    await stage.recovered()
    stage.demand(not await stage.dead_letters(), "a partner that keeps keys is asked again")


@fault("24b", "a reset instead of an answer")
async def resets(stage: Stage) -> None:
    await while_it_feels(stage, Mood(how="resets", times=60), lambda: asyncio.sleep(4))
    await stage.recovered()
    stage.demand(not await stage.dead_letters(), "a partner that keeps keys is asked again")


@fault("26", "a redirect to the address that hands out a cloud's credentials")
async def redirect(stage: Stage) -> None:
    moved = Mood(status=302, headers={"Location": "http://169.254.169.254/latest/meta-data/"}, times=20)
    await while_it_feels(stage, moved, lambda: asyncio.sleep(2))
    await stage.recovered()
    letters = await stage.dead_letters()
    stage.demand(len(letters) == 20, f"the 20 are dead letters, not {len(letters)}")
    stage.demand(all("redirect is not followed" in letter["reason"] for letter in letters), "that say why")
    stage.note = f"{len(letters)} dead letters, none followed"


@fault("28", "a partner that does not let us in any more, and then does", Plan(dispatchers=1))
async def locked_out(stage: Stage) -> None:
    """Held after a second no, without burning tries; with the new secret in place it ends by itself."""

    async def is_held() -> bool:
        return bool((await stage.destination(KEEPER))["held"])

    async with stage.disturb("another secret"):
        await stage.partners.feel(KEEPER, Mood(secret=OTHER_SECRET))
        await stage.until(is_held, 15, "the destination is held")
        await others_go_on(stage)
        asked = await asked_in(stage, 3)
        stage.demand(asked <= 3, f"one that is held is not asked, and was asked {asked} times")
        stage.demand(not await stage.burned({KEEPER}), "no try is burned")
        stage.dispatcher.reconfigure("env:OUT_SECRET", "env:OTHER_SECRET")
        stage.dispatcher.send_signal(signal.SIGHUP)
        took = await stage.recovered(at_most=LONGEST_HOLD)
        stage.note = f"by itself after {took:.0f} s"
        stage.demand(not await stage.dead_letters(), "none is given up")


@fault("29", "410 Gone")
async def gone(stage: Stage) -> None:
    async def meanwhile() -> None:
        async def is_held() -> bool:
            return bool((await stage.destination(KEEPER))["held"])

        await stage.until(is_held, 15, "the destination is held, and an operator told")
        await others_go_on(stage)

    await while_it_feels(stage, Mood(status=410), meanwhile)
    await stage.api("POST", f"/destinations/{KEEPER}/release", {"reason": "it was a mistake of theirs"})
    await stage.recovered()
    stage.demand(not await stage.dead_letters(), "none is given up")


@fault("33", "one partner dead for a while, the others well", Plan(rate=60))
async def one_dead(stage: Stage) -> None:
    """What the others need is compared with what they needed before: a machine that is busy is so all the time."""
    before = await median_time_of_others(stage)

    async def meanwhile() -> None:
        await asyncio.sleep(12)
        tried = sum(r.partner == KEEPER and r.began > time.time() - 5 for r in stage.partners.receipts())
        stage.demand(tried < 60, f"its breaker is open: {tried} tries in 5 s")
        took = await median_time_of_others(stage)
        stage.demand(stage.in_time(took, 1.2 * before + 0.1), f"the others do not notice: {before:.2f} → {took:.2f} s")
        stage.note = f"{tried} tries in 5 s; others in {before:.2f} → {took:.2f} s"

    await while_it_feels(stage, Mood(status=503), meanwhile)
    await stage.load.pause()  # until it has what it missed: a machine that others work on may take no more than this
    await stage.recovered()
    stage.demand(not await stage.dead_letters(), "none is given up")


async def median_time_of_others(stage: Stage) -> float:
    return median([await stage.recovered(without={KEEPER}) for _ in range(15)])


@fault("34", "it comes back and can take 20 a second", Plan(rate=10))
async def herd(stage: Stage) -> None:
    await while_it_feels(stage, Mood(status=503), lambda: asyncio.sleep(15))
    began = time.time()
    await while_it_feels(stage, Mood(per_second=CAPACITY), lambda: asyncio.sleep(15))
    whole_seconds = range(int(began) + 1, int(began) + 15)
    asked = Counter(int(r.began) for r in keepers(stage) if int(r.began) in whole_seconds)
    taken = sum(r.taken for r in keepers(stage) if int(r.began) in whole_seconds)
    most, per_second = max(asked.values()), taken / len(whole_seconds)
    stage.demand(most <= CAPACITY + AT_ONCE, f"no more than is in flight comes on top, and not {most} in one second")
    stage.demand(per_second >= CAPACITY / 2, f"it is put to use: {per_second:.1f}/s are taken")
    stage.note = f"{most} in its worst second, {per_second:.1f}/s taken"
    await stage.recovered()


@fault("35", "all partners down")
async def all_down(stage: Stage) -> None:
    async def meanwhile() -> None:
        await asyncio.sleep(6)
        began = time.time()
        await asyncio.sleep(2)
        took = sorted(seconds for at, seconds in stage.load.took if at > began)
        stage.demand(len(took) > 30, f"intake goes on: {len(took)} in 2 s")

    await while_it_feels(stage, Mood(status=503), meanwhile, names=sorted(stage.partners.names))
    await stage.recovered()


@fault("36", "the same webhook fifty times at once", Plan(gateways=2))
async def fifty_at_once(stage: Stage) -> None:
    ids = set()
    for _ in range(5):
        n = stage.load.number()
        stage.injected += 50
        said = await asyncio.gather(*(stage.load.send(n) for _ in range(50)))
        stage.demand(len(said) == 50, "all are answered")
        ids |= {(s.n, s.event) for s in stage.sent() if s.n == n and s.event}
    stage.demand(len(ids) == 5, f"each has one id: {len(ids)}")
    await stage.recovered()
