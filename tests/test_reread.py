"""Odoo's own webhook is a hint: what it says of a record is not believed, and the record is read again.

The whole program in this process; Odoo is the stand-in of the demo, through both of its doors.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
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

TOKEN = "token-of-odoo-with-32-bytes-0000"
JSON = {"Content-Type": "application/json"}
CONFIGURATION = """
serve: {{listen: "127.0.0.1:0"}}
database: {dsn}
key: env:KEY
facilities: {{north: {{name: North Hospital}}, south: {{name: South Clinic}}}}
systems:
  odoo: {{connector: odoo, url: "{more}", database: production, user: gateway@hospital.example, key: env:ODOO_KEY,
    allow: [127.0.0.1/32], timeout: 1s}}
sources:
  odoo: {{scheme: odoo-native, token: env:ODOO_TOKEN, reread: odoo, accepts: [purchase-order]}}
policies:
  purchase-order:
    version: 1
    purpose: procurement approval
    match: {{_model: purchase.order}}
    type: odoo.purchase_order.{{status}}
    subject: purchase.order/{{id}}
    time: "{{changed}}"
    facility: {{from: company_id, of: {{1: north, 2: south}}}}
    keep:
      id:      {{from: _id, type: int, min: 1}}
      status:  {{from: state, type: enum, of: {{"to approve": approval_requested, purchase: approved}}}}
      amount:  {{from: amount_total, type: decimal}}
      buyer:   {{from: user_id, type: int, optional: true}}
      lines:   {{from: order_line, type: [int]}}
      changed: {{from: write_date, type: timestamp}}
    dedup: [id, changed, status]
routes:
  approvals: {{when: {{type: odoo.purchase_order.*}}, to: [approvers]}}
destinations:
  approvers: {{connector: http, url: "{partner}/approvals", secret: env:OUT_SECRET, allow: [127.0.0.1/32]}}
"""


@dataclass
class World:
    program: way.Program
    odoo: OdooStandIn
    partner: way.Partner

    async def hint(self, number: int, *, model: str = "purchase.order", **claims: object) -> tuple[int, dict[str, Any]]:
        body = {"_action": "to the gateway(#1)", "_id": number, "_model": model, "id": number, **claims}
        url = f"{self.program.address}/hooks/odoo/{TOKEN}"
        async with self.program.session.post(url, data=json.dumps(body), headers=JSON) as answer:
            return answer.status, await answer.json(content_type=None)

    async def told(self, count: int = 1) -> list[dict[str, Any]]:
        """The events that came to the partner, once there are so many."""
        await until(lambda: len(self.partner.received) >= count)
        return [json.loads(each.body) for each in self.partner.received]

    async def hinted(self, event: str, state: str) -> dict[str, Any]:
        """The hint's own delivery, once it is in that state."""

        async def reached() -> bool:
            return (await self.program.delivery(event))["state"] == state

        await until(reached)
        return await self.program.delivery(event)


def order(**values: object) -> dict[str, object]:
    return {
        "state": "to approve", "amount_total": 8625.0, "company_id": 2, "user_id": 5, "order_line": [3, 4],
        "write_date": "2026-11-23 05:34:57", "note": way.CANARY, **values,
    }  # fmt: skip


@asynccontextmanager
async def world(folder: Path, dsn: str, monkeypatch: pytest.MonkeyPatch, **odoo: Any) -> AsyncIterator[World]:
    monkeypatch.setitem(way.ENVIRON, "ODOO_KEY", GATEWAY.key)
    monkeypatch.setitem(way.ENVIRON, "ODOO_TOKEN", TOKEN)
    stand_in = await OdooStandIn.start(**odoo)
    try:
        async with (
            way.partner() as partner,
            way.serving(folder, dsn, partner.address, more=stand_in.url, configured=CONFIGURATION) as program,
        ):
            yield World(program, stand_in, partner)
    finally:
        await stand_in.stop()


Opens = Callable[..., Awaitable[World]]


