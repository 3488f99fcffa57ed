"""Senders that are known by name, signed URLs and public keys: what each signs counts, and nothing else."""

import base64
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.standard_webhooks import Signer, decode_key
from gateway.authenticate import Caller, Presented, Reason, Scheme, Unauthorized
from gateway.config import ConfigurationError
from tests import door
from tests.door import NOW, PUBLIC_URL, presented, whsec

BODY = b'{"action":"created","id":1}'
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
SECRET, NEXT = "a-secret-of-32-bytes-00000000000", "another-secret-of-32-bytes-00000"
PRIVATE = Ed25519PrivateKey.from_private_bytes(b"private-key-of-32-bytes-00000000")
SHARED = whsec("shared-secret-of-32-bytes-000000")


def whpk(key: Ed25519PrivateKey) -> str:
    return "whpk_" + base64.b64encode(key.public_key().public_bytes_raw()).decode()


ENVIRON = {"SECRET": SECRET, "NEXT": NEXT, "SHARED": SHARED, "PUBLIC": whpk(PRIVATE)}


def scheme(text: str) -> Scheme:
    return door.scheme(text, ENVIRON)


def hexed(message: bytes, secret: str = SECRET, algorithm: str = "sha256") -> str:
    return hmac.digest(secret.encode(), message, algorithm).hex()


def based(message: bytes, secret: str = SECRET, algorithm: str = "sha256") -> str:
    return base64.b64encode(hmac.digest(secret.encode(), message, algorithm)).decode()


WRONG = Unauthorized(Reason.WRONG_SIGNATURE)

# ── GitHub, Shopify, Slack ─────────────────────────────────────────────────────────────────────────

GITHUB = scheme("scheme: github, secrets: [env:SECRET]")


async def test_github_signs_the_body_and_its_delivery_id_counts_for_nothing() -> None:
    headers = {"X-Hub-Signature-256": "sha256=" + hexed(BODY), "X-GitHub-Delivery": "72d3162e-cc78-11e3"}
    for changed in ({}, {"X-GitHub-Delivery": "another"}, {"X-Hub-Signature": "sha1=nonsense"}):
        assert await GITHUB.authenticate(presented(headers | changed, BODY)) == Caller(None, secret=0)


async def test_the_signature_of_github_with_sha1_is_none() -> None:
    sha1 = "sha1=" + hexed(BODY, algorithm="sha1")
    assert await GITHUB.authenticate(presented({"X-Hub-Signature": sha1}, BODY)) == Unauthorized(Reason.MISSING_HEADER)
    for value in (sha1, sha1.replace("sha1=", "sha256=")):
        assert await GITHUB.authenticate(presented({"X-Hub-Signature-256": value}, BODY)) == WRONG


async def test_a_form_of_github_is_verified_byte_by_byte() -> None:
    form = b"payload=%7B%22ref%22%3A%22a+b%22%7D"
    headers = {"X-Hub-Signature-256": "sha256=" + hexed(form), **FORM}
    assert await GITHUB.authenticate(presented(headers, form)) == Caller(None, secret=0)
    assert await GITHUB.authenticate(presented(headers, form.replace(b"+", b"%20"))) == WRONG


async def test_shopify_writes_base64_and_nothing_else() -> None:
    shopify = scheme("scheme: shopify, secrets: [env:SECRET]")
    for value, answer in {
        based(BODY): Caller(None, secret=0),
        hexed(BODY): WRONG,
        based(BODY).rstrip("="): WRONG,
        "sha256=" + based(BODY): WRONG,
    }.items():
        assert await shopify.authenticate(presented({"X-Shopify-Hmac-Sha256": value}, BODY)) == answer


