"""Who delivers what, when there are several dispatchers, and when one of them is gone."""

import asyncio
import sys
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
import pytest_asyncio

from outbox.database import Database
from outbox.event import Delivered, Delivery, Outcome, Retry
from outbox.lanes import BEGINNING, LOWEST
from outbox.retry import Verdict
from outbox.store import ALIVE, Outbox, Reading, Settlement
from tests.house import House, Partner, house_on, until

LEASE = timedelta(seconds=10)


@pytest_asyncio.fixture
async def house(dsn: str) -> AsyncIterator[House]:
    async with house_on(dsn) as house:
        yield house


def settlement(house: House, lane, taken) -> Settlement:
    return Settlement(
        lane=lane.number, epoch=lane.epoch, taken=taken, destination=lane.destination, verdict=Verdict.DELIVERED,
        delay=timedelta(0), spared=False, outcome=0, status=200, reason=None, receipt="", at=house.clock.now(),
        took=timedelta(milliseconds=1), trace=None, cause=None,
    )  # fmt: skip


async def everything(house: House, lane) -> list:
    return await house.outbox.read([Reading(lane=lane.number, due_at=BEGINNING, event=LOWEST, room=100)])


async def test_a_dispatcher_that_lost_its_lane_cannot_settle_what_its_successor_owns(house: House) -> None:
    destination = await house.destination("supplier")
    event = await house.accept("supplier")
    one = await house.outbox.register("one", LEASE)
    [sleeper] = await house.outbox.lease(one, [destination.id], 1)
    [taken] = await everything(house, sleeper)
    two = await house.outbox.register("two", LEASE)
    assert not await house.outbox.lease(two, [destination.id], 1)  # nobody holds the lock of `one`: it may be back soon
    [successor] = await house.outbox.lease(two, [destination.id], 1, gone=[one])
    assert successor.vanished
    late = await house.outbox.settle([settlement(house, sleeper, taken)])
    assert (late.done, (sleeper.number, sleeper.epoch) in late.standing) == ({}, False)
    [again] = await everything(house, successor)
    assert again.event_id == event
    assert (await house.outbox.settle([settlement(house, successor, again)])).done == {0: None}
    assert await house.count("pending") == 0


async def test_what_a_dispatcher_had_before_it_lost_a_lane_is_not_settled_beside_what_it_has_of_it_now(
    house: House,
) -> None:
    destination = await house.destination("supplier")
    await house.accept("supplier")
    await house.accept("supplier")
    one = await house.outbox.register("one", LEASE)
    [before] = await house.outbox.lease(one, [destination.id], 1)
    [slept, _] = await everything(house, before)
    await house.outbox.give_back([before])
    [now] = await house.outbox.lease(one, [destination.id], 1)
    [again, other] = await everything(house, now)
    settled = await house.outbox.settle([settlement(house, before, slept), settlement(house, now, other)])
    assert (settled.done, (before.number, before.epoch) in settled.standing) == ({1: None}, False)
    assert (await house.outbox.settle([settlement(house, now, again)])).done == {0: None}


async def test_a_settle_does_not_wait_for_a_lane_that_somebody_has_locked(house: House) -> None:
    destination = await house.destination("supplier")
    await house.accept("supplier")
    one = await house.outbox.register("one", LEASE)
    [lane] = await house.outbox.lease(one, [destination.id], 1)
    [taken] = await everything(house, lane)
    async with house.intake.transaction() as connection:
        await connection.execute("SELECT FROM lanes FOR UPDATE")
        skipped = await house.outbox.settle([settlement(house, lane, taken)])
    assert (skipped.done, (lane.number, lane.epoch) in skipped.standing) == ({}, True)
    assert (await house.outbox.settle([settlement(house, lane, taken)])).done == {0: None}


