"""Policy × payload → metadata: what of a post is kept.  Pure.

A policy is compiled once into a type that has the declared names and nothing else, and msgspec decodes bodies as that
type: what a policy does not name is skipped as bytes and never becomes a value here.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from typing import Any

import msgspec

from gateway.config_sections import Policy
from gateway.duplicate_keys import DuplicateKeys, Level
from gateway.fields import Rule, Scalar, Unfit, as_text, instant, one_of, rule_of

LARGEST = 8192  # bytes of kept data as JSON; the database holds the same limit


class Minimized(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy kept of a payload.  (A Struct, because one is made for every post.)"""

    policy: str
    version: int
    type: str
    subject: str | None
    facility: str | None
    time: datetime | None
    data: dict[str, object]
    document: str  # `data` as JSON, as it is stored
    same: str | None  # what two posts of one event have in common; None if the policy does not say
    dropped: tuple[str, ...]  # top-level names that are not declared; "?" for one that is no name, or one too many


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The body is no JSON object, or one that can be read in two ways."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unmet:
    """The payload does not meet the policy.  `reason` is a key path and a rule, never a value."""

    reason: str


class Policies:
    """The policies that one source accepts; the first that matches is applied."""

    def __init__(self, accepts: Sequence[Policy], *, key: bytes) -> None:
        telling = {_path(name) for policy in accepts for name in policy.match}
        self._policies = tuple(_Compiled(policy, telling=telling, key=key) for policy in accepts)
        self._choice = _Choice(accepts) if len(accepts) > 1 else None

    def minimize(self, body: bytes) -> Minimized | Unreadable | Unmet:
        body = body.removeprefix(_BYTE_ORDER_MARK)
        if not (body.startswith(b"{") or body.lstrip(b" \t\r\n").startswith(b"{")):
            return Unreadable("the body is not a JSON object")
        try:
            if not body.isascii():
                body.decode()  # msgspec does not look into the strings that it skips
            chosen = self._choice.among(body) if self._choice else 0
            return self._policies[chosen].minimize(body)
        except _Refused as refused:
            return refused.judgement
        except (msgspec.DecodeError, UnicodeDecodeError):
            return Unreadable("the body is not JSON")
        except RecursionError:
            return Unreadable("the body is nested too deeply")


class _Refused(Exception):  # noqa: N818 — an ending, which `Policies.minimize` turns into a value
    def __init__(self, judgement: Unreadable | Unmet) -> None:
        self.judgement = judgement


