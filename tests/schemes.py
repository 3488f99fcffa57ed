"""Every scheme as a row: how its posts are made, who else speaks it, and what is asked of all of them.

A new scheme is a Row in ROWS.  `DOCS=1 pytest tests/test_schemes.py` writes docs/reference/schemes.md anew.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from textwrap import indent
from threading import Thread
from typing import Any
from urllib.parse import parse_qsl, urlencode

import joserfc.jwt
import jwt
import standardwebhooks
import stripe
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from http_message_signatures import (
    HTTPMessageSignaturesException,
    HTTPMessageSigner,
    HTTPMessageVerifier,
    HTTPSignatureKeyResolver,
    algorithms,
)
from joserfc.errors import JoseError
from joserfc.jwk import ECKey
from slack_sdk.signature import SignatureVerifier
from svix.webhooks import Webhook as Svix
from twilio.request_validator import RequestValidator

from gateway import send
from gateway.authenticate import http_signature
from gateway.config import Jwt, StandardWebhooks
from gateway.config_sections import AnySource, ClientCert, HttpSignature
from gateway.send import Signed
from tests import octokit
from tests.door import PUBLIC_URL, configured, presented, whsec
from tests.test_authenticate_client_cert import certificate, spki
from tests.test_authenticate_client_cert import told as told_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What a sender has to say; where its scheme signs no id or no time, that is left out."""

    body: bytes
    at: int
    id: str = "msg_1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle:
    """Other people's code for the same scheme, with a secret of ours."""

    name: str
    signs: Callable[[str, Message], Signed] | None = None
    signed: tuple["Recorded", ...] = ()  # where its code is not at hand
    accepts: Callable[[str, Signed], bool] | None = None
    is_there: Callable[[], bool] = lambda: True


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A post that others have published, and when it was one."""

    secret: str
    sent: Signed
    at: int


def by_ourselves(source: AnySource, message: Message) -> Signed:
    """As `sluicegate send` does."""
    now = datetime.fromtimestamp(message.at, UTC)
    return send.signed(source, message.body, public_url=PUBLIC_URL, message=message.id, now=now)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    scheme: str  # as the table calls it
    keys: str  # of its source; SECRETS stands for a list of secrets, KEYS for them by their ids, FIRST and OTHERS for two parts, PINS and PUBLISHED for the keys of those that count
    secrets: tuple[str, str, str]  # one, the next one, and that of somebody else
    signs: Callable[[AnySource, Message], Signed] = by_ourselves
    parts: Mapping[str, Callable[[Signed], Signed]] = field(default_factory=dict)  # that are signed: each changed
    signs_id: bool = False
    tells_which: bool = True  # of its secrets has verified
    binds_source: bool = False  # a post counts for no other source, even with the same secret
    unsigned_id: str | None = None  # the header of an id that anyone can change
    respelled: tuple[Callable[[Signed], Signed], ...] = ()  # what its signature does not tell apart
    oracles: tuple[Oracle, ...] = ()

    @property
    def name(self) -> str:
        """Of its source."""
        return re.sub(r"[^a-z0-9]+", "-", self.scheme.lower())

    def written(self, *secrets: str) -> str:
        """The source, with these for secrets: as YAML has them."""
        listed = {
            "SECRETS": f"[{', '.join(secrets)}]",
            "KEYS": "{" + ", ".join(f"{_id_of(secret)}: {secret}" for secret in secrets) + "}",
            "FIRST": secrets[0],
            "OTHERS": f"[{', '.join(secrets[1:])}]",
            "PINS": json.dumps([spki(PRIVATE[_id_of(secret)]) for secret in secrets if not secret.startswith("{")]),
            "PUBLISHED": "+".join(_id_of(secret) for secret in secrets if not secret.startswith("{")),
        }
        return re.sub("SECRETS|KEYS|FIRST|OTHERS|PINS|PUBLISHED", lambda found: listed[found[0]], self.keys)

    @property
    def environ(self) -> Mapping[str, str]:
        return dict(zip((f"{self.name}_{which}".replace("-", "_") for which in SECRETS), self.secrets, strict=True))

    @property
    def references(self) -> tuple[str, str, str]:
        one, following, other = (f"env:{name}" for name in self.environ)
        return one, following, other

    def source(self, *secrets: str, name: str | None = None) -> AnySource:
        name = name or self.name
        text = f"{name}:\n" + indent(f"accepts: [only]\n{self.written(*secrets)}", "  ") + "\n"
        return configured(
            sources=text, serve=f"public_url: {PUBLIC_URL}\ntrusted_proxies: [127.0.0.1]\n", environ=self.environ
        ).sources[name]


SECRETS = ("one", "next", "other")


def _id_of(reference: str) -> str:
    """`one` of `env:http_signature_one`, wherever that stands."""
    (found,) = re.findall(rf"_({'|'.join(SECRETS)})\b", reference)
    return str(found)


# ── how a part of a post is changed ──────────────────────────────────────────────────────────────────


def header(name: str, change: Callable[[str], str]) -> Callable[[Signed], Signed]:
    def changed(sent: Signed) -> Signed:
        (key,) = [key for key in sent.headers if key.lower() == name.lower()]
        return replace(sent, headers={**sent.headers, key: change(sent.headers[key])})

    return changed


def later(name: str) -> Callable[[Signed], Signed]:
    """By a second, which is well within any tolerance."""
    return header(name, lambda at: str(int(at) + 1))


def body(sent: Signed) -> Signed:
    return replace(sent, body=sent.body.replace(b"order", b"0rder"))


def query(sent: Signed) -> Signed:
    return replace(sent, path=sent.path + ("&" if "?" in sent.path else "?") + "more=1")


def path(sent: Signed) -> Signed:
    return replace(sent, path=sent.path.replace("/hooks/", "/hooks/x"))


# ── other people's code ──────────────────────────────────────────────────────────────────────────────

JSON = {"content-type": "application/json"}
FORM = {"content-type": "application/x-www-form-urlencoded"}


def holds(check: Callable[[], object], *refusals: type[Exception]) -> bool:
    """Whether a check of somebody else's does not raise."""
    try:
        check()
    except refusals:
        return False
    return True


