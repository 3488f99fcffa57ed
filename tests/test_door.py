"""The door from outside, on bare sockets: whatever is posted, the answer is right, and nothing of it is kept or repeated."""

import asyncio
import hashlib
import hmac
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from urllib.parse import quote_plus

import asyncpg
import pytest
import pytest_asyncio

from tests.conftest import TEMPLATE, made_of
from tests.program import (
    CANARY,
    SECRETS,
    Partner,
    Program,
    configuration,
    ended_with,
    order,
    partner,
    signed,
    until,
    whsec,
)
from tests.test_authenticate_client_cert import KEY, certificate, spki, told
from tests.wire import Heard, chunked, connected, post

METER = "meter-secret-of-32-bytes-0000000"
RETIRED = whsec("retired-secret-of-32-bytes-00000")
SOURCES = """
  both: {scheme: standard-webhooks, secrets: [env:SHOP_SECRET, env:SHOP_SECRET_NEXT, {secret: env:RETIRED, not_after: 2020-01-01T00:00:00Z}], accepts: [order]}
  meter: {scheme: hmac, header: X-Signature, secrets: [env:METER], accepts: [order]}
  hub: {scheme: hmac, header: X-Signature, secrets: [env:METER], accepts: [order], format: "form-json:payload", body: 4KiB}
  phone: {scheme: hmac, header: X-Signature, secrets: [env:METER], accepts: [order], format: form}
  odoo: {scheme: odoo-native, token: env:ODOO_TOKEN, accepts: [order]}
  few: {scheme: standard-webhooks, secrets: [env:SHOP_SECRET], accepts: [order], limit: 2/s}
  edge: {scheme: client-cert, spki: ["PIN"], accepts: [order]}
  inside: {scheme: standard-webhooks, secrets: [env:SHOP_SECRET], accepts: [order], from: [10.1.0.0/16, "2001:db8::/32"]}
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def dsn(server: str) -> AsyncIterator[str]:
    async for dsn in made_of(TEMPLATE, server):
        yield dsn


@pytest.fixture(scope="module")
def sink() -> Iterator[Partner]:
    with partner() as sink:
        yield sink


@pytest.fixture(scope="module")
def program(dsn: str, sink: Partner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """One program for all of this; what a test posts that must be taken is its own."""
    text = configuration(partner=sink.address, database="env:DSN", sources=SOURCES)
    text = text.replace("scheme: standard-webhooks", "scheme: standard-webhooks, tolerance: 1h")  # signed on import
    text = text.replace('"127.0.0.1:PORT"}', '"127.0.0.1:PORT", trusted_proxies: [127.0.0.2/32]}')
    text = text.replace("PIN", spki(KEY))
    environ = {"DSN": dsn, "METER": METER, "RETIRED": RETIRED}
    program = Program(tmp_path_factory.mktemp("door"), text, environ=environ)
    with ended_with(program):
        program.start().ready()
        yield program
        assert program.stop() == 0
        assert CANARY not in program.output
        assert not program.log("request.failed"), "a defect of ours"


# ── the right answer ────────────────────────────────────────────────────────────────────────────────


def wrong(**changes: str) -> dict[str, str]:
    """A good order's headers, but for these."""
    return {**signed(ORDER), **changes}


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in signed(ORDER).items() if key != name}


def twice(name: str) -> list[tuple[str, str]]:
    good = signed(ORDER)
    return [*good.items(), (name, good[name])]


ORDER = order()
JSON = {"content-type": "application/json"}
DEEP = b'{"kind":"order","x":' + b"[" * 20_000 + b"]" * 20_000 + b"}"

REFUSED: dict[str, tuple[int, bytes]] = {}


def refused(name: str, status: int, raw: bytes) -> None:
    REFUSED[name] = status, raw


def post_of(text: str | bytes) -> bytes:
    return post(text if isinstance(text, bytes) else text.encode())


