"""Bad days: each of these broke the outbox once."""

import asyncio
import random
import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from uuid import UUID, uuid4

import pytest
import pytest_asyncio
from msgspec.structs import replace

from dead_letter.letters import DeadLetters, Select
from outbox.database import Unavailable
from outbox.destinations import Destinations
from outbox.event import Blocked, Delivered, Delivery, Outcome, Pending, Refused, Retry
from outbox.intake_batch import IntakeBatch
from outbox.retry import Schedule, decide
from outbox.store import Reading, Seen, Stored, Taken, order_key
from tests.house import House, Partner, house_on, until

SLOW = Schedule(first=timedelta(hours=1), cap=timedelta(hours=1), give_up=timedelta(days=1))


@pytest_asyncio.fixture
async def house(dsn: str) -> AsyncIterator[House]:
    async with house_on(dsn) as house:
        yield house


# ── lost deliveries ──────────────────────────────────────────────────────────────────────────────────


async def test_a_subject_that_waits_at_one_destination_goes_out_at_another(house: House) -> None:
    """Both keep order by the same subject, so the same key is closed in a lane of the one only."""
    await house.destination("broken")
    await house.destination("healthy")
    broken, healthy = Partner(lambda _: Retry("not now")), Partner()
    async with house.dispatching(house.target("broken", broken, schedule=SLOW), house.target("healthy", healthy)):
        await house.accept("broken", "healthy", subject="order/1", ordered=True)
        await until(lambda: len(broken.asked) == len(healthy.asked) == 1)
        await asyncio.sleep(1.5)
        arrivals = [house.arrival("broken", "healthy", subject=f"order/{n}", ordered=True) for n in (1, 2)]
        answers = await house.outbox.add(arrivals, house.buckets())
        house.dispatchers[0].wake({debt.lane: answers[0].due_at for debt in arrivals[0].debts})
        await until(lambda: len(healthy.asked) == 3, 8)


async def test_a_reload_while_deliveries_are_in_flight_leaves_their_places_free(house: House) -> None:
    await house.destination("supplier")
    go = asyncio.Event()

    async def when_told(_: Delivery) -> Outcome:
        await go.wait()
        return Delivered()

    partner = Partner(when_told)
    target = house.target("supplier", partner, concurrency=2)
    async with house.dispatching(target) as dispatcher:
        for _ in range(2):
            await house.accept("supplier")
        await until(lambda: len(partner.asked) == 2)
        dispatcher.retarget([target])
        go.set()
        await house.drained(5)
        await house.accept("supplier")
        await house.drained(5)


async def test_what_a_destination_is_owed_survives_that_it_is_gone_from_the_configuration_for_a_while(
    house: House,
) -> None:
    await house.destination("supplier")
    await house.destination("other")
    go = asyncio.Event()

    async def when_told(_: Delivery) -> Outcome:
        await go.wait()
        return Delivered()

    partner = Partner(when_told)
    supplier, other = house.target("supplier", partner, concurrency=2), house.target("other", Partner())
    async with house.dispatching(supplier, other) as dispatcher:
        for _ in range(10):
            await house.accept("supplier")
        await until(lambda: len(partner.asked) == 2)
        dispatcher.retarget([other])
        go.set()  # what was read and not started is still in the buffer
        lanes = house.destinations["supplier"].lanes
        await until(lambda: not dispatcher._lanes.keys() & set(lanes))
        dispatcher.retarget([supplier, other])
        await house.drained(10)
    assert len(partner.asked) == 10


async def test_an_answer_that_is_no_outcome_is_tried_again_and_told_as_a_bug(house: House) -> None:
    await house.destination("theirs")
    answers: list[object] = [None, Pending("taken", until=datetime(2026, 1, 1)), Delivered(receipt=7), Delivered()]  # noqa: DTZ001
    partner = Partner(lambda delivery: answers[delivery.attempt - 1])
    async with house.dispatching(house.target("theirs", partner)):
        await house.accept("theirs")
        await house.drained(10)
    rows = await house.intake.fetch("SELECT reason FROM attempts ORDER BY number")
    assert [row["reason"] for row in rows[:2]] == ["bug: TypeError", "bug: TypeError"]