async def test_slack_signs_the_time_and_a_form_byte_by_byte() -> None:
    slack = scheme("scheme: slack, secrets: [env:SECRET]")
    form = b"token=x&team_id=T1&text=94070+%C3%A9&user_name=Steve"

    def signed(at: int, version: str = "v0") -> dict[str, str]:
        signature = f"{version}={hexed(f'{version}:{at}:'.encode() + form)}"
        return {"X-Slack-Signature": signature, "X-Slack-Request-Timestamp": str(at), **FORM}

    for at in (NOW, NOW - 300, NOW + 300):
        assert await slack.authenticate(presented(signed(at), form)) == Caller(None, secret=0)
    assert await slack.authenticate(presented(signed(NOW - 301), form)) == Unauthorized(Reason.TOO_OLD)
    assert await slack.authenticate(presented(signed(NOW + 301), form)) == Unauthorized(Reason.TOO_NEW)
    assert await slack.authenticate(presented(signed(NOW, "v1"), form)) == WRONG
    assert await slack.authenticate(presented(signed(NOW), form.replace(b"%C3", b"%c3"))) == WRONG
    later = signed(NOW) | {"X-Slack-Request-Timestamp": str(NOW + 1)}
    assert await slack.authenticate(presented(later, form)) == WRONG


# ── Stripe ─────────────────────────────────────────────────────────────────────────────────────────

STRIPE = scheme("scheme: stripe, secrets: [env:SECRET, env:NEXT]")


def stripe(at: int = NOW, secret: str = SECRET) -> str:
    return hexed(f"{at}.".encode() + BODY, secret)


MALFORMED = Unauthorized(Reason.MALFORMED_HEADER)


@pytest.mark.parametrize(
    ("header", "answer"),
    [
        (f"t={NOW},v1={stripe()}", Caller(None, secret=0)),
        (f"t={NOW},v1={stripe(secret=NEXT)}", Caller(None, secret=1)),
        (f"t={NOW},v1={stripe(secret='nobody')},v1={stripe()}", Caller(None, secret=0)),
        (f"v1={stripe()},t={NOW},v0=6ffbb59b2300aae63f272406069a9788598b792a944a07aba816edb039989a39", Caller(None, 0)),
        (f"t={NOW},v2=later,v1={stripe()},new", Caller(None, secret=0)),
        (",".join([f"t={NOW}", *["v1=x"] * 7, f"v1={stripe()}"]), Caller(None, secret=0)),
        (",".join([f"t={NOW}", *["v1=x"] * 8, f"v1={stripe()}"]), WRONG),
        (f"t={NOW},v0={stripe()}", MALFORMED),
        (f"t={NOW},v1=x,v0={stripe()}", WRONG),
        (f"t={NOW}", MALFORMED),
        (f"v1={stripe()}", MALFORMED),
        (f"t={NOW},t={NOW},v1={stripe()}", MALFORMED),
        (f"t={NOW + 1},v1={stripe()}", WRONG),
        (f"t={NOW - 301},v1={stripe(NOW - 301)}", Unauthorized(Reason.TOO_OLD)),
        (f"t={NOW + 301},v1={stripe(NOW + 301)}", Unauthorized(Reason.TOO_NEW)),
        (f"t={NOW + 600},v1={stripe(NOW + 600)}", Unauthorized(Reason.TOO_NEW)),
        (f"t=+{NOW},v1={stripe()}", Unauthorized(Reason.MALFORMED_TIMESTAMP)),
        (f"t={NOW}.5,v1={stripe()}", Unauthorized(Reason.MALFORMED_TIMESTAMP)),
        ("nonsense", MALFORMED),
        (",=,", MALFORMED),
    ],
)
async def test_stripe_signs_time_and_body_by_any_v1(header: str, answer: Caller | Unauthorized) -> None:
    assert await STRIPE.authenticate(presented({"Stripe-Signature": header}, BODY)) == answer


async def test_a_secret_of_stripe_is_used_as_it_is_written() -> None:
    ours = door.scheme("scheme: stripe, secrets: [env:SHARED]", ENVIRON)
    header = f"t={NOW},v1={stripe(secret=SHARED)}"
    assert await ours.authenticate(presented({"Stripe-Signature": header}, BODY)) == Caller(None, secret=0)


