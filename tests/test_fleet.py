"""What a fleet whose processes do not agree promises, on a real Postgres: no lane waits for somebody who cannot serve it."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from gateway import config as configuration
from gateway.service import Place, Service
from observability.metrics import Metrics
from outbox.fleet import Fleet
from tests.house import House, Partner, house_on, until
from tests.serving import ENVIRON, serving


@pytest_asyncio.fixture
async def house(dsn: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    monkeypatch.setattr("outbox.dispatcher.BEAT", timedelta(seconds=0.2))  # with each one they share anew
    async with house_on(dsn) as house:
        yield house


async def owners(house: House, name: str) -> dict[int | None, int]:
    """How many lanes of a destination each dispatcher owns; None: nobody."""
    rows = await house.intake.fetch(
        "SELECT owner, count(*) AS n FROM lanes WHERE destination = $1 GROUP BY owner", house.destinations[name].id
    )
    return {row["owner"]: row["n"] for row in rows}


async def test_a_destination_that_only_some_know_is_served_by_these_alone(house: House) -> None:
    """In the middle of a deploy: one has the new file, which adds a destination, and one the old, which it drops."""
    for name, shards in (("both", 4), ("new", 16), ("old", 4)):
        await house.destination(name, shards)
    before, after = Partner(), Partner()
    old = [house.target("both", before), house.target("old", before)]
    new = [house.target("both", after), house.target("new", after)]
    async with house.dispatching(*old) as first, house.dispatching(*new) as second:
        await until(lambda: _owns(house, "new", {second._number: 16}))
        await until(lambda: _owns(house, "old", {first._number: 4}))
        await until(lambda: _owns(house, "both", {first._number: 2, second._number: 2}))
        for _ in range(40):
            await house.accept("new", "old", "both")
        await house.drained()
    assert {d.destination for d in before.asked} == {"old", "both"}
    assert {d.destination for d in after.asked} == {"new", "both"}
    assert len(before.asked) + len(after.asked) == 120


async def test_a_new_destination_is_shared_as_soon_as_the_others_know_it(house: House) -> None:
    await house.destination("both", 2)
    await house.destination("new", 16)
    partner = Partner()
    both, new = house.target("both", partner), house.target("new", partner)
    async with house.dispatching(both) as first, house.dispatching(both, new) as second:
        await until(lambda: _owns(house, "new", {second._number: 16}))
        first.retarget([both, new])
        await until(lambda: _own_as_many(house, first._number, second._number))


async def test_lanes_that_came_later_are_shared_by_those_who_do_not_know_of_them_too(house: House) -> None:
    await house.destination("wide", 8)
    partner = Partner()
    narrow = replace(house.target("wide", partner), lanes=1)  # as it was when this one read its file
    async with house.dispatching(narrow) as first, house.dispatching(house.target("wide", partner)) as second:
        await until(lambda: _owns(house, "wide", {first._number: 4, second._number: 4}))


async def test_lanes_of_a_destination_that_nobody_knows_belong_to_nobody(house: House) -> None:
    await house.destination("stays")
    await house.destination("goes", 4)
    partner = Partner()
    stays, goes = house.target("stays", partner), house.target("goes", partner)
    async with house.dispatching(stays, goes) as first, house.dispatching(stays, goes) as second:
        await until(lambda: _is_shared(house, "goes", first._number, second._number))
        for dispatcher in (first, second):
            dispatcher.retarget([stays])
        await until(lambda: _owns(house, "goes", {None: 4}))
        await house.accept("goes")
        await house.accept("stays")
        await until(lambda: len(partner.asked) == 1)
        await until(lambda: _owe(house, 1))


async def _is_shared(house: House, name: str, *dispatchers: int) -> bool:
    """Who has one more than the other is not said: their numbers are given by chance."""
    return set(await owners(house, name)) == set(dispatchers)


# ── by which configuration ───────────────────────────────────────────────────────────────────────────


async def test_every_process_says_by_which_configuration_it_works_and_differing_for_long_is_an_alarm(
    tmp_path: Path, dsn: str
) -> None:
    """A gateway gets another file than the process beside it: told after five minutes of the database's, until it ends."""
    async with serving(tmp_path, dsn, "http://127.0.0.1:9") as program:
        first, path = program.service, tmp_path / "gateway.yaml"
        text = (tmp_path / "sluicegate.yaml").read_text()
        path.write_text(text + "# changed\n")
        environ = {**ENVIRON, "DSN": dsn}
        place = Place(role="gateway", dsn=dsn, workers=1, metrics=None)
        second = Service(configuration.load(path, environ), place, environ)
        await second.start(Metrics())
        _, found = await program.api("GET", "/processes")
        assert {(item["role"], item["digest"]) for item in found["items"]} == {
            ("all", first._config.digest), ("gateway", second._config.digest),
        }  # fmt: skip
        with capture_logs() as lines:
            await first._report_configuration()
            shown = first.metrics.render().decode()
            assert f'sluicegate_configuration_info{{digest="{first._config.digest}"}} 1.0' in shown
            assert f'sluicegate_fleet_processes{{digest="{second._config.digest}"}} 1.0' in shown
            assert "sluicegate_configurations_differ 0.0" in shown

            await _let_pass(first, timedelta(minutes=4, seconds=55))
            await first._report_configuration()
            assert "sluicegate_configurations_differ 0.0" in first.metrics.render().decode()
            await _let_pass(first, timedelta(seconds=5))
            for _ in range(2):
                await first._report_configuration()
            assert "sluicegate_configurations_differ 1.0" in first.metrics.render().decode()

            path.write_text(text)
            await second.reload()
            await first._report_configuration()
            assert "sluicegate_configurations_differ 0.0" in first.metrics.render().decode()
        told = [line for line in lines if line["event"].startswith("configurations.")]
        assert [(line["event"], len(line["processes"])) for line in told] == [
            ("configurations.differ", 2), ("configurations.agree", 1),
        ]  # fmt: skip
        await second.stop()
        assert [process.name for process in await first.fleet.processes()] == [found["items"][0]["name"]]


