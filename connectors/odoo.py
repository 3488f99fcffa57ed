"""Notes, activities, values and buttons on Odoo's records."""

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from connectors import Connector, Kind, Opening
from connectors.settings import Network, Secret, Settings, Url, did_you_mean, shown
from connectors.template import Template


class OdooSystem(Settings):
    """One login to one database."""

    url: Url
    """Where Odoo answers: https://odoo.example, without a path."""
    database: Annotated[str, Field(min_length=1)]
    """The name of its database."""
    user: Annotated[str, Field(min_length=1)]
    """The login of a user made for this, with no more rights than its destinations need."""
    key: Secret
    """That user's API key."""
    transport: Literal["auto", "jsonrpc", "json2"] = "auto"
    """How to speak to it: JSON-2 needs Odoo 19; left out, Odoo's version decides."""
    allow: tuple[Network, ...] = ()
    """The addresses that it may connect to; left out, it may connect to public ones."""
    ca: str | None = None
    """Certificates (PEM) of the authorities to trust instead of the system's; usually file:PATH."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 4
    """Calls at a time, of all its destinations together: each one keeps a worker of Odoo busy."""


def _identifier(text: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", text):
        raise ValueError(f"is {shown(text)}, which is no name that Odoo has; write it as in button_approve")
    return text


Identifier = Annotated[str, AfterValidator(_identifier)]


class OdooSettings(Settings):
    """What to do with the record that an event is about; which keys it takes depends on `do`."""

    do: Literal["note", "activity", "write", "call"]
    """`note` in its chatter, `activity` for a person, `write` values, or `call` a button's method."""
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
        "note": ({"text"}, set()),
        "activity": ({"summary"}, {"text", "user", "kind"}),
        "write": ({"values"}, set()),
        "call": ({"method", "from", "to"}, {"field"}),
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


def connect(opening: Opening) -> Connector:
    raise NotImplementedError


KIND = Kind(name="odoo", settings=OdooSettings, connect=connect, system=OdooSystem)
