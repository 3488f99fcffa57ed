"""Tokens of an issuer: one for each post, signed by a key that the issuer publishes, believed in nothing else."""

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import joserfc.jwt
import jwt
import pytest
import pytest_asyncio
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc.jwk import JWKRegistry, KeySet
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.authenticate import Caller, Presented, Reason, Scheme, Unauthorized, scheme_for
from gateway.authenticate.jwks import Jwks, JwksClient
from gateway.authenticate.jwt_bearer import JwtScheme
from gateway.config import Jwt
from tests.door import configured
from tests.serving import CONFIGURATION, order, serving

BODY = b'{"unit": "CHEM", "state": "up"}'
ISSUER, AUDIENCE = "https://id.lab.example", "sluicegate"
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
WEAK = rsa.generate_private_key(public_exponent=65537, key_size=1024)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()


def published(key: Any, kid: str, **described: object) -> dict[str, object]:
    by_kind = {rsa.RSAPrivateKey: "RS256", ec.EllipticCurvePrivateKey: "ES256", ed25519.Ed25519PrivateKey: "EdDSA"}
    algorithm = next(name for kind, name in by_kind.items() if isinstance(key, kind))
    jwk = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key(), as_dict=True)
    return {**jwk, "kid": kid, **described}


@dataclass
class Issuer:
    """A server that publishes keys on loopback, and does it as badly as a test asks for."""

    keys: list[dict[str, object]] = field(default_factory=list)
    answer: Callable[[], web.StreamResponse] | None = None
    asked: int = 0
    url: str = ""

    async def keys_asked(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        await asyncio.sleep(0.01)
        return self.answer() if self.answer else web.json_response({"keys": self.keys})

    async def redirected(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"keys": self.keys})


@pytest_asyncio.fixture
async def issuer() -> AsyncIterator[Issuer]:
    issuer = Issuer([published(RSA, "rsa", alg="RS256", use="sig"), published(EC, "ec")])
    app = web.Application()
    app.router.add_get("/keys", issuer.keys_asked)
    app.router.add_get("/elsewhere", issuer.redirected)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    issuer.url = f"http://127.0.0.1:{runner.addresses[0][1]}/keys"
    yield issuer
    await runner.cleanup()


@asynccontextmanager
async def lab(issuer: Issuer, more: str = "") -> AsyncIterator[Scheme]:
    source = f"posts: {{scheme: jwt, issuer: '{ISSUER}', audience: {AUDIENCE}, jwks: '{issuer.url}', allow: [127.0.0.1/32], accepts: [only]{more}}}\n"
    config = configured(sources=source)
    scheme = scheme_for(config.sources["posts"], config.serve)
    try:
        yield scheme
    finally:
        await scheme.close()


def claims(**changes: object) -> dict[str, Any]:
    now = int(time.time())
    whole = {"iss": ISSUER, "aud": AUDIENCE, "iat": now, "exp": now + 60, "jti": "token-1", **changes}
    return {name: value for name, value in whole.items() if value is not None}


def token(
    head: dict[str, object] | None = None,
    *,
    key: Any = RSA,
    algorithm: str = "RS256",
    kid: str = "rsa",
    **changes: object,
) -> str:
    return jwt.encode(claims(**changes), key, algorithm=algorithm, headers={"kid": kid, **(head or {})})


def bearing(value: str, body: bytes = BODY, *, name: str = "Bearer") -> Presented:
    headers = CIMultiDict({"Authorization": f"{name} {value}"})
    return Presented(headers=CIMultiDictProxy(headers), body=body, token=None, peer=None, at=time.time())


LOOPBACK = [ip_network("127.0.0.1/32")]
WRONG = Unauthorized(Reason.WRONG_TOKEN)


async def test_a_token_of_the_issuer_proves_who_posts_and_signs_its_id(issuer: Issuer) -> None:
    async with lab(issuer) as door:
        assert await door.authenticate(bearing(token())) == Caller("token-1", secret=0)
        assert await door.authenticate(bearing(token(), name="bearer")) == Caller("token-1", secret=0)
        by_curve = token(key=EC, algorithm="ES256", kid="ec", jti="token-2")
        assert await door.authenticate(bearing(by_curve)) == Caller("token-2", secret=0)
    assert issuer.asked == 1