# the body
refused("no body", 400, post(b"", signed(b"")))
refused("no body and no length", 400, post(b"", signed(b"")).replace(b"content-length: 0\r\n", b""))
refused("a body over the limit", 413, post(order(pad="x" * 70_000)))
refused("a chunked body over the limit", 413, chunked(*[b"x" * 8192] * 9))
refused("a chunked body whose chunks lie", 400, chunked(end=b"fffffffffffffffff\r\nx"))
refused("a chunk without a size", 400, chunked(end=b"zz\r\n" + CANARY.encode()))
refused("a chunk without its end", 400, chunked(end=b"5\r\nabcdefgh\r\n0\r\n\r\n"))
refused("broken JSON", 400, post_of('{"kind": "order", "' + CANARY))
refused("JSON and something after it", 400, post_of(order() + b"{}"))
refused("UTF-16", 400, post_of(order().decode().encode("utf-16")))
refused("bytes that are no UTF-8", 400, post_of(b'{"kind": "order", "id": 1, "status": "\xff\xfe"}'))
refused("a key twice", 400, post_of('{"kind": "order", "id": 1, "id": 2, "status": "paid"}'))
refused("a key twice, once in escapes", 400, post_of('{"kind": "order", "id": 1, "\\u0069d": 2, "status": "paid"}'))
refused("NaN", 400, post_of('{"kind": "order", "id": NaN, "status": "paid"}'))
refused("depth", 400, post_of(DEEP))
refused("a list", 400, post_of("[1, 2]"))
refused("null", 400, post_of("null"))
refused("a NUL in a value", 422, post_of('{"kind": "order", "id": 1, "status": "pa\\u0000id"}'))
refused("a NUL byte", 400, post_of(b'{"kind": "order", "id": 1, "status": "pa\x00id"}'))
refused("a lone surrogate", 400, post_of('{"kind": "order", "id": 1, "status": "\\ud800"}'))
refused("a policy of nobody", 422, post_of(order(kind=CANARY)))
refused("a number too large", 422, post_of(order(id=10**60)))
refused("a number where none is", 422, post_of(order(id=CANARY)))
refused("a missing field", 422, post_of('{"kind": "order", "status": "paid"}'))

# what the head says
refused("no content type", 415, post(ORDER, without("content-type")))
refused("text", 415, post(ORDER, wrong(**{"content-type": "text/plain"})))
refused("a form", 415, post(ORDER, wrong(**{"content-type": "application/x-www-form-urlencoded"})))
refused("a content type that is none", 415, post(ORDER, wrong(**{"content-type": CANARY})))
refused("gzip", 415, post(ORDER, wrong(**{"content-encoding": "gzip"})))
refused(
    "gzip behind identity",
    415,
    post(ORDER, [*signed(ORDER).items(), ("content-encoding", "identity"), ("content-encoding", "gzip")]),
)
refused("a transfer encoding that is not known", 400, post(ORDER, wrong(**{"transfer-encoding": "gzip, chunked"})))
refused("identity as a transfer encoding", 400, post(ORDER, wrong(**{"transfer-encoding": "identity"})))
refused(
    "two transfer encodings",
    400,
    post(b"0\r\n\r\n", [*signed(b"").items(), ("transfer-encoding", "chunked"), ("transfer-encoding", "identity")]),
)
refused(
    "chunked and a length", 400, post(b"0\r\n\r\n", wrong(**{"transfer-encoding": "chunked", "content-length": "5"}))
)
refused("two lengths", 400, post(ORDER, [*signed(ORDER).items(), ("content-length", "1"), ("content-length", "2")]))
refused("a length that is none", 400, post(ORDER, wrong(**{"content-length": "+5"})))
refused("a negative length", 400, post(ORDER, wrong(**{"content-length": "-5"})))
refused("an expectation that nobody knows", 417, post(ORDER, wrong(expect=CANARY)))

FORM = "application/x-www-form-urlencoded"


def form(body: bytes, path: str = "/hooks/hub", *, media: str = FORM) -> bytes:
    mac = hmac.new(METER.encode(), body, hashlib.sha256).hexdigest()
    return post(body, {"content-type": media, "x-signature": mac}, path)


def in_a_form(body: bytes) -> bytes:
    return b"payload=" + quote_plus(body.decode()).encode()


# forms
refused("JSON where a form is wanted", 415, form(ORDER, media="application/json"))
refused("a form in another character set", 415, form(in_a_form(ORDER), media=f"{FORM}; charset=iso-8859-1"))
refused("a form that is no form", 400, form(ORDER))
refused("a form without its field", 400, form(b"body=" + CANARY.encode()))
refused("a form with its field twice", 400, form(in_a_form(ORDER) + b"&" + in_a_form(ORDER)))
refused("a form with its field twice, once in escapes", 400, form(in_a_form(ORDER) + b"&p%61yload=" + CANARY.encode()))
refused("a form with JSON that is broken", 400, form(in_a_form(ORDER)[:-1]))
refused("a form over the limit", 413, form(in_a_form(order(pad="x" * 4000))))
refused("a form that meets no policy", 422, form(in_a_form(order(status=CANARY))))
refused("a form with a text for a number", 422, form(f"kind=order&id={CANARY}&status=paid".encode(), "/hooks/phone"))
refused("a form with a name twice", 400, form(b"kind=order&id=1&status=paid&id=2", "/hooks/phone"))
refused("a form that is not in UTF-8", 400, form(b"kind=order&id=%ff&status=paid", "/hooks/phone"))
refused("a form of nobody", 401, post(in_a_form(ORDER), {"content-type": FORM, "x-signature": "00" * 32}, "/hooks/hub"))

