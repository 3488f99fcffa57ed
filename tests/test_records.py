"""What people read."""

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from outbox.database import Database
from outbox.destinations import Destinations, UnknownDestinationError
from outbox.event import OutcomeKind, State
from outbox.page import BadCursorError
from outbox.records import Records, Whereabouts
from tests.rows import Rows, ids

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def records(database: Database) -> Records:
    return Records(database)


@pytest_asyncio.fixture
async def rows(database: Database) -> Rows:
    return await Rows(database).open("ledger", "picky", "patient")


async def test_events_come_the_newest_first_a_page_at_a_time(records: Records, rows: Rows) -> None:
    made = [await rows.event() for _ in range(5)]
    first = await records.events(limit=2)
    second = await records.events(limit=2, cursor=first.next)
    third = await records.events(limit=2, cursor=second.next)
    assert [*ids(first.items), *ids(second.items), *ids(third.items)] == made[::-1]
    assert third.next is None


async def test_what_is_accepted_meanwhile_shifts_no_page(records: Records, rows: Rows) -> None:
    made = [await rows.event() for _ in range(4)]
    first = await records.events(limit=2)
    await rows.event()
    assert ids((await records.events(limit=2, cursor=first.next)).items) == made[1::-1]


@pytest.mark.parametrize("cursor", ["nonsense", "", "bnVsbA", "é", "A" * 1000])
async def test_a_cursor_that_is_none_of_ours_is_refused(records: Records, rows: Rows, cursor: str) -> None:
    with pytest.raises(BadCursorError):
        await records.events(cursor=cursor)


async def test_each_filter_narrows(records: Records, rows: Rows) -> None:
    day = timedelta(days=1)
    old = await rows.event(ago=3 * day)
    other = await rows.event(source="meter", type="meter.read", subject="meter/1", facility="south")
    paid = await rows.event(type="shop.order.paid")
    bare = await rows.event(type="shop.orders", subject=None, facility=None)
    now = datetime.now(UTC)
    assert ids((await records.events(source="meter")).items) == [other]
    assert ids((await records.events(source="/sources/meter")).items) == [other]
    assert ids((await records.events(type="shop.order.paid")).items) == [paid, old]
    assert ids((await records.events(type="shop.order.*")).items) == [paid, old]
    assert ids((await records.events(type="shop.*")).items) == [bare, paid, old]
    assert ids((await records.events(subject="meter/1")).items) == [other]
    assert ids((await records.events(facility="south")).items) == [other]
    assert ids((await records.events(until=now - day)).items) == [old]
    assert ids((await records.events(since=now - day, type="shop.order.*")).items) == [paid]


async def test_a_list_tells_where_every_delivery_stands(records: Records, rows: Rows) -> None:
    event = await rows.event("picky", "ledger")
    await rows.delivered(event, "ledger")
    unrouted = await rows.event()
    found = {item.id: [(d.destination, d.state) for d in item.deliveries] for item in (await records.events()).items}
    assert found == {event: [("picky", "waiting"), ("ledger", "delivered")], unrouted: []}


async def test_one_event_is_told_with_every_attempt(records: Records, rows: Rows) -> None:
    event = await rows.event("ledger", trace=TRACE)
    await rows.tried(event, "ledger")
    await rows.tried(event, "ledger")
    await rows.delivered(event, "ledger")
    told = await records.event(event)
    assert told is not None
    assert (told.id, told.specversion, told.source, told.subject) == (event, "1.0", "/sources/shop", "order/42")
    assert (told.policy, told.policy_version, told.data) == ("order", 1, {"id": 42, "total": "42.50"})
    assert told.trace_id == "0af7651916cd43dd8448eb211c80319c"
    (delivery,) = told.deliveries
    assert (delivery.destination, delivery.state, delivery.due_at) == ("ledger", "delivered", None)
    assert [(a.number, a.outcome, a.status, a.took_ms) for a in delivery.attempts] == [
        (1, "retry", 503, 12),
        (2, "retry", 503, 12),
        (3, "delivered", 200, 12),
    ]
    assert all(a.trace_id and len(UUID(a.trace_id).hex) == 32 for a in delivery.attempts)