@pytest.mark.parametrize("version", ["19.0", "16.0"])
async def test_what_is_told_is_what_odoo_says_and_not_what_was_posted(
    tmp_path: Path, dsn: str, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    async with world(tmp_path, dsn, monkeypatch, version=version) as here:
        number = here.odoo.add("purchase.order", **order())
        status, answer = await here.hint(number, state="purchase", amount_total=1.0, company_id=1, name=way.CANARY)
        assert status == 202
        [event] = await here.told()
        assert event["data"] == {
            "id": number, "status": "approval_requested", "amount": "8625.0", "buyer": 5, "lines": [3, 4],
            "changed": "2026-11-23T05:34:57Z",
        }  # fmt: skip
        assert (event["subject"], event["facility"]) == (f"purchase.order/{number}", "south")
        hinted = await here.hinted(answer["id"], "delivered")
        assert hinted["destination"] == "reread-odoo"
        _, hint = await here.program.api("GET", f"/events/{answer['id']}")
        assert hint["data"] == {"model": "purchase.order", "id": number}  # all that was believed, and all that is kept
        asked = [call for call in here.odoo.calls if call.method == "read"]
        assert {*asked[0].arguments["fields"]} == {
            "state", "amount_total", "user_id", "order_line", "write_date", "company_id",
        }  # fmt: skip
        assert asked[0].arguments["load"] is None  # no names beside the ids


async def test_two_hints_of_one_change_are_one_event_and_two_changes_are_two(
    tmp_path: Path, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, dsn, monkeypatch) as here:
        number = here.odoo.add("purchase.order", **order())
        first, second = [(await here.hint(number))[1]["id"] for _ in range(2)]
        assert first != second  # the same words, and perhaps of another change
        await here.hinted(first, "delivered")
        again = await here.hinted(second, "delivered")
        assert again["attempts"][-1]["outcome"] == "duplicate"
        here.odoo.records["purchase.order"][number] |= {"state": "purchase", "write_date": "2026-11-23 05:40:00"}
        await here.hint(number)
        types = [event["type"] for event in await here.told(2)]
        assert types == ["odoo.purchase_order.approval_requested", "odoo.purchase_order.approved"]
        await asyncio.sleep(0.2)
        assert len(here.partner.received) == 2


async def test_while_odoo_is_away_hints_are_taken_and_they_are_read_when_it_is_back(
    tmp_path: Path, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, dsn, monkeypatch) as here:
        number = here.odoo.add("purchase.order", **order())
        here.odoo.errors["read"] = OdooError("odoo.exceptions.CacheMiss", "busy")
        status, answer = await here.hint(number)
        assert status == 202
        attempted = await _tried(here, answer["id"])
        assert attempted["attempts"][0]["reason"] == "Odoo failed: CacheMiss"
        assert not here.partner.received
        del here.odoo.errors["read"]
        assert [event["data"]["id"] for event in await here.told()] == [number]


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("gone", "the record is gone, or hidden from the user"),
        ("hidden", "the record is gone, or hidden from the user"),
        ("unfit", "policy not met: state must be one of the values that the policy names"),
    ],
)
async def test_a_record_that_cannot_be_told_of_is_a_dead_letter_with_its_reason(
    tmp_path: Path, dsn: str, monkeypatch: pytest.MonkeyPatch, trouble: str, reason: str
) -> None:
    async with world(tmp_path, dsn, monkeypatch) as here:
        number = here.odoo.add("purchase.order", **order(state="unheard of" if trouble == "unfit" else "purchase"))
        if trouble == "gone":
            del here.odoo.records["purchase.order"][number]
        if trouble == "hidden":
            here.odoo.hidden.add(("purchase.order", number))
        _, answer = await here.hint(number)
        dead = await here.hinted(answer["id"], "dead")
        assert dead["attempts"][-1]["reason"] == reason
        assert not here.partner.received


NO_HINTS = {
    b'{"_model": "purchase.order"}': 422,
    b'{"_model": "purchase.order", "_id": 0}': 422,
    b'{"_model": "purchase.order", "_id": "1"}': 422,
    b'{"_model": "purchase.order", "_id": 4294967296}': 422,
    b'{"_model": "res.partner", "_id": 1}': 422,
    b'[{"_model": "purchase.order", "_id": 1}]': 422,
    b'{"_model": "purchase.order", "_id": 1, "_id": 2}': 400,
    b'{"_model": "purchase.order", "_id": 1': 400,
    b'{"_model": "purchase.order", "_id": 1, "x": "\xff"}': 400,
    b'{"_id": 1, "_model": "purchase.order", "x": ' + b"[" * 30_000 + b"]" * 30_000 + b"}": 400,
}