# who it is
refused("no signature", 401, post(ORDER, JSON))
refused("no id", 401, post(ORDER, without("webhook-id")))
refused("no timestamp", 401, post(ORDER, without("webhook-timestamp")))
refused("an empty signature", 401, post(ORDER, wrong(**{"webhook-signature": ""})))
refused("a signature twice", 401, post(ORDER, twice("webhook-signature")))
refused("an id twice", 401, post(ORDER, twice("webhook-id")))
refused("another body", 401, post(ORDER + b" ", signed(ORDER)))
refused("another id", 401, post(ORDER, wrong(**{"webhook-id": "msg_" + CANARY})))
refused("a signature that is no base64", 401, post(ORDER, wrong(**{"webhook-signature": "v1,\udce9\udcff"})))
refused("a signature of nobody", 401, post(ORDER, signed(ORDER, secret=whsec("nobody's-secret-of-32-bytes-0000"))))
refused(
    "a signature of a later version",
    401,
    post(ORDER, wrong(**{"webhook-signature": signed(ORDER)["webhook-signature"].replace("v1,", "v9,")})),
)
refused("an old timestamp", 401, post(ORDER, signed(ORDER, at=int(time.time()) - 7200)))
refused("a timestamp of the future", 401, post(ORDER, signed(ORDER, at=int(time.time()) + 7200)))
refused("a timestamp that is no number", 401, post(ORDER, wrong(**{"webhook-timestamp": CANARY})))
refused("a retired secret", 401, post(ORDER, signed(ORDER, secret=RETIRED), "/hooks/both"))
refused("another scheme", 401, post(ORDER, signed(ORDER), "/hooks/meter"))
refused("a wrong token", 401, post(ORDER, JSON, f"/hooks/odoo/{CANARY}"))
refused("no token", 401, post(ORDER, JSON, "/hooks/odoo"))
refused("a wrong token in many parts", 401, post(ORDER, JSON, "/hooks/odoo/%2e%2e%2f%00%ff"))
refused("from elsewhere", 401, post(ORDER, signed(ORDER), "/hooks/inside"))
refused(
    "from elsewhere, but it says otherwise", 401, post(ORDER, wrong(**{"x-forwarded-for": "10.1.2.3"}), "/hooks/inside")
)

# where to
refused("an unknown source", 404, post(ORDER, signed(ORDER), f"/hooks/{CANARY}"))
refused("no source", 404, post(ORDER, signed(ORDER), "/hooks/"))
refused("another place", 404, post(ORDER, signed(ORDER), f"/{CANARY}"))
refused("more than a token", 404, post(ORDER, JSON, f"/hooks/odoo/a/{CANARY}"))
for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
    refused(f"the method {method}", 405, post(b"", JSON, method=method))

# what is no HTTP
refused("no HTTP at all", 400, CANARY.encode() + b"\r\n\r\n")
refused("a method that nobody knows", 400, post(b"", JSON, method="CANARY"))
refused("a header with a NUL", 400, post(ORDER, wrong(**{"x-name": f"{CANARY}\0"})))
refused("a header without a name", 400, post(ORDER, wrong(**{"": CANARY})))
refused("a header whose name has a space", 400, post(ORDER, wrong(**{CANARY + " ": CANARY})))
refused("a header in two lines", 400, post(ORDER, wrong(**{"x-name": f"{CANARY}\r\n {CANARY}"})))
refused("a header with a lone CR", 400, post(ORDER, wrong(**{"x-name": f"{CANARY}\rx"})))
refused("a header that is too long", 400, post(ORDER, wrong(**{"x-name": CANARY * 1000})))
refused("too many headers", 400, post(ORDER, wrong(**{f"x-{n}": CANARY for n in range(200)})))
refused("a path that is too long", 400, post(ORDER, signed(ORDER), "/hooks/" + CANARY * 1000))
refused("a path with a bad byte", 400, post(ORDER, signed(ORDER), "/hooks/\udcff" + CANARY))
refused("no host", 400, post(ORDER).replace(b"host: sluicegate\r\n", b""))
refused("two hosts", 400, post(ORDER).replace(b"host:", b"host: a\r\nhost:"))
refused("an HTTP of the future", 400, post(ORDER).replace(b"HTTP/1.1", b"HTTP/3.7"))
refused("TLS", 400, bytes.fromhex("160301020001000100030348c9b6") + CANARY.encode() * 8 + b"\r\n\r\n")


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_taken_is_refused_and_neither_kept_nor_repeated(
    program: Program, dsn: str, name: str
) -> None:
    status, raw = REFUSED[name]
    before = await rows_at_rest(dsn)
    async with connected(program.port) as line:
        answer = await line.ask(raw)
    assert (answer.status, answer.headers.get("content-type")) == (status, "application/problem+json"), answer.raw
    assert answer.json["status"] == status
    assert {"type", "title", "detail"} <= answer.json.keys()
    assert b"anary" not in answer.raw
    assert await rows(dsn) == before


