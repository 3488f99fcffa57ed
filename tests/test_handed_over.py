"""What a process stores, its own dispatcher delivers without reading it, where nothing is lost, doubled or overtaken by that."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
import pytest_asyncio
from msgspec.structs import replace

from outbox.event import Delivered
from outbox.lanes import BEGINNING, LOWEST, OwnedLane
from outbox.store import Lane, Reading, Stored, Taken
from tests.house import House, Partner, house_on, until


@pytest_asyncio.fixture
async def house(dsn: str) -> AsyncIterator[House]:
    async with house_on(dsn) as house:
        await house.destination("ledger")
        yield house


async def stored(house: House, *, times: int = 1, **attributes) -> list[Taken]:
    """As they would have been handed over, had somebody been there to take them."""
    handed: list[Taken] = []

    def note(fresh: Taken) -> bool:
        handed.append(fresh)
        return False

    house.outbox.hand_over_to(note)
    await house.outbox.add([house.arrival("ledger", **attributes) for _ in range(times)], house.buckets())
    return handed


async def test_it_is_what_a_read_would_have_brought(house: House) -> None:
    data = '{"amount":"42.50","lines":["a","b"],"open":true,"n":7}'
    handed = await stored(house, times=3, data=data, give_up=timedelta(seconds=90.4))
    lane = house.destinations["ledger"].lanes[0]
    read = await house.outbox.read([Reading(lane=lane, due_at=BEGINNING, event=LOWEST, room=10)])
    assert all(abs(row.owed_since - row.due_at) < timedelta(milliseconds=5) for row in read)
    assert [replace(row, owed_since=row.due_at) for row in read] == sorted(handed, key=lambda fresh: fresh.due_at)


async def test_nobody_is_woken_for_it_and_it_is_delivered_and_settled_all_the_same(house: House) -> None:
    partner = Partner()
    async with house.dispatching(house.target("ledger", partner)) as dispatcher:
        await asyncio.sleep(0.3)
        house.outbox.hand_over_to(dispatcher.take)
        answers = []
        for _ in range(50):
            answers += await house.outbox.add([house.arrival("ledger") for _ in range(4)], house.buckets())
        await house.drained()
    assert [delivery.event.id for delivery in partner.asked].count(answers[0].event) == 1
    assert {delivery.event.id for delivery in partner.asked} == {answer.event for answer in answers}
    assert len(partner.asked) == 200 == await house.count("attempts")
    woken = [answer for answer in answers if isinstance(answer, Stored) and answer.due_at is not None]
    assert len(woken) < 100  # those that came while the lane was read


async def test_what_was_read_and_delivered_before_word_of_it_came_is_not_delivered_again(house: House) -> None:
    partner = Partner()
    async with house.dispatching(house.target("ledger", partner)) as dispatcher:
        [fresh] = await stored(house)
        dispatcher.wake({fresh.lane: fresh.due_at})  # as a poll, or another process, might
        await house.drained()
        for _ in range(25):  # over two sweeps, which read from before it again
            assert not dispatcher.take(fresh)
            await asyncio.sleep(0.1)
    assert len(partner.asked) == 1


async def test_what_an_owner_before_delivered_is_not_delivered_again_when_word_of_it_comes_late(house: House) -> None:
    [fresh] = await stored(house)
    before, after = Partner(), Partner()
    async with house.dispatching(house.target("ledger", before)):
        await house.drained()
    async with house.dispatching(house.target("ledger", after)) as dispatcher:
        await until(lambda: fresh.lane in dispatcher._lanes and not dispatcher._lanes[fresh.lane].dirty)
        assert not dispatcher.take(fresh)
    assert (len(before.asked), len(after.asked)) == (1, 0)


async def test_what_is_in_order_is_read(house: House) -> None:
    """Else it would come before what another process stored of its subject a moment ago."""
    partner = Partner()
    async with house.dispatching(house.target("ledger", partner)) as dispatcher:
        await asyncio.sleep(0.3)
        [before, fresh] = [*await stored(house, ordered=True), *await stored(house, ordered=True)]
        assert not dispatcher.take(fresh)
        dispatcher.wake({fresh.lane: fresh.due_at})
        await house.drained()
    assert [delivery.event.id for delivery in partner.asked] == [before.event_id, fresh.event_id]


async def test_what_is_held_is_not_taken(house: House) -> None:
    partner = Partner()
    async with house.dispatching(house.target("ledger", partner)) as dispatcher:
        await house.intake.execute("UPDATE destinations SET held_until = 'infinity', held_by = 'me', held_reason = 'r'")
        dispatcher._heard_of_destinations()
        await until(lambda: dispatcher._gates[house.destinations["ledger"].id].held(house.clock.now()))
        [fresh] = await stored(house)
        dispatcher._lanes[fresh.lane].dirty = False  # as it is until it is polled: nothing but the hold forbids it
        assert not dispatcher.take(fresh)
        await asyncio.sleep(0.2)
        assert partner.asked == []
        await house.intake.execute("UPDATE destinations SET held_until = NULL, held_by = NULL, held_reason = NULL")
        dispatcher._heard_of_destinations()
        await house.drained()
    assert len(partner.asked) == 1


async def test_a_lane_of_somebody_else_is_left_to_its_owner(house: House) -> None:
    async with house.dispatching() as dispatcher:
        [fresh] = await stored(house)
        assert not dispatcher.take(fresh)


@pytest.mark.parametrize("state", ["dirty", "leaving", "careful", "full"])
async def test_a_lane_takes_nothing_past_what_is_to_be_read_first(house: House, state: str) -> None:
    [fresh, *more] = sorted(await stored(house, times=300), key=lambda fresh: fresh.due_at)
    own = OwnedLane(Lane(fresh.lane, 1, 1, vanished=state == "careful"), careful=3)
    assert not own.take_fresh(fresh)  # it was never read
    reading = own.reading()
    assert reading is not None
    assert not own.take_fresh(fresh)  # a read is under way
    own.take(reading, [], house.clock.now())
    match state:
        case "dirty":
            own.rewind(fresh.due_at)
            assert not own.take_fresh(fresh)
        case "leaving":
            own.leaving = True
            assert not own.take_fresh(fresh)
        case "careful":
            own.careful = 1
            assert not own.take_fresh(fresh)
        case "full":
            taken = [row for row in (fresh, *more) if own.take_fresh(row)]
            assert taken == [fresh, *more][:256] == list(own.buffer)
            own.empty()
            assert own.idle
            reading = own.reading()
            assert reading is not None
            assert reading.due_at < fresh.due_at  # they are read now


async def test_only_a_read_that_brought_all_there_was_is_a_reason_to_begin_the_next_one_later(house: House) -> None:
    """So none walks past all that was delivered without a read, while an open snapshot keeps it on disk."""
    rows = sorted(await stored(house, times=300), key=lambda fresh: fresh.due_at)
    own, floor = OwnedLane(Lane(rows[0].lane, 1, 1), careful=0), rows[-1].due_at
    own.sweep(BEGINNING, floor)
    reading = own.reading()
    assert reading is not None
    own.take(reading, rows[: reading.room], house.clock.now())
    while own.buffer:
        own.settled(own.buffer.popleft(), None)
    reading = own.reading()
    assert reading is not None
    assert reading.due_at == rows[255].due_at
    own.take(reading, rows[256:290], house.clock.now())
    own.rewind(floor + timedelta(seconds=1))
    reading = own.reading()
    assert reading is not None
    assert reading.due_at == floor


async def test_what_was_taken_when_its_dispatcher_slept_past_its_lease_is_its_successors(house: House) -> None:
    partner = Partner(lambda _: Delivered())
    async with house.dispatching(house.target("ledger", partner)) as dispatcher:
        await asyncio.sleep(0.3)
        [fresh] = await stored(house)
        await until(lambda: not dispatcher._lanes[fresh.lane].dirty)
        dispatcher._lease_ends = 0
        if dispatcher.take(fresh):
            await asyncio.sleep(0.05)
            assert partner.asked == []
        await house.drained()  # the next beat renews the lease
    assert len(partner.asked) == 1
