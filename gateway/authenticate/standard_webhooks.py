"""Standard Webhooks 1.0, `v1`: HMAC-SHA256 over id, timestamp and body, by any of several secrets.

The libraries of the specification raise on malformed input and read timestamps and base64 loosely, so this is our own;
what they sign is accepted.
"""

import hmac

from connectors.mac import Mac
from connectors.standard_webhooks import decode_secret, signature, signed
from gateway.authenticate.mistakes import Signing
from gateway.authenticate.presented import Caller, Presented, Reason, Unauthorized, is_id
from gateway.authenticate.timed_keys import TimedKeys
from gateway.config_sections import StandardWebhooks


class StandardWebhooksScheme:
    def __init__(self, source: StandardWebhooks) -> None:
        self._keys = TimedKeys(source.secrets, lambda secret: Mac(secret.signing_key()))
        self._tolerance = source.tolerance
        self._secrets = [timed.secret for timed in source.secrets]

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
        if not keys:
            return Unauthorized(Reason.NO_ACTIVE_SECRET)
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
            return Unauthorized(Reason.WRONG_SIGNATURE)
        return Caller(signed_id=message_id, secret=verified)

    def signing(self, presented: Presented) -> Signing | None:
        given = presented.once("webhook-id", "webhook-timestamp", "webhook-signature")
        if isinstance(given, Unauthorized):
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


_MOST = 8  # signatures that are looked at