async def test_what_names_no_record_of_an_accepted_model_is_refused(
    tmp_path: Path, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, dsn, monkeypatch) as here:
        url = f"{here.program.address}/hooks/odoo/{TOKEN}"
        for body, status in NO_HINTS.items():
            async with here.program.session.post(url, data=body, headers=JSON) as answer:
                assert answer.status == status, body[:80]
        _, told = await here.program.api("GET", "/events")
        assert told["items"] == []


async def test_what_was_read_is_part_of_the_story_of_its_hint(
    tmp_path: Path, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, dsn, monkeypatch) as here:
        number = here.odoo.add("purchase.order", **order())
        _, answer = await here.hint(number)
        await here.told()
        hinted = await here.hinted(answer["id"], "delivered")
        told = hinted["attempts"][-1]
        _, listed = await here.program.api("GET", "/events?type=odoo.purchase_order.approval_requested")
        [event] = listed["items"]
        _, event = await here.program.api("GET", f"/events/{event['id']}")
        assert event["deliveries"][0]["attempts"][0]["trace_id"] == told["trace_id"]


async def test_a_check_says_what_the_user_may_not_read_and_what_is_no_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(way.ENVIRON, "ODOO_KEY", GATEWAY.key)
    monkeypatch.setitem(way.ENVIRON, "ODOO_TOKEN", TOKEN)

    async def found(text: str = CONFIGURATION, **odoo: Any) -> str:
        stand_in = await OdooStandIn.start(**odoo)
        try:
            return await way.said_by_check(tmp_path, text, "reread-odoo", system=stand_in.url)
        finally:
            await stand_in.stop()

    assert await found() == "reread: answers"
    denied = User(id=7, login=GATEWAY.login, key=GATEWAY.key, denied=frozenset({"purchase.order:read"}))
    assert "may not read purchase.order" in await found(users=[denied])
    assert "purchase.order has no field amount_tota;" in await found(
        CONFIGURATION.replace("amount_total", "amount_tota")
    )


@pytest.mark.parametrize(
    ("change", "mistake"),
    [
        ({"reread": "oddo"}, 'names "oddo", but there is no such system; did you mean "odoo"?'),
        ({"facility_limit": "1/s"}, "facility_limit counts what is not known before the record is read"),
        ({"match": "{}"}, 'names "only", which says no model to read'),
        ({"from": "data.id"}, 'which reads "data.id", and that is no field of Odoo'),
        ({"destination": "reread-posts"}, "destinations.reread-posts has the name of what sources.posts.reread makes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_reread_that_cannot_be_is_told_with_its_mend(change: dict[str, str], mistake: str) -> None:
    told = {"reread": "odoo", "match": "{_model: purchase.order}", "from": "id", "destination": "partner", **change}
    more = f", facility_limit: {change['facility_limit']}" if "facility_limit" in change else ""
    with pytest.raises(ConfigurationError) as refused:
        configured(
            environ={"ODOO_KEY": GATEWAY.key},
            systems="odoo: {connector: odoo, url: https://odoo.example, database: d, user: u, key: env:ODOO_KEY}\n",
            sources=f"posts: {{scheme: odoo-native, token: env:TOKEN, reread: {told['reread']}, accepts: [only]{more}}}\n",
            policies=f"only: {{version: 1, purpose: a test, match: {told['match']}, type: test.posted, "
            f"keep: {{id: {{from: {told['from']}, type: int}}}}}}\n",
            routes=f"all: {{to: [{told['destination']}]}}\n",
            destinations=f"{told['destination']}: {DESTINATION}\n",
        )
    assert mistake in str(refused.value)


async def _tried(here: World, event: str) -> dict[str, Any]:
    async def was() -> bool:
        return bool((await here.program.delivery(event))["attempts"])

    await until(was)
    return await here.program.delivery(event)