async def test_a_head_has_no_body_in_its_answer(program: Program) -> None:
    async with connected(program.port) as line:
        await line.send(post(b"", JSON, method="HEAD"))
        assert (await line.answer(bodiless=True)).status == 405
        answer = await line.ask(post(b"", JSON, method="GET"))
        assert (answer.status, answer.headers["allow"]) == (405, "POST")


async def test_no_answer_tells_what_it_is_made_with(program: Program) -> None:
    for raw in (post(ORDER), post(ORDER, JSON), post(b"", JSON, "/live", method="GET"), b"nonsense\r\n\r\n"):
        async with connected(program.port) as line:
            assert (await line.ask(raw)).headers["server"] == "sluicegate"


# ── bodies in time, and of a size ───────────────────────────────────────────────────────────────────


async def test_a_body_that_is_said_to_be_too_large_is_refused_before_it_is_sent(program: Program, dsn: str) -> None:
    async def refused_at_once(**expecting: str) -> None:
        async with connected(program.port) as line:
            await line.send(post(b"", wrong(**expecting), length=10_000_000_000))
            answer = await line.answer(within=1)
            assert answer.status == 413
            assert b"64" in answer.body or "65536" in answer.json["detail"]
            assert await line.closed(within=4) < 4

    before = await rows_at_rest(dsn)
    await asyncio.gather(refused_at_once(), refused_at_once(expect="100-continue"))
    assert await rows(dsn) == before


async def test_a_sender_that_goes_on_sending_too_much_still_hears_that_it_is(program: Program) -> None:
    async with connected(program.port) as line:
        await line.send(post(b"", wrong(), length=50_000_000))
        sending = asyncio.create_task(line.send(*[b"x" * 65536] * 100))
        assert (await line.answer(within=3)).status == 413
        with suppress(ConnectionError):
            await sending


async def test_a_body_that_asks_first_is_asked_for_once_its_head_is_good(program: Program) -> None:
    body = order()
    for expect in ("100-continue", "100-Continue"):
        async with connected(program.port) as line:
            assert (await line.ask(post(b"", {**signed(body), "expect": expect}, length=len(body)))).status == 100
            assert (await line.ask(body)).status in (200, 202)
            assert (await line.ask(post(order()))).status == 202, "the connection can be used again"


async def test_a_body_that_asks_first_is_not_asked_for_where_its_head_condemns_it(program: Program) -> None:
    async def condemned(status: int, **header: str) -> None:
        async with connected(program.port) as line:
            assert (await line.ask(post(b"", wrong(expect="100-continue", **header), length=100))).status == status
            assert await line.closed(within=4) < 4

    await asyncio.gather(
        condemned(415, **{"content-type": "text/plain"}),
        condemned(415, **{"content-encoding": "gzip"}),
        condemned(413, **{"content-length": "70000"}),
    )


async def test_an_expectation_is_repeated_nowhere(program: Program) -> None:
    for path in ("/live", "/hooks/nobody", "/nowhere", "/api/v1/events"):
        async with connected(program.port) as line:
            answer = await line.ask(post(b"", {"expect": CANARY}, path, method="GET"))
            assert answer.status >= 400
            assert answer.headers["content-type"] == "application/problem+json"
            assert b"anary" not in answer.raw


async def test_a_body_may_come_in_pieces_and_chunks_of_any_size(program: Program, sink: Partner) -> None:
    body = order()
    headers = signed(body)
    async with connected(program.port) as line:
        event = (await line.ask(chunked(body[:7], body[7:8], body[8:], headers=headers))).json["id"]
        assert (
            await line.ask(
                chunked(*[bytes([byte]) for byte in body], headers=headers, end=b"0\r\nx-trailer: 1\r\n\r\n")
            )
        ).json == {
            "id": event,
            "duplicate": True,
        }
        raw = post(body, headers)
        await line.send(*[raw[at : at + 40] for at in range(0, len(raw), 40)], every=0.001)
        assert (await line.answer()).json == {"id": event, "duplicate": True}
    await delivered(sink, event)


