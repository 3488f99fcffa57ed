"""Signatures of HTTP messages (RFC 9421): what others sign is accepted, what we sign others accept, and nothing else."""

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from http_message_signatures import HTTPMessageSigner, HTTPMessageVerifier, HTTPSignatureKeyResolver, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.authenticate import Caller, Presented, Reason, Scheme, Unauthorized, scheme_for
from gateway.authenticate.http_signature import content_digest, signature_base, signature_parameters
from gateway.verifying_keys import verifying_key
from tests.door import configured
from tests.serving import CONFIGURATION, order, serving

NOW = int(datetime.now(UTC).timestamp())
BODY = b'{"id": 42}'
PUBLIC = "https://gateway.example/in"
TARGET = "/hooks/posts"

ED, EC = ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
SHARED = "shared-secret-of-the-edge-of-32-bytes"
Private = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def pem(key: Private) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


KEYS: dict[str, Any] = {"ed": ED, "ec": EC, "rsa": RSA, "mac": SHARED.encode()}
ENVIRON = {"ED": pem(ED), "EC": pem(EC), "RSA": pem(RSA), "MAC": SHARED}
THEIRS = {
    "ed": algorithms.ED25519,
    "ec": algorithms.ECDSA_P256_SHA256,
    "rsa": algorithms.RSA_PSS_SHA512,
    "mac": algorithms.HMAC_SHA256,
}
REQUIRED = ("@method", "@path", "content-digest")
every_algorithm = pytest.mark.parametrize("keyid", KEYS)


def scheme(components: tuple[str, ...] = REQUIRED, *, keys: str = "{ed: env:ED, ec: env:EC, rsa: env:RSA, mac: env:MAC}") -> Scheme:  # fmt: skip
    quoted = ", ".join(f'"{component}"' for component in components)
    source = f"posts: {{scheme: http-signature, keys: {keys}, components: [{quoted}], accepts: [only]}}\n"
    config = configured(sources=source, serve=f"public_url: {PUBLIC}\n", environ=ENVIRON)
    return scheme_for(config.sources["posts"], config.serve)


EDGE = scheme()


class Message:
    """As the library wants to have one."""

    method = "POST"

    def __init__(self, headers: dict[str, str] | None = None, url: str = PUBLIC + TARGET) -> None:
        self.url = url
        self.headers = {"Content-Type": "application/json", **(headers or {})}


class Resolver(HTTPSignatureKeyResolver):
    def resolve_private_key(self, key_id: str) -> Any:
        return KEYS[key_id]

    def resolve_public_key(self, key_id: str) -> Any:
        key = KEYS[key_id]
        return key if isinstance(key, bytes) else key.public_key()


def by_library(keyid: str = "ed", message: Message | None = None, *, body: bytes = BODY, **how: Any) -> dict[str, str]:
    message = message or Message()
    signer = HTTPMessageSigner(signature_algorithm=THEIRS[keyid], key_resolver=Resolver())
    how = {"created": datetime.fromtimestamp(NOW, UTC), "nonce": "n-1", "covered_component_ids": REQUIRED, **how}
    signer.sign(message, key_id=keyid, body=body, **how)
    return dict(message.headers)


def presented(
    headers: dict[str, str] | list[tuple[str, str]], body: bytes = BODY, *, at: float = NOW, target: str = TARGET
) -> Presented:
    proxy = CIMultiDictProxy(CIMultiDict(headers))
    return Presented(headers=proxy, body=body, target=target, token=None, peer=None, at=at)


def signature(keyid: str, base: bytes) -> bytes:
    match KEYS[keyid]:
        case ed25519.Ed25519PrivateKey() as key:
            return key.sign(base)
        case ec.EllipticCurvePrivateKey() as key:
            return algorithms.ECDSA_P256_SHA256.signature_from_der(key.sign(base, ec.ECDSA(hashes.SHA256())))
        case rsa.RSAPrivateKey() as key:
            return key.sign(base, padding.PSS(padding.MGF1(hashes.SHA512()), 64), hashes.SHA512())
        case _:
            return verifying_key(SHARED).sign(base)  # type: ignore[attr-defined]