async def test_what_a_connector_says_cannot_stop_the_settle_of_the_others(house: House) -> None:
    await house.destination("theirs")
    await house.destination("healthy")
    odd = [
        Retry("x", status=10**6), Retry("nul \0 \ud800"), Retry("later", after=timedelta(days=10**6)),
        Pending("far", until=datetime.max.replace(tzinfo=UTC)), Pending("far", until=datetime.max.replace(tzinfo=UTC)),
    ]  # fmt: skip
    left = list(odd)
    theirs, healthy = Partner(lambda _: left.pop() if left else Delivered()), Partner()
    async with house.dispatching(house.target("theirs", theirs), house.target("healthy", healthy)):
        for _ in odd:
            await house.accept("theirs")
        await until(lambda: len(theirs.asked) >= len(odd))
        await house.accept("healthy")
        await until(lambda: is_settled(house, "healthy"), 5)
    assert await house.count("attempts") >= len(odd) + 1


async def is_settled(house: House, name: str) -> bool:
    return not await house.intake.fetchval(
        "SELECT count(*) FROM pending WHERE lane = ANY ($1::int[])", list(house.destinations[name].lanes)
    )


async def test_a_dead_letter_that_is_there_already_does_not_stop_the_settle_of_the_others(house: House) -> None:
    await house.destination("picky")
    partner = Partner(lambda _: Refused("400 Bad Request", status=400))
    async with house.dispatching(house.target("picky", partner)):
        twice = await house.accept("picky")
        await house.drained()
        await house.intake.execute(
            "INSERT INTO pending (event_id, due_at, owed_since, lane, attempts) SELECT $1, now(), now(), $2, 1",
            twice,
            house.destinations["picky"].lanes[0],
        )
        await until(lambda: len(partner.asked) == 2)
        await house.accept("picky")
        await house.drained(5)
    assert await house.count("dead_letters") == 2


async def test_an_attempt_that_is_told_of_already_does_not_stop_the_settle_of_the_others(house: House) -> None:
    destination = await house.destination("ledger")
    events = [await house.accept("ledger") for _ in range(3)]
    await house.intake.execute(
        "INSERT INTO attempts (event_id, destination, number, at, outcome, took_ms) VALUES ($1, $2, 1, now(), 0, 7)",
        events[1],
        destination.id,
    )
    partner = Partner()
    async with house.dispatching(house.target("ledger", partner)):
        await house.drained()
    assert sorted(delivery.event.id for delivery in partner.asked) == events
    assert await house.count("attempts") == 3


async def test_lanes_that_were_leased_without_the_answer_arriving_are_at_work(house: House) -> None:
    """The connection may be cut between the commit and its answer."""
    destination = await house.destination("supplier")
    partner = Partner()
    async with house.dispatching() as dispatcher:
        assert await house.outbox.lease(dispatcher._number, [destination.id], 1)
        dispatcher.retarget([house.target("supplier", partner)])
        await house.accept("supplier")
        await house.drained(5)


async def test_a_dispatcher_that_could_not_draw_its_line_at_first_lives_all_the_same(house: House) -> None:
    destination = await house.destination("supplier")
    partner = Partner()
    async with house.dispatching(house.target("supplier", partner)) as dispatcher:
        await house.intake.execute("DELETE FROM dispatchers")  # it slept for long, and was struck off
        session, house.dispatch.session = house.dispatch.session, no_session
        await asyncio.sleep(6.5)
        del house.dispatch.session
        assert house.dispatch.session == session
        await until(lambda: lives(house, dispatcher), 10)
        await house.accept("supplier")
        await house.drained(5)
    assert destination


def no_session() -> None:
    raise OSError("no connection")


async def lives(house: House, dispatcher) -> bool:
    return await house.intake.fetchval("SELECT count(*) = 1 FROM living_dispatchers WHERE id = $1", dispatcher._number)


async def test_an_orphan_does_not_keep_its_lane_from_moving_on(house: House) -> None:
    await house.destination("supplier", shards=2)
    targets = [house.target("supplier", Partner())]
    async with house.dispatching(*targets) as first:
        for lane in house.destinations["supplier"].lanes:
            await house.intake.execute(
                "INSERT INTO pending (event_id, due_at, owed_since, lane) SELECT $1, now(), now(), $2",
                house.identities.next(),
                lane,
            )
        await asyncio.sleep(1.5)
        async with house.dispatching(*targets) as second:
            await until(lambda: len(first._lanes) == len(second._lanes) == 1, 6)


