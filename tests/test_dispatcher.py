"""What the dispatcher promises, on a real Postgres."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
import pytest_asyncio

from outbox.event import Delivered, Delivery, Outcome, OutcomeKind, Pending, Refused, Retry
from outbox.intake_batch import IntakeBatch
from outbox.waking import Waker
from tests.house import House, Partner, house_on, until


@pytest_asyncio.fixture
async def house(dsn: str) -> AsyncIterator[House]:
    async with house_on(dsn) as house:
        yield house


async def test_what_was_accepted_is_delivered_and_owed_no_more(house: House) -> None:
    await house.destination("ledger")
    partner = Partner()
    async with house.dispatching(house.target("ledger", partner)):
        event = await house.accept("ledger")
        await house.drained()
    assert [delivery.event.id for delivery in partner.asked] == [event]
    assert await house.count("attempts") == 1


async def test_a_thousand_are_each_delivered_once(house: House) -> None:
    await house.destination("ledger")
    partner = Partner()
    events = set()
    async with house.dispatching(house.target("ledger", partner)):
        for _ in range(10):
            arrivals = [house.arrival("ledger") for _ in range(100)]
            answers = await house.outbox.add(arrivals, house.buckets())
            events |= {answer.event for answer in answers}
        await house.drained(20)
    assert len(partner.asked) == 1000
    assert {delivery.event.id for delivery in partner.asked} == events


async def test_a_retry_waits_and_counts_its_attempts(house: House) -> None:
    await house.destination("shaky")
    partner = Partner(lambda delivery: Retry("busy", status=503) if delivery.attempt < 3 else Delivered(status=200))
    async with house.dispatching(house.target("shaky", partner)):
        await house.accept("shaky")
        await house.drained()
    rows = await house.intake.fetch("SELECT number, outcome, status FROM attempts ORDER BY number")
    assert [tuple(row) for row in rows] == [(1, 3, 503), (2, 3, 503), (3, 0, 200)]


async def test_a_refusal_is_a_dead_letter_at_once(house: House) -> None:
    await house.destination("picky")
    partner = Partner(lambda _: Refused("400 Bad Request", status=400))
    async with house.dispatching(house.target("picky", partner)):
        await house.accept("picky")
        await house.drained()
    assert len(partner.asked) == 1
    assert await house.intake.fetchval("SELECT cause FROM dead_letters") == "picky:refused:400"


async def test_deliveries_of_one_subject_go_out_one_at_a_time_in_the_order_of_acceptance(house: House) -> None:
    """Also when some are tried again: none overtakes one that waits for its retry."""
    await house.destination("orders", shards=4)
    going_on: set[str] = set()
    overlaps: list[str] = []
    tried: set[object] = set()
    arrived: list[Delivery] = []

    async def now_and_then(delivery: Delivery) -> Outcome:
        subject = delivery.event.subject
        overlaps.extend({subject} & going_on)
        going_on.add(subject)
        await asyncio.sleep(0.002)
        going_on.discard(subject)
        if delivery.event.id.int % 5 == 0 and delivery.event.id not in tried:
            tried.add(delivery.event.id)
            return Retry("busy")
        arrived.append(delivery)
        return Delivered()

    accepted: dict[str, list] = {}
    async with house.dispatching(house.target("orders", Partner(now_and_then))):
        for n in range(120):
            subject = f"order/{n % 6}"
            accepted.setdefault(subject, []).append(await house.accept("orders", subject=subject, ordered=True))
        await house.drained(20)
    assert tried
    assert overlaps == []
    for subject, events in accepted.items():
        assert [d.event.id for d in arrived if d.event.subject == subject] == events


async def test_a_delivery_leaves_because_it_was_accepted_and_not_because_somebody_looked(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process by a call, from another one by a notification; no poll has its time in this test."""
    monkeypatch.setattr("outbox.dispatcher.LONGEST_IDLE", timedelta(seconds=60))
    monkeypatch.setattr("outbox.dispatcher.BEAT", timedelta(seconds=60))
    await house.destination("ledger")
    partner = Partner()
    async with house.dispatching(house.target("ledger", partner), lease=timedelta(seconds=60)) as dispatcher:
        await asyncio.sleep(0.3)
        waker = Waker(house.outbox)
        for here in (True, False):
            waker.dispatch_here(dispatcher.wake if here else lambda due: due)
            batch = IntakeBatch(house.outbox, buckets=house.buckets, wake=waker.wake, sizes=lambda _: None)
            before = len(partner.asked)
            await batch.add(house.arrival("ledger"))
            await until(lambda before=before: len(partner.asked) == before + 1, within=5)
            await batch.close()
        await waker.close()


