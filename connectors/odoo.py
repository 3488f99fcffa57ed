"""Notes, activities, values and buttons on the records of an Odoo."""

import asyncio
import re
from datetime import timedelta
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from connectors import Delivered, Delivery, Kind, Opening, Outcome, Refused, Retry, Unknown
from connectors.odoo_deeds import Activity, Calls, Deed, Note, Press, Write
from connectors.odoo_doors import Failed, Fault, judged
from connectors.odoo_server import OdooSystem, Record, Server, Turn
from connectors.settings import Settings, did_you_mean, shown
from connectors.template import Template


def _identifier(text: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", text):
        raise ValueError(f"is {shown(text)}, which is no name that Odoo has; write it as in button_approve")
    return text


def _model(text: str) -> str:
    if not _MODEL.fullmatch(text):
        raise ValueError(f"is {shown(text)}, which is no model of Odoo; write it as in purchase.order")
    return text


_MODEL = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)*")
Identifier = Annotated[str, AfterValidator(_identifier)]


class OdooSettings(Settings):
    """What to do with the record that an event is about; which keys it takes depends on `do`."""

    do: Literal["note", "activity", "write", "call"]
    """`note` in its chatter, `activity` for a person, `write` values, or `call` a button's method."""
    model: Annotated[str, AfterValidator(_model)] | None = None
    """The only model whose records it may touch; left out, the one that the event's subject names."""
    text: Template | None = None
    """note: what it says. activity: more than its summary."""
    summary: Template | None = None
    """activity: its headline."""
    user: Annotated[int, Field(ge=1)] | Annotated[str, Field(min_length=1)] | None = None
    """activity: whom it is for, by login or id; left out, Odoo decides."""
    kind: Annotated[str, Field(pattern=r"^[a-z0-9_]+\.[A-Za-z0-9_]+$")] = "mail.mail_activity_data_todo"
    """activity: the external id of its type."""
    values: Annotated[dict[Identifier, Template | bool | int | float], Field(min_length=1)] | None = None
    """write: the fields to set. A text that is one hole, such as {data.amount}, keeps the type of its value."""
    method: Identifier | None = None
    """call: the method behind the button."""
    field: Identifier = "state"
    """call: where the record's state is read."""
    from_: Annotated[tuple[str, ...] | str | None, Field(alias="from")] = None
    """call: the state, or states, in which the button may be pressed."""
    to: tuple[str, ...] | str | None = None
    """call: the state, or states, that it leads to; a record that is there already is left alone."""

    _KEYS: ClassVar[dict[str, tuple[set[str], set[str]]]] = {  # what each one needs, and what it may have besides
        "note": ({"text"}, {"model"}),
        "activity": ({"summary"}, {"model", "text", "user", "kind"}),
        "write": ({"values"}, {"model"}),
        "call": ({"method", "from", "to"}, {"model", "field"}),
    }

    @model_validator(mode="after")
    def _fits(self) -> Self:
        needed, more = self._KEYS[self.do]
        given = {type(self).model_fields[name].alias or name for name in self.model_fields_set} - {"do"}
        if missing := needed - given:
            raise ValueError(f'lacks {" and ".join(sorted(missing))}, which "do: {self.do}" needs')
        if wrong := given - needed - more:
            name = min(wrong)
            raise ValueError(
                f'has {name}, which "do: {self.do}" does not take{did_you_mean(name, sorted(needed | more))}'
            )
        return self


