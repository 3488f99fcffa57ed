"""The `odoo` connector, through both doors, against a server that answers as a real Odoo was seen to.

With SLUICEGATE_TEST_ODOO_URL (and _DB, _USER, _KEY) the promises about what can be seen in Odoo are tested on that one
as well: the user needs rights on contacts (res.partner).
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol
from urllib.parse import urlsplit
from uuid import UUID

import odoorpc
import pytest
from msgspec.structs import replace as changed

from connectors import (
    Blocked,
    Connector,
    Delivered,
    Delivery,
    Duplicate,
    Event,
    Opening,
    Outcome,
    Refused,
    Retry,
    Unknown,
)
from connectors import kinds as all_kinds
from connectors.odoo_doors import Failed
from connectors.odoo_server import Server
from connectors.odoo_values import as_odoo
from connectors.settings import Reference
from observability.tracing import Tracing
from sandbox.odoo import GATEWAY, OdooError, OdooStandIn, Trouble, User

KIND = all_kinds()["odoo"]
TRACING = Tracing.start(None, 1.0, "test")
DOORS = {"json2": "19.0", "jsonrpc": "17.0"}  # and the version that leads to it


def event(subject: str | None, **data: object) -> Event:
    now = datetime(2026, 11, 25, 8, 30, tzinfo=UTC)
    return Event(
        id=UUID(int=time.time_ns() << 48 | 0x7000_8000_0000_0000_0000),
        source="shop",
        type="shop.order.paid",
        subject=subject,
        facility="north",
        time=now,
        data={"id": 42, "total": "42.50", **data},
        policy="order",
        policy_version=1,
        received_at=now,
        traceparent=None,
    )


def delivery(subject: str | None, *, to: str = "order-note", **data: object) -> Delivery:
    return Delivery(
        event=event(subject, **data), destination=to, attempt=1, deadline=datetime(2026, 11, 28, tzinfo=UTC)
    )


class World(Protocol):
    """An Odoo with somebody who can look into it by another way than ours."""

    system: dict[str, object]
    model: str
    words: str  # a field for text

    async def record(self) -> str: ...

    async def notes(self, subject: str) -> list[str]: ...

    async def activities(self, subject: str) -> list[dict[str, Any]]: ...

    async def value(self, subject: str, name: str) -> object: ...


@dataclass
class StandIn:
    odoo: OdooStandIn
    system: dict[str, object]
    model: str = "purchase.order"
    words: str = "name"

    async def record(self, **values: object) -> str:
        return f"purchase.order/{self.odoo.add('purchase.order', **({'state': 'to approve'} | values))}"

    async def notes(self, subject: str) -> list[str]:
        return [message["body"] for message in self._about(subject, "mail.message", "model")]

    async def activities(self, subject: str) -> list[dict[str, Any]]:
        return self._about(subject, "mail.activity", "res_model")

    async def value(self, subject: str, name: str) -> object:
        return self.odoo.records[self.model][number(subject)].get(name)

    def _about(self, subject: str, model: str, name: str) -> list[dict[str, Any]]:
        return self.odoo.found(model, **{name: subject.partition("/")[0], "res_id": number(subject)})


@dataclass
class RealOdoo:
    """Reached with odoorpc, as by any other integrator."""

    url: str
    database: str
    user: str
    key: str
    system: dict[str, object] = field(init=False)
    model: str = "res.partner"
    words: str = "ref"

    def __post_init__(self) -> None:
        self.system = {
            "url": self.url,
            "database": self.database,
            "user": self.user,
            "key": secret(self.key),
            "allow": ["0.0.0.0/0", "::/0"],
        }

    async def record(self) -> str:
        return f"res.partner/{await self._call('create', {'name': 'Sluicegate test'})}"

    async def notes(self, subject: str) -> list[str]:
        domain = [["model", "=", self.model], ["res_id", "=", number(subject)], ["message_type", "=", "comment"]]
        return [row["body"] for row in await self._call("search_read", domain, ["body"], model="mail.message")]

    async def activities(self, subject: str) -> list[dict[str, Any]]:
        domain = [["res_model", "=", self.model], ["res_id", "=", number(subject)]]
        return list(await self._call("search_read", domain, ["summary", "note"], model="mail.activity"))

    async def value(self, subject: str, name: str) -> object:
        return (await self._call("search_read", [["id", "=", number(subject)]], [name]))[0][name]

    async def _call(self, method: str, *args: object, model: str = "res.partner") -> Any:
        def call() -> Any:
            parts = urlsplit(self.url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
            protocol = "jsonrpc+ssl" if parts.scheme == "https" else "jsonrpc"
            odoo = odoorpc.ODOO(parts.hostname, port=port, protocol=protocol)
            odoo.login(self.database, self.user, self.key)
            return odoo.execute_kw(model, method, list(args), {})

        return await asyncio.to_thread(call)


def number(subject: str) -> int:
    return int(subject.partition("/")[2])


def secret(text: str) -> Reference:
    return Reference(origin="env:ODOO_KEY", text=text)


Starts = Callable[..., Awaitable[StandIn]]


@pytest.fixture
async def starts() -> AsyncIterator[Starts]:
    """Starts stand-ins, and stops them."""
    started: list[OdooStandIn] = []

    async def start(**given: Any) -> StandIn:
        odoo = await OdooStandIn.start(**given)
        started.append(odoo)
        system = {
            "url": odoo.url,
            "database": "production",
            "user": GATEWAY.login,
            "key": secret(GATEWAY.key),
            "allow": ["127.0.0.1/32"],
        }
        return StandIn(odoo, system)

    yield start
    for odoo in started:
        await odoo.stop()


@pytest.fixture(params=list(DOORS))
async def stand_in(request: pytest.FixtureRequest, starts: Starts) -> StandIn:
    return await starts(version=DOORS[request.param])


@pytest.fixture(params=[*DOORS, *(["real"] if "SLUICEGATE_TEST_ODOO_URL" in os.environ else [])])
async def world(request: pytest.FixtureRequest, starts: Starts) -> World:
    if request.param == "real":
        of = {name: os.environ[f"SLUICEGATE_TEST_ODOO_{name}"] for name in ("URL", "DB", "USER", "KEY")}
        return RealOdoo(of["URL"], of["DB"], of["USER"], of["KEY"])
    return await starts(version=DOORS[request.param])


Opens = Callable[..., Connector]


@pytest.fixture
async def opens() -> AsyncIterator[Opens]:
    """Opens destinations on one server for each world, and closes them."""
    servers: dict[str, Server] = {}

    def connect(
        world: World | Elsewhere, *, timeout: float = 10, system: dict[str, object] | None = None, **settings: object
    ) -> Connector:
        wanted = world.system | (system or {})
        if repr(wanted) not in servers:
            assert KIND.system
            assert KIND.open_system
            server = KIND.open_system(KIND.system.model_validate(wanted), timedelta(seconds=timeout))
            assert isinstance(server, Server)
            servers[repr(wanted)] = server
        return KIND.connect(
            Opening(
                destination="order-note",
                settings=KIND.settings.model_validate(settings),
                system=servers[repr(wanted)],
                timeout=timedelta(seconds=timeout),
                concurrency=8,
                tracing=TRACING,
                version="1.2.3",
            )
        )

    yield connect
    for server in servers.values():
        await server.close()


NOTE = {"do": "note", "text": "{type} over {data.total}"}
ACTIVITY = {"do": "activity", "summary": "{subject} waits", "text": "over {data.total} in {facility}"}
APPROVE = {"do": "call", "method": "button_approve", "from": ["draft", "to approve"], "to": "purchase"}


# ── what can be seen in Odoo ───────────────────────────────────────────────────────────────────────


async def test_a_note_is_posted_once_however_often_it_is_delivered(world: World, opens: Opens) -> None:
    connector, due = opens(world, **NOTE), delivery(await world.record())
    first, second = await connector.deliver(due), await connector.deliver(due)
    assert isinstance(first, Delivered)
    assert second == Duplicate(first.receipt)
    (body,) = [body for body in await world.notes(str(due.event.subject)) if due.key in body]
    assert f"shop.order.paid over 42.50 [{due.key}]" in body


async def test_an_activity_is_scheduled_once_however_often_it_is_delivered(world: World, opens: Opens) -> None:
    connector, due = opens(world, **ACTIVITY), delivery(await world.record())
    first, second = await connector.deliver(due), await connector.deliver(due)
    assert isinstance(first, Delivered)
    assert second == Duplicate(first.receipt)
    (activity,) = await world.activities(str(due.event.subject))
    assert activity["summary"] == f"{due.event.subject} waits"
    assert f"over 42.50 in north [{due.key}]" in activity["note"]


async def test_values_are_written_and_can_be_recognised(world: World, opens: Opens) -> None:
    connector, due = opens(world, do="write", values={world.words: "paid {data.id}"}), delivery(await world.record())
    assert await connector.lookup(due) is None
    assert await connector.deliver(due) == Delivered(str(due.event.subject))
    assert await world.value(str(due.event.subject), world.words) == "paid 42"
    assert await connector.lookup(due) == Duplicate(str(due.event.subject))


async def test_a_record_that_is_gone_is_refused(world: World, opens: Opens) -> None:
    due = delivery(f"{world.model}/987654321")
    for settings in (NOTE, ACTIVITY, {"do": "write", "values": {world.words: "x"}}):
        assert await opens(world, **settings).deliver(due) == Refused("the record is gone: MissingError")


async def test_text_is_never_html(world: World, opens: Opens) -> None:
    due = delivery(await world.record(), remark='<b>x</b><a href="https://evil.example">')
    await opens(world, do="note", text="{data.remark}").deliver(due)
    await opens(world, do="activity", summary="s", text="{data.remark}").deliver(changed(due, destination="to-do"))
    (activity,) = await world.activities(str(due.event.subject))
    for written in (*await world.notes(str(due.event.subject)), activity["note"]):
        assert "<b>" not in written
        assert "<a " not in written


async def test_text_is_never_html_in_an_old_odoo_either(starts: Starts, opens: Opens) -> None:
    stand_in = await starts(version="16.0")
    due = delivery(await stand_in.record(), remark="<b>x</b>")
    connector = opens(stand_in, do="note", text="{data.remark}")
    assert isinstance(await connector.deliver(due), Delivered)
    assert isinstance(await connector.deliver(due), Duplicate)
    assert await stand_in.notes(str(due.event.subject)) == [f"&lt;b&gt;x&lt;/b&gt; [{due.key}]"]


async def test_a_check_of_a_login_with_all_rights_is_content(world: World, opens: Opens) -> None:
    for settings in (NOTE, ACTIVITY, {"do": "write", "values": {world.words: "x"}}):
        assert await opens(world, **settings, model=world.model).check() == Delivered()
        assert await opens(world, **settings).check() == Delivered()


async def test_a_check_tells_a_person_what_to_correct(world: World, opens: Opens) -> None:
    wrong_key: dict[str, object] = {"key": Reference(origin="env:WRONG_KEY", text="0" * 40)}
    outcome = await opens(world, system=wrong_key, **NOTE).check()
    assert outcome == Blocked("credentials: Odoo does not accept the user and its key")
    outcome = await opens(world, system={"database": "no-such-database"}, **NOTE).check()
    assert isinstance(outcome, Blocked)
    assert outcome.reason.startswith("configuration: ")
    assert "database" in outcome.reason
    outcome = await opens(world, **ACTIVITY, user="nobody@hospital.example").check()
    assert outcome == Blocked("configuration: user: Odoo has no such user, or does not show it")
    outcome = await opens(world, do="write", values={"no_such_field": "x"}, model=world.model).check()
    assert outcome == Blocked(f"configuration: values: {world.model} has no field no_such_field")
    call = {"do": "call", "method": "x", "field": "no_such_field", "from": "a", "to": "b", "model": world.model}
    assert await opens(world, **call).check() == Blocked(
        f"configuration: field: {world.model} has no field no_such_field"
    )


# ── each deed ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_note_is_internal_and_by_the_gateway(stand_in: StandIn, opens: Opens) -> None:
    due = delivery(await stand_in.record())
    await opens(stand_in, **NOTE).deliver(due)
    (message,) = stand_in.odoo.found("mail.message")
    assert (message["subtype"], message["message_type"], message["author"]) == ("mail.mt_note", "comment", GATEWAY.id)


async def test_an_activity_is_for_the_user_who_is_named(stand_in: StandIn, opens: Opens) -> None:
    paula = stand_in.odoo.add("res.users", login="paula@hospital.example", company_id=1, company_ids=[1])
    for user in ("paula@hospital.example", paula):
        due = delivery(await stand_in.record())
        await opens(stand_in, **ACTIVITY, user=user).deliver(due)
        (activity,) = await stand_in.activities(str(due.event.subject))
        assert activity["user_id"] == paula
    due = delivery(await stand_in.record())
    nobody = await opens(stand_in, **ACTIVITY, user="nobody").deliver(due)
    assert nobody == Blocked("configuration: user: Odoo has no such user, or does not show it")


async def test_an_activity_that_was_done_meanwhile_is_not_scheduled_again(stand_in: StandIn, opens: Opens) -> None:
    connector, archived, moved = opens(stand_in, **ACTIVITY), *[delivery(await stand_in.record()) for _ in range(2)]
    for due in (archived, moved):
        await connector.deliver(due)
    stand_in.odoo.found("mail.activity")
    first, second = stand_in.odoo.records["mail.activity"]
    stand_in.odoo.records["mail.activity"][first]["active"] = False  # since 17
    note = stand_in.odoo.records["mail.activity"].pop(second)["note"]  # before, its note went into the chatter
    stand_in.odoo.add("mail.message", model="purchase.order", res_id=number(str(moved.event.subject)), body=note)
    assert isinstance(await connector.deliver(archived), Duplicate)
    assert isinstance(await connector.deliver(moved), Duplicate)


async def test_two_destinations_of_one_event_are_told_apart(stand_in: StandIn, opens: Opens) -> None:
    connector, long = opens(stand_in, **NOTE), delivery(await stand_in.record(), to="order-note")
    short, wildcard = changed(long, destination="order"), changed(long, destination="order_note")
    assert isinstance(await connector.deliver(long), Delivered)
    assert isinstance(await connector.deliver(short), Delivered)
    assert isinstance(await connector.deliver(wildcard), Delivered)
    assert isinstance(await connector.deliver(short), Duplicate)


async def test_a_button_is_pressed_once_and_its_effect_is_looked_at(starts: Starts, opens: Opens) -> None:
    for version in DOORS.values():
        stand_in = await starts(version=version, users=[replace(GATEWAY, approves=True)])
        connector, due = opens(stand_in, **APPROVE), delivery(await stand_in.record())
        assert await connector.lookup(due) is None
        assert await connector.deliver(due) == Delivered(str(due.event.subject))
        assert await stand_in.value(str(due.event.subject), "state") == "purchase"
        assert await connector.deliver(due) == Duplicate(str(due.event.subject))
        assert await connector.lookup(due) == Duplicate(str(due.event.subject))
        assert [call.method for call in stand_in.odoo.calls].count("button_approve") == 1


async def test_a_button_that_says_yes_and_does_nothing_is_not_taken_for_success(
    stand_in: StandIn, opens: Opens
) -> None:
    due = delivery(await stand_in.record())
    outcome = await opens(stand_in, **APPROVE).deliver(due)
    assert outcome == Refused("button_approve did nothing: the user may lack the right, or the record something")


async def test_a_button_is_not_pressed_in_another_state_than_the_expected(stand_in: StandIn, opens: Opens) -> None:
    due = delivery(await stand_in.record(state="cancel"))
    outcome = await opens(stand_in, **APPROVE).deliver(due)
    assert outcome == Refused("its state is not one in which button_approve may be called")
    assert "button_approve" not in [call.method for call in stand_in.odoo.calls]
    gone = await opens(stand_in, **APPROVE).deliver(delivery("purchase.order/987654321"))
    assert gone == Refused("the record is gone, or hidden from the user")


async def test_values_are_written_as_odoo_wants_them(stand_in: StandIn, opens: Opens) -> None:
    due = delivery(
        await stand_in.record(),
        at="2026-07-14T12:00:00.000+02:00",
        day="2026-07-14",
        by=7,
        urgent=True,
        remark="<i>",
    )
    values = {
        "date_planned": "{data.at}",
        "date_reviewed": "{data.day}",
        "amount_total": "{data.total}",
        "invoice_count": "{data.id}",
        "mail_reminder_confirmed": "{data.urgent}",
        "user_id": "{data.by}",
        "note": "{data.remark}",
        "priority": "1",
        "name": "{data.id}",
    }
    assert await opens(stand_in, do="write", values=values).deliver(due) == Delivered(str(due.event.subject))
    written = stand_in.odoo.records["purchase.order"][number(str(due.event.subject))]
    assert {name: written[name] for name in values} == {
        "date_planned": "2026-07-14 10:00:00",
        "date_reviewed": "2026-07-14",
        "amount_total": 42.5,
        "invoice_count": 42,
        "mail_reminder_confirmed": True,
        "user_id": 7,
        "note": "&lt;i&gt;",
        "priority": "1",
        "name": "42",
    }


@pytest.mark.parametrize(
    ("kind", "value", "written"),
    [
        ("datetime", "2026-07-14T12:00:00.000+02:00", "2026-07-14 10:00:00"),
        ("datetime", "2026-07-14T10:00:00Z", "2026-07-14 10:00:00"),
        ("datetime", "2026-07-14 10:00:00.999999", "2026-07-14 10:00:00"),
        ("datetime", datetime(2026, 7, 14, 10, tzinfo=UTC), "2026-07-14 10:00:00"),
        ("date", "2026-07-14", "2026-07-14"),
        ("date", "2026-07-14T00:30:00+02:00", "2026-07-14"),  # in UTC it is still the 13th
        ("monetary", "42.50", 42.5),
        ("float", 7, 7),
        ("integer", "-12", -12),
        ("many2one", 7, 7),
        ("boolean", False, False),
        ("char", 42, "42"),
        ("html", "a & b", "a &amp; b"),
    ],
)
def test_a_value_fits_its_field(kind: str, value: object, written: object) -> None:
    assert as_odoo("x", kind, value) == written


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("date", "2026-07-13T22:30:00Z"),  # which day this is, only its zone would say
        ("date", "soon"),
        ("datetime", "soon"),
        ("datetime", 1),
        ("integer", True),
        ("integer", "1.5"),
        ("monetary", "NaN"),
        ("boolean", "true"),
        ("many2one", "Paula"),
        ("one2many", [1]),
        ("char", [1]),
    ],
)
def test_a_value_that_does_not_fit_is_a_mistake_of_the_configuration(kind: str, value: object) -> None:
    with pytest.raises(Failed) as failed:
        as_odoo("x", kind, value)
    assert isinstance(failed.value.outcome, Blocked)
    assert failed.value.outcome.reason.startswith("configuration: values: x ")


async def test_an_event_without_the_value_is_refused(stand_in: StandIn, opens: Opens) -> None:
    due = delivery(await stand_in.record())
    outcome = await opens(stand_in, do="write", values={"name": "{data.missing}"}).deliver(due)
    assert outcome == Refused("the event has no value for name")


@pytest.mark.parametrize(
    "subject",
    [None, "", "42", "order 42", "purchase.order/", "purchase.order/0", "purchase.order/4x", "Purchase/1", "a/b/1"],
)
async def test_a_subject_that_names_no_record_is_refused_without_a_call(
    stand_in: StandIn, opens: Opens, subject: str | None
) -> None:
    connector = opens(stand_in, **NOTE)
    outcome = await connector.deliver(delivery(subject))
    assert outcome == Refused("the event's subject names no record of Odoo, as purchase.order/42 does")
    assert await connector.lookup(delivery(subject)) is None
    assert not stand_in.odoo.calls


async def test_a_destination_for_one_model_touches_no_other(stand_in: StandIn, opens: Opens) -> None:
    connector = opens(stand_in, **NOTE, model="purchase.order")
    outcome = await connector.deliver(delivery("res.users/7"))
    assert outcome == Refused("the event's subject is not of the model purchase.order")
    assert not stand_in.odoo.calls


# ── errors, by name ────────────────────────────────────────────────────────────────────────────────

REFUSED, BLOCKED, RETRY = Refused, Blocked, Retry


@pytest.mark.parametrize(
    ("name", "status", "outcome"),
    [
        ("odoo.exceptions.UserError", 422, Refused("Odoo's rules forbid it: UserError")),
        ("odoo.exceptions.ValidationError", 422, Refused("Odoo's rules forbid it: ValidationError")),
        ("odoo.exceptions.MissingError", 404, Refused("the record is gone: MissingError")),
        ("builtins.IndexError", 500, Refused("Odoo cannot take a value: IndexError")),
        ("odoo.exceptions.AccessDenied", 403, Blocked("credentials: Odoo does not accept the user and its key")),
        ("builtins.ValueError", 500, Blocked("configuration: Odoo has no such field or value: ValueError")),
        ("builtins.AttributeError", 500, Blocked("configuration: Odoo has no such model or method: AttributeError")),
        ("werkzeug.exceptions.NotFound", 404, Blocked("configuration: Odoo has no such model or method: NotFound")),
        (
            "werkzeug.exceptions.UnprocessableEntity",
            422,
            Blocked("configuration: Odoo takes other arguments: UnprocessableEntity"),
        ),
        ("builtins.TypeError", 500, Blocked("configuration: Odoo takes other arguments: TypeError")),
        ("psycopg2.errors.SerializationFailure", 500, Retry("Odoo failed: SerializationFailure")),
        ("psycopg2.errors.LockNotAvailable", 503, Retry("Odoo failed: LockNotAvailable")),
        ("odoo.exceptions.ConcurrencyError", 500, Retry("Odoo failed: ConcurrencyError")),
        ("builtins.ZeroDivisionError", 500, Retry("Odoo failed: ZeroDivisionError")),
        ("Maria Example, born 1980", 500, Retry("Odoo failed")),
    ],
)
async def test_an_error_is_judged_by_its_name_and_nothing_else_of_it_is_kept(
    stand_in: StandIn, opens: Opens, name: str, status: int, outcome: Outcome
) -> None:
    stand_in.odoo.errors["message_post"] = OdooError(name, "canary-Maria-Example", status)
    said = await opens(stand_in, **NOTE).deliver(delivery(await stand_in.record()))
    assert said == outcome
    assert not {"canary", "Traceback", "/opt/odoo"} & set(repr(said).split())


async def test_a_missing_right_blocks_and_a_rule_about_one_record_does_not(starts: Starts, opens: Opens) -> None:
    for version in DOORS.values():
        bot = User(id=7, login=GATEWAY.login, key=GATEWAY.key, denied=frozenset({"purchase.order:write"}))
        stand_in = await starts(version=version, users=[bot])
        connector, due = opens(stand_in, **NOTE), delivery(await stand_in.record())
        assert await connector.deliver(due) == Blocked("configuration: rights: the user may not do this: AccessError")
        restricted = opens(stand_in, **NOTE, model="purchase.order")
        assert await restricted.check() == Blocked("configuration: rights: the user may not write purchase.order")

        stand_in = await starts(version=version)
        due = delivery(await stand_in.record())
        stand_in.odoo.hidden.add(("purchase.order", number(str(due.event.subject))))
        assert await opens(stand_in, **NOTE).deliver(due) == Refused("the user may not touch this record: AccessError")


async def test_an_unknown_model_or_field_is_a_mistake_of_the_configuration_or_refused(
    stand_in: StandIn, opens: Opens
) -> None:
    outcome = await opens(stand_in, **NOTE).deliver(delivery("no.such.model/1"))
    assert isinstance(outcome, Blocked | Refused)
    due = delivery(await stand_in.record())
    outcome = await opens(stand_in, do="write", values={"no_such": "x"}).deliver(due)
    assert outcome == Blocked("configuration: values: purchase.order has no field no_such")


async def test_a_key_that_is_revoked_later_is_noticed_and_a_new_one_is_used(stand_in: StandIn, opens: Opens) -> None:
    connector = opens(stand_in, **NOTE)
    assert isinstance(await connector.deliver(delivery(await stand_in.record())), Delivered)
    good, stand_in.odoo.users = stand_in.odoo.users, []
    outcome = await connector.deliver(delivery(await stand_in.record()))
    assert outcome == Blocked("credentials: Odoo does not accept the user and its key")
    stand_in.odoo.users = good
    assert isinstance(await connector.deliver(delivery(await stand_in.record())), Delivered)


# ── bad days ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("trouble", "outcome", "took_effect"),
    [
        (Trouble.HANG, Unknown("no answer in time"), False),
        (Trouble.DO_AND_HANG, Unknown("no answer in time"), True),
        (Trouble.CUT, Unknown("hung up before it answered"), False),
        (Trouble.DO_AND_CUT, Unknown("hung up before it answered"), True),
        (Trouble.BAD_GATEWAY, Unknown("answered 502 Bad Gateway", 502), False),
        (Trouble.GIBBERISH, Unknown("its answer is not Odoo's", 200), False),
        (
            Trouble.UNAVAILABLE,
            Retry("answered 503 Service Unavailable", timedelta(seconds=7), whole_destination=True, status=503),
            False,
        ),
        (
            Trouble.REDIRECT,
            Blocked("configuration: url or database: answered 302 Found, and not by Odoo's API", 302),
            False,
        ),
    ],
)
async def test_a_call_without_an_answer_is_cleared_up_by_a_look(
    stand_in: StandIn, opens: Opens, trouble: Trouble, outcome: Outcome, took_effect: bool
) -> None:
    for settings, method in ((NOTE, "message_post"), (ACTIVITY, "activity_schedule")):
        connector, due = opens(stand_in, timeout=0.6, **settings), delivery(await stand_in.record())
        assert await connector.check() == Delivered()
        stand_in.odoo.trouble[method] = trouble
        assert await connector.deliver(due) == outcome
        assert isinstance(await connector.lookup(due), Duplicate if took_effect else type(None))


async def test_a_delivery_whose_answer_was_lost_is_recognised_at_the_next_try(stand_in: StandIn, opens: Opens) -> None:
    connector, due = opens(stand_in, **NOTE), delivery(await stand_in.record())
    stand_in.odoo.trouble["message_post"] = Trouble.DO_AND_CUT
    assert isinstance(await connector.deliver(due), Unknown)
    assert isinstance(await connector.deliver(changed(due, attempt=2)), Duplicate)
    assert len(await stand_in.notes(str(due.event.subject))) == 1


async def test_a_record_stays_closed_while_an_earlier_call_on_it_goes_on(stand_in: StandIn, opens: Opens) -> None:
    connector, due = opens(stand_in, timeout=0.4, **NOTE), delivery(await stand_in.record())
    await connector.check()
    stand_in.odoo.pause = 0
    stand_in.odoo.trouble["message_post"] = Trouble.HANG
    assert await connector.deliver(due) == Unknown("no answer in time")
    again = await connector.deliver(due)
    assert again == Retry("an earlier call on this record still goes on")
    assert isinstance(await connector.deliver(delivery(await stand_in.record())), Delivered)  # others are not held up


async def test_a_slow_call_ends_by_itself_and_opens_its_record_again(stand_in: StandIn, opens: Opens) -> None:
    connector, due = opens(stand_in, timeout=0.5, **NOTE), delivery(await stand_in.record())
    await connector.check()
    stand_in.odoo.pause = 0.3  # a look and a post take longer than the destination waits
    assert isinstance(await connector.deliver(due), Unknown)
    await asyncio.sleep(0.4)
    assert isinstance(await connector.deliver(due), Duplicate)
    assert len(await stand_in.notes(str(due.event.subject))) == 1


async def test_a_look_without_an_answer_changed_nothing(stand_in: StandIn, opens: Opens) -> None:
    connector = opens(stand_in, timeout=0.5, **NOTE)
    await connector.check()
    for trouble in (Trouble.HANG, Trouble.CUT, Trouble.BAD_GATEWAY, Trouble.GIBBERISH):
        stand_in.odoo.trouble["search_read"] = trouble
        assert isinstance(await connector.deliver(delivery(await stand_in.record())), Retry)
    assert not stand_in.odoo.found("mail.message")


async def test_a_record_is_touched_by_one_delivery_at_a_time_and_others_are_not_held_up(
    stand_in: StandIn, opens: Opens
) -> None:
    note, write = opens(stand_in, **NOTE), opens(stand_in, do="write", values={"name": "x"})
    subject = await stand_in.record()
    await note.check()
    stand_in.odoo.pause = 0.03
    outcomes = await asyncio.gather(*[one.deliver(delivery(subject)) for one in (note, write, note, write)])
    assert all(isinstance(outcome, Delivered) for outcome in outcomes)
    assert stand_in.odoo.most_at_once["purchase.order", number(subject)] == 1

    stand_in.odoo.pause = 0.2
    began = time.monotonic()
    await asyncio.gather(*[write.deliver(delivery(await stand_in.record())) for _ in range(4)])
    assert time.monotonic() - began < 0.7


async def test_there_is_one_login_for_all_destinations(starts: Starts, opens: Opens) -> None:
    stand_in = await starts(version="17.0")
    connectors = [opens(stand_in, **NOTE), opens(stand_in, **ACTIVITY)]
    dues = [delivery(await stand_in.record()) for _ in range(8)]
    await asyncio.gather(*[connectors[n % 2].deliver(due) for n, due in enumerate(dues)])
    assert stand_in.odoo.logins == 1


async def test_all_companies_of_the_user_are_asked_for(starts: Starts, opens: Opens) -> None:
    for version in DOORS.values():
        stand_in = await starts(version=version, users=[replace(GATEWAY, companies=(3, 1, 2))])
        await opens(stand_in, **NOTE).deliver(delivery(await stand_in.record()))
        posted = next(call for call in stand_in.odoo.calls if call.method == "message_post")
        assert posted.context["allowed_company_ids"] == [3, 1, 2]


async def test_a_server_that_is_down_makes_the_destination_wait(starts: Starts, opens: Opens) -> None:
    stand_in = await starts()
    await stand_in.odoo.stop()
    for transport in ("auto", "json2", "jsonrpc"):
        connector = opens(stand_in, system={"transport": transport}, **NOTE)
        down = Retry("refused the connection", whole_destination=True)
        assert await connector.deliver(delivery("purchase.order/1")) == down
        assert await connector.check() == down
        assert await connector.lookup(delivery("purchase.order/1")) is None


async def test_it_connects_only_where_the_configuration_allows(starts: Starts, opens: Opens) -> None:
    stand_in = await starts(version="18.0")
    for transport in ("auto", "json2", "jsonrpc"):
        for allow in ([], ["10.0.0.0/8"]):
            connector = opens(stand_in, system={"transport": transport, "allow": allow}, **NOTE)
            outcome = await connector.deliver(delivery("purchase.order/1"))
            why = (
                "`allow` does not cover its address"
                if allow
                else "its address is not a public one; add `allow: [its network]`"
            )
            assert outcome == Blocked(f"configuration: egress: {why}")
    assert not stand_in.odoo.calls
    assert stand_in.odoo.logins == 0


async def test_the_door_follows_the_version_unless_it_is_given(starts: Starts, opens: Opens) -> None:
    for version, transport, logins in (
        ("19.0", "auto", 0),
        ("saas~19.4+e", "auto", 0),
        ("saas~18.2", "auto", 1),
        ("14.0", "auto", 1),
        ("19.0", "jsonrpc", 1),
        ("19.0", "json2", 0),
    ):
        stand_in = await starts(version=version)
        connector = opens(stand_in, system={"transport": transport}, **NOTE)
        assert isinstance(await connector.deliver(delivery(await stand_in.record())), Delivered)
        assert stand_in.odoo.logins == logins


async def test_neither_key_nor_traceback_is_ever_shown(
    stand_in: StandIn, opens: Opens, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    connector = opens(stand_in, **NOTE)
    outcomes = [await connector.check()]
    for name in ("odoo.exceptions.UserError", "unknown"):
        stand_in.odoo.errors["message_post"] = OdooError(name, "canary-Maria-Example")
        outcomes.append(await connector.deliver(delivery(await stand_in.record())))
    shown = repr(outcomes) + caplog.text + repr(connector) + repr(vars(connector))
    for hidden in (GATEWAY.key, "canary", "Traceback", "/opt/odoo"):
        assert hidden not in shown


# ── what is not Odoo ───────────────────────────────────────────────────────────────────────────────


@dataclass
class Elsewhere:
    """Something that is not Odoo, behind its address; it may say that it is."""

    url: str
    system: dict[str, object]
    asked: list[str]


Pretends = Callable[[bytes, bytes, bool], Awaitable[Elsewhere]]


@pytest.fixture
async def elsewhere() -> AsyncIterator[Pretends]:
    servers: list[asyncio.Server] = []
    serving: set[asyncio.Task[None]] = set()

    async def start(head: bytes, for_ever: bytes, tells_a_version: bool) -> Elsewhere:
        asked: list[str] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task
            serving.add(task)
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                request = (await reader.readuntil(b"\r\n\r\n")).decode()
                if length := re.search(r"(?i)^content-length: (\d+)", request, re.MULTILINE):
                    await reader.readexactly(int(length[1]))
                asked.append(request.split()[1])
                told = tells_a_version and asked[-1] == "/web/version"
                writer.write(VERSION if told else head)
                while for_ever and not told:
                    writer.write(for_ever)
                    await writer.drain()
                    await asyncio.sleep(0.0 if len(for_ever) > 1 else 0.05)
                await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        servers.append(server)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        system: dict[str, object] = {
            "url": url,
            "database": "production",
            "user": "gateway",
            "key": secret("k" * 40),
            "allow": ["127.0.0.1/32"],
            "transport": "jsonrpc",
        }
        return Elsewhere(url, system, asked)

    yield start
    for server in servers:
        server.close()
    for task in serving:
        task.cancel()
    await asyncio.sleep(0)


OK = b"HTTP/1.1 200 OK\r\n"
VERSION = OK + b'content-length: 19\r\n\r\n{"version": "17.0"}'


@pytest.mark.parametrize("asked", ["/web/version", "/jsonrpc"])
@pytest.mark.parametrize(
    ("head", "for_ever"),
    [
        pytest.param(OK + b"\r\n", b"x" * 65536, id="endless"),
        pytest.param(OK + b"content-length: 500\r\n\r\n", b"x", id="slow drip"),
        pytest.param(OK + b"x-note: ", b"y", id="slow head"),
        pytest.param(OK + b"content-length: 500\r\n\r\nx", b"", id="cut off"),
        pytest.param(OK + b"content-length: 2\r\n\r\n[]", b"", id="a list"),
        pytest.param(OK + b'content-length: 14\r\n\r\n{"error": true}', b"", id="an error without a name"),
        pytest.param(OK + b"content-length: 2\r\n\r\n\xff\xfe", b"", id="not UTF-8"),
        pytest.param(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\n\r\n", b"", id="a redirect"),
        pytest.param(b"SSH-2.0-OpenSSH\r\n", b"", id="another protocol"),
        pytest.param(b"", b"", id="nothing"),
    ],
)
async def test_whatever_answers_at_its_address_an_outcome_comes_back_in_time(
    elsewhere: Pretends, opens: Opens, head: bytes, for_ever: bytes, asked: str
) -> None:
    other = await elsewhere(head, for_ever, asked == "/jsonrpc")
    connector = opens(other, timeout=0.5, **NOTE)
    began = time.monotonic()
    outcome = await connector.deliver(delivery("purchase.order/1"))
    assert isinstance(outcome, Retry | Blocked)
    assert time.monotonic() - began < 2
    assert asked in other.asked


async def test_a_thread_whose_time_is_over_is_let_go(elsewhere: Pretends, opens: Opens) -> None:
    other = await elsewhere(OK + b"content-length: 500\r\n\r\n", b"x", True)
    connector = opens(other, timeout=0.3, system={"concurrency": 1}, **NOTE)
    for _ in range(3):  # with its one thread held, the second would find no connection
        await connector.deliver(delivery("purchase.order/1"))
    assert other.asked.count("/jsonrpc") == 3


async def test_odoo_behind_a_name_that_does_not_resolve_is_asked_for_again(opens: Opens, starts: Starts) -> None:
    stand_in = await starts()
    for transport in ("json2", "jsonrpc"):
        connector = opens(stand_in, system={"transport": transport, "url": "http://odoo.invalid"}, **NOTE)
        outcome = await connector.deliver(delivery("purchase.order/1"))
        assert outcome == Retry("its name does not resolve", whole_destination=True)


async def test_tls_to_what_has_none_blocks_the_destination(opens: Opens, starts: Starts) -> None:
    stand_in = await starts()
    for transport in ("json2", "jsonrpc"):
        url = stand_in.odoo.url.replace("http:", "https:")
        connector = opens(stand_in, system={"transport": transport, "url": url}, **NOTE)
        outcome = await connector.deliver(delivery("purchase.order/1"))
        assert outcome == Blocked("configuration: TLS: no handshake")


# ── settings ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "mistake"),
    [
        ({"do": "note"}, 'lacks text, which "do: note" needs'),
        ({"do": "call", "method": "x"}, 'lacks from and to, which "do: call" needs'),
        ({"do": "note", "text": "x", "values": {"a": "b"}}, 'has values, which "do: note" does not take'),
        ({"do": "note", "text": "{subjct}"}, 'did you mean "subject"?'),
        ({"do": "note", "text": "{amount}"}, 'did you mean "data.amount"?'),
        ({"do": "note", "text": "{"}, "a brace is no part of"),
        ({"do": "note", "text": 7}, "put it in quotes"),
        ({"do": "note", "text": "x", "model": "Purchase Order"}, "which is no model of Odoo"),
        ({"do": "write", "values": {"x; DROP": "b"}}, "which is no name that Odoo has"),
        ({"do": "write", "values": {}}, "at least 1"),
        ({"do": "call", "method": "_private", "from": "a", "to": "b"}, "which is no name that Odoo has"),
    ],
)
def test_a_mistake_in_the_settings_is_found_when_they_are_loaded(settings: dict[str, object], mistake: str) -> None:
    with pytest.raises(ValueError, match="validation error") as raised:
        KIND.settings.model_validate(settings)
    assert mistake in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "mistake"),
    [
        ("url", "https://odoo.example/odoo", "leave out what follows the host"),
        ("url", "https://user:pass@odoo.example", "holds a login"),
        ("key", "written-out", "must not be written out"),
        ("key", secret("key\n"), "what no API key holds"),
        ("transport", "xmlrpc", "json2"),
        ("concurrency", 0, "greater than or equal to 1"),
    ],
)
def test_a_mistake_in_the_system_is_found_when_it_is_loaded(key: str, value: object, mistake: str) -> None:
    good: dict[str, object] = {"url": "https://odoo.example", "database": "d", "user": "u", "key": secret("k" * 40)}
    assert KIND.system
    assert KIND.system.model_validate(good)
    with pytest.raises(ValueError, match="validation error") as raised:
        KIND.system.model_validate(good | {key: value})
    assert mistake in str(raised.value)
    assert "written-out" not in str(raised.value)