# ── gentleness ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_release_opens_a_destination_that_the_program_holds_at_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("retry", "gate"):
        monkeypatch.setattr(f"outbox.{module}.CONFIRM_BLOCKED", timedelta(seconds=0.5))
    await house.destination("supplier")
    answers = [Blocked("credentials: 401 Unauthorized", 401)] * 2
    partner = Partner(lambda _: answers.pop() if answers else Delivered())
    async with house.dispatching(house.target("supplier", partner)):
        await house.accept("supplier")
        await until(lambda: held(house, "supplier"), 12)
        await asyncio.sleep(1.2)  # its dispatcher has seen the hold in the database
        assert len(partner.asked) == 2
        await Destinations(house.intake).release("supplier", by="anna", reason="new password")
        await house.accept("supplier")
        await until(lambda: len(partner.asked) > 2, 4)  # the hold would have run for 10 s


async def held(house: House, name: str) -> bool:
    return await house.intake.fetchval("SELECT held_until > now() FROM destinations WHERE name = $1", name)


async def test_lanes_of_one_destination_take_turns_however_little_it_can_take(house: House) -> None:
    await house.destination("slow", shards=2)

    async def slowly(_: Delivery) -> Outcome:
        await asyncio.sleep(0.005)
        return Delivered()

    partner = Partner(slowly)
    lanes: dict[int, list] = {0: [], 1: []}
    while min(map(len, lanes.values())) < 100:
        arrival = house.arrival("slow")
        lanes[house.destinations["slow"].lanes.index(arrival.debts[0].lane)].append(arrival)
    await house.outbox.add(lanes[0] + lanes[1][:1], house.buckets())
    lonely = lanes[1][0].event.id
    async with house.dispatching(house.target("slow", partner, concurrency=1)):
        await house.drained(20)
    assert [delivery.event.id for delivery in partner.asked].index(lonely) < 10


async def test_a_pause_costs_no_statement_but_the_polls(house: House) -> None:
    """A destination with a rate limit that backs off must not be looked at as often as its rate would allow."""
    await house.destination("limited")
    answers = [Retry("429 Too Many Requests", after=timedelta(minutes=5), whole_destination=True, status=429)]
    partner = Partner(lambda _: answers[0])
    async with house.dispatching(house.target("limited", partner, per_second=50, concurrency=1)) as dispatcher:
        await house.outbox.add([house.arrival("limited") for _ in range(20)], house.buckets())
        await until(lambda: len(partner.asked) == 1)
        await asyncio.sleep(1)
        turns = 0
        open_keys = dispatcher._open_keys

        async def counted() -> None:
            nonlocal turns
            turns += 1
            await open_keys()

        dispatcher._open_keys = counted
        await asyncio.sleep(2)
    assert turns < 20


# ── careful mode ─────────────────────────────────────────────────────────────────────────────────────


async def test_an_attempt_that_was_only_cut_off_is_not_counted_as_a_kill(house: House) -> None:
    """Three restarts while a partner is slow."""
    await house.destination("slow")

    async def never(_: Delivery) -> Outcome:
        await asyncio.sleep(60)
        return Delivered()

    await house.accept("slow")
    for _ in range(4):
        partner = Partner(never)
        async with house.dispatching(house.target("slow", partner)) as dispatcher:
            await until(lambda: len(partner.asked) == 1, 5)  # noqa: B023
            await dispatcher.stop(timedelta(0))
    partner = Partner()
    async with house.dispatching(house.target("slow", partner)):
        await house.drained(5)
    assert len(partner.asked) == 1
    assert await house.count("dead_letters") == 0


async def test_a_destination_that_backs_off_is_not_held(house: House) -> None:
    destination = await house.destination("supplier")
    await house.outbox.leave_alone(destination.id, house.clock.now() + timedelta(minutes=1))
    standing = (await house.outbox.standings())[destination.id]
    assert standing.held_until is None
    assert standing.not_before is not None


# ── intake ───────────────────────────────────────────────────────────────────────────────────────────


def batching(house: House, **kinds) -> IntakeBatch:
    return IntakeBatch(house.outbox, buckets=house.buckets, wake=lambda _: None, sizes=lambda _: None, **kinds)