def by_hand(
    keyid: Any = "ed",
    covered: tuple[str, ...] = REQUIRED,
    *,
    body: bytes = BODY,
    target: str = TARGET,
    label: str = "sig",
    headers: dict[str, str] | None = None,
    **parameters: Any,
) -> dict[str, str]:
    """Signed by our own base, with parameters that a library would not write; those that are None are left out."""
    headers = {"Content-Digest": content_digest(body), **(headers or {})}
    signer = keyid if keyid in KEYS else "ed"
    told = {"created": NOW, "keyid": keyid, "nonce": "n-1", **parameters}
    told = {name: value for name, value in told.items() if value is not None}
    base = signature_base(covered, told, presented(headers, body, target=target), PUBLIC)
    assert base is not None
    inputs = signature_parameters([(name, {}) for name in covered], told)
    signed = base64.b64encode(signature(signer, base)).decode()
    return {**headers, "Signature-Input": f"{label}={inputs}", "Signature": f"{label}=:{signed}:"}


# ── against the library ────────────────────────────────────────────────────────────────────────────


@every_algorithm
async def test_what_the_library_signs_we_accept(keyid: str) -> None:
    answer = await EDGE.authenticate(presented(by_library(keyid)))
    assert answer == Caller(f"{keyid} n-1", secret=list(KEYS).index(keyid))


@every_algorithm
def test_what_we_sign_the_library_accepts(keyid: str) -> None:
    covered = ("@method", "@target-uri", "@authority", "@scheme", "@path", "@query", "@request-target", "content-type", "content-digest")  # fmt: skip
    headers = by_hand(keyid, covered, headers={"Content-Type": "application/json"})
    verifier = HTTPMessageVerifier(signature_algorithm=THEIRS[keyid], key_resolver=Resolver())
    [verified] = verifier.verify(Message(headers), max_age=timedelta(minutes=5), require_components=REQUIRED, body=BODY)
    assert verified.parameters["nonce"] == "n-1"


@pytest.mark.parametrize(
    ("url", "target"),
    [
        (PUBLIC + TARGET, TARGET),
        (PUBLIC + TARGET + "?a=1&b=%20", TARGET + "?a=1&b=%20"),
        (PUBLIC + TARGET + "?", TARGET + "?"),
        ("https://gateway.example/in/hooks/a%2Fb", "/hooks/a%2Fb"),
    ],
)
async def test_each_part_of_the_request_is_what_the_library_takes_it_for(url: str, target: str) -> None:
    covered = ("@method", "@target-uri", "@authority", "@scheme", "@path", "@query", "@request-target", "content-digest", "x-note")  # fmt: skip
    headers = by_library(message=Message({"X-Note": "  two  words "}, url), covered_component_ids=covered)
    assert isinstance(await scheme(covered).authenticate(presented(headers, target=target)), Caller)


@pytest.mark.parametrize("keyid", KEYS)
@pytest.mark.parametrize("include_alg", [True, False])
@pytest.mark.parametrize("tag", [None, "webhook"])
async def test_parameters_that_may_be_there_or_not_change_nothing(keyid: str, include_alg: bool, tag: str) -> None:
    headers = by_library(keyid, include_alg=include_alg, tag=tag, nonce=None)
    assert await EDGE.authenticate(presented(headers)) == Caller(None, secret=list(KEYS).index(keyid))


async def test_the_example_of_the_rfc_is_verified() -> None:
    """RFC 9421 B.2.5: hmac-sha256 under the shared secret of B.1.5."""
    secret = base64.b64decode(
        "uzvJfB4u3N0Jy4T7NZ75MDVcr8zSTInedJtkgcu46YW4XByzNJjxBdtjUkdJPBtbmHhIDi6pcl8jsasjlTMtDQ=="
    )
    headers = {"Date": "Tue, 20 Apr 2021 02:07:55 GMT", "Content-Type": "application/json"}
    parameters = {"created": 1618884473, "keyid": "test-shared-secret"}
    request = Presented(
        headers=CIMultiDictProxy(CIMultiDict(headers)), body=b"", target="/foo", token=None, peer=None, at=0
    )
    base = signature_base(("date", "@authority", "content-type"), parameters, request, "https://example.com")
    assert base is not None
    mac = base64.b64encode(hmac.digest(secret, base, "sha256")).decode()
    assert mac == "pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8="


