"""What a destination needs beyond what is kept: read at delivery, handed over, and kept nowhere."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gateway.config import ConfigurationError
from sandbox.odoo import GATEWAY, OdooError, OdooStandIn, User
from tests import serving as way
from tests.door import DESTINATION, configured
from tests.house import until

NAME, MAIL = "canary-Paula-Example", "canary.paula@hospital.example"
CONFIGURATION = """
serve: {{listen: "127.0.0.1:0"}}
database: {dsn}
key: env:KEY
systems:
  people: {{connector: odoo, url: "{more}", database: production, user: gateway@hospital.example, key: env:ODOO_KEY,
    allow: [127.0.0.1/32], timeout: 1s}}
sources:
  odoo: {{scheme: standard-webhooks, secrets: [env:SHOP_SECRET], accepts: [onboarding]}}
policies:
  onboarding:
    version: 1
    purpose: accounts for new staff
    type: hr.employee.hired
    subject: hr.employee/{{employee}}
    keep: {{employee: {{from: id, type: int}}}}
routes:
  accounts: {{when: {{type: hr.employee.hired}}, to: [accounts]}}
destinations:
  accounts:
    connector: http
    url: {partner}/accounts
    secret: env:OUT_SECRET
    allow: [127.0.0.1/32]
    receives: workforce_pii
    reads: {{system: people, model: hr.employee, id: "{{data.employee}}", fields: [name, work_email, department_id]}}
    retry: {{first: 50ms, cap: 200ms, give_up: 1m}}
