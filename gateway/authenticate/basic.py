"""HTTP Basic (RFC 7617): a user and a password, which are as safe as the connection that brought them."""

import base64
import hashlib
import hmac
import re

from connectors.settings import Secret
from gateway.authenticate.presented import Caller, Presented, Reason, Unauthorized
from gateway.authenticate.timed_keys import TimedKeys
from gateway.config_sections import Basic


class BasicScheme:
    """Proves who posts, not what.  User and password are both compared, whichever of them is wrong."""

    def __init__(self, source: Basic) -> None:
        self._user = _digest(source.user.bytes)
        self._passwords = TimedKeys(source.secrets, _digest_of)

    async def authenticate(self, presented: Presented) -> Caller | Unauthorized:
        given = presented.once("authorization")
        if isinstance(given, Unauthorized):
            return given
        if not (login := _BASIC.fullmatch(given[0])):
            return Unauthorized(Reason.MALFORMED_HEADER)
        user, colon, password = base64.b64decode(login[1] + "=" * (-len(login[1]) % 4)).partition(b":")
        passwords = self._passwords.active(presented.at)
        if not passwords:
            return Unauthorized(Reason.NO_ACTIVE_SECRET)
        is_user, given_password = hmac.compare_digest(_digest(user), self._user), _digest(password)
        verified: int | None = None
        for place, digest in passwords:  # all of them, whatever matched before: how long it takes says nothing
            if hmac.compare_digest(given_password, digest) and verified is None:
                verified = place
        if verified is None or not (is_user and colon):
            return Unauthorized(Reason.WRONG_LOGIN)
        return Caller(signed_id=None, secret=verified)

    async def close(self) -> None:
        """Holds nothing."""


def _digest(given: bytes) -> bytes:
    return hashlib.sha256(given).digest()


def _digest_of(secret: Secret) -> bytes:
    return _digest(secret.bytes)


_BASIC = re.compile(r"[Bb][Aa][Ss][Ii][Cc] +((?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?)")
