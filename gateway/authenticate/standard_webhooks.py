"""Standard Webhooks 1.0: HMAC-SHA256 (`v1`) or ed25519 (`v1a`) over id, timestamp and body, by any of several keys.

The libraries of the specification raise on malformed input and read timestamps and base64 loosely, and most have no
`v1a`, so this is our own; what they sign is accepted.
"""

import binascii
import hmac
from collections.abc import Callable, Sequence

from connectors.mac import Mac
from connectors.settings import Secret
from connectors.standard_webhooks import PUBLIC_PREFIX, decode_key, decode_secret, signature, signed
from gateway.authenticate.mistakes import Signing
from gateway.authenticate.presented import Caller, Presented, Reason, Unauthorized, is_id
from gateway.authenticate.timed_keys import TimedKeys
from gateway.config_sections import StandardWebhooks


class StandardWebhooksScheme:
    def __init__(self, source: StandardWebhooks) -> None:
        self._keys = TimedKeys(source.secrets, _shared)
        self._public_keys = TimedKeys(source.secrets, _public)
        self._tolerance = source.tolerance
        self._secrets = [timed.secret for timed in source.secrets if not timed.is_public]

    async def authenticate(self, presented: Presented) -> Caller | Unauthorized:
        given = presented.once("webhook-id", "webhook-timestamp", "webhook-signature")
        if isinstance(given, Unauthorized):
            return given
        message_id, timestamp, signatures = given
        if not is_id(message_id) or "." in message_id:  # a dot would let its part after it pass as the timestamp
            return Unauthorized(Reason.MALFORMED_ID)
        if untimely := presented.untimely(timestamp, self._tolerance):
            return untimely
        return self._verify(message_id, signed(message_id, timestamp, presented.body), presented.at, signatures)

    def _verify(self, message_id: str, message: bytes, at: float, signatures: str) -> Caller | Unauthorized:
        keys = self._keys.active(at)
        given = signatures.split(" ")
        if len(given) > 1:
            given = [one for one in given if one.startswith("v1,")][:_MOST]
        verified: int | None = None
        for place, mac in keys:  # all of them, whatever matched before: how long it takes says nothing
            expected = signature(mac, message)
            for one in given:
                if hmac.compare_digest(expected, one) and verified is None:
                    verified = place
        if verified is None:
            public_keys = self._public_keys.active(at)
            if not keys and not public_keys:
                return Unauthorized(Reason.NO_ACTIVE_SECRET)
            verified = _place_of_signer(public_keys, message, signatures)
        if verified is None:
            return Unauthorized(Reason.WRONG_SIGNATURE)
        return Caller(signed_id=message_id, secret=verified)

    def signing(self, presented: Presented) -> Signing | None:
        given = presented.once("webhook-id", "webhook-timestamp", "webhook-signature")
        if isinstance(given, Unauthorized) or not self._secrets:
            return None
        message_id, timestamp, signatures = given
        return Signing(
            secrets=[secret.reveal() for secret in self._secrets],
            key_of=decode_secret,
            algorithm="sha256",
            encoding="base64",
            prefix="v1,",
            given=signatures.split(" ")[:_MOST],
            body=presented.body,
            timestamp=timestamp,
            message=lambda body, at: signed(message_id, at, body),
        )

    async def close(self) -> None:
        """Holds nothing."""


Verify = Callable[[bytes, bytes], bool]  # whether a signature is that of a message


def _place_of_signer(keys: Sequence[tuple[int, Verify]], message: bytes, signatures: str) -> int | None:
    """Which public key verifies one of the signatures `v1a`.  How long it takes may be known: no secret is in it."""
    given = [one.removeprefix("v1a,") for one in signatures.split(" ") if keys and one.startswith("v1a,")][:_MOST]
    raw = [signature for one in given if (signature := _sixty_four_bytes(one)) is not None]
    return next((place for place, verify in keys for one in raw if verify(one, message)), None)


def _sixty_four_bytes(text: str) -> bytes | None:
    """In base64 as it is written, padded and without anything else; None otherwise."""
    try:
        raw = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        return None
    return raw if len(raw) == 64 and binascii.b2a_base64(raw, newline=False).decode() == text else None


def _shared(secret: Secret) -> Mac | None:
    text = secret.reveal()
    return None if text.startswith(PUBLIC_PREFIX) else Mac(decode_secret(text))


def _public(secret: Secret) -> Verify | None:
    text = secret.reveal()
    if not text.startswith(PUBLIC_PREFIX):
        return None
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 — it takes its time, and few have public keys
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

    key = Ed25519PublicKey.from_public_bytes(decode_key(text))

    def verify(signature: bytes, message: bytes) -> bool:
        try:
            key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    return verify


_MOST = 8  # signatures of each version that are looked at
