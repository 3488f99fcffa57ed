"""The proof that nothing is lost: it holds in every state, and any tampering shows."""

import asyncio

import pytest
import pytest_asyncio

from dead_letter.letters import DeadLetters, Select
from outbox.database import Database
from outbox.destinations import Destinations
from outbox.event import OutcomeKind
from outbox.records import DeliverySums, EventSums, Records
from tests.rows import Rows


@pytest.fixture
def records(database: Database) -> Records:
    return Records(database)


@pytest_asyncio.fixture
async def rows(database: Database) -> Rows:
    """One event of every fate: see `one_of_each`."""
    rows = await Rows(database).open("ledger", "picky", "patient")
    await rows.event()  # unrouted
    both = await rows.event("ledger", "patient")
    await rows.delivered(both, "ledger")  # patient: held, below
    shaky = await rows.event("ledger", "picky")
    await rows.tried(shaky, "ledger")  # waits
    await rows.dead(shaky, "picky")
    twice = await rows.event("ledger")
    await rows.tried(twice, "ledger", OutcomeKind.UNKNOWN, 0)
    await rows.delivered(twice, "ledger")
    gone = await rows.event("picky")
    await rows.dead(gone, "picky")
    await DeadLetters(database).discard(Select(events=(gone,)), reason="not wanted", actor="Maria")
    await Destinations(database).hold("patient", until=None, reason="they move house", by="Maria")
    return rows


async def test_an_empty_database_balances(records: Records) -> None:
    books = await records.books()
    assert (books.balanced, books.events, books.deliveries) == (True, EventSums(), DeliverySums())


async def test_both_sums_hold_over_one_event_of_every_fate(records: Records, rows: Rows) -> None:
    books = await records.books()
    assert books.events == EventSums(accepted=5, routed=4, unrouted=1)
    assert books.deliveries == DeliverySums(owed=6, delivered=2, waiting=1, held=1, dead=1, discarded=1)
    assert (books.balanced, books.sums, books.tally, books.differences) == (True, True, True, [])


@pytest.mark.parametrize(
    ("tampering", "sums", "tally"),
    [
        ("DELETE FROM pending WHERE attempts = 1", False, True),
        ("DELETE FROM dead_letters", False, False),
        ("DELETE FROM discards", False, False),
        ("DELETE FROM attempts WHERE outcome = 0", False, False),
        ("DELETE FROM events WHERE owed <> '{}'", False, False),
        ("DELETE FROM events WHERE owed = '{}'", True, False),
        ("DELETE FROM tally WHERE what = 3", True, False),
        ("INSERT INTO tally SELECT day, what, destination, 1 FROM tally LIMIT 1", True, False),
        ("INSERT INTO pending (event_id, due_at, owed_since, lane) SELECT id, now(), now(), 1 FROM events WHERE owed = '{}'", False, True),
    ],
)  # fmt: skip
async def test_whatever_is_lost_or_invented_shows(
    records: Records, rows: Rows, database: Database, tampering: str, sums: bool, tally: bool
) -> None:
    await database.execute(tampering)
    books = await records.books()
    assert (books.balanced, books.sums, books.tally) == (False, sums, tally)
    assert books.differences


async def test_a_difference_says_where_and_by_how_much(records: Records, rows: Rows, database: Database) -> None:
    await database.execute("DELETE FROM pending WHERE attempts = 1")
    (difference,) = (await records.books()).differences
    assert (difference.destination, difference.rows, difference.expected) == ("ledger", 3, 2)
    assert difference.what.startswith("owed = ")


async def test_the_metric_sees_what_the_small_tables_lack(records: Records, rows: Rows, database: Database) -> None:
    assert all(standing.balanced for standing in await records.standings())
    await database.execute("DELETE FROM pending WHERE attempts = 1")
    assert {s.name: s.balanced for s in await records.standings()} == {"ledger": False, "picky": True, "patient": True}


async def test_what_was_carried_over_counts_once_before_and_after_its_partition_goes(
    records: Records, rows: Rows, database: Database
) -> None:
    """The steps of retention: what ended is forgotten, what is owed is carried over, and the tally is counted again."""
    async with database.transaction() as connection:
        for step in (
            """
            INSERT INTO carried_events SELECT e.* FROM events AS e
             WHERE id IN (SELECT event_id FROM pending UNION SELECT event_id FROM dead_letters)
            """,
            "INSERT INTO carried_attempts SELECT a.* FROM attempts AS a WHERE event_id IN (SELECT id FROM carried_events)",
            "UPDATE lanes SET carried_below = 'ffffffff-ffff-ffff-ffff-ffffffffffff'",
            "DELETE FROM discards",
            "DELETE FROM tally",
            """
            INSERT INTO tally (day, what, destination, n)
            SELECT event_day(id), 1, 0, count(*) FROM carried_events GROUP BY 1
             UNION ALL
            SELECT event_day(id), 2, d, count(*) FROM carried_events, unnest(owed) AS d GROUP BY 1, 3
             UNION ALL
            SELECT event_day(event_id), 3, destination, count(*) FROM carried_attempts WHERE outcome = 0 GROUP BY 1, 3
             UNION ALL
            SELECT event_day(event_id), 4, destination, count(*) FROM dead_letters GROUP BY 1, 3
            """,
        ):
            await connection.execute(step)
    between = await records.books()
    await database.execute("TRUNCATE events, attempts")
    after = await records.books()
    assert after == between
    assert (after.balanced, after.differences) == (True, [])
    assert after.deliveries == DeliverySums(owed=4, delivered=1, waiting=1, held=1, dead=1)


async def test_the_books_balance_at_every_moment_of_a_replay(records: Records, rows: Rows, database: Database) -> None:
    """A proof is one snapshot: it never sees a delivery leave one table before it is in the next."""
    for _ in range(50):
        await rows.letter("picky")
    letters, seen = DeadLetters(database), []

    async def look() -> None:
        while len(seen) < 200:
            seen.append((await records.books()).balanced)
            await asyncio.sleep(0)

    async def move() -> None:
        for event in (await letters.letters(Select(destination="picky"), limit=200)).items:
            await letters.replay(Select(events=(event.event_id,)), reason="mended", actor="Maria")

    looking = asyncio.create_task(look())
    await move()
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    assert seen
    assert all(seen)