# ── signed URLs ────────────────────────────────────────────────────────────────────────────────────

URL = "scheme: hmac, header: X-Signature, secrets: [env:SECRET], signed: "


async def asked(ours: Scheme, target: str, message: str, body: bytes = BODY, **more: str) -> Caller | Unauthorized:
    headers = {"X-Signature": hexed(message.encode("utf-8", "surrogateescape")), **more}
    return await ours.authenticate(presented(headers, body, target=target))


@pytest.mark.parametrize(
    "target",
    [
        "/hooks/posts",
        "/hooks/posts?b=2&a=1",
        "/hooks/posts?q=a+b%27c&Q=%c3%A9",
        "/hooks/posts?",
        "/hooks/posts?x=\udce9",
    ],
)
async def test_a_signed_url_is_the_public_one_and_the_target_as_it_came(target: str) -> None:
    ours = scheme(URL + "'{url}|{body}'")
    signed = f"{PUBLIC_URL}{target}|{BODY.decode()}"
    assert await asked(ours, target, signed, Host="attacker.example") == Caller(None, secret=0)
    assert await asked(ours, target + "&c=3", signed) == WRONG
    assert await asked(ours, target, signed.replace("https://", "http://")) == WRONG
    assert (
        await asked(ours, target, signed.replace("gateway.example", "attacker.example"), Host="attacker.example")
        == WRONG
    )


async def test_a_target_that_is_a_whole_url_is_signed_by_nobody() -> None:
    ours = scheme(URL + "'{url}|{body}'")
    for target in ("https://gateway.example/hooks/posts", "", "*", "hooks/posts"):
        answer = await asked(ours, target, f"{PUBLIC_URL}{target}|{BODY.decode()}")
        assert answer == Unauthorized(Reason.MALFORMED_URL)


async def test_one_signature_never_proves_two_cuts_between_url_and_body() -> None:
    """What is signed can be cut in another place where nothing stands between, or what stands there can be in the URL."""
    apart, tight = scheme(URL + "'{url}|{body}'"), scheme(URL + "'{url}{body}'")
    form = "a=1|b=2"
    assert await asked(apart, "/hooks/posts", f"{PUBLIC_URL}/hooks/posts|{form}", form.encode()) == Caller(None, 0)
    moved = await asked(apart, "/hooks/posts|a=1", f"{PUBLIC_URL}/hooks/posts|{form}", b"b=2")
    assert moved == Unauthorized(Reason.MALFORMED_URL)
    for target, body in (("/hooks/posts?a=1&b=2", b"c=3"), ("/hooks/posts?a=1", b"&b=2c=3"), ("/hooks/posts?{", b"{}")):
        answer = await asked(tight, target, PUBLIC_URL + target + body.decode(), body)
        assert answer == Unauthorized(Reason.MALFORMED_URL), target
    for target, body in (("/hooks/posts", b"c=3"), ("/hooks/posts?a=1", BODY)):
        assert await asked(tight, target, PUBLIC_URL + target + body.decode(), body) == Caller(None, 0), target


async def test_an_id_before_a_url_never_takes_a_part_of_it() -> None:
    ours = scheme(URL + "'{id}{url}|{body}', id: X-Id")
    nested = f"/hooks/posts?next={PUBLIC_URL}/hooks/posts"
    signed = f"d-1{PUBLIC_URL}{nested}|{BODY.decode()}"
    assert await asked(ours, nested, signed, **{"X-Id": "d-1"}) == Caller("d-1", secret=0)
    cut = await asked(ours, "/hooks/posts", signed, **{"X-Id": f"d-1{PUBLIC_URL}/hooks/posts?next="})
    assert cut == Unauthorized(Reason.MALFORMED_ID)


# ── Twilio ─────────────────────────────────────────────────────────────────────────────────────────