def from_now(seconds: int) -> Callable[[], int]:
    """An instant as seen when the test runs: it may be minutes after it was collected."""
    return lambda: int(time.time()) + seconds


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"iss": "https://id.other.example"}, Reason.WRONG_TOKEN),
        ({"iss": ""}, Reason.WRONG_TOKEN),
        ({"iss": None}, Reason.WRONG_TOKEN),
        ({"aud": "another"}, Reason.WRONG_TOKEN),
        ({"aud": [AUDIENCE]}, Reason.WRONG_TOKEN),
        ({"aud": None}, Reason.WRONG_TOKEN),
        ({"exp": None}, Reason.WRONG_TOKEN),
        ({"iat": None}, Reason.WRONG_TOKEN),
        ({"jti": None}, Reason.WRONG_TOKEN),
        ({"jti": 7}, Reason.WRONG_TOKEN),
        ({"jti": ""}, Reason.MALFORMED_ID),
        ({"jti": "x" * 257}, Reason.MALFORMED_ID),
        ({"jti": "é"}, Reason.MALFORMED_ID),
        ({"exp": from_now(-60)}, Reason.EXPIRED_TOKEN),
        ({"exp": from_now(30 * 365 * 86400)}, Reason.EXPIRED_TOKEN),
        ({"exp": from_now(400)}, Reason.EXPIRED_TOKEN),
        ({"iat": from_now(120), "exp": from_now(180)}, Reason.EXPIRED_TOKEN),
        ({"nbf": from_now(120)}, Reason.EXPIRED_TOKEN),
        ({"exp": "soon"}, Reason.WRONG_TOKEN),
        ({"exp": float("nan")}, Reason.WRONG_TOKEN),
        ({"exp": float("inf")}, Reason.WRONG_TOKEN),
        ({"iat": float("-inf")}, Reason.WRONG_TOKEN),
        ({"iat": [1]}, Reason.WRONG_TOKEN),
    ],
)
async def test_every_claim_is_required_and_must_be_right(
    issuer: Issuer, changes: dict[str, object], reason: Reason
) -> None:
    told = {name: value() if callable(value) else value for name, value in changes.items()}
    async with lab(issuer) as door:
        assert await door.authenticate(bearing(encoded(claims(**told)))) == Unauthorized(reason)


def encoded(payload: object, head: dict[str, object] | None = None) -> str:
    """Signed by the issuer's key, whatever is in it: PyJWT refuses to write some of what it must refuse to read."""
    parts = [{"alg": "RS256", "typ": "JWT", "kid": "rsa", **(head or {})}, payload]
    content = b".".join(unpadded(json.dumps(part).encode()) for part in parts)
    signature = jwt.get_algorithm_by_name("RS256").sign(content, RSA)
    return (content + b"." + unpadded(signature)).decode()


