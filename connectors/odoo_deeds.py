"""What can be done to a record of Calls, each in a way that bears being done again.

Odoo keeps no idempotency key.  So a note and an activity carry the delivery's key as a marker, which is looked for
first; values are absolute; and a button is pressed only in the state that it starts from, and its effect is looked at.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec

from connectors import Blocked, Delivered, Delivery, Duplicate, Outcome, Refused, Retry
from connectors.odoo_doors import Failed, Fault
from connectors.odoo_server import Record, Server, Turn
from connectors.odoo_values import as_odoo, same
from connectors.template import Template
from observability.tracing import Tracing

Row = Mapping[str, object]
Shape = TypeVar("Shape")


@dataclass(frozen=True, slots=True)
class Calls:
    """The server, for the calls of one destination."""

    server: Server
    tracing: Tracing

    async def rows(self, model: str, domain: Sequence[Sequence[object]], fields: Sequence[str]) -> Sequence[Row]:
        """Archived ones too; those that the user may not see are not there."""
        found = await self.server.ask(
            self.tracing,
            model,
            "search_read",
            domain=domain,
            fields=fields,
            limit=40,
            order="id",
            context={"active_test": False},
        )
        return _read(found, list[dict[str, object]])

    async def kinds(self, model: str, fields: Sequence[str]) -> Mapping[str, str]:
        """The types of these fields, of those that there are."""
        found = await self.server.ask(self.tracing, model, "fields_get", allfields=fields, attributes=["type"])
        return {name: about["type"] for name, about in _read(found, dict[str, dict[str, str]]).items()}

    async def may(self, model: str, operation: str) -> bool:
        """Whether the user has this right on the model as such."""
        try:
            return bool(await self.server.ask(self.tracing, model, "has_access", [], operation=operation))
        except Fault as fault:
            if fault.name.rpartition(".")[2] not in {"AttributeError", "NotFound"}:
                raise
        return bool(  # before Odoo 18
            await self.server.ask(
                self.tracing, model, "check_access_rights", operation=operation, raise_exception=False
            )
        )

    async def act(self, turn: Turn, record: Record, method: str, **arguments: object) -> object:
        return await self.server.act(turn, self.tracing, record.model, method, [record.id], **arguments)


class Deed(Protocol):
    """One thing that a destination does."""

    async def look(self, record: Record, delivery: Delivery) -> Duplicate | None:
        """Whether it is done already."""
        ...

    async def do(self, turn: Turn, record: Record, delivery: Delivery) -> Outcome:
        """Does it, in one's turn; looks first, where doing it again would do harm."""
        ...

    async def check(self, model: str | None) -> Outcome | None:
        """What stands in its way, as far as it can be told without doing it; of a model, if only one is meant."""
        ...


class Note:
    """A note in the record's chatter.  Its text is text: since 17 Odoo sees to that, before we do."""

    def __init__(self, calls: Calls, text: Template) -> None:
        self._calls, self._text = calls, text

    async def look(self, record: Record, delivery: Delivery) -> Duplicate | None:
        return await _in_chatter(self._calls, record, delivery)

    async def do(self, turn: Turn, record: Record, delivery: Delivery) -> Outcome:
        if done := await self.look(record, delivery):
            return done
        text = f"{self._text.fill(delivery.event)} {marker(delivery)}"
        made = await self._calls.act(
            turn,
            record,
            "message_post",
            body=text if await self._calls.server.escapes(self._calls.tracing) else html.escape(text),
            message_type="comment",
            subtype_xmlid="mail.mt_note",  # without it, the record's followers get a mail
        )
        return Delivered(_receipt("mail.message", made))

    async def check(self, model: str | None) -> Outcome | None:
        return await _rights(self._calls, model, ("mail.message", "create"))


class Activity:
    """Something to do, for a person."""

    def __init__(
        self, calls: Calls, summary: Template, text: Template | None, user: int | str | None, kind: str
    ) -> None:
        self._calls, self._summary, self._text, self._user, self._kind = calls, summary, text, user, kind

    async def look(self, record: Record, delivery: Delivery) -> Duplicate | None:
        activities = await self._calls.rows(
            "mail.activity",
            [
                ["res_model", "=", record.model],
                ["res_id", "=", record.id],
                ["note", "ilike", str(delivery.event.id)],
            ],
            ["note"],
        )
        if done := _marked("mail.activity", activities, "note", delivery):
            return done
        return await _in_chatter(self._calls, record, delivery)  # where Odoo before 17 puts one that was done

    async def do(self, turn: Turn, record: Record, delivery: Delivery) -> Outcome:
        if done := await self.look(record, delivery):
            return done
        text = self._text.fill(delivery.event) if self._text else ""
        person = await self._person()
        made = await self._calls.act(
            turn,
            record,
            "activity_schedule",
            act_type_xmlid=self._kind,
            summary=self._summary.fill(delivery.event),
            note=html.escape(f"{text} {marker(delivery)}".strip()),  # this one is HTML, and nobody else escapes it
            **({} if person is None else {"user_id": person}),
        )
        if not made:
            return Refused("Odoo made no activity")
        return Delivered(_receipt("mail.activity", made))

    async def check(self, model: str | None) -> Outcome | None:
        if blocked := await _rights(self._calls, model, ("mail.activity", "create")):
            return blocked
        await self._person()
        return None

    async def _person(self) -> int | None:
        if not isinstance(self._user, str):
            return self._user
        match await self._calls.rows("res.users", [["login", "=", self._user], ["active", "=", True]], ["login"]):
            case [{"id": int(found)}]:
                self._user = found
                return found
            case _:
                raise Failed(Blocked("configuration: user: Odoo has no such user, or does not show it"))


