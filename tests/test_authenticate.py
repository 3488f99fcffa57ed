"""Who posts is proven or refused, and nothing that a sender writes makes the door stumble."""

import base64
import hmac
import time
from datetime import UTC, datetime
from ipaddress import IPv4Address, ip_address, ip_network

import pytest
import standardwebhooks
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.mac import Mac
from connectors.standard_webhooks import Signer, decode_secret
from gateway.authenticate import Caller, Presented, Reason, Scheme, Unauthorized, scheme_for
from gateway.authenticate.peer import client_address
from tests import door
from tests.door import NOW, configured, whsec

BODY = b'{"type":"odoo.purchase.approval_requested","timestamp":"2026-11-23T06:05:18Z","data":{"db":"odoo19","model":"purchase.order","id":10,"company_id":1}}'
OLD, NEW = whsec("0123456789abcdef01234567"), whsec("next-secret-of-32-bytes-00000000")
METER, ODOO_TOKEN = "meter-secret-of-32-bytes-0000000", "odoo-token-of-32-bytes-000000000"
ENVIRON = {
    "OLD": OLD,
    "NEW": NEW,
    "METER": METER,
    "METER_NEXT": "next-meter-secret-of-32-bytes-00",
    "ODOO_TOKEN": ODOO_TOKEN,
    "CRM": "crm-1.key-one-of-32-bytes-000000000000",
    "CRM_NEXT": "crm-2.key-two-of-32-bytes-000000000000",
}


def scheme(text: str) -> Scheme:
    return door.scheme(text, ENVIRON)


def presented(
    headers: dict[str, str] | list[tuple[str, str]], body: bytes = BODY, *, at: float = NOW, token: str | None = None
) -> Presented:
    return door.presented(headers, body, at=at, token=token)


def signed(secret: str = OLD, *, id: str = "msg_1", at: int = NOW, body: bytes = BODY) -> dict[str, str]:  # noqa: A002
    return Signer(secret).headers(id, at, body)


# ── Standard Webhooks ──────────────────────────────────────────────────────────────────────────────

STANDARD = scheme("scheme: standard-webhooks, secrets: [env:OLD, env:NEW]")


async def test_what_an_odoo_addon_signed_is_accepted() -> None:
    """Recorded from the addon on a real Odoo, signed by its own code."""
    headers = {
        "webhook-id": "msg_WZYX7JN5XI2GW2PPNYBW3UMF",
        "webhook-timestamp": "1795413918",
        "webhook-signature": "v1,DUvM5P47w8pBAL3gO2KHJrNJUB/dCp/V0m+B67BRg6E=",
    }
    assert await STANDARD.authenticate(presented(headers)) == Caller("msg_WZYX7JN5XI2GW2PPNYBW3UMF", secret=0)


async def test_every_active_secret_counts_and_is_told_apart() -> None:
    assert await STANDARD.authenticate(presented(signed(OLD))) == Caller("msg_1", secret=0)
    assert await STANDARD.authenticate(presented(signed(NEW))) == Caller("msg_1", secret=1)
    other = signed(whsec("nobodys-secret-of-32-bytes-00000"))
    assert await STANDARD.authenticate(presented(other)) == Unauthorized(Reason.WRONG_SIGNATURE)


async def test_a_secret_counts_only_in_its_time() -> None:
    timed = scheme(
        "scheme: standard-webhooks, tolerance: 1h, secrets: "
        "[{secret: env:OLD, not_after: 2026-11-23T06:00:00Z}, {secret: env:NEW, not_before: 2026-11-23T06:10:00Z}]"
    )
    ends = datetime(2026, 11, 23, 6, tzinfo=UTC).timestamp()
    begins = datetime(2026, 11, 23, 6, 10, tzinfo=UTC).timestamp()
    assert await timed.authenticate(presented(signed(OLD), at=ends - 1)) == Caller("msg_1", secret=0)
    assert await timed.authenticate(presented(signed(OLD), at=ends)) == Unauthorized(Reason.NO_ACTIVE_SECRET)
    assert await timed.authenticate(presented(signed(NEW), at=begins - 1)) == Unauthorized(Reason.NO_ACTIVE_SECRET)
    assert await timed.authenticate(presented(signed(NEW), at=begins)) == Caller("msg_1", secret=1)
    assert await timed.authenticate(presented(signed(OLD), at=begins)) == Unauthorized(Reason.WRONG_SIGNATURE)


