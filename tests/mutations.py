"""Requests that somebody signed, and what a stranger could make of them.  Pure, but for the dice: one seed is one run."""

import base64
import hashlib
import hmac
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote_plus

from tests.program import CANARY, SECRETS, signed
from tests.wire import post

METER = "meter-secret-of-32-bytes-0000000"
SOURCES = """
  meter: {scheme: hmac, header: X-Signature, secrets: [env:METER], accepts: [order]}
  code: {scheme: github, secrets: [env:METER], accepts: [order]}
  pay: {scheme: stripe, secrets: [env:METER], accepts: [order]}
  chat: {scheme: slack, secrets: [env:METER], accepts: [order]}
  hub: {scheme: hmac, header: X-Signature, secrets: [env:METER], accepts: [order], format: "form-json:payload"}
  odoo: {scheme: odoo-native, token: env:ODOO_TOKEN, accepts: [order]}
  crm: {scheme: api-key, header: X-Api-Key, keys: [env:CRM], accepts: [order]}
  login: {scheme: basic, user: env:LOGIN, secrets: [env:METER], accepts: [order]}
  trusting: {scheme: hmac, header: X-Signature, secrets: [env:METER], accepts: [order]}
"""
JSON, FORM = "application/json", "application/x-www-form-urlencoded"
STATUSES = ("paid", "sent", "lost")


@dataclass(frozen=True)
class Shot:
    """What is sent, and of what kind it is."""

    raw: bytes
    kind: str


