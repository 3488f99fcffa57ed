"""Standard Webhooks 1.0: what the door verifies, and what goes out signed (by the symmetric half, `v1`).

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import base64
import binascii

from connectors.mac import Mac

PREFIX = "whsec_"
PUBLIC_PREFIX = "whpk_"


class Signer:
    """Signs posts with one secret."""

    def __init__(self, secret_text: str) -> None:
        self._mac = Mac(decode_secret(secret_text))

    def headers(self, message_id: str, at: int, body: bytes) -> dict[str, str]:
        """The three headers that prove `body` to whoever has the secret; `at` is now, in Unix seconds."""
        return {
            "webhook-id": message_id,
            "webhook-timestamp": str(at),
            "webhook-signature": signature(self._mac, signed(message_id, str(at), body)),
        }


def signed(message_id: str, at: str, body: bytes) -> bytes:
    """What is signed; both words as they stand in their headers (they are ASCII)."""
    return f"{message_id}.{at}.".encode("ascii") + body


def signature(mac: Mac, message: bytes) -> str:
    return "v1," + binascii.b2a_base64(mac.of(message), newline=False).decode()


def decode_secret(text: str) -> bytes:
    """The key inside a secret `whsec_…`, padded or not.  A ValueError says what to write instead, without the secret."""
    if text.startswith("v1,"):
        raise ValueError(
            'begins with "v1,", which belongs to signatures: leave it out, so that it begins with "whsec_"'
        )
    if text.startswith(("whpk_", "whsk_")):
        raise ValueError('is a key of the asymmetric scheme (v1a); a secret shared by both sides begins with "whsec_"')
    if not text.startswith(PREFIX):
        raise ValueError('does not begin with "whsec_": write "whsec_" and then the secret in base64')
    key = _behind(PREFIX, text, "make one with `openssl rand -base64 32`")
    if not 24 <= len(key) <= 64:
        raise ValueError(
            f'holds {len(key)} bytes after "whsec_", and the scheme asks for 24 to 64: '
            "make one with `openssl rand -base64 32`"
        )
    return key


def decode_key(text: str) -> bytes:
    """The key of a sender: inside a secret `whsec_…`, or its public one (ed25519) inside `whpk_…`."""
    if text.startswith("whsk_"):
        raise ValueError('is a private key (v1a), which only its sender should have: write its public key, "whpk_…"')
    if not text.startswith(PUBLIC_PREFIX):
        return decode_secret(text)
    key = _behind(PUBLIC_PREFIX, text, "copy the key anew from its sender")
    if len(key) != 32:
        raise ValueError(
            f'holds {len(key)} bytes after "whpk_", but a public key has 32: copy the key anew from its sender'
        )
    return key


def _behind(prefix: str, text: str, mend: str) -> bytes:
    encoded = text.removeprefix(prefix).rstrip("=")
    try:
        return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f'is not base64 after "{prefix}": {mend}') from None