class Write:
    """Absolute values: written twice, they are the same."""

    def __init__(self, calls: Calls, values: Mapping[str, Template | bool | float]) -> None:
        self._calls, self._values = calls, values
        self._kinds: dict[str, Mapping[str, str]] = {}  # by model

    async def look(self, record: Record, delivery: Delivery) -> Duplicate | None:
        wanted, kinds = await self._wanted(record, delivery), self._kinds[record.model]
        match await self._calls.rows(record.model, [["id", "=", record.id]], list(wanted)):
            case [stands] if all(same(kinds[name], stands.get(name), value) for name, value in wanted.items()):
                return Duplicate(str(record))
            case _:
                return None

    async def do(self, turn: Turn, record: Record, delivery: Delivery) -> Outcome:
        await self._calls.act(turn, record, "write", vals=await self._wanted(record, delivery))
        return Delivered(str(record))

    async def check(self, model: str | None) -> Outcome | None:
        if model is not None:
            await self._kinds_of(model)
        return await _rights(self._calls, model)

    async def _wanted(self, record: Record, delivery: Delivery) -> dict[str, object]:
        kinds, wanted = await self._kinds_of(record.model), {}
        for name, given in self._values.items():
            value = given.value(delivery.event) if isinstance(given, Template) else given
            if value is None:
                raise Failed(Refused(f"the event has no value for {name}"))
            wanted[name] = as_odoo(name, kinds[name], value)
        return wanted

    async def _kinds_of(self, model: str) -> Mapping[str, str]:
        if model not in self._kinds:
            kinds = await self._calls.kinds(model, list(self._values))
            if missing := sorted(self._values.keys() - kinds.keys()):
                raise Failed(Blocked(f"configuration: values: {model} has no field {', '.join(missing)}"))
            self._kinds[model] = kinds
        return self._kinds[model]


class Press:
    """A button.  Odoo answers yes also where it did nothing, so the record says what came of it."""

    def __init__(self, calls: Calls, method: str, field: str, start: Sequence[str], goal: Sequence[str]) -> None:
        self._calls, self._method, self._field, self._start, self._goal = calls, method, field, start, goal

    async def look(self, record: Record, delivery: Delivery) -> Duplicate | None:  # noqa: ARG002  # the state says it
        return Duplicate(str(record)) if await self._state(record) in self._goal else None

    async def do(self, turn: Turn, record: Record, delivery: Delivery) -> Outcome:  # noqa: ARG002
        state = await self._state(record)
        if state in self._goal:
            return Duplicate(str(record))
        if state not in self._start:
            return Refused(f"its {self._field} is not one in which {self._method} may be called")
        await self._calls.act(turn, record, self._method)
        if await self._state(record) in self._goal:
            return Delivered(str(record))
        return Refused(f"{self._method} did nothing: the user may lack the right, or the record something")

    async def check(self, model: str | None) -> Outcome | None:
        if model is not None and self._field not in await self._calls.kinds(model, [self._field]):
            return Blocked(f"configuration: field: {model} has no field {self._field}")
        return await _rights(self._calls, model)

    async def _state(self, record: Record) -> object:
        match await self._calls.rows(record.model, [["id", "=", record.id]], [self._field]):
            case [row]:
                return row.get(self._field)
            case _:
                raise Failed(Refused("the record is gone, or hidden from the user"))


def marker(delivery: Delivery) -> str:
    """What an earlier try left behind.  The brackets end it: `e/order` is no part of `e/order-note`."""
    return f"[{delivery.key}]"


async def _in_chatter(calls: Calls, record: Record, delivery: Delivery) -> Duplicate | None:
    messages = await calls.rows(
        "mail.message",
        [["model", "=", record.model], ["res_id", "=", record.id], ["body", "ilike", str(delivery.event.id)]],
        ["body"],
    )
    return _marked("mail.message", messages, "body", delivery)


def _marked(model: str, rows: Sequence[Row], field: str, delivery: Delivery) -> Duplicate | None:
    for row in rows:
        if marker(delivery) in str(row.get(field)):
            return Duplicate(f"{model}/{row.get('id')}")
    return None


async def _rights(calls: Calls, model: str | None, *more: tuple[str, str]) -> Blocked | None:
    for of, operation in (*([(model, "write")] if model else []), *more):
        if not await calls.may(of, operation):
            return Blocked(f"configuration: rights: the user may not {operation} {of}")
    return None


def _receipt(model: str, made: object) -> str:
    """Of `[7]` and of 7, as versions differ."""
    match made:
        case [int(id_), *_] | int(id_):
            return f"{model}/{id_}"
        case _:
            return model


def _read(value: object, shape: type[Shape]) -> Shape:
    try:
        return msgspec.convert(value, shape)
    except msgspec.ValidationError:
        raise Failed(Retry("its answer is not Odoo's")) from None
