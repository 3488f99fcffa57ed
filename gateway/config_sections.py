"""The sections of sluicegate.yaml, in its order: what each may say.

The docstring below a key is its description in the JSON Schema.  What the keys of one entry say about each other stands
in its `contradictions`, what entries say about each other in config_references.py.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from decimal import Decimal
from ipaddress import ip_address
from itertools import pairwise
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, available_timezones

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue, SkipJsonSchema
from pydantic_core import CoreSchema, core_schema

from connectors.settings import (
    Duration,
    Instant,
    Network,
    Pem,
    Rate,
    Reference,
    Secret,
    Settings,
    Size,
    Url,
    did_you_mean,
    of_at_least,
    placeholders,
    shown,
    written,
)
from connectors.standard_webhooks import PUBLIC_PREFIX, decode_key
from connectors.tls import certificates
from gateway.config_patterns import MOST_WAYS, characters_of, ways_of, why_unsafe


class Contradiction(NamedTuple):
    """Two keys that cannot both be meant, or a name of something that is not there."""

    key: tuple[str | int, ...]  # below the entry that says it
    problem: str  # the rest of a sentence that begins with the key, and the mend
    also: tuple[tuple[str | int, ...], ...] = ()  # the other keys that it is judged by


T = TypeVar("T")
Table = Annotated[Mapping[str, T], AfterValidator(MappingProxyType)]
"""Entries by name; frozen, as all of the configuration."""


def _at_most(longest: timedelta) -> Callable[[timedelta], timedelta]:
    def check(given: timedelta) -> timedelta:
        if given > longest:
            raise ValueError(f"is {written(given)}, but must be at most {written(longest)}")
        return given

    return check


def _nothing() -> Mapping[Any, Any]:
    return MappingProxyType({})


class Entry(Settings):
    """A part of the file whose keys say something about each other."""

    def contradictions(self) -> Iterator[Contradiction]:
        """All that is wrong between its keys; each key for itself is right."""
        yield from ()


class Named(Entry):
    name: SkipJsonSchema[str] = ""  # its key in the section above it; no key of its own


# ── serve, database ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Listen:
    """An address to listen on: a host and a port, or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def read(cls, given: object) -> Self:
        """Reads `127.0.0.1:8470`, `[::1]:8470`, `:8470` (every address) or `unix:/run/sluicegate.sock`."""
        if isinstance(given, cls):
            return given
        wanted = "write 127.0.0.1:8470, [::1]:8470 or unix:/run/sluicegate.sock"
        if not isinstance(given, str):
            raise ValueError(f"is {shown(given)}, which is no address; {wanted}")  # noqa: TRY004
        if given.startswith("unix:"):
            path = given.removeprefix("unix:")
            if not path.startswith("/") or len(path.encode()) > 100:
                raise ValueError(f"is {shown(given)}, which is no path from the root of up to 100 bytes; {wanted}")
            return cls(path=path)
        match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*):([0-9]{1,5})", given)
        if not match or int(match[2]) > 65535:
            raise ValueError(f"is {shown(given)}, which is no address; {wanted}")
        return cls(host=match[1].strip("[]"), port=int(match[2]))

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.read, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "pattern": "^(unix:/|env:|file:|.*:[0-9]{1,5}$)"}


def _one_or_many(given: object) -> object:
    return given if isinstance(given, tuple | list) else (given,)


def _schema_of_one_or_many(item: Mapping[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [item, {"type": "array", "items": item, "minItems": 1}]})


def _public_url(text: str) -> str:
    if "?" in text:
        raise ValueError(f"is {shown(text)}, but has a query; write the address alone, as https://gateway.example")
    return text.rstrip("/")


class Serve(Entry):
    listen: Annotated[
        tuple[Listen, ...],
        Field(min_length=1),
        BeforeValidator(_one_or_many),
        _schema_of_one_or_many({"type": "string", "pattern": "^(unix:/|env:|file:|.*:[0-9]{1,5}$)"}),
    ] = (Listen("127.0.0.1", 8470),)
    """Where to listen: host:port or unix:/path, one or a list."""
    workers: int = Field(default=1, ge=1, le=64)
    """Processes that share the port."""
    notice: Annotated[Duration, AfterValidator(_at_most(timedelta(minutes=5)))] = timedelta(0)
    """When it is told to stop: how long it goes on, while `/ready` says so. Longer than the proxy in front takes to notice."""
    trusted_proxies: tuple[Network, ...] = ()
    """The proxies whose X-Forwarded-For and Client-Cert count."""
    connections: int = Field(default=10_000, ge=10, le=60_000)
    """At a time, in each process; more are closed at once."""
    connections_per_address: int = Field(default=1_000, ge=1, le=60_000)
    """Of them from one address (of IPv6, one /64); trusted proxies and Unix sockets may have all."""
    limit_per_address: Rate | None = None
    """What one address may post, proven or not, to whatever source; more is a 429 before anything is read. Left out: no limit."""
    public_url: Annotated[Url, AfterValidator(_public_url)] | None = None
    """What senders have before /hooks, such as https://gateway.example: for schemes that sign the URL."""

    def contradictions(self) -> Iterator[Contradiction]:
        for index, address in enumerate(self.listen):
            if address in self.listen[:index] and (address.port or address.path):
                yield Contradiction(("listen", index), f"names {address} twice; leave one out")
        if self.connections_per_address > self.connections:
            yield Contradiction(
                ("connections_per_address",),
                f"is {self.connections_per_address}, but there are only {self.connections} connections in all; lower it",
            )


def _database(given: object) -> Literal["embedded"] | Secret:
    match given:
        case "embedded" | Reference(text="embedded"):
            return "embedded"
        case Secret():
            return given
        case Reference(text=None):
            raise ValueError(given.problem)
        case Reference(text=str(text)):
            origin = given.origin
        case str(text):
            origin = ""
        case _:
            raise ValueError("is no database; write embedded, or postgresql://user@host/name")
    if not re.match(r"postgres(ql)?://", text):
        raise ValueError(
            "is no database; write embedded, or postgresql://user@host/name, or env: and a variable with it"
        )
    try:
        parts = urlsplit(text)
    except ValueError:
        raise ValueError("is no database; write postgresql://user@host/name") from None
    if not origin and (parts.password or "password" in parts.query.lower()):
        raise ValueError("has its password written out; put all of it into a variable and write env:NAME, or file:PATH")
    return Secret(text, origin=origin)


Database = Annotated[
    Literal["embedded"] | Secret,
    PlainValidator(_database),
    WithJsonSchema({"type": "string", "pattern": "^(embedded$|postgres(ql)?://|env:|file:|vault:)"}),
]


# ── vault ──────────────────────────────────────────────────────────────────────────────────────────