async def test_the_door_takes_what_the_library_signed_and_the_same_nonce_is_the_same_event(
    tmp_path: Path, dsn: str
) -> None:
    (tmp_path / "mac").write_text(SHARED)
    source = "  edge: {{scheme: http-signature, keys: {{mac: file:mac}}, components: ['@path', content-digest], accepts: [purchase-order]}}\npolicies:"
    text = CONFIGURATION.replace("policies:", source, 1)
    async with serving(tmp_path, dsn, "http://127.0.0.1:1", configured=text) as program:

        async def post(number: int, path: str = "/hooks/edge") -> int:
            body, url = json.dumps(order(id=number)).encode(), f"{program.address}/hooks/edge"
            how = {"created": datetime.now(UTC), "covered_component_ids": ("@path", "content-digest")}
            headers = by_library("mac", Message(url=url), body=body, **how)
            async with program.session.post(program.address + path, data=body, headers=headers) as answer:
                return answer.status

        assert [await post(1), await post(1), await post(2)] == [202, 200, 409]
        assert await post(1, "/hooks/edge?a=1") == 200  # the query is not signed here, and changes nothing
        assert await post(1, "/hooks/odoo") == 401


# ── where we are stricter ──────────────────────────────────────────────────────────────────────────
# The library lets these pass, and each for a reason of its own they do not pass here.


async def test_a_part_that_must_be_signed_and_is_not_is_refused() -> None:
    """Who chooses what is signed must not be the sender."""
    for covered in (("@method", "content-digest"), ("@method", "@path"), ("@path", "content-digest"), ()):
        assert await EDGE.authenticate(presented(by_hand(covered=covered))) == Unauthorized(Reason.UNSIGNED_PART)
    more = by_hand(covered=(*REQUIRED, "@query", "@authority"))
    assert isinstance(await EDGE.authenticate(presented(more)), Caller)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"created": None}, Reason.MALFORMED_TIMESTAMP),  # the library takes a signature without a time
        ({"created": str(NOW)}, Reason.MALFORMED_TIMESTAMP),
        ({"created": True}, Reason.MALFORMED_TIMESTAMP),
        ({"created": datetime.fromtimestamp(NOW, UTC)}, Reason.MALFORMED_TIMESTAMP),
        ({"created": NOW - 301}, Reason.TOO_OLD),  # a day is the library's default
        ({"created": NOW + 301}, Reason.TOO_NEW),
        ({"created": 999_999_999_999_999}, Reason.TOO_NEW),
        ({"created": -999_999_999_999_999}, Reason.TOO_OLD),
        ({"expires": NOW - 1}, Reason.TOO_OLD),
        ({"expires": "soon"}, Reason.MALFORMED_TIMESTAMP),
        ({"keyid": None}, Reason.UNKNOWN_KEY),
        ({"nonce": ""}, Reason.MALFORMED_ID),
        ({"nonce": "a b"}, Reason.MALFORMED_ID),
        ({"nonce": "x" * 300}, Reason.MALFORMED_ID),
        ({"nonce": 7}, Reason.MALFORMED_ID),
        ({"alg": "hmac-sha256"}, Reason.MALFORMED_HEADER),  # the algorithm is that of our key
        ({"alg": "rsa-v1_5-sha256"}, Reason.MALFORMED_HEADER),
        ({"alg": 1}, Reason.MALFORMED_HEADER),
    ],
)
async def test_every_parameter_counts(parameters: dict[str, Any], reason: Reason) -> None:
    assert await EDGE.authenticate(presented(by_hand(**parameters))) == Unauthorized(reason)


async def test_a_time_at_the_edge_of_the_tolerance_counts() -> None:
    for parameters in ({"created": NOW - 300}, {"created": NOW + 300}, {"expires": NOW}):
        assert isinstance(await EDGE.authenticate(presented(by_hand(**parameters))), Caller)