"""


@dataclass
class World:
    program: way.Program
    odoo: OdooStandIn
    partner: way.Partner
    dsn: str

    def hired(self, **values: object) -> int:
        return self.odoo.add("hr.employee", **{"name": NAME, "work_email": MAIL, "department_id": 3, **values})

    async def accept(self, employee: int) -> str:
        status, answer = await self.program.post({"id": employee, "name": NAME})
        assert status == 202
        return str(answer["id"])

    async def reached(self, event: str, state: str) -> dict[str, Any]:
        async def is_there() -> bool:
            return (await self.program.delivery(event))["state"] == state

        await until(is_there)
        return await self.program.delivery(event)


@asynccontextmanager
async def world(folder: Path, dsn: str, monkeypatch: pytest.MonkeyPatch, **odoo: Any) -> AsyncIterator[World]:
    monkeypatch.setitem(way.ENVIRON, "ODOO_KEY", GATEWAY.key)
    stand_in = await OdooStandIn.start(**odoo)
    try:
        async with (
            way.partner() as partner,
            way.serving(folder, dsn, partner.address, more=stand_in.url, configured=CONFIGURATION) as program,
        ):
            yield World(program, stand_in, partner, dsn)
    finally:
        await stand_in.stop()


async def test_what_is_read_is_handed_over_and_kept_nowhere(
    tmp_path: Path, dsn: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    answers = {1: 500, 2: 200, 3: 422}
    async with world(tmp_path, dsn, monkeypatch) as here:
        here.partner.mood = lambda n: answers[n]
        went_well = await here.accept(here.hired())
        await here.reached(went_well, "delivered")  # at its second try
        refused = await here.accept(here.hired())
        await here.reached(refused, "dead")
        first, second, _ = [json.loads(each.body)["data"] for each in here.partner.received]
        assert first == second == {"employee": 1, "read": {"name": NAME, "work_email": MAIL, "department_id": 3}}
        told = [await here.program.api("GET", f"/events/{event}") for event in (went_well, refused)]
        _, letters = await here.program.api("GET", "/dead-letters")
        async with here.program.session.get(f"{here.program.address}/metrics") as answer:
            metrics = await answer.text()
        seen = await way.stored(dsn) + str(told) + str(letters) + metrics
    seen += "".join(capfd.readouterr())
    assert "hr.employee/1" in seen  # where what is kept is found, what is not kept would be, too
    for canary in (NAME, MAIL):
        assert canary not in seen


async def test_each_try_reads_anew(tmp_path: Path, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(tmp_path, dsn, monkeypatch) as here:
        employee = here.hired()

        def renamed(n: int) -> int:
            here.odoo.records["hr.employee"][employee]["name"] = "Paula Married"
            return 500 if n == 1 else 200

        here.partner.mood = renamed
        await here.reached(await here.accept(employee), "delivered")
        names = [json.loads(each.body)["data"]["read"]["name"] for each in here.partner.received]
        assert names == [NAME, "Paula Married"]
        keys = {each.headers["idempotency-key"] for each in here.partner.received}
        assert len(keys) == 1


async def test_while_the_source_is_away_nothing_is_sent_and_the_reason_names_it(
    tmp_path: Path, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, dsn, monkeypatch) as here:
        here.odoo.errors["read"] = OdooError("odoo.exceptions.CacheMiss", "busy")
        event = await here.accept(here.hired())

        async def was_tried() -> bool:
            return bool((await here.program.delivery(event))["attempts"])

        await until(was_tried)
        assert (await here.program.delivery(event))["attempts"][0]["reason"] == "reads: Odoo failed: CacheMiss"
        assert not here.partner.received
        del here.odoo.errors["read"]
        await here.reached(event, "delivered")


async def test_a_record_that_is_gone_makes_a_dead_letter_and_nothing_is_sent(
    tmp_path: Path, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, dsn, monkeypatch) as here:
        dead = await here.reached(await here.accept(404), "dead")
        assert dead["attempts"][-1]["reason"] == "reads: the record is gone, or hidden from the user"
        assert not here.partner.received


async def test_a_check_looks_at_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(way.ENVIRON, "ODOO_KEY", GATEWAY.key)

    async def found(text: str = CONFIGURATION, **odoo: Any) -> str:
        stand_in = await OdooStandIn.start(**odoo)
        try:
            return await way.said_by_check(tmp_path, text, "accounts", system=stand_in.url)
        finally:
            await stand_in.stop()

    assert "reads" not in await found()  # it is the partner that does not answer
    denied = User(id=7, login=GATEWAY.login, key=GATEWAY.key, denied=frozenset({"hr.employee:read"}))
    assert "configuration: reads: rights: the user may not read hr.employee" in await found(users=[denied])
    assert "configuration: reads: hr.employee has no field work_mail" in await found(
        CONFIGURATION.replace("work_email", "work_mail")
    )


@pytest.mark.parametrize(
    ("change", "mistake"),
    [
        ({"system": "oddo"}, 'reads.system names "oddo", but there is no such system; did you mean "odoo"?'),
        ({"receives": "metadata"}, "reads brings what is workforce_pii, and the destination receives metadata"),
        ({"class": "document"}, "reads brings what is document, and the destination receives workforce_pii"),
        ({"id": "{data.employe}"}, 'reads.id names "employe", but events by policy "only" come there and keep no such'),
        ({"id": "{data.code}"}, 'reads.id names "code", which by policy "only" is not always a whole number'),
        ({"id": "{data.maybe}"}, 'reads.id names "maybe", which by policy "only" is not always a whole number'),
        ({"fields": "[name, name]"}, 'reads.fields names "name" twice'),
        ({"keep": "read: {from: read, type: int}"}, 'policy "only" keeps a field "read"; give that another name'),
        ({"to": "{system: odoo, do: note, text: x"}, "reads is given, but odoo hands nothing on"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_claim_check_that_cannot_be_is_told_with_its_mend(change: dict[str, str], mistake: str) -> None:
    told = {"system": "odoo", "receives": "workforce_pii", "class": "workforce_pii", "id": "{data.employee}", **change}
    keep = "employee: {from: id, type: int}, code: {from: code, type: code, pattern: '[A-Z]'}"
    keep += ", maybe: {from: maybe, type: int, optional: true}, " + change.get("keep", "more: {from: m, type: int}")
    fields = change.get("fields", "[name]")
    reads = f"{{system: {told['system']}, model: hr.employee, id: '{told['id']}', fields: {fields}, class: {told['class']}}}"
    to = change.get("to", DESTINATION.removesuffix("}"))
    with pytest.raises(ConfigurationError) as refused:
        configured(
            environ={"ODOO_KEY": GATEWAY.key},
            systems="odoo: {connector: odoo, url: https://odoo.example, database: d, user: u, key: env:ODOO_KEY}\n",
            policies=f"only: {{version: 1, purpose: a test, type: test.posted, keep: {{{keep}}}}}\n",
            destinations=f"partner: {to}, receives: {told['receives']}, reads: {reads}}}\n",
        )
    assert mistake in str(refused.value)