def _standard(library: Callable[[str], Any]) -> tuple[Callable[[str, Message], Signed], Callable[[str, Signed], bool]]:
    def signs(secret: str, message: Message) -> Signed:
        signature = library(secret).sign(message.id, datetime.fromtimestamp(message.at, UTC), message.body.decode())
        headers = {"webhook-id": message.id, "webhook-timestamp": str(message.at), "webhook-signature": signature}
        return Signed("/hooks/posts", JSON | headers, message.body)

    def accepts(secret: str, sent: Signed) -> bool:
        refusal = standardwebhooks.WebhookVerificationError
        return holds(lambda: library(secret).verify(sent.body, dict(sent.headers)), refusal)

    return signs, accepts


def _octokit_signs(secret: str, message: Message) -> Signed:
    signature = octokit.sign(secret, message.body.decode())
    return Signed("/hooks/posts", {**JSON, "X-Hub-Signature-256": signature}, message.body)


def _octokit_accepts(secret: str, sent: Signed) -> bool:
    return octokit.verifies(secret, sent.body.decode(), sent.headers["X-Hub-Signature-256"])


def _slack_signs(secret: str, message: Message) -> Signed:
    signature = SignatureVerifier(secret).generate_signature(timestamp=str(message.at), body=message.body)
    assert signature is not None
    headers = {"X-Slack-Signature": signature, "X-Slack-Request-Timestamp": str(message.at)}
    return Signed("/hooks/posts", JSON | headers, message.body)


def _slack_accepts(secret: str, sent: Signed) -> bool:
    return SignatureVerifier(secret).is_valid_request(sent.body, dict(sent.headers))


def _stripe_signs(secret: str, message: Message) -> Signed:
    sign = stripe.WebhookSignature.generate_signature_header
    return Signed(
        "/hooks/posts", {**JSON, "Stripe-Signature": sign(message.body.decode(), secret, message.at)}, message.body
    )


