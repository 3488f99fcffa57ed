"""Several events in one post: where they stand in it, and each for itself as bytes.  Pure.

    each: $.value      {"value": [{…}, {…}]}
    each: $            [{…}, {…}]

Only the list is looked for; what an item holds is read by the policies, each item as if it had been posted alone.
"""

from typing import Any, Final

import msgspec

from gateway.duplicate_keys import DuplicateKeys, Level, members_of
from gateway.forms import MalformedFormError, unwrapped
from gateway.minimize import BYTE_ORDER_MARK, Unmet, Unreadable, reader

MOST_ITEMS: Final = 500  # as many as one transaction takes: see LARGEST in outbox/intake_batch.py


class Items:
    """Takes the items out of a post, as bytes."""

    def __init__(self, each: str, *, wrapped_in: str | None) -> None:
        self.path = each.removeprefix("$").removeprefix(".")
        self._wrapped_in = wrapped_in
        keys = tuple(self.path.split(".")) if self.path else ()
        self._read: Any = reader({keys: list[msgspec.Raw] | None}) if keys else None
        self._duplicates = DuplicateKeys(Level.of({keys} if keys else ()))

    def of(self, body: bytes) -> list[bytes] | Unreadable | Unmet:
        try:
            if self._wrapped_in is not None:
                body = unwrapped(body, self._wrapped_in)
            return self._of(body.removeprefix(BYTE_ORDER_MARK).lstrip(b" \t\r\n"))
        except MalformedFormError as malformed:
            return Unreadable(str(malformed))
        except msgspec.ValidationError:
            return Unmet(f"{self.path} must be a list")
        except (msgspec.DecodeError, UnicodeDecodeError):
            return Unreadable("the body is not JSON")
        except RecursionError:
            return Unreadable("the body is nested too deeply")

    def _of(self, body: bytes) -> list[bytes] | Unreadable | Unmet:
        if not body.isascii():
            body.decode()
        if self._read is None:
            if body[:1] != b"[":
                return Unreadable("the body is not a JSON list")
            return [bytes(item) for item in _LIST.decode(body)]
        if body[:1] != b"{":
            return Unreadable("the body is not a JSON object")
        (items,) = self._read(body)
        if twice := self._duplicates.find(body, members_of(body)):
            return Unreadable(f"{twice} stands twice in the body")
        if items is None:
            return Unmet(f"{self.path} is missing")
        return [bytes(item) for item in items]

    def named(self, place: int, reason: str) -> str:
        """What is wrong with one item, by its place."""
        return f"{self.path}[{place}]: {reason}"


_LIST: Final = msgspec.json.Decoder(list[msgspec.Raw])