class Hostile:
    """Makes shots of one seed.  What it signs as it should be signed stands in `genuine`: nothing else may be believed."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self.genuine: set[tuple[str, int, str]] = set()  # source, id, status
        self._number = 0

    def shot(self) -> Shot:
        draw = self._dice.random()
        if draw < 0.02:
            return Shot(self._request(), "as it was signed")
        if draw < 0.30:
            return Shot(self._signed_nonsense(), "nonsense that is signed")
        if draw < 0.40:
            return Shot(self._forged(), "with a proof that is made up")
        raw, kinds = self._request(), []
        for _ in range(self._dice.choice((1, 1, 1, 2, 3, 6))):
            mutation = self._dice.choice(_MUTATIONS)
            raw = mutation(raw, self._dice)
            kinds.append(mutation.__name__.strip("_"))
        return Shot(raw, kinds[0])

    # ── what is right ────────────────────────────────────────────────────────────────────────────

    def _request(self) -> bytes:
        self._number += 1
        source, status = self._dice.choice(("shop", "meter", "code", "pay", "chat", "hub")), self._dice.choice(STATUSES)
        self.genuine.add((source, self._number, status))
        order = {"kind": "order", "id": self._number, "status": status, "who": {"name": CANARY}, "n": [1, 2.5, None]}
        return self._signed_for(source, json.dumps(order).encode())

    def _signed_for(self, source: str, body: bytes) -> bytes:
        if source == "hub":
            body = b"payload=" + quote_plus(body.decode("utf-8", "replace")).encode()
        return post(body, PROOFS[source](body), f"/hooks/{source}")

    # ── what is not ──────────────────────────────────────────────────────────────────────────────

    def _signed_nonsense(self) -> bytes:
        """Whoever has the secret may still send anything; it goes to a source whose rows are looked at by their types."""
        body = json.dumps({"kind": "order", "id": self._dice.randrange(1, 10**9), "status": "paid"}).encode()
        if self._dice.random() < 0.7:
            body = body.replace(self._dice.choice((b'"order"', b'"paid"', b"{", b": ")), self._dice.choice(_VALUES), 1)
        else:
            body = _flip(_insert(body, self._dice), self._dice)
        return self._signed_for("trusting", body)

    def _forged(self) -> bytes:
        source = self._dice.choice(("odoo", "crm", "login", "shop", "pay", "chat"))
        body = json.dumps({"kind": "order", "id": 10**9 + self._number, "status": "paid"}).encode()
        proof = self._dice.choice(_PROOF_LIKE)
        if source == "odoo":
            return post(body, {"content-type": JSON}, "/hooks/odoo/" + quote_plus(proof, errors="surrogateescape"))
        name = {"crm": "x-api-key", "login": "authorization", "pay": "stripe-signature", "chat": "x-slack-signature"}
        headers = {**signed(body, id="msg_forged"), name.get(source, "webhook-signature"): proof}
        headers["x-slack-request-timestamp"] = self._dice.choice((str(int(time.time())), "0", "٣", "1e9", ""))
        return post(body, headers, f"/hooks/{source}")


def _mac(signed_bytes: bytes) -> str:
    return hmac.new(METER.encode(), signed_bytes, hashlib.sha256).hexdigest()


def _slack(body: bytes) -> dict[str, str]:
    at = str(int(time.time()))
    mac = _mac(f"v0:{at}:".encode() + body)
    return {"content-type": JSON, "x-slack-request-timestamp": at, "x-slack-signature": f"v0={mac}"}


def _stripe(body: bytes) -> dict[str, str]:
    at = str(int(time.time()))
    return {"content-type": JSON, "stripe-signature": f"t={at},v1={_mac(at.encode() + b'.' + body)}"}


PROOFS: dict[str, Callable[[bytes], dict[str, str]]] = {
    "shop": signed,
    "meter": lambda body: {"content-type": JSON, "x-signature": _mac(body)},
    "trusting": lambda body: {"content-type": JSON, "x-signature": _mac(body)},
    "code": lambda body: {
        "content-type": JSON,
        "x-hub-signature-256": f"sha256={_mac(body)}",
        "x-github-delivery": "1",
    },
    "hub": lambda body: {"content-type": FORM, "x-signature": _mac(body)},
    "pay": _stripe,
    "chat": _slack,
}

_PROOF_LIKE = (
    "", " ", "v1,", "v1,AAAA", "v0=", "t=,v1=", "t=1,t=2,v1=00", "Basic ", "Basic ====", "Basic ZXJwOg==", "Bearer a.b.c",
    "a" * 3000, "partner.", ".", "partner.wrong-key-of-32-bytes-0000000000", "\udcff\udcfe", "é", "v1," + "A" * 88, ",",
    SECRETS["ODOO_TOKEN"][:-1], SECRETS["ODOO_TOKEN"] + "x", base64.b64encode(b"erp:\xff").decode(), "v0=" + "0" * 64,
    "t=99999999999999999999,v1=" + "0" * 64, " ".join(["v1,AAAA"] * 200), "Basic " + "A" * 2000,
)  # fmt: skip

_VALUES = (
    b"null", b"NaN", b"-Infinity", b"1e400", b"1e200000", b"-0", b'"\\u0000"', b'"\\ud800"', b'"\xff"', b'"\xc0\xaf"',
    b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"0." + b"1" * 5000, b'"' + b"a" * 60_000 + b'"', b'{"kind":"order",',
    b"{}", b"[]", b'""', b"true", b"\xef\xbb\xbf{", b"/* */", b"'x'", b'"\\', b"\0", b"\x1f\x8b\x08", b'"\\uDC00\\uD800"',
    b'"$(id)"', b"'; DROP TABLE events; --", b'"{{7*7}}"', b'{"__proto__":', b"1" + b"0" * 40,
)  # fmt: skip

_TOKENS = (
    b"\r\n", b"\n", b"\r", b"\0", b"\r\n\r\n", b" ", b"\t", b"\x7f", b"\xff\xfe", b"%00", b"%0d%0a", b"..", b"//",
    b"Transfer-Encoding: chunked\r\n", b"Content-Length: 0\r\n", b"Content-Length: 99999999999999999999\r\n",
    b"Expect: 100-continue\r\n", b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"Host: x\r\n", b"0\r\n\r\n", b"fffffff\r\n",
    b"Content-Encoding: gzip\r\n", b"X-A: " + b"a" * 9000 + b"\r\n", b"X: y\r\n" * 150, b"HTTP/1.1", b"POST /hooks/shop HTTP/1.1\r\n",
    b"traceparent: 00-" + b"f" * 32 + b"-" + b"0" * 16 + b"-zz\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00",
)  # fmt: skip


def _flip(raw: bytes, dice: random.Random) -> bytes:
    mutable = bytearray(raw)
    for _ in range(dice.choice((1, 1, 2, 8))):
        if mutable:
            mutable[dice.randrange(len(mutable))] ^= 1 << dice.randrange(8)
    return bytes(mutable)


def _insert(raw: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(raw) + 1)
    what = dice.choice(_TOKENS) if dice.random() < 0.8 else dice.randbytes(dice.randrange(1, 60))
    return raw[:at] + what + raw[at:]


def _insert_a_header(raw: bytes, dice: random.Random) -> bytes:
    lines = raw.split(b"\r\n")
    lines.insert(dice.randrange(1, max(2, raw.partition(b"\r\n\r\n")[0].count(b"\r\n"))), dice.choice(_TOKENS).strip())
    return b"\r\n".join(lines)


def _delete(raw: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(raw) + 1)
    return raw[:at] + raw[at + dice.choice((1, 2, 10, 80)) :]


def _repeat(raw: bytes, dice: random.Random) -> bytes:
    at, length = dice.randrange(len(raw) + 1), dice.choice((1, 4, 30, 200))
    return raw[:at] + raw[at : at + length] * dice.choice((2, 2, 3, 50)) + raw[at + length :]


def _repeat_a_header(raw: bytes, dice: random.Random) -> bytes:
    lines = raw.split(b"\r\n")
    lines.insert(1, dice.choice(lines))
    return b"\r\n".join(lines)


def _drop_a_header(raw: bytes, dice: random.Random) -> bytes:
    lines = raw.split(b"\r\n")
    del lines[dice.randrange(len(lines))]
    return b"\r\n".join(lines)


def _swap(raw: bytes, dice: random.Random) -> bytes:
    a, b, c = sorted(dice.randrange(len(raw) + 1) for _ in range(3))
    return raw[:a] + raw[b:c] + raw[a:b] + raw[c:]


def _cut(raw: bytes, dice: random.Random) -> bytes:
    return raw[: dice.randrange(len(raw) + 1)]


def _another_number(raw: bytes, dice: random.Random) -> bytes:
    number = dice.choice((b"0", b"-1", b"2", b"9" * 30, b"1.5", b"0x10", b"\xd9\xa3", b""))
    digits = [at for at, byte in enumerate(raw) if chr(byte).isdigit()]
    if not digits:
        return raw
    at = dice.choice(digits)
    return raw[:at] + number + raw[at + 1 :]


def _another_target(raw: bytes, dice: random.Random) -> bytes:
    method = dice.choice((b"POST", b"GET", b"TRACE", b"post", b"PUT", b"HEAD", b"P\0ST", b"OPTIONS", b"CONNECT"))
    target = dice.choice((
        b"/hooks/shop?x=1", b"/hooks/shop/", b"/hooks//shop", b"/hooks/%73hop", b"http://a/hooks/meter", b"*", b"/", b"/hooks/" + b"a" * 9000,
        b"/api/v1/events?limit=-1", b"/api/v1/events/x", b"/metrics", b"/hooks/../metrics", b"/hooks/shop#x", b"/hooks/\xff", b"/ready", b"",
        b"/api/v1/openapi.json", b"/hooks/shop/%2e%2e", b"//[", b"http://[::1", b"/hooks/shop\\..", b"/hooks/odoo/%F0%28%8C%28",
    ))  # fmt: skip
    return method + b" " + target + b" HTTP/1.1\r\n" + raw.partition(b"\r\n")[2]


def _for_another_source(raw: bytes, dice: random.Random) -> bytes:
    source = dice.choice((b"shop", b"meter", b"code", b"pay", b"chat", b"hub", b"odoo", b"crm", b"login", b"nobody"))
    return b"POST /hooks/" + source + b" HTTP/1.1\r\n" + raw.partition(b"\r\n")[2]


def _in_chunks(raw: bytes, dice: random.Random) -> bytes:
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length")]
    size = dice.choice((b"%x", b"%X", b"0%x", b"0x%x", b"%x;a=b", b"-%x", b"%x ")) % len(body)
    end = dice.choice((b"0\r\n\r\n", b"0\r\n", b"0\r\nX: y\r\n\r\n", b"zz\r\n", b"", b"0\n\n"))
    return b"\r\n".join([*lines, b"Transfer-Encoding: chunked", b"", size + b"\r\n" + body + b"\r\n" + end])


def _a_value_of_json(raw: bytes, dice: random.Random) -> bytes:
    head, _, body = raw.partition(b"\r\n\r\n")
    changed = body.replace(dice.choice((b'"order"', b"null", b"2.5", b"{", b'"name"')), dice.choice(_VALUES), 1)
    head = head.replace(b"content-length: %d" % len(body), b"content-length: %d" % len(changed))
    return head + b"\r\n\r\n" + changed


def _noise(raw: bytes, dice: random.Random) -> bytes:
    return dice.randbytes(dice.randrange(1, 400)) + raw[: dice.randrange(40)]


_MUTATIONS = (
    _flip, _insert, _insert_a_header, _delete, _repeat, _repeat_a_header, _drop_a_header, _swap, _cut, _another_number,
    _another_target, _for_another_source, _in_chunks, _a_value_of_json, _noise,
)  # fmt: skip