def _encrypted(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme != "https" and not _is_loopback(parts.hostname or ""):
        raise ValueError(f"is {shown(url)}: what comes in the clear is no secret; write https")
    return url.rstrip("/")


class Vault(Entry):
    """OpenBao or HashiCorp Vault, where vault:PATH#FIELD comes from: version 2 of its key-value engine."""

    url: Annotated[Url, AfterValidator(_encrypted)]
    """Where it is."""
    token: Secret | None = None
    """A token that may read what the file names; or else role_id and secret_id."""
    role_id: Secret | None = None
    """The role to log in as (AppRole)."""
    secret_id: Secret | None = None
    """What proves the role."""
    namespace: Annotated[str, Field(pattern=r"^[A-Za-z0-9_./-]{1,200}$")] | None = None
    """Its namespace, if it has several."""
    allow: tuple[Network, ...] = ()
    """The addresses that it may be at; default: public ones."""
    ca: Annotated[Pem, AfterValidator(certificates)] | None = None
    """The authorities that its certificate may be of, file:PATH of a PEM file; default: the system's."""
    refresh: Annotated[Duration, AfterValidator(_at_most(timedelta(days=1)))] = timedelta(minutes=5)
    """How often what it holds is asked for again."""

    def contradictions(self) -> Iterator[Contradiction]:
        if self.token is not None and (self.role_id is not None or self.secret_id is not None):
            yield Contradiction(("token",), "stands beside role_id or secret_id; leave one way to log in")
        elif self.token is None and (self.role_id is None or self.secret_id is None):
            problem = "is missing; write token: file:PATH, or role_id: and secret_id:"
            yield Contradiction(("token",), problem, (("role_id",), ("secret_id",)))


# ── facilities, systems ────────────────────────────────────────────────────────────────────────────


def _timezone(text: str) -> str:
    try:
        ZoneInfo(text)
    except (ValueError, OSError, KeyError):  # KeyError: of which ZoneInfoNotFoundError is one
        if available_timezones():
            raise ValueError(f"is {shown(text)}, which is no time zone; write it as Europe/Berlin") from None
    return text


class Facility(Settings):
    name: str = Field(min_length=1, max_length=200)
    """What people call it; nothing is computed with it."""
    timezone: Annotated[str, AfterValidator(_timezone)] = "UTC"
    """Its time zone, such as Europe/Berlin: whose time of day an `expect` means."""


class SystemManners(Settings):
    timeout: Annotated[Duration, AfterValidator(_at_most(timedelta(minutes=10)))] = timedelta(seconds=10)
    """For one call."""


class System(SystemManners, Named):
    """A partner that several destinations speak to: one login, one pool."""

    connector: str
    """The kind of system; the other keys are those of its kind."""
    settings: SkipJsonSchema[Settings]


# ── sources ────────────────────────────────────────────────────────────────────────────────────────

Header = Annotated[str, Field(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}$")]
OWN_SOURCE: Final = "sluicegate"  # what the program itself has to say comes from here


def _json_path(text: str) -> str:
    if not text or len(text) > 200 or not all(text.split(".")):
        raise ValueError(f"is {shown(text)}, which is no path of keys; write it as key or key.below")
    if re.search(r'["\\\x00-\x1f]', text):
        raise ValueError(f"is {shown(text)}, but a key with a quote or a backslash in it cannot be read; name another")
    return text


JsonPath = Annotated[str, AfterValidator(_json_path)]
"""Keys of the body from the outside in: `data.asset`."""
Raw = str | int | bool


def _wall_time(given: object) -> time:
    if isinstance(given, time):
        return given
    if not (isinstance(given, str) and re.fullmatch(r"([01][0-9]|2[0-3]):[0-5][0-9]", given)):
        raise ValueError(f'is {shown(given)}, which is no time of day; write it as "06:00" or "20:30"')
    return time.fromisoformat(given)


WallTime = Annotated[
    time,
    BeforeValidator(_wall_time),
    WithJsonSchema({"type": "string", "pattern": "^(env:|file:|([01][0-9]|2[0-3]):[0-5][0-9]$)"}),
]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: Final[tuple[Day, ...]] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class Expected(Entry):
    """What a source is expected to post: silence is a fault, too."""

    every: Annotated[Duration, AfterValidator(_at_most(timedelta(days=31)))] | None = None
    """At least one event in such a time, counted over the hours in which it is expected."""
    from_: WallTime | None = Field(default=None, alias="from")
    """From this time of day on, such as "06:00"; default: around the clock."""
    to: WallTime | None = None
    """Until this time of day; earlier than from, it is one of the next day."""
    days: Annotated[tuple[Day, ...], Field(min_length=1)] = DAYS
    """The days on which this begins."""
    timezone: Annotated[str, AfterValidator(_timezone)] | None = None
    """Whose time of day it is, if not that of the facilities."""
    facilities: tuple[str, ...] = ()
    """Each of these is expected for itself, in its own time zone; default: the source as a whole."""
    sequence: str | None = None
    """A kept field with the number that the sender gives its messages: a gap in it is told."""

    def contradictions(self) -> Iterator[Contradiction]:
        if self.every is None and self.sequence is None:
            yield Contradiction(("every",), "is missing; write every: 1h, or sequence: and the field with its numbers")
        if self.every is not None and self.every < timedelta(minutes=1):
            yield Contradiction(("every",), f"is {written(self.every)}, but must be at least 1m")
        for key, given in (("from", self.from_), ("timezone", self.timezone), ("facilities", self.facilities or None)):
            if given is not None and self.every is None:
                yield Contradiction((key,), "says when something is expected; add every: 1h", (("every",),))
        if (self.from_ is None) != (self.to is None):
            key, other = ("from", "to") if self.to is None else ("to", "from")
            yield Contradiction((key,), f"needs {other} beside it; add it, or leave both out", ((other,),))
        elif self.from_ is not None and self.from_ == self.to:
            yield Contradiction(("to",), "is the same as from; leave both out if it is around the clock", (("from",),))
        if self.facilities and self.timezone is not None:
            yield Contradiction(
                ("timezone",), "is given, but each facility has its own; leave it out", (("facilities",),)
            )
        yield from _twice("days", self.days)
        yield from _twice("facilities", self.facilities)


class Echo(Entry):
    """A handshake that asks for one of its own fields back."""

    field: JsonPath
    """The field that is echoed, such as challenge."""
    when: Annotated[
        Mapping[JsonPath, Raw],
        AfterValidator(MappingProxyType),
        WithJsonSchema({"type": "object", "additionalProperties": {"type": ["string", "integer", "boolean"]}}),
    ] = Field(default_factory=_nothing)
    """The values by which it is known; default: every body with that field is one."""


Handshake = Annotated[
    Annotated[Literal["slack", "microsoft-graph", "zoom", "xero"], Tag("<sender>")] | Annotated[Echo, Tag("<echo>")],
    Discriminator(lambda given: "<echo>" if isinstance(given, Mapping | Echo) else "<sender>"),
]


def _items_path(given: str) -> str:
    if given != "$":
        if not given.startswith("$."):
            raise ValueError(
                f"is {shown(given)}, but it begins where the body does; write $.value, or $ for a body that is a list"
            )
        _json_path(given.removeprefix("$."))
    return given


class Proof(NamedTuple):
    """What may verify a post, by where it comes from, and when it counts."""

    origin: str
    not_before: datetime | None = None
    not_after: datetime | None = None


def _format(given: str) -> str:
    if not re.fullmatch(r"json|form|form-json:[A-Za-z_][A-Za-z0-9_.-]{0,63}", given):
        raise ValueError(
            f"is {shown(given)}, which is no format; write json, form, or form-json: and the field with the JSON"
        )
    return given


Format = Annotated[
    str,
    AfterValidator(_format),
    WithJsonSchema({"type": "string", "pattern": "^(json|form|form-json:[A-Za-z_][A-Za-z0-9_.-]*|env:.+|file:.+)$"}),
]


class Source(Named):
    """Who may post, to /hooks/NAME."""

    accepts: tuple[str, ...] = Field(min_length=1)
    """Policies for what it posts; the first that matches wins, none is a 422."""
    limit: Rate | None = None
    """At most so many requests that are proven; more are answered with 429."""
    facility_limit: Rate | None = None
    """At most so many of them for one facility; more are answered with 429, and the others are not held up."""
    expect: Expected | None = None
    """What it is expected to post; default: nothing is."""
    body: Size = 256 * 1024
    """The largest body."""
    format: Format = "json"
    """What a body is: json; form, whose fields are texts; or form-json:payload, a form with JSON in its field payload."""
    each: Annotated[str, AfterValidator(_items_path)] | None = None
    """Where a post has a list of events, as $.value, or $ where it is one; default: a post is one event."""
    partial: bool = False
    """With each: whether events that meet no policy are left out; else one of them makes the whole post a 422."""
    from_: tuple[Network, ...] = Field(default=(), alias="from")
    """The addresses that it may post from; default: any."""
    handshake: Handshake | None = None
    """What it asks once before it sends anything: a known sender's way, or the field that is echoed."""
    trust_trace: bool = False
    """Whether its traceparent becomes the parent of our trace; else it is only linked."""

    @property
    def proofs(self) -> tuple[Proof, ...]:
        """Its secrets, by the places that a scheme tells."""
        return ()

    @property
    def signs_url(self) -> bool:
        """Whether what it signs has the URL in it, of which serve.public_url is the beginning."""
        return False

    @property
    def wrapped_in(self) -> str | None:
        """The field of a form that holds the JSON, if it is in one."""
        return self.format.removeprefix("form-json:") if self.format.startswith("form-json:") else None

    def contradictions(self) -> Iterator[Contradiction]:
        if self.body > 16 * 1024 * 1024:
            yield Contradiction(("body",), "is more than 16MiB; a source posts metadata, write less")
        yield from _twice("accepts", self.accepts)
        if self.each is not None and self.format == "form":
            problem = (
                "asks for a list, but a form has none; write form-json: and the field with the JSON, or leave it out"
            )
            yield Contradiction(("each",), problem, (("format",),))
        if self.partial and self.each is None:
            yield Contradiction(
                ("partial",), "is about lists of events; add each: $.value, or leave it out", (("each",),)
            )
        if self.handshake == "zoom" and not isinstance(self, Hmac):
            problem = "is zoom, which proves itself by a secret of scheme: hmac; write that, or leave it out"
            yield Contradiction(("handshake",), problem, (("scheme",),))
        for below, problem, also in self.expect.contradictions() if self.expect else ():
            yield Contradiction(("expect", *below), problem, tuple(("expect", *key) for key in also))


class TimedSecret(Entry):
    """A secret, and when it counts; written as the secret alone if that is always."""

    secret: Secret
    """env:NAME, file:PATH or vault:PATH#FIELD."""
    not_before: Instant | None = None
    """It counts from then on."""
    not_after: Instant | None = None
    """It counts until then."""

    @model_validator(mode="before")
    @classmethod
    def _alone(cls, given: object) -> object:
        """What is no mapping with a `secret` may be one, so nothing of it may be told."""
        if isinstance(given, Mapping | TimedSecret) and not (isinstance(given, Mapping) and "secret" not in given):
            return given
        if isinstance(given, Reference | Secret):
            return {"secret": given}
        raise ValueError("is a secret and must not be written out here; write env:NAME or file:PATH")

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        alone = {"type": "string", "pattern": "^(env:[A-Za-z_][A-Za-z0-9_]*|file:.+|vault:.+#.+)$"}
        return {"anyOf": [alone, handler.resolve_ref_schema(handler(schema))], "description": cls.__doc__}

    @property
    def proof(self) -> Proof:
        return Proof(self.secret.origin, self.not_before, self.not_after)

    def contradictions(self) -> Iterator[Contradiction]:
        if self.not_before and self.not_after and self.not_after <= self.not_before:
            yield Contradiction(
                ("not_after",), "is not after its not_before, so the secret never counts; correct one of them"
            )


class TimedSigningSecret(TimedSecret):
    """A secret (`whsec_…`) or a public key (`whpk_…`) as Standard Webhooks writes it, and when it counts."""

    @model_validator(mode="after")
    def _can_verify(self) -> Self:
        _named_with_origin(self.secret, lambda: decode_key(self.secret.reveal()))
        return self

    @property
    def is_public(self) -> bool:
        """Of the asymmetric half: what it verifies, only the sender can have signed."""
        return self.secret.reveal().startswith(PUBLIC_PREFIX)


class TimedHmacSecret(TimedSecret):
    """A shared secret of at least 16 bytes, and when it counts."""

    @model_validator(mode="after")
    def _long_enough(self) -> Self:
        if self.secret.reveal().startswith("v1,"):
            raise ValueError(f'begins with "v1," ({self.secret.origin}), which belongs to signatures; leave it out')
        of_at_least(16)(self.secret)
        return self


def _named_with_origin(secret: Secret, check: Callable[[], object]) -> None:
    try:
        check()
    except ValueError as error:
        raise ValueError(f"{error} ({secret.origin})") from None


class WithSecrets(Source):
    secrets: tuple[TimedSecret, ...]

    @property
    def proofs(self) -> tuple[Proof, ...]:
        return tuple(timed.proof for timed in self.secrets)

    def contradictions(self) -> Iterator[Contradiction]:
        yield from super().contradictions()
        for index, timed in enumerate(self.secrets):
            if any(timed.secret == earlier.secret for earlier in self.secrets[:index]):
                yield Contradiction(("secrets", index), "is the same secret as one above it; leave one out")
            for below, problem, _ in timed.contradictions():
                yield Contradiction(("secrets", index, *below), problem)


Tolerance = Annotated[Duration, AfterValidator(_at_most(timedelta(hours=1)))]


class StandardWebhooks(WithSecrets):
    """Signs as https://www.standardwebhooks.com says."""

    scheme: Literal["standard-webhooks"]
    """How the source proves who it is."""
    secrets: tuple[TimedSigningSecret, ...] = Field(min_length=1, max_length=8)
    """Any of these signs: whsec_… is shared (v1), whpk_… the sender's public key (v1a). To rotate, add the new one, and retire the old one when it falls silent."""
    tolerance: Tolerance = timedelta(minutes=5)
    """How far its clock may be from ours."""


class Hmac(WithSecrets):
    """Signs with a shared secret, in a header."""

    scheme: Literal["hmac"]
    """How the source proves who it is."""
    header: Header
    """The header with the signature."""
    algorithm: Literal["sha256", "sha512", "sha1"] = "sha256"
    """The hash; sha1 only where the sender knows no other."""
    encoding: Literal["hex", "base64"] = "hex"
    """How the signature is written."""
    prefix: str = Field(default="", max_length=50)
    """What stands before the signature, such as sha256=."""
    signed: str = Field(default="{body}", max_length=200)
    """What is signed, made of {id} {timestamp} {body} {url}."""
    timestamp: Header | None = None
    """The header with the time, in Unix seconds; needs a tolerance."""
    tolerance: Tolerance | None = None
    """How far its clock may be from ours; needs a timestamp."""
    id: Header | None = None
    """The header with the id of the message."""
    secrets: tuple[TimedHmacSecret, ...] = Field(min_length=1, max_length=8)
    """Any of these signs; to rotate, add the new one, and retire the old one when it falls silent."""

    @property
    def signs_url(self) -> bool:
        return "{url}" in self.signed

    def contradictions(self) -> Iterator[Contradiction]:
        yield from super().contradictions()
        yield from self._about_what_is_signed()
        if self.timestamp and not self.tolerance:
            yield Contradiction(("timestamp",), "needs a tolerance beside it; add tolerance: 5m", (("tolerance",),))
        if self.tolerance and not self.timestamp:
            yield Contradiction(
                ("tolerance",),
                "needs a timestamp beside it; name its header, or leave tolerance out",
                (("timestamp",),),
            )

    def _about_what_is_signed(self) -> Iterator[Contradiction]:
        try:
            parts = placeholders(self.signed)
        except ValueError as error:
            yield Contradiction(("signed",), f"{error}; write it as {{id}}.{{timestamp}}.{{body}}")
            return
        for part in parts:
            if part not in {"id", "timestamp", "body", "url"}:
                yield Contradiction(
                    ("signed",),
                    f"has {{{part}}}, but there is only {{id}}, {{timestamp}}, {{body}} and {{url}}; correct it",
                )
        if parts.count("body") != 1:
            yield Contradiction(("signed",), "must have {body} once: what is not signed proves nothing; add it")
        if following := re.search(r"\{url\}\{(id|timestamp)\}", self.signed):
            problem = f"has {{url}} right before {{{following[1]}}}, so that nobody can tell where one ends; name what stands between them"
            yield Contradiction(("signed",), problem)
        for key, header in (("id", self.id), ("timestamp", self.timestamp)):
            if header and key not in parts:
                problem = f"is not covered by signed, so anyone can change it; add {{{key}}} to signed, or leave it out"
                yield Contradiction((key,), problem, (("signed",),))
            if not header and key in parts:
                problem = f"has {{{key}}}, but no header is named for it; add {key}: and its header"
                yield Contradiction(("signed",), problem, ((key,),))


class _Preset(WithSecrets):
    """A sender that is known: what it signs and where the signature stands need not be said."""

    secrets: tuple[TimedHmacSecret, ...] = Field(min_length=1, max_length=8)
    """Any of these signs; to rotate, add the new one, and retire the old one when it falls silent."""

    def _in_full(self, **signs: Any) -> Hmac:
        return Hmac(scheme="hmac", name=self.name, accepts=self.accepts, secrets=self.secrets, **signs)


class GitHub(_Preset):
    """Signs as GitHub does: the body, and no id."""

    scheme: Literal["github"]
    """How the source proves who it is."""

    def in_full(self) -> Hmac:
        """The header with SHA-1, which GitHub sends too, does not count; nor does its id of the delivery, which anyone can change."""
        return self._in_full(header="X-Hub-Signature-256", prefix="sha256=")


class Shopify(_Preset):
    """Signs as Shopify does: the body, and no id."""

    scheme: Literal["shopify"]
    """How the source proves who it is."""

    def in_full(self) -> Hmac:
        return self._in_full(header="X-Shopify-Hmac-Sha256", encoding="base64")


class Slack(_Preset):
    """Signs as Slack does: time and body."""

    scheme: Literal["slack"]
    """How the source proves who it is."""
    tolerance: Tolerance = timedelta(minutes=5)
    """How far its clock may be from ours."""

    def in_full(self) -> Hmac:
        return self._in_full(
            header="X-Slack-Signature",
            prefix="v0=",
            signed="v0:{timestamp}:{body}",
            timestamp="X-Slack-Request-Timestamp",
            tolerance=self.tolerance,
        )


class Stripe(_Preset):
    """Signs as Stripe does: time and body, in one header."""

    scheme: Literal["stripe"]
    """How the source proves who it is."""
    tolerance: Tolerance = timedelta(minutes=5)
    """How far its clock may be from ours."""


class Twilio(_Preset):
    """Signs as Twilio does: the URL, and the fields of a form or, in the URL, the digest of a body."""

    scheme: Literal["twilio"]
    """How the source proves who it is."""
    algorithm: Literal["sha1", "sha256"] = "sha1"
    """The hash of its signatures, as it was agreed with Twilio; what a header says of it does not count."""

    @property
    def signs_url(self) -> bool:
        return True


class TimedApiKey(TimedSecret):
    """A key as the header has it, `id.secret`, and when it counts."""

    @model_validator(mode="after")
    def _is_a_key(self) -> Self:
        identity, _, key = self.secret.reveal().partition(".")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", identity) or len(key.encode()) < 16:
            raise ValueError(
                f"is no api key ({self.secret.origin}); it is an id of letters and digits, a dot, and at least 16 random bytes"
            )
        return self


class ApiKey(Source):
    """Sends a key in a header."""

    scheme: Literal["api-key"]
    """How the source proves who it is."""
    header: Header
    """The header with the key."""
    keys: tuple[TimedApiKey, ...] = Field(min_length=1, max_length=8)
    """Any of these; each is id.secret."""

    @property
    def proofs(self) -> tuple[Proof, ...]:
        return tuple(timed.proof for timed in self.keys)

    def contradictions(self) -> Iterator[Contradiction]:
        yield from super().contradictions()
        identities = [key.secret.reveal().partition(".")[0] for key in self.keys]
        for index, key in enumerate(self.keys):
            if identities[index] in identities[:index]:
                yield Contradiction(
                    ("keys", index), f"has the same id as a key above it ({key.secret.origin}); change one"
                )
            for below, problem, _ in key.contradictions():
                yield Contradiction(("keys", index, *below), problem)


def _user(secret: Secret) -> Secret:
    if ":" in secret.reveal() or not secret.reveal().isprintable():
        raise ValueError(f"is no user of Basic ({secret.origin}), which has no colon and no control character")
    return secret


class Basic(WithSecrets):
    """Logs in with a user and a password, as HTTP Basic has it."""

    scheme: Literal["basic"]
    """How the source proves who it is."""
    user: Annotated[Secret, AfterValidator(_user)]
    """The name that it logs in with."""
    secrets: tuple[TimedHmacSecret, ...] = Field(min_length=1, max_length=8)
    """Any of these is its password; to rotate, add the new one, and retire the old one when it falls silent."""


class TimedVerifyingKey(TimedSecret):
    """A public key in PEM, or a shared secret, and when it counts."""

    @model_validator(mode="after")
    def _can_verify(self) -> Self:
        from gateway.verifying_keys import verifying_key  # noqa: PLC0415 — its cryptography takes its time

        _named_with_origin(self.secret, lambda: verifying_key(self.secret.reveal()))
        return self


def _component(name: str) -> str:
    if name.startswith("@") and name not in _DERIVED:
        raise ValueError(f"is {shown(name)}, which is not known here; there is {', '.join(_DERIVED)}")
    if not re.fullmatch(r"@[a-z-]+|[a-z0-9!#$%&'*+.^_`|~-]{1,100}", name) or name in {"signature", "signature-input"}:
        raise ValueError(f"is {shown(name)}, which is no part of a request; write @path, or a header in small letters")
    return name


_DERIVED: Final = ("@method", "@path", "@query", "@request-target", "@target-uri", "@authority", "@scheme")
_OF_THE_OUTSIDE: Final = frozenset({"@target-uri", "@authority", "@scheme"})
_WITH_THE_PATH: Final = frozenset({"@path", "@request-target", "@target-uri"})


class HttpSignature(Source):
    """Signs parts of the request, as RFC 9421 says."""

    scheme: Literal["http-signature"]
    """How the source proves who it is."""
    keys: Table[TimedVerifyingKey] = Field(min_length=1, max_length=32)
    """The keys that it may sign with, by their keyid: public ones in PEM (Ed25519, ECDSA with P-256, RSA), or shared secrets."""
    components: tuple[Annotated[str, AfterValidator(_component)], ...] = Field(min_length=1, max_length=32)
    """The parts that it must sign: headers in small letters, content-digest among them, @method, @path, @query, @authority, @target-uri."""
    tolerance: Tolerance = timedelta(minutes=5)
    """How far its clock may be from ours."""

    @property
    def proofs(self) -> tuple[Proof, ...]:
        return tuple(timed.proof for timed in self.keys.values())

    @property
    def signs_url(self) -> bool:
        return not _OF_THE_OUTSIDE.isdisjoint(self.components)

    def contradictions(self) -> Iterator[Contradiction]:
        yield from super().contradictions()
        for keyid, timed in self.keys.items():
            if not (0 < len(keyid) <= 100 and keyid.isascii() and keyid.isprintable()):
                yield Contradiction(("keys", keyid), "is no keyid; use up to 100 characters of visible ASCII")
            for below, problem, _ in timed.contradictions():
                yield Contradiction(("keys", keyid, *below), problem)
        yield from _twice("components", self.components)
        if "content-digest" not in self.components:
            yield Contradiction(("components",), "lacks content-digest: what is not signed proves nothing; add it")
        if _WITH_THE_PATH.isdisjoint(self.components):
            problem = "lacks the path, so that a post could be shown to another source; add @path, or @target-uri"
            yield Contradiction(("components",), problem)


Pin = Annotated[str, Field(min_length=1, max_length=500)]


def _san(pins: tuple[str, ...]) -> tuple[str, ...]:
    for pin in pins:
        if not re.fullmatch(r"(dns:[^\s*]+|uri:[^\s]+|email:[^\s]+|ip:[0-9A-Fa-f.:]+)", pin):
            raise ValueError(f"has {shown(pin)}; write dns:edge-1.example, uri:spiffe://…, email:… or ip:…")
    return pins


def _spki(pins: tuple[str, ...]) -> tuple[str, ...]:
    for pin in pins:
        if not re.fullmatch(r"sha256/[A-Za-z0-9+/]{43}=", pin):
            raise ValueError(f"has {shown(pin)}; write sha256/ and the base64 of the SHA-256 of its public key")
    return pins


class ClientCert(Source):
    """Has a client certificate, which a trusted proxy has verified and tells of (RFC 9440)."""

    scheme: Literal["client-cert"]
    """How the source proves who it is."""
    san: Annotated[tuple[Pin, ...], AfterValidator(_san)] = ()
    """One of these must be a subject alternative name of it: dns:NAME, uri:…, email:… or ip:…."""
    subject: tuple[Pin, ...] = ()
    """One of these must be its subject, as RFC 4514 writes it: CN=edge-1,O=Hospital."""
    spki: Annotated[tuple[Pin, ...], AfterValidator(_spki)] = ()
    """One of these must be its public key: sha256/ and the base64 of the digest; to renew a key, add the new one."""

    def contradictions(self) -> Iterator[Contradiction]:
        yield from super().contradictions()
        if not (self.san or self.subject or self.spki):
            yield Contradiction(
                ("san",),
                "is missing, and so any certificate would do; name whose it must be, by san, subject or spki",
                (("subject",), ("spki",)),
            )


Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]


def _jwks(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme != "https" and not _is_loopback(parts.hostname or ""):
        raise ValueError(f"is {shown(url)}: keys that come in the clear prove nothing; write https")
    return url


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class Jwt(Source):
    """Sends a JSON Web Token of an issuer, as Authorization: Bearer."""

    scheme: Literal["jwt"]
    """How the source proves who it is."""
    issuer: str = Field(min_length=1)
    """The iss that its tokens must have."""
    audience: str = Field(min_length=1)
    """The aud that its tokens must have."""
    jwks: Annotated[Url, AfterValidator(_jwks)]
    """Where the issuer publishes its keys."""
    algorithms: tuple[Algorithm, ...] = Field(default=("RS256", "ES256"), min_length=1)
    """The algorithms that it may sign with."""
    typ: str = Field(default="JWT", pattern=r"^[A-Za-z0-9!#$&^_.+-]{1,100}$")
    """The typ that its tokens must have: another one, as at+jwt, keeps tokens for something else from counting here."""
    allow: tuple[Network, ...] = ()
    """The addresses that its keys may be fetched from; default: public ones."""
    ca: Annotated[Pem, AfterValidator(certificates)] | None = None
    """The authorities that its certificate may be of, file:PATH of a PEM file; default: the system's."""
    body_hash: str | None = Field(default=None, min_length=1)
    """The claim with the SHA-256 of the body, in hex; without it a token proves who posts, but not what."""


_LONGEST_REREAD: Final = 50


def _url_token(secret: Secret) -> Secret:
    if not re.fullmatch(r"[A-Za-z0-9._~-]+", secret.reveal()):
        raise ValueError(f"has characters that do not belong in a URL ({secret.origin}); use letters, digits, - and _")
    return of_at_least(16)(secret)


class TimedUrlToken(TimedSecret):
    """The end of a URL, and when it counts."""

    @model_validator(mode="after")
    def _is_a_token(self) -> Self:
        _url_token(self.secret)
        return self


class OdooNative(Source):
    """Posts as Odoo does by itself: unsigned, with a token at the end of the URL."""

    scheme: Literal["odoo-native"]
    """How the source proves who it is."""
    token: Annotated[Secret, AfterValidator(_url_token)]
    """The end of its URL, /hooks/NAME/TOKEN."""
    reread: str | None = None
    """An Odoo among systems: of a post only _model and _id are believed, and what is kept is read again from there."""
    others: tuple[TimedUrlToken, ...] = Field(default=(), max_length=7)
    """Tokens that count beside it, while one takes the place of another."""

    @property
    def proofs(self) -> tuple[Proof, ...]:
        return (Proof(self.token.origin), *(timed.proof for timed in self.others))

    def contradictions(self) -> Iterator[Contradiction]:
        yield from super().contradictions()
        if self.reread is not None and self.facility_limit is not None:
            yield Contradiction(
                ("facility_limit",), "counts what is not known before the record is read; leave it out", (("reread",),)
            )
        if self.reread is not None and self.each is not None:
            yield Contradiction(("each",), "is not what Odoo posts; leave it out, beside reread", (("reread",),))
        if self.reread is not None and self.format != "json":
            yield Contradiction(("format",), "is not what Odoo posts; leave it out, beside reread", (("reread",),))
        if self.reread is not None and len(self.name) > _LONGEST_REREAD:
            yield Contradiction(
                ("reread",), f"makes a destination of the source's name, which has more than {_LONGEST_REREAD} letters"
            )
        for index, timed in enumerate(self.others):
            if timed.secret in {self.token, *(earlier.secret for earlier in self.others[:index])}:
                yield Contradiction(("others", index), "is the same token as one above it; leave one out")
            for below, problem, _ in timed.contradictions():
                yield Contradiction(("others", index, *below), problem)


AnySource = (
    StandardWebhooks
    | Hmac
    | GitHub
    | Shopify
    | Slack
    | Stripe
    | Twilio
    | ApiKey
    | Basic
    | Jwt
    | HttpSignature
    | ClientCert
    | OdooNative
)
SCHEMES: Final[Mapping[str, type[AnySource]]] = {
    "standard-webhooks": StandardWebhooks,
    "hmac": Hmac,
    "github": GitHub,
    "shopify": Shopify,
    "slack": Slack,
    "stripe": Stripe,
    "twilio": Twilio,
    "api-key": ApiKey,
    "basic": Basic,
    "jwt": Jwt,
    "http-signature": HttpSignature,
    "client-cert": ClientCert,
    "odoo-native": OdooNative,
}


# ── policies ───────────────────────────────────────────────────────────────────────────────────────

DataClass = Literal["metadata", "workforce_pii", "free_text", "document"]
CLASSES: Final = ("metadata", "workforce_pii", "free_text", "document")  # from the lowest to the highest


Domain = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
KIND: Final = "Its type; [type] is a list of it: int, decimal, bool, enum, uuid, timestamp, date or code."


class KeptField(Entry):
    """One value that is kept."""

    from_: JsonPath = Field(alias="from")
    """Where it stands in the body, such as data.asset."""
    optional: bool = False
    """Whether it may be missing; else its absence is a 422."""
    type: Any
    max: int | None = Field(default=None, ge=1, le=1000)
    """The most items of a list; default: 100."""

    @property
    def kind(self) -> str:
        """`int`, `code`, …, of the items if it is a list."""
        kind: str = self.type[0] if self.many else self.type
        return kind

    @property
    def many(self) -> bool:
        return isinstance(self.type, tuple)

    @property
    def most(self) -> int:
        """The most items of a list."""
        return self.max or 100

    def contradictions(self) -> Iterator[Contradiction]:
        if self.max is not None and not self.many:
            yield Contradiction(("max",), f"is for lists; write type: [{self.kind}], or leave it out")


_NO_FREE_TEXT: Final = re.compile(r"[^\s@\x00-\x1f\x7f]{1,64}")


def _without_spaces(kept: Raw) -> Raw:
    if isinstance(kept, str) and not _NO_FREE_TEXT.fullmatch(kept):
        raise ValueError(f'is {shown(kept)}, but what is kept has no space and no @; write {{"as sent": as_kept}}')
    return kept


Word = Annotated[Raw, AfterValidator(_without_spaces)]
"""A word of the policy's own: what a partner sends never gets into it."""


class _CanBePseudonym(KeptField):
    token: Domain | None = None
    """Keep a keyed pseudonym instead, which is stable inside this domain."""


class _CanBeLookedUp(_CanBePseudonym):
    lookup: (
        Annotated[
            Mapping[Raw, Word],
            Field(min_length=1, max_length=1000),
            AfterValidator(MappingProxyType),
            WithJsonSchema({"type": "object", "minProperties": 1}),
        ]
        | None
    ) = None
    """Keep a word of your own instead: which one for each value; what it does not name is a 422."""
    otherwise: Word | None = None
    """With lookup: the word for every value that it does not name."""

    def contradictions(self) -> Iterator[Contradiction]:
        yield from super().contradictions()
        yield from self._about_lookup()

    def _about_lookup(self) -> Iterator[Contradiction]:
        if self.otherwise is not None and self.lookup is None:
            yield Contradiction(("otherwise",), "is what a lookup does not name; add lookup: {…}", (("lookup",),))
        if self.lookup is not None and self.token is not None:
            problem = "is given beside token, but only one of them can be kept; leave one out"
            yield Contradiction(("lookup",), problem, (("token",),))
        for value in self.lookup or ():
            if why := self._why_never_looked_up(value):
                yield Contradiction(("lookup", value), why)

    @abstractmethod
    def _why_never_looked_up(self, value: Raw) -> str | None:
        """Why this field never has `value`, as the rest of a sentence with the mend."""


def _exact_number(given: object) -> object:
    return Decimal(repr(given)) if isinstance(given, float) else given


def _edges(given: tuple[int | Decimal, ...]) -> tuple[int | Decimal, ...]:
    if not all(low < high for low, high in pairwise(given)):
        raise ValueError("is in no order; write each edge once, from the lowest to the highest, as [0, 18, 65]")
    return given


Buckets = Annotated[
    tuple[Annotated[int | Decimal, BeforeValidator(_exact_number)], ...],
    Field(min_length=1, max_length=100),
    AfterValidator(_edges),
    WithJsonSchema({"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 100}),
]
"""Lower edges, from the lowest to the highest."""


class IntField(_CanBeLookedUp):
    """A whole number."""

    type: Literal["int"] | tuple[Literal["int"]] = Field(description=KIND)
    min: int | None = None
    """The smallest that is taken."""
    max: int | None = None
    """The largest that is taken; of a list, the most items (default: 100)."""
    bucket: Buckets | None = None
    """Keep only the highest of these edges that it reaches, as [0, 1000, 5000]; below the first is a 422."""

    def contradictions(self) -> Iterator[Contradiction]:
        yield from self._about_lookup()
        for index, edge in enumerate(self.bucket or ()):
            if not isinstance(edge, int):
                yield Contradiction(("bucket", index), f"is {edge}, but the edges of an int are whole numbers")
        for key, given in (("token", self.token), ("lookup", self.lookup)):
            if self.bucket is not None and given is not None:
                yield Contradiction(
                    ("bucket",), f"is given beside {key}, but only one of them can be kept; leave one out", ((key,),)
                )
        if self.many and self.max is not None and not 1 <= self.max <= 1000:
            yield Contradiction(("max",), f"is {self.max}, but a list has 1 to 1000 items; correct it")
        if not self.many and self.min is not None and self.max is not None and self.max < self.min:
            yield Contradiction(
                ("max",), f"is {self.max}, less than min, so that no number is taken; correct one of them", (("min",),)
            )

    def _why_never_looked_up(self, value: Raw) -> str | None:
        if type(value) is not int:
            return "is no whole number, so nothing is ever looked up by it; write one"
        most = None if self.many else self.max
        if (self.min is not None and value < self.min) or (most is not None and value > most):
            return "is not between min and max, so nothing is ever looked up by it; leave it out"
        return None


class DecimalField(KeptField):
    """A number with decimals, kept as it was written."""

    type: Literal["decimal"] | tuple[Literal["decimal"]] = Field(description=KIND)
    round: int | None = Field(default=None, ge=0, le=12)
    """Round to so many decimals."""
    bucket: Buckets | None = None
    """Keep only the highest of these edges that it reaches, as [0, 36.5, 38]; below the first is a 422."""

    def contradictions(self) -> Iterator[Contradiction]:
        yield from super().contradictions()
        if self.bucket is not None and self.round is not None:
            problem = "is given beside round, but only one of them can be kept; leave one out"
            yield Contradiction(("bucket",), problem, (("round",),))


class BoolField(KeptField):
    """true or false."""

    type: Literal["bool"] | tuple[Literal["bool"]] = Field(description=KIND)


def _kept_words(given: object) -> object:
    """A list means that each is kept as it is."""
    if not isinstance(given, tuple | list):
        return given
    if any(isinstance(word, Mapping | tuple | list) or word is None for word in given):
        raise ValueError("has an item that is no word; write [paid, refused], or {raw: kept}")
    return {word: word for word in given}


class EnumField(_CanBePseudonym):
    """One of a few words."""

    type: Literal["enum"] | tuple[Literal["enum"]] = Field(description=KIND)
    of: Annotated[
        Mapping[Raw, Word],
        Field(min_length=1, max_length=1000),
        BeforeValidator(_kept_words),
        AfterValidator(MappingProxyType),
        WithJsonSchema({"anyOf": [{"type": "array", "minItems": 1}, {"type": "object", "minProperties": 1}]}),
    ]
    """The words that are taken: a list, or what each is kept as."""


class UuidField(_CanBeLookedUp):
    """A UUID."""

    type: Literal["uuid"] | tuple[Literal["uuid"]] = Field(description=KIND)

    def _why_never_looked_up(self, value: Raw) -> str | None:
        if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", value):
            return None
        return "is no UUID in small letters, so nothing is ever looked up by it; write it as it is kept"


class TimestampField(KeptField):
    """A moment; without a zone it is UTC, as Odoo means it."""

    type: Literal["timestamp"] | tuple[Literal["timestamp"]] = Field(description=KIND)
    truncate: Literal["second", "minute", "hour", "day", "month", "year"] | None = None
    """Keep only this much of it: the moment at which its second, minute, hour, day, month or year began, in UTC."""


class DateField(KeptField):
    """A day."""

    type: Literal["date"] | tuple[Literal["date"]] = Field(description=KIND)
    truncate: Literal["month", "year"] | None = None
    """Keep only this much of it: the first day of its month or year."""


def _safe_pattern(pattern: str) -> str:
    if why := why_unsafe(pattern):
        raise ValueError(f"is {shown(pattern)}, {why}")
    return pattern


class CodeField(_CanBeLookedUp):
    """A short text that its pattern describes from end to end; never free text."""

    type: Literal["code"] | tuple[Literal["code"]] = Field(description=KIND)
    pattern: Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_safe_pattern)]
    """A regular expression for the whole of it, which can match no space and no @."""
    max_length: int = Field(default=64, ge=1, le=256)
    """The most characters."""

    def contradictions(self) -> Iterator[Contradiction]:
        yield from super().contradictions()
        if self.many and ways_of(self.pattern) * self.most > MOST_WAYS:
            problem = (
                f"can read one text in {ways_of(self.pattern)} ways, so a list of {self.most} bad ones keeps the door busy; "
                "put a separator between parts that take the same characters, or lower max"
            )
            yield Contradiction(("pattern",), problem, (("max",),))

    def _why_never_looked_up(self, value: Raw) -> str | None:
        if isinstance(value, str) and len(value) <= self.max_length and re.fullmatch(self.pattern, value, re.ASCII):
            return None
        return "is nothing that the pattern matches, so nothing is ever looked up by it; correct one of them"


class ConstField(Entry):
    """A word of the policy's own that every event gets; nothing is read for it."""

    const: Word
    """What is kept, whatever was posted."""

    @property
    def kind(self) -> str:
        return "const"

    @property
    def many(self) -> bool:
        return False

    @property
    def optional(self) -> bool:
        return False


def _tag(given: object) -> str | None:
    if isinstance(given, ConstField) or (isinstance(given, Mapping) and "const" in given and "type" not in given):
        return "<const>"
    kind = given.get("type") if isinstance(given, Mapping) else getattr(given, "type", None)
    if isinstance(kind, list | tuple) and len(kind) == 1:
        kind = kind[0]
    return f"<{kind}>" if isinstance(kind, str) else None


ReadField = IntField | DecimalField | BoolField | EnumField | UuidField | TimestampField | DateField | CodeField
"""What is read from a body."""
AnyField = Annotated[
    Annotated[IntField, Tag("<int>")]
    | Annotated[DecimalField, Tag("<decimal>")]
    | Annotated[BoolField, Tag("<bool>")]
    | Annotated[EnumField, Tag("<enum>")]
    | Annotated[UuidField, Tag("<uuid>")]
    | Annotated[TimestampField, Tag("<timestamp>")]
    | Annotated[DateField, Tag("<date>")]
    | Annotated[CodeField, Tag("<code>")]
    | Annotated[ConstField, Tag("<const>")],
    Discriminator(_tag),
]
FIELD_TYPES: Final = ("int", "decimal", "bool", "enum", "uuid", "timestamp", "date", "code")


def words_of(field: AnyField) -> tuple[Raw, ...] | None:
    """All that can be kept of `field`, where these are words of the policy's own; None where they are not."""
    match field:
        case ConstField():
            return (field.const,)
        case EnumField(token=None):
            return tuple(dict.fromkeys(field.of.values()))
        case IntField() | UuidField() | CodeField() if field.lookup is not None:
            others = () if field.otherwise is None else (field.otherwise,)
            return tuple(dict.fromkeys((*field.lookup.values(), *others)))
        case _:
            return None


def is_pseudonym(field: AnyField) -> bool:
    return isinstance(field, IntField | EnumField | UuidField | CodeField) and field.token is not None


class FacilityRule(Settings):
    """How an event's facility is found."""

    from_: JsonPath = Field(alias="from")
    """Where it stands in the body."""
    of: Annotated[
        Mapping[Raw, str],
        Field(min_length=1),
        AfterValidator(MappingProxyType),
        WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1}),
    ]
    """Which facility each value means."""


