"""Forms, as browsers, Twilio, Slack and GitHub post them: read into the JSON that policies are applied to.  Pure.

    form                 Status=sent&To=…              each field is a text; what a policy does not name is not even decoded
    form-json:payload    payload=%7B%22id%22%3A7%7D    one field holds the JSON; the others are ignored

A proof is over the bytes as they came; this is done after it, and once.  A form that two readers could read in two ways
(a declared name twice, an escape that is none, bytes that are no UTF-8) is refused.
"""

import re
from collections.abc import Iterable, Iterator

import msgspec

from gateway.config_sections import Policy
from gateway.minimize import Minimized, Policies, Unmet, Unreadable

MOST_FIELDS = 1000


class MalformedFormError(Exception):
    """Its message says why, and holds nothing of the form."""


class FormPolicies:
    """The policies of a source that posts forms; stands where other sources have theirs."""

    def __init__(self, accepts: Iterable[Policy], policies: Policies) -> None:
        self._policies = policies
        self._declared = frozenset(path for policy in accepts for path in policy.all_paths)

    def minimize(self, body: bytes) -> Minimized | Unreadable | Unmet:
        try:
            return self._policies.minimize(self._as_json(body))
        except MalformedFormError as malformed:
            return Unreadable(str(malformed))

    def _as_json(self, body: bytes) -> bytes:
        """An object of all names, with the values of those that are declared."""
        read: dict[str, str | None] = {}
        for written, value in _fields(body):
            name = _decoded(written)
            if name not in self._declared:
                read[name] = None
            elif name in read:
                raise MalformedFormError(f"{name} stands twice in the body")
            else:
                read[name] = _decoded(value)
        return msgspec.json.encode(read)


class WrappedPolicies:
    """The policies of a source that posts its JSON in one field of a form."""

    def __init__(self, field: str, policies: Policies) -> None:
        self._field = field
        self._policies = policies

    def minimize(self, body: bytes) -> Minimized | Unreadable | Unmet:
        try:
            return self._policies.minimize(unwrapped(body, self._field))
        except MalformedFormError as malformed:
            return Unreadable(str(malformed))


def unwrapped(body: bytes, field: str) -> bytes:
    """What one field of a form holds; raises MalformedFormError."""
    found = [value for name, value in _fields(body) if _decoded(name) == field]
    if len(found) != 1:
        raise MalformedFormError(f"{field} stands twice in the body" if found else f"the form has no field {field}")
    return _decoded(found[0]).encode()


def _fields(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names and values as they are written; what stands between two & may be nothing."""
    parts = body.split(b"&", MOST_FIELDS)
    if len(parts) > MOST_FIELDS:
        raise MalformedFormError(f"the form has more than {MOST_FIELDS} fields")
    for part in parts:
        if part:
            name, _, value = part.partition(b"=")
            yield name, value


def _decoded(written: bytes) -> str:
    plain = written.replace(b"+", b" ")
    if b"%" in plain:
        pieces = plain.split(b"%")
        if not all(map(_ESCAPED.match, pieces[1:])):
            raise MalformedFormError("the form has a % that escapes nothing")
        plain = pieces[0] + b"".join([bytes.fromhex(piece[:2].decode()) + piece[2:] for piece in pieces[1:]])
    try:
        return plain.decode()
    except UnicodeDecodeError:
        raise MalformedFormError("the form is not in UTF-8") from None


_ESCAPED = re.compile(rb"[0-9A-Fa-f]{2}")