class _Compiled:
    """One policy, ready to be applied."""

    def __init__(self, policy: Policy, *, telling: set["_Path"], key: bytes) -> None:
        rules = {name: (_path(field.from_), rule_of(field, key=key)) for name, field in policy.keep.items()}
        place = (_path(policy.facility.from_), one_of(policy.facility.of)) if policy.facility else None
        uses = [*rules.values(), *([place] if place else [])]
        types = _types([*uses, *((_path(name), _TELLING) for name in policy.match)])

        self._name, self._version = policy.name, policy.version
        self._match = [(_getter(_path(name)), wanted, _encode(wanted)) for name, wanted in policy.match.items()]
        self._decode = _decoder(types).decode
        self._fields = [
            (name, _Taken(path, rule, decoded=types[path], optional=policy.keep[name].optional).of)
            for name, (path, rule) in rules.items()
        ]
        self._facility = _Taken(*place, decoded=types[place[0]], optional=False) if place else None
        self._type = _Template(policy.type)
        self._subject = _Template(policy.subject) if policy.subject else None
        self._time = policy.time.strip("{}") if policy.time else None
        self._dedup = policy.dedup
        declared = {path for path, _ in uses} | {_path(name) for name in policy.match}
        self._dropped = _Dropped({path[0] for path in declared})
        self._duplicates = DuplicateKeys(Level.of(declared | telling))
        self._musts = {".".join(path): rule.must for path, rule in uses}

    def minimize(self, body: bytes) -> Minimized:
        try:
            given = self._decode(body)
        except msgspec.ValidationError as error:
            _ANY_OBJECT.decode(body)  # it may not even be JSON further on
            raise _Refused(Unmet(self._what_is_wrong(str(error)))) from None
        for get, wanted, encoded in self._match:
            if not _is(bytes(get(given) or b""), wanted, encoded):
                raise _Refused(_NO_POLICY)
        if twice := self._duplicates.find(body):
            raise _Refused(Unreadable(f"{twice} stands twice in the body"))
        kept = {name: value for name, taken in self._fields if (value := taken(given)) is not None}
        document = _encode(kept)
        if len(document) > LARGEST:
            raise _Refused(Unmet(f"what the policy keeps is larger than {LARGEST} bytes"))
        return Minimized(
            policy=self._name,
            version=self._version,
            type=self._type.fill(kept),
            subject=self._subject.fill(kept) if self._subject else None,
            facility=as_text(self._facility.of(given)) if self._facility else None,
            time=instant(str(kept[self._time])) if self._time in kept else None,
            data=kept,
            document=document.decode(),
            same=_encode([self._name, *map(kept.get, self._dedup)]).decode() if self._dedup else None,
            dropped=self._dropped.of(body),
        )

    def _what_is_wrong(self, complaint: str) -> str:
        """The declared path in a complaint of msgspec, and our own words about it."""
        path = complaint.rpartition(" - at `$.")[2].rstrip("`").partition("[")[0]
        if path in self._musts:
            return f"{path} must {self._musts[path]}"
        if any(declared.startswith(f"{path}.") for declared in self._musts):
            return f"{path} must be an object"
        return "a declared value is of another type"


class _Taken:
    """A value of the body, kept as its rule says."""

    def __init__(self, path: "_Path", rule: Rule, *, decoded: Any, optional: bool) -> None:
        self._path, self._rule, self._optional = ".".join(path), rule, optional
        self._get = _getter(path)
        self._false = rule.false
        self._keep = rule.keep if decoded == rule.takes else _from_raw(rule)

    def of(self, given: Any) -> object | None:
        value = self._get(given)
        kept = None
        if value is not None and (value is not False or self._false):
            try:
                kept = self._keep(value)
            except Unfit:
                raise _Refused(Unmet(f"{self._path} must {self._rule.must}")) from None
        if kept is None and not self._optional:
            raise _Refused(Unmet(f"{self._path} is missing"))
        return kept


class _Template:
    """A type or a subject: text with kept fields in it, none of which is optional."""

    def __init__(self, text: str) -> None:
        pieces = _PLACEHOLDER.split(text)
        self._start, self._rest = pieces[0], list(zip(pieces[1::2], pieces[2::2], strict=True))

    def fill(self, kept: Mapping[str, object]) -> str:
        filled = self._start
        for name, following in self._rest:
            filled += as_text(kept[name]) + following
        return filled


