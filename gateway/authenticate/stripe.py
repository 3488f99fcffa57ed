"""Stripe: `Stripe-Signature: t=…,v1=…,v1=…`, HMAC-SHA256 over time and body, by any of several secrets.

Stripe signs with the old secret and the new one while one is replaced, and with `v0` what is only a test.  The library of
Stripe takes a time in the future; this takes none.
"""

import hmac

from connectors.mac import Mac
from gateway.authenticate.mistakes import Signing
from gateway.authenticate.presented import Caller, Presented, Reason, Unauthorized
from gateway.authenticate.timed_keys import TimedKeys
from gateway.config_sections import Stripe


class StripeScheme:
    """The id of the event stands in the body: a policy that keeps it can say `dedup: [id]`."""

    def __init__(self, source: Stripe) -> None:
        self._keys = TimedKeys(source.secrets, lambda secret: Mac(secret.bytes))
        self._tolerance = source.tolerance
        self._secrets = [timed.secret for timed in source.secrets]

    async def authenticate(self, presented: Presented) -> Caller | Unauthorized:
        given = presented.once("Stripe-Signature")
        if isinstance(given, Unauthorized):
            return given
        times, signatures = _parts_of(given[0])
        if len(times) != 1 or not signatures:
            return Unauthorized(Reason.MALFORMED_HEADER)
        if untimely := presented.untimely(times[0], self._tolerance):
            return untimely
        return self._verify(_message(presented.body, times[0]), presented.at, [one.encode() for one in signatures])

    def _verify(self, message: bytes, at: float, signatures: list[bytes]) -> Caller | Unauthorized:
        keys = self._keys.active(at)
        if not keys:
            return Unauthorized(Reason.NO_ACTIVE_SECRET)
        verified: int | None = None
        for place, mac in keys:  # all of them, whatever matched before: how long it takes says nothing
            expected = mac.of(message).hex().encode()
            for one in signatures:
                if hmac.compare_digest(expected, one) and verified is None:
                    verified = place
        if verified is None:
            return Unauthorized(Reason.WRONG_SIGNATURE)
        return Caller(signed_id=None, secret=verified)

    def signing(self, presented: Presented) -> Signing | None:
        given = presented.once("Stripe-Signature")
        times, signatures = ([], []) if isinstance(given, Unauthorized) else _parts_of(given[0])
        if len(times) != 1 or not signatures:
            return None
        return Signing(
            secrets=[secret.reveal() for secret in self._secrets],
            key_of=str.encode,
            algorithm="sha256",
            encoding="hex",
            prefix="",
            given=signatures,
            body=presented.body,
            timestamp=times[0],
            message=_message,
        )

    async def close(self) -> None:
        """Holds nothing."""


def _parts_of(header: str) -> tuple[list[str], list[str]]:
    """Its times, of which there is to be one, and its signatures."""
    pairs = [item.partition("=")[::2] for item in header.split(",")]
    return [value for name, value in pairs if name == "t"], [value for name, value in pairs if name == "v1"][:_MOST]


def _message(body: bytes, timestamp: str) -> bytes:
    return f"{timestamp}.".encode() + body


_MOST = 8  # signatures that are looked at
