"""The public keys of an issuer: fetched from one configured URL, and kept through its outages."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from http import HTTPStatus
from ipaddress import IPv4Network, IPv6Network
from typing import Any

import jwt
import msgspec
import structlog
from yarl import URL

from connectors.http_client import Answer, Client, words
from connectors.settings import Pem
from gateway.authenticate.presented import Reason, Unauthorized
from observability.names import LogEvent
from observability.tracing import Tracing

log = structlog.get_logger()

Fetch = Callable[[], Awaitable[bytes]]

FRESH = timedelta(minutes=5)  # after that they are fetched again, while the old ones still count
STALE = timedelta(hours=24)  # for so long they count while the issuer does not answer
AGAIN = timedelta(minutes=1)  # at most so often a key that nobody knows makes us ask
AFTER_FAILURE = timedelta(seconds=5)
LARGEST = 256 * 1024
_UNTRACED = Tracing.start(None, 0, "")
LONGEST = timedelta(seconds=5)


class Jwks:
    """Keys by their `kid`.

    Requests wait for the issuer only when there are no keys, or for a key that is not known.  One request asks and the
    others wait for its answer; and who makes up keys cannot make us ask more than once a minute.
    """

    def __init__(self, fetch: Fetch, *, algorithms: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._fetch, self._algorithms, self._clock = fetch, algorithms, clock
        self._keys: Mapping[str, jwt.PyJWK] = {}
        self._fetched_at = self._asked_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None
        self.is_away = False  # the issuer did not answer with keys when it was asked last

    async def key(self, kid: str) -> jwt.PyJWK | Unauthorized:
        if self._age() > STALE.total_seconds():
            await self._ask(not_within=AFTER_FAILURE)
        elif self._age() > FRESH.total_seconds():
            self._start_asking(not_within=AFTER_FAILURE)
        if kid not in self._keys:
            await self._ask(not_within=AGAIN)
        if self._age() > STALE.total_seconds():
            return Unauthorized(Reason.KEYS_UNAVAILABLE, undecided=True)
        if key := self._keys.get(kid):
            return key
        return Unauthorized(Reason.UNKNOWN_KEY, undecided=self._asked_at > self._fetched_at)

    def _age(self) -> float:
        return self._clock() - self._fetched_at

    async def _ask(self, *, not_within: timedelta) -> None:
        self._start_asking(not_within=not_within)
        if self._asking is not None:
            await asyncio.shield(self._asking)  # a caller that goes away does not end it for the others

    def _start_asking(self, *, not_within: timedelta) -> None:
        if self._asking is None and self._clock() - self._asked_at >= not_within.total_seconds():
            self._asked_at = self._clock()
            self._asking = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        try:
            self._keys = _keys_of(await self._fetch(), self._algorithms)
            self._fetched_at = self._asked_at
            self.is_away = False
        except (OSError, ValueError, RecursionError) as error:
            self.is_away = True
            log.warning(LogEvent.KEYS_UNAVAILABLE, error=type(error).__name__, age_seconds=_rounded(self._age()))
        finally:
            self._asking = None

    async def close(self) -> None:
        """Ends what it asks; requests that wait for the answer still get it."""
        if self._asking is not None:
            await asyncio.shield(self._asking)


class JwksClient:
    """Asks the one URL that is configured, and goes only where it may: no redirect, no proxy of the environment."""

    def __init__(self, url: str, *, allow: Sequence[IPv4Network | IPv6Network] = (), ca: Pem | None = None) -> None:
        self._url = URL(url)
        self._allow, self._ca = allow, ca
        self._client: Client | None = None
        self._closed = False

    async def fetch(self) -> bytes:
        if self._closed:
            raise ConnectionError("closed")
        if self._client is None:
            self._client = Client(
                self._url, allow=self._allow, ca=self._ca, timeout=LONGEST, concurrency=1, agent="sluicegate"
            )
        headers = {"accept": "application/json"}
        answer = await self._client.send("GET", self._url, headers=headers, tracing=_UNTRACED, read=LARGEST)
        if not isinstance(answer, Answer):
            raise ConnectionError(answer.reason)
        if answer.status != HTTPStatus.OK:
            raise ValueError(words(answer.status))
        if not answer.whole:
            raise ValueError("answered more than a set of keys can be")
        return answer.body

    async def close(self) -> None:
        self._closed = True
        if self._client is not None:
            await self._client.close()


def _keys_of(answer: bytes, algorithms: Sequence[str]) -> Mapping[str, jwt.PyJWK]:
    """The keys that verify signatures by one of `algorithms`; others are not ours to complain about."""
    keys: dict[str, jwt.PyJWK] = {}
    for described in msgspec.json.decode(answer, type=_KeySet).keys:
        algorithm = _algorithm_of(described, algorithms)
        kid = described.get("kid")
        if algorithm is None or not isinstance(kid, str):
            continue
        with suppress(jwt.PyJWTError, ValueError, TypeError, KeyError):
            keys[kid] = jwt.PyJWK(described, algorithm=algorithm)
    if not keys:
        raise ValueError("answered no key that can be used")
    return keys


def _algorithm_of(described: Mapping[str, Any], algorithms: Sequence[str]) -> str | None:
    """The one algorithm that a key verifies: its own, else the one of its kind.  Never one that a token names."""
    operations = described.get("key_ops", ["verify"])
    if described.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        return None
    if "d" in described:
        return None  # a private key is no key to trust
    kind, curve, own = described.get("kty"), described.get("crv"), described.get("alg")
    fitting = [
        algorithm
        for algorithm in algorithms
        if (kind == "RSA" and algorithm.startswith(("RS", "PS")))
        or (kind == "EC" and algorithm == _BY_CURVE.get(str(curve)))
        or (kind == "OKP" and curve == "Ed25519" and algorithm == "EdDSA")
    ]
    if own is not None:
        return own if own in fitting else None
    return fitting[0] if fitting else None


def _rounded(seconds: float) -> int | None:
    return None if seconds == float("inf") else round(seconds)


class _KeySet(msgspec.Struct):
    keys: list[dict[str, Any]]


_BY_CURVE = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}
