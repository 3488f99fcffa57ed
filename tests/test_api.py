"""The operators' API, over a real server on a real Postgres."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from dead_letter.audit import Audit
from dead_letter.left_behind import Home, LeftBehind
from dead_letter.letters import DeadLetters
from dead_letter.tokens import Role, Tokens
from gateway.api import ROUTES, api
from gateway.permissions import RIGHTS, Permission
from gateway.silence import Expectation
from outbox.database import Database
from outbox.destinations import Destinations
from outbox.event import OutcomeKind
from outbox.fleet import Fleet
from outbox.records import Records
from tests.rows import Rows

CANARY = "canary-7d1f-Maria-Example-1980"


async def nothing_expected() -> Expectation:
    return Expectation(sources=[], sequences=[], destinations=[], secrets=[])


@dataclass
class Api:
    """The API as somebody with a role sees it."""

    session: aiohttp.ClientSession
    url: str
    tokens: dict[Role, str]

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        role: Role | None = Role.LEAD,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], Any]:
        sent = {} if role is None else {"authorization": f"Bearer {self.tokens[role]}"}
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if data is not None:
            sent["content-type"] = "application/json"
        async with self.session.request(method, self.url + path, data=data, headers=sent | (headers or {})) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, json.loads(await answer.read())

    async def get(self, path: str, role: Role = Role.VIEWER) -> Any:
        status, headers, told = await self.call("GET", path, role=role)
        assert (status, headers["content-type"]) == (200, "application/json"), told
        return told

    async def post(self, path: str, body: object, *, role: Role, status: int) -> Any:
        answered, _, told = await self.call("POST", path, body, role=role)
        assert answered == status, told
        return told

    async def status(
        self, method: str, path: str, body: object = None, role: Role | None = Role.LEAD, **headers: str
    ) -> int:
        """The status; whatever is refused is told as problem+json."""
        status, head, told = await self.call(method, path, body, role=role, headers=headers)
        if status >= 400:
            assert head["content-type"].startswith("application/problem+json")
            assert told["status"] == status
            assert told["title"]
            assert told["detail"]
        assert head["cache-control"] == "no-store"
        return status


HOMES = {"ledger": Home(name="ledger", ordered=False, receives=frozenset({("order", 1)}))}
CONNECTORS = {"ledger": "http", "picky": "http", "unborn": "odoo"}


@pytest_asyncio.fixture
async def rows(database: Database) -> Rows:
    return await Rows(database).open("ledger", "picky")


@pytest_asyncio.fixture
async def served(database: Database, rows: Rows) -> AsyncIterator[Api]:
    tokens = Tokens(database)
    application = web.Application()
    application.add_subapp(
        "/api/v1",
        api(
            records=Records(database, configured=lambda: CONNECTORS),
            letters=DeadLetters(database),
            tokens=tokens,
            destinations=Destinations(database),
            audit=Audit(database),
            expectation=nothing_expected,
            connectors=lambda: CONNECTORS,
            left=LeftBehind(database),
            homes=lambda: HOMES,
            fleet=Fleet(database),
            version="0.1.0",
        ),
    )
    given = {role: await tokens.create(role.value, role, by="test") for role in Role}
    server = TestServer(application)
    await server.start_server()
    async with aiohttp.ClientSession() as session:
        yield Api(session, str(server.make_url("/api/v1")), given)
    await server.close()


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────


async def test_events_are_listed_filtered_and_paged(served: Api, rows: Rows) -> None:
    made = [str(await rows.event("ledger")) for _ in range(3)]
    other = str(await rows.event(source="meter", type="meter.read"))
    first = await served.get("/events?type=shop.order.*&limit=2")
    assert [item["id"] for item in first["items"]] == [made[2], made[1]]
    second = await served.get(f"/events?type=shop.order.*&limit=2&cursor={first['next']}")
    assert ([item["id"] for item in second["items"]], second["next"]) == ([made[0]], None)
    assert [item["id"] for item in (await served.get("/events?source=meter"))["items"]] == [other]
    assert (await served.get("/events?to=2020-01-01T00:00:00Z"))["items"] == []
    assert set(first["items"][0]) == {
        "id", "source", "type", "subject", "facility", "time", "received_at", "policy", "policy_version", "deliveries",
    }  # fmt: skip


async def test_one_event_is_told_as_the_contract_says(served: Api, rows: Rows) -> None:
    event = await rows.event("ledger", "picky")
    await rows.tried(event, "ledger")
    await rows.delivered(event, "ledger")
    told = await served.get(f"/events/{event}")
    assert (told["id"], told["specversion"], told["type"]) == (str(event), "1.0", "shop.order.paid")
    assert told["data"] == {"id": 42, "total": "42.50"}
    assert told["time"].endswith("Z")
    ledger, picky = told["deliveries"]
    assert (ledger["destination"], ledger["state"], ledger["due_at"]) == ("ledger", "delivered", None)
    assert [a["outcome"] for a in ledger["attempts"]] == ["retry", "delivered"]
    assert set(ledger["attempts"][0]) == {
        "number", "at", "outcome", "status", "reason", "receipt", "took_ms", "trace_id",
    }  # fmt: skip
    assert (picky["state"], picky["attempts"]) == ("waiting", [])
    assert picky["due_at"].endswith("Z")


async def test_an_event_that_is_not_there_is_a_404(served: Api) -> None:
    assert await served.status("GET", f"/events/{uuid4()}") == 404
    assert await served.status("GET", "/events/nonsense") == 404


async def test_dead_letters_and_their_causes_are_listed(served: Api, rows: Rows) -> None:
    event = await rows.letter("picky")
    (letter,) = (await served.get("/dead-letters?destination=picky"))["items"]
    assert {key: letter[key] for key in ("event_id", "destination", "cause", "reason", "attempts")} == {
        "event_id": str(event), "destination": "picky", "cause": "picky:refused:400", "reason": "HTTP 400", "attempts": 1,
    }  # fmt: skip
    (cause,) = (await served.get("/dead-letters/causes"))["items"]
    assert (cause["cause"], cause["count"]) == (letter["cause"], 1)
    assert set(cause) == {"cause", "destination", "reason", "mend", "count", "first_seen", "last_seen"}


async def test_what_waits_for_a_destination_that_is_gone_is_reassigned_or_discarded(
    served: Api, rows: Rows, database: Database
) -> None:
    await rows.open("gone", "closed", partitions=False)
    events = [str(await rows.event("gone")) for _ in range(2)]
    await rows.event("closed")
    lead = Role.LEAD
    looked = await served.post("/destinations/gone/reassign", {"to": "ledger", "dry_run": True}, role=lead, status=200)
    assert (looked["count"], looked["made"], looked["dead"], looked["more"]) == (2, 2, 0, False)
    moved = await served.post(
        "/destinations/gone/reassign", {"to": "ledger", "reason": "it moved"}, role=lead, status=202
    )
    assert (moved["count"], moved["made"], moved["more"]) == (2, 2, False)
    told = await served.get(f"/events/{events[0]}")
    assert [(d["destination"], d["state"]) for d in told["deliveries"]] == [
        ("gone", "discarded"),
        ("ledger", "waiting"),
    ]
    looked = await served.post("/destinations/closed/discard", {"dry_run": True}, role=lead, status=200)
    assert looked["count"] == 1
    done = await served.post("/destinations/closed/discard", {"reason": "nobody wants it"}, role=lead, status=202)
    assert done["count"] == 1
    assert (await served.get("/invariants"))["balanced"]
    deeds = (await served.get("/audit", role=lead))["items"]
    assert [(deed["action"], deed["target"]) for deed in deeds[:2]] == [
        ("destination.discard", "closed"),
        ("destination.reassign", "gone"),
    ]


@pytest.mark.parametrize(
    ("path", "body", "role", "status", "says"),
    [
        ("gone/reassign", {"to": "ledger", "reason": "r"}, Role.OPERATOR, 403, "repair:many"),
        ("gone/discard", {"reason": "r"}, Role.OPERATOR, 403, "repair:many"),
        ("gone/reassign", {"to": "ledger"}, Role.LEAD, 422, "Say why"),
        ("gone/discard", {}, Role.LEAD, 422, "Say why"),
        ("gone/reassign", {"reason": "r"}, Role.LEAD, 422, "`to` is missing"),
        ("gone/reassign", {"to": "lodger", "reason": "r"}, Role.LEAD, 422, 'did you mean "ledger"?'),
        ("gome/discard", {"reason": "r"}, Role.LEAD, 404, 'did you mean "gone"?'),
        ("picky/discard", {"reason": "r"}, Role.LEAD, 409, "picky is configured, so what waits for it goes out"),
        ("picky/reassign", {"to": "ledger", "reason": "r"}, Role.LEAD, 409, "picky is configured"),
    ],
)
async def test_what_cannot_be_reassigned_or_discarded_says_why(
    served: Api, rows: Rows, path: str, body: dict, role: Role, status: int, says: str
) -> None:
    await rows.open("gone", partitions=False)
    await rows.event("gone", "picky")
    answer = await served.post(f"/destinations/{path}", body, role=role, status=status)
    assert says in answer["detail"]
    assert await rows.count("pending") == 2


async def test_destinations_show_configured_ones_and_what_still_waits_elsewhere(
    served: Api, rows: Rows, database: Database
) -> None:
    await rows.event("ledger")
    await database.execute("INSERT INTO destinations (name, shards) VALUES ('forgotten', 1), ('emptied', 1)")
    await rows.event()
    await database.execute(
        "INSERT INTO lanes (destination, shard) SELECT id, 0 FROM destinations WHERE name = 'forgotten'"
    )
    await rows.letter("forgotten")
    found = {item["name"]: item for item in (await served.get("/destinations"))["items"]}
    assert list(found) == ["forgotten", "ledger", "picky", "unborn"]
    assert (found["ledger"]["connector"], found["ledger"]["state"], found["ledger"]["waiting"]) == (
        "http",
        "flowing",
        1,
    )
    assert found["ledger"]["oldest_waiting_seconds"] >= 0
    assert (found["forgotten"]["connector"], found["forgotten"]["dead"]) == (None, 1)
    assert found["forgotten"]["state"] == "held"
    assert found["forgotten"]["reason"].startswith("not configured: ")
    assert (found["unborn"]["connector"], found["unborn"]["waiting"]) == ("odoo", 0)
    first = await served.get("/destinations?limit=3")
    second = await served.get(f"/destinations?limit=3&cursor={first['next']}")
    assert ([item["name"] for item in second["items"]], second["next"]) == (["unborn"], None)


async def test_rejections_and_the_audit_are_listed(served: Api, rows: Rows) -> None:
    await rows.rejected("shop", "signature", 3, datetime.now(UTC))
    (rejection,) = (await served.get("/rejections?source=shop"))["items"]
    assert (rejection["source"], rejection["reason"], rejection["count"]) == ("shop", "signature", 3)
    deeds = (await served.get("/audit?action=token.create", Role.AUDITOR))["items"]
    assert {deed["target"] for deed in deeds} == {role.value for role in Role}


async def test_the_invariants_are_the_contract_s_sums(served: Api, rows: Rows) -> None:
    await rows.event()
    await rows.delivered(await rows.event("ledger"), "ledger")
    await rows.letter()
    books = await served.get("/invariants")
    assert books["events"] == {"accepted": 3, "routed": 2, "unrouted": 1}
    assert books["deliveries"] == {"owed": 2, "delivered": 1, "waiting": 0, "held": 0, "dead": 1, "discarded": 0}
    assert books["balanced"] is True


# ── repairing ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_dry_run_needs_no_reason_and_changes_nothing(served: Api, rows: Rows) -> None:
    await rows.letter()
    body = {"select": {"destination": "picky"}, "dry_run": True}
    for verb in ("replay", "discard"):
        status, _, told = await served.call("POST", f"/dead-letters/{verb}", body, role=Role.OPERATOR)
        assert (status, told["count"], told["destinations"]) == (200, 1, {"picky": 1})
    assert await rows.count("dead_letters") == 1


async def test_a_replay_is_accepted_with_its_id_and_stands_in_the_audit(served: Api, rows: Rows) -> None:
    event = await rows.letter()
    body = {"select": {"events": [str(event)], "destination": "picky"}, "reason": "partner mended"}
    status, _, told = await served.call("POST", "/dead-letters/replay", body, role=Role.OPERATOR)
    assert (status, told["count"]) == (202, 1)
    assert (await served.get(f"/events/{event}"))["deliveries"][0]["state"] == "waiting"
    (deed,) = (await served.get("/audit?action=dead-letters.replay", Role.AUDITOR))["items"]
    assert (deed["actor"], deed["reason"], deed["detail"]["id"]) == ("operator", "partner mended", told["id"])


async def test_a_discard_is_told_with_its_reason(served: Api, rows: Rows) -> None:
    event = await rows.letter()
    body = {"select": {"events": [str(event)]}, "reason": "ordered by phone"}
    assert await served.status("POST", "/dead-letters/discard", body, Role.OPERATOR) == 202
    (delivery,) = (await served.get(f"/events/{event}"))["deliveries"]
    assert (delivery["state"], delivery["reason"]) == ("discarded", "ordered by phone")


async def test_operators_repair_one_event_at_a_time_and_leads_many(served: Api, rows: Rows) -> None:
    events = [str(await rows.letter()) for _ in range(3)]
    for select in ({"destination": "picky"}, {"events": events[:2]}):
        body = {"select": select, "reason": "mended"}
        assert await served.status("POST", "/dead-letters/replay", body, Role.OPERATOR) == 403
    assert await rows.count("dead_letters") == 3
    assert await served.status("POST", "/dead-letters/replay", {"select": {"events": events[:1]}, "reason": "r"}, Role.OPERATOR) == 202  # fmt: skip
    assert await served.status("POST", "/dead-letters/replay", {"select": {"destination": "picky"}, "reason": "r"}, Role.LEAD) == 202  # fmt: skip
    assert await rows.count("dead_letters") == 0


@pytest.mark.parametrize(
    "body",
    [
        {"select": {"destination": "picky"}},
        {"select": {"destination": "picky"}, "reason": ""},
        {"select": {"destination": "picky"}, "reason": "   "},
        {"select": {"destination": "picky"}, "reason": "two\nlines"},
        {"select": {"destination": "picky"}, "reason": "x" * 501},
        {"select": {}, "reason": "all of it"},
        {"select": {}, "dry_run": True},
        {"reason": "nothing selected"},
        {"select": {"destination": "picky", "colour": "red"}, "reason": "r"},
        {"select": {"destination": 5}, "reason": "r"},
        {"select": {"destination": "pickle"}, "reason": "r"},
        {"select": {"destination": "pickle"}, "dry_run": True},
        {"select": {"destination": "pi\u0000cky"}, "reason": "r"},
        {"select": {"events": []}, "reason": "r"},
        {"select": {"events": ["nonsense"]}, "reason": "r"},
        {"select": {"from": "2026-11-23T10:00:00"}, "reason": "r"},
        {"select": {"destination": "picky"}, "reason": "r", "dry_run": "no"},
        [],
    ],
)
async def test_a_repair_that_is_not_well_said_is_a_422_and_changes_nothing(
    served: Api, rows: Rows, body: object
) -> None:
    await rows.letter()
    for verb in ("replay", "discard"):
        assert await served.status("POST", f"/dead-letters/{verb}", body) == 422
    assert await rows.count("dead_letters") == 1


async def test_a_hold_and_its_release_are_answered_with_how_the_destination_stands(served: Api, rows: Rows) -> None:
    event = await rows.event("ledger")
    until = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    status, _, told = await served.call("POST", "/destinations/ledger/hold", {"reason": "audit day", "until": until})
    assert (status, told["state"], told["reason"], told["held_by"]) == (200, "held", "audit day", "lead")
    assert (await served.get(f"/events/{event}"))["deliveries"][0]["state"] == "held"
    status, _, told = await served.call("POST", "/destinations/ledger/release", {"reason": "over"}, role=Role.OPERATOR)
    assert (status, told["state"], told["reason"]) == (200, "flowing", None)


async def test_a_hold_is_refused_without_a_reason_in_the_past_or_where_nothing_is(served: Api) -> None:
    assert await served.status("POST", "/destinations/ledger/hold", {}) == 422
    assert await served.status("POST", "/destinations/ledger/hold", {"reason": " "}) == 422
    assert await served.status("POST", "/destinations/ledger/hold", {"reason": "r", "until": "2020-01-01T00:00:00Z"}) == 422  # fmt: skip
    assert await served.status("POST", "/destinations/ledgr/hold", {"reason": "r"}) == 404
    assert await served.status("POST", "/destinations/ledgr/release", {"reason": "r"}) == 404
    _, _, told = await served.call("POST", "/destinations/ledgr/hold", {"reason": "r"})
    assert 'did you mean "ledger"' in told["detail"]


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "query",
    [
        "limit=0", "limit=201", "limit=x", "limit=1&limit=2", "cursor=nonsense", "cursor=", "from=yesterday",
        "from=2026-11-23T10:00:00", "sourec=shop", "source=", "source=a%00b", "type=a%0ab", "subject=%ED%A0%80%00",
        "from=99999-01-01T00:00:00Z",
    ],
)  # fmt: skip
async def test_a_bad_parameter_is_a_400(served: Api, rows: Rows, query: str) -> None:
    assert await served.status("GET", f"/events?{query}") == 400


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/events?limit=0", "`limit`: write a number from 1 to 200."),
        ("/events?limit=many", "`limit`: write a number from 1 to 200."),
        ("/events?from=2026-11-23T10:00:00", "`from`: write a time with its zone, such as 2026-11-23T10:00:00Z."),
        ("/audit?to=yesterday", "`to`: write a time with its zone, such as 2026-11-23T10:00:00Z."),
        ("/rejections?source=", "`source`: write 1 to 512 characters in one line."),
        (f"/events?cursor={'x' * 1025}", "`cursor`: write the `next` of the page before, or leave it out."),
    ],
)
async def test_a_bad_parameter_is_told_with_how_to_write_it(served: Api, path: str, told: str) -> None:
    _, _, answer = await served.call("GET", path)
    assert answer["detail"] == told


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ([], "Write the body as a JSON object."),
        ({}, '`select` is missing: write what to take, such as {"destination": "NAME"}.'),
        ({"select": 1}, '`select`: write what to take, such as {"destination": "NAME"}.'),
        ({"select": {"events": ["x"]}}, "`select.events[0]`: write 1 to 1,000 ids of events, as a list."),
        ({"select": {"events": []}}, "`select.events`: write 1 to 1,000 ids of events, as a list."),
        ({"select": {"to": 5}}, "`select.to`: write a time with its zone, such as 2026-11-23T10:00:00Z."),
        ({"select": {}, "reason": "\n"}, "`reason`: write why, in one line of 1 to 500 characters."),
        ({"select": {}, "dry_run": 1}, "`dry_run`: write true or false."),
        ({"selekt": {}}, "The body holds a field that is not known here; known are: `select`, `reason`, `dry_run`."),
        (
            {"select": {"colour": "red"}},
            "`select` holds a field that is not known here; known are: "
            + ", ".join(f"`{name}`" for name in ["events", "destination", "cause", "subject", "facility", "from", "to"])
            + ".",
        ),
        (
            {"select": {"destination": "pickle"}, "reason": "r"},
            'There is no destination "pickle"; did you mean "picky"?',
        ),
    ],
)
async def test_a_bad_field_is_told_with_how_to_write_it(served: Api, body: object, told: str) -> None:
    _, _, answer = await served.call("POST", "/dead-letters/replay", body)
    assert answer["detail"] == told


async def test_an_unknown_parameter_comes_with_a_suggestion(served: Api) -> None:
    _, _, told = await served.call("GET", "/events?sourec=shop")
    assert "did you mean `source`" in told["detail"]
    _, _, told = await served.call("GET", "/invariants?source=shop")
    assert "known are: none" in told["detail"]


async def test_dates_at_the_edges_are_no_trouble(served: Api, rows: Rows) -> None:
    for query in ("from=0001-01-01T00:00:00Z", "to=9999-12-31T23:59:59Z", "from=1969-12-31T23:59:59Z"):
        assert await served.status("GET", f"/events?{query}") in {200, 400}
        assert await served.status("GET", f"/dead-letters?{query}") in {200, 400}


async def test_a_body_that_is_not_json_is_refused_and_not_repeated(served: Api, rows: Rows) -> None:
    cases = [
        (b"{" + CANARY.encode(), 400, {}),
        (b"\xff\xfe" + CANARY.encode(), 400, {}),
        (b'{"select": {"destination": "\\ud800' + CANARY.encode() + b'"}}', 400, {}),
        (b'{"select": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400, {}),
        (json.dumps({"select": {CANARY: 1}, "reason": CANARY}).encode(), 422, {}),
        (json.dumps({"select": {"from": CANARY}, "reason": "r"}).encode(), 422, {}),
        (json.dumps({"select": {"destination": "x"}, "reason": "r"}).encode(), 415, {"content-type": "text/plain"}),
        (json.dumps({"select": {"destination": "x"}, "reason": "x" * 300_000}).encode(), 413, {}),
        (b"", 400, {}),
    ]
    for body, wanted, headers in cases:
        status, head, told = await served.call("POST", "/dead-letters/replay", body, headers=headers)
        assert status in ({wanted, 422} if body.count(b"[") > 9 else {wanted}), (body[:60], told)
        assert head["content-type"].startswith("application/problem+json")
        assert CANARY not in json.dumps(told)


async def test_what_is_not_there_is_told_as_a_problem_too(served: Api) -> None:
    assert await served.status("GET", "/nothing/here", role=None) == 404
    assert await served.status("DELETE", "/events") == 405
    _, head, _ = await served.call("POST", "/events", {})
    assert head["allow"] == "GET,HEAD" or head["allow"] == "GET"


async def test_a_database_that_is_away_is_a_503_that_says_when_to_come_back(served: Api, database: Database) -> None:
    await database.close()
    status, head, told = await served.call("GET", "/events")
    assert (status, head["retry-after"]) == (503, "2")
    assert head["content-type"].startswith("application/problem+json")
    assert "database" in told["detail"]


async def test_a_defect_of_ours_is_a_500_that_tells_nothing(
    served: Api, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> object:
        raise ValueError(CANARY)

    monkeypatch.setattr(Records, "books", broken)
    status, head, told = await served.call("GET", "/invariants")
    assert (status, head["content-type"].partition(";")[0]) == (500, "application/problem+json")
    assert CANARY not in json.dumps(told)


# ── rights ───────────────────────────────────────────────────────────────────────────────────────────

WALK = {
    "/events/{id}": f"/events/{uuid4()}",
    "/destinations/{name}/hold": "/destinations/nobody/hold",
    "/destinations/{name}/release": "/destinations/nobody/release",
    "/destinations/{name}/reassign": "/destinations/nobody/reassign",
    "/destinations/{name}/discard": "/destinations/nobody/discard",
}


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_every_role_may_do_what_the_table_says_and_nothing_else(served: Api, route: Any) -> None:
    path = WALK.get(route.path, route.path)
    for role in Role:
        status = await served.status(route.method, path, {} if route.body else None, role)
        if route.permission is None or route.permission in RIGHTS[role]:
            assert status in {200, 404, 422}, role
        else:
            assert status == 403, role
    for wrong in ("Bearer nonsense", "Basic dTpw", "Bearer", "bearer sg_x_y", ""):
        status = await served.status(route.method, path, {} if route.body else None, None, authorization=wrong)
        assert status == (200 if route.permission is None else 401)


async def test_whoever_is_refused_learns_who_may(served: Api) -> None:
    _, head, told = await served.call("GET", "/events", role=None)
    assert head["www-authenticate"] == "Bearer"
    assert "token" in told["detail"]
    _, _, told = await served.call("POST", "/destinations/ledger/hold", {"reason": "r"}, role=Role.VIEWER)
    assert "operator, lead may" in told["detail"]


def test_every_route_that_changes_something_needs_a_right_of_its_own() -> None:
    reading = {Permission.READ_EVENTS, Permission.READ_HEALTH, Permission.READ_AUDIT}
    assert all(route.permission not in {None, *reading} for route in ROUTES if route.method != "GET")
    assert RIGHTS[Role.VIEWER] <= reading
    assert RIGHTS[Role.AUDITOR] == reading
    assert Permission.READ_EVENTS not in RIGHTS[Role.ADMIN], "whoever gives out rights sees no business data"


# ── the description ──────────────────────────────────────────────────────────────────────────────────


async def test_the_description_is_valid_openapi_and_names_every_route(served: Api) -> None:
    _, _, described = await served.call("GET", "/openapi.json", role=None)
    validate(described)
    assert described["openapi"].startswith("3.1")
    assert {(method.upper(), path) for path, methods in described["paths"].items() for method in methods} == {
        (route.method, route.path) for route in ROUTES
    }


async def test_what_is_answered_is_as_described(served: Api, rows: Rows) -> None:
    event = await rows.letter()
    await rows.rejected("shop", "signature", 3, datetime.now(UTC))
    described = await served.get("/openapi.json")
    for route in ROUTES:
        if route.method == "GET" and route.path != "/openapi.json":
            answer = await served.get(route.path.replace("{id}", str(event)), Role.LEAD)
            content = described["paths"][route.path]["get"]["responses"]["200"]["content"]["application/json"]
            schema = {**content["schema"], "components": described["components"]}
            Draft202012Validator(schema).validate(answer)


def test_the_outcomes_that_are_told_are_the_contract_s() -> None:
    assert {kind.word for kind in OutcomeKind} == {
        "delivered", "duplicate", "retry", "refused", "blocked", "unknown", "pending",
    }  # fmt: skip
