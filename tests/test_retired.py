"""How a destination leaves: what it still owes is never dropped without somebody having said so."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway import config as configuration
from gateway.config import Config, ConfigurationError
from tests.house import until
from tests.serving import CONFIGURATION, ENVIRON, order, partner, serving

OTHER = """  archive: {{connector: http, url: "{partner}/archive", secret: env:OUT_SECRET, allow: [127.0.0.1/32]}}\n"""
ELSEWHERE = ("to: [approvers]", "to: [archive]")


def without_approvers(text: str) -> str:
    """The file with another destination in the place of the one that it had."""
    head, _, rest = text.partition("  approvers:\n")
    return head.replace(*ELSEWHERE) + rest[rest.index("  archive:") :]


@pytest.fixture
def write(tmp_path: Path, dsn: str) -> Callable[..., Config]:
    def write(to: str, change: Callable[[str], str] = lambda text: text) -> Config:
        text = change((CONFIGURATION + OTHER).format(dsn="env:DSN", partner=to, more=""))
        (tmp_path / "sluicegate.yaml").write_text(text)
        return configuration.load(tmp_path / "sluicegate.yaml", {**ENVIRON, "DSN": dsn})

    return write


def retired(text: str) -> str:
    return text.replace(*ELSEWHERE).replace("  approvers:\n", "  approvers:\n    retired: true\n")


def emptied(text: str) -> str:
    return without_approvers(text) + "  approvers: {retired: true}\n"


async def test_a_reload_does_not_drop_what_still_owes_unless_it_is_retired(
    tmp_path: Path, dsn: str, write: Callable[..., Config]
) -> None:
    async with partner() as busy, serving(tmp_path, dsn, busy.address) as program:
        busy.mood = lambda _: 503
        write(busy.address)
        await program.service.reload()
        _, told = await program.post(order())
        await until(lambda: busy.received)
        before = program.service._config

        write(busy.address, without_approvers)
        with capture_logs() as lines:
            await program.service.reload()
        assert program.service._config is before
        (refused,) = [line["mistake"] for line in lines if line["event"] == "config.refused"]
        assert refused.startswith(
            "destinations.approvers is gone from the file, but 1 delivery waits for it; put it back"
        )
        assert "retired: true" in refused

        write(busy.address, retired)
        await program.service.reload()
        assert program.service._config.destinations["approvers"].retired
        busy.mood = lambda _: 200
        await until(lambda: program.is_delivered(told["id"]))  # what is owed still goes out

        write(busy.address, without_approvers)
        await program.service.reload()
        assert list(program.service._config.destinations) == ["archive"]


async def test_what_a_destination_without_a_connector_is_owed_is_held_and_seen_everywhere(
    tmp_path: Path, dsn: str, write: Callable[..., Config]
) -> None:
    async with partner() as busy, serving(tmp_path, dsn, busy.address) as program:
        busy.mood = lambda _: 503
        write(busy.address)
        await program.service.reload()
        _, told = await program.post(order())
        await until(lambda: busy.received)
        write(busy.address, emptied)
        await program.service.reload()
        await until(lambda: _is_held(program, told["id"]))

        delivery = await program.delivery(told["id"])
        assert (delivery["state"], delivery["reason"]) == ("held", "not configured")
        _, found = await program.api("GET", "/destinations")
        line = next(item for item in found["items"] if item["name"] == "approvers")
        assert (line["state"], line["connector"], line["waiting"]) == ("held", None, 1)
        assert line["reason"].startswith("not configured: ")
        _, books = await program.api("GET", "/invariants")
        assert (books["deliveries"]["held"], books["deliveries"]["waiting"], books["balanced"]) == (1, 0, True)
        _, found = await program.api("GET", "/events")
        assert found["items"][0]["deliveries"] == [{"destination": "approvers", "state": "held"}]
        await program.service._report()
        shown = program.service.metrics.render().decode()
        assert 'sluicegate_held{destination="approvers"} 1.0' in shown
        assert 'sluicegate_waiting{destination="approvers"}' not in shown

        write(busy.address)  # put back: it goes out as if nothing had been
        busy.mood = lambda _: 200
        await program.service.reload()
        await until(lambda: program.is_delivered(told["id"]))


async def test_a_start_refuses_no_work_because_of_what_is_gone_and_says_so(tmp_path: Path, dsn: str) -> None:
    async with partner() as busy:
        busy.mood = lambda _: 503
        async with serving(tmp_path, dsn, busy.address) as program:
            _, told = await program.post(order())
            await until(lambda: busy.received)
        text = without_approvers(CONFIGURATION + OTHER)
        with capture_logs() as lines:
            async with serving(tmp_path, dsn, busy.address, configured=text) as program:
                status, _ = await program.post(order(id=43))
                assert status == 202
                await until(lambda: _is_held(program, told["id"]))
                await program.service.reload()  # nor does a reload of what it knew as little before
        (line,) = [line for line in lines if line["event"] == "destination.not_configured"][:1]
        assert (line["destination"], line["waiting"]) == ("approvers", 1)
        assert not [line for line in lines if line["event"] == "config.refused"]


def test_no_route_leads_to_a_destination_that_is_retired(write: Callable[..., Config]) -> None:
    with pytest.raises(ConfigurationError) as refused:
        write("http://127.0.0.1:9", lambda text: text.replace("  approvers:\n", "  approvers:\n    retired: true\n"))
    (mistake,) = refused.value.mistakes
    assert re.search(
        r'routes\.approvals\.to names "approvers", which is retired; send it elsewhere, or take retired', str(mistake)
    )


def test_a_destination_that_is_retired_and_has_no_connector_has_nothing_else_either(
    write: Callable[..., Config],
) -> None:
    config = write("http://127.0.0.1:9", emptied)
    assert (list(config.destinations), config.gone) == (["archive"], ("approvers",))
    assert config.warnings == ()
    with pytest.raises(ConfigurationError, match=r"approvers\.url stands beside retired without a connector"):
        write("http://127.0.0.1:9", lambda text: emptied(text).replace("{retired: true}", "{retired: true, url: x}"))
    with pytest.raises(ConfigurationError, match="approvers needs a connector"):
        write("http://127.0.0.1:9", lambda text: emptied(text).replace("{retired: true}", "{retired: false}"))


async def _is_held(program, event: str) -> bool:
    return (await program.delivery(event))["state"] == "held"