async def test_a_list_of_signatures_needs_one_that_is_right() -> None:
    right = signed()["webhook-signature"]
    for signatures, accepted in {
        f"v1,wrong {right}": True,
        f"v1a,c2ln v2,c2ln {right}": True,
        f"v2,c2ln v3 , {right}": True,
        " ".join(["v1a,x"] * 8 + [right]): True,
        " ".join(["v1,x"] * 7 + [right]): True,
        " ".join(["v1,x"] * 8 + [right]): False,
        right.removeprefix("v1,"): False,
        right.replace("v1,", "v2,"): False,
        right.replace("v1,", "V1,"): False,
        right.replace("v1,", "v1a,"): False,
        right.rstrip("="): False,
        f"{right}=": False,
        right.replace("v1,", "v1,\t"): False,
        f"{right},": False,
        "v1,": False,
        "": False,
    }.items():
        answer = await STANDARD.authenticate(presented({**signed(), "webhook-signature": signatures}))
        assert isinstance(answer, Caller) is accepted, signatures


@pytest.mark.parametrize(
    ("timestamp", "reason"),
    [
        (str(NOW - 301), Reason.TOO_OLD),
        (str(NOW + 301), Reason.TOO_NEW),
        ("0", Reason.TOO_OLD),
        ("999999999999", Reason.TOO_NEW),
        (f"{NOW}.0", Reason.MALFORMED_TIMESTAMP),
        (f"{NOW}.99", Reason.MALFORMED_TIMESTAMP),
        ("1.795413918e9", Reason.MALFORMED_TIMESTAMP),
        (f" {NOW}", Reason.MALFORMED_TIMESTAMP),
        (f"+{NOW}", Reason.MALFORMED_TIMESTAMP),
        (f"-{NOW}", Reason.MALFORMED_TIMESTAMP),
        ("1_795413918", Reason.MALFORMED_TIMESTAMP),
        ("1" * 13, Reason.MALFORMED_TIMESTAMP),
        ("١٧٩٥٤١٣٩١٨", Reason.MALFORMED_HEADER),
        ("", Reason.MALFORMED_HEADER),
        ("NaN", Reason.MALFORMED_TIMESTAMP),
    ],
)
async def test_a_timestamp_is_digits_within_a_tolerance_that_has_two_sides(timestamp: str, reason: Reason) -> None:
    headers = {**signed(), "webhook-timestamp": timestamp}
    if timestamp.isascii():
        headers["webhook-signature"] = by_hand(OLD, "msg_1", timestamp)
    assert await STANDARD.authenticate(presented(headers)) == Unauthorized(reason)


async def test_a_timestamp_at_the_edge_of_the_tolerance_counts() -> None:
    for at in (NOW - 300, NOW + 300):
        assert isinstance(await STANDARD.authenticate(presented(signed(at=at))), Caller)


@pytest.mark.parametrize(
    ("message_id", "reason"),
    [
        ("msg.1", Reason.MALFORMED_ID),
        (f"msg.{NOW}", Reason.MALFORMED_ID),
        ("msg 1", Reason.MALFORMED_ID),
        ("x" * 257, Reason.MALFORMED_ID),
        ("", Reason.MALFORMED_HEADER),
        ("msg\t1", Reason.MALFORMED_HEADER),
        ("msg\x7f", Reason.MALFORMED_HEADER),
        ("msg_é", Reason.MALFORMED_HEADER),
        ("msg_\udce9", Reason.MALFORMED_HEADER),
    ],
)
async def test_an_id_is_visible_ascii_without_a_dot(message_id: str, reason: Reason) -> None:
    headers = {**signed(), "webhook-id": message_id}
    if message_id.isascii():
        headers["webhook-signature"] = by_hand(OLD, message_id, str(NOW))
    assert await STANDARD.authenticate(presented(headers)) == Unauthorized(reason)