async def test_a_sender_that_breaks_off_leaves_nothing(program: Program, dsn: str) -> None:
    before = await rows_at_rest(dsn)
    for raw in (post(ORDER)[:-5], post(ORDER)[:60], chunked(ORDER)[:-5], b"", b"P"):
        async with connected(program.port) as line:
            await line.send(raw)
    await asyncio.sleep(0.2)
    assert await rows(dsn) == before
    assert not program.log("request.failed")


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json; charset=utf-8",
        "application/json; utf-8",
        "application/json;",
        "APPLICATION/JSON",
        "application/vnd.odoo+json",
    ],
)
async def test_json_may_be_called_by_any_of_its_names(program: Program, content_type: str) -> None:
    body = order()
    async with connected(program.port) as line:
        assert (await line.ask(post(body, {**signed(body), "content-type": content_type}))).status == 202


async def test_a_byte_order_mark_is_no_part_of_the_body(program: Program) -> None:
    body = b"\xef\xbb\xbf" + order()
    async with connected(program.port) as line:
        assert (await line.ask(post(body))).status == 202


async def test_what_follows_a_body_that_wants_another_protocol_is_no_request(program: Program) -> None:
    body = order()
    hidden = post(order())
    for headers in ({"upgrade": "websocket", "connection": "upgrade"}, {"upgrade": "h2c", "connection": "upgrade"}):
        async with connected(program.port) as line:
            first = await line.ask(post(body, {**signed(body), **headers}))
            assert first.status in (200, 202, 400)
            if first.status < 400:
                assert (await line.ask(hidden)).status in (200, 202)


# ── slow ones ───────────────────────────────────────────────────────────────────────────────────────


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def slow(program: Program) -> dict[str, float | Heard]:
    """What became of slow senders, all at once: seconds until they were cut off, or what they were answered."""
    raw = post(ORDER)
    head, body = raw[: -len(ORDER)], [bytes([byte]) for byte in ORDER]

    async def cut_off(*pieces: bytes, after: bytes | None = None) -> float:
        async with connected(program.port) as line:
            if after is not None:
                await line.ask(after)
            async with line.sending(*pieces, every=0.2):
                return await line.closed(within=15)

    async def answered(*pieces: bytes) -> Heard:
        async with connected(program.port) as line, line.sending(*pieces, every=0.2):
            return await line.answer(within=15)

    async def unheard() -> float:
        """Asks for much, and takes none of it."""
        silent = socket.socket()
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(silent, ("127.0.0.1", program.port))
        began = time.monotonic()
        with silent, suppress(ConnectionError):
            while time.monotonic() - began < 15:
                await loop.sock_sendall(silent, post(b"", {}, "/api/v1/openapi.json", method="GET") * 20)
                await asyncio.sleep(0.1)
        return time.monotonic() - began

    async def rested() -> Heard:
        """A request in two pieces, and another one a while later."""
        async with connected(program.port) as line:
            await line.send(head, ORDER, every=0.1)
            await line.answer()
            await asyncio.sleep(7)
            return await line.ask(raw)

    named = {
        "silent": cut_off(),
        "stopped in the head": cut_off(raw[:40]),
        "dripping head": cut_off(*[bytes([byte]) for byte in head]),
        "stopped in the second head": cut_off(raw[:40], after=raw),
        "dripping in the second head": cut_off(*[bytes([byte]) for byte in head], after=raw),
        "no body": answered(head),
        "dripping body": answered(head, *body),
        "unheard": unheard(),
        "rested": rested(),
    }
    return dict(zip(named, await asyncio.gather(*named.values()), strict=True))


@pytest.mark.parametrize(
    "which",
    ["silent", "stopped in the head", "dripping head", "stopped in the second head", "dripping in the second head"],
)
async def test_a_head_that_does_not_come_in_time_ends_the_connection(slow: dict[str, float], which: str) -> None:
    assert 4 < slow[which] < 6.5


@pytest.mark.parametrize("which", ["no body", "dripping body"])
async def test_a_body_that_does_not_come_in_time_is_a_408(slow: dict[str, Heard], which: str) -> None:
    assert slow[which].status == 408
    assert slow[which].json["title"] == "Too slow"
    assert slow[which].headers["connection"] == "close"


