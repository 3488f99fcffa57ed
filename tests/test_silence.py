"""Silence is a fault: who does not post as expected is told of, once, and again when it is over.

Time passes here by moving what is written in the database back; the clock is the database's own.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import pytest_asyncio

from outbox.announcements import Announcements
from outbox.cadence import Cadence
from outbox.database import Database
from outbox.expectations import Expectations
from outbox.records import Standing
from tests.house import until
from tests.serving import CONFIGURATION, Partner, Program, order, partner, serving

HOUR = timedelta(hours=1)
HOURLY = Cadence(every=HOUR, zone=ZoneInfo("UTC"))
NORTH, SOUTH, WHOLE = ("lab", "north"), ("lab", "south"), ("lab", "")


class Watch:
    """The watch, and the time that passes under it."""

    def __init__(self, database: Database, cadence: Cadence = HOURLY) -> None:
        self.database = database
        self.expectations = Expectations(database)
        self.cadence = cadence

    async def look(self, *parties: tuple[str, str]) -> list[tuple[str | None, str]]:
        """Who has turned just now: (facility, silent or heard)."""
        _, turns = await self.expectations.watch(dict.fromkeys(parties, self.cadence))
        return [(turn.facility, "silent" if turn.silent else "heard") for turn in turns]

    async def hear(self, party: tuple[str, str]) -> None:
        now = await self.database.fetchval("SELECT clock_timestamp()")
        await self.expectations.hear({party: now})

    async def pass_by(self, time: timedelta, *, watched: bool = True) -> None:
        await self.database.execute("UPDATE heard SET at = at - $1::interval", time)
        await self.database.execute(
            """
            UPDATE expectations
               SET watched_since = watched_since - $1::interval,
                   silent_since = silent_since - $1::interval,
                   watched_at = watched_at - CASE WHEN $2 THEN interval '0' ELSE $1::interval END
            """,
            time,
            watched,
        )

    async def told(self) -> list[str]:
        return [a.type.removeprefix("sluicegate.") for a in await Announcements(self.database).waiting()]


async def test_a_source_that_was_just_configured_is_silent_only_after_a_whole_time_of_its_own(
    database: Database,
) -> None:
    watch = Watch(database)
    assert await watch.look(WHOLE) == []
    await watch.pass_by(HOUR - timedelta(minutes=1))
    assert await watch.look(WHOLE) == []
    await watch.pass_by(timedelta(minutes=2))
    assert await watch.look(WHOLE) == [(None, "silent")]


async def test_silence_is_told_once_and_its_end_once_however_many_watch(dsn: str, database: Database) -> None:
    watches = [Watch(database) for _ in range(4)]
    await watches[0].look(WHOLE)
    await watches[0].hear(("lab", "north"))
    await watches[0].pass_by(HOUR + timedelta(minutes=1))
    turns = await all_have_seen_before_one_writes(dsn, watches)
    assert sorted(turns) == [[], [], [], [(None, "silent")]]
    assert await watches[0].look(WHOLE) == []
    await watches[0].hear(("lab", ""))
    turns = await all_have_seen_before_one_writes(dsn, watches)
    assert sorted(turns) == [[], [], [], [(None, "heard")]]
    assert await watches[0].told() == ["source.silent", "source.resumed"]


async def all_have_seen_before_one_writes(dsn: str, watches: list[Watch]) -> list[list[tuple[str | None, str]]]:
    """The worst moment: each has read the same, and waits for the lock of the table where it would announce it."""
    beside = await Database.connect(dsn, size=2)

    async def all_wait() -> bool:
        return len(watches) == await beside.fetchval(
            """
            SELECT count(*)
              FROM pg_locks
             WHERE relation = 'announcements'::regclass
               AND mode = 'RowExclusiveLock'
               AND NOT granted
            """
        )

    async with beside.transaction() as holder:
        await holder.execute("LOCK TABLE announcements IN SHARE MODE")
        looking = [asyncio.create_task(watch.look(WHOLE)) for watch in watches]
        await until(all_wait)
    turns = await asyncio.gather(*looking)
    await beside.close()
    return turns


async def test_each_facility_is_expected_for_itself(database: Database) -> None:
    watch = Watch(database)
    await watch.look(NORTH, SOUTH)
    await watch.pass_by(HOUR)
    await watch.hear(NORTH)
    await watch.pass_by(timedelta(minutes=1))
    assert await watch.look(NORTH, SOUTH) == [("south", "silent")]
    await watch.hear(SOUTH)
    await watch.hear(NORTH)
    assert await watch.look(NORTH, SOUTH) == [("south", "heard")]


async def test_an_older_word_of_another_door_takes_nothing_back(database: Database) -> None:
    watch = Watch(database)
    await watch.look(WHOLE)
    await watch.hear(NORTH)
    before = await database.fetchval("SELECT at FROM heard")
    await watch.expectations.hear({NORTH: before - HOUR})
    assert await database.fetchval("SELECT at FROM heard") == before


async def test_time_in_which_nobody_watched_is_no_silence(database: Database) -> None:
    watch = Watch(database)
    await watch.look(WHOLE)
    await watch.hear(NORTH)
    await watch.pass_by(3 * HOUR, watched=False)  # the program was down
    assert await watch.look(WHOLE) == []
    await watch.pass_by(HOUR - timedelta(minutes=1))
    assert await watch.look(WHOLE) == []
    await watch.pass_by(timedelta(minutes=2))
    assert await watch.look(WHOLE) == [(None, "silent")]


async def test_a_deploy_neither_forgets_a_silence_nor_tells_it_twice(database: Database) -> None:
    watch = Watch(database)
    await watch.look(WHOLE)
    await watch.pass_by(HOUR - timedelta(minutes=5))
    await watch.look(WHOLE)
    await watch.pass_by(timedelta(seconds=40), watched=False)  # nobody watched for less than a minute
    await watch.look(WHOLE)
    await watch.pass_by(timedelta(minutes=5))
    assert await watch.look(WHOLE) == [(None, "silent")]
    await watch.pass_by(2 * HOUR, watched=False)
    assert await watch.look(WHOLE) == []
    await watch.hear(NORTH)
    assert await watch.look(WHOLE) == [(None, "heard")]


async def test_other_terms_begin_anew(database: Database) -> None:
    watch = Watch(database, Cadence(every=24 * HOUR, zone=ZoneInfo("UTC")))
    await watch.look(WHOLE)
    await watch.pass_by(5 * HOUR)
    watch.cadence = HOURLY
    assert await watch.look(WHOLE) == []
    await watch.pass_by(HOUR + timedelta(minutes=1))
    assert await watch.look(WHOLE) == [(None, "silent")]


# ── destinations ─────────────────────────────────────────────────────────────────────────────────────


def standing(oldest: float | None, *, state: str = "flowing", name: str = "ledger") -> Standing:
    return Standing(
        name=name, state=state, reason=None, held_by=None, until=None, waiting=3, oldest_waiting_seconds=oldest, dead=0, balanced=True, configured=True
    )  # fmt: skip


async def test_a_destination_is_late_once_until_it_has_caught_up(database: Database) -> None:
    await database.execute("INSERT INTO destinations (name, shards) VALUES ('ledger', 1), ('other', 1)")
    expectations, within = Expectations(database), {"ledger": timedelta(minutes=10)}

    async def judged(oldest: float | None, state: str = "flowing") -> list[bool]:
        told = [standing(oldest, state=state), standing(10_000, name="other")]
        return [turn.late for turn in await expectations.judge(told, within)]

    assert await judged(590) == []
    assert await judged(610, "held") == [True]
    for again in (620, 610, 590, 400, 650):  # it hovers
        assert await judged(again) == []
    assert await judged(200) == [False]
    assert await judged(None) == []
    late, recovered = await Announcements(database).waiting()
    assert (late.type, late.data["state"], late.data["within"]) == ("sluicegate.destination.late", "held", "10m")
    assert (recovered.type, recovered.subject) == ("sluicegate.destination.recovered", "destination/ledger")


# ── the whole program ────────────────────────────────────────────────────────────────────────────────

WATCHED = (
    CONFIGURATION.replace(
        "accepts: [purchase-order], body: 64KiB}}",
        "accepts: [purchase-order], expect: {{every: 1h, facilities: [north], sequence: id}}}}",
    )
    .replace("routes:", "routes:\n  watch: {{when: {{source: sluicegate}}, to: [desk, approvers], order: subject}}\n  rest: {{to: [approvers]}}")
    + "    expect: {{within: 1m}}\n"
    + "  desk: {{connector: http, url: '{partner}/desk', secret: env:OUT_SECRET, allow: [127.0.0.1/32]}}\n"
)  # fmt: skip


@pytest_asyncio.fixture
async def desk() -> AsyncIterator[Partner]:
    async with partner() as desk:
        yield desk


@asynccontextmanager
async def watched(folder: Path, dsn: str, desk: Partner) -> AsyncIterator[Program]:
    async with serving(folder, dsn, desk.address, configured=WATCHED) as program:
        yield program


def told_to(desk: Partner) -> list[tuple[str, str, dict]]:
    """The events of our own that came, by path: type and data."""
    found = [json.loads(one.body) for one in desk.received]
    return [
        (one["type"].removeprefix("sluicegate."), one["source"], one["data"])
        for one in found
        if "sluicegate." in one["type"]
    ]


async def test_who_is_routed_to_is_told_of_a_silence_and_of_its_end(
    tmp_path: Path, dsn: str, desk: Partner, database: Database
) -> None:
    watch = Watch(database)
    async with watched(tmp_path, dsn, desk) as program:
        assert (await program.post(order(id=1)))[0] == 202
        await program.service.heard.flush()
        await program.service.silence.watch()
        await watch.pass_by(HOUR + timedelta(minutes=1))
        await program.service.silence.watch()
        _, told = await program.api("GET", "/expectations", role="viewer")
        [line] = [line for line in told["sources"] if line["facility"] == "north"]
        assert (line["name"], line["state"]) == ("odoo", "silent")
        assert program.metric('sluicegate_source_silent{facility="north",source="odoo"}') == 1
        assert (await program.post(order(id=2), id="msg_2"))[0] == 202
        assert (await program.post(order(id=2), id="msg_2"))[0] == 200  # seen before is a sign of life, too
        await program.service.heard.flush()
        await program.service.silence.watch()
        await until(lambda: len(told_to(desk)) == 4)  # each to two destinations
        assert [kind for kind, _, _ in told_to(desk)][::2] == ["source.silent", "source.resumed"]
        _, source, data = told_to(desk)[0]
        assert source == "/sources/sluicegate"
        assert {key: data[key] for key in ("source", "facility", "every")} == {
            "source": "odoo",
            "facility": "north",
            "every": "1h",
        }
        assert await database.fetchval("SELECT count(*) FROM announcements") == 0


async def test_the_metrics_say_how_long_ago_each_facility_was_heard_and_not_before_it_was(
    tmp_path: Path, dsn: str, desk: Partner, database: Database
) -> None:
    watch, heard = Watch(database), 'sluicegate_source_heard_seconds{facility="north",source="odoo"}'
    async with watched(tmp_path, dsn, desk) as program:
        await program.service.silence.watch()
        assert program.metric(heard) is None
        assert (await program.post(order(id=1)))[0] == 202
        await program.service.heard.flush()
        await program.service.silence.watch()
        assert program.metric(heard) == pytest.approx(0, abs=60)
        await watch.pass_by(2 * HOUR)
        await program.service.silence.watch()
        assert program.metric(heard) == pytest.approx(7200, abs=60)


async def test_the_metrics_say_how_many_numbers_are_missing_until_they_come(
    tmp_path: Path, dsn: str, desk: Partner
) -> None:
    async with watched(tmp_path, dsn, desk) as program:

        async def told() -> float | None:
            await program.service.silence.watch()
            return program.metric('sluicegate_sequence_missing{facility="north",source="odoo"}')

        async def is_told(missing: int) -> bool:
            return await told() == missing

        assert await told() is None
        for number, missing in ((1, 0), (5, 3), (3, 2), (2, 1), (4, 0)):
            assert (await program.post(order(id=number)))[0] == 202
            await until(partial(is_told, missing))


async def test_the_metrics_say_who_is_late_and_how_old_the_oldest_is_that_is_not_held(
    tmp_path: Path, dsn: str, desk: Partner, database: Database
) -> None:
    async with watched(tmp_path, dsn, desk) as program:

        async def told() -> tuple[float | None, float | None]:
            await program.service._report()
            return (
                program.metric('sluicegate_destination_late{destination="approvers"}'),
                program.metric('sluicegate_oldest_waiting_seconds{destination="approvers"}'),
            )

        async def is_nothing_waiting() -> bool:
            return await database.fetchval("SELECT count(*) FROM pending") == 0

        approvers = program.service._destinations["approvers"].id
        assert await told() == (0, 0)
        assert (await program.api("POST", "/destinations/approvers/hold", {"reason": "a test"}))[0] == 200
        await until(lambda: program.service.dispatcher._gates[approvers].held(program.service.clock.now()))
        assert (await program.post(order(id=1)))[0] == 202
        await database.execute("UPDATE pending SET owed_since = owed_since - interval '1 hour'")
        assert await told() == (1, None)
        desk.mood = lambda _: 503
        assert (await program.api("POST", "/destinations/approvers/release", {"reason": "a test"}))[0] == 200
        assert await told() == (1, pytest.approx(3600, abs=60))
        desk.mood = lambda _: 200
        await until(is_nothing_waiting)
        assert await told() == (0, 0)


async def test_what_was_not_told_before_a_crash_is_told_afterwards_and_once(
    tmp_path: Path, dsn: str, desk: Partner, database: Database
) -> None:
    async with watched(tmp_path, dsn, desk) as program:
        await database.execute(
            "INSERT INTO announcements (type, subject, data) VALUES ('sluicegate.source.silent', 'source/odoo', '{\"source\":\"odoo\"}')"
        )
        [announcement] = await Announcements(database).waiting()
        silence = program.service.silence
        await asyncio.gather(silence.tell(), silence.tell(), silence.tell())  # and nobody lives to take it off
        await database.execute(
            "INSERT INTO announcements (id, type, subject, data) VALUES ($1, $2, $3, '{}')",
            announcement.id,
            announcement.type,
            announcement.subject,
        )
        await silence.tell()
        assert await database.fetchval("SELECT count(*) FROM events WHERE source = 'sluicegate'") == 1


async def test_a_destination_is_told_nothing_of_its_own_lateness(
    tmp_path: Path, dsn: str, desk: Partner, database: Database
) -> None:
    """Else what it is told of would wait there, too, and make it late again."""
    async with watched(tmp_path, dsn, desk) as program:
        approvers = program.service._destinations["approvers"].id
        assert (await program.api("POST", "/destinations/approvers/hold", {"reason": "a test"}))[0] == 200
        await until(lambda: program.service.dispatcher._gates[approvers].held(program.service.clock.now()))
        assert (await program.post(order(id=1)))[0] == 202
        await database.execute("UPDATE pending SET owed_since = owed_since - interval '2 minutes'")
        for _ in range(3):
            await program.service._report()
        rows = await database.fetch("SELECT type, owed FROM events WHERE source = 'sluicegate'")
        assert [(row["type"], row["owed"]) for row in rows] == [
            ("sluicegate.destination.late", [program.service._destinations["desk"].id])
        ]
        assert (
            await database.fetchval(
                "SELECT count(*) FROM pending WHERE lane IN (SELECT lane FROM lanes WHERE destination = $1)",
                approvers,
            )
            == 1
        )


async def test_routes_that_do_not_ask_for_it_do_not_get_what_the_program_says(
    tmp_path: Path, dsn: str, desk: Partner, database: Database
) -> None:
    text = WATCHED.replace("watch: {{when: {{source: sluicegate}}, to: [desk, approvers], order: subject}}", "")
    async with serving(tmp_path, dsn, desk.address, configured=text) as program:
        await database.execute(
            "INSERT INTO announcements (type, subject, data) VALUES ('sluicegate.source.silent', 'source/odoo', '{}')"
        )
        await program.service.silence.tell()
        assert await database.fetchval("SELECT owed FROM events WHERE source = 'sluicegate'") == []