async def test_a_settle_that_is_repeated_changes_nothing(house: House) -> None:
    """Its first answer may have been lost on the way."""
    destination = await house.destination("supplier")
    await house.accept("supplier")
    one = await house.outbox.register("one", LEASE)
    [lane] = await house.outbox.lease(one, [destination.id], 1)
    [taken] = await everything(house, lane)
    assert (await house.outbox.settle([settlement(house, lane, taken)])).done == {0: None}
    assert (await house.outbox.settle([settlement(house, lane, taken)])).done == {}
    assert await house.count("attempts") == 1
    assert await house.intake.fetchval("SELECT sum(n) FROM tally WHERE what = 3") == 1


async def test_several_dispatchers_share_the_lanes_evenly(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outbox.dispatcher.BEAT", timedelta(seconds=0.2))
    for n in range(3):
        await house.destination(f"shop-{n}", shards=4)
    targets = [house.target(f"shop-{n}", Partner()) for n in range(3)]

    async def owned() -> list[int]:
        rows = await house.intake.fetch(
            "SELECT count(*) AS n FROM lanes WHERE owner IS NOT NULL GROUP BY owner ORDER BY 1"
        )
        return [row["n"] for row in rows]

    async with house.dispatching(*targets):
        await until(lambda: equal(owned, [12]))
        async with house.dispatching(*targets):
            await until(lambda: equal(owned, [6, 6]))
            async with house.dispatching(*targets):
                await until(lambda: equal(owned, [4, 4, 4]))
            await until(lambda: equal(owned, [6, 6]))
        await until(lambda: equal(owned, [12]))


async def equal(ask, wanted) -> bool:
    return await ask() == wanted


async def test_what_a_dispatcher_that_vanished_was_at_is_delivered_by_another(house: House) -> None:
    await house.destination("supplier")

    async def never(_: Delivery) -> Outcome:
        await asyncio.sleep(60)
        return Delivered()

    stuck, healthy = Partner(never), Partner()
    async with house.dispatching(house.target("supplier", stuck)) as first:
        for _ in range(20):
            await house.accept("supplier")
        await until(lambda: len(stuck.asked) == 8)
        async with house.dispatching(house.target("supplier", healthy)):
            await vanish(house, first)
            await house.drained(15)
            keys = [delivery.key for delivery in healthy.asked]
            assert len(keys) == len(set(keys)) == 20
            assert {delivery.key for delivery in stuck.asked} <= set(keys)
            await first.stop(timedelta(0))


async def vanish(house: House, dispatcher) -> None:
    """As if its process had been killed: nothing of it goes on, its connection is cut, and what it knew is lost."""
    severed = await Database.connect(house.dsn, size=1)
    await severed.close()
    dispatcher._outbox = Outbox(intake=severed, dispatch=severed)
    for task in (*dispatcher._loops, *dispatcher._attempts):
        task.cancel()
    await asyncio.sleep(0.05)
    dispatcher._done.clear()
    await dispatcher._presence.close()
    assert await house.intake.fetchval(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = $1 AND objid = $2",
        ALIVE,
        dispatcher._number,
    ) in {0, 1}


async def test_a_delivery_that_kills_its_dispatcher_is_buried_at_the_third_time(house: House) -> None:
    await house.destination("supplier")
    poison = await house.accept("supplier", subject="order/poison")
    for n in range(5):
        await house.accept("supplier", subject=f"order/{n}")
    attempted = []
    for _ in range(3):

        async def kill(delivery: Delivery) -> Outcome:
            if delivery.event.id == poison:
                attempted.append(delivery)
                await asyncio.sleep(60)
            return Delivered()

        async with house.dispatching(house.target("supplier", Partner(kill))) as dispatcher:
            before = len(attempted)
            await until(lambda before=before: len(attempted) == before + 1)
            await vanish(house, dispatcher)
            await dispatcher.stop(timedelta(0))
            await house.intake.execute(
                "UPDATE lanes SET owner = 999999"
            )  # its successor finds a lane that was not given back
    partner = Partner()
    async with house.dispatching(house.target("supplier", partner)):
        await house.drained()
    assert len(attempted) == 3
    assert poison not in {delivery.event.id for delivery in partner.asked}
    assert (
        await house.intake.fetchval("SELECT reason FROM dead_letters WHERE event_id = $1", poison)
        == "killed the dispatcher"
    )
    assert await house.count("suspects") == 0


async def test_only_the_delivery_that_kills_is_buried_whatever_was_in_flight_beside_it(house: House) -> None:
    """It kills real processes, and with them what other lanes have under way, in careful mode, too."""
    names = [f"shop-{n}" for n in range(4)]
    for name in names:
        await house.destination(name)
    innocents = [await house.accept(name) for name in names[1:] for _ in range(2)]
    poison = await house.accept(names[0])
    command = ["-m", "tests.killed", house.dsn, str(poison), "4", *names]
    out, log = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    lives = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=out, stderr=log)
    told, _ = await lives.communicate()
    assert told.split() == [b"137"] * 3 + [b"0"]
    buried = await house.intake.fetch("SELECT event_id, reason FROM dead_letters")
    assert [tuple(row) for row in buried] == [(poison, "killed the dispatcher")]
    delivered = await house.intake.fetch("SELECT event_id FROM attempts WHERE outcome = 0")
    assert sorted(row["event_id"] for row in delivered) == innocents
    assert await house.count("suspects") == 0


