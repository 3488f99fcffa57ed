"""The vocabulary of configuration values: what a connector's settings, and all of sluicegate.yaml, are made of.

    class Http(Settings):
        url: Url
        '''Where to post.'''
        secret: SigningSecret
        '''Signs what is sent.'''
        allow: tuple[Network, ...] = ()
        '''The addresses that it may connect to.'''

A check of one's own raises ValueError with the rest of a sentence that begins with the key, and says the mend:
`raise ValueError('is no channel; write the id that begins with "C"')`.
"""

import builtins
import hashlib
import hmac
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated, Any, ClassVar, Final, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue, SkipJsonSchema
from pydantic_core import CoreSchema, core_schema

from connectors.standard_webhooks import decode_secret


class Settings(BaseModel):
    """Frozen values with known keys.  The docstring below a key is its description in the JSON Schema.

    Types are meant strictly (`"4"` is no number), lists become tuples, and a value that came as `env:NAME` or
    `file:PATH` is put in its place, so that no field but a Secret notices where it came from.  Where the environment
    does not have it, an optional key counts as not given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)
    _keys: ClassVar[Mapping[str, FieldInfo]] = {}
    _looked_after: ClassVar[frozenset[str]] = frozenset()  # keys whose own parts take references

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        cls._keys = {field.alias or name: field for name, field in cls.model_fields.items()}
        cls._looked_after = frozenset(
            key for key, field in cls._keys.items() if any(map(_is_own, _types_in(field.annotation)))
        )

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, given: object) -> object:
        return dict(cls._resolved(given)) if isinstance(given, Mapping) else given

    @classmethod
    def _resolved(cls, given: Mapping[Any, object]) -> Iterator[tuple[Any, object]]:
        for key, value in given.items():
            match cls._keys.get(key):
                case None:
                    yield key, UnknownKey(known=cls.key_names())
                case _ if key in cls._looked_after:
                    yield key, _with_tuples(value)
                case field if isinstance(value, Reference) and value.absent and not field.is_required():
                    pass
                case field:
                    yield key, _with_tuples(_fetched(value, as_text=_is_text(field.annotation)))

    @classmethod
    def key_names(cls) -> tuple[str, ...]:
        """What may be written in the file."""
        hidden = (SkipJsonSchema,)
        return tuple(k for k, field in cls._keys.items() if not any(isinstance(m, hidden) for m in field.metadata))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Reference:
    """A value that stands elsewhere: what `env:NAME`, `file:PATH` or `vault:PATH#FIELD` led to."""

    origin: str  # as it is written in the file
    text: str | None  # None: `problem` says why
    problem: str = ""
    absent: bool = False  # the environment has no such variable, or an empty one

    def __repr__(self) -> str:
        return self.origin


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownKey:
    """Stands in place of the value of a key that its Settings do not have, for the error that says so."""

    known: tuple[str, ...]


class Secret:
    """Text that is never shown: not by repr, not in an error, a dump, a schema or a pickle."""

    __slots__ = ("_text", "origin")

    def __init__(self, text: str, *, origin: str = "") -> None:
        self._text: Final = text
        self.origin: Final = origin  # env:NAME, file:PATH or vault:PATH#FIELD, which may be shown

    def reveal(self) -> str:
        return self._text

    @property
    def bytes(self) -> builtins.bytes:
        return self._text.encode()

    def matches(self, other: builtins.bytes) -> bool:
        """Compares digests in constant time, so that not even the length is told."""
        return hmac.compare_digest(hashlib.sha256(self.bytes).digest(), hashlib.sha256(other).digest())

    def signing_key(self) -> builtins.bytes:
        """The key behind `whsec_`, as Standard Webhooks writes it; a ValueError if this is none."""
        return decode_secret(self._text)

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self.matches(other.bytes)

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("a secret is not pickled")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._take, serialization=core_schema.plain_serializer_function_ser_schema(repr)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "pattern": "^(env:[A-Za-z_][A-Za-z0-9_]*|file:.+|vault:.+#.+)$"}

    @classmethod
    def _take(cls, given: object) -> Self:
        match given:
            case cls():
                return given
            case Reference(text=None):
                raise ValueError(given.problem)
            case Reference(text=str(text)):
                return cls(text, origin=given.origin)
            case _:
                raise ValueError("is a secret and must not be written out here; write env:NAME or file:PATH")


class Pem(Secret):
    """Certificates: no secret, but looked after as one is, so that a file that changes is taken anew."""

    __slots__ = ()

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string"}

    @classmethod
    def _take(cls, given: object) -> Self:
        return cls(given) if isinstance(given, str) else super()._take(given)


def of_at_least(length: int) -> Callable[[Secret], Secret]:
    """For `Annotated[Secret, AfterValidator(of_at_least(16))]`: a shorter one can be guessed."""

    def check(secret: Secret) -> Secret:
        if len(secret.bytes) < length:
            raise ValueError(
                f"has {len(secret.bytes)} bytes in {secret.origin}, which can be guessed; use at least {length} random ones"
            )
        return secret

    return check


def _can_sign(secret: Secret) -> Secret:
    try:
        secret.signing_key()
    except ValueError as error:
        raise ValueError(f"{error} (in {secret.origin})") from None
    return secret


SigningSecret = Annotated[Secret, AfterValidator(_can_sign)]
"""A secret as Standard Webhooks writes it: `whsec_` and the base64 of 24 to 64 bytes."""


_DURATION: Final = re.compile(r"([0-9]{1,9})(ms|s|m|h|d|y)")
_UNITS: Final = {
    "ms": timedelta(milliseconds=1),
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "y": timedelta(days=366),  # so that six years of retention are never shorter than the calendar's
}
_LONGEST: Final = timedelta(days=366 * 100)


def duration(given: object) -> timedelta:
    """Reads `10s`, `5m`, `72h`, `30d`, `6y`."""
    if isinstance(given, timedelta):
        return given
    if not (isinstance(given, str) and (match := _DURATION.fullmatch(given))):
        raise ValueError(f"is {shown(given)}, which is no duration; write one as 500ms, 10s, 5m, 72h, 30d or 6y")
    count, unit = int(match[1]), _UNITS[match[2]]
    if count == 0:
        raise ValueError(f"is {shown(given)}, but must be longer than nothing")
    if count > _LONGEST / unit:
        raise ValueError(f"is {shown(given)}, but the longest duration is 100y")
    return count * unit


Duration = Annotated[
    timedelta,
    BeforeValidator(duration),
    WithJsonSchema({"type": "string", "pattern": "^(env:.+|file:.+|[0-9]*[1-9][0-9]*(ms|s|m|h|d|y))$"}),
]


_RATE: Final = re.compile(r"([0-9]{1,9})/([smhd])")


@dataclass(frozen=True, slots=True)
class Rate:
    """So many in such a time: `20/s`, `600/m`."""

    count: int
    per: timedelta

    @classmethod
    def read(cls, given: object) -> Self:
        if isinstance(given, cls):
            return given
        if not (isinstance(given, str) and (match := _RATE.fullmatch(given))):
            raise ValueError(f"is {shown(given)}, which is no rate; write one as 20/s, 600/m, 1000/h or 5000/d")
        if int(match[1]) == 0:
            raise ValueError(f"is {shown(given)}, but must let something through")
        return cls(int(match[1]), _UNITS[match[2]])

    @property
    def per_second(self) -> float:
        return self.count / self.per.total_seconds()

    def __str__(self) -> str:
        return f"{self.count}/{next(unit for unit, length in _UNITS.items() if length == self.per)}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.read, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "pattern": "^(env:.+|file:.+|[0-9]*[1-9][0-9]*/[smhd])$"}


_SIZE: Final = re.compile(r"([0-9]{1,9})(B|KiB|MiB|GiB)")
_BYTES: Final = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def size(given: object) -> int:
    """Reads `64KiB`, `1MiB`."""
    if not (isinstance(given, str) and (match := _SIZE.fullmatch(given))):
        raise ValueError(f"is {shown(given)}, which is no size; write one as 512B, 64KiB or 1MiB")
    if int(match[1]) == 0:
        raise ValueError(f"is {shown(given)}, but must be more than nothing")
    return int(match[1]) * _BYTES[match[2]]


Size = Annotated[
    int,
    BeforeValidator(size),
    WithJsonSchema({"type": "string", "pattern": "^(env:.+|file:.+|[0-9]*[1-9][0-9]*(B|KiB|MiB|GiB))$"}),
]


def network(given: object) -> IPv4Network | IPv6Network:
    """Reads `10.20.0.0/16` or one address."""
    if isinstance(given, IPv4Network | IPv6Network):
        return given
    try:
        if not isinstance(given, str):
            raise ValueError  # noqa: TRY004, TRY301 — told below, as all that is no network
        loose = ip_network(given, strict=False)
    except ValueError:
        raise ValueError(
            f"is {shown(given)}, which is no network; write 10.20.0.0/16, fd00::/8 or one address"
        ) from None
    if "/" in given and given.partition("/")[0] != str(loose.network_address) and loose != _exact(given):
        raise ValueError(f"is {shown(given)}, which is an address inside a network; did you mean {loose}?")
    return loose


def _exact(text: str) -> IPv4Network | IPv6Network | None:
    try:
        return ip_network(text)
    except ValueError:
        return None


Network = Annotated[
    IPv4Network | IPv6Network, BeforeValidator(network), WithJsonSchema({"type": "string", "minLength": 2})
]


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        raise ValueError("is no URL; write it as https://host/path") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError("holds a login, which must not be written into a URL; use the keys made for secrets")
    if parts.scheme not in {"http", "https"} or not parts.hostname or not text.isascii() or re.search(r"[\s\\]", text):
        raise ValueError(f"is {shown(text)}, which is no URL; write it as https://host/path")
    if parts.fragment:
        raise ValueError(f'is {shown(text)}, but a URL to call has no "#"; leave out what follows it')
    return text


Url = Annotated[str, AfterValidator(_url), WithJsonSchema({"type": "string", "pattern": "^(https?://|env:|file:)"})]
"""An http or https URL without a login in it."""

_INSTANT: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?([Zz]|[-+][0-9]{2}:[0-9]{2})"
)


def instant(given: object) -> datetime:
    """Reads RFC 3339, `2026-12-01T00:00:00Z`, into UTC."""
    if isinstance(given, datetime) and given.tzinfo is not None:
        return given.astimezone(UTC)
    try:
        if not (isinstance(given, str) and _INSTANT.fullmatch(given)):
            raise ValueError  # noqa: TRY301 — told below, as all that is no time
        return datetime.fromisoformat(given.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"is {shown(given)}, which is no time; write it as 2026-12-01T00:00:00Z") from None


Instant = Annotated[
    datetime, BeforeValidator(instant), WithJsonSchema({"type": "string", "pattern": "^(env:|file:|[0-9]{4}-)"})
]

NAME: Final = r"[a-z0-9][a-z0-9-]{0,62}"
"""What a source, policy, route, system, facility or destination may be called."""

_PLACEHOLDER: Final = re.compile(r"\{([a-z_][a-z0-9_.]*)\}")


def placeholders(template: str) -> tuple[str, ...]:
    """The names between braces, in order; a ValueError where a brace is no part of a `{name}`."""
    if re.search(r"[{}]", _PLACEHOLDER.sub("", template)):
        raise ValueError(f"is {shown(template)}, where a brace is no part of a {{name}}; correct it")
    return tuple(_PLACEHOLDER.findall(template))


def written(value: timedelta) -> str:
    """A duration as the file would say it."""
    unit = max(
        (unit for unit, length in _UNITS.items() if not value % length), key=lambda unit: _UNITS[unit], default="ms"
    )
    return f"{value // _UNITS[unit]}{unit}"


def written_size(value: int) -> str:
    """A size as the file would say it."""
    unit = max((unit for unit, length in _BYTES.items() if not value % length), key=lambda unit: _BYTES[unit])
    return f"{value // _BYTES[unit]}{unit}"


def shown(value: object) -> str:
    """A value as a message may repeat it: shortened, and by its origin if it came from elsewhere."""
    if isinstance(value, _Fetched):
        return f"what {value.origin} holds"
    match value:
        case str() if len(value) > 40:
            return json.dumps(value[:37] + "…", ensure_ascii=False)
        case str() | bool() | int() | float():
            return json.dumps(value, ensure_ascii=False)
        case None:
            return "empty"
        case Mapping():
            return "a mapping"
        case Sequence():
            return "a list"
        case _:
            return str(value)


def did_you_mean(wrong: str, known: Sequence[str], *, among: bool = True) -> str:
    """`; did you mean "approvers"?`, or else what there is, if it is told `among` what."""
    if close := get_close_matches(wrong, known, n=1, cutoff=0.6):
        return f'; did you mean "{close[0]}"?'
    if among and 0 < len(known) <= 16:
        return f"; there is {', '.join(known)}"
    return ""


class _Fetched(str):
    """The text of a reference, which remembers where it came from and is not repeated in messages."""

    __slots__ = ("origin",)
    origin: str

    @classmethod
    def of(cls, text: str, origin: str) -> Self:
        fetched = cls(text)
        fetched.origin = origin
        return fetched


def _fetched(value: object, *, as_text: bool) -> object:
    """References anywhere in `value`, replaced by what they led to; those that led nowhere stay, and are refused."""
    match value:
        case Reference(text=str(text)):
            return _Fetched.of(text, value.origin) if as_text else _scalar(text, value.origin)
        case Mapping():
            return {key: _fetched(item, as_text=as_text) for key, item in value.items()}
        case list() | tuple():
            return tuple(_fetched(item, as_text=as_text) for item in value)
        case _:
            return value


def _scalar(text: str, origin: str) -> object:
    if re.fullmatch(r"[-+]?[0-9]{1,18}", text):
        return int(text)
    if re.fullmatch(r"[-+]?[0-9]{0,18}\.[0-9]{1,18}", text):
        return float(text)
    return {"true": True, "false": False}.get(text, _Fetched.of(text, origin))


def _with_tuples(value: object) -> object:
    match value:
        case list() | tuple():
            return tuple(_with_tuples(item) for item in value)
        case dict():
            return {key: _with_tuples(item) for key, item in value.items()}
        case _:
            return value


def _types_in(annotation: object) -> Iterator[object]:
    yield annotation
    for argument in get_args(annotation):
        yield from _types_in(argument)


def _is_own(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Secret | Settings)


def _is_text(annotation: object) -> bool:
    return not any(kind in {int, float, bool} for kind in _types_in(annotation) if isinstance(kind, type))