def _stripe_accepts(secret: str, sent: Signed) -> bool:
    given, verify = sent.headers["Stripe-Signature"], stripe.WebhookSignature.verify_header
    return holds(lambda: verify(sent.body.decode(), given, secret, 300), stripe.SignatureVerificationError)


def _twilio_signs(secret: str, message: Message) -> Signed:
    target = f"/hooks/posts?bodySHA256={hashlib.sha256(message.body).hexdigest()}"
    signature = RequestValidator(secret).compute_signature(PUBLIC_URL + target, {})
    return Signed(target, {**JSON, "X-Twilio-Signature": signature}, message.body)


def _twilio_accepts(secret: str, sent: Signed) -> bool:
    url, given = PUBLIC_URL + sent.path, sent.headers["X-Twilio-Signature"]
    return bool(RequestValidator(secret).validate(url, sent.body.decode(), given))


def _form(message: Message) -> bytes:
    return urlencode(json.loads(message.body)).encode()


def _as_a_form(source: AnySource, message: Message) -> Signed:
    return by_ourselves(source, replace(message, body=_form(message)))


def _twilio_signs_a_form(secret: str, message: Message) -> Signed:
    signature = RequestValidator(secret).compute_signature(f"{PUBLIC_URL}/hooks/posts", json.loads(message.body))
    return Signed("/hooks/posts", FORM | {"X-Twilio-Signature": signature}, _form(message))


def _twilio_accepts_a_form(secret: str, sent: Signed) -> bool:
    given, fields = sent.headers["X-Twilio-Signature"], dict(parse_qsl(sent.body.decode(), keep_blank_values=True))
    return bool(RequestValidator(secret).validate(PUBLIC_URL + sent.path, fields, given))


def _in_another_order(sent: Signed) -> Signed:
    return replace(sent, body=b"&".join(reversed(sent.body.split(b"&"))))


def _in_escapes(sent: Signed) -> Signed:
    return replace(sent, body=sent.body.replace(b"k", b"%6B").replace(b"&", b"&&"))


def _in_capitals(sent: Signed) -> Signed:
    given = sent.headers["X-Signature"].removeprefix("sha256=")
    return replace(sent, headers={**sent.headers, "X-Signature": f"sha256={given.upper()}"})


RECORDED = tuple(
    Recorded(
        secret=case["publicKeys"][0],
        sent=Signed("/hooks/posts", JSON | case["headers"], case["body"].encode()),
        at=case["now"],
    )
    for case in json.loads((Path(__file__).parent / "vectors/standard-webhooks-v1a.json").read_text())["cases"]
    if case["valid"] and len(case["publicKeys"]) == 1
)
PRIVATE = {text: Ed25519PrivateKey.from_private_bytes(text.ljust(32).encode()) for text in SECRETS}


def whpk(key: Ed25519PrivateKey) -> str:
    return "whpk_" + base64.b64encode(key.public_key().public_bytes_raw()).decode()


def _with_private_key(source: AnySource, message: Message) -> Signed:
    assert isinstance(source, StandardWebhooks)
    key = next(key for key in PRIVATE.values() if whpk(key) == source.secrets[0].secret.reveal())
    signature = base64.b64encode(key.sign(f"{message.id}.{message.at}.".encode() + message.body)).decode()
    headers = {"webhook-id": message.id, "webhook-timestamp": str(message.at), "webhook-signature": f"v1a,{signature}"}
    return Signed(f"/hooks/{source.name}", JSON | headers, message.body)


class _Request:
    """A post as the library for signatures of RFC 9421 wants to have it."""

    def __init__(self, path: str, headers: Mapping[str, str]) -> None:
        self.method, self.url, self.headers = "POST", PUBLIC_URL + path, dict(headers)


class _Resolver(HTTPSignatureKeyResolver):  # type: ignore[misc] — it is not typed
    def __init__(self, key: Any) -> None:
        self._key = key

    def resolve_private_key(self, key_id: str) -> Any:
        return self._key

    def resolve_public_key(self, key_id: str) -> Any:
        return self._key


