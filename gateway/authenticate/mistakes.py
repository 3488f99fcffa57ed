"""Which common mistake a sender made, where its signature does not verify: found by trying what would have.

Only for who operates the gateway, and only while they ask (gateway/diagnosis.py): a caller never hears any of it.
"""

import base64
import binascii
import hmac
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from gateway.authenticate.presented import Presented


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Signing:
    """How a source signs, and what one post of it brought."""

    secrets: Sequence[str]  # as the configuration has them
    key_of: Callable[[str], bytes]  # the key that a secret stands for
    algorithm: str
    encoding: str  # hex or base64
    prefix: str
    given: Sequence[str]  # signatures as they came, with whatever stands before them
    body: bytes
    timestamp: str | None
    message: Callable[[bytes, str], bytes]  # what is signed, of a body and a timestamp
    elsewhere: Callable[[str], bytes | None] | None = None  # what would be, if `serve.public_url` were this; with a URL
    public_url: str = ""
    host: str = ""  # that the request names

    def verifies(self, *, key: bytes | None = None, body: bytes | None = None, timestamp: str | None = None) -> bool:
        """Whether any signature is right in any form, if this one thing were different."""
        keys = [key] if key is not None else [self.key_of(secret) for secret in self.secrets]
        message = self.message(self.body if body is None else body, timestamp or self.timestamp or "")
        return self.signs(message, keys)

    def signs(self, message: bytes, keys: Sequence[bytes] | None = None) -> bool:
        keys = [self.key_of(secret) for secret in self.secrets] if keys is None else keys
        return any(self.mac(key, message) in found for key in keys for found in map(forms, self.given))

    def is_right(self) -> bool:
        """Whether one is right as it stands."""
        message = self.message(self.body, self.timestamp or "")
        expected = {self.prefix + self._encoded(self.mac(self.key_of(s), message)) for s in self.secrets}
        return any(given in expected for given in self.given)

    def mac(self, key: bytes, message: bytes) -> bytes:
        return hmac.digest(key, message, self.algorithm)

    def _encoded(self, mac: bytes) -> str:
        return mac.hex() if self.encoding == "hex" else base64.b64encode(mac).decode()


@runtime_checkable
class Signs(Protocol):
    """A scheme with a secret that both sides share."""

    def signing(self, presented: Presented) -> Signing | None:
        """How this post was to be signed; None where it did not bring what that takes."""
        ...


def mistakes(signing: Signing) -> list[str]:
    """Sentences for a person, the likeliest first; none where nothing that is tried would have verified."""
    if signing.is_right():
        return ["the signature is right: what is wrong is its time or its id"]
    if signing.verifies():
        return list(_about_form(signing))
    found = [*_about_secret(signing), *_about_url(signing), *_about_body(signing), *_about_time(signing)]
    return found or [
        "none of the common mistakes: another secret, another message, or a body that was changed on its way"
    ]


def forms(given: str) -> dict[bytes, str]:
    """What a signature may be the writing of, with or without a word before it; and which writing that is."""
    found: dict[bytes, str] = {}
    for text in (given, given.rpartition("=")[2], given.partition("=")[2], given.partition(",")[2], given.strip()):
        with suppress(ValueError):
            found.setdefault(bytes.fromhex(text), "hex")
        with suppress(binascii.Error, ValueError):
            padded = text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4)
            found.setdefault(base64.b64decode(padded.replace("-", "+").replace("_", "/"), validate=True), "base64")
    return found


def _about_form(signing: Signing) -> Iterator[str]:
    """It is right, and written in another way."""
    macs = {
        signing.mac(signing.key_of(secret), signing.message(signing.body, signing.timestamp or ""))
        for secret in signing.secrets
    }
    written = next(form for given in signing.given for mac, form in forms(given).items() if mac in macs)
    if written != signing.encoding:
        yield f"the signature is written in {written}, and {signing.encoding} is expected"
    elif signing.prefix and not any(given.startswith(signing.prefix) for given in signing.given):
        yield f'the signature does not begin with "{signing.prefix}"'
    else:
        yield "the signature has something before or after it that does not belong there"


def _about_secret(signing: Signing) -> Iterator[str]:
    for secret in signing.secrets:
        bare = secret.removeprefix("whsec_")
        tried = {
            "signed with the text of the secret, which was to be decoded from base64 first": bare.encode(),
            "signed with the whole text of the secret, whsec_ included": secret.encode(),
            "signed with the secret and a line break after it": secret.encode() + b"\n",
            "signed with the decoded secret and a line break after it": signing.key_of(secret) + b"\n",
        }
        for sentence, decode in (
            ("signed with what the secret is the base64 of; here it is taken as it stands", _from_base64),
            ("signed with what the secret is the hex of; here it is taken as it stands", _from_hex),
        ):
            if (key := decode(bare)) is not None:
                tried[sentence] = key
        for sentence, key in tried.items():
            if key != signing.key_of(secret) and signing.verifies(key=key):
                yield sentence
                return


def _about_url(signing: Signing) -> Iterator[str]:
    if signing.elsewhere is None:
        return
    scheme, _, rest = signing.public_url.partition("://")
    place, _, path = rest.partition("/")
    host = place.partition(":")[0]
    other = "http" if scheme == "https" else "https"
    tried = {
        f"signed for {other}://, and serve.public_url says {scheme}://": f"{other}://{rest}",
        "signed for the host that the request names, and serve.public_url says another": f"{scheme}://{signing.host}/{path}",
        f"signed for {other}:// and the host that the request names": f"{other}://{signing.host}/{path}",
        "signed for the host without its port": f"{scheme}://{host}/{path}",
        "signed for the host without the path before it that serve.public_url has": f"{scheme}://{place}",
    }
    for sentence, url in tried.items():
        message = signing.elsewhere(url.rstrip("/"))
        if message is not None and signing.signs(message):
            yield sentence
            return


def _about_body(signing: Signing) -> Iterator[str]:
    tried = {
        "signed without the line break at the end of the body": signing.body.rstrip(b"\r\n"),
        "signed with a line break at the end of the body, which did not come": signing.body + b"\n",
        "signed without the byte order mark before the body": signing.body.removeprefix(b"\xef\xbb\xbf"),
        "signed without any body": b"",
    }
    for sentence, body in tried.items():
        if body != signing.body and signing.verifies(body=body):
            yield sentence
            return
    try:
        given = json.loads(signing.body)
    except (ValueError, RecursionError):
        return
    for how in (
        {},
        {"separators": (",", ":")},
        {"ensure_ascii": False},
        {"separators": (",", ":"), "ensure_ascii": False},
        {"sort_keys": True},
        {"sort_keys": True, "separators": (",", ":")},
    ):
        body = json.dumps(given, **how).encode(errors="surrogatepass")
        if body != signing.body and signing.verifies(body=body):
            yield "signed a body that was written anew before it was sent, or afterwards: sign the bytes that are sent"
            return


def _about_time(signing: Signing) -> Iterator[str]:
    stamp = signing.timestamp
    if stamp is None or not (stamp.isascii() and stamp.isdigit()):
        return
    for other, sentence in (
        (stamp[:-3], "signed with the time in seconds, and sent it in milliseconds"),
        (stamp + "000", "signed with the time in milliseconds, and sent it in seconds"),
    ):
        if other and signing.verifies(timestamp=other):
            yield sentence
            return


def _from_base64(text: str) -> bytes | None:
    try:
        return base64.b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4), validate=True) or None
    except (binascii.Error, ValueError):
        return None


def _from_hex(text: str) -> bytes | None:
    try:
        return bytes.fromhex(text) or None
    except ValueError:
        return None
