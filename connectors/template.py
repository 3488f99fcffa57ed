"""Texts with holes, as destinations have them: `{subject} over {data.amount} waits for approval in {facility}`."""

import re
from collections.abc import Callable
from datetime import datetime
from typing import Self

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from connectors.settings import did_you_mean, placeholders, shown
from outbox.event import Event

_ATTRIBUTES: dict[str, Callable[[Event], object]] = {
    "id": lambda event: str(event.id),
    "source": lambda event: event.source,
    "type": lambda event: event.type,
    "subject": lambda event: event.subject,
    "facility": lambda event: event.facility,
    "time": lambda event: event.time,
}


class Template:
    """A text whose holes are filled from an event.  It is a type of setting: a mistake in it is found at load."""

    __slots__ = ("_holes", "_texts", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self._holes = [_hole(name, text) for name in placeholders(text)]
        self._texts = re.split(r"\{[^{}]*\}", text)

    def fill(self, event: Event) -> str:
        """The text about `event`; what the event does not have leaves its hole empty."""
        filled = [_shown(hole(event)) for hole in self._holes]
        return self._texts[0] + "".join(value + text for value, text in zip(filled, self._texts[1:], strict=True))

    def value(self, event: Event) -> object:
        """The value itself where one hole is all there is: an int stays an int, and what is absent is None."""
        if self._texts == ["", ""]:
            return self._holes[0](event)
        return self.fill(event)

    def __repr__(self) -> str:
        return f"Template({self.text!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._read, serialization=core_schema.plain_serializer_function_ser_schema(lambda template: template.text)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string"}

    @classmethod
    def _read(cls, given: object) -> Self:
        match given:
            case cls():
                return given
            case str():
                return cls(given)
            case _:
                raise ValueError(f"is {shown(given)}, which is no text; put it in quotes")


def _hole(name: str, text: str) -> Callable[[Event], object]:
    if field := name.removeprefix("data.") if name.startswith("data.") else "":
        return lambda event: event.data.get(field)
    if name not in _ATTRIBUTES:
        known = [*_ATTRIBUTES, *(["data." + name] if "." not in name else [])]
        raise ValueError(f"is {shown(text)}, but an event has no {{{name}}}{did_you_mean(name, known)}")
    return _ATTRIBUTES[name]


def _shown(value: object) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case datetime():
            return value.isoformat()
        case list() | tuple():
            return ", ".join(map(_shown, value))
        case _:
            return str(value)
