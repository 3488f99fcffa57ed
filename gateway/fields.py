"""The closed types that a policy may keep: what each takes from a payload and the one form that it is kept in.

There is no type for free text.  Whatever comes through here is a bool, an integer, a number in plain notation, an
instant, a day, a UUID, a word of the policy's own, a short code that its pattern allows, or a pseudonym: no value can
hold a NUL, a control character, a lone surrogate or a sentence.
"""

import hashlib
import hmac
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from decimal import ROUND_HALF_UP, Context, Decimal
from types import GenericAlias
from typing import Any, assert_never

import msgspec

from gateway.config_sections import (
    BoolField,
    CodeField,
    DateField,
    DecimalField,
    EnumField,
    IntField,
    ReadField,
    TimestampField,
    UuidField,
)

Scalar = str | int | bool
DIGITS = 40  # the most that a number may have, so that nobody can smuggle text or a bomb in one


class Unfit(Exception):  # noqa: N818 — not an error: the payload does not meet the policy
    """A value is not what its field must be.  Never holds the value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How one field is kept."""

    takes: Any  # the type that msgspec decodes it as
    keep: Callable[[Any], object]  # the kept form; raises Unfit; None if it stands for nothing after all
    must: str  # what to tell the sender who breaks it: "be an integer"
    false: bool = False  # whether `false` is a value here; elsewhere Odoo means "empty" by it


def rule_of(field: ReadField, *, key: bytes, texts: bool = False) -> Rule:
    """How `field` is kept; `key` is the key of pseudonyms; with `texts` all that is given is text, as in a form."""
    rule = _of_text(field, _rule_of_one(field)) if texts else _rule_of_one(field)
    match field:
        case (
            IntField(token=str(domain))
            | EnumField(token=str(domain))
            | UuidField(token=str(domain))
            | CodeField(token=str(domain))
        ):
            rule = _token(rule, domain, key)
        case IntField() | UuidField() | CodeField() if field.lookup is not None:
            rule = _look_up(rule, field.lookup, field.otherwise)
        case IntField() | DecimalField() if field.bucket is not None:
            rule = _bucket(rule, field.bucket, as_text=isinstance(field, DecimalField))
        case TimestampField() | DateField() if field.truncate is not None:
            rule = _cut(rule, field.truncate)
        case _:
            pass
    return _list(rule, field.most) if field.many else rule


def _rule_of_one(field: ReadField) -> Rule:
    match field:
        case IntField():
            return _int(field.min, None if field.many else field.max)
        case DecimalField():
            return _decimal(field.round)
        case BoolField():
            return Rule(takes=_SCALAR, keep=_bool, must="be true or false", false=True)
        case EnumField():
            return one_of(field.of)
        case UuidField():
            return Rule(takes=_SCALAR, keep=_uuid, must="be a UUID")
        case TimestampField():
            return Rule(takes=_SCALAR, keep=_timestamp, must="be a timestamp as of RFC 3339")
        case DateField():
            return Rule(takes=_SCALAR, keep=_date, must="be a date, YYYY-MM-DD")
        case CodeField():
            return _code(field.pattern, field.max_length)
    assert_never(field)


def _of_text(field: ReadField, rule: Rule) -> Rule:
    """The same rule for values that are texts: a number is written as in JSON, and an empty text stands for nothing."""
    typed: Callable[[str], object]
    match field:
        case IntField():
            typed = _int_in
        case DecimalField():
            typed = msgspec.json.encode
        case BoolField():
            typed = _bool_in
        case EnumField():
            rule, typed = one_of({as_text(raw): word for raw, word in field.of.items()}), str
        case UuidField() | TimestampField() | DateField() | CodeField():
            typed = str
    plain = rule.keep

    def keep(text: object) -> object:
        if type(text) is not str:
            raise Unfit
        return plain(typed(text)) if text else None

    return replace(rule, takes=_SCALAR, keep=keep)


def _int_in(text: str) -> int:
    if _INT.fullmatch(text):
        return int(text)
    raise Unfit


def _bool_in(text: str) -> bool:
    if text in {"true", "false"}:
        return text == "true"
    raise Unfit


def one_of(kept: Mapping[Scalar, Scalar]) -> Rule:
    """A word of the policy's own for each raw value that it names.  1, true and "1" are three different raw values."""
    words = {(type(raw), raw): word for raw, word in kept.items()}

    def keep(value: object) -> Scalar:
        try:
            return words[type(value), value]  # type: ignore[index]  # what is no scalar is simply not found
        except KeyError:
            raise Unfit from None

    return Rule(
        takes=_SCALAR, keep=keep, must="be one of the values that the policy names", false=(bool, False) in words
    )


