"""Twilio: HMAC over the URL and the fields of a form, sorted; or over a URL that has the digest of another body in it.

The URL is `serve.public_url` and the target of the request as it came, never decoded, sorted or encoded anew.  Twilio
signs it with its port or without, so both count.
"""

import base64
import hashlib
import hmac
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes, urlsplit

from connectors.mac import Mac
from gateway.authenticate.mistakes import Signing
from gateway.authenticate.presented import Caller, Presented, Reason, Unauthorized
from gateway.authenticate.timed_keys import TimedKeys
from gateway.config_sections import Twilio
from gateway.forms import MOST_FIELDS
from gateway.request_body import FORM, media_of


class TwilioScheme:
    """Nothing stands between what it signs, so one signature fits fields that are cut at other places, too.

    All of them are the same post: a Caller says what was signed, and whoever posts it again is recognised by that.
    """

    def __init__(self, source: Twilio, *, public_url: str | None) -> None:
        self._keys = TimedKeys(source.secrets, lambda secret: Mac(secret.bytes, source.algorithm))
        self._is_form = media_of(source) is FORM
        self._public_urls = tuple(_with_and_without_port(public_url or ""))
        self._public_url, self._algorithm = public_url or "", source.algorithm
        self._secrets = [timed.secret for timed in source.secrets]

    async def authenticate(self, presented: Presented) -> Caller | Unauthorized:
        given = presented.once("X-Twilio-Signature")
        if isinstance(given, Unauthorized):
            return given
        if self._is_form:
            if presented.body.count(b"&") >= MOST_FIELDS:  # nobody sorts more for somebody who is not proven yet
                return Unauthorized(Reason.WRONG_BODY)
            fields = sorted_fields(presented.body)
        elif _digest_is_in(presented):
            fields = b""
        else:
            return Unauthorized(Reason.WRONG_BODY)
        messages = []
        for public_url in self._public_urls:
            url = presented.url(public_url)
            if isinstance(url, Unauthorized):
                return url
            messages.append(url + fields)
        return self._verify(messages, presented.at, given[0].encode())

    def _verify(self, messages: list[bytes], at: float, given: bytes) -> Caller | Unauthorized:
        keys = self._keys.active(at)
        if not keys:
            return Unauthorized(Reason.NO_ACTIVE_SECRET)
        verified: int | None = None
        for place, mac in keys:  # all of them, whatever matched before: how long it takes says nothing
            for message in messages:
                expected = base64.b64encode(mac.of(message))
                if hmac.compare_digest(expected, given) and verified is None:
                    verified = place
        if verified is None:
            return Unauthorized(Reason.WRONG_SIGNATURE)
        return Caller(signed_id=None, secret=verified, signed=hashlib.sha256(messages[0]).digest())

    def signing(self, presented: Presented) -> Signing | None:
        given = presented.once("X-Twilio-Signature")
        if isinstance(given, Unauthorized):
            return None

        def signed(url: str, body: bytes) -> bytes | None:
            at = presented.url(url)
            return None if isinstance(at, Unauthorized) else at + (sorted_fields(body) if self._is_form else b"")

        return Signing(
            secrets=[secret.reveal() for secret in self._secrets],
            key_of=str.encode,
            algorithm=self._algorithm,
            encoding="base64",
            prefix="",
            given=given,
            body=presented.body,
            timestamp=None,
            message=lambda body, _: signed(self._public_url, body) or b"",
            elsewhere=lambda url: signed(url, presented.body),
            public_url=self._public_url,
            host=presented.headers.get("Host", ""),
        )

    async def close(self) -> None:
        """Holds nothing."""


def _with_and_without_port(public_url: str) -> Iterator[str]:
    parts = urlsplit(public_url)
    host = parts.netloc.rpartition(":")[0] if parts.port else parts.netloc
    port = parts.port or (80 if parts.scheme == "http" else 443)
    yield f"{parts.scheme}://{host}{parts.path}"
    yield f"{parts.scheme}://{host}:{port}{parts.path}"


def _digest_is_in(presented: Presented) -> bool:
    """Whether the URL has the digest of the body in it, once."""
    digests = [value for name, _, value in _query(presented.target) if name == "bodySHA256"]
    body = hashlib.sha256(presented.body).hexdigest().encode()
    return len(digests) == 1 and hmac.compare_digest(body, digests[0].lower().encode("utf-8", "replace"))


def _query(target: str) -> Iterator[tuple[str, str, str]]:
    return (part.partition("=") for part in target.partition("?")[2].split("&"))


def sorted_fields(form: bytes) -> bytes:
    """Names and values by name; a value that stands twice under one name counts once, as in the libraries of Twilio."""
    pairs = (field.replace(b"+", b" ").partition(b"=") for field in form.split(b"&") if field)
    decoded = {(unquote_to_bytes(name), unquote_to_bytes(value)) for name, _, value in pairs}
    return b"".join(name + value for name, value in sorted(decoded))