async def test_a_caller_who_does_not_take_the_answers_is_left(slow: dict[str, float]) -> None:
    assert slow["unheard"] < 14


async def test_a_connection_that_was_of_use_may_rest(slow: dict[str, Heard]) -> None:
    assert slow["rested"].status == 200


async def test_a_hundred_slow_senders_do_not_hinder_a_good_one(program: Program) -> None:
    raw = post(ORDER)
    slow = [await asyncio.open_connection("127.0.0.1", program.port) for _ in range(200)]
    try:
        for number, (_, writer) in enumerate(slow):
            writer.write(raw[:60] if number % 2 else raw[:-20])
        await asyncio.sleep(0.2)
        took = []
        for _ in range(20):
            began = time.monotonic()
            async with connected(program.port) as line:
                assert (await line.ask(post(order()))).status == 202
            took.append(time.monotonic() - began)
        assert sorted(took)[10] < 0.2, "some milliseconds on an idle machine"
    finally:
        for _, writer in slow:
            writer.transport.abort()


# ── many on one connection ──────────────────────────────────────────────────────────────────────────


async def test_one_connection_serves_request_after_request(program: Program) -> None:
    await asyncio.sleep(1)  # a flood, such as the refusals before this, is parted from
    async with connected(program.port) as line:
        for status, raw in [
            (202, post(order())),
            (401, post(ORDER, JSON)),
            (202, post(order())),
            (422, post_of("{}")),
            (202, post(order())),
        ]:
            assert (await line.ask(raw)).status == status


async def test_requests_that_do_not_wait_for_each_other_are_answered_in_their_order(program: Program) -> None:
    posts = [post(order()) for _ in range(20)]
    async with connected(program.port) as line:
        await line.send(b"".join(posts) + post(b"", {}, "/live", method="GET"))
        events = [await line.answer() for _ in posts]
        assert [event.status for event in events] == [202] * 20
        assert (await line.answer()).json == {"live": True}
        await line.send(b"".join(posts))
        again = [await line.answer() for _ in posts]
        assert [answer.json["id"] for answer in again] == [event.json["id"] for event in events]


# ── the same again ──────────────────────────────────────────────────────────────────────────────────


async def test_posts_that_come_at_once_with_other_requests_between_them_are_each_answered(program: Program) -> None:
    """A post that has come in whole goes a shorter way than anything else: whatever comes before or after it."""
    get = post(b"", JSON, "/live", method="GET")
    body = order()
    cut = len(post(body)) - 9
    last = post(body)
    async with connected(program.port) as line:
        await line.send(post(order()), get, post(order()), post(ORDER, JSON), post(order()) + last[:cut])
        answers = [(await line.answer()).status for _ in range(5)]
        await line.send(last[cut:], get)
        answers += [(await line.answer()).status for _ in range(2)]
        assert answers == [202, 200, 202, 401, 202, 202, 200]
        assert (await line.ask(post(order()))).status == 202


@pytest.mark.parametrize(
    ("version", "connection", "stays"),
    [
        (b"HTTP/1.0", None, False),
        (b"HTTP/1.0", "keep-alive", True),
        (b"HTTP/1.1", "close", False),
        (b"HTTP/1.1", None, True),
    ],
)
async def test_a_connection_stays_as_the_sender_wishes(
    program: Program, version: bytes, connection: str | None, stays: bool
) -> None:
    def request() -> bytes:
        body = order()
        headers = {**signed(body), **({"connection": connection} if connection else {})}
        return post(body, headers).replace(b"HTTP/1.1", version, 1)

    async with connected(program.port) as line:
        answer = await line.ask(request())
        assert (answer.status, answer.json["duplicate"]) == (202, False)
        assert answer.raw.startswith(version)
        if stays:
            assert (await line.ask(request())).status == 202
        else:
            assert await line.closed(within=4) < 4


async def test_fifty_copies_at_once_are_one_event(program: Program, sink: Partner) -> None:
    raw = post(order())

    async def copy() -> Heard:
        async with connected(program.port) as line:
            await line.send(raw)
            return await line.answer()

    answers = await asyncio.gather(*(copy() for _ in range(50)))
    assert sorted(answer.status for answer in answers) == [200] * 49 + [202]
    (event,) = {answer.json["id"] for answer in answers}
    await delivered(sink, event)
    await asyncio.sleep(0.3)
    assert [received.event for received in sink.received].count(event) == 1