async def test_a_dead_destination_does_not_slow_another(house: House) -> None:
    """As many leave in the time that the same took while it was alone, and some more for a busy machine."""
    await house.destination("dead")
    await house.destination("alive")

    async def never(_: Delivery) -> Outcome:
        await asyncio.sleep(60)
        return Delivered()

    async def took() -> float:
        before, began = len(alive.asked), time.monotonic()
        for _ in range(100):
            await house.accept("alive")
        await until(lambda: len(alive.asked) == before + 100, within=30)
        return time.monotonic() - began

    dead, alive = Partner(never), Partner()
    async with house.dispatching(house.target("dead", dead), house.target("alive", alive)) as dispatcher:
        alone = min([await took() for _ in range(3)])
        for _ in range(300):
            await house.accept("dead")
        beside = min([await took() for _ in range(3)])
        assert beside < 2 * alone + 0.2
        assert len(dead.asked) <= 8
        await dispatcher.stop(timedelta(0))


async def test_what_is_committed_late_is_found(house: House) -> None:
    """A producer whose transaction stays open while others overtake it."""
    await house.destination("ledger")
    partner = Partner()
    async with house.dispatching(house.target("ledger", partner)):
        lane = house.destinations["ledger"].lanes[0]
        late = house.arrival("ledger")
        async with house.intake.transaction() as connection:
            await connection.execute(
                "INSERT INTO events SELECT $1, 's', 't', NULL, NULL, now(), now(), NULL, 'p', 1, $1, ARRAY[$2::smallint], '{}'",
                late.event.id,
                house.destinations["ledger"].id,
            )
            await connection.execute(
                "INSERT INTO pending (event_id, lane, due_at, owed_since) VALUES ($1, $2, clock_timestamp(), clock_timestamp())",
                late.event.id,
                lane,
            )
            for _ in range(20):
                await house.accept("ledger")
            await until(lambda: len(partner.asked) == 20)
            await asyncio.sleep(1.5)  # a beat passes over it
        await house.drained(5)
    assert late.event.id in {delivery.event.id for delivery in partner.asked}


async def test_a_dispatcher_that_fails_by_a_bug_says_so_and_goes_on_when_it_is_over(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox.dispatcher.FAILED_JUST_NOW", timedelta(seconds=1.5))  # it tries again every second
    await house.destination("ledger")
    partner = Partner()
    async with house.dispatching(house.target("ledger", partner)) as dispatcher:
        assert dispatcher.alive
        await house.intake.execute("ALTER TABLE pending RENAME COLUMN attempts TO attempted")
        await until(lambda: not dispatcher.alive)
        await house.intake.execute("ALTER TABLE pending RENAME COLUMN attempted TO attempts")
        await house.accept("ledger")
        await house.drained()
        await until(lambda: dispatcher.alive)
    assert len(partner.asked) == 1


async def test_what_was_taken_and_not_finished_is_asked_for_and_not_sent_again(house: House) -> None:
    await house.destination("n8n")
    partner = Partner(lambda _: Pending(receipt="job-1", until=house.clock.now() + timedelta(milliseconds=50)))
    asked_after = 0

    async def lookup(delivery: Delivery) -> Outcome | None:
        nonlocal asked_after
        asked_after += 1
        return Delivered(receipt="job-1") if asked_after == 2 else Pending("job-1", house.clock.now())

    partner.lookup = lookup
    async with house.dispatching(house.target("n8n", partner)):
        await house.accept("n8n")
        await house.drained()
    assert (len(partner.asked), asked_after) == (1, 2)
    outcomes = await house.intake.fetch("SELECT outcome FROM attempts ORDER BY number")
    assert [row["outcome"] for row in outcomes] == [OutcomeKind.PENDING, OutcomeKind.PENDING, OutcomeKind.DELIVERED]


async def test_what_a_sender_was_told_to_bring_again_is_not_written_meanwhile(house: House) -> None:
    await house.destination("ledger")
    batch = IntakeBatch(house.outbox, buckets=house.buckets, wake=lambda _: None, sizes=lambda _: None, connections=1)
    async with house.intake.transaction() as connection:
        await connection.execute("LOCK TABLE events IN EXCLUSIVE MODE")
        first = asyncio.create_task(batch.add(house.arrival("ledger")))
        await asyncio.sleep(0.1)
        gone = asyncio.create_task(batch.add(house.arrival("ledger")))
        await asyncio.sleep(0.1)
        gone.cancel()
    await first
    await batch.close()
    assert await house.count("events") == 1