class Policy(Named):
    """What is kept of a payload.  What is not named here never reaches disk, log or trace."""

    version: int = Field(ge=1, le=2**31 - 1)
    """Stored with every event; a changed policy needs a new number, or it is refused."""
    purpose: str = Field(min_length=1, max_length=500)
    """What it is kept for, for the auditor."""
    class_: DataClass = Field(default="metadata", alias="class")
    """The class of what it keeps; a destination gets no higher class than it receives."""
    match: Annotated[
        Mapping[JsonPath, Raw | None],
        AfterValidator(MappingProxyType),
        WithJsonSchema({"type": "object", "additionalProperties": {"type": ["string", "integer", "boolean", "null"]}}),
    ] = Field(default_factory=_nothing)
    """The values that a body must have for this policy; default: every body."""
    type: str = Field(min_length=1, max_length=200)
    """The CloudEvents type; may have {fields} that are kept."""
    subject: str | None = Field(default=None, min_length=1, max_length=200)
    """The business record, such as purchase.order/{id}."""
    time: str | None = Field(default=None, max_length=100)
    """When it happened: {field}, of a timestamp that is kept; default: when it was received."""
    facility: FacilityRule | None = None
    """The site that it belongs to."""
    keep: Table[AnyField] = Field(min_length=1, max_length=200)
    """The fields that are kept, by name."""
    dedup: tuple[str, ...] | None = Field(default=None, min_length=1)
    """The fields that make two posts the same event, where the sender signs no id."""

    @property
    def paths(self) -> Mapping[str, str]:
        """Where each kept field stands in the body; one that is const stands nowhere."""
        return {name: field.from_ for name, field in self.keep.items() if not isinstance(field, ConstField)}

    @property
    def all_paths(self) -> tuple[str, ...]:
        """Everything that is read of a body: to match, to keep, and to find the facility."""
        facility = (self.facility.from_,) if self.facility else ()
        return (*self.match, *self.paths.values(), *facility)

    def contradictions(self) -> Iterator[Contradiction]:
        for name, field in self.keep.items():
            if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name):
                yield Contradiction(
                    ("keep", name), "is no name of a field; use a-z, 0-9 and _, and begin with a letter"
                )
            for below, problem, _ in field.contradictions():
                yield Contradiction(("keep", name, *below), problem)
        yield from self._about_paths()
        if not _TYPE.fullmatch(re.sub(r"\{[^{}]*\}", "x", self.type)):
            form = "a type has letters, digits, _ and -, with dots between; write it as odoo.order.{status}"
            yield Contradiction(("type",), f"is {shown(self.type)}; {form}")
        yield from self._about_template("type", self.type, _unfit_for_type)
        yield from self._about_template("subject", self.subject or "", _unfit_for_subject)
        if self.time is not None and not re.fullmatch(r"\{[^{}]*\}", self.time):
            yield Contradiction(("time",), f"is {shown(self.time)}; write one field in braces, as {{changed}}")
        yield from self._about_template("time", self.time or "", _unfit_for_time)
        for index, name in enumerate(self.dedup or ()):
            if name not in self.keep:
                yield self._not_kept(("dedup", index), name)
        yield from _twice("dedup", self.dedup or ())

    def _about_template(
        self, key: str, template: str, why_unfit: Callable[[AnyField], str | None]
    ) -> Iterator[Contradiction]:
        try:
            names = placeholders(template)
        except ValueError as error:
            yield Contradiction((key,), str(error))
            return
        for name in names:
            if name not in self.keep:
                yield self._not_kept((key,), name)
            elif why := why_unfit(self.keep[name]):
                yield Contradiction((key,), f"has {{{name}}}, {why}")

    def _not_kept(self, key: tuple[str | int, ...], name: str) -> Contradiction:
        problem = f'names "{name}", but keep has no such field{did_you_mean(name, tuple(self.keep))}'
        return Contradiction(key, problem, (("keep", name),))

    def _about_paths(self) -> Iterator[Contradiction]:
        """A value that is taken cannot have keys below it that are taken too."""
        taken: dict[str, tuple[str, ...]] = {path: ("match", path) for path in self.match}
        if self.facility:
            taken[self.facility.from_] = ("facility", "from")
        taken |= {path: ("keep", name, "from") for name, path in self.paths.items()}
        for path, place in taken.items():
            for above in _paths_above(path):
                if above in taken:
                    yield Contradiction(
                        place, f'reads inside "{above}", which {".".join(taken[above])} takes as a value; read one'
                    )