async def test_the_same_signed_id_with_another_body_is_a_conflict_and_the_first_one_stands(
    program: Program, dsn: str
) -> None:
    first, other = order(), order()
    async with connected(program.port) as line:
        event = (await line.ask(post(first, signed(first, id="msg_conflict")))).json["id"]
        before = await rows_at_rest(dsn)
        answer = await line.ask(post(other, signed(other, id="msg_conflict")))
        assert (answer.status, answer.headers["content-type"]) == (409, "application/problem+json")
        assert (await line.ask(post(first, signed(first, id="msg_conflict")))).json == {"id": event, "duplicate": True}
    assert await rows_at_rest(dsn) == before


# ── who may post ────────────────────────────────────────────────────────────────────────────────────


async def test_while_a_secret_is_rotated_both_are_good_and_which_was_used_is_counted(program: Program) -> None:
    async with connected(program.port) as line:
        for secret in (SECRETS["SHOP_SECRET"], SECRETS["SHOP_SECRET_NEXT"], SECRETS["SHOP_SECRET_NEXT"]):
            body = order()
            assert (await line.ask(post(body, signed(body, secret=secret), "/hooks/both"))).status == 202
    assert program.metric('sluicegate_secret_used_total{secret="0",source="both"}') == 1
    assert program.metric('sluicegate_secret_used_total{secret="1",source="both"}') == 2


async def test_a_token_in_an_address_is_told_nowhere(program: Program) -> None:
    token = SECRETS["ODOO_TOKEN"]
    body = order()
    async with connected(program.port) as line:
        for path, status in (
            (f"/hooks/odoo/{token}", 202),
            (f"/hooks/odoo/{token}x", 401),
            (f"/hooks/{token}", 404),
            (f"/hooks/odoo/{token}/x", 404),
        ):
            answer = await line.ask(post(body, JSON, path))
            assert answer.status == status
            assert token.encode() not in answer.raw
        assert (await line.ask(post(b"", JSON, f"/hooks/odoo/{token}", method="PUT"))).status == 405
    async with connected(program.port) as line:
        assert (await line.ask(post(body, {**JSON, "x-bad": "\0"}, f"/hooks/odoo/{token}"))).status == 400
    await asyncio.sleep(0.2)
    assert token not in program.output
    assert token not in program.get("/metrics").body.decode()


async def test_what_no_request_can_be_read_from_is_logged_without_a_word_of_it(program: Program) -> None:
    await asyncio.sleep(1.1)  # one line a second tells of refusals
    for bad in (f"x-name: {CANARY}\0", f"authorization: Bearer {CANARY}\x01", f"{CANARY}"):
        async with connected(program.port) as line:
            answer = await line.ask(f"POST /hooks/{CANARY} HTTP/1.1\r\nhost: a\r\n{bad}\r\n\r\n".encode("latin-1"))
            assert answer.status == 400
            assert b"anary" not in answer.raw
            assert await line.closed(within=1) < 1
    until(
        lambda: [line for line in program.log("request.refused") if line["reason"] == "not_http"], 3, "line in the log"
    )
    assert "anary" not in program.output


@pytest.mark.parametrize(
    ("peer", "forwarded", "status"),
    [
        ("127.0.0.2", "10.1.2.3", 202),
        ("127.0.0.2", "8.8.8.8, 10.1.2.3, 127.0.0.2", 202),
        ("127.0.0.2", "10.1.2.3:5123", 202),
        ("127.0.0.2", "[2001:db8::7]:443", 202),
        ("127.0.0.2", "10.1.2.3, 8.8.8.8", 401),
        ("127.0.0.2", "10.2.0.1", 401),
        ("127.0.0.2", f"10.1.2.3, {CANARY}", 401),
        ("127.0.0.2", "", 401),
        ("127.0.0.3", "10.1.2.3", 401),
    ],
)
async def test_an_address_counts_as_far_as_trusted_proxies_tell_it(
    program: Program, peer: str, forwarded: str, status: int
) -> None:
    body = order()
    headers = {**signed(body), **({"x-forwarded-for": forwarded} if forwarded else {})}
    async with connected(program.port, source=peer) as line:
        assert (await line.ask(post(body, headers, "/hooks/inside"))).status == status


async def test_a_certificate_counts_from_a_trusted_proxy_alone(program: Program) -> None:
    headers = {**JSON, "client-cert": told(certificate())}
    for peer, forwarded, status in (
        ("127.0.0.2", "10.1.2.3", 202),
        ("127.0.0.3", "127.0.0.2", 401),
        ("127.0.0.1", "", 401),
    ):
        async with connected(program.port, source=peer) as line:
            asked = {**headers, **({"x-forwarded-for": forwarded} if forwarded else {})}
            assert (await line.ask(post(order(), asked, "/hooks/edge"))).status == status


