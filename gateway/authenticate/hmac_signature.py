"""An HMAC in a header, as many senders have invented it: which header, which hash, what is signed is configured.

GitHub, Shopify and Slack are this, with their words for it.
"""

import base64
import hmac
import re
from datetime import timedelta

from connectors.mac import Mac
from gateway.authenticate.mistakes import Signing
from gateway.authenticate.presented import Caller, Presented, Reason, Unauthorized, is_id
from gateway.authenticate.timed_keys import TimedKeys
from gateway.config_sections import Hmac


class HmacScheme:
    def __init__(self, source: Hmac, *, public_url: str | None = None) -> None:
        self._prefix, self._algorithm, self._encoding = source.prefix, source.algorithm, source.encoding
        named = {"signature": source.header, "timestamp": source.timestamp, "id": source.id}
        self._headers = {name: header for name, header in named.items() if header is not None}
        self._tolerance = source.tolerance or timedelta()
        self._keys = TimedKeys(source.secrets, lambda secret: Mac(secret.bytes, self._algorithm))
        self._literals, self._names = _parts_of(source.signed)
        self._public_url = (public_url or "") if "url" in self._names else None
        self._secrets = [timed.secret for timed in source.secrets]

    async def authenticate(self, presented: Presented) -> Caller | Unauthorized:
        given = presented.once(*self._headers.values())
        if isinstance(given, Unauthorized):
            return given
        values = dict(zip(self._headers, given, strict=True))
        message_id, timestamp = values.get("id"), values.get("timestamp")
        if message_id is not None and (not is_id(message_id) or self._would_shift(message_id)):
            return Unauthorized(Reason.MALFORMED_ID)
        if timestamp is not None and (untimely := presented.untimely(timestamp, self._tolerance)):
            return untimely
        signed = {name: value.encode() for name, value in values.items()} | {"body": presented.body}
        if self._public_url is not None:
            url = presented.url(self._public_url)
            if isinstance(url, Unauthorized) or self._would_blend(presented):
                return Unauthorized(Reason.MALFORMED_URL)
            signed["url"] = url
        return self._verify(self._message(signed), message_id, presented.at, values["signature"])

    def _verify(self, message: bytes, message_id: str | None, at: float, signature: str) -> Caller | Unauthorized:
        keys = self._keys.active(at)
        if not keys:
            return Unauthorized(Reason.NO_ACTIVE_SECRET)
        if not signature.startswith(self._prefix):
            return Unauthorized(Reason.WRONG_SIGNATURE)
        given = signature.removeprefix(self._prefix).encode()
        if self._encoding == "hex":
            given = given.lower()
        verified: int | None = None
        for place, mac in keys:  # all of them, whatever matched before: how long it takes says nothing
            expected = self._encoded(mac.of(message))
            if hmac.compare_digest(expected, given) and verified is None:
                verified = place
        if verified is None:
            return Unauthorized(Reason.WRONG_SIGNATURE)
        return Caller(signed_id=message_id, secret=verified)

    def _encoded(self, digest: bytes) -> bytes:
        return digest.hex().encode() if self._encoding == "hex" else base64.b64encode(digest)

    def _message(self, signed: dict[str, bytes]) -> bytes:
        message = [self._literals[0]]
        for name, literal in zip(self._names, self._literals[1:], strict=True):
            message += signed[name], literal
        return b"".join(message)

    def _would_shift(self, message_id: str) -> bool:
        """Whether the tail of an id could pass as a part of what is signed after it: then one signature proves two ids."""
        place = self._names.index("id") + 1
        if following := self._literals[place].decode():
            return following in message_id
        match self._names[place : place + 1]:
            case ["timestamp"]:
                return message_id[-1].isdigit()
            case ["url"]:
                return "://" in message_id
            case _:
                return False

    def _would_blend(self, presented: Presented) -> bool:
        """Whether the query could pass as a part of what is signed after the URL, or that as the query."""
        place = self._names.index("url") + 1
        if following := self._literals[place].decode():
            return following in presented.target
        if self._names[place : place + 1] != ["body"] or "?" not in presented.target:
            return False
        return "{" in presented.target or not presented.body.startswith(b"{")  # so JSON begins where the URL ends

    def signing(self, presented: Presented) -> Signing | None:
        given = presented.once(*self._headers.values())
        if isinstance(given, Unauthorized):
            return None
        values = dict(zip(self._headers, given, strict=True))
        public_url = self._public_url

        def signed(body: bytes, timestamp: str, at: str | None) -> bytes | None:
            url = b"" if at is None else presented.url(at)
            if isinstance(url, Unauthorized):
                return None
            said = values | {"timestamp": timestamp}
            return self._message({name: value.encode() for name, value in said.items()} | {"body": body, "url": url})

        return Signing(
            secrets=[secret.reveal() for secret in self._secrets],
            key_of=str.encode,
            algorithm=self._algorithm,
            encoding=self._encoding,
            prefix=self._prefix,
            given=[values["signature"]],
            body=presented.body,
            timestamp=values.get("timestamp"),
            message=lambda body, timestamp: signed(body, timestamp, public_url) or b"",
            elsewhere=None
            if public_url is None
            else lambda url: signed(presented.body, values.get("timestamp", ""), url),
            public_url=public_url or "",
            host=presented.headers.get("Host", ""),
        )

    async def close(self) -> None:
        """Holds nothing."""


def _parts_of(template: str) -> tuple[list[bytes], list[str]]:
    """The literals of `{id}.{timestamp}.{body}`, and the names between them."""
    pieces = re.split(r"\{([a-z]+)\}", template)
    return [literal.encode() for literal in pieces[::2]], pieces[1::2]