class Odoo:
    """Does one thing to the record that an event is about: its subject names it, as in `purchase.order/42`.

    Odoo keeps no idempotency key, but every deed bears being done again: it looks for what an earlier try left, one
    delivery at a time for each record, and a call that changes something keeps the record's turn until it is over,
    however long that takes.  So an `Unknown` that a look-up does not clear up may be sent again.
    """

    keeps_keys = True

    def __init__(self, opening: Opening, settings: OdooSettings, server: Server) -> None:
        self._server = server
        self._calls = Calls(server, opening.tracing)
        self._model = settings.model
        self._deed = deed_of(settings, self._calls)
        self._seconds = opening.timeout.total_seconds()

    async def deliver(self, delivery: Delivery) -> Outcome:
        record = self._record(delivery)
        if isinstance(record, Refused):
            return record
        turn: Turn | None = None
        try:
            async with asyncio.timeout(self._seconds), self._server.turn(record) as turn:
                return await self._do(turn, record, delivery)
        except TimeoutError:
            if turn is None:
                return Retry("an earlier call on this record still goes on")
            return Retry("no answer in time") if turn.effect is None else Unknown("no answer in time")

    async def lookup(self, delivery: Delivery) -> Outcome | None:
        """What an earlier try left behind, if that can be seen."""
        record = self._record(delivery)
        if isinstance(record, Refused):
            return None
        try:
            async with asyncio.timeout(self._seconds):
                return await self._deed.look(record, delivery)
        except (Fault, Failed, TimeoutError):
            return None

    async def check(self) -> Outcome:
        """Finds Odoo, logs in, and asks for the rights that it needs; changes nothing."""
        try:
            async with asyncio.timeout(self._seconds):
                await self._server.ask(self._calls.tracing, "res.users", "context_get")
                return await self._deed.check(self._model) or Delivered()
        except Failed as failed:
            return failed.outcome
        except Fault as fault:
            return judged(fault)
        except TimeoutError:
            return Retry("no answer in time")

    async def close(self) -> None:
        """The server is shared, and closed by who opened it."""

    async def _do(self, turn: Turn, record: Record, delivery: Delivery) -> Outcome:
        try:
            return await self._deed.do(turn, record, delivery)
        except Failed as failed:
            return failed.outcome
        except Fault as fault:
            if fault.name.endswith("AccessError") and await self._may_write(record.model):
                return Refused("the user may not touch this record: AccessError")
            return judged(fault)

    async def _may_write(self, model: str) -> bool:
        """Tells a rule about one record, which is that record's end, from a right that is missing for all of them."""
        try:
            return await self._calls.may(model, "write")
        except (Fault, Failed):
            return False

    def _record(self, delivery: Delivery) -> Record | Refused:
        model, _, number = (delivery.event.subject or "").rpartition("/")
        if not _MODEL.fullmatch(model) or not re.fullmatch(r"[1-9][0-9]{0,17}", number):
            return Refused("the event's subject names no record of Odoo, as purchase.order/42 does")
        if self._model not in {None, model}:
            return Refused(f"the event's subject is not of the model {self._model}")
        return Record(model, int(number))


def deed_of(settings: OdooSettings, calls: Calls) -> Deed:
    match settings:
        case OdooSettings(do="note", text=Template() as text):
            return Note(calls, text)
        case OdooSettings(do="activity", summary=Template() as summary):
            return Activity(calls, summary, settings.text, settings.user, settings.kind)
        case OdooSettings(do="write", values=dict() as values):
            return Write(calls, values)
        case OdooSettings(
            do="call", method=str() as method, from_=(str() | tuple()) as start, to=(str() | tuple()) as goal
        ):
            return Press(calls, method, settings.field, _several(start), _several(goal))
        case _:
            raise AssertionError("its own check lets nothing else pass")


def _several(states: str | tuple[str, ...]) -> tuple[str, ...]:
    return (states,) if isinstance(states, str) else states


def connect(opening: Opening) -> Odoo:
    settings, server = opening.settings, opening.system
    assert isinstance(settings, OdooSettings)
    assert isinstance(server, Server)
    return Odoo(opening, settings, server)


def open_system(settings: Settings, timeout: timedelta) -> Server:
    assert isinstance(settings, OdooSystem)
    return Server(settings, timeout)


KIND = Kind(name="odoo", settings=OdooSettings, connect=connect, system=OdooSystem, open_system=open_system)
