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
from msgspec.structs import astuple

from gateway.config_sections import ConstField, Policy
from gateway.duplicate_keys import DuplicateKeys, Level, members_of
from gateway.fields import Rule, Scalar, Unfit, as_text, instant, one_of, rule_of

LARGEST = 8192  # bytes of kept data as JSON; the database holds the same limit


class Minimized(msgspec.Struct, frozen=True):
    """What a policy kept of a payload.  (A Struct, because one is made for every post.)"""

    policy: str
    version: int
    type: str
    subject: str | None
    facility: str | None
    time: datetime | None
    data: dict[str, object]
    document: str  # `data` as JSON, as it is stored
    dedup: tuple[str, ...]  # the fields that two posts of one event have in common; () if the policy does not say
    dropped: tuple[str, ...]  # top-level names that are not declared; "?" for one that is no name, or one too many

    @property
    def same(self) -> str | None:
        """What two posts of one event have in common, made when it is asked for: a sender may sign an id instead."""
        if not self.dedup:
            return None
        return _encode([self.policy, *map(self.data.get, self.dedup)]).decode()


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

    def __init__(self, accepts: Sequence[Policy], *, key: bytes, texts: bool = False) -> None:
        """With `texts` all values of a body are texts, as those of a form."""
        telling = {_path(name) for policy in accepts for name in policy.match}
        self._policies = tuple(_Compiled(policy, telling=telling, key=key, texts=texts) for policy in accepts)
        self._choice = _Choice(accepts, texts=texts) if len(accepts) > 1 else None

    def minimize(self, body: bytes) -> Minimized | Unreadable | Unmet:
        if body[:1] != b"{":
            body = body.removeprefix(BYTE_ORDER_MARK).lstrip(b" \t\r\n")
            if body[:1] != b"{":
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

    def __init__(self, policy: Policy, *, telling: set["_Path"], key: bytes, texts: bool) -> None:
        fields = {name: field for name, field in policy.keep.items() if not isinstance(field, ConstField)}
        rules = {name: (_path(field.from_), rule_of(field, key=key, texts=texts)) for name, field in fields.items()}
        sites = (
            {as_text(raw) if texts else raw: as_text(site) for raw, site in policy.facility.of.items()}
            if policy.facility
            else {}
        )
        place = (_path(policy.facility.from_), one_of(sites)) if policy.facility else None
        uses = [*rules.values(), *([place] if place else [])]
        types = _types([*uses, *((_path(name), _TELLING) for name in policy.match)])

        self._name, self._version = policy.name, policy.version
        self._read = reader(types)
        self._match = [
            _Match([*types].index(_path(name)), as_text(wanted) if texts else wanted)
            for name, wanted in policy.match.items()
        ]
        self._fields = [
            (
                name,
                _Constant(field.const)
                if isinstance(field, ConstField)
                else _Taken(*rules[name], types=types, optional=field.optional),
            )
            for name, field in policy.keep.items()
        ]
        self._facility = _Taken(*place, types=types, optional=False) if place else None
        self._type = _Template(policy.type)
        self._subject = _Template(policy.subject) if policy.subject else None
        self._time = policy.time.strip("{}") if policy.time else None
        self._dedup = policy.dedup or ()
        declared = {path for path, _ in uses} | {_path(name) for name in policy.match}
        self._dropped = _Dropped({path[0] for path in declared})
        self._duplicates = DuplicateKeys(Level.of(declared | telling))
        self._musts = {".".join(path): rule.must for path, rule in uses}

    def minimize(self, body: bytes) -> Minimized:
        try:
            given = self._read(body)
        except msgspec.ValidationError as error:
            _ANY_OBJECT.decode(body)  # it may not even be JSON further on
            raise _Refused(Unmet(self._what_is_wrong(str(error)))) from None
        for match in self._match:
            if not match.holds(given):
                raise _Refused(_NO_POLICY)
        members = members_of(body)
        if twice := self._duplicates.find(body, members):
            raise _Refused(Unreadable(f"{twice} stands twice in the body"))
        kept: dict[str, Any] = {}
        for name, taken in self._fields:
            if (value := taken.of(given)) is not None:
                kept[name] = value
        document = _encode(kept)
        if len(document) > LARGEST:
            raise _Refused(Unmet(f"what the policy keeps is larger than {LARGEST} bytes"))
        return Minimized(
            self._name,
            self._version,
            self._type.fill(kept),
            self._subject.fill(kept) if self._subject else None,
            self._facility.of(given) if self._facility else None,
            instant(kept[self._time]) if self._time in kept else None,
            kept,
            document.decode(),
            self._dedup,
            self._dropped.of(tuple(members)),
        )

    def _what_is_wrong(self, complaint: str) -> str:
        """The declared path in a complaint of msgspec, and our own words about it."""
        path = complaint.rpartition(" - at `$.")[2].rstrip("`").partition("[")[0]
        if path in self._musts:
            return f"{path} must {self._musts[path]}"
        if any(declared.startswith(f"{path}.") for declared in self._musts):
            return f"{path} must be an object"
        return "a declared value is of another type"