TWILIO = scheme("scheme: twilio, format: form, secrets: [env:SECRET, env:NEXT]")
TWILIO_JSON = scheme("scheme: twilio, secrets: [env:SECRET]")
FIELDS = {"CallSid": "CA1234", "Caller": "+14158675310", "Digits": "1234", "Body": "é & ü = %", "Empty": ""}
SENT = "&".join(f"{name}={quote_plus(value)}" for name, value in FIELDS.items()).encode()
JOINED = "".join(name + FIELDS[name] for name in sorted(FIELDS))
OF_TWILIO = "/hooks/posts?z=1&a=a+b%27c"


async def called(
    signed: str,
    body: bytes = SENT,
    *,
    target: str = OF_TWILIO,
    ours: Scheme = TWILIO,
    secret: str = SECRET,
    algorithm: str = "sha1",
    **headers: str,
) -> Caller | Unauthorized:
    signature = based(signed.encode(), secret, algorithm)
    given = {**FORM, "X-Twilio-Signature": signature, **{name.replace("_", "-"): it for name, it in headers.items()}}
    return await ours.authenticate(presented(given, body, target=target))


async def test_twilio_signs_the_raw_url_and_the_sorted_fields() -> None:
    answer = await called(PUBLIC_URL + OF_TWILIO + JOINED)
    assert isinstance(answer, Caller)
    assert (answer.signed_id, answer.secret) == (None, 0)
    by_next = await called(PUBLIC_URL + OF_TWILIO + JOINED, secret=NEXT)
    assert isinstance(by_next, Caller)
    assert by_next.secret == 1


@pytest.mark.parametrize(
    "target", [OF_TWILIO.replace("+", "%20"), "/hooks/posts?a=a+b%27c&z=1", OF_TWILIO.replace("%27", "'")]
)
async def test_a_url_of_twilio_is_never_sorted_or_encoded_anew(target: str) -> None:
    assert await called(PUBLIC_URL + OF_TWILIO + JOINED, target=target) == WRONG
    assert isinstance(await called(PUBLIC_URL + target + JOINED, target=target), Caller)


@pytest.mark.parametrize(
    ("public_url", "signed", "accepted"),
    [
        ("https://gateway.example", "https://gateway.example", True),
        ("https://gateway.example", "https://gateway.example:443", True),
        ("https://gateway.example", "https://gateway.example:8443", False),
        ("https://gateway.example:8443", "https://gateway.example:8443", True),
        ("https://gateway.example:8443", "https://gateway.example", True),
        ("https://gateway.example:8443", "https://gateway.example:443", False),
        ("http://gateway.example/in", "http://gateway.example:80/in", True),
        ("https://[2001:db8::1]/in", "https://[2001:db8::1]:443/in", True),
    ],
)
async def test_twilio_signs_a_url_with_its_port_or_without(public_url: str, signed: str, accepted: bool) -> None:
    ours = door.scheme("scheme: twilio, format: form, secrets: [env:SECRET]", ENVIRON, public_url=public_url)
    answer = await called(signed + OF_TWILIO + JOINED, ours=ours)
    assert isinstance(answer, Caller) is accepted


async def test_the_hash_of_twilio_is_the_configured_one_whatever_a_header_says() -> None:
    sha256 = scheme("scheme: twilio, algorithm: sha256, format: form, secrets: [env:SECRET]")
    signed = PUBLIC_URL + OF_TWILIO + JOINED
    for configured, hashed, accepted in (
        (TWILIO, "sha1", True),
        (TWILIO, "sha256", False),
        (sha256, "sha256", True),
        (sha256, "sha1", False),
    ):
        for said in ("HMAC_SHA1", "HMAC_SHA256"):
            settings = f"key=webhooks_sharedkey_1,algorithm={said}"
            answer = await called(
                signed, ours=configured, algorithm=hashed, X_Twilio_Webhooks_Signature_Settings=settings
            )
            assert isinstance(answer, Caller) is accepted