async def test_a_stranger_cannot_use_up_what_a_source_may_post(program: Program) -> None:
    await asyncio.sleep(1.1)  # what the limit of this source lets through in a second is there again
    async with connected(program.port) as line:
        for _ in range(20):
            assert (await line.ask(post(order(), {**JSON}, "/hooks/few"))).status == 401
        assert (await line.ask(post(body := order(), signed(body), "/hooks/few"))).status == 202
    await asyncio.sleep(1.1)


async def test_a_source_that_takes_no_token_has_no_address_with_one(program: Program) -> None:
    """Somebody who pastes a secret behind it hears so at once, before it stands in every proxy's log."""
    async with connected(program.port) as line:
        assert (await line.ask(post(body := order(), signed(body), "/hooks/both/something"))).status == 404


async def test_more_than_the_limit_is_told_when_to_come_back(program: Program) -> None:
    async with connected(program.port) as line:
        answers = [await line.ask(post(body := order(), signed(body), "/hooks/few")) for _ in range(6)]
    assert [answer.status for answer in answers[:2]] == [202, 202]
    slowed = answers[-1]
    assert (slowed.status, slowed.headers["content-type"], slowed.headers["retry-after"]) == (
        429,
        "application/problem+json",
        "1",
    )
    await asyncio.sleep(int(slowed.headers["retry-after"]))
    async with connected(program.port) as line:
        assert (await line.ask(post(body, signed(body), "/hooks/few"))).status == 202


async def test_whoever_signs_hmac_over_the_body_alone_is_believed(program: Program) -> None:
    body = order()
    mac = hmac.new(METER.encode(), body, hashlib.sha256).hexdigest()
    async with connected(program.port) as line:
        assert (await line.ask(post(body, {**JSON, "x-signature": mac}, "/hooks/meter"))).status == 202


async def test_json_in_a_form_is_believed_by_its_raw_bytes_and_is_the_same_event_when_it_comes_again(
    program: Program, sink: Partner
) -> None:
    body = in_a_form(order()) + b"&zen=" + CANARY.encode()
    async with connected(program.port) as line:
        answer = await line.ask(form(body, media=f"{FORM}; charset=UTF-8"))
        assert answer.status == 202
        assert (await line.ask(form(body))).json == {"id": answer.json["id"], "duplicate": True}
        other = body.replace(b"%22", b'"')  # the same form, written in another way, is not what was signed
        signed_before = form(body).replace(body, other).replace(str(len(body)).encode(), str(len(other)).encode(), 1)
        assert (await line.ask(signed_before)).status == 401
    await delivered(sink, answer.json["id"])


async def test_a_form_of_texts_is_kept_in_its_types(program: Program, dsn: str) -> None:
    async with connected(program.port) as line:
        answer = await line.ask(form(b"kind=order&id=4711&status=paid&name=" + CANARY.encode(), "/hooks/phone"))
        assert answer.status == 202
    connection = await asyncpg.connect(dsn)
    kept = await connection.fetchval("SELECT data FROM sluicegate.events WHERE id = $1", answer.json["id"])
    await connection.close()
    assert json.loads(kept) == {"id": 4711, "status": "paid"}


async def test_who_posts_a_form_where_json_is_wanted_hears_which_setting_it_is(program: Program) -> None:
    async with connected(program.port) as line:
        answer = await line.ask(post(in_a_form(ORDER), wrong(**{"content-type": FORM})))
        assert (answer.status, answer.json["detail"]) == (
            415,
            "Send JSON, with Content-Type: application/json. Or let the source say format: form.",
        )
    async with connected(program.port) as line:
        asked = await line.ask(form(ORDER, media="application/json"))
        assert asked.json["detail"].endswith("Or leave format out of the source.")


# ── what the tests look at ──────────────────────────────────────────────────────────────────────────


async def rows(dsn: str) -> dict[str, int]:
    connection = await asyncpg.connect(dsn)
    try:
        return {
            table: await connection.fetchval(f"SELECT count(*) FROM sluicegate.{table}")
            for table in ("events", "dedup", "pending")
        }
    finally:
        await connection.close()


async def rows_at_rest(dsn: str) -> dict[str, int]:
    """Once all that was taken is delivered."""
    async with asyncio.timeout(10):
        while (found := await rows(dsn))["pending"]:
            await asyncio.sleep(0.05)
    return found


async def delivered(sink: Partner, event: str) -> None:
    async with asyncio.timeout(10):
        while event not in sink.events():
            await asyncio.sleep(0.02)