class _Match:
    """Whether a raw value of the body is the JSON of the one that a policy wants.  true is not 1, and 1.0 is not 1."""

    def __init__(self, place: int, wanted: Scalar | None) -> None:
        self._place, self._wanted = place, wanted
        self._encoded = msgspec.Raw(_encode(wanted))

    def holds(self, given: "_Given") -> bool:
        raw = given[self._place]
        return raw == self._encoded or (raw is not None and self._is_escaped(bytes(raw)))

    def _is_escaped(self, raw: bytes) -> bool:
        if isinstance(self._wanted, str) and raw.startswith(b'"') and b"\\" in raw:
            return bool(msgspec.json.decode(raw, type=str) == self._wanted)
        return False


class _Taken:
    """A value of the body, kept as its rule says."""

    def __init__(self, path: "_Path", rule: Rule, *, types: Mapping["_Path", Any], optional: bool) -> None:
        self._path, self._rule, self._optional = ".".join(path), rule, optional
        self._place = [*types].index(path)
        self._false = rule.false
        self._keep = rule.keep if types[path] == rule.takes else _from_raw(rule)

    def of(self, given: "_Given") -> Any:
        value = given[self._place]
        kept = None
        if value is not None and (value is not False or self._false):
            try:
                kept = self._keep(value)
            except Unfit:
                raise _Refused(Unmet(f"{self._path} must {self._rule.must}")) from None
        if kept is None and not self._optional:
            raise _Refused(Unmet(f"{self._path} is missing"))
        return kept


class _Constant:
    """A word of the policy's own, whatever the body is."""

    def __init__(self, word: Scalar) -> None:
        self._word = word

    def of(self, given: "_Given") -> Scalar:  # noqa: ARG002  # as _Taken
        return self._word


class _Template:
    """A type or a subject: text with kept fields in it, none of which is optional."""

    def __init__(self, text: str) -> None:
        pieces = _PLACEHOLDER.split(text)
        self._start, self._rest = pieces[0], list(zip(pieces[1::2], pieces[2::2], strict=True))

    def fill(self, kept: Mapping[str, object]) -> str:
        filled = self._start
        for name, following in self._rest:
            value = kept[name]
            filled += (value if type(value) is str else as_text(value)) + following
        return filled


class _Choice:
    """Tells by a few raw values which policy is meant."""

    def __init__(self, policies: Sequence[Policy], *, texts: bool) -> None:
        paths = sorted({_path(name) for policy in policies for name in policy.match})
        nested = any(path[:length] in paths for path in paths for length in range(1, len(path)))
        self._all = None if nested else reader(dict.fromkeys(paths, msgspec.Raw))
        self._each = [reader({path: msgspec.Raw}) for path in paths]
        self._wanted = [
            [
                _Match(paths.index(_path(name)), as_text(wanted) if texts else wanted)
                for name, wanted in policy.match.items()
            ]
            for policy in policies
        ]

    def among(self, body: bytes) -> int:
        """The place of the first policy that matches."""
        given = self._given(body)
        for place, wanted in enumerate(self._wanted):
            if all(match.holds(given) for match in wanted):
                return place
        raise _Refused(_NO_POLICY)

    def _given(self, body: bytes) -> "_Given":
        if self._all is not None:
            try:
                return self._all(body)
            except msgspec.ValidationError:
                _ANY_OBJECT.decode(body)
        # one policy looks into what is no object in this body; another may match all the same
        return [_lone(read, body) for read in self._each]


def _lone(read: "_Reader", body: bytes) -> msgspec.Raw | None:
    try:
        return read(body)[0]  # type: ignore[no-any-return]
    except msgspec.ValidationError:
        return None


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


_Given = Sequence[Any]  # a value for each path that is read; None for what a body does not have
_Reader = Callable[[bytes], _Given]


def reader(types: Mapping[_Path, Any]) -> _Reader:
    """Reads the values at these paths, in their order."""
    decode = msgspec.json.Decoder(_struct(types)).decode
    if all(len(path) == 1 for path in types):
        return lambda body: astuple(decode(body))
    getters = [_getter(path) for path in types]

    def read(body: bytes) -> _Given:
        given = decode(body)
        return [get(given) for get in getters]

    return read


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

    def of(self, names: tuple[str, ...]) -> tuple[str, ...]:
        if (told := self._told.get(names)) is not None:
            return told
        undeclared = [name for name in names if name not in self._declared]
        named = [name for name in undeclared if len(name) <= 64 and _NAME.fullmatch(name)][:_MOST_NAMES]
        if len(named) == len(undeclared) and len(self._told) < _MOST_TOLD:
            self._told[names] = tuple(named)
        return (*named, *("?",) * min(len(undeclared) - len(named), _MOST_NAMES))


BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_MOST_NAMES = 50
_MOST_TOLD = 256
_NO_POLICY = Unmet("no policy of this source matches")
_TELLING = Rule(takes=msgspec.Raw, keep=bytes, must="be what the policy matches")
_ANY_OBJECT = msgspec.json.Decoder(msgspec.defstruct("AnyObject", []))
_encode = msgspec.json.Encoder().encode