async def test_a_delivery_stands_in_each_of_its_states(records: Records, rows: Rows, database: Database) -> None:
    event = await rows.event("ledger", "picky", "patient")

    async def states() -> dict[str, tuple[str, str | None]]:
        told = await records.event(event)
        assert told is not None
        return {d.destination: (d.state, d.reason) for d in told.deliveries}

    assert {state for state, _ in (await states()).values()} == {"waiting"}
    await Destinations(database).hold("patient", until=None, reason="they move house", by="Maria")
    await rows.dead(event, "picky")
    await rows.delivered(event, "ledger")
    assert await states() == {
        "ledger": ("delivered", None),
        "picky": ("dead", "HTTP 400"),
        "patient": ("held", "they move house"),
    }
    await Destinations(database).release("patient", by="Maria", reason="moved")
    assert (await states())["patient"] == ("waiting", None)


async def test_a_delivery_that_waits_after_a_try_says_what_the_try_met(
    records: Records, rows: Rows, database: Database
) -> None:
    event = await rows.event("ledger", "picky")
    await rows.tried(event, "ledger", OutcomeKind.RETRY, 503)
    await rows.tried(event, "ledger", OutcomeKind.RETRY, 502)

    async def reasons() -> dict[str, str | None]:
        told = await records.event(event)
        assert told is not None
        return {delivery.destination: delivery.reason for delivery in told.deliveries}

    assert await reasons() == {"ledger": "HTTP 502", "picky": None}
    await Destinations(database).hold("ledger", until=None, reason="they move house", by="Maria")
    assert await reasons() == {"ledger": "they move house", "picky": None}


async def test_a_hold_that_is_over_holds_nothing(records: Records, rows: Rows, database: Database) -> None:
    event = await rows.event("patient")
    await Destinations(database).hold("patient", until=datetime.now(UTC) - timedelta(seconds=1), reason="r", by="M")
    told = await records.event(event)
    assert told is not None
    assert told.deliveries[0].state == "waiting"
    standing = {s.name: s for s in await records.standings()}["patient"]
    assert (standing.state, standing.reason, standing.held_by) == ("flowing", None, None)


async def test_a_delivery_that_is_nowhere_is_shown_as_missing_and_not_hidden(
    records: Records, rows: Rows, database: Database
) -> None:
    event = await rows.event("ledger")
    await database.execute("DELETE FROM pending")
    told = await records.event(event)
    assert told is not None
    assert told.deliveries[0].state == "missing"
    assert not (await records.books()).balanced


async def test_an_event_that_outlived_its_partition_is_told_as_before(
    records: Records, rows: Rows, database: Database
) -> None:
    event, other = await rows.event("ledger"), await rows.event("ledger")
    await rows.tried(event, "ledger")
    before = await records.event(event)
    await database.execute("INSERT INTO carried_events SELECT * FROM events WHERE id = $1", event)
    await database.execute("INSERT INTO carried_attempts SELECT * FROM attempts WHERE event_id = $1", event)
    assert ids((await records.events()).items) == [other, event], "shown once while it is in both tables"
    assert await records.event(event) == before
    await database.execute("DELETE FROM events WHERE id = $1", event)
    await database.execute("DELETE FROM attempts WHERE event_id = $1", event)
    assert ids((await records.events()).items) == [other, event]
    assert await records.event(event) == before


async def test_there_is_no_event_of_an_unknown_id(records: Records, rows: Rows) -> None:
    assert await records.event(uuid4()) is None


async def test_destinations_tell_what_waits_and_for_how_long(records: Records, rows: Rows, database: Database) -> None:
    await rows.event("ledger", ago=timedelta(seconds=90))
    await rows.event("ledger")
    await rows.letter("picky")
    await Destinations(database).hold("patient", until=None, reason="r", by="Maria")
    standings = {standing.name: standing for standing in await records.standings()}
    ledger, picky, patient = standings["ledger"], standings["picky"], standings["patient"]
    assert (ledger.state, ledger.waiting, ledger.dead, ledger.balanced) == ("flowing", 2, 0, True)
    assert ledger.oldest_waiting_seconds is not None
    assert 89 < ledger.oldest_waiting_seconds < 100
    assert (picky.waiting, picky.oldest_waiting_seconds, picky.dead, picky.balanced) == (0, None, 1, True)
    assert (patient.state, patient.reason, patient.held_by, patient.until) == ("held", "r", "Maria", None)