async def test_one_event_that_cannot_be_stored_fails_alone(house: House) -> None:
    """A NUL, a document that is too large, a subject that no index takes, an identity outside every partition."""
    await house.destination("supplier")
    noise = secrets.token_urlsafe(3000)
    guilty = [
        house.arrival("supplier", subject="nul \0"),
        house.arrival("supplier", data='{"a":"' + "x" * 9000 + '"}'),
        house.arrival("supplier", subject=noise),
    ]
    outside = house.arrival("supplier")
    guilty.append(replace(outside, event=replace(outside.event, id=UUID(int=outside.event.id.int + (1 << 124)))))
    innocent = [house.arrival("supplier") for _ in range(5)]
    batch = batching(house, connections=1)
    answers = await asyncio.gather(*(batch.add(a) for a in [*guilty, *innocent]), return_exceptions=True)
    await batch.close()
    assert [isinstance(answer, Stored) for answer in answers] == [False] * 4 + [True] * 5
    assert await house.count("pending") == await house.count("events") == 5


async def test_two_of_one_batch_are_one_event(house: House) -> None:
    await house.destination("supplier")
    same = uuid4()
    batch = batching(house, connections=1)
    answers = await asyncio.gather(*(batch.add(house.arrival("supplier", same=same)) for _ in range(6)))
    assert [isinstance(answer, Stored) for answer in answers] == [True] + [False] * 5
    assert {answer.event for answer in answers} == {answers[0].event}
    assert await house.count("pending") == 1


async def test_a_request_that_goes_away_leaves_the_others_of_its_batch_alone(house: House) -> None:
    batch = batching(house, connections=1)
    waiting = [asyncio.create_task(batch.add(house.arrival())) for _ in range(5)]
    await asyncio.sleep(0)
    waiting[2].cancel()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [isinstance(answer, Stored) for answer in answers] == [True, True, False, True, True]


async def test_whether_a_batch_was_stored_is_not_known_when_its_connection_dies_and_sending_it_again_finds_out(
    house: House,
) -> None:
    same = uuid4()
    batch = batching(house, connections=1)
    async with house.dispatch.transaction() as locked:  # it waits for us, and is then cut off
        await locked.execute("LOCK TABLE tally IN EXCLUSIVE MODE")
        waiting = asyncio.create_task(batch.add(house.arrival(same=same)))
        await asyncio.sleep(0.3)
        await locked.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        with pytest.raises(Unavailable):
            await waiting
    assert isinstance(await batch.add(house.arrival(same=same)), Stored)
    assert isinstance(await batch.add(house.arrival(same=same)), Seen)


async def test_around_the_border_of_two_buckets_a_post_is_known_whatever_each_gateway_thinks_the_time_is(
    house: House,
) -> None:
    border = house.partitions._buckets[-1].begins
    minute = timedelta(minutes=1)
    moments = [border + minute * n for n in (-3, -1.01, -0.99, -0.01, 0.01, 0.99, 1.01, 3)]
    for first in moments:
        for second in [m for m in moments if abs(m - first) < 2 * minute]:
            same = uuid4()
            one = await house.outbox.add([house.arrival(same=same)], house.partitions.buckets(first))
            two = await house.outbox.add([house.arrival(same=same)], house.partitions.buckets(second))
            assert isinstance(one[0], Stored)
            assert two[0].event == one[0].event, (first - border, second - border)
            assert isinstance(two[0], Seen)


@pytest.mark.parametrize("side", [-1, 1])
async def test_of_many_that_post_the_same_around_the_border_one_is_stored_and_all_hear_of_it(
    house: House, side: int
) -> None:
    """Some believe that the border is near, and some that it is not."""
    near = house.partitions._buckets[-1].begins + timedelta(minutes=side)
    keys = [uuid4() for _ in range(20)]

    async def post(n: int) -> dict[UUID, Stored | Seen]:
        mixed = random.sample(keys, len(keys))
        buckets = house.partitions.buckets(near + timedelta(seconds=1 if n % 2 else -1))
        answers = await house.outbox.add([house.arrival(same=key) for key in mixed], buckets)
        return dict(zip(mixed, answers, strict=True))

    posts = await asyncio.gather(*(post(n) for n in range(16)))
    for key in keys:
        answers = [post[key] for post in posts]
        assert sum(isinstance(answer, Stored) for answer in answers) == 1
        assert len({answer.event for answer in answers}) == 1
    assert await house.count("events") == len(keys)