def _of_rfc_9421(algorithm: Any, private: Callable[[str], Any], public: Callable[[str], Any]) -> Oracle:
    def signs(secret: str, message: Message) -> Signed:
        request = _Request("/hooks/posts", JSON)
        HTTPMessageSigner(signature_algorithm=algorithm, key_resolver=_Resolver(private(secret))).sign(
            request,
            key_id="one",
            created=datetime.fromtimestamp(message.at, UTC),
            nonce=message.id,
            covered_component_ids=COMPONENTS,
            body=message.body,
        )
        return Signed("/hooks/posts", request.headers, message.body)

    def accepts(secret: str, sent: Signed) -> bool:
        verifier = HTTPMessageVerifier(signature_algorithm=algorithm, key_resolver=_Resolver(public(secret)))
        request = _Request(sent.path, sent.headers)
        wanted = {"require_components": COMPONENTS, "body": sent.body}
        return holds(lambda: verifier.verify(request, **wanted), HTTPMessageSignaturesException)

    return Oracle(name="http-message-signatures", signs=signs, accepts=accepts)


COMPONENTS = ("@method", "@target-uri", "content-digest")


def pem(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def _private_of(text: str) -> Ed25519PrivateKey:
    return next(key for key in PRIVATE.values() if pem(key).strip() == text.strip())


def _by_rfc_9421(source: AnySource, message: Message) -> Signed:
    """By our own base, and a private key, which no source has."""
    assert isinstance(source, HttpSignature)
    ((keyid, timed),) = source.keys.items()
    sent = Signed(
        f"/hooks/{source.name}", JSON | {"content-digest": http_signature.content_digest(message.body)}, message.body
    )
    parameters = {"created": message.at, "nonce": message.id, "keyid": keyid, "alg": "ed25519"}
    presented_ = presented(sent.headers, sent.body, target=sent.path)
    base = http_signature.signature_base(source.components, parameters, presented_, PUBLIC_URL)
    assert base is not None
    items = [(name, dict[str, Any]()) for name in source.components]
    signature = base64.b64encode(_private_of(timed.secret.reveal()).sign(base)).decode()
    told = {
        "signature-input": f"sig={http_signature.signature_parameters(items, parameters)}",
        "signature": f"sig=:{signature}:",
    }
    return replace(sent, headers={**sent.headers, **told})


class _Issuer(BaseHTTPRequestHandler):
    """Publishes the keys that the path names: /one+next."""

    def do_GET(self) -> None:
        keys = [_JWKS[name].as_dict(private=False) for name in self.path.strip("/").split("+") if name]
        answer = json.dumps({"keys": keys}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@cache
def issuer() -> str:
    """Its address; it is there as long as the tests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Issuer)
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


_JWKS = {name: ECKey.generate_key("P-256", {"kid": name, "use": "sig", "alg": "ES256"}) for name in SECRETS}


def _claims(message: Message) -> dict[str, Any]:
    times = {"iat": message.at, "exp": message.at + 240}
    return {"iss": "us", "aud": "them", "jti": message.id, "sha256": hashlib.sha256(message.body).hexdigest(), **times}


def _bearing(token: str, message: Message, source: str = "posts") -> Signed:
    return Signed(f"/hooks/{source}", {**JSON, "authorization": f"Bearer {token}"}, message.body)


def _joserfc_signs(name: str, message: Message) -> Signed:
    head = {"alg": "ES256", "typ": "JWT", "kid": name}
    return _bearing(joserfc.jwt.encode(head, _claims(message), _JWKS[name]), message)


def _joserfc_accepts(name: str, sent: Signed) -> bool:
    token = sent.headers["authorization"].removeprefix("Bearer ")
    return holds(lambda: joserfc.jwt.decode(token, _JWKS[name], algorithms=["ES256"]), JoseError)


def _by_pyjwt(source: AnySource, message: Message) -> Signed:
    assert isinstance(source, Jwt)
    name = source.jwks.rpartition("/")[2]
    private = _JWKS[name].as_pem(private=True)
    token = jwt.encode(_claims(message), private, algorithm="ES256", headers={"kid": name})
    return _bearing(token, message, source.name)


def claim(name: str, value: object) -> Callable[[Signed], Signed]:
    """Another value of it, under the signature of the first."""

    def change(bearer: str) -> str:
        head, claims, signature = bearer.removeprefix("Bearer ").split(".")
        told = json.loads(base64.urlsafe_b64decode(claims + "=="))
        other = base64.urlsafe_b64encode(json.dumps({**told, name: value}).encode()).decode().rstrip("=")
        return f"Bearer {head}.{other}.{signature}"

    return header("authorization", change)


def _by_proxy(source: AnySource, message: Message) -> Signed:
    """As a proxy tells of the certificate of who holds one of the private keys."""
    assert isinstance(source, ClientCert)
    der = certificate(next(key for key in PRIVATE.values() if spki(key) in source.spki))
    return Signed(f"/hooks/{source.name}", {**JSON, "client-cert": told_of(der)}, message.body)


# ── the rows ─────────────────────────────────────────────────────────────────────────────────────────

PLAIN = ("one-secret-of-32-bytes-000000000", "next-secret-of-32-bytes-00000000", "other-secret-of-32-bytes-0000000")
_V1 = {"id": header("webhook-id", lambda _: "msg_2"), "time": later("webhook-timestamp"), "body": body}
_OF_9421 = {
    "id": header("signature-input", lambda told: told.replace("msg_", "msg-")),
    "time": header(
        "signature-input",
        lambda told: re.sub(r"(created=\d+)(\d)", lambda at: at[1] + str((int(at[2]) + 1) % 10), told),
    ),
    "method": header("signature-input", lambda told: told.replace('"@method" ', "")),
    "path": path,
    "query": query,
    "body": body,
    "digest and body": lambda sent: body(
        replace(sent, headers={**sent.headers, "content-digest": http_signature.content_digest(body(sent).body)})
    ),
}
_9421_KEYS = f"scheme: http-signature\nkeys: KEYS\ncomponents: {json.dumps(COMPONENTS)}"
_STANDARDWEBHOOKS, _SVIX = _standard(standardwebhooks.Webhook), _standard(Svix)

ROWS = (
    Row(
        scheme="standard-webhooks",
        keys="scheme: standard-webhooks\nsecrets: SECRETS",
        secrets=(whsec(PLAIN[0]), whsec(PLAIN[1]), whsec(PLAIN[2])),
        parts=_V1,
        signs_id=True,
        oracles=(
            Oracle(name="standardwebhooks", signs=_STANDARDWEBHOOKS[0], accepts=_STANDARDWEBHOOKS[1]),
            Oracle(name="svix", signs=_SVIX[0], accepts=_SVIX[1]),
        ),
    ),
    Row(
        scheme="standard-webhooks, v1a",
        keys="scheme: standard-webhooks\nsecrets: SECRETS",
        secrets=(whpk(PRIVATE["one"]), whpk(PRIVATE["next"]), whpk(PRIVATE["other"])),
        signs=_with_private_key,
        parts=_V1,
        signs_id=True,
        oracles=(Oracle(name="mobiscroll-connect-sdk", signed=RECORDED),),
    ),
    Row(
        scheme="hmac, of id, time and body",
        keys='scheme: hmac\nheader: X-Signature\nprefix: "sha256="\nsigned: "{id}.{timestamp}.{body}"\nid: X-Delivery\ntimestamp: X-Timestamp\ntolerance: 5m\nsecrets: SECRETS',
        secrets=PLAIN,
        parts={"id": header("X-Delivery", lambda _: "msg_2"), "time": later("X-Timestamp"), "body": body},
        signs_id=True,
        respelled=(_in_capitals,),
    ),
    Row(
        scheme="hmac, of URL and body",
        keys='scheme: hmac\nheader: X-Signature\nencoding: base64\nalgorithm: sha512\nsigned: "{url}{body}"\nsecrets: SECRETS',
        secrets=PLAIN,
        parts={"path": path, "query": query, "body": body},
        binds_source=True,
    ),
    Row(
        scheme="github",
        keys="scheme: github\nsecrets: SECRETS",
        secrets=PLAIN,
        parts={"body": body},
        unsigned_id="X-GitHub-Delivery",
        oracles=(
            Oracle(
                name="@octokit/webhooks-methods",
                signs=_octokit_signs,
                accepts=_octokit_accepts,
                is_there=lambda: octokit.found() is not None,
            ),
        ),
    ),
    Row(
        scheme="shopify",
        keys="scheme: shopify\nsecrets: SECRETS",
        secrets=PLAIN,
        parts={"body": body},
        unsigned_id="X-Shopify-Webhook-Id",
    ),
    Row(
        scheme="slack",
        keys="scheme: slack\nsecrets: SECRETS",
        secrets=PLAIN,
        parts={"time": later("X-Slack-Request-Timestamp"), "body": body},
        oracles=(Oracle(name="slack-sdk", signs=_slack_signs, accepts=_slack_accepts),),
    ),
    Row(
        scheme="stripe",
        keys="scheme: stripe\nsecrets: SECRETS",
        secrets=PLAIN,
        parts={
            "time": header("Stripe-Signature", lambda given: f"t={int(given[2:12]) + 1}{given[12:]}"),
            "body": body,
        },
        oracles=(Oracle(name="stripe", signs=_stripe_signs, accepts=_stripe_accepts),),
    ),
    Row(
        scheme="twilio",
        keys="scheme: twilio\nsecrets: SECRETS",
        secrets=PLAIN,
        parts={"path": path, "query": query, "body": body},
        binds_source=True,
        unsigned_id="I-Twilio-Idempotency-Token",
        oracles=(Oracle(name="twilio", signs=_twilio_signs, accepts=_twilio_accepts),),
    ),
    Row(
        scheme="twilio, of a form",
        keys="scheme: twilio\nformat: form\nsecrets: SECRETS",
        secrets=PLAIN,
        signs=_as_a_form,
        parts={"path": path, "query": query, "body": body},
        binds_source=True,
        unsigned_id="I-Twilio-Idempotency-Token",
        respelled=(_in_another_order, _in_escapes),
        oracles=(Oracle(name="twilio", signs=_twilio_signs_a_form, accepts=_twilio_accepts_a_form),),
    ),
    Row(
        scheme="api-key",
        keys="scheme: api-key\nheader: X-Api-Key\nkeys: SECRETS",
        secrets=(f"one.{PLAIN[0]}", f"next.{PLAIN[1]}", f"other.{PLAIN[2]}"),
    ),
    Row(
        scheme="basic",
        keys="scheme: basic\nuser: env:basic_one\nsecrets: SECRETS",
        secrets=PLAIN,
    ),
    Row(
        scheme="http-signature, ed25519",
        keys=_9421_KEYS,
        secrets=(pem(PRIVATE["one"]), pem(PRIVATE["next"]), pem(PRIVATE["other"])),
        signs=_by_rfc_9421,
        parts=_OF_9421,
        signs_id=True,
        binds_source=True,
        oracles=(_of_rfc_9421(algorithms.ED25519, _private_of, lambda text: _private_of(text).public_key()),),
    ),
    Row(
        scheme="http-signature, hmac-sha256",
        keys=_9421_KEYS,
        secrets=PLAIN,
        parts=_OF_9421,
        signs_id=True,
        binds_source=True,
        oracles=(_of_rfc_9421(algorithms.HMAC_SHA256, str.encode, str.encode),),
    ),
    Row(
        scheme="odoo-native",
        keys="scheme: odoo-native\ntoken: FIRST\nothers: OTHERS",
        secrets=PLAIN,
    ),
    Row(
        scheme="jwt, with a hash of the body",
        keys=f"scheme: jwt\nissuer: us\naudience: them\njwks: {issuer()}/PUBLISHED\nallow: [127.0.0.1/32]\nbody_hash: sha256",
        secrets=SECRETS,
        signs=_by_pyjwt,
        parts={"id": claim("jti", "msg_2"), "time": claim("exp", 4102444800), "body": body},
        signs_id=True,
        tells_which=False,
        oracles=(Oracle(name="joserfc", signs=_joserfc_signs, accepts=_joserfc_accepts),),
    ),
    Row(
        scheme="client-cert",
        keys="scheme: client-cert\nspki: PINS",
        secrets=SECRETS,
        signs=_by_proxy,
        tells_which=False,
    ),
)