instant = datetime.fromisoformat  # the instant that a kept timestamp names, to the microsecond


def timestamp(given: str) -> str:
    """The one form of an instant: RFC 3339 in UTC with `Z` and no idle zeros, to the nanosecond; raises Unfit.

    Without an offset it is UTC, as Odoo means it.  Two texts for one instant become the same text, and those texts,
    without the `Z`, sort as their instants do.
    """
    if usual := _USUAL_TIMESTAMP.fullmatch(given):
        day, clock = usual.groups()
        text = f"{day}T{clock}Z"
        try:
            datetime.fromisoformat(text)
        except ValueError:
            raise Unfit from None
        return text
    if not (match := _TIMESTAMP.fullmatch(given)):
        raise Unfit
    day, clock, fraction, sign, hours, minutes = match.groups()
    text = f"{day}T{clock}"
    try:
        at = datetime.fromisoformat(text)
        if sign is not None:
            offset = timedelta(hours=int(hours), minutes=int(minutes))
            text = (at - offset if sign == "+" else at + offset).isoformat()
    except (ValueError, OverflowError):
        raise Unfit from None
    if fraction is not None and (counts := fraction[:9].rstrip("0")):
        return f"{text}.{counts}Z"
    return text + "Z"


_SCALAR = str | int | bool | None
_USUAL_TIMESTAMP = re.compile(  # in UTC, with no idle zeros: what needs no conversion
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]([0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{0,8}[1-9])?)[Zz]?"
)
_TIMESTAMP = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]([0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,40}))?"
    r"(?:[Zz]|([+-])([01][0-9]|2[0-3]):?([0-5][0-9]))?"
)
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_INT = re.compile(r"-?(?:0|[1-9][0-9]{0,39})")
_PLAIN = re.compile(rb'"?(-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?)"?')
_SCIENTIFIC = re.compile(r"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]{1,4})?")
_EXACT = Context(prec=4 * DIGITS, rounding=ROUND_HALF_UP)


def _int(low: int | None, high: int | None) -> Rule:
    least = -(10**DIGITS) + 1 if low is None else low
    most = 10**DIGITS - 1 if high is None else high

    def keep(value: object) -> int:
        if type(value) is int and least <= value <= most:
            return value
        raise Unfit

    must = "be an integer" + (f" from {low}" if low is not None else "") + (f" to {high}" if high is not None else "")
    return Rule(takes=_SCALAR, keep=keep, must=must)


def _decimal(places: int | None) -> Rule:
    """A JSON number or the same in a string, kept as text: no float ever touches it.

    It is read from its raw bytes, because a parser that makes a number of `1e200000`, or of `0.1`, has lost already.
    """

    def keep(raw: msgspec.Raw) -> str | None:
        if match := _PLAIN.fullmatch(raw):
            text = match[1].decode()
        elif (given := bytes(raw)) in {b"null", b"false"}:
            return None
        else:
            text = _plain(given)
        if places is not None and len(text) <= DIGITS + 2:
            text = format(Decimal(text).quantize(Decimal(1).scaleb(-places), context=_EXACT), "f")
        if len(text) > DIGITS and len(text) - text.count("-") - text.count(".") > DIGITS:
            raise Unfit
        return text[1:] if text[0] == "-" and not text.strip("-0.") else text

    return Rule(takes=msgspec.Raw, keep=keep, must=f"be a decimal number of at most {DIGITS} digits")


def _plain(raw: bytes) -> str:
    """Plain notation for what came with an exponent, or with escapes in its string."""
    try:
        text = msgspec.json.decode(raw, type=str) if raw.startswith(b'"') else raw.decode()
    except ValueError:
        raise Unfit from None
    if not _SCIENTIFIC.fullmatch(text) or len(text) > 2 * DIGITS:
        raise Unfit
    number = Decimal(text)
    if abs(number.adjusted()) > DIGITS:
        raise Unfit
    return format(number, "f")


def _code(pattern: str, longest: int) -> Rule:
    matches = re.compile(pattern, re.ASCII).fullmatch

    def keep(value: object) -> str:
        if type(value) is str and len(value) <= longest and _is_a_word(value) and matches(value):
            return value
        raise Unfit

    return Rule(takes=_SCALAR, keep=keep, must=f"be a code that matches {pattern}, at most {longest} characters long")