def unpadded(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


@pytest.mark.parametrize(
    "head",
    [
        {"typ": None},
        {"typ": "at+jwt"},
        {"kid": None},
        {"kid": 7},
        {"kid": ""},
        {"kid": "x" * 300},
        {"crit": ["exp2"], "exp2": 1},
        {"crit": "exp"},
        {"alg": "none"},
        {"alg": "HS256"},
        {"alg": "PS256"},
        {"alg": "ES256"},
        {"alg": 1},
        {"b64": False, "crit": ["b64"]},
    ],
)
async def test_what_a_token_says_of_itself_changes_nothing_for_the_better(
    issuer: Issuer, head: dict[str, object]
) -> None:
    async with lab(issuer) as door:
        assert await door.authenticate(bearing(encoded(claims(), head))) == WRONG


async def test_the_public_key_is_no_secret_to_sign_with(issuer: Issuer) -> None:
    """The confusion of RS256 with HS256."""
    pem = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    content = b".".join(
        unpadded(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT", "kid": "rsa"}, claims())
    )
    forged = content + b"." + unpadded(jwt.get_algorithm_by_name("HS256").sign(content, pem))
    async with lab(issuer) as door:
        assert await door.authenticate(bearing(forged.decode())) == WRONG
        assert await door.authenticate(bearing(content.decode() + ".AA")) == WRONG


async def test_a_token_cannot_bring_its_own_key(issuer: Issuer) -> None:
    own = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    heads: list[dict[str, object]] = [
        {"jwk": published(own, "rsa")},
        {"jku": issuer.url + "/own"},
        {"x5u": issuer.url + "/own"},
    ]
    for head in heads:
        async with lab(issuer) as door:
            assert await door.authenticate(bearing(token(head, key=own))) == WRONG
    assert issuer.asked == 3  # the configured URL, once each


@pytest.mark.parametrize(
    "value",
    [
        "",
        "x",
        "a.b",
        "a.b.c.d",
        "a.b.c=",
        "a..c",
        "a.b.c d",
        "é.b.c",
        "a.b.c+",
        "eyJ.eyJ.eyJ",
        "W10.W10.W10",
        "bnVsbA.e30.AA",
    ],
)
async def test_what_is_no_token_is_refused_before_any_key_is_looked_for(issuer: Issuer, value: str) -> None:
    async with lab(issuer) as door:
        answer = await door.authenticate(bearing(value))
        assert isinstance(answer, Unauthorized)
        assert answer.reason in {Reason.MALFORMED_HEADER, Reason.WRONG_TOKEN}
        assert await door.authenticate(bearing(token(), name="Basic")) == Unauthorized(Reason.MALFORMED_HEADER)
        assert await door.authenticate(bearing(token(), name="")) == Unauthorized(Reason.MALFORMED_HEADER)
    assert issuer.asked == 0


async def test_a_body_hash_binds_the_body(issuer: Issuer) -> None:
    right = hashlib.sha256(BODY).hexdigest()
    async with lab(issuer, ", body_hash: request_body_sha256") as door:
        for digest, accepted in {
            right: True,
            right.upper(): True,
            hashlib.sha256(b"{}").hexdigest(): False,
            "": False,
            "é": False,
            "\ud800": False,
            None: False,
        }.items():
            answer = await door.authenticate(bearing(encoded(claims(request_body_sha256=digest))))
            assert answer == (Caller("token-1", secret=0) if accepted else Unauthorized(Reason.WRONG_BODY))
        assert await door.authenticate(bearing(token(request_body_sha256=[right]))) == Unauthorized(Reason.WRONG_BODY)


# ── the issuer's keys ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "described",
    [
        {"use": "enc"},
        {"key_ops": ["encrypt"]},
        {"key_ops": "verify"},
        {"alg": "RS512"},
        {"alg": "HS256"},
        {"kty": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"},
        {"kty": "EC"},
        {"kty": ["RSA"]},
        {"kid": 7},
        {"n": "!"},
        {"d": "AQAB"},
    ],
)
async def test_a_key_that_is_not_for_such_signatures_is_not_used(issuer: Issuer, described: dict[str, object]) -> None:
    issuer.keys = [{**published(RSA, "rsa"), **described}, published(EC, "ec")]
    async with lab(issuer) as door:
        assert await door.authenticate(bearing(token())) == Unauthorized(Reason.UNKNOWN_KEY)
        assert isinstance(await door.authenticate(bearing(token(key=EC, algorithm="ES256", kid="ec"))), Caller)


async def test_a_key_that_is_too_short_proves_nothing(issuer: Issuer) -> None:
    issuer.keys = [published(WEAK, "rsa")]
    content, _, _ = encoded(claims()).rpartition(".")
    signature = unpadded(jwt.get_algorithm_by_name("RS256").sign(content.encode(), WEAK)).decode()
    async with lab(issuer) as door:
        assert await door.authenticate(bearing(f"{content}.{signature}")) == WRONG


async def test_only_the_algorithms_that_are_configured_count(issuer: Issuer) -> None:
    issuer.keys = [published(ED, "ed"), published(EC, "ec")]
    edwards = token(key=ED, algorithm="EdDSA", kid="ed")
    async with lab(issuer) as door:
        assert await door.authenticate(bearing(edwards)) == Unauthorized(Reason.UNKNOWN_KEY)
    async with lab(issuer, ", algorithms: [EdDSA]") as door:
        assert isinstance(await door.authenticate(bearing(edwards)), Caller)


@pytest.mark.parametrize(
    "answer",
    [
        lambda: web.Response(status=503),
        lambda: web.Response(status=302, headers={"Location": "/elsewhere"}),
        lambda: web.Response(text="<html>"),
        lambda: web.Response(text="[" * 100_000),
        lambda: web.Response(body=b"{" + b" " * 300_000),
        lambda: web.json_response({"keys": []}),
        lambda: web.json_response({"keys": ["x"]}),
    ],
    ids=["away", "redirect", "html", "deep", "large", "none", "nonsense"],
)
async def test_an_issuer_without_keys_is_our_trouble_and_not_the_senders(
    issuer: Issuer, answer: Callable[[], web.StreamResponse]
) -> None:
    issuer.answer = answer
    async with lab(issuer) as door:
        assert await door.authenticate(bearing(token())) == Unauthorized(Reason.KEYS_UNAVAILABLE, undecided=True)


async def test_an_issuer_that_does_not_listen_is_our_trouble_too(issuer: Issuer, unused_tcp_port: int) -> None:
    issuer.url = f"http://127.0.0.1:{unused_tcp_port}/keys"
    async with lab(issuer) as door:
        assert await door.authenticate(bearing(token())) == Unauthorized(Reason.KEYS_UNAVAILABLE, undecided=True)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def go(self, by: timedelta) -> None:
        self.now += by.total_seconds()


@asynccontextmanager
async def keys_of(issuer: Issuer, clock: Clock) -> AsyncIterator[Jwks]:
    client = JwksClient(issuer.url, allow=LOOPBACK)
    keys = Jwks(client.fetch, algorithms=["RS256", "ES256"], clock=clock)
    try:
        yield keys
    finally:
        await keys.close()
        await client.close()


async def settled(keys: Jwks) -> None:
    while keys._asking is not None:
        await asyncio.sleep(0.005)


async def test_requests_that_come_together_ask_the_issuer_once(issuer: Issuer) -> None:
    async with keys_of(issuer, Clock()) as keys:
        found = await asyncio.gather(*[keys.key("rsa") for _ in range(50)])
    assert all(isinstance(key, jwt.PyJWK) for key in found)
    assert issuer.asked == 1


async def test_a_request_that_goes_away_does_not_end_the_asking_for_the_others(issuer: Issuer) -> None:
    async with keys_of(issuer, Clock()) as keys:
        first = asyncio.create_task(keys.key("rsa"))
        await asyncio.sleep(0)
        second = asyncio.create_task(keys.key("rsa"))
        await asyncio.sleep(0)
        first.cancel()
        assert isinstance(await second, jwt.PyJWK)
    assert issuer.asked == 1


async def test_a_reload_of_the_configuration_hurts_no_request_that_is_under_way(issuer: Issuer) -> None:
    async with lab(issuer) as door:
        waiting = asyncio.create_task(door.authenticate(bearing(token())))
        await asyncio.sleep(0.005)
        await door.close()
        assert await waiting == Caller("token-1", secret=0)
        late = token(kid="made-up")
        assert await door.authenticate(bearing(late)) == Unauthorized(Reason.UNKNOWN_KEY)
    async with lab(issuer) as door:
        await door.close()
        assert await door.authenticate(bearing(token())) == Unauthorized(Reason.KEYS_UNAVAILABLE, undecided=True)


async def test_a_new_key_of_the_issuer_is_found_within_a_minute(issuer: Issuer) -> None:
    clock = Clock()
    async with keys_of(issuer, clock) as keys:
        await keys.key("rsa")
        issuer.keys.append(published(RSA, "new"))
        clock.go(timedelta(minutes=1))
        assert isinstance(await keys.key("new"), jwt.PyJWK)


async def test_whoever_makes_up_keys_makes_us_ask_once_a_minute_at_most(issuer: Issuer) -> None:
    clock = Clock()
    async with keys_of(issuer, clock) as keys:
        for number in range(100):
            assert await keys.key(f"made-up-{number}") == Unauthorized(Reason.UNKNOWN_KEY)
            clock.go(timedelta(seconds=1))
    assert issuer.asked == 2


async def test_keys_are_asked_for_again_without_making_anybody_wait(issuer: Issuer) -> None:
    clock = Clock()
    async with keys_of(issuer, clock) as keys:
        await keys.key("rsa")
        clock.go(timedelta(minutes=6))
        started = asyncio.get_running_loop().time()
        assert isinstance(await keys.key("rsa"), jwt.PyJWK)
        assert asyncio.get_running_loop().time() - started < 1
        await settled(keys)
        assert issuer.asked == 2


async def test_a_key_that_the_issuer_took_back_stops_counting(issuer: Issuer) -> None:
    clock = Clock()
    async with keys_of(issuer, clock) as keys:
        await keys.key("rsa")
        issuer.keys = [published(EC, "ec")]
        clock.go(timedelta(minutes=6))
        await keys.key("rsa")
        await settled(keys)
        assert await keys.key("rsa") == Unauthorized(Reason.UNKNOWN_KEY)


async def test_old_keys_count_for_a_day_while_the_issuer_is_away_and_no_longer(issuer: Issuer) -> None:
    clock = Clock()
    async with keys_of(issuer, clock) as keys:
        await keys.key("rsa")
        issuer.answer = lambda: web.Response(status=503)
        clock.go(timedelta(hours=23))
        assert isinstance(await keys.key("rsa"), jwt.PyJWK)
        await settled(keys)
        assert await keys.key("new") == Unauthorized(
            Reason.UNKNOWN_KEY, undecided=True
        )  # it may be the issuer's newest
        clock.go(timedelta(hours=2))
        assert await keys.key("rsa") == Unauthorized(Reason.KEYS_UNAVAILABLE, undecided=True)
        issuer.answer = None
        clock.go(timedelta(seconds=5))
        assert isinstance(await keys.key("rsa"), jwt.PyJWK)


async def test_an_issuer_that_is_away_is_not_asked_by_every_request(issuer: Issuer) -> None:
    issuer.answer = lambda: web.Response(status=503)
    async with keys_of(issuer, Clock()) as keys:
        for _ in range(20):
            await keys.key("rsa")
    assert issuer.asked == 1


async def test_the_keys_are_fetched_from_where_the_configuration_lets_them_be(issuer: Issuer) -> None:
    """An issuer's name that leads inside must not make us ask there."""
    client = JwksClient(issuer.url)
    with pytest.raises(ConnectionError, match="not a public one"):
        await client.fetch()
    await client.close()
    assert issuer.asked == 0


async def test_an_issuer_that_is_away_is_told_until_it_is_back(issuer: Issuer) -> None:
    clock = Clock()
    async with keys_of(issuer, clock) as keys:
        issuer.answer = lambda: web.Response(status=503)
        await keys.key("rsa")
        assert keys.is_away
        issuer.answer = None
        clock.go(timedelta(seconds=5))
        await keys.key("rsa")
        assert not keys.is_away


async def test_a_token_for_something_else_does_not_count(issuer: Issuer) -> None:
    async with lab(issuer, ", typ: at+jwt") as door:
        assert await door.authenticate(bearing(encoded(claims(), {"typ": "at+jwt"}))) == Caller("token-1", secret=0)
        assert await door.authenticate(bearing(encoded(claims(), {"typ": "AT+JWT"}))) == Caller("token-1", secret=0)
        assert await door.authenticate(bearing(encoded(claims()))) == WRONG


async def test_known_keys_outlive_a_reload_while_the_issuer_is_away_and_that_is_measured(
    issuer: Issuer, tmp_path: Path, dsn: str
) -> None:
    source = f"  lab: {{{{scheme: jwt, issuer: '{ISSUER}', audience: {AUDIENCE}, jwks: '{issuer.url}', allow: [127.0.0.1/32], accepts: [purchase-order]}}}}\npolicies:"
    async with serving(
        tmp_path, dsn, "http://127.0.0.1:1", configured=CONFIGURATION.replace("policies:", source, 1)
    ) as program:

        async def post(number: int, kid: str = "rsa") -> int:
            headers = {"Authorization": f"Bearer {token(jti=f'token-{number}', kid=kid)}"}
            async with program.session.post(
                f"{program.address}/hooks/lab", json=order(id=number), headers=headers
            ) as answer:
                return answer.status

        async def away() -> list[str]:
            await program.service._report_secrets()
            async with program.session.get(f"{program.address}/metrics") as answer:
                lines = (await answer.text()).splitlines()
            return [line.rpartition(" ")[2] for line in lines if line.startswith("sluicegate_issuer_away{")]

        assert (await post(1), await away()) == (202, ["0.0"])
        issuer.answer = lambda: web.Response(status=503)
        path = tmp_path / "sluicegate.yaml"
        path.write_text(path.read_text().replace("body: 64KiB", "body: 32KiB"))
        await program.service.reload()
        assert program.service._config.sources["odoo"].body == 32 * 1024
        assert await post(2) == 202
        path.write_text(
            path.read_text().replace("accepts: [purchase-order]}", "accepts: [purchase-order], body: 1KiB}")
        )
        await program.service.reload()
        assert (await post(3), await away()) == (503, ["1.0"])  # what changed begins anew


# ── against another library ────────────────────────────────────────────────────────────────────────

of_its_old_name = pytest.mark.filterwarnings("ignore:EdDSA is deprecated")  # RFC 9864 calls it Ed25519
EVERY = "RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, ES512, EdDSA"
OF_JOSERFC = {
    "RS256": ("RSA", 2048), "RS384": ("RSA", 2048), "RS512": ("RSA", 2048), "PS256": ("RSA", 2048), "PS384": ("RSA", 2048),
    "PS512": ("RSA", 2048), "ES256": ("EC", "P-256"), "ES384": ("EC", "P-384"), "ES512": ("EC", "P-521"), "EdDSA": ("OKP", "Ed25519"),
}  # fmt: skip


@of_its_old_name
@pytest.mark.parametrize("algorithm", OF_JOSERFC)
async def test_what_joserfc_signs_we_accept_by_the_keys_that_it_publishes(issuer: Issuer, algorithm: str) -> None:
    kind, size = OF_JOSERFC[algorithm]
    key = JWKRegistry.generate_key(kind, size, {"kid": "theirs", "use": "sig", "alg": algorithm}, private=True)
    issuer.keys = KeySet([key]).as_dict(private=False)["keys"]
    signed = joserfc.jwt.encode(
        {"alg": algorithm, "typ": "JWT", "kid": "theirs"}, claims(), key, algorithms=[algorithm]
    )
    async with lab(issuer, f", algorithms: [{EVERY}]") as door:
        assert await door.authenticate(bearing(signed)) == Caller("token-1", secret=0)
        content, _, signature = signed.rpartition(".")
        assert await door.authenticate(bearing(f"{content}.{signature[:-4]}AAAA")) == WRONG
        head = signed.partition(".")[0]
        changed = unpadded(json.dumps(claims(jti="token-2")).encode()).decode()
        assert await door.authenticate(bearing(f"{head}.{changed}.{signature}")) == WRONG


@of_its_old_name
@pytest.mark.parametrize(
    ("key", "kid", "algorithm"),
    [(RSA, "rsa", "RS256"), (RSA, "rsa", "PS256"), (EC, "ec", "ES256"), (ED, "ed", "EdDSA")],
)
async def test_what_we_accept_joserfc_accepts(issuer: Issuer, key: Any, kid: str, algorithm: str) -> None:
    issuer.keys = [{**published(key, kid), "alg": algorithm}]
    signed = token(key=key, kid=kid, algorithm=algorithm)
    async with lab(issuer, f", algorithms: [{EVERY}]") as door:
        assert isinstance(await door.authenticate(bearing(signed)), Caller)
    theirs = joserfc.jwt.decode(signed, KeySet.import_key_set({"keys": issuer.keys}), algorithms=[algorithm])
    assert theirs.claims["jti"] == "token-1"


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        ({}, {"exp": None}),  # a token that never ends
        ({}, {"jti": None}),  # one that cannot be recognised when it comes again
        ({}, {"exp": 4102444800}),  # one that lives for decades
        ({"typ": "at+jwt"}, {}),  # one that is for something else
        ({}, {"iat": None}),
    ],
)
async def test_what_joserfc_accepts_and_we_do_not(
    issuer: Issuer, head: dict[str, object], changes: dict[str, object]
) -> None:
    """Each is a way to post for longer, or more often, than the issuer meant."""
    signed = encoded(claims(**changes), head)
    keys = KeySet.import_key_set({"keys": issuer.keys})
    assert joserfc.jwt.decode(signed, keys, algorithms=["RS256"]).claims["iss"] == ISSUER
    async with lab(issuer) as door:
        assert isinstance(await door.authenticate(bearing(signed)), Unauthorized)


ELSEWHERE = configured(
    sources="posts: {scheme: jwt, issuer: i, audience: a, jwks: 'https://id.example/', accepts: [only]}\n"
).sources["posts"]


@given(
    parts=st.lists(
        st.binary(max_size=60)
        | st.sampled_from([b'{"alg":"RS256","kid":"a","typ":"JWT"}', b"[" * 2900, b"{}", b'{"kid":{}}']),
        min_size=3,
        max_size=3,
    )
)
@settings(max_examples=200, deadline=None)
async def test_no_token_raises(parts: list[bytes]) -> None:
    async def no_keys() -> bytes:
        return json.dumps({"keys": [published(RSA, "a")]}).encode()

    assert isinstance(ELSEWHERE, Jwt)
    door = JwtScheme(ELSEWHERE, fetch=no_keys)
    answer = await door.authenticate(bearing(".".join(unpadded(part).decode() for part in parts)))
    assert isinstance(answer, Unauthorized)
    await door.close()
