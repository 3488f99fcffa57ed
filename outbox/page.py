"""A list, a page at a time: by the place of its last row, never by a count of rows to skip."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

Item = TypeVar("Item")
Row = TypeVar("Row")
Place = TypeVar("Place")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[Item]):
    """Some items, and where the list goes on: null at its end."""

    items: list[Item]
    next: str | None = None


class BadCursorError(ValueError):
    """A cursor that no page of ours ended with."""


def page(rows: Sequence[Row], limit: int, *, item: Callable[[Row], Item], place: Callable[[Row], object]) -> Page[Item]:
    """The first `limit` of `rows`, which were read with one more than that to see whether the list goes on."""
    shown = rows[:limit]
    return Page(items=[item(row) for row in shown], next=_cursor(place(shown[-1])) if len(rows) > limit else None)


def place_of(cursor: str | None, kind: type[Place]) -> Place | None:
    """The place that a cursor stands for; None stands for the beginning."""
    if cursor is None:
        return None
    try:
        return msgspec.json.decode(urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)), type=kind)
    except (ValueError, msgspec.MsgspecError) as error:
        raise BadCursorError("this cursor is not the `next` of any page") from error


def _cursor(place: object) -> str:
    return urlsafe_b64encode(msgspec.json.encode(place)).decode().rstrip("=")