@pytest.mark.parametrize("repeated", ["Signature-Input", "Signature", "Content-Digest"])
async def test_each_header_must_be_there_once(repeated: str) -> None:
    headers = by_hand()
    twice = [*headers.items(), (repeated, headers[repeated])]
    assert await EDGE.authenticate(presented(twice)) == Unauthorized(Reason.REPEATED_HEADER)
    without = {name: value for name, value in headers.items() if name != repeated}
    assert await EDGE.authenticate(presented(without)) == Unauthorized(Reason.MISSING_HEADER)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Signature-Input", lambda value: value.replace('"@path"', '"@path" "@path"')),
        ("Signature-Input", lambda value: value.replace('"@path"', '"@path";req')),
        ("Signature-Input", lambda value: value.replace('"@path"', '"@PATH"')),
        ("Signature-Input", lambda value: value.replace('"@path"', "path")),
        ("Signature-Input", lambda value: value.replace('"@path"', '"@query-param";name="a"')),
        ("Signature-Input", lambda value: value.replace('"content-digest"', '"content-digest" "signature"')),
        ("Signature-Input", lambda value: value.replace('"content-digest"', '"content-digest" "x-not-there"')),
        ("Signature-Input", lambda value: value + ", " + value),
        ("Signature-Input", lambda value: value + ";keyid=1"),
        ("Signature-Input", lambda value: value + ","),
        ("Signature-Input", lambda value: value.replace("sig=", "Sig=")),
        ("Signature-Input", lambda value: 'sig=1;keyid="ed"'),
        ("Signature-Input", lambda value: "sig"),
        ("Signature-Input", lambda value: value.replace('"ed"', "ed")),
        ("Signature-Input", lambda value: value.replace('"ed"', '"eD"')),
        ("Signature", lambda value: value.replace(":", '"')),
        ("Signature", lambda value: value.replace("sig=", "other=")),
        ("Signature", lambda value: "sig=::"),
        ("Signature", lambda value: value + ", sig=:AAAA:"),
        ("Signature", lambda value: "sig=(:AAAA:)"),
        ("Content-Digest", lambda value: "sha-256"),
        ("Content-Digest", lambda value: "md5=:AAAA:"),
        ("Content-Digest", lambda value: value.replace("sha-256", "sha-384")),
    ],
)  # fmt: skip
async def test_what_is_written_in_another_way_is_refused(name: str, change: Callable[[str], str]) -> None:
    headers = by_hand()
    headers[name] = change(headers[name])
    assert isinstance(await EDGE.authenticate(presented(headers)), Unauthorized)


# ── what is signed is as it was signed ─────────────────────────────────────────────────────────────


@every_algorithm
async def test_every_part_that_is_signed_must_be_as_it_was(keyid: str) -> None:
    covered = ("@method", "@target-uri", "content-digest", "content-type")
    edge = scheme(covered)
    headers = by_library(keyid, covered_component_ids=covered)
    assert isinstance(await edge.authenticate(presented(headers)), Caller)
    told = headers["Signature-Input"]
    forged = {"Content-Digest": content_digest(b"{}")}
    wrong = Unauthorized(Reason.WRONG_SIGNATURE)
    for changed, answer in [
        (presented(headers, b"{}"), Unauthorized(Reason.WRONG_BODY)),
        (presented({**headers, **forged}, b"{}"), wrong),
        (presented(headers, target=TARGET + "?a"), wrong),
        (presented(headers, target="/hooks/other"), wrong),
        (presented({**headers, "Content-Type": "text/plain"}), wrong),
        (presented({**headers, "Signature-Input": told.replace("n-1", "n-2")}), wrong),
        (presented({**headers, "Signature-Input": told.replace(str(NOW), str(NOW + 1))}), wrong),
        (presented({**headers, "Signature-Input": told + ';tag="more"'}), wrong),
        (presented(headers, target="https://gateway.example/in/hooks/posts"), Unauthorized(Reason.MALFORMED_HEADER)),
    ]:
        assert await edge.authenticate(changed) == answer


async def test_the_digest_may_be_sha_512_and_all_that_are_known_must_be_right() -> None:
    long = f"sha-512=:{base64.b64encode(hashlib.sha512(BODY).digest()).decode()}:"
    short = content_digest(BODY)
    for digest, accepted in {
        long: True,
        f"{short}, {long}": True,
        f"{short}, unixsum=:AAAA:": True,
        f"{long}, {content_digest(b'{}')}": False,
        long.replace("sha-512", "sha-256"): False,
        "sha-256=1": False,
    }.items():
        answer = await EDGE.authenticate(presented(by_hand(headers={"Content-Digest": digest})))
        assert answer == (Caller("ed n-1", secret=0) if accepted else Unauthorized(Reason.WRONG_BODY)), digest


async def test_a_signature_of_somebody_else_beside_it_does_no_harm() -> None:
    """A proxy may sign, too."""
    ours, theirs = by_hand(), by_hand(label="proxy", keyid="mac")
    theirs = {name: value.replace('keyid="mac"', 'keyid="proxy"') for name, value in theirs.items()}
    both = {name: f"{theirs[name]}, {ours[name]}" for name in ("Signature-Input", "Signature")}
    assert await EDGE.authenticate(presented({**ours, **both})) == Caller("ed n-1", secret=0)
    many = ", ".join(f'l{n}=();keyid="x"' for n in range(4))
    flooded = {**ours, "Signature-Input": f"{many}, {ours['Signature-Input']}"}
    assert await EDGE.authenticate(presented(flooded)) == Unauthorized(Reason.UNKNOWN_KEY)


