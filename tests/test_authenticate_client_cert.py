"""A certificate that a proxy tells of: it counts from a proxy of ours alone, and only if it is the one that is meant."""

import base64
import ipaddress
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiohttp import ClientSession, UnixConnector
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.authenticate import Caller, Presented, Reason, Scheme, Unauthorized, scheme_for
from gateway.config import Serve
from tests.door import configured
from tests.serving import CONFIGURATION, order, serving

NOW = datetime.now(UTC)
KEY, OTHER_KEY = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
SUBJECT = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Hospital"), x509.NameAttribute(NameOID.COMMON_NAME, "edge-1")])  # fmt: skip
NAMES = x509.SubjectAlternativeName(
    [
        x509.DNSName("Edge-1.example"),
        x509.UniformResourceIdentifier("spiffe://hospital/edge-1"),
        x509.RFC822Name("edge@hospital.example"),
        x509.IPAddress(ipaddress.ip_address("2001:db8::1")),
    ]
)


def certificate(
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey = KEY,
    subject: x509.Name = SUBJECT,
    names: x509.SubjectAlternativeName | None = NAMES,
) -> bytes:
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(SUBJECT)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=1))
    )
    if names is not None:
        built = built.add_extension(names, critical=False)
    return built.sign(KEY, hashes.SHA256()).public_bytes(Encoding.DER)


def spki(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> str:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    return "sha256/" + base64.b64encode(digest.finalize()).decode()


def scheme(pins: str) -> Scheme:
    source = f"posts: {{scheme: client-cert, {pins}, accepts: [only]}}\n"
    return scheme_for(configured(sources=source, serve="trusted_proxies: [10.0.0.1]\n").sources["posts"], Serve())


def presented(*fields: str, vouched: bool = True, at: datetime = NOW) -> Presented:
    headers = CIMultiDictProxy(CIMultiDict([("Client-Cert", field) for field in fields]))
    return Presented(headers=headers, body=b"{}", token=None, peer=None, at=at.timestamp(), vouched=vouched)


def told(der: bytes) -> str:
    return f":{base64.b64encode(der).decode()}:"


RIGHT = told(certificate())
WRONG = Unauthorized(Reason.WRONG_CERTIFICATE)


@pytest.mark.parametrize(
    ("pins", "counts"),
    [
        ("san: ['dns:edge-1.example']", True),
        ("san: ['dns:EDGE-1.EXAMPLE']", True),
        ("san: ['dns:edge-2.example', 'uri:spiffe://hospital/edge-1']", True),
        ("san: ['email:edge@hospital.example']", True),
        ("san: ['ip:2001:db8::1']", True),
        ("san: ['dns:edge-1.example.evil']", False),
        ("san: ['uri:spiffe://hospital/edge-10']", False),
        ("subject: ['CN=edge-1,O=Hospital']", True),
        ("subject: ['CN=edge-1']", False),
        ("subject: ['O=Hospital,CN=edge-1']", False),
        ("spki: ['ITS_KEY']", True),
        ("spki: ['OTHER_KEY', 'ITS_KEY']", True),
        ("spki: ['OTHER_KEY']", False),
        ("san: ['dns:edge-1.example'], spki: ['ITS_KEY']", True),
        ("san: ['dns:edge-1.example'], spki: ['OTHER_KEY']", False),
        ("subject: ['CN=other'], spki: ['ITS_KEY']", False),
    ],
)
async def test_every_kind_of_pin_that_is_there_must_hold(pins: str, counts: bool) -> None:
    pins = pins.replace("ITS_KEY", spki(KEY)).replace("OTHER_KEY", spki(OTHER_KEY))
    assert await scheme(pins).authenticate(presented(RIGHT)) == (Caller(None, secret=0) if counts else WRONG)


EDGE = scheme("san: ['dns:edge-1.example']")


async def test_the_header_counts_from_nobody_but_a_trusted_proxy() -> None:
    """A certificate is no secret: whoever has seen it could write it."""
    assert await EDGE.authenticate(presented(RIGHT, vouched=False)) == Unauthorized(Reason.UNTRUSTED_PROXY)


async def test_a_certificate_counts_in_its_time() -> None:
    for at in (NOW - timedelta(days=1, seconds=1), NOW + timedelta(days=1, seconds=1)):
        assert await EDGE.authenticate(presented(RIGHT, at=at)) == Unauthorized(Reason.EXPIRED_CERTIFICATE)


async def test_the_header_must_be_there_once() -> None:
    """A client's own beside the proxy's: which would count is a matter of taste."""
    assert await EDGE.authenticate(presented()) == Unauthorized(Reason.MISSING_HEADER)
    assert await EDGE.authenticate(presented(RIGHT, RIGHT)) == Unauthorized(Reason.REPEATED_HEADER)


@pytest.mark.parametrize(
    "field",
    [RIGHT.strip(":"), RIGHT + ";a=1", RIGHT + ", " + RIGHT, RIGHT[:-9] + ":", ":" + "A" * 8000 + ":", "::", ":AAAA:", ":é:", '"x"',
     RIGHT.replace(":", "-----BEGIN CERTIFICATE-----")],
)  # fmt: skip
async def test_what_is_no_certificate_is_refused(field: str) -> None:
    assert await EDGE.authenticate(presented(field)) == Unauthorized(Reason.MALFORMED_HEADER)


async def test_a_certificate_without_names_has_none_that_could_match() -> None:
    assert await EDGE.authenticate(presented(told(certificate(names=None)))) == WRONG
    another = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "edge-1.example")])
    assert await EDGE.authenticate(presented(told(certificate(subject=another, names=None)))) == WRONG


async def test_on_a_unix_socket_there_is_nobody_but_a_proxy(tmp_path: Path, dsn: str) -> None:
    listen = f'serve: {{{{listen: ["127.0.0.1:0", "unix:{tmp_path}/s"]}}}}'
    source = "  edge: {{scheme: client-cert, san: ['dns:edge-1.example'], accepts: [purchase-order]}}\npolicies:"
    text = CONFIGURATION.replace('serve: {{listen: "127.0.0.1:0"}}', listen).replace("policies:", source, 1)
    headers = {"Client-Cert": RIGHT}
    async with serving(tmp_path, dsn, "http://127.0.0.1:1", configured=text) as program:
        async with ClientSession(connector=UnixConnector(str(tmp_path / "s"))) as session:
            async with session.post("http://localhost/hooks/edge", json=order(), headers=headers) as answer:
                assert answer.status == 202
            chunked = iterated(json.dumps(order(id=43)).encode())
            async with session.post(
                "http://localhost/hooks/edge", data=chunked, headers={**headers, "Content-Type": "application/json"}
            ) as answer:
                assert answer.status == 202
        async with program.session.post(f"{program.address}/hooks/edge", json=order(), headers=headers) as answer:
            assert answer.status == 401


async def iterated(body: bytes) -> AsyncIterator[bytes]:
    yield body


@given(cut=st.integers(0, 400), flipped=st.integers(0, 255), more=st.binary(max_size=4))
@settings(max_examples=300, deadline=None)
async def test_no_certificate_raises(cut: int, flipped: int, more: bytes) -> None:
    der = bytearray(certificate_of_all_tests)
    der[cut % len(der)] ^= flipped
    answer = await EDGE.authenticate(presented(told(bytes(der) + more)))
    assert isinstance(answer, Unauthorized | Caller)


certificate_of_all_tests = certificate()
