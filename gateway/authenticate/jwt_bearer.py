"""A JSON Web Token of an issuer, as `Authorization: Bearer`, one for each post.

A token proves who posts.  Where the source names `body_hash`, it also proves what: the claim holds the SHA-256 of the
body.  Without that, whoever intercepts a token can post something else with it, once, as long as it lives: its `jti` is
the id of the message, so the second post with it is the same event or a conflict.
"""

import hashlib
import hmac
import re
from datetime import timedelta
from typing import Any

import jwt

from gateway.authenticate.jwks import Fetch, Jwks, JwksClient
from gateway.authenticate.presented import Caller, Presented, Reason, Unauthorized, is_id
from gateway.config_sections import Jwt

LONGEST_LIFE = timedelta(minutes=5)  # from iat to exp
LEEWAY = timedelta(seconds=30)  # how far the issuer's clock may be from ours


class JwtScheme:
    def __init__(self, source: Jwt, *, fetch: Fetch | None = None) -> None:
        self._source = source
        self._type = source.typ.upper()
        self._client = JwksClient(source.jwks, allow=source.allow, ca=source.ca)
        self._keys = Jwks(fetch or self._client.fetch, algorithms=source.algorithms)

    async def authenticate(self, presented: Presented) -> Caller | Unauthorized:
        given = presented.once("authorization")
        if isinstance(given, Unauthorized):
            return given
        if not (bearer := _BEARER.fullmatch(given[0])):
            return Unauthorized(Reason.MALFORMED_HEADER)
        token = bearer[1]
        head = _head_of(token, self._type)
        if head is None:
            return Unauthorized(Reason.WRONG_TOKEN)
        key = await self._keys.key(head["kid"])
        if isinstance(key, Unauthorized):
            return key
        return self._judge(self._claims_of(token, key), presented.body)

    def _claims_of(self, token: str, key: jwt.PyJWK) -> dict[str, Any] | Unauthorized:
        """The claims of a token that `key` signed, with the key's own algorithm, whatever the token says of it."""
        try:
            claims = jwt.decode(
                token,
                key=key.key,
                algorithms=[key.algorithm_name],
                issuer=self._source.issuer,
                audience=self._source.audience,
                leeway=LEEWAY,
                options={
                    "require": ["exp", "iat", "iss", "aud", "jti"],
                    "strict_aud": True,
                    "enforce_minimum_key_length": True,
                },
            )
            is_short = int(claims["exp"]) - int(claims["iat"]) <= LONGEST_LIFE.total_seconds()
        except (jwt.ExpiredSignatureError, jwt.ImmatureSignatureError):
            return Unauthorized(Reason.EXPIRED_TOKEN)
        except _REFUSED:
            return Unauthorized(Reason.WRONG_TOKEN)
        return claims if is_short else Unauthorized(Reason.EXPIRED_TOKEN)

    def _judge(self, claims: dict[str, Any] | Unauthorized, body: bytes) -> Caller | Unauthorized:
        if isinstance(claims, Unauthorized):
            return claims
        if not isinstance(claims["jti"], str) or not is_id(claims["jti"]):
            return Unauthorized(Reason.MALFORMED_ID)
        if self._source.body_hash is not None:
            digest = claims.get(self._source.body_hash)
            if not isinstance(digest, str) or not hmac.compare_digest(
                hashlib.sha256(body).hexdigest().encode(), digest.lower().encode(errors="replace")
            ):
                return Unauthorized(Reason.WRONG_BODY)
        return Caller(signed_id=claims["jti"], secret=0)

    @property
    def lacks_keys(self) -> bool:
        return self._keys.is_away

    async def close(self) -> None:
        await self._keys.close()
        await self._client.close()


def _head_of(token: str, wanted: str) -> dict[str, Any] | None:
    """What a token says of its key, which is looked up by it and never taken from it (`jku`, `jwk`, `x5u`, `x5c`)."""
    try:
        head = jwt.get_unverified_header(token)
    except _REFUSED:
        return None
    kid, kind = head.get("kid"), head.get("typ")
    if not isinstance(kid, str) or not is_id(kid) or not isinstance(kind, str) or kind.upper() != wanted:
        return None
    return head


_BEARER = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+)")
_REFUSED = (jwt.PyJWTError, ValueError, TypeError, KeyError, OverflowError, RecursionError)
"""PyJWT's own, and what its reading of odd but signed JSON lets through."""