def _is_a_word(text: str) -> bool:
    """Whatever a pattern allows: no control characters, no lone surrogates, no spaces."""
    return text.isprintable() and " " not in text


def _bool(value: object) -> bool:
    if type(value) is bool:
        return value
    raise Unfit


def _uuid(value: object) -> str:
    if type(value) is str and _UUID.fullmatch(lower := value.lower()):
        return lower
    raise Unfit


def _timestamp(value: object) -> str:
    if type(value) is str:
        return timestamp(value)
    raise Unfit


def _date(value: object) -> str:
    if type(value) is str and _DATE.fullmatch(value):
        try:
            return date.fromisoformat(value).isoformat()
        except ValueError:
            pass
    raise Unfit


def _list(rule: Rule, longest: int) -> Rule:
    one = rule.keep

    def keep(values: object) -> list[object]:
        if type(values) is not list or len(values) > longest:
            raise Unfit
        kept = [one(value) for value in values]
        if None in kept:
            raise Unfit
        return kept

    return Rule(
        takes=GenericAlias(list, (rule.takes,)) | bool | None,
        keep=keep,
        must=f"be a list of at most {longest}, and each must {rule.must}",
    )


def _token(rule: Rule, domain: str, key: bytes) -> Rule:
    """A keyed pseudonym instead of the value: the same in one domain, so that events can be told to be about one person.

    Whoever has the key can try all values, so it stays personal data; without the key it says nothing.
    """
    keyed = hashlib.blake2b(key=hmac.digest(key, b"sluicegate pseudonym\0" + domain.encode(), "sha512"), digest_size=17)
    plain = rule.keep

    def keep(value: object) -> str | None:
        kept = plain(value)
        if kept is None:
            return None
        digest = keyed.copy()
        digest.update(as_text(kept).encode())
        return "t1." + _base32(digest.digest())

    return replace(rule, keep=keep)


def _look_up(rule: Rule, words: Mapping[Scalar, Scalar], otherwise: Scalar | None) -> Rule:
    """The policy's word for the value instead of the value."""
    plain = rule.keep

    def keep(value: object) -> Scalar | None:
        kept = plain(value)
        if kept is None:
            return None
        word = words.get(kept, otherwise)  # type: ignore[call-overload]  # a scalar
        if word is None:
            raise Unfit
        return word  # type: ignore[no-any-return]

    return replace(rule, keep=keep, must=rule.must if otherwise is not None else f"{rule.must} that the policy names")


def _bucket(rule: Rule, edges: Sequence[int | Decimal], *, as_text: bool) -> Rule:
    """The highest of these lower edges that the value reaches."""
    words = [format(Decimal(edge), "f") if as_text else edge for edge in edges]
    plain = rule.keep

    def keep(value: object) -> object:
        kept = plain(value)
        if kept is None:
            return None
        place = bisect_right(edges, Decimal(str(kept)))
        if not place:
            raise Unfit
        return words[place - 1]

    return replace(rule, keep=keep, must=f"{rule.must}, and at least {edges[0]}")


_KEPT_OF = {  # how much of a timestamp or date is left of it, and what stands for the rest
    "year": (4, "-01-01T00:00:00Z"),
    "month": (7, "-01T00:00:00Z"),
    "day": (10, "T00:00:00Z"),
    "hour": (13, ":00:00Z"),
    "minute": (16, ":00Z"),
    "second": (19, "Z"),
}


def cut(kept: str, unit: str) -> str:
    """A kept timestamp or date as it is at the beginning of its year, month, …"""
    length, rest = _KEPT_OF[unit]
    return kept[:length] + (rest if "T" in kept else rest.partition("T")[0])


def _cut(rule: Rule, unit: str) -> Rule:
    plain = rule.keep

    def keep(value: object) -> str | None:
        kept = plain(value)
        return None if kept is None else cut(str(kept), unit)

    return replace(rule, keep=keep)


def _base32(digest: bytes) -> str:
    """The first 26 letters of base32: 130 bits, ten at a time, as `base64.b32encode` is slow."""
    bits = int.from_bytes(digest, "big") >> (8 * len(digest) - 130)
    return "".join([_PAIRS[bits >> place & 1023] for place in range(120, -10, -10)])


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_PAIRS = [first + second for first in _LETTERS for second in _LETTERS]


def as_text(kept: object) -> str:
    """A kept value inside a type, a subject or a pseudonym."""
    if isinstance(kept, str):
        return kept
    return str(kept).lower() if isinstance(kept, bool) else str(kept)