async def test_json_of_twilio_has_its_digest_in_the_signed_url() -> None:
    target = f"{OF_TWILIO}&bodySHA256={hashlib.sha256(BODY).hexdigest()}"
    assert isinstance(await called(PUBLIC_URL + target, BODY, target=target, ours=TWILIO_JSON), Caller)
    tampered = await called(PUBLIC_URL + target, BODY + b" ", target=target, ours=TWILIO_JSON)
    assert tampered == Unauthorized(Reason.WRONG_BODY)
    for other in (OF_TWILIO, f"{target}&bodySHA256=0", f"{OF_TWILIO}&bodySHA256=", f"{OF_TWILIO}&bodySHA256=\udce9"):
        signed = (PUBLIC_URL + other).encode("utf-8", "surrogateescape").decode("latin-1")
        answer = await called(signed, BODY, target=other, ours=TWILIO_JSON)
        assert answer == Unauthorized(Reason.WRONG_BODY), other
    in_the_form = await called(PUBLIC_URL + target, SENT, target=target)
    assert in_the_form == WRONG, "the fields of a form are signed, whatever the URL has in it"


async def test_a_form_of_twilio_that_is_written_otherwise_is_the_same_post() -> None:
    """Its signature does not tell them apart, so that none of them is taken for a new event."""
    url = PUBLIC_URL + OF_TWILIO
    first = await called(url + "B" + "odyhello" + "Sid1", b"B=odyhello&Sid=1")
    assert isinstance(first, Caller)
    assert first.signed is not None
    for form in (b"Body=hello&Sid=1", b"Sid=1&B=odyhello", b"&Sid=%31&&Bo=dyhello", b"B=odyhello&Sid=1&Sid=1"):
        answer = await called(url + "Bodyhello" + "Sid1", form)
        assert answer == first, form


async def test_fields_beyond_reason_are_not_sorted() -> None:
    assert await called("", b"&".join([b"a=1"] * 1001)) == Unauthorized(Reason.WRONG_BODY)


# ── public keys ────────────────────────────────────────────────────────────────────────────────────

BOTH = scheme("scheme: standard-webhooks, secrets: [env:SHARED, env:PUBLIC]")


def v1a(message_id: str = "msg_1", at: int = NOW, key: Ed25519PrivateKey = PRIVATE) -> str:
    return "v1a," + base64.b64encode(key.sign(f"{message_id}.{at}.".encode() + BODY)).decode()


def with_signature(signature: str, message_id: str = "msg_1", at: int = NOW) -> Presented:
    headers = {"webhook-id": message_id, "webhook-timestamp": str(at), "webhook-signature": signature}
    return presented(headers, BODY)


async def test_a_public_key_verifies_beside_a_shared_secret() -> None:
    shared = Signer(SHARED).headers("msg_1", NOW, BODY)["webhook-signature"]
    assert await BOTH.authenticate(with_signature(shared)) == Caller("msg_1", secret=0)
    assert await BOTH.authenticate(with_signature(v1a())) == Caller("msg_1", secret=1)
    assert await BOTH.authenticate(with_signature(f"v1,x {v1a()}")) == Caller("msg_1", secret=1)
    assert await BOTH.authenticate(with_signature(f"{v1a()} {shared}")) == Caller("msg_1", secret=0)


async def test_a_signature_by_a_public_key_counts_as_it_is_written_and_no_other_way() -> None:
    right = v1a()
    raw = base64.b64decode(right.removeprefix("v1a,"))
    for signature, accepted in {
        right: True,
        f"v2,x {right} v1a,": True,
        " ".join(["v1a,x"] * 7 + [right]): True,
        " ".join(["v1a,x"] * 8 + [right]): False,
        " ".join(["v1,x"] * 20 + [right]): True,
        right.replace("v1a,", "v1,"): False,
        right.replace("v1a,", "V1a,"): False,
        right.rstrip("="): False,
        right + "=": False,
        right + ",": False,
        right.replace("v1a,", "v1a,\t"): False,
        right[:-3] + chr(ord(right[-3]) + 1) + "==": False,
        "v1a," + base64.b64encode(raw[:63]).decode(): False,
        "v1a," + base64.b64encode(raw + b"\0").decode(): False,
        "v1a," + raw.hex(): False,
        "v1a,": False,
        v1a("msg_2"): False,
        v1a(at=NOW + 1): False,
        v1a(key=Ed25519PrivateKey.generate()): False,
    }.items():
        answer = await BOTH.authenticate(with_signature(signature))
        assert isinstance(answer, Caller) is accepted, signature