async def test_lanes_stay_where_they_are_when_only_the_lines_of_their_owners_are_cut(house: House) -> None:
    """As when Postgres is started again: for a moment nobody is seen to live, and everybody does."""
    await house.destination("supplier", shards=4)
    owners = "SELECT lane, owner, epoch FROM lanes ORDER BY lane"
    async with (
        house.dispatching(house.target("supplier", Partner())) as one,
        house.dispatching(house.target("supplier", Partner())) as two,
    ):
        await until(lambda: len(one._lanes) == len(two._lanes) == 2)
        before = await house.intake.fetch(owners)
        for _ in range(2):
            await cut_all_lines(house)
            await asyncio.sleep(1.5)
        assert await house.intake.fetch(owners) == before
        assert await house.intake.fetchval("SELECT count(*) FROM living_dispatchers") == 2


async def test_lanes_that_are_given_back_are_taken_though_all_lines_were_cut_just_now(house: House) -> None:
    await house.destination("supplier", shards=4)
    async with house.dispatching(house.target("supplier", Partner())) as one:
        async with house.dispatching(house.target("supplier", Partner())) as two:
            await until(lambda: one._lanes and two._lanes)
            await cut_all_lines(house)
        await until(lambda: len(one._lanes) == 4, 3.5)


async def test_who_comes_late_takes_nothing_from_one_that_has_no_line_but_renews_its_lease(house: House) -> None:
    destination = await house.destination("supplier")
    one = await house.outbox.register("one", LEASE)
    await house.outbox.lease(one, [destination.id], 1)
    async with house.dispatching(house.target("supplier", Partner()), lease=LEASE) as two:
        for _ in range(8):
            await house.outbox.beat(one, LEASE, knows=[destination.id])
            await asyncio.sleep(0.3)
        assert not two._lanes
        await until(lambda: two._lanes, 8)  # it is silent now, long before its lease ends