async def test_a_process_that_is_silent_or_has_changed_its_mind_does_not_differ_any_more(house: House) -> None:
    one, two = Fleet(house.intake), Fleet(house.intake)
    await one.report(name="one", role="gateway", digest="a")
    await two.report(name="two", role="dispatcher", digest="b")
    await house.intake.execute("UPDATE processes SET since = since - interval '6 minutes'")
    assert (await one.agreement()).broken
    await two.report(name="two", role="dispatcher", digest="c")  # another change: the deploy goes on
    assert not (await one.agreement()).broken
    await house.intake.execute("UPDATE processes SET since = since - interval '6 minutes'")
    await house.intake.execute("UPDATE processes SET seen_at = seen_at - interval '1 minute' WHERE name = 'two'")
    assert not (await one.report(name="one", role="gateway", digest="a")).broken
    await house.intake.execute("UPDATE processes SET seen_at = seen_at - interval '2 minutes' WHERE name = 'two'")
    await one.report(name="one", role="gateway", digest="a")
    assert await house.count("processes") == 1


@pytest.mark.parametrize("restarted", ["the other one", "the one that agrees"])
@pytest.mark.parametrize("by", ["SIGTERM", "a crash"])
async def test_one_that_is_restarted_again_and_again_differs_for_as_long_as_one_that_is_not(
    house: House, restarted: str, by: str
) -> None:
    digest, stays = ("b", "a") if restarted == "the other one" else ("a", "b")
    await Fleet(house.intake).report(name="first", role="gateway", digest=digest)
    steady = Fleet(house.intake)
    await steady.report(name="steady", role="gateway", digest=stays)
    broken = []
    for minute in range(1, 8):
        again = Fleet(house.intake)
        await again.report(name=f"again {minute}", role="gateway", digest=digest)
        await steady.report(name="steady", role="gateway", digest=stays)
        if by == "SIGTERM":
            await again.leave()
        await house.intake.execute(
            "UPDATE processes SET since = since - interval '1 minute', seen_at = seen_at - interval '1 minute'"
        )
        await Fleet(house.intake).report(name=f"now {minute}", role="gateway", digest=digest)
        broken.append((await steady.report(name="steady", role="gateway", digest=stays)).broken)
    assert broken == [False] * 4 + [True] * 3


async def test_who_was_away_for_long_begins_anew(house: House) -> None:
    one, two = Fleet(house.intake), Fleet(house.intake)
    await one.report(name="one", role="gateway", digest="a")
    await two.report(name="two", role="gateway", digest="b")
    await two.leave()
    await house.intake.execute(
        "UPDATE processes SET since = since - interval '6 minutes', seen_at = seen_at - interval '3 minutes'"
    )
    await Fleet(house.intake).report(name="three", role="gateway", digest="b")
    assert not (await one.report(name="one", role="gateway", digest="a")).broken


async def _let_pass(service: Service, time: timedelta) -> None:
    await service._operators_database.execute("UPDATE processes SET since = since - $1::interval", time)


async def _owns(house: House, name: str, wanted: dict[int | None, int]) -> bool:
    return await owners(house, name) == wanted


async def _own_as_many(house: House, first: int, second: int) -> bool:
    new, both = await owners(house, "new"), await owners(house, "both")
    return new.get(first, 0) + both.get(first, 0) == new.get(second, 0) + both.get(second, 0) == 9


async def _owe(house: House, count: int) -> bool:
    return await house.count("pending") == count