async def test_a_backoff_of_a_whole_destination_is_told(records: Records, rows: Rows, database: Database) -> None:
    await database.execute("UPDATE destinations SET not_before = now() + interval '1 minute' WHERE name = 'ledger'")
    standing = {s.name: s for s in await records.standings()}["ledger"]
    assert standing.state == "backing off"
    assert standing.until is not None


async def test_a_destination_whose_books_differ_says_so(records: Records, rows: Rows, database: Database) -> None:
    await rows.event("ledger")
    await database.execute("DELETE FROM pending")
    balanced = {s.name: s.balanced for s in await records.standings()}
    assert balanced == {"ledger": False, "picky": True, "patient": True}


async def test_rejections_come_the_newest_first(records: Records, rows: Rows) -> None:
    now = datetime.now(UTC)
    for n in range(3):
        await rows.rejected("shop", "signature", n + 1, now - timedelta(minutes=n))
    await rows.rejected("", "source", 7, now)
    await rows.rejected("", "source", 8, now)
    first = await records.rejections(limit=3)
    second = await records.rejections(limit=3, cursor=first.next)
    assert [r.count for r in (*first.items, *second.items)] == [8, 7, 1, 2, 3]
    assert [r.count for r in (await records.rejections(source="shop", since=now - timedelta(seconds=90))).items] == [
        1,
        2,
    ]
    assert all(len(digest) == 32 for r in first.items for digest in r.digests)


async def test_a_person_takes_over_a_hold_of_the_program(records: Records, rows: Rows, database: Database) -> None:
    await database.execute(
        "UPDATE destinations SET held_until = now() + interval '1 hour', held_by = 'program', held_reason = 'credentials'"
        " WHERE name = 'ledger'"
    )
    await Destinations(database).hold("ledger", until=None, reason="mine now", by="Maria")
    standing = {s.name: s for s in await records.standings()}["ledger"]
    assert (standing.held_by, standing.reason, standing.until) == ("Maria", "mine now", None)


async def test_release_says_whether_it_was_held_and_ends_a_backoff(
    records: Records, rows: Rows, database: Database
) -> None:
    destinations = Destinations(database)
    await database.execute("UPDATE destinations SET not_before = now() + interval '1 hour'")
    assert not await destinations.release("ledger", by="Maria", reason="try again")
    await destinations.hold("ledger", until=None, reason="r", by="Maria")
    assert await destinations.release("ledger", by="Omar", reason="mended")
    assert {s.name: s.state for s in await records.standings()}["ledger"] == "flowing"
    assert [
        (row["actor"], row["action"], row["target"], row["reason"])
        for row in await database.fetch("SELECT actor, action, target, reason FROM audit ORDER BY id")
    ] == [("Maria", "destination.hold", "ledger", "r"), ("Omar", "destination.release", "ledger", "mended")]


async def test_nobody_holds_a_destination_that_is_not_there(rows: Rows, database: Database) -> None:
    with pytest.raises(UnknownDestinationError, match='did you mean "ledger"'):
        await Destinations(database).hold("ledgr", until=None, reason="r", by="Maria")
    with pytest.raises(UnknownDestinationError):
        await Destinations(database).release("nobody", by="Maria", reason="r")
    assert await rows.count("audit") == 0


async def test_dispatchers_are_told_of_a_hold(rows: Rows, database: Database) -> None:
    heard: list[str] = []
    async with database.session() as session:
        await session.add_listener("sluicegate_destinations", lambda *what: heard.append(str(what[-1])))
        await Destinations(database).hold("ledger", until=None, reason="r", by="Maria")
        await Destinations(database).release("ledger", by="Maria", reason="r")
        await session.fetchval("SELECT 1")
    assert heard == ["ledger", "ledger"]


def test_what_is_shown_are_the_states_of_the_drawing_and_one_that_cannot_be() -> None:
    assert {*Whereabouts.__args__} == {*State, "missing"}  # type: ignore[attr-defined]
    assert OutcomeKind.DELIVERED.word == "delivered"