_TYPE: Final = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_IN_A_TYPE: Final = re.compile(r"[A-Za-z0-9_.-]+")


def _unfit_for_subject(field: AnyField) -> str | None:
    if field.optional:
        return "which is optional, so that it may be missing there; leave out optional, or name another field"
    return "which is a list; name a field with one value" if field.many else None


def _unfit_for_type(field: AnyField) -> str | None:
    words = words_of(field)
    match field:
        case _ if words is not None:
            fits = all(_IN_A_TYPE.fullmatch(str(word)) for word in words)
        case CodeField(token=None):
            characters = characters_of(field.pattern)
            fits = characters is not None and all(map(_IN_A_TYPE.fullmatch, characters))
        case _:
            fits = isinstance(field, BoolField | IntField | EnumField | CodeField)
    if not fits:
        return "which may hold what no type can; name an enum, or a code of letters, digits, _ . and -"
    return _unfit_for_subject(field)


def _unfit_for_time(field: AnyField) -> str | None:
    fits = isinstance(field, TimestampField) and not field.many
    return None if fits else "which is no timestamp; name a field of type timestamp"


def _paths_above(path: str) -> Iterator[str]:
    keys = path.split(".")
    yield from (".".join(keys[:length]) for length in range(1, len(keys)))


# ── routes ─────────────────────────────────────────────────────────────────────────────────────────