async def test_a_key_is_not_taken_for_one_of_another_kind() -> None:
    """A public key is no secret to sign with, whatever the message says of the algorithm."""
    base = signature_base(
        REQUIRED, {"created": NOW, "keyid": "ed"}, presented({"Content-Digest": content_digest(BODY)}), PUBLIC
    )
    assert base is not None
    mac = base64.b64encode(hmac.digest(pem(ED).encode(), base, "sha256")).decode()
    inputs = signature_parameters([(name, {}) for name in REQUIRED], {"created": NOW, "keyid": "ed"})
    headers = {"Content-Digest": content_digest(BODY), "Signature-Input": f"sig={inputs}", "Signature": f"sig=:{mac}:"}
    assert await EDGE.authenticate(presented(headers)) == Unauthorized(Reason.WRONG_SIGNATURE)


async def test_a_key_counts_only_in_its_time() -> None:
    until = datetime.fromtimestamp(NOW, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    edge = scheme(keys=f"{{ed: {{secret: env:ED, not_after: {until}}}, ec: env:EC}}")
    assert isinstance(await edge.authenticate(presented(by_hand(), at=NOW - 1)), Caller)
    assert await edge.authenticate(presented(by_hand())) == Unauthorized(Reason.NO_ACTIVE_SECRET)
    assert await edge.authenticate(presented(by_hand("ec"))) == Caller("ec n-1", secret=1)


async def test_two_keys_may_use_the_same_nonce() -> None:
    answers = [await EDGE.authenticate(presented(by_hand(keyid))) for keyid in KEYS]
    assert len({answer.signed_id for answer in answers if isinstance(answer, Caller)}) == len(KEYS)


# ── whatever comes ─────────────────────────────────────────────────────────────────────────────────

TEXTS = st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1"))
PIECES = st.lists(
    st.sampled_from(["sig", "=", "(", ")", '"@method"', '"@path"', '"content-digest"', " ", ";", "created=", str(NOW), "keyid=", '"ed"',
                     'nonce="a"', ",", ":", "AAAA", "@", "1.5", "?1", '%"é"', '%"a"', "*", "\\", '"']),
    max_size=20,
).map("".join)  # fmt: skip


@given(inputs=TEXTS | PIECES, signatures=TEXTS | PIECES, digest=TEXTS | PIECES, target=st.text(max_size=20))
@settings(max_examples=400, deadline=None)
async def test_nothing_that_is_presented_raises_or_is_believed(
    inputs: str, signatures: str, digest: str, target: str
) -> None:
    headers = {"Signature-Input": inputs, "Signature": signatures, "Content-Digest": digest}
    assert isinstance(await EDGE.authenticate(presented(headers, target=target)), Unauthorized)


@given(data=st.data(), parameters=st.dictionaries(
    st.sampled_from(["created", "expires", "keyid", "nonce", "alg", "tag", "x"]),
    st.none() | st.integers(-10**15 + 1, 10**15 - 1) | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)
    | st.booleans() | st.binary(max_size=9) | st.sampled_from(["ed", "ec", NOW]),
))  # fmt: skip
@settings(max_examples=200, deadline=None)
async def test_whatever_parameters_are_signed_nothing_raises(data: st.DataObject, parameters: dict[str, Any]) -> None:
    headers = by_hand(**{"keyid": "ed", **parameters})
    name = data.draw(st.sampled_from(["Signature-Input", "Signature", "Content-Digest"]))
    cut = data.draw(st.integers(0, len(headers[name])))
    piece = data.draw(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=3))
    headers[name] = headers[name][:cut] + piece + headers[name][cut + len(piece) :]
    assert isinstance(await EDGE.authenticate(presented(headers)), Caller | Unauthorized)


@given(signature=st.binary(max_size=600), message=st.binary(max_size=50))
@settings(max_examples=200, deadline=None)
def test_no_signature_makes_a_key_raise(signature: bytes, message: bytes) -> None:
    for text in ENVIRON.values():
        assert not verifying_key(text).verifies(signature, message)


# ── keys ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_that_is_none_is_told_with_its_mend() -> None:
    weak, other = (
        rsa.generate_private_key(public_exponent=65537, key_size=1024),
        ec.generate_private_key(ec.SECP384R1()),
    )
    for text, says in {
        "short": "use at least 32 random ones",
        pem(weak): "1024 bits",
        pem(other): "of a kind that is not known here",
        "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----": "no public key in PEM",
        "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----": "only its public half",
        "-----BEGIN EC PRIVATE KEY-----": "only its public half",
    }.items():
        with pytest.raises(ValueError, match=says):
            verifying_key(text)
