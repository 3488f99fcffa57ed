"""What waits for a destination that nobody delivers to any more: sent elsewhere or laid aside, and never twice, nor lost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta

import pytest
import pytest_asyncio

import dead_letter.left_behind
from dead_letter.audit import Audit
from dead_letter.left_behind import CannotMoveError, Home, LeftBehind
from outbox.event import Delivered, Delivery, Outcome, Refused
from outbox.records import Records
from outbox.store import order_key
from tests.house import House, Partner, house_on, until
from tests.test_takeover import everything, settlement


@pytest_asyncio.fixture
async def house(dsn: str) -> AsyncIterator[House]:
    async with house_on(dsn) as house:
        for name in ("old", "new"):
            await house.destination(name)
        yield house


@pytest.fixture
def left(house: House) -> LeftBehind:
    return LeftBehind(house.intake)


def home(name: str = "new", *, ordered: bool = False, receives: frozenset[tuple[str, int]] | None = None) -> Home:
    return Home(name=name, ordered=ordered, receives=receives)


async def standing(house: House) -> dict[str, dict[str, int]]:
    """By destination, how many deliveries are in each state; the books must balance."""
    books = await Records(house.intake, configured=lambda: ["new", "other"]).books()
    assert books.balanced, books.differences
    rows = await house.intake.fetch(
        """
        SELECT d.name, p.state, count(*) AS n
          FROM (SELECT destination, 'waiting' AS state FROM pending JOIN lanes USING (lane)
                 UNION ALL
                SELECT destination, 'discarded' FROM discards
                 UNION ALL
                SELECT destination, 'delivered' FROM attempts WHERE outcome = 0) AS p
          JOIN destinations AS d ON d.id = p.destination
         GROUP BY 1, 2
        """
    )
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        found.setdefault(row["name"], {})[row["state"]] = row["n"]
    return found


# ── reassigning ──────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_reassigned_is_delivered_to_the_new_destination_and_the_books_tell_it(
    house: House, left: LeftBehind
) -> None:
    events = [await house.accept("old") for _ in range(3)]
    moved = await left.reassign("old", home(), reason="the ledger has moved", actor="anna")
    assert (moved.count, moved.made, moved.more) == (3, 3, False)
    assert await standing(house) == {"old": {"discarded": 3}, "new": {"waiting": 3}}
    partner = Partner()
    async with house.dispatching(house.target("new", partner)):
        await house.drained()
    assert [delivery.key for delivery in partner.asked] == [f"{event}/new" for event in events]
    assert await standing(house) == {"old": {"discarded": 3}, "new": {"delivered": 3}}

    record = await Records(house.intake).event(events[0])
    assert record is not None
    assert [(d.destination, d.state, d.reason) for d in record.deliveries] == [
        ("old", "discarded", "reassigned to new: the ledger has moved"),
        ("new", "delivered", None),
    ]
    (deed,) = (await Audit(house.intake).deeds()).items
    assert (deed.actor, deed.action, deed.target, deed.reason) == (
        "anna", "destination.reassign", "old", "the ledger has moved",
    )  # fmt: skip
    assert (deed.detail["id"], deed.detail["to"], deed.detail["made"]) == (str(moved.id), "new", 3)
    assert deed.detail["deliveries"] == [f"{event}/old" for event in events]
    assert len(await Audit(house.intake).of_event(events[1])) == 1
    assert (await left.reassign("old", home(), reason="again", actor="anna")).count == 0


async def test_an_event_that_owes_the_new_destination_gets_no_second_delivery(house: House, left: LeftBehind) -> None:
    both, delivered, alone = (
        await house.accept("old", "new"),
        await house.accept("old", "new"),
        await house.accept("old"),
    )
    partner = Partner()
    async with house.dispatching(house.target("new", partner)):
        await until(lambda: len(partner.asked) == 2)
    found = await left.preview("old", home())
    assert (found.count, found.made) == (3, 1)
    moved = await left.reassign("old", home(), reason="r", actor="anna")
    assert (moved.count, moved.made) == (3, 1)
    async with house.dispatching(house.target("new", partner)):
        await house.drained()
    assert [delivery.event.id for delivery in partner.asked] == [both, delivered, alone]
    assert await standing(house) == {"old": {"discarded": 3}, "new": {"delivered": 3}}


async def test_what_was_reassigned_by_mistake_can_be_sent_back_with_its_tries_counted_on(
    house: House, left: LeftBehind
) -> None:
    event = await house.accept("old")
    await left.reassign("old", home("new"), reason="r", actor="anna")
    await left.reassign("new", home("old"), reason="it was wrong", actor="anna")
    assert await standing(house) == {"old": {"waiting": 1}, "new": {"discarded": 1}}
    await left.reassign("old", home("new"), reason="it was right", actor="anna")
    assert await standing(house) == {"old": {"discarded": 1}, "new": {"waiting": 1}}
    partner = Partner()
    async with house.dispatching(house.target("new", partner)):
        await house.drained()
    assert [delivery.key for delivery in partner.asked] == [f"{event}/new"]


async def test_what_a_person_discarded_is_not_brought_back_by_a_reassignment(house: House, left: LeftBehind) -> None:
    await house.accept("old", "new")
    await left.discard("new", reason="nobody wants it", actor="anna")
    assert (await left.reassign("old", home(), reason="r", actor="anna")).made == 0
    assert await standing(house) == {"old": {"discarded": 1}, "new": {"discarded": 1}}


async def test_each_keeps_its_order_and_takes_its_own_place_in_the_lanes_of_the_new_destination(
    house: House, left: LeftBehind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letter.left_behind, "BATCH", 7)
    old, new = await house.destination("ordered", 4), await house.destination("many", 16)
    accepted: dict[str, list] = {}
    for n in range(60):
        subject = f"order/{n % 5}"
        accepted.setdefault(subject, []).append(await house.accept("ordered", subject=subject, ordered=True))
    assert len(old.lanes) == 4
    await left.reassign("ordered", home("many"), reason="r", actor="anna")
    rows = await house.intake.fetch("SELECT DISTINCT lane, key FROM pending")
    assert {(row["lane"], row["key"]) for row in rows} == {
        (new.lanes[order_key(subject) % 16], order_key(subject)) for subject in accepted
    }
    partner = Partner()
    async with house.dispatching(house.target("many", partner)):
        await house.drained()
    for subject, events in accepted.items():
        assert [d.event.id for d in partner.asked if d.event.subject == subject] == events


async def test_order_is_kept_where_only_the_new_destination_asks_for_it(house: House, left: LeftBehind) -> None:
    await house.accept("old", subject="order/7")
    await house.accept("old", subject=None)
    await left.reassign("old", home(ordered=True), reason="r", actor="anna")
    rows = await house.intake.fetch("SELECT key FROM pending ORDER BY due_at")
    assert [row["key"] for row in rows] == [order_key("order/7"), None]


async def test_one_that_is_cut_off_half_way_has_done_whole_batches_and_the_same_again_does_the_rest(
    house: House, left: LeftBehind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letter.left_behind, "BATCH", 10)
    events = [await house.accept("old") for _ in range(25)]
    note, written = dead_letter.left_behind.note, 0

    async def dies(*about: object, **told: object) -> None:
        nonlocal written
        written += 1
        if written == 2:
            raise SystemExit
        await note(*about, **told)  # type: ignore[arg-type]

    monkeypatch.setattr(dead_letter.left_behind, "note", dies)
    with pytest.raises(SystemExit):
        await left.reassign("old", home(), reason="r", actor="anna")
    assert await standing(house) == {"old": {"discarded": 10, "waiting": 15}, "new": {"waiting": 10}}
    moved = await left.reassign("old", home(), reason="r", actor="anna")
    assert moved.count == 15
    assert await standing(house) == {"old": {"discarded": 25}, "new": {"waiting": 25}}
    deeds = (await Audit(house.intake).deeds()).items
    assert sum(deed.detail["count"] for deed in deeds) == 25
    assert {key for deed in deeds for key in deed.detail["deliveries"]} == {f"{event}/old" for event in events}


async def test_nothing_goes_where_its_class_of_data_may_not_go(house: House, left: LeftBehind) -> None:
    await house.accept("old")
    for receives in (frozenset(), frozenset({("order", 2)}), frozenset({("other", 1)})):
        for deed in (left.preview("old", home(receives=receives)), _reassign(left, receives)):
            with pytest.raises(CannotMoveError, match="new may not receive what version 1 of policy order keeps"):
                await deed
    assert await standing(house) == {"old": {"waiting": 1}}
    assert (await _reassign(left, frozenset({("order", 1)}))).made == 1


async def _reassign(left: LeftBehind, receives: frozenset[tuple[str, int]]):
    return await left.reassign("old", home(receives=receives), reason="r", actor="anna")


# ── while others know the destination ────────────────────────────────────────────────────────────────


async def test_what_a_living_dispatcher_may_have_in_flight_is_not_taken(house: House, left: LeftBehind) -> None:
    await house.accept("old")
    going_on, go = asyncio.Event(), asyncio.Event()

    async def slowly(_: Delivery) -> Outcome:
        going_on.set()
        await go.wait()
        return Delivered()

    async with house.dispatching(house.target("old", Partner(slowly))) as dispatcher:
        await going_on.wait()
        for deed in (
            left.reassign("old", home(), reason="r", actor="anna"),
            left.discard("old", reason="r", actor="anna"),
        ):
            with pytest.raises(CannotMoveError, match=r"old is still delivered to, by .+:\d+: give that process"):
                await deed
        dispatcher.retarget([])  # it reloads: what is in flight ends as it began, and only then the lane is free
        await asyncio.sleep(1.5)
        with pytest.raises(CannotMoveError):
            await left.reassign("old", home(), reason="r", actor="anna")
        go.set()
        await house.drained()
    assert (await left.reassign("old", home(), reason="r", actor="anna")).count == 0
    assert await standing(house) == {"old": {"delivered": 1}}


async def test_who_slept_through_its_lease_can_settle_nothing_that_was_reassigned_meanwhile(
    house: House, left: LeftBehind
) -> None:
    await house.accept("old")
    number = await house.outbox.register("sleeper", timedelta(seconds=60))
    (lane,) = await house.outbox.lease(number, [house.destinations["old"].id], 1)
    (taken,) = await everything(house, lane)
    with pytest.raises(CannotMoveError, match="is still delivered to, by sleeper"):  # though its connection is gone
        await left.reassign("old", home("new"), reason="r", actor="anna")
    await house.dispatch.execute("UPDATE dispatchers SET lease_until = clock_timestamp()")
    assert (await left.reassign("old", home("new"), reason="r", actor="anna")).count == 1
    late = await house.outbox.settle([settlement(house, lane, taken)])
    assert (late.done, (lane.number, lane.epoch) in late.standing) == ({}, False)
    assert await standing(house) == {"old": {"discarded": 1}, "new": {"waiting": 1}}


async def test_deeds_and_dispatchers_that_come_and_go_at_once_lose_and_double_nothing(
    house: House, left: LeftBehind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes with the old file come and go while a person reassigns again and again: each event goes out once."""
    monkeypatch.setattr(dead_letter.left_behind, "BATCH", 20)
    await house.destination("old4", 4)
    before, after = Partner(), Partner()
    events: list = []
    over, all_accepted = asyncio.Event(), asyncio.Event()

    async def with_the_old_file() -> None:
        while not over.is_set():
            async with house.dispatching(house.target("old4", before)):
                await asyncio.sleep(0.15)
            await asyncio.sleep(0.05)

    async def person() -> int:
        taken = 0
        while not (all_accepted.is_set() and await house.is_drained()):
            with suppress(CannotMoveError):
                taken += (await left.reassign("old4", home(), reason="r", actor="anna")).count
            await asyncio.sleep(0.01)
        return taken

    async def accepted() -> None:
        arrivals = [house.arrival("old4", subject=f"order/{n % 7}", ordered=True) for n in range(30)]
        events.extend(answer.event for answer in await house.outbox.add(arrivals, house.buckets()))

    async with house.dispatching(house.target("new", after)):
        coming = asyncio.create_task(with_the_old_file())
        await accepted()
        await until(lambda: before.asked)
        reassigning = asyncio.create_task(person())
        for _ in range(8):
            await accepted()
            await asyncio.sleep(0.05)
        over.set()
        await coming
        await accepted()
        all_accepted.set()
        async with asyncio.timeout(60):
            taken = await reassigning
    assert sorted(d.event.id for d in (*before.asked, *after.asked)) == sorted(events)
    assert taken == len(after.asked) >= 30
    assert await standing(house) == {
        "old4": {"delivered": len(before.asked), "discarded": taken}, "new": {"delivered": taken},
    }  # fmt: skip