Value = Annotated[str | int | bool | Decimal, BeforeValidator(_exact_number)]
_VALUES: Final = _schema_of_one_or_many({"type": ["string", "number", "boolean"]})
_BOUND: Final = WithJsonSchema({"type": ["string", "number"]})


class Condition(Settings):
    """What a kept field must be.  Written as a value or a list of values if it must be one of them."""

    in_: Annotated[tuple[Value, ...], BeforeValidator(_one_or_many), _VALUES] | None = Field(default=None, alias="in")
    """One of these."""
    not_: Annotated[tuple[Value, ...], BeforeValidator(_one_or_many), _VALUES] | None = Field(default=None, alias="not")
    """None of these."""
    gt: Annotated[Value, _BOUND] | None = None
    """More than this."""
    gte: Annotated[Value, _BOUND] | None = None
    """This or more."""
    lt: Annotated[Value, _BOUND] | None = None
    """Less than this."""
    lte: Annotated[Value, _BOUND] | None = None
    """This or less."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: object) -> object:
        return given if isinstance(given, Mapping | Condition) else {"in": given}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        short = _VALUES.json_schema
        return {"anyOf": [short, handler.resolve_ref_schema(handler(schema))], "description": cls.__doc__}

    @property
    def bounds(self) -> Mapping[str, str | int | bool | Decimal]:
        """Those of gt, gte, lt and lte that are given."""
        given = {"gt": self.gt, "gte": self.gte, "lt": self.lt, "lte": self.lte}
        return {key: bound for key, bound in given.items() if bound is not None}


_Some = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_one_or_many)]
Some = Annotated[_Some, _schema_of_one_or_many({"type": "string"})]


def _type_patterns(patterns: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in patterns:
        if not _TYPE.fullmatch(pattern.removesuffix(".*")):
            raise ValueError(f"has {shown(pattern)}, which is no type; write odoo.order.approved, or odoo.order.*")
    return patterns


class When(Settings):
    """Which events a route takes; all that is given must hold."""

    source: Some | None = None
    """Any of these sources."""
    type: Annotated[Some, AfterValidator(_type_patterns)] | None = None
    """Any of these types; a trailing .* takes everything below."""
    facility: Some | None = None
    """Any of these facilities."""
    data: Table[Condition] = Field(default_factory=_nothing)
    """What kept fields must be."""


class Route(Named):
    """Which events go where; every route that matches applies."""

    when: When = Field(default_factory=When)
    """Which events it takes; default: all."""
    to: tuple[str, ...] = Field(min_length=1)
    """The destinations that get them."""
    order: Literal["subject"] | None = None
    """subject: one at a time for one record, in the order of acceptance."""
    give_up: Duration | None = None
    """After that a dead letter; default: the destination's."""

    def contradictions(self) -> Iterator[Contradiction]:
        yield from _twice("to", self.to)


