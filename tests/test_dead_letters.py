"""What could not be delivered, and what people do about it."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
import pytest_asyncio

import dead_letter.letters
from dead_letter.audit import Audit
from dead_letter.letters import DeadLetters, EmptySelectionError, Select
from dead_letter.mend import mend
from dead_letter.tokens import Role, Tokens
from outbox.database import Database
from outbox.event import OutcomeKind
from outbox.records import Records
from tests.rows import Rows


@pytest.fixture
def letters(database: Database) -> DeadLetters:
    return DeadLetters(database)


@pytest_asyncio.fixture
async def rows(database: Database) -> Rows:
    return await Rows(database).open("ledger", "picky")


async def books_balance(database: Database) -> bool:
    return (await Records(database).books()).balanced


# ── finding ──────────────────────────────────────────────────────────────────────────────────────────


async def test_dead_letters_come_the_newest_first_a_page_at_a_time(letters: DeadLetters, rows: Rows) -> None:
    made = [await rows.letter() for _ in range(5)]
    first = await letters.letters(Select(), limit=3)
    second = await letters.letters(Select(), limit=3, cursor=first.next)
    assert [letter.event_id for letter in (*first.items, *second.items)] == made[::-1]
    assert second.next is None


async def test_a_dead_letter_says_why_and_what_to_do(letters: DeadLetters, rows: Rows) -> None:
    event = await rows.letter("picky")
    (letter,) = (await letters.letters(Select())).items
    assert (letter.event_id, letter.destination, letter.cause) == (event, "picky", "picky:refused:400")
    assert (letter.outcome, letter.status, letter.reason, letter.attempts) == ("refused", 400, "HTTP 400", 1)
    assert (letter.type, letter.subject, letter.facility) == ("shop.order.paid", "order/42", "north")
    assert letter.mend.startswith("picky understood and said no")


async def test_each_filter_narrows(letters: DeadLetters, rows: Rows, database: Database) -> None:
    here = await rows.letter("picky")
    there = await rows.letter("ledger", subject="order/7", facility="south")
    await database.execute("UPDATE dead_letters SET died_at = died_at - interval '1 day' WHERE event_id = $1", there)
    yesterday = datetime.now(UTC) - timedelta(hours=12)
    for select, expected in (
        (Select(destination="picky"), here),
        (Select(cause="ledger:refused:400"), there),
        (Select(subject="order/7"), there),
        (Select(facility="north"), here),
        (Select(events=(there,)), there),
        (Select(since=yesterday), here),
        (Select(until=yesterday), there),
    ):
        assert [letter.event_id for letter in (await letters.letters(select)).items] == [expected], select
        assert [cause.count for cause in (await letters.causes(select)).items] == [1], select
        assert (await letters.preview(select)).count == 1, select


async def test_a_dead_letter_whose_event_is_gone_is_still_shown(
    letters: DeadLetters, rows: Rows, database: Database
) -> None:
    event = await rows.letter()
    await database.execute("DELETE FROM events")
    (letter,) = (await letters.letters(Select())).items
    assert (letter.event_id, letter.type) == (event, None)


async def test_causes_are_told_once_each_the_latest_first(letters: DeadLetters, rows: Rows) -> None:
    for _ in range(3):
        await rows.letter("picky")
    await rows.letter("ledger")
    first = await letters.causes(Select(), limit=1)
    second = await letters.causes(Select(), limit=1, cursor=first.next)
    assert [(c.cause, c.destination, c.count) for c in (*first.items, *second.items)] == [
        ("ledger:refused:400", "ledger", 1),
        ("picky:refused:400", "picky", 3),
    ]
    assert second.items[0].first_seen < second.items[0].last_seen
    assert second.next is None


def test_every_outcome_has_a_mend_of_one_sentence() -> None:
    for outcome in OutcomeKind:
        for status in (None, 301, 400, 404, 409, 410, 413, 422):
            told = mend("picky", outcome, status, "picky:x:y")
            assert told.endswith(".")
            assert told.count(".") == 1
            assert "picky" in told
    assert "three times" in mend("picky", OutcomeKind.UNKNOWN, None, "picky:unknown:killed the dispatcher")


# ── replay ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_replay_waits_again_with_its_tries_counted_on(
    letters: DeadLetters, rows: Rows, database: Database
) -> None:
    event = await rows.event("picky")
    await rows.tried(event, "picky")
    await rows.dead(event, "picky")
    done = await letters.replay(Select(events=(event,)), reason="partner mended", actor="Maria")
    assert (done.count, done.more) == (1, False)
    row = await database.fetchrow(
        "SELECT event_id, attempts, spared, due_at <= now() AS due, owed_since > now() - interval '5 s' AS anew FROM pending"
    )
    assert row is not None
    assert dict(row) == {"event_id": event, "attempts": 2, "spared": 2, "due": True, "anew": True}
    assert await rows.count("dead_letters") == 0
    assert await books_balance(database)


async def test_a_delivery_in_order_keeps_its_key_and_its_deadline(
    letters: DeadLetters, rows: Rows, database: Database
) -> None:
    event = await rows.letter()
    await database.execute("UPDATE dead_letters SET key = 77, give_up = 120")
    await letters.replay(Select(events=(event,)), reason="r", actor="Maria")
    assert dict(await database.fetchrow("SELECT key, give_up, not_before FROM pending") or {}) == {
        "key": 77,
        "give_up": 120,
        "not_before": None,
    }


async def test_replays_queue_in_the_order_of_acceptance(letters: DeadLetters, rows: Rows, database: Database) -> None:
    first, second, third = [await rows.event("picky") for _ in range(3)]
    for event in (third, first, second):
        await rows.dead(event, "picky")
    await letters.replay(Select(destination="picky"), reason="r", actor="Maria")
    queue = await database.fetch("SELECT event_id FROM pending ORDER BY lane, due_at, event_id")
    assert [row["event_id"] for row in queue] == [first, second, third]


async def test_dispatchers_are_woken_after_the_commit(letters: DeadLetters, rows: Rows, database: Database) -> None:
    await rows.letter("picky")
    await rows.letter("ledger")
    heard: list[str] = []
    async with database.session() as session:
        await session.add_listener("sluicegate_wake", lambda *what: heard.append(str(what[-1])))
        await letters.replay(Select(facility="north"), reason="r", actor="Maria")
        await session.fetchval("SELECT 1")
    lanes = [row["lane"] for row in await database.fetch("SELECT lane FROM lanes ORDER BY lane")]
    assert heard == [",".join(map(str, lanes))]


async def test_a_preview_counts_and_changes_nothing(letters: DeadLetters, rows: Rows, database: Database) -> None:
    for destination in ("picky", "picky", "ledger"):
        await rows.letter(destination)
    preview = await letters.preview(Select(subject="order/42"))
    assert (preview.count, preview.destinations, preview.more) == (3, {"picky": 2, "ledger": 1}, False)
    assert preview.causes == {"picky:refused:400": 2, "ledger:refused:400": 1}
    assert (await rows.count("dead_letters"), await rows.count("pending"), await rows.count("audit")) == (3, 0, 0)


async def test_an_empty_selection_is_refused(letters: DeadLetters, rows: Rows) -> None:
    await rows.letter()
    for attempt in (
        letters.preview(Select()),
        letters.replay(Select(), reason="r", actor="Maria"),
        letters.discard(Select(), reason="r", actor="Maria"),
    ):
        with pytest.raises(EmptySelectionError):
            await attempt
    assert await rows.count("dead_letters") == 1


async def test_two_people_who_replay_the_same_replay_it_once(
    letters: DeadLetters, rows: Rows, database: Database
) -> None:
    for _ in range(20):
        await rows.letter()
    done = await asyncio.gather(
        *(letters.replay(Select(destination="picky"), reason="r", actor=who) for who in ("Maria", "Omar", "Ana"))
    )
    assert sum(repair.count for repair in done) == 20
    assert await rows.count("pending") == 20
    assert await books_balance(database)


async def test_what_dies_while_a_replay_runs_is_not_in_it(letters: DeadLetters, rows: Rows, database: Database) -> None:
    """So a partner that refuses again is not asked again and again by one replay."""
    await rows.letter()
    frozen = await database.fetchval("SELECT clock_timestamp()")
    again = await rows.letter()
    async with database.transaction() as connection:
        taken = await letters._lock(connection, Select(destination="picky"), frozen, None, 10)
    assert len(taken) == 1
    assert taken[0]["event_id"] != again


async def test_what_is_more_than_is_taken_at_once_is_taken_by_running_again(
    letters: DeadLetters, rows: Rows, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letter.letters, "AT_ONCE", 5)
    monkeypatch.setattr(dead_letter.letters, "BATCH", 2)
    for _ in range(7):
        await rows.letter()
    select = Select(destination="picky")
    assert (await letters.preview(select)).more
    first = await letters.replay(select, reason="r", actor="Maria")
    second = await letters.replay(select, reason="r", actor="Maria")
    assert [(first.count, first.more), (second.count, second.more)] == [(5, True), (2, False)]
    deeds = (await Audit(database).deeds()).items
    assert [deed.detail["count"] for deed in deeds] == [2, 1, 2, 2]
    assert {deed.detail["id"] for deed in deeds} == {str(first.id), str(second.id)}
    assert await books_balance(database)


# ── discard ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_discard_ends_a_delivery_with_its_reason(letters: DeadLetters, rows: Rows, database: Database) -> None:
    event = await rows.letter()
    done = await letters.discard(Select(events=(event,)), reason="ordered by phone", actor="Maria")
    assert done.count == 1
    told = await Records(database).event(event)
    assert told is not None
    assert (told.deliveries[0].state, told.deliveries[0].reason) == ("discarded", "ordered by phone")
    assert (await rows.count("pending"), await rows.count("dead_letters")) == (0, 0)
    assert await books_balance(database)


async def test_what_is_discarded_cannot_be_replayed(letters: DeadLetters, rows: Rows, database: Database) -> None:
    event = await rows.letter()
    await letters.discard(Select(events=(event,)), reason="r", actor="Maria")
    assert (await letters.replay(Select(events=(event,)), reason="r", actor="Maria")).count == 0
    assert await books_balance(database)


# ── audit ────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_audit_says_who_what_which_and_why(letters: DeadLetters, rows: Rows, database: Database) -> None:
    event = await rows.letter()
    done = await letters.replay(Select(events=(event,), destination="picky"), reason="partner mended", actor="Maria")
    (deed,) = (await Audit(database).deeds()).items
    assert (deed.actor, deed.action, deed.target) == ("Maria", "dead-letters.replay", str(event))
    assert deed.reason == "partner mended"
    assert deed.detail == {
        "id": str(done.id),
        "select": {"events": [str(event)], "destination": "picky"},
        "count": 1,
        "deliveries": [f"{event}/picky"],
    }


async def test_an_action_that_takes_nothing_leaves_no_audit(letters: DeadLetters, rows: Rows) -> None:
    assert (await letters.replay(Select(destination="picky"), reason="r", actor="Maria")).count == 0
    assert await rows.count("audit") == 0


async def test_the_deeds_about_one_event_are_told_without_those_about_others(
    letters: DeadLetters, rows: Rows, database: Database
) -> None:
    mine, other = await rows.letter(), await rows.letter()
    await letters.replay(Select(destination="picky"), reason="all of them", actor="Maria")
    await rows.dead(mine, "picky")
    await letters.discard(Select(events=(mine,)), reason="enough", actor="Omar")
    deeds = await Audit(database).of_event(mine)
    assert [(deed.action, deed.actor, deed.detail["deliveries"]) for deed in deeds] == [
        ("dead-letters.replay", "Maria", [f"{mine}/picky"]),
        ("dead-letters.discard", "Omar", [f"{mine}/picky"]),
    ]
    assert [deed.actor for deed in await Audit(database).of_event(other)] == ["Maria"]


async def test_each_filter_of_the_audit_narrows(letters: DeadLetters, rows: Rows, database: Database) -> None:
    event = await rows.letter()
    await letters.discard(Select(events=(event,)), reason="r", actor="Maria")
    await Tokens(database).create("console", Role.VIEWER, by="Omar")
    audit, now = Audit(database), datetime.now(UTC)
    assert [d.actor for d in (await audit.deeds()).items] == ["Omar", "Maria"]
    assert [d.action for d in (await audit.deeds(actor="Omar")).items] == ["token.create"]
    assert [d.actor for d in (await audit.deeds(action="dead-letters.discard")).items] == ["Maria"]
    assert [d.actor for d in (await audit.deeds(target="console")).items] == ["Omar"]
    assert (await audit.deeds(until=now - timedelta(hours=1))).items == []
    page = await audit.deeds(limit=1, since=now - timedelta(hours=1))
    assert [d.actor for d in (await audit.deeds(cursor=page.next)).items] == ["Maria"]


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_token_names_its_holder_and_only_its_digest_is_kept(database: Database) -> None:
    tokens = Tokens(database)
    token = await tokens.create("night shift", Role.OPERATOR, by="Maria")
    holder = await tokens.holder(token)
    assert holder is not None
    assert (holder.name, holder.role) == ("night shift", Role.OPERATOR)
    stored = str(await database.fetch("SELECT t::text, encode(digest, 'hex') FROM tokens AS t"))
    stored += str(await database.fetch("SELECT a::text FROM audit AS a"))
    assert token.rpartition("_")[2] not in stored
    assert len(token.partition("_")[2].partition("_")[2]) == 43, "256 bits"


async def test_what_is_no_token_of_ours_has_no_holder(database: Database) -> None:
    tokens = Tokens(database)
    token = await tokens.create("night shift", Role.OPERATOR, by="Maria")
    for wrong in (
        "", "sg", "sg_", "sg__", "nonsense", token[:-1], token + "x", token.upper(), token.replace("sg_", "gs_"),
        "sg_000000000000_" + token.split("_", 2)[2], "sg_" + token.split("_")[1] + "_", "sg_é_é",
    ):  # fmt: skip
        assert await tokens.holder(wrong) is None, wrong


async def test_a_token_that_is_taken_back_is_refused_at_once(database: Database) -> None:
    tokens = Tokens(database)
    token = await tokens.create("night shift", Role.LEAD, by="Maria")
    (listed,) = await tokens.all()
    assert (listed.name, listed.role) == ("night shift", Role.LEAD)
    assert await tokens.revoke(listed.id, by="Maria")
    assert await tokens.holder(token) is None
    assert not await tokens.revoke(listed.id, by="Maria")
