"""Numbers that senders give their messages: what is missing is told, what came late is not, and none is told twice."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import msgspec
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from outbox.announcements import Announcements
from outbox.clock import Identities
from outbox.database import Database
from outbox.sequences import LOWEST, MOST_HOLES, Count, Sequences
from tests.house import House, house_on

NOW = datetime(2026, 11, 23, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


class Sender:
    """Numbers as they are counted, one second after the other."""

    def __init__(self) -> None:
        self.at = NOW.timestamp()
        self.identities = Identities(lambda: self.at)
        self.events: list[tuple[UUID, int]] = []
        self.count: Count | None = None

    def send(self, *numbers: int, apart: float = 1) -> list[tuple[UUID, int]]:
        sent = []
        for number in numbers:
            self.at += apart
            sent.append((self.identities.next(), number))
        return sent

    def counted(self, events: list[tuple[UUID, int]], *, after: timedelta = timedelta(0)) -> list[tuple[str, int, int]]:
        """What is told once these are counted, so long after the first."""
        if self.count is None:
            self.count = Count(events[0][1], events[0][1], LOWEST, events[0][0])
        self.count.add(events, NOW + after)
        self.count.tell(NOW + after)
        told = [(one.what, one.first, one.last) for one in self.count.told]
        self.count.told.clear()
        return told


def test_a_gap_is_told_after_a_minute_once_and_again_when_it_is_filled() -> None:
    sender = Sender()
    assert sender.counted(sender.send(1, 2, 3, 6, 7)) == []
    assert sender.counted([], after=MINUTE) == [("gap", 4, 5)]
    assert sender.counted(sender.send(8, 9), after=5 * MINUTE) == []
    assert sender.counted(sender.send(5), after=6 * MINUTE) == []
    assert sender.counted(sender.send(4), after=7 * MINUTE) == [("filled", 4, 5)]
    assert sender.count
    assert sender.count.missing == 0


def test_messages_that_overtake_each_other_are_no_gap() -> None:
    sender = Sender()
    assert sender.counted(sender.send(1, 3, 5, 4, 2)) == []
    assert sender.counted([], after=10 * MINUTE) == []


def test_counting_again_what_was_counted_changes_nothing() -> None:
    sender = Sender()
    events = sender.send(1, 2, 3, 6, 1, 2, 3, 5)
    assert sender.counted(events) == [("restarted", 1, 6)]
    for _ in range(3):
        assert sender.counted(events) == []
    assert sender.count
    assert (sender.count.first, sender.count.last, sender.count.missing) == (1, 5, 1)


@pytest.mark.parametrize("first", [0, 1])
def test_a_sender_that_begins_again_begins_a_new_count(first: int) -> None:
    sender = Sender()
    sender.counted(sender.send(500, 501, 502))
    assert sender.counted(sender.send(first, first + 1)) == [("restarted", first, 502)]
    assert sender.counted(sender.send(first + 2, first + 3)) == []
    assert sender.counted([], after=10 * MINUTE) == []


def test_a_new_count_whose_first_message_was_overtaken_has_no_gap() -> None:
    sender = Sender()
    sender.counted(sender.send(1, 2, 3, 4, 5))
    assert sender.counted(sender.send(2, 3, 1, 4, apart=0.1)) == [("restarted", 1, 5)]
    assert sender.counted([], after=10 * MINUTE) == []
    assert sender.count
    assert (sender.count.first, sender.count.last) == (1, 4)


def test_a_late_event_of_the_count_before_is_no_gap_of_the_new_one() -> None:
    sender = Sender()
    first, late, last, again = sender.send(1, 2, 3, 1)
    sender.counted([first, last])
    assert sender.counted([again]) == [("restarted", 1, 3)]
    assert sender.counted([late]) == []
    assert sender.count
    assert (sender.count.first, sender.count.last) == (1, 1)


def test_a_sender_that_numbers_at_random_is_told_of_and_fills_no_memory() -> None:
    sender = Sender()
    told = sender.counted(sender.send(*range(2, 6 * MOST_HOLES, 2)))
    assert {what for what, _, _ in told} == {"given_up"}
    assert told[0][1] == 3
    assert sender.count
    assert sum(len(gap.missing) for gap in sender.count.gaps) <= MOST_HOLES


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(2, 12)), st.sets(st.integers(2, 11)), st.integers(0, 9))
def test_whatever_the_order_what_is_missing_is_what_did_not_come(order: list[int], lost: set[int], cut: int) -> None:
    sender = Sender()
    events = sender.send(1, *(number for number in order if number not in lost), 12)
    sender.counted(events[: cut + 1])
    sender.counted(events)
    assert sender.count
    assert sender.count.missing == len(lost)
    assert {n for gap in sender.count.gaps for a, b in gap.missing for n in range(a, b + 1)} == lost


# ── in the background, from what was stored ──────────────────────────────────────────────────────────


@pytest_asyncio.fixture
async def house(dsn: str) -> AsyncIterator[House]:
    async with house_on(dsn) as house:
        yield house


async def send(house: House, *numbers: int, facility: str | None = None) -> None:
    arrivals = [house.arrival(data=f'{{"seq":{number}}}') for number in numbers]
    if facility:
        arrivals = [
            msgspec.structs.replace(a, event=msgspec.structs.replace(a.event, facility=facility)) for a in arrivals
        ]
    await house.outbox.add(arrivals, house.buckets())


async def minutes_pass(database: Database) -> None:
    await database.execute("UPDATE sequence_gaps SET noticed_at = noticed_at - interval '2 minutes'")


async def test_each_facility_counts_for_itself_and_what_was_there_before_does_not_count(house: House) -> None:
    sequences = Sequences(house.dispatch)
    await send(house, 77)
    assert await sequences.count({"shop": "seq"}) == []
    await send(house, 1, 2, 3, facility="north")
    await send(house, 10, 12, facility="south")
    assert await sequences.count({"shop": "seq"}) == []
    await minutes_pass(house.dispatch)
    [gap] = await sequences.count({"shop": "seq"})
    assert (gap.what, gap.facility, gap.first, gap.last) == ("gap", "south", 11, 11)
    counted = [(c.facility, c.first, c.last, c.missing) for c in await sequences.counted(["shop"])]
    assert counted == [("north", 1, 3, 0), ("south", 10, 12, 1)]


async def test_a_gap_is_told_once_however_many_count(house: House) -> None:
    counting = [Sequences(house.dispatch) for _ in range(3)]
    await counting[0].count({"shop": "seq"})
    await send(house, 1, 2, 5)
    await counting[0].count({"shop": "seq"})
    await minutes_pass(house.dispatch)
    told = await asyncio.gather(*(sequences.count({"shop": "seq"}) for sequences in counting))
    assert sorted(len(each) for each in told) == [0, 0, 1]
    await send(house, 4, 3)
    for sequences in counting:
        await sequences.count({"shop": "seq"})
    announced = await Announcements(house.dispatch).waiting()
    assert [(a.type, a.data["first"], a.data["last"]) for a in announced] == [
        ("sluicegate.sequence.gap", 3, 4),
        ("sluicegate.sequence.filled", 3, 4),
    ]


async def test_another_field_and_a_source_that_was_not_counted_for_a_while_begin_anew(house: House) -> None:
    sequences = Sequences(house.dispatch)
    await sequences.count({"shop": "seq"})
    await send(house, 1, 9)
    await sequences.count({"shop": "seq"})
    assert [c.missing for c in await sequences.counted(["shop"])] == [7]
    await sequences.count({"shop": "number"})
    assert await sequences.counted(["shop"]) == []
    await sequences.count({"shop": "seq"})
    await house.dispatch.execute("UPDATE counted_sources SET counted_to = counted_to - interval '1 hour'")
    await sequences.count({"other": "seq"})
    await send(house, 20, 21)
    await sequences.count({"shop": "seq", "other": "seq"})
    assert await sequences.counted(["shop"]) == []


async def test_an_event_whose_transaction_was_open_for_a_while_fills_its_gap(house: House) -> None:
    sequences = Sequences(house.dispatch)
    await sequences.count({"shop": "seq"})
    late = house.arrival(data='{"seq":2}')
    async with house.intake.transaction() as open_for_long:
        await open_for_long.execute("INSERT INTO tally (day, what, destination, n) VALUES ('2026-01-01', 0, 0, 0)")
        await send(house, 1, 3)
        await sequences.count({"shop": "seq"})
    await house.outbox.add([late], house.buckets())
    await sequences.count({"shop": "seq"})
    assert [c.missing for c in await sequences.counted(["shop"])] == [0]