# ── destinations ───────────────────────────────────────────────────────────────────────────────────


class RetrySettings(Entry):
    """How a delivery that failed is tried again."""

    first: Duration = timedelta(seconds=2)
    """The first pause, on average doubled with every try."""
    cap: Duration = timedelta(hours=1)
    """The longest pause."""
    give_up: Duration = timedelta(hours=72)
    """After that it is a dead letter."""

    def contradictions(self) -> Iterator[Contradiction]:
        if self.cap < self.first:
            yield Contradiction(("cap",), "is shorter than first; write a longer one", (("first",),))


class ExpectedDelivery(Settings):
    """How soon a destination is expected to take what it is owed."""

    within: Duration
    """Once its oldest delivery waits for longer, the destination is late, and that is told."""


class Reads(Entry):
    """What a destination needs beyond what is kept: read from its source at delivery, handed over, and kept nowhere."""

    system: str
    """An Odoo among systems; its user needs the right to read these fields, and no other."""
    model: str = Field(pattern=r"^[a-z][a-z0-9_]*(\.[a-z0-9_]+)*$")
    """The model of the record, such as hr.employee."""
    id: str = Field(pattern=r"^\{data\.[a-z_][a-z0-9_]*\}$")
    """Which record: a whole number that is kept, as "{data.employee}"."""
    fields: tuple[Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]*$")], ...] = Field(min_length=1, max_length=50)
    """The fields that are read, and handed over as data.read."""
    class_: DataClass = Field(default="workforce_pii", alias="class")
    """The class of what is read; no higher than what the destination receives."""

    @property
    def key(self) -> str:
        """The kept field that holds the record's id."""
        return self.id.removeprefix("{data.").removesuffix("}")

    def contradictions(self) -> Iterator[Contradiction]:
        yield from _twice("fields", self.fields)


