"""What a sender asks once before it sends its first event: that whoever has this address wants it.

    slack            {"type": "url_verification", "challenge": …}: the challenge
                     https://docs.slack.dev/reference/events/url_verification
    microsoft-graph  ?validationToken=…: the token; comes before anything is signed
                     https://learn.microsoft.com/graph/change-notifications-delivery-webhooks
    zoom             {"event": "endpoint.url_validation", …}: the token, and its HMAC under the source's secret
                     https://developers.zoom.us/docs/api/webhooks/#validate-your-webhook-endpoint
    xero             {"events": [], …}, signed: 200 and nothing else, or the usual 401
                     https://developer.xero.com/documentation/guides/webhooks/configuring-your-server
    a field          whatever stands there: the same

Answered in memory, after the sender is proven where its scheme can prove anything of it, and before the policy: there is
no event and no row.  What is echoed is short, is text, and is never anything else to a browser.
"""

import hashlib
import hmac
from collections.abc import Callable, Mapping
from typing import Final, assert_never

import msgspec
from aiohttp import web

from gateway.config_sections import AnySource, Echo, Hmac
from gateway.token_bucket import TokenBucket

LONGEST: Final = 1024  # bytes of an echo
RATE: Final = 5.0  # a second, for each source: it is asked for once, and again when somebody changes something

Answer = Callable[[bytes, int], web.Response | None]


class MalformedError(ValueError):
    """It is a handshake, and what is to be echoed is no short text."""


class Handshake:
    """Of one source."""

    def __init__(self, source: AnySource) -> None:
        self.limit = TokenBucket(per_second=RATE)
        self._unsigned = source.handshake == "microsoft-graph"
        self._answer = _answer_of(source)

    def first(self, query: Mapping[str, str]) -> web.Response | None:
        """The answer to one that comes before anything is signed; None: it is none.  Raises MalformedError."""
        return echo(query["validationToken"]) if self._unsigned and "validationToken" in query else None

    def answer(self, body: bytes, secret: int) -> web.Response | None:
        """The answer to a proven one; None: it is none.  `secret` is the place of the one that verified."""
        return self._answer(body, secret)


def echo(text: object) -> web.Response:
    if not isinstance(text, str) or not 0 < len(text.encode(errors="surrogatepass")) <= LONGEST:
        raise MalformedError
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MalformedError from None
    return web.Response(text=text, headers=NOSNIFF)


NOSNIFF: Final = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'"}


def _answer_of(source: AnySource) -> Answer:
    handshake = source.handshake
    match handshake:
        case "slack":
            return lambda body, _: _field(body, Echo(field="challenge", when={"type": "url_verification"}))
        case "zoom":
            assert isinstance(source, Hmac)
            keys = [timed.secret.bytes for timed in source.secrets]
            return lambda body, secret: _zoom(body, keys[secret])
        case "xero":
            return _xero
        case Echo() as told:
            return lambda body, _: _field(body, told)
        case "microsoft-graph" | None:
            return lambda *_: None
    assert_never(handshake)


def _field(body: bytes, told: Echo) -> web.Response | None:
    given = _object(body)
    if any(
        _at(given, path) != wanted or type(_at(given, path)) is not type(wanted) for path, wanted in told.when.items()
    ):
        return None
    found = _at(given, told.field)
    if found is None and not told.when:
        return None
    return echo(found)


def _zoom(body: bytes, key: bytes) -> web.Response | None:
    given = _object(body)
    if given.get("event") != "endpoint.url_validation":
        return None
    token = _at(given, "payload.plainToken")
    plain = echo(token).text or ""
    proof = hmac.new(key, plain.encode(), hashlib.sha256).hexdigest()
    said = msgspec.json.encode({"plainToken": plain, "encryptedToken": proof})
    return web.Response(body=said, content_type="application/json", headers=NOSNIFF)


def _xero(body: bytes, _: int) -> web.Response | None:
    return web.Response(headers=NOSNIFF) if _object(body).get("events") == [] else None


def _object(body: bytes) -> Mapping[str, object]:
    """What cannot be read is no handshake; the policy says what is wrong with it."""
    try:
        given = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return given if isinstance(given, dict) else {}


def _at(given: object, path: str) -> object:
    for key in path.split("."):
        given = given.get(key) if isinstance(given, dict) else None
    return given
