"""What a sender presents, and what comes of it."""

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Protocol, runtime_checkable

import msgspec
from multidict import CIMultiDictProxy

_LONGEST_HEADER: Final = 4096


class Reason(StrEnum):
    """Why somebody is not who a source says: a code for metrics and logs, never told to the caller."""

    MISSING_HEADER = "missing_header"
    REPEATED_HEADER = "repeated_header"  # which of two would count is a matter of taste, so neither does
    MALFORMED_HEADER = "malformed_header"
    MALFORMED_ID = "malformed_id"
    MALFORMED_TIMESTAMP = "malformed_timestamp"
    MALFORMED_URL = "malformed_url"
    TOO_OLD = "too_old"
    TOO_NEW = "too_new"
    NO_ACTIVE_SECRET = "no_active_secret"  # noqa: S105 — a code
    WRONG_SIGNATURE = "wrong_signature"
    WRONG_KEY = "wrong_key"
    WRONG_LOGIN = "wrong_login"
    UNSIGNED_PART = "unsigned_part"  # of what the configuration wants to be signed
    UNTRUSTED_PROXY = "untrusted_proxy"  # whoever is connected may not say who the client is
    WRONG_CERTIFICATE = "wrong_certificate"
    EXPIRED_CERTIFICATE = "expired_certificate"
    MISSING_TOKEN = "missing_token"  # noqa: S105 — a code
    WRONG_TOKEN = "wrong_token"  # noqa: S105 — a code
    EXPIRED_TOKEN = "expired_token"  # noqa: S105 — a code
    UNKNOWN_KEY = "unknown_key"
    KEYS_UNAVAILABLE = "keys_unavailable"
    WRONG_BODY = "wrong_body"


class Caller(msgspec.Struct, frozen=True):
    """The sender is who the source says.  (A Struct, as what is presented: one is made for every post.)"""

    signed_id: str | None  # the id of the message, if the proof covers it
    secret: int  # the place of the secret that verified, so that people see when an old one falls silent
    signed: bytes | None = (
        None  # what was signed, where that is not the body as it is: bodies that differ can be the same
    )


@dataclass(frozen=True, slots=True)
class Unauthorized:
    """The sender has not proven who it is."""

    reason: Reason
    undecided: bool = False  # by a fault of ours it could not be told: the sender should try again, not give up


class Presented(msgspec.Struct, frozen=True, kw_only=True):
    """A request as far as it can prove anything.  `repr` shows nothing of it."""

    headers: CIMultiDictProxy[str]
    body: bytes
    target: str = ""  # of the request, as it came: nothing in it is decoded
    token: str | None  # the end of the URL, where a source has one
    peer: IPv4Address | IPv6Address | None
    at: float  # when it came, in Unix seconds
    vouched: bool = False  # who is connected may say who the client is; told where a scheme asks for it

    def __repr__(self) -> str:
        return f"<presented {len(self.body)} bytes>"

    def once(self, *headers: str, longest: int = _LONGEST_HEADER) -> list[str] | Unauthorized:
        """The values of headers that must each be there exactly once, in ASCII that can be seen."""
        given: list[str] = []
        for header in headers:
            values = self.headers.getall(header, ())
            if len(values) != 1:
                return Unauthorized(Reason.REPEATED_HEADER if values else Reason.MISSING_HEADER)
            value = values[0]
            if not (0 < len(value) <= longest and value.isascii() and value.isprintable()):
                return Unauthorized(Reason.MALFORMED_HEADER)
            given.append(value)
        return given

    def url(self, public_url: str) -> bytes | Unauthorized:
        """What the sender called, byte by byte: never by the Host header, which it could choose."""
        if not self.target.startswith("/"):  # a whole URL, for a proxy
            return Unauthorized(Reason.MALFORMED_URL)
        return f"{public_url}{self.target}".encode("utf-8", "surrogateescape")

    def untimely(self, timestamp: str, tolerance: timedelta) -> Unauthorized | None:
        """Why a timestamp does not count: tolerance has two sides, and a timestamp is digits and nothing else."""
        if not (len(timestamp) <= _LONGEST_TIMESTAMP and timestamp.isascii() and timestamp.isdigit()):
            return Unauthorized(Reason.MALFORMED_TIMESTAMP)
        age = self.at - int(timestamp)
        if abs(age) <= tolerance.total_seconds():
            return None
        return Unauthorized(Reason.TOO_OLD if age > 0 else Reason.TOO_NEW)


class Scheme(Protocol):
    """A way of proving who one is."""

    async def authenticate(self, presented: Presented) -> Caller | Unauthorized: ...

    async def close(self) -> None: ...


@runtime_checkable
class HasIssuer(Protocol):
    """A scheme whose keys are somebody else's."""

    @property
    def lacks_keys(self) -> bool:
        """The issuer did not tell them when it was asked last."""
        ...


def is_id(text: str) -> bool:
    """Whether `text` can be the id of a message: visible ASCII, not too long."""
    return 0 < len(text) <= _LONGEST_ID and text.isascii() and text.isprintable() and " " not in text


_LONGEST_TIMESTAMP = 12
_LONGEST_ID = 256
