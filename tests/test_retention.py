"""What is kept, what goes when its days are over, and that the books balance at each step."""

import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
import pytest_asyncio

from dead_letter.letters import DeadLetters, Select
from outbox import partitions
from outbox.destinations import Destinations
from outbox.event import Delivered, Delivery, Outcome, Refused
from outbox.records import Books, Records
from outbox.retention import Keep, Retention
from outbox.store import Seen
from tests.house import DAY, House, Partner, house_on, until
from tests.serving import order, partner, serving

KEEP = Keep(events=90 * DAY, dead_letters=30 * DAY, audit=2000 * DAY)


@pytest_asyncio.fixture
async def house(dsn: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    monkeypatch.setattr(partitions, "BREATH", timedelta(0))  # hundreds come and go here, beside nobody's traffic
    async with house_on(dsn) as house:
        yield house


async def kept(house: House) -> set[UUID]:
    rows = await house.intake.fetch("SELECT id FROM events UNION ALL SELECT id FROM carried_events")
    assert len({row["id"] for row in rows}) == len(rows), "an event is there twice"
    return {row["id"] for row in rows}


async def books(house: House) -> Books:
    books = await Records(house.intake).books()
    assert books.balanced, books.differences
    return books


async def test_what_is_still_owed_outlives_every_retention(house: House) -> None:
    for name in ("quick", "held", "picky"):
        await house.destination(name)
    mood = [Refused("400 Bad Request", status=400)]

    def moody(_: Delivery) -> Outcome:
        return mood[0]

    quick, held, picky = Partner(), Partner(), Partner(moody)
    holds, letters = Destinations(house.intake), DeadLetters(house.intake)
    await holds.hold("held", until=None, reason="their maintenance takes a year", by="anna")
    retention = Retention(house.intake, house.partitions, KEEP)
    async with house.dispatching(
        house.target("quick", quick), house.target("held", held), house.target("picky", picky)
    ):
        delivered = await house.accept("quick")
        unrouted = await house.accept()
        waiting = await house.accept("quick", "held")
        dead = await house.accept("picky")
        await until(lambda: len(quick.asked) == 2 and picky.asked)
        await until(lambda: one_dead(house))
        before = await books(house)
        assert (before.events.accepted, before.deliveries.owed) == (4, 4)

        later = house.clock.now() + 400 * DAY
        await house.partitions.ensure(later)
        went = await retention.run(later)
        assert any(name.startswith("events_") for name in went)
        assert await kept(house) == {waiting, dead}
        assert delivered not in await kept(house)
        assert unrouted not in await kept(house)
        after = await books(house)
        assert (after.deliveries.owed, after.deliveries.delivered) == (3, 1)
        assert (after.deliveries.held, after.deliveries.dead) == (1, 1)

        await holds.release("held", by="anna", reason="they are back")
        mood[0] = Delivered(status=200)
        await letters.replay(Select(events=(dead,)), reason="they are mended", actor="anna")
        await until(lambda: len(held.asked) == 1 and len(picky.asked) == 2)
        await house.drained()
        ended = await books(house)
        assert (ended.deliveries.owed, ended.deliveries.delivered) == (3, 3)
        record = await Records(house.intake).event(dead)
        assert record is not None
        assert [a.outcome for a in record.deliveries[0].attempts] == ["refused", "delivered"]

        await retention.run(later)
    assert await kept(house) == set()
    assert await house.count("carried_attempts") == 0
    assert (await books(house)).deliveries.owed == 0


async def one_dead(house: House) -> bool:
    return await house.count("dead_letters") == 1


async def test_a_discarded_dead_letter_stays_as_long_as_dead_letters_do(house: House) -> None:
    await house.destination("picky")
    letters, retention = DeadLetters(house.intake), Retention(house.intake, house.partitions, KEEP)
    async with house.dispatching(house.target("picky", Partner(lambda _: Refused("no", status=400)))):
        event = await house.accept("picky")
        await until(lambda: one_dead(house))
    await letters.discard(Select(events=(event,)), reason="ordered by telephone", actor="anna")
    late = house.clock.now() + 100 * DAY
    await house.partitions.ensure(late)
    await house.intake.execute("UPDATE discards SET at = $1", late - timedelta(days=5))
    await retention.run(late)
    assert await kept(house) == {event}
    assert (await books(house)).deliveries.discarded == 1
    await house.partitions.ensure(late + 60 * DAY)
    await retention.run(late + 60 * DAY)
    assert await kept(house) == set()
    assert (await books(house)).deliveries.discarded == 0


async def test_a_retention_that_was_cut_off_half_way_is_finished_by_the_next(house: House) -> None:
    await house.destination("quick")
    async with house.dispatching(house.target("quick", Partner())):
        await house.accept("quick")
        await house.drained()
    await house.accept("quick", wake=False)
    retention, late = Retention(house.intake, house.partitions, KEEP), house.clock.now() + 200 * DAY
    await house.partitions.ensure(late)
    for partition in await house.partitions.of("events"):
        if partition.begins <= house.clock.now() < partition.ends:
            await retention._carry_over(partition, late)
            await house.intake.execute(f"ALTER TABLE events DETACH PARTITION {partition.name} CONCURRENTLY")
    await books(house)
    await retention.run(late)
    assert len(await kept(house)) == 1
    assert [p for p in await house.partitions.of("attempts") if p.ends < late - KEEP.events] == []
    assert (await books(house)).deliveries.waiting == 1


async def test_a_day_that_is_over_is_proven_row_by_row(house: House) -> None:
    await house.destination("quick")
    await house.destination("slow")
    async with house.dispatching(house.target("quick", Partner())):
        for _ in range(5):
            await house.accept("quick")
        await until(house.is_drained)
        await house.accept("slow", wake=False)
    retention = Retention(house.intake, house.partitions, KEEP)
    assert await retention.prove(house.clock.now() + 2 * DAY) == []
    proof = await house.intake.fetchrow("SELECT events, owed, missing, surplus FROM proofs WHERE events > 0")
    assert tuple(proof) == (6, 6, 0, 0)


async def test_a_delivery_that_was_lost_is_found_by_the_proof_and_by_the_books(house: House) -> None:
    await house.destination("slow")
    event = await house.accept("slow", wake=False)
    await house.intake.execute("DELETE FROM pending WHERE event_id = $1", event)
    assert not (await Records(house.intake).books()).balanced
    retention = Retention(house.intake, house.partitions, KEEP)
    assert len(await retention.prove(house.clock.now() + 2 * DAY)) == 1


async def test_the_tally_is_rolled_up_and_says_the_same(house: House) -> None:
    await house.destination("quick")
    async with house.dispatching(house.target("quick", Partner())):
        for _ in range(120):
            await house.accept("quick")
        await house.drained()
    before = await house.count("tally")
    await Retention(house.intake, house.partitions, KEEP).roll_up()
    assert await house.count("tally") < before / 2
    assert (await books(house)).deliveries.delivered == 120


async def test_a_post_is_recognised_across_the_border_of_two_buckets_and_forgotten_after_both(house: House) -> None:
    same = house.arrival().same
    [first] = await house.outbox.add([house.arrival(same=same)], house.buckets())
    edge = (await house.partitions.of("dedup"))[-1].begins
    for at in (edge - timedelta(seconds=30), edge + timedelta(seconds=30), edge + timedelta(hours=1)):
        [again] = await house.outbox.add([house.arrival(same=same)], house.partitions.buckets(at))
        assert isinstance(again, Seen)
        assert again.event == first.event
    await house.partitions.ensure(edge + 8 * DAY)
    dropped = await house.partitions.drop_old_buckets(edge + 8 * DAY)
    assert len(dropped) == 2


async def test_a_clock_that_leaps_is_not_believed_for_two_days(house: House) -> None:
    """What ran yesterday made partitions for a week: a year without any is a clock, or a very long holiday."""
    now = house.clock.now()
    assert await house.partitions.leapt(now) is None
    later = now + 400 * DAY
    await house.partitions.ensure(later)
    assert await house.partitions.leapt(later) == timedelta(days=391)
    assert await house.partitions.leapt(later + 3 * DAY) is None
    assert await house.partitions.leapt(now) is None, "the clock was set right again"


async def test_while_the_two_clocks_disagree_nothing_is_dropped(dsn: str, tmp_path: Path) -> None:
    async with partner() as there, serving(tmp_path, dsn, there.address) as program:
        _, told = await program.post(order())
        service = program.service
        service.clock._offset = service.clock.seconds() - time.monotonic() + 400 * DAY.total_seconds()
        await service.partitions.ensure(service.clock.now())
        await service._drop_what_is_over()
        database = service._operators_database
        assert await database.fetchval("SELECT count(*) FROM events WHERE id = $1", UUID(told["id"])) == 1
        await service.clock.ask(database)
