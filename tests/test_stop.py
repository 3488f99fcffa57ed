"""The deadline of a stop: whatever is under way, and whatever phase it is in, nothing is waited for any longer."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from gateway import request_body, service
from gateway.config import load
from gateway.service import Place, Service
from observability.metrics import Metrics
from tests.house import until
from tests.serving import CONFIGURATION, ENVIRON, order, sign
from tests.wire import connected, post

ROOT = Path(__file__).parent.parent
DRAIN, BODY = timedelta(seconds=3), timedelta(seconds=2)


@asynccontextmanager
async def silent_partner() -> AsyncIterator[tuple[str, list[asyncio.StreamWriter]]]:
    """Takes every post and answers none."""
    taken: list[asyncio.StreamWriter] = []

    def take(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append(writer)

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", taken
    for writer in taken:
        writer.close()
    server.close()
    await server.wait_closed()


async def test_a_request_and_a_delivery_that_do_not_end_are_waited_for_once_and_not_one_after_the_other(
    tmp_path: Path, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "DRAIN", DRAIN)
    monkeypatch.setattr(request_body, "BODY_DEADLINE", BODY)
    environ, path = {**ENVIRON, "DSN": dsn}, tmp_path / "sluicegate.yaml"
    async with silent_partner() as (address, taken):
        path.write_text(CONFIGURATION.format(dsn="env:DSN", partner=address, more=""))
        running = Service(load(path, environ), Place(role="all", dsn=dsn, workers=1, metrics=None), environ)
        await running.start(Metrics())
        payload = json.dumps(order()).encode()
        request = post(payload, sign(payload, id="msg_1"), "/hooks/odoo")
        async with connected(running.port or 0) as whole, connected(running.port or 0) as drips:
            assert (await whole.ask(request)).status == 202
            await until(lambda: taken)
            await drips.send(request[:-20])
            await asyncio.sleep(0.2)
            began = time.monotonic()
            await running.stop()
            took = time.monotonic() - began
    assert took > DRAIN.total_seconds() - 0.5, "they were waited for"
    assert took < (DRAIN + BODY).total_seconds(), "and together"


def test_what_stops_the_program_is_told_to_give_it_longer_than_its_deadline() -> None:
    [said] = re.findall(
        r"finishes what is under way for up to (\d+) seconds", (ROOT / "docs/operations.md").read_text()
    )
    assert int(said) == service.DRAIN.total_seconds()
    compose = YAML(typ="safe").load((ROOT / "docker-compose.yml").read_text())
    graces = {name: it["stop_grace_period"] for name, it in compose["services"].items() if "stop_grace_period" in it}
    for name in ("gateway", "dispatcher"):
        assert int(graces[name].removesuffix("s")) >= service.DRAIN.total_seconds() + 5