class _Choice:
    """Tells by a few raw values which policy is meant."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        paths = sorted({_path(name) for policy in policies for name in policy.match})
        nested = any(path[:length] in paths for path in paths for length in range(1, len(path)))
        self._all = None if nested else _decoder(dict.fromkeys(paths, msgspec.Raw))
        self._each = [(_decoder({path: msgspec.Raw}), _getter(path)) for path in paths]
        self._wanted = [
            [(paths.index(_path(name)), wanted, _encode(wanted)) for name, wanted in policy.match.items()]
            for policy in policies
        ]

    def among(self, body: bytes) -> int:
        """The place of the first policy that matches."""
        raw = self._raw(body)
        for place, wanted in enumerate(self._wanted):
            for path, value, encoded in wanted:
                if not _is(raw[path], value, encoded):
                    break
            else:
                return place
        raise _Refused(_NO_POLICY)

    def _raw(self, body: bytes) -> list[bytes]:
        if self._all is not None:
            try:
                given = self._all.decode(body)
                return [bytes(get(given) or b"") for _, get in self._each]
            except msgspec.ValidationError:
                _ANY_OBJECT.decode(body)
        # one policy looks into what is no object in this body; another may match all the same
        return [_raw_of(decoder, get, body) for decoder, get in self._each]


def _raw_of(decoder: msgspec.json.Decoder[Any], get: Callable[[Any], Any], body: bytes) -> bytes:
    try:
        return bytes(get(decoder.decode(body)) or b"")
    except msgspec.ValidationError:
        return b""


def _is(raw: bytes, wanted: Scalar | None, encoded: bytes) -> bool:
    """Whether `raw` is the JSON of `wanted`, or nothing.  true is not 1, and 1.0 is not 1."""
    if raw == encoded:
        return True
    if isinstance(wanted, str) and raw.startswith(b'"') and b"\\" in raw:
        return bool(msgspec.json.decode(raw, type=str) == wanted)
    return False


_Path = tuple[str, ...]


def _path(dotted: str) -> _Path:
    return tuple(dotted.split("."))


def _types(uses: Iterable[tuple[_Path, Rule]]) -> dict[_Path, Any]:
    """What to decode each path as; raw, where one value is kept in two ways."""
    types: dict[_Path, Any] = {}
    for path, rule in uses:
        types[path] = rule.takes if types.get(path, rule.takes) == rule.takes else msgspec.Raw
    return types


def _from_raw(rule: Rule) -> Callable[[msgspec.Raw], object]:
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(rule.takes)

    def keep(raw: msgspec.Raw) -> object:
        try:
            value = decoder.decode(raw)
        except msgspec.ValidationError:
            raise Unfit from None
        return None if value is None or (value is False and not rule.false) else rule.keep(value)

    return keep


def _decoder(types: Mapping[_Path, Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(_struct(types))


def _struct(types: Mapping[_Path, Any]) -> type[msgspec.Struct]:
    """A type with these paths and nothing else; what a body does not have is None in it."""
    below: dict[str, dict[_Path, Any]] = {}
    for path, kind in types.items():
        below.setdefault(path[0], {})[path[1:]] = kind
    return msgspec.defstruct(
        "Declared",
        [
            (_attribute(name), kinds[()] if () in kinds else _struct(kinds) | bool | None, None)
            for name, kinds in below.items()
        ],
        rename={_attribute(name): name for name in below},
        frozen=True,
        gc=False,
    )


def _getter(path: _Path) -> Callable[[Any], Any]:
    attributes = [_attribute(name) for name in path]
    if len(attributes) == 1:
        return attrgetter(attributes[0])

    def get(value: Any) -> Any:
        for attribute in attributes:
            value = getattr(value, attribute, None)
        return value

    return get


def _attribute(name: str) -> str:
    """Any name of JSON as one of Python."""
    return "n" + name.encode().hex()


class _Dropped:
    """Tells which top-level names of a body are not declared.

    A sender posts the same names again and again, so what was told of them is remembered, as long as they are names:
    what may be text in the place of a name is not.
    """

    def __init__(self, declared: set[str]) -> None:
        self._declared = declared
        self._told: dict[tuple[str, ...], tuple[str, ...]] = {}

    def of(self, body: bytes) -> tuple[str, ...]:
        names = tuple(_NAMES.decode(body))
        if (told := self._told.get(names)) is not None:
            return told
        undeclared = [name for name in names if name not in self._declared]
        named = [name for name in undeclared if len(name) <= 64 and _NAME.fullmatch(name)][:_MOST_NAMES]
        if len(named) == len(undeclared) and len(self._told) < _MOST_TOLD:
            self._told[names] = tuple(named)
        return (*named, *("?",) * min(len(undeclared) - len(named), _MOST_NAMES))


_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_MOST_NAMES = 50
_MOST_TOLD = 256
_NO_POLICY = Unmet("no policy of this source matches")
_TELLING = Rule(takes=msgspec.Raw, keep=bytes, must="be what the policy matches")
_NAMES = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ANY_OBJECT = msgspec.json.Decoder(msgspec.defstruct("AnyObject", []))
_encode = msgspec.json.Encoder().encode