@pytest.mark.parametrize("header", ["webhook-id", "webhook-timestamp", "webhook-signature"])
async def test_each_header_must_be_there_once(header: str) -> None:
    without = {name: value for name, value in signed().items() if name != header}
    assert await STANDARD.authenticate(presented(without)) == Unauthorized(Reason.MISSING_HEADER)
    twice = [*signed().items(), (header.title(), signed()[header])]
    assert await STANDARD.authenticate(presented(twice)) == Unauthorized(Reason.REPEATED_HEADER)
    long = {**signed(), header: "1" * 5000}
    assert await STANDARD.authenticate(presented(long)) == Unauthorized(Reason.MALFORMED_HEADER)


async def test_all_that_is_signed_must_be_as_it_was_signed() -> None:
    for changed in (
        presented({**signed(), "webhook-id": "msg_2"}),
        presented({**signed(), "webhook-timestamp": str(NOW + 1)}),
        presented(signed(), BODY + b" "),
        presented(signed(), b""),
        presented(signed(body=b"\xef\xbb\xbf" + BODY)),
    ):
        assert await STANDARD.authenticate(changed) == Unauthorized(Reason.WRONG_SIGNATURE)


async def test_a_byte_order_mark_is_signed_as_all_other_bytes() -> None:
    body = b"\xef\xbb\xbf" + BODY
    assert isinstance(await STANDARD.authenticate(presented(signed(body=body), body)), Caller)


def by_hand(secret: str, message_id: str, timestamp: str) -> str:
    content = f"{message_id}.{timestamp}.".encode() + BODY
    return "v1," + base64.b64encode(hmac.digest(decode_secret(secret), content, "sha256")).decode()


@given(
    key=st.binary(max_size=200),
    message=st.binary(max_size=300),
    algorithm=st.sampled_from(["sha256", "sha512", "sha1"]),
)
def test_a_mac_is_that_of_the_standard_library_each_time(key: bytes, message: bytes, algorithm: str) -> None:
    """Keys of all lengths: longer than a block of the hash, too, which are hashed first."""
    mac = Mac(key, algorithm)
    assert [mac.of(message), mac.of(message)] == [hmac.digest(key, message, algorithm)] * 2


# ── against the library of the specification ───────────────────────────────────────────────────────
# Where it accepts more than we do, on purpose: a timestamp that is a float, has blanks, an underscore, an exponent or
# other digits than 0-9; junk characters in the base64 of a signature, or its padding left out; an id with a dot, a blank
# or anything but ASCII; any number of signatures; a header that is there twice (it is given a dict).


@given(
    secret=st.binary(min_size=24, max_size=64),
    message_id=st.text(
        st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="."), min_size=1, max_size=256
    ),
    body=st.text(st.characters(exclude_categories=["Cs"])),
    padded=st.booleans(),
)
@settings(max_examples=60, deadline=None)
async def test_what_the_library_signs_we_accept_and_what_we_sign_it_accepts(
    secret: bytes, message_id: str, body: str, padded: bool
) -> None:
    text = "whsec_" + base64.b64encode(secret).decode()
    text = text if padded else text.rstrip("=")
    config = configured(
        sources="posts: {scheme: standard-webhooks, secrets: [env:IT], accepts: [only]}\n", environ={"IT": text}
    )
    ours = scheme_for(config.sources["posts"], config.serve)
    library = standardwebhooks.Webhook(text)
    now = int(time.time())
    headers = {
        "webhook-id": message_id,
        "webhook-timestamp": str(now),
        "webhook-signature": library.sign(message_id, datetime.fromtimestamp(now, UTC), body),
    }
    answer = await ours.authenticate(presented(headers, body.encode(), at=now))
    assert answer == Caller(message_id, secret=0)
    library.verify(body, Signer(text).headers(message_id, now, body.encode()), json_parse=False)


