"""A key in a header, `id.secret`: the id is public and finds the key, the secret is compared as its digest."""

import hashlib
import hmac

from gateway.authenticate.presented import Caller, Presented, Reason, Unauthorized
from gateway.authenticate.timed_keys import ALWAYS, Span, span_of
from gateway.config_sections import ApiKey


class ApiKeyScheme:
    """Proves who posts, not what: the body is as safe as the connection that brought it."""

    def __init__(self, source: ApiKey) -> None:
        self._header = source.header
        self._keys: dict[str, tuple[int, bytes, Span]] = {}
        for place, key in enumerate(source.keys):
            identity, _, secret = key.secret.reveal().partition(".")
            self._keys[identity] = place, _digest(secret), span_of(key)

    async def authenticate(self, presented: Presented) -> Caller | Unauthorized:
        given = presented.once(self._header)
        if isinstance(given, Unauthorized):
            return given
        identity, _, secret = given[0].partition(".")
        place, digest, (begins, ends) = self._keys.get(identity, _NOBODYS)
        if not hmac.compare_digest(_digest(secret), digest):
            return Unauthorized(Reason.WRONG_KEY)
        if not begins <= presented.at < ends:
            return Unauthorized(Reason.NO_ACTIVE_SECRET)
        return Caller(signed_id=None, secret=place)

    async def close(self) -> None:
        """Holds nothing."""


def _digest(secret: str) -> bytes:
    """A plain hash is enough: a key is random, not a password."""
    return hashlib.sha256(secret.encode()).digest()


_NOBODYS = 0, bytes(32), ALWAYS  # a digest that nobody knows a secret for