# ── replays ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_replay_that_had_to_wait_for_its_letters_is_delivered(house: House) -> None:
    """Its transaction is older than what was read meanwhile."""
    await house.destination("picky")
    answers = [Refused("400 Bad Request", status=400)]
    partner = Partner(lambda _: answers.pop() if answers else Delivered())
    async with house.dispatching(house.target("picky", partner)):
        event = await house.accept("picky")
        await house.drained()
        async with house.intake.transaction() as somebody:
            await somebody.execute("LOCK TABLE dead_letters IN EXCLUSIVE MODE")
            replay = asyncio.create_task(
                DeadLetters(house.dispatch).replay(Select(events=(event,)), reason="mended", actor="anna")
            )
            for _ in range(8):
                await asyncio.sleep(0.25)
                await house.accept("picky")
        await replay
        await house.drained(5)


# ── handing over ─────────────────────────────────────────────────────────────────────────────────────


async def test_who_stops_hands_over_at_once_what_is_idle_however_long_its_last_attempt_takes(house: House) -> None:
    await house.destination("slow")
    await house.destination("quick", shards=3)

    answer = asyncio.Event()

    async def slowly(_: Delivery) -> Outcome:
        await answer.wait()
        return Delivered()

    slow, mine, theirs = Partner(slowly), Partner(), Partner()
    async with house.dispatching(house.target("slow", slow), house.target("quick", mine)) as first:
        await house.accept("slow")
        await until(lambda: slow.asked)
        stopping = asyncio.create_task(first.stop(timedelta(seconds=20)))
        async with house.dispatching(house.target("slow", Partner()), house.target("quick", theirs)):
            for _ in range(30):
                await house.accept("quick")
            await until(lambda: len(theirs.asked) == 30, 6)
            assert not stopping.done()
            answer.set()
            await stopping
            await house.drained()


async def test_what_was_committed_under_a_clock_that_was_set_back_is_found(house: House) -> None:
    await house.destination("supplier")
    partner = Partner()
    async with house.dispatching(house.target("supplier", partner)) as dispatcher:
        await house.accept("supplier")
        await until(lambda: len(partner.asked) == 1)
        await asyncio.sleep(1.5)
        dispatcher._floor += timedelta(minutes=1)  # as if these were told by a clock a minute ahead
        for own in dispatcher._lanes.values():
            own._due_at += timedelta(minutes=1)
        await house.accept("supplier", wake=False)
        await house.drained(4)


async def test_a_subject_behind_which_thousands_wait_does_not_hold_up_the_others(house: House) -> None:
    await house.destination("supplier")
    arrivals = [house.arrival("supplier", subject="order/stuck", ordered=True) for _ in range(5000)]
    for n in range(0, len(arrivals), 500):
        await house.outbox.add(arrivals[n : n + 500], house.buckets())
    await house.intake.execute(
        "UPDATE pending SET not_before = now() + interval '1 hour' WHERE event_id = $1", arrivals[0].event.id
    )
    await house.accept("supplier", subject="order/2", ordered=True)
    read, reads = house.outbox.read, 0

    async def counted(readings: list[Reading]) -> list[Taken]:
        nonlocal reads
        reads += 1
        return await read(readings)

    house.outbox.read = counted
    partner = Partner()
    async with house.dispatching(house.target("supplier", partner)):
        await until(lambda: partner.asked)
        assert reads <= 5
    assert partner.subjects == ["order/2"]


def test_one_delivery_that_is_blocked_alone_pauses_its_destination_less_and_less_often() -> None:
    now = datetime.now(UTC)
    waits = [
        decide(
            Blocked("credentials: 403", 403), schedule=SLOW, tries=1, spared=spared, now=now, deadline=now,
            repeatable=True, random=random.random,
        ).delay.total_seconds()
        for spared in (0, 1, 2, 3, 100)
    ]  # fmt: skip
    assert waits == [5, 10, 20, 40, 60]


async def test_subjects_with_much_to_deliver_do_not_keep_the_others_waiting(house: House) -> None:
    """One lane, in which more subjects wait than it reads at once."""
    lanes = (await house.destination("supplier", shards=16)).lanes
    candidates = (f"order/{n}" for n in range(10_000))
    subjects = list(islice((s for s in candidates if order_key(s) % len(lanes) == 0), 40))
    for _ in range(8):
        await house.outbox.add([house.arrival("supplier", subject=s, ordered=True) for s in subjects], house.buckets())
    partner = Partner()
    async with house.dispatching(house.target("supplier", partner, concurrency=2)):
        await house.drained(20)
    assert len(partner.asked) == 8 * len(subjects)
    assert max(map(partner.subjects.index, subjects)) < 3 * len(subjects)
