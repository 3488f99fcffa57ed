"""Partners that are away, slow, wrong or hostile.  The others must not notice."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection

from chaos.faults import fault
from chaos.partner import WELL, Mood
from chaos.stage import FORGETFUL, IN_ORDER, KEEPER, Plan, Stage

OTHERS = (FORGETFUL, IN_ORDER)
MOST_GROWTH = 60 * 2**20


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


@fault("21b", "Retry-After of every kind: seconds, a date, negative, ten years, garbage", Plan(rate=10))
async def retry_after(stage: Stage) -> None:
    """Each alone, in its own time; none may stop the destination for ever, and none may be answered by a flood."""
    for value in ("1", "Wed, 21 Oct 2015 07:28:00 GMT", "-3", "+3", "1.5", "120junk", ""):
        for status in (429, 503):
            await while_it_feels(
                stage, Mood(status=status, headers={"Retry-After": value}, times=3), lambda: asyncio.sleep(0.6)
            )
    await stage.recovered()
    before = len(stage.partners.receipts())
    await while_it_feels(
        stage, Mood(status=429, headers={"Retry-After": "315360000"}, times=1), lambda: asyncio.sleep(1.5)
    )
    asked = sum(r.partner == KEEPER for r in stage.partners.receipts()[before:])
    standing = await stage.destination(KEEPER)
    stage.demand(asked < 30, "one that says ten years is left alone")
    stage.note = f"ten years: {standing['not_before_hours']:.0f} h at most"
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
    stage.demand(not await stage.dead_letters(), "what may have happened is sent again with the same key")


@fault("22b", "a black hole between the program and its partners", Plan(partners_proxied=True))
async def black_hole(stage: Stage) -> None:
    async with stage.disturb("black hole", aftermath=5):
        stage.partners_line.becomes(stage.partners_line.weather.like(black_hole=True))
        await asyncio.sleep(7)
        stage.partners_line.becomes(stage.partners_line.weather.like(black_hole=False))
    await stage.recovered()


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


@fault("28", "a partner that does not let us in any more, and then does")
async def locked_out(stage: Stage) -> None:
    """Held after a second no, without burning tries; it ends by itself."""

    async def meanwhile() -> None:
        async def is_held() -> bool:
            return bool((await stage.destination(KEEPER))["held"])

        await stage.until(is_held, 15, "the destination is held")
        await others_go_on(stage)
        before = len(stage.partners.receipts())
        await asyncio.sleep(3)
        asked = sum(r.partner == KEEPER for r in stage.partners.receipts()[before:])
        stage.demand(asked <= 3, f"one that is held is not asked, and was asked {asked} times")

    await while_it_feels(stage, Mood(status=401), meanwhile)
    status, _ = await stage.api("POST", f"/destinations/{KEEPER}/release", {"reason": "the new key is in place"})
    stage.demand(status == 200, f"release: {status}")
    await stage.recovered()
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
        stage.demand(took < max(1, 2 * before), f"the others do not notice: {before:.2f} → {took:.2f} s")
        stage.note = f"{tried} tries in 5 s; others in {before:.2f} → {took:.2f} s"

    await while_it_feels(stage, Mood(status=503), meanwhile)
    await stage.load.pause()  # until it has what it missed: a machine that others work on may take no more than this
    await stage.recovered()
    stage.demand(not await stage.dead_letters(), "none is given up")


async def median_time_of_others(stage: Stage) -> float:
    return sorted([await stage.recovered(without={KEEPER}) for _ in range(5)])[2]


@fault("34", "it comes back and can take 20 a second", Plan(rate=10))
async def herd(stage: Stage) -> None:
    await while_it_feels(stage, Mood(status=503), lambda: asyncio.sleep(15))
    await while_it_feels(stage, Mood(per_second=20), lambda: asyncio.sleep(15))
    arrived: dict[int, int] = {}
    for receipt in stage.partners.receipts():
        if receipt.partner == KEEPER:
            arrived[int(receipt.began)] = arrived.get(int(receipt.began), 0) + 1
    most = max(list(arrived.values())[-14:])
    stage.demand(most < 150, f"it ramps up, and does not send {most} in one second")
    stage.note = f"{most} in its worst second"
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