class Manners(Entry):
    """How gently a destination is treated, of whatever kind it is."""

    concurrency: int = Field(default=8, ge=1, le=1000)
    """Deliveries at a time, at most; it adapts below that."""
    rate: Rate | None = None
    """Deliveries in a time, at most."""
    timeout: Annotated[Duration, AfterValidator(_at_most(timedelta(minutes=10)))] = timedelta(seconds=10)
    """For one try, all in all."""
    retry: RetrySettings = RetrySettings()
    """How a delivery that failed is tried again."""
    receives: DataClass = "metadata"
    """The highest class of data that it may get."""
    reads: Reads | None = None
    """What is read for each delivery from its source; default: nothing is."""
    retired: bool = False
    """true: no route may lead here any more, and what is owed still goes out; without a connector it is held."""
    expect: ExpectedDelivery | None = None
    """How soon it is expected to take what it is owed; default: nobody is told how late it is."""

    def contradictions(self) -> Iterator[Contradiction]:
        for below, problem, _ in self.retry.contradictions():
            yield Contradiction(("retry", *below), problem)
        for below, problem, _ in self.reads.contradictions() if self.reads else ():
            yield Contradiction(("reads", *below), problem)
        if self.reads and CLASSES.index(self.reads.class_) > CLASSES.index(self.receives):
            problem = (
                f"brings what is {self.reads.class_}, and the destination receives {self.receives}; "
                f"write receives: {self.reads.class_} if it may get that"
            )
            yield Contradiction(("reads",), problem, (("receives",),))


