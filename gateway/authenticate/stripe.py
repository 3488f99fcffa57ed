"""Stripe: `Stripe-Signature: t=…,v1=…,v1=…`, HMAC-SHA256 over time and body, by any of several secrets.

Stripe signs with the old secret and the new one while one is replaced, and with `v0` what is only a test.  The library of
Stripe takes a time in the future; this takes none.
"""

import hmac

from connectors.mac import Mac
from gateway.authenticate.presented import Caller, Presented, Reason, Unauthorized
from gateway.authenticate.timed_keys import TimedKeys
from gateway.config_sections import Stripe


class StripeScheme:
    """The id of the event stands in the body: a policy that keeps it can say `dedup: [id]`."""

    def __init__(self, source: Stripe) -> None:
        self._keys = TimedKeys(source.secrets, lambda secret: Mac(secret.bytes))
        self._tolerance = source.tolerance

    async def authenticate(self, presented: Presented) -> Caller | Unauthorized:
        given = presented.once("Stripe-Signature")
        if isinstance(given, Unauthorized):
            return given
        pairs = [item.partition("=")[::2] for item in given[0].split(",")]
        times = [value for name, value in pairs if name == "t"]
        signatures = [value.encode() for name, value in pairs if name == "v1"][:_MOST]
        if len(times) != 1 or not signatures:
            return Unauthorized(Reason.MALFORMED_HEADER)
        if untimely := presented.untimely(times[0], self._tolerance):
            return untimely
        return self._verify(f"{times[0]}.".encode("ascii") + presented.body, presented.at, signatures)

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

    async def close(self) -> None:
        """Holds nothing."""


_MOST = 8  # signatures that are looked at