async def test_nothing_is_taken_from_the_silent_just_after_postgres_was_started(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may not have come back to it yet, nor drawn their lines again."""
    monkeypatch.setattr("outbox.dispatcher.YOUNG", timedelta(days=1))
    destination = await house.destination("supplier")
    one = await house.outbox.register("one", LEASE)
    await house.outbox.lease(one, [destination.id], 1)
    async with house.dispatching(house.target("supplier", Partner()), lease=LEASE) as two:
        await asyncio.sleep(3)
        assert not two._lanes
        monkeypatch.setattr("outbox.dispatcher.YOUNG", timedelta(0))
        await until(lambda: two._lanes, 3)


async def cut_all_lines(house: House) -> None:
    await house.intake.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND classid = $1", ALIVE
    )


async def test_a_hold_keeps_its_deliveries_and_a_release_lets_them_go(house: House) -> None:
    destination = await house.destination("supplier")
    partner = Partner()
    async with house.dispatching(house.target("supplier", partner)):
        await house.intake.execute(
            "UPDATE destinations SET held_until = 'infinity', held_by = 'anna', held_reason = 'their maintenance' WHERE id = $1",
            destination.id,
        )
        await house.outbox.notify("sluicegate_destinations", "")
        await asyncio.sleep(0.3)
        for _ in range(5):
            await house.accept("supplier")
        await asyncio.sleep(1)
        assert partner.asked == []
        await house.intake.execute("UPDATE destinations SET held_until = NULL, held_by = NULL, held_reason = NULL")
        await house.outbox.notify("sluicegate_destinations", "")
        await house.drained()
    assert len(partner.asked) == 5


async def test_a_destination_that_keeps_failing_is_left_alone_for_a_while(house: House) -> None:
    """The breaker: no attempt is spent while it is open."""
    destination = await house.destination("supplier")
    partner = Partner(lambda _: Retry("503 Service Unavailable", status=503))
    async with house.dispatching(house.target("supplier", partner)):
        for _ in range(30):
            await house.accept("supplier")
        await until(lambda: backs_off(house, destination.id))
        asked = len(partner.asked)
        assert asked < 25
        await asyncio.sleep(0.5)  # it backs off for a second
        assert len(partner.asked) == asked
    assert await house.count("pending") == 30


async def backs_off(house: House, destination: int) -> bool:
    return await house.intake.fetchval("SELECT not_before > now() FROM destinations WHERE id = $1", destination)


async def test_a_delivery_that_kills_is_found_also_where_many_of_another_subject_wait_before_it(house: House) -> None:
    await house.destination("supplier")
    for _ in range(40):
        await house.accept("supplier", subject="order/busy", ordered=True)
    poison = await house.accept("supplier", subject="order/poison", ordered=True)
    attempted = []

    async def kill(delivery: Delivery) -> Outcome:
        if delivery.event.id == poison:
            attempted.append(delivery)
            await asyncio.sleep(60)
        await asyncio.sleep(0.05)
        return Delivered()

    for lives in (1, 2, 3):
        async with house.dispatching(house.target("supplier", Partner(kill), concurrency=2)) as dispatcher:
            await until(lambda lives=lives: len(attempted) == lives)
            await vanish(house, dispatcher)
            await dispatcher.stop(timedelta(0))
            await house.intake.execute("UPDATE lanes SET owner = 999999")
    async with house.dispatching(house.target("supplier", Partner(kill))):
        await house.drained(20)
    assert len(attempted) == 3
    assert await house.intake.fetchval("SELECT event_id FROM dead_letters") == poison


async def test_a_dispatcher_that_could_not_settle_and_lost_its_lane_meanwhile_goes_on(house: House) -> None:
    """What it had done is its successor's to do again; that nothing is left to settle must not keep it from starting."""
    answer = asyncio.Event()

    async def waits(_: Delivery) -> Outcome:
        await answer.wait()
        return Delivered()

    await house.destination("ledger")
    partner = Partner(waits)
    blocked = "SELECT pid FROM pg_locks WHERE relation = 'pending'::regclass AND NOT granted"
    async with house.dispatching(house.target("ledger", partner)) as dispatcher:
        event = await house.accept("ledger")
        await until(lambda: partner.asked)
        [before] = dispatcher._lanes.values()
        async with house.intake.transaction() as operator:
            await operator.execute("LOCK TABLE pending IN ACCESS EXCLUSIVE MODE")
            answer.set()
            await until(lambda: house.intake.fetch(blocked), what="a settle that cannot be written")
            await house.intake.execute("UPDATE lanes SET owner = NULL, epoch = epoch + 1")
            await until(lambda: before not in dispatcher._lanes.values(), what="another lease")
            await house.intake.execute(f"SELECT pg_cancel_backend(pid) FROM ({blocked}) AS waiting")
            await until(lambda: not dispatcher._done)
        await house.drained()
    assert {delivery.event.id for delivery in partner.asked} == {event}