# ── discarding ───────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_discarded_stands_with_its_reason(house: House, left: LeftBehind) -> None:
    event = await house.accept("old", "new")
    preview = await left.preview("old")
    assert (preview.count, preview.made, preview.dead) == (1, 0, 0)
    moved = await left.discard("old", reason="the ledger is closed", actor="anna")
    assert moved.count == 1
    record = await Records(house.intake).event(event)
    assert record is not None
    assert [(d.state, d.reason) for d in record.deliveries] == [
        ("discarded", "the ledger is closed"), ("waiting", None),
    ]  # fmt: skip
    (deed,) = (await Audit(house.intake).deeds()).items
    assert (deed.action, deed.target, deed.detail["count"]) == ("destination.discard", "old", 1)
    assert await standing(house) == {"old": {"discarded": 1}, "new": {"waiting": 1}}


async def test_dead_letters_are_told_and_left_where_they_are(house: House, left: LeftBehind) -> None:
    async with house.dispatching(house.target("old", Partner(lambda _: Refused("no", status=400)))):
        await house.accept("old")
        await house.drained()
    assert (await left.preview("old", home())).dead == 1
    assert (await left.reassign("old", home(), reason="r", actor="anna")).count == 0
    assert await house.count("dead_letters") == 1


async def test_a_destination_that_no_process_has_made_yet_is_refused(house: House, left: LeftBehind) -> None:
    await house.accept("old")
    with pytest.raises(CannotMoveError, match="No `sluicegate serve` has run with unborn"):
        await left.reassign("old", home("unborn"), reason="r", actor="anna")