@pytest.mark.parametrize(
    ("secret", "says"),
    [
        ("v1,whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3", "signatures"),
        ("whpk_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3", "asymmetric"),
        ("MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3", "whsec_"),
        ("whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0N!Y3", "base64"),
        ("whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3é", "base64"),
        ("whsec_MDEy", "24 to 64"),
        ("whsec_" + "MDEy" * 30, "24 to 64"),
        ("", "whsec_"),
    ],
)
def test_a_secret_that_is_none_is_told_with_its_mend_and_without_itself(secret: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as told:
        decode_secret(secret)
    assert "MDEy" not in str(told.value)


# ── HMAC in a header ───────────────────────────────────────────────────────────────────────────────

SUPPLIER = (
    "scheme: hmac, header: X-Signature, prefix: 'sha256=', signed: '{id}.{timestamp}.{body}', timestamp: X-Timestamp, "
    "tolerance: 5m, id: X-Delivery, secrets: [env:METER, env:METER_NEXT]"
)


def supplied(message_id: str = "d-1", timestamp: str = str(NOW), secret: str = METER) -> dict[str, str]:
    mac = hmac.digest(secret.encode(), f"{message_id}.{timestamp}.".encode() + BODY, "sha256")
    return {"X-Signature": "sha256=" + mac.hex(), "X-Timestamp": timestamp, "X-Delivery": message_id}


async def test_an_hmac_over_id_timestamp_and_body_signs_the_id() -> None:
    supplier = scheme(SUPPLIER)
    assert await supplier.authenticate(presented(supplied())) == Caller("d-1", secret=0)
    assert await supplier.authenticate(presented(supplied(secret="next-meter-secret-of-32-bytes-00"))) == Caller(
        "d-1", 1
    )
    refused: list[tuple[dict[str, str] | list[tuple[str, str]], Reason]] = [
        (supplied(timestamp=str(NOW - 301)), Reason.TOO_OLD),
        (supplied(timestamp=str(NOW + 301)), Reason.TOO_NEW),
        (supplied(timestamp=f"{NOW}.0"), Reason.MALFORMED_TIMESTAMP),
        (supplied(message_id="d.1"), Reason.MALFORMED_ID),
        (supplied() | {"X-Delivery": "d-2"}, Reason.WRONG_SIGNATURE),
        (supplied() | {"X-Signature": supplied()["X-Signature"].removeprefix("sha256=")}, Reason.WRONG_SIGNATURE),
        (supplied() | {"X-Signature": "sha256=é"}, Reason.MALFORMED_HEADER),
        ({}, Reason.MISSING_HEADER),
        ([*supplied().items(), ("x-delivery", "d-2")], Reason.REPEATED_HEADER),
    ]
    for headers, reason in refused:
        assert await supplier.authenticate(presented(headers)) == Unauthorized(reason), headers


async def test_hexadecimal_may_be_written_in_capitals() -> None:
    headers = supplied()
    headers["X-Signature"] = "sha256=" + headers["X-Signature"].removeprefix("sha256=").upper()
    assert isinstance(await scheme(SUPPLIER).authenticate(presented(headers)), Caller)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512", "sha1"])
@pytest.mark.parametrize("encoding", ["hex", "base64"])
async def test_an_hmac_over_the_body_alone_signs_no_id(algorithm: str, encoding: str) -> None:
    meter = scheme(f"scheme: hmac, header: X-Sig, algorithm: {algorithm}, encoding: {encoding}, secrets: [env:METER]")
    mac = hmac.digest(METER.encode(), BODY, algorithm)
    text = mac.hex() if encoding == "hex" else base64.b64encode(mac).decode()
    assert await meter.authenticate(presented({"X-Sig": text})) == Caller(None, secret=0)
    assert await meter.authenticate(presented({"X-Sig": text}, BODY + b" ")) == Unauthorized(Reason.WRONG_SIGNATURE)
    assert await meter.authenticate(presented({"X-Sig": text[:-1]})) == Unauthorized(Reason.WRONG_SIGNATURE)


async def test_one_signature_never_proves_two_ids() -> None:
    """What is signed without anything between its parts can be cut in another place."""
    tight = scheme(SUPPLIER.replace("{id}.{timestamp}.{body}", "{id}{timestamp}{body}"))

    def by_hand(message_id: str, timestamp: str) -> dict[str, str]:
        mac = hmac.digest(METER.encode(), f"d0{NOW}".encode() + BODY, "sha256")
        return {"X-Signature": "sha256=" + mac.hex(), "X-Timestamp": timestamp, "X-Delivery": message_id}

    answers = [await tight.authenticate(presented(by_hand(*cut))) for cut in (("d", f"0{NOW}"), ("d0", str(NOW)))]
    assert sum(isinstance(answer, Caller) for answer in answers) == 1


async def test_an_id_at_the_end_of_what_is_signed_may_end_as_it_likes() -> None:
    ending = scheme(SUPPLIER.replace("{id}.{timestamp}.{body}", "{timestamp}.{body}.{id}"))
    mac = hmac.digest(METER.encode(), f"{NOW}.".encode() + BODY + b".d-7", "sha256")
    headers = {"X-Signature": "sha256=" + mac.hex(), "X-Timestamp": str(NOW), "X-Delivery": "d-7"}
    assert await ending.authenticate(presented(headers)) == Caller("d-7", secret=0)


# ── API keys, and Odoo's own webhooks ──────────────────────────────────────────────────────────────


async def test_an_api_key_is_found_by_its_id_and_proven_by_its_secret() -> None:
    crm = scheme("scheme: api-key, header: X-Api-Key, keys: [env:CRM, env:CRM_NEXT]")
    for key, answer in {
        ENVIRON["CRM"]: Caller(None, secret=0),
        ENVIRON["CRM_NEXT"]: Caller(None, secret=1),
        "crm-1.key-two-of-32-bytes-000000000000": Unauthorized(Reason.WRONG_KEY),
        "crm-3.key-one-of-32-bytes-000000000000": Unauthorized(Reason.WRONG_KEY),
        ENVIRON["CRM"] + "0": Unauthorized(Reason.WRONG_KEY),
        "crm-1.": Unauthorized(Reason.WRONG_KEY),
        "crm-1": Unauthorized(Reason.WRONG_KEY),
        ".": Unauthorized(Reason.WRONG_KEY),
        "": Unauthorized(Reason.MALFORMED_HEADER),
        "crm-1.\udce9": Unauthorized(Reason.MALFORMED_HEADER),
    }.items():
        assert await crm.authenticate(presented({"x-api-key": key})) == answer, key
    assert await crm.authenticate(presented({})) == Unauthorized(Reason.MISSING_HEADER)


async def test_odoos_own_webhook_is_known_by_the_end_of_its_url_alone() -> None:
    odoo = scheme("scheme: odoo-native, token: env:ODOO_TOKEN")
    assert await odoo.authenticate(presented({}, token=ODOO_TOKEN)) == Caller(None, secret=0)
    for token in (ODOO_TOKEN + "0", ODOO_TOKEN[:-1], "", "é", "\udce9", "\0"):
        assert await odoo.authenticate(presented({}, token=token)) == Unauthorized(Reason.WRONG_TOKEN)
    assert await odoo.authenticate(presented({})) == Unauthorized(Reason.MISSING_TOKEN)


def test_what_is_presented_does_not_show_itself() -> None:
    shown = repr(presented({"x-api-key": "crm-1.secret"}, b"CANARY", token="token"))
    assert "secret" not in shown
    assert "CANARY" not in shown
    assert "token" not in shown


# ── whatever comes ─────────────────────────────────────────────────────────────────────────────────

SCHEMES = [
    STANDARD,
    scheme(SUPPLIER),
    scheme("scheme: hmac, header: webhook-signature, encoding: base64, secrets: [env:METER]"),
    scheme("scheme: api-key, header: X-Api-Key, keys: [env:CRM]"),
    scheme("scheme: odoo-native, token: env:ODOO_TOKEN"),
    scheme("scheme: jwt, issuer: i, audience: a, jwks: 'https://id.example/keys'"),
]
NAMES = ["webhook-id", "webhook-timestamp", "webhook-signature", "x-signature", "x-timestamp", "x-delivery", "x-api-key", "authorization"]  # fmt: skip
VALUES = (
    st.text(max_size=40)
    | st.binary(max_size=40).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
    | st.from_regex(r"(v1,|sha256=|Bearer |crm-1\.)?[\w=+/.,-]{0,20}")
    | st.sampled_from(
        [
            str(NOW),
            "msg_1",
            "v1,",
            "Bearer eyJhbGciOiJub25lIiwia2lkIjoiYSIsInR5cCI6IkpXVCJ9.e30.e30",
            "Bearer W10.W10.W10",
        ]
    )
)


@given(
    headers=st.lists(st.tuples(st.sampled_from(NAMES), VALUES), max_size=8),
    body=st.binary(max_size=60),
    token=st.none() | st.text(max_size=40) | st.just("\ud800"),
    at=st.integers(0, 2**40) | st.just(NOW),
)
@settings(max_examples=400, deadline=None)
async def test_nothing_that_is_presented_makes_a_scheme_raise_or_believe(
    headers: list[tuple[str, str]], body: bytes, token: str | None, at: int
) -> None:
    for one in SCHEMES[:-1]:
        assert isinstance(await one.authenticate(presented(headers, body, token=token, at=at)), Unauthorized)


# ── whose request it is ────────────────────────────────────────────────────────────────────────────

PROXIES = [ip_network("10.0.0.0/8"), ip_network("fd00::/8")]


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("192.0.2.7", [], "192.0.2.7"),
        ("192.0.2.7", ["198.51.100.1"], "192.0.2.7"),  # whoever is no proxy of ours can write what it likes
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["203.0.113.9, 198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["203.0.113.9, 198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        ("10.0.0.1", ["203.0.113.9", "198.51.100.1", "10.0.0.2"], "198.51.100.1"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", ["198.51.100.1:4711"], "198.51.100.1"),
        ("10.0.0.1", ["[2001:db8::1]:4711"], "2001:db8::1"),
        ("10.0.0.1", ["2001:db8::1"], "2001:db8::1"),
        ("10.0.0.1", ["[2001:db8::1]"], "2001:db8::1"),
        ("10.0.0.1", ["::ffff:198.51.100.1"], "198.51.100.1"),
        ("::ffff:10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("fd00::1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1, unknown"], None),
        ("10.0.0.1", ["198.51.100.1,"], None),
        ("10.0.0.1", ["010.0.0.1"], None),
        ("10.0.0.1", ["\udce9"], None),
        (None, ["198.51.100.1"], "198.51.100.1"),
        (None, [], None),
    ],
)
def test_the_client_is_the_nearest_that_is_no_proxy_of_ours(
    peer: str | None, forwarded: list[str], client: str | None
) -> None:
    found = client_address(ip_address(peer) if peer else None, forwarded, PROXIES)
    assert found == (ip_address(client) if client else None)


@given(forwarded=st.lists(st.text(max_size=30), max_size=4))
@settings(deadline=None)
def test_no_forwarded_header_raises_or_hides_who_is_not_a_proxy(forwarded: list[str]) -> None:
    stranger = IPv4Address("192.0.2.7")
    assert client_address(stranger, forwarded, PROXIES) == stranger
    client_address(IPv4Address("10.0.0.1"), forwarded, PROXIES)