class Destination(Manners, Named):
    """Where events go, and how gently."""

    connector: str
    """The kind of destination; the other keys are those of its kind."""
    system: str | None = None
    """An entry of systems, instead of a connector."""
    settings: SkipJsonSchema[Settings]


# ── observability, retention ───────────────────────────────────────────────────────────────────────


class Observability(Settings):
    otlp: Url | None = None
    """Where traces go, OTLP over HTTP; default: nowhere."""
    sample: float = Field(default=0.1, ge=0, le=1)
    """Of traces that went well; what failed is always kept."""
    logs: Literal["json", "console"] = "json"
    """How logs are written."""


class Retention(Entry):
    """How long what is kept is kept."""

    events: Duration = timedelta(days=90)
    """Events and their attempts; longer if they are still owed."""
    dead_letters: Duration = timedelta(days=90)
    """What was discarded, by whom and why.  A dead letter itself is kept until somebody decides about it."""
    dedup: Duration = timedelta(days=7)
    """For how long the same post is recognised."""
    audit: Duration = timedelta(days=6 * 366)
    """Who did what."""

    def contradictions(self) -> Iterator[Contradiction]:
        if self.dedup > self.events:
            yield Contradiction(
                ("dedup",),
                "is longer than events, but what is recognised leads to an event; shorten it",
                (("events",),),
            )


def _twice(key: str, names: Iterable[str]) -> Iterator[Contradiction]:
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            yield Contradiction((key, index), f'names "{name}" twice; leave one out')
        seen.add(name)