async def test_a_public_key_counts_only_in_its_time() -> None:
    timed = scheme("scheme: standard-webhooks, secrets: [{secret: env:PUBLIC, not_before: 2026-11-23T06:05:18Z}]")
    at_last = with_signature(v1a())
    assert await timed.authenticate(at_last) == Caller("msg_1", secret=0)
    too_early = presented(dict(at_last.headers), BODY, at=NOW - 1)
    assert await timed.authenticate(too_early) == Unauthorized(Reason.NO_ACTIVE_SECRET)


VECTORS = json.loads((Path(__file__).parent / "vectors/standard-webhooks-v1a.json").read_text())["cases"]


STRICTER = {"malformed public key is skipped", "no public keys"}


@pytest.mark.parametrize("case", VECTORS, ids=[case["name"] for case in VECTORS])
async def test_what_others_signed_with_a_private_key_is_judged_as_they_judge_it(case: dict[str, Any]) -> None:
    """But for a key that can verify nothing, or none at all: that is told when the configuration is loaded."""
    if case["name"] in STRICTER:
        with pytest.raises(ConfigurationError):
            keyed(case["publicKeys"])
    else:
        answer = await keyed(case["publicKeys"]).authenticate(
            presented(case["headers"], case["body"].encode(), at=case["now"])
        )
        assert isinstance(answer, Caller) is case["valid"]


def keyed(keys: list[str]) -> Scheme:
    named = {f"KEY_{place}": key for place, key in enumerate(keys)}
    secrets = ", ".join(f"env:{name}" for name in named)
    return door.scheme(f"scheme: standard-webhooks, secrets: [{secrets}]", named)


def test_the_vectors_of_others_are_there_and_say_yes_and_no() -> None:
    assert len(VECTORS) == 22
    assert {case["valid"] for case in VECTORS} == {True, False}


@given(
    signature=st.text(max_size=100) | st.binary(max_size=80).map(lambda raw: "v1a," + base64.b64encode(raw).decode()),
    target=st.text(max_size=60) | st.just("/hooks/posts"),
    body=st.binary(max_size=60) | st.just(BODY),
    form=st.booleans(),
)
@settings(max_examples=300, deadline=None)
async def test_nothing_that_is_presented_makes_a_preset_raise_or_believe(
    signature: str, target: str, body: bytes, form: bool
) -> None:
    names = ["webhook-signature", "X-Hub-Signature-256", "X-Slack-Signature", "Stripe-Signature", "X-Twilio-Signature"]
    headers = dict.fromkeys([*names, "X-Shopify-Hmac-Sha256", "X-Signature"], signature)
    headers |= {"webhook-id": "msg_1", "webhook-timestamp": str(NOW), "X-Slack-Request-Timestamp": str(NOW)}
    given = presented(headers | (FORM if form else {}), body, target=target)
    for one in (BOTH, GITHUB, STRIPE, TWILIO, TWILIO_JSON, scheme(URL + "'{url}{body}'")):
        assert isinstance(await one.authenticate(given), Unauthorized)


def test_a_key_of_a_sender_is_a_secret_or_a_public_key() -> None:
    assert decode_key(SHARED) == b"shared-secret-of-32-bytes-000000"
    assert decode_key(whpk(PRIVATE)) == PRIVATE.public_key().public_bytes_raw()
    assert decode_key(whpk(PRIVATE).rstrip("=")) == PRIVATE.public_key().public_bytes_raw()
