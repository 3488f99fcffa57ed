"""The `http` connector against real sockets: what it sends, what it makes of every answer, and where it does not go."""

import asyncio
import json
import socket
import ssl
import struct
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_address, ip_network
from pathlib import Path
from uuid import UUID

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as changed
from standardwebhooks import Webhook
from yarl import URL

from connectors import Blocked, Delivered, Delivery, Event, Opening, Outcome, Refused, Retry, Unknown, kinds
from connectors.egress import Egress
from connectors.http import Http
from connectors.http_client import Client
from connectors.retry_after import retry_after
from connectors.settings import Reference
from observability.tracing import Tracing

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
TRACING = Tracing.start(None, 1.0, "test")
LOOPBACK = ["127.0.0.1/32"]


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


Behaviour = Callable[[Request, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Partner:
    """A server that speaks just enough HTTP to misbehave in every way."""

    behaviour: Behaviour
    received: list[Request] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/events"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().strip().split("\r\n")
                headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = first.split()
                self.received.append(Request(method, path, headers, body))
                await self.behaviour(self.received[-1], writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            pass  # it went
        except asyncio.CancelledError:  # the test is over, and a proxy may keep its connections a little longer
            writer.transport.abort()
        finally:
            writer.close()


def answers(status: int = 200, *headers: str, body: bytes = b"") -> Behaviour:
    async def answer(_: Request, writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status} said by the partner", f"content-length: {len(body)}", *headers]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    return answer


def writes(*parts: bytes, every: float = 0, for_ever: bytes = b"") -> Behaviour:
    async def write(_: Request, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(every)
        while for_ever:
            writer.write(for_ever)
            await writer.drain()
            await asyncio.sleep(every)

    return write


async def hangs(_: Request, __: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


async def hangs_up(_: Request, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def resets(_: Request, writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


Running = Callable[..., Awaitable[Partner]]


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    """Starts partners, and stops them."""
    servers: list[asyncio.Server] = []

    async def start(behaviour: Behaviour, *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> Partner:
        partner = Partner(behaviour, scheme="https" if tls else "http")
        server = await asyncio.start_server(partner.serve, host, 0, ssl=tls)
        partner.port = server.sockets[0].getsockname()[1]
        servers.append(server)
        return partner

    yield start
    for server in servers:
        server.close()
    serving = [task for task in asyncio.all_tasks() - {asyncio.current_task()} if "Partner.serve" in repr(task)]
    for task in serving:
        task.cancel()
    await asyncio.gather(*serving, return_exceptions=True)
    for _ in range(3):  # until what was aborted is gone
        await asyncio.sleep(0)


Opens = Callable[..., Http]


@pytest.fixture
async def opens() -> AsyncIterator[Opens]:
    """Opens `http` connectors, and closes them."""
    opened: list[Http] = []

    def connect(
        url: str, *, allow: list[str] | None = LOOPBACK, ca: str | None = None, timeout: float = 5, concurrency: int = 8
    ) -> Http:
        kind = kinds()["http"]
        written: dict[str, object] = {"url": url, "secret": Reference(origin="env:OUT_SECRET", text=SECRET)}
        settings = kind.settings.model_validate(
            written | ({"allow": allow} if allow else {}) | ({"ca": ca} if ca else {})
        )
        connector = kind.connect(
            Opening(
                destination="ledger",
                settings=settings,
                system=None,
                timeout=timedelta(seconds=timeout),
                concurrency=concurrency,
                tracing=TRACING,
                version="1.2.3",
            )
        )
        assert isinstance(connector, Http)
        opened.append(connector)
        return connector

    yield connect
    for connector in opened:
        await connector.close()


EVENT = Event(
    id=UUID("0193b5a0-1234-7000-8000-00000000002a"),
    source="shop",
    type="shop.order.paid",
    subject="order/42",
    facility="north",
    time=datetime(2026, 11, 25, 8, 30, tzinfo=UTC),
    data={"id": 42, "total": "42.50", "at": "2026-11-25T08:30:00Z"},
    policy="order",
    policy_version=1,
    received_at=datetime(2026, 11, 25, 8, 30, 1, tzinfo=UTC),
    traceparent=None,
)
DELIVERY = Delivery(event=EVENT, destination="ledger", attempt=1, deadline=datetime(2026, 11, 28, tzinfo=UTC))


# ── what goes out ──────────────────────────────────────────────────────────────────────────────────


async def test_an_event_goes_out_as_a_signed_cloud_event(running: Running, opens: Opens) -> None:
    partner = await running(answers(200))
    assert await opens(partner.url).deliver(DELIVERY) == Delivered(status=200)
    (got,) = partner.received
    assert (got.method, got.path) == ("POST", "/events")
    assert json.loads(got.body) == {
        "specversion": "1.0",
        "id": "0193b5a0-1234-7000-8000-00000000002a",
        "source": "/sources/shop",
        "type": "shop.order.paid",
        "subject": "order/42",
        "time": "2026-11-25T08:30:00Z",
        "facility": "north",
        "datacontenttype": "application/json",
        "data": {"id": 42, "total": "42.50", "at": "2026-11-25T08:30:00Z"},
    }
    assert got.headers["content-type"] == "application/cloudevents+json; charset=utf-8"
    assert got.headers["webhook-id"] == str(EVENT.id)
    assert got.headers["idempotency-key"] == f"{EVENT.id}/ledger"
    assert got.headers["user-agent"] == "sluicegate/1.2.3"
    assert got.headers["accept-encoding"] == "identity"
    version, trace, span, flags = got.headers["traceparent"].split("-")
    assert (version, len(trace), len(span), len(flags)) == ("00", 32, 16, 2)


async def test_the_reference_implementation_of_standard_webhooks_accepts_the_signature(
    running: Running, opens: Opens
) -> None:
    partner = await running(answers(200))
    await opens(partner.url).deliver(DELIVERY)
    Webhook(SECRET).verify(partner.received[0].body, partner.received[0].headers)
    assert abs(int(partner.received[0].headers["webhook-timestamp"]) - time.time()) < 5


async def test_the_body_is_the_same_at_every_try_whatever_the_order_of_the_data(running: Running, opens: Opens) -> None:
    partner = await running(answers(503))
    connector = opens(partner.url)
    await connector.deliver(DELIVERY)
    shuffled = changed(EVENT, data=dict(reversed(list(EVENT.data.items()))))
    await connector.deliver(changed(DELIVERY, event=shuffled, attempt=2))
    first, second = partner.received
    assert first.body == second.body
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]


async def test_what_an_event_does_not_have_is_left_out(running: Running, opens: Opens) -> None:
    partner = await running(answers(200))
    await opens(partner.url).deliver(changed(DELIVERY, event=changed(EVENT, subject=None, facility=None)))
    assert not {"subject", "facility"} & set(json.loads(partner.received[0].body))


async def test_each_try_carries_the_trace_of_its_attempt(running: Running, opens: Opens) -> None:
    partner = await running(answers(200))
    with TRACING.attempt(EVENT.id, "ledger", 1, None, timedelta()) as attempt:
        await opens(partner.url).deliver(DELIVERY)
    assert partner.received[0].headers["traceparent"].split("-")[1] == attempt.trace_id.hex


async def test_cookies_are_not_kept(running: Running, opens: Opens) -> None:
    partner = await running(answers(200, "set-cookie: session=1; path=/"))
    connector = opens(partner.url)
    await connector.deliver(DELIVERY)
    await connector.deliver(DELIVERY)
    assert not any("cookie" in request.headers for request in partner.received)


async def test_no_proxy_is_taken_from_the_environment(
    running: Running, opens: Opens, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, partner = await running(answers(502)), await running(answers(200))
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
    assert await opens(partner.url).deliver(DELIVERY) == Delivered(status=200)
    assert not proxy.received


async def test_a_header_holds_visible_ascii_or_nothing_is_sent(running: Running) -> None:
    partner = await running(answers(200))
    client = client_of(partner)
    for value in ("grün", "a\r\nb: c", "a\tb", "a\x00"):
        with pytest.raises(ValueError, match="visible ASCII"):
            await client.send("POST", URL(partner.url), headers={"x-note": value}, tracing=TRACING, body=b"")
        with pytest.raises(ValueError, match="visible ASCII"):
            await client.send("POST", URL(partner.url), headers={value: "x"}, tracing=TRACING, body=b"")
    with pytest.raises(ValueError, match="leads away"):
        await client.send("POST", URL("http://127.0.0.2:1/"), headers={}, tracing=TRACING, body=b"")
    await client.close()
    assert not partner.received


async def test_what_is_sent_tells_its_length_once_and_no_path_or_body_makes_two_requests_of_it() -> None:
    came: list[bytes] = []
    hung_up = asyncio.Event()

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while read := await reader.read(65536):
            came.append(read)
            writer.write(OK + b"content-length: 0\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        hung_up.set()

    server = await asyncio.start_server(note, "127.0.0.1", 0)
    origin = URL(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    client = Client(
        origin,
        allow=[ip_network("127.0.0.1/32")],
        ca=None,
        timeout=timedelta(seconds=5),
        concurrency=1,
        agent="test",
    )
    second = "\r\n\r\nGET /second HTTP/1.1\r\nhost: x\r\n\r\n"
    await client.send("POST", origin / f"a b{second}", headers={}, tracing=TRACING, body=second.encode())
    await client.send("GET", origin.with_query(q=second), headers={}, tracing=TRACING)
    await client.send("POST", origin, headers={}, tracing=TRACING)
    await client.close()
    await hung_up.wait()
    server.close()
    posted, got, empty = came
    head, _, body = posted.partition(b"\r\n\r\n")
    assert body == second.encode()
    assert head.count(b" HTTP/1.1\r\n") == 1
    assert [line for line in head.split(b"\r\n") if b"length" in line] == [b"content-length: %d" % len(body)]
    assert (got.count(b"\r\n\r\n"), b"length" in got) == (1, False)
    assert empty.endswith(b"content-length: 0\r\n\r\n")


async def test_connections_are_kept_and_their_number_is_bounded(running: Running, opens: Opens) -> None:
    async def slowly(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.02)
        await answers(200)(request, writer)

    partner = await running(slowly)
    connector = opens(partner.url, concurrency=3)
    outcomes = await asyncio.gather(*[connector.deliver(DELIVERY) for _ in range(12)])
    assert set(outcomes) == {Delivered(status=200)}
    assert partner.connections == 3


# ── what comes of it ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, Delivered()),
        (202, Delivered()),
        (204, Delivered()),
        (301, Refused("answered 301 Moved Permanently; a redirect is not followed")),
        (307, Refused("answered 307 Temporary Redirect; a redirect is not followed")),
        (400, Refused("answered 400 Bad Request")),
        (401, Blocked("credentials: answered 401 Unauthorized")),
        (403, Blocked("credentials: answered 403 Forbidden")),
        (404, Refused("answered 404 Not Found")),
        (408, Retry("answered 408 Request Timeout")),
        (409, Refused("answered 409 Conflict")),
        (410, Blocked("configuration: answered 410 Gone; nobody takes events there any more")),
        (413, Refused("answered 413 Request Entity Too Large")),
        (422, Refused("answered 422 Unprocessable Entity")),
        (425, Retry("answered 425 Too Early")),
        (429, Retry("answered 429 Too Many Requests", whole_destination=True)),
        (500, Retry("answered 500 Internal Server Error")),
        (502, Retry("answered 502 Bad Gateway")),
        (503, Retry("answered 503 Service Unavailable")),
        (504, Retry("answered 504 Gateway Timeout")),
        (599, Retry("answered 599")),
        (799, Retry("answered 799")),
    ],
)
async def test_every_status_has_its_outcome(running: Running, opens: Opens, status: int, outcome: Outcome) -> None:
    partner = await running(answers(status))
    assert await opens(partner.url).deliver(DELIVERY) == replace(outcome, status=status)


async def test_retry_after_makes_the_whole_destination_wait(running: Running, opens: Opens) -> None:
    for status in (429, 503):
        partner = await running(answers(status, "Retry-After: 120"))
        outcome = await opens(partner.url).deliver(DELIVERY)
        assert isinstance(outcome, Retry)
        assert (outcome.after, outcome.whole_destination) == (timedelta(seconds=120), True)


NOW = datetime(2026, 11, 25, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("120", timedelta(seconds=120)),
        ("0", timedelta()),
        (" 7 ", timedelta(seconds=7)),
        ("1.5", timedelta(seconds=2)),
        ("315360000", timedelta(hours=24)),  # ten years
        ("9" * 20, timedelta(hours=24)),
        ("-3", None),
        ("+3", None),
        ("120junk", None),
        ("1e3", None),
        ("٣", None),
        ("", None),
        ("soon", None),
        ("NaN", None),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), timedelta(seconds=90)),
        ("Wednesday, 25-Nov-26 12:01:30 GMT", timedelta(seconds=90)),
        ("Wed Nov 25 12:01:30 2026", timedelta(seconds=90)),
        ("Sun, 06 Nov 1994 08:49:37 GMT", timedelta()),  # past: now
        ("Wed, 25 Nov 2036 12:00:00 GMT", timedelta(hours=24)),
        ("Wed, 99 Nov 2026 12:00:00 GMT", None),
    ],
)
def test_retry_after_is_read_as_partners_write_it(said: str, meant: timedelta | None) -> None:
    assert retry_after({"retry-after": said}, NOW) == meant


@given(st.text() | st.from_regex(r"[A-Z][a-z]{2}, [0-9]{1,2} [A-Z][a-z]{2} [0-9]{1,6} [0-9:]{2,8} (GMT|[+-][0-9]{4})"))
def test_no_retry_after_is_negative_longer_than_a_day_or_a_crash(said: str) -> None:
    meant = retry_after({"retry-after": said}, NOW)
    assert meant is None or timedelta() <= meant <= timedelta(hours=24)


async def test_a_reason_is_ours_and_holds_nothing_that_the_partner_or_the_secret_says(
    running: Running, opens: Opens
) -> None:
    canary = "canary-Maria-Example"
    for status in (200, 302, 400, 401, 410, 429, 500):
        partner = await running(answers(status, f"x-note: {canary}", f"location: /{canary}", body=canary.encode()))
        connector = opens(partner.url + f"?token={canary}")
        seen = repr((await connector.deliver(DELIVERY), connector, vars(connector._signer), vars(connector._client)))
        assert canary not in seen
        assert SECRET.removeprefix("whsec_") not in seen


async def test_a_redirect_is_not_followed(running: Running, opens: Opens) -> None:
    elsewhere = await running(answers(200))
    for status in (301, 302, 303, 307, 308):
        partner = await running(answers(status, f"location: {elsewhere.url}"))
        assert isinstance(await opens(partner.url).deliver(DELIVERY), Refused)
        assert len(partner.received) == 1
    assert elsewhere.connections == 0


async def test_a_partner_that_is_down_makes_the_destination_wait(opens: Opens) -> None:
    with socket.socket() as placeholder:
        placeholder.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{placeholder.getsockname()[1]}/"
        assert await opens(url).deliver(DELIVERY) == Retry("refused the connection", whole_destination=True)


async def test_a_name_that_does_not_resolve_is_asked_for_again(opens: Opens) -> None:
    connector = opens("http://partner.invalid/", allow=None)
    assert await connector.deliver(DELIVERY) == Retry("its name does not resolve", whole_destination=True)
    assert await connector.check() == Retry("its name does not resolve", whole_destination=True)


async def test_a_connection_that_is_never_made_was_no_try(opens: Opens) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        outcome = await opens(f"http://127.0.0.1:{port}/", timeout=0.4).deliver(DELIVERY)
        for filler in fillers:
            filler.close()
    assert outcome == Retry("no connection in time", whole_destination=True)


@pytest.mark.parametrize("behaviour", [hangs_up, resets])
async def test_a_connection_cut_after_the_request_may_have_delivered_it(
    running: Running, opens: Opens, behaviour: Behaviour
) -> None:
    partner = await running(behaviour)
    assert await opens(partner.url).deliver(DELIVERY) == Unknown("hung up before it answered")
    assert len(partner.received) == 1


async def test_no_answer_in_time_may_have_delivered_it_and_the_deadline_holds(running: Running, opens: Opens) -> None:
    partner = await running(hangs)
    began = time.monotonic()
    assert await opens(partner.url, timeout=0.5).deliver(DELIVERY) == Unknown("no answer in time")
    assert 0.45 < time.monotonic() - began < 0.7
    assert len(partner.received) == 1


@pytest.mark.parametrize("answer", [b"220 mail.example ESMTP\r\n", b"HTTP/1.1 twohundred OK\r\n\r\n", b"\x15\x03\x01"])
async def test_an_answer_that_is_not_http_may_have_delivered_it(running: Running, opens: Opens, answer: bytes) -> None:
    async def answer_and_go(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    partner = await running(answer_and_go)
    assert isinstance(await opens(partner.url).deliver(DELIVERY), Unknown)


async def test_nothing_is_silently_sent_again_when_a_kept_alive_connection_drops(running: Running) -> None:
    async def once(request: Request, writer: asyncio.StreamWriter) -> None:
        await (answers(200) if request.path == "/first" else hangs_up)(request, writer)

    for method in ("GET", "PUT", "DELETE", "POST"):
        partner = await running(once)
        client = client_of(partner)
        first = URL(partner.url).with_path("/first")
        await client.send(method, first, headers={}, tracing=TRACING, body=b"x" if method != "GET" else None)
        outcome = await client.send(
            method, first.with_path("/second"), headers={}, tracing=TRACING, body=b"x" if method != "GET" else None
        )
        assert outcome == Unknown("hung up before it answered")
        assert [request.path for request in partner.received] == ["/first", "/second"]
        assert partner.connections == 1
        await client.close()


async def test_aiohttp_left_alone_would_have_sent_it_again(running: Running) -> None:
    """Why the client stands on aiohttp's connector: the day that this fails, a session would do."""

    async def once(request: Request, writer: asyncio.StreamWriter) -> None:
        await (answers(200) if request.path == "/first" else hangs_up)(request, writer)

    partner = await running(once)
    async with aiohttp.ClientSession(URL(partner.url).origin()) as session:
        await session.put("/first", data=b"x")
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await session.put("/second", data=b"x")
    assert [request.path for request in partner.received] == ["/first", "/second", "/second"]


# ── answers that do not end ────────────────────────────────────────────────────────────────────────

OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(writes(OK + b"\r\n", for_ever=b"x" * 65536), id="endless"),
        pytest.param(writes(OK + b"content-length: 1073741824\r\n\r\n", for_ever=b"x" * 65536), id="a gigabyte"),
        pytest.param(writes(OK + b"content-length: 500\r\n\r\n", for_ever=b"x", every=0.05), id="slow drip"),
        pytest.param(writes(OK + b"content-length: 500\r\n\r\nx"), id="never finished"),
        pytest.param(
            writes(
                OK + b"content-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n",
                for_ever=b"4\r\n\x1f\x8b\x08\x00\r\n",
            ),
            id="gzip bomb",
        ),
    ],
)
async def test_the_status_is_the_answer_whatever_becomes_of_the_body(
    running: Running, opens: Opens, behaviour: Behaviour
) -> None:
    partner = await running(behaviour)
    began = time.monotonic()
    assert await opens(partner.url).deliver(DELIVERY) == Delivered(status=200)
    assert time.monotonic() - began < 1.5


async def test_what_is_said_before_the_answer_is_none(running: Running, opens: Opens) -> None:
    partner = await running(
        writes(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n", OK + b"content-length: 0\r\n\r\n")
    )
    connector = opens(partner.url)
    assert await connector.deliver(DELIVERY) == await connector.deliver(DELIVERY) == Delivered(status=200)
    assert partner.connections == 1


async def test_more_than_one_answer_is_believed_once_and_its_connection_is_not_used_again(
    running: Running, opens: Opens
) -> None:
    partner = await running(
        writes((OK + b"content-length: 0\r\n\r\n") + b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n")
    )
    connector = opens(partner.url)
    for _ in range(3):
        assert await connector.deliver(DELIVERY) == Delivered(status=200)
    assert partner.connections == 3


async def test_a_partner_that_wants_another_protocol_is_refused(running: Running, opens: Opens) -> None:
    partner = await running(
        writes(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nmore")
    )
    connector = opens(partner.url)
    for _ in range(2):
        assert isinstance(await connector.deliver(DELIVERY), Refused)
    assert partner.connections == 2


async def test_a_body_cut_off_changes_nothing_about_what_was_said(running: Running, opens: Opens) -> None:
    async def cut(request: Request, writer: asyncio.StreamWriter) -> None:
        await writes(OK + b"content-length: 500\r\n\r\nx")(request, writer)
        writer.close()

    partner = await running(cut)
    assert await opens(partner.url).deliver(DELIVERY) == Delivered(status=200)


async def test_of_an_answer_no_more_than_was_asked_for_is_read(running: Running) -> None:
    sent = 0

    async def pour(_: Request, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(OK + b"\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536

    partner = await running(pour)
    client = client_of(partner)
    answer = await client.send("GET", URL(partner.url), headers={}, tracing=TRACING, read=100_000)
    assert not isinstance(answer, Retry | Blocked | Unknown)
    assert (len(answer.body), answer.whole) == (100_000, False)
    await asyncio.sleep(0.1)
    assert sent < 20_000_000  # what the buffers of both kernels hold, not what a gigabit brings
    await client.close()


async def test_a_head_that_drips_or_does_not_end_is_no_answer(running: Running, opens: Opens) -> None:
    drips = await running(writes(OK + b"x-note: ", for_ever=b"y", every=0.05))
    assert await opens(drips.url, timeout=0.4).deliver(DELIVERY) == Unknown("no answer in time")
    pours = await running(writes(OK, for_ever=b"x-note: " + b"y" * 4000 + b"\r\n"))
    assert await opens(pours.url, timeout=2).deliver(DELIVERY) == Unknown("its answer is not HTTP")


# ── where it does not go ───────────────────────────────────────────────────────────────────────────

PUBLIC: list[str] = []


@pytest.mark.parametrize(
    ("address", "allow", "permitted"),
    [
        ("93.184.216.34", PUBLIC, True),
        ("2606:2800:220:1:248:1893:25c8:1946", PUBLIC, True),
        ("::ffff:93.184.216.34", PUBLIC, True),
        ("127.0.0.1", PUBLIC, False),
        ("::1", PUBLIC, False),
        ("::ffff:127.0.0.1", PUBLIC, False),
        ("0.0.0.0", PUBLIC, False),
        ("::", PUBLIC, False),
        ("::127.0.0.1", PUBLIC, False),
        ("10.0.0.1", PUBLIC, False),
        ("172.16.0.1", PUBLIC, False),
        ("192.168.0.1", PUBLIC, False),
        ("100.64.0.1", PUBLIC, False),
        ("169.254.169.254", PUBLIC, False),
        ("::ffff:169.254.169.254", PUBLIC, False),
        ("168.63.129.16", PUBLIC, False),
        ("64:ff9b::7f00:1", PUBLIC, False),
        ("64:ff9b::5db8:d822", PUBLIC, False),
        ("64:ff9b:1::7f00:1", PUBLIC, False),
        ("2002:7f00:1::", PUBLIC, False),
        ("2002:5db8:d822::1", PUBLIC, False),
        ("2001:0:7f00:1::", PUBLIC, False),
        ("192.88.99.1", PUBLIC, False),
        ("192.0.0.8", PUBLIC, False),
        ("198.18.0.1", PUBLIC, False),
        ("203.0.113.1", PUBLIC, False),
        ("224.0.0.1", PUBLIC, False),
        ("ff02::1", PUBLIC, False),
        ("240.0.0.1", PUBLIC, False),
        ("255.255.255.255", PUBLIC, False),
        ("fe80::1%eth0", PUBLIC, False),
        ("fc00::1", PUBLIC, False),
        ("2001:db8::1", PUBLIC, False),
        ("5f00::1", PUBLIC, False),
        ("4000::1", PUBLIC, False),
        ("10.30.1.7", ["10.30.1.0/24"], True),
        ("::ffff:10.30.1.7", ["10.30.1.0/24"], True),
        ("10.30.2.7", ["10.30.1.0/24"], False),
        ("93.184.216.34", ["10.30.1.0/24"], False),
        ("127.0.0.1", ["10.30.1.0/24"], False),
        ("127.0.0.1", ["127.0.0.1/32"], True),
        ("::1", ["::1/128"], True),
        ("127.0.0.1", ["0.0.0.0/0"], True),
        ("169.254.169.254", ["0.0.0.0/0"], False),
        ("100.100.100.200", ["100.64.0.0/10"], False),
        ("fd00:ec2::254", ["fd00::/8"], False),
        ("224.0.0.1", ["0.0.0.0/0"], False),
        ("ff02::1", ["::/0"], False),
        ("0.0.0.0", ["0.0.0.0/0"], False),
        ("64:ff9b::7f00:1", ["64:ff9b::/96"], False),  # both of its faces must be allowed
        ("64:ff9b::a1e:107", ["64:ff9b::/96", "10.30.1.0/24"], True),
        ("64:ff9b::a9fe:a9fe", ["::/0", "0.0.0.0/0"], False),
    ],
)
def test_an_address_is_permitted_or_not(address: str, allow: list[str], permitted: bool) -> None:
    assert Egress([ip_network(network) for network in allow]).permits(address) is permitted


EGRESS = Blocked("configuration: egress: `allow` does not cover its address")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1.",
        "127.1",
        "2130706433",
        "0x7f000001",
        "017700000001",
        "0.0.0.0",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "localhost",
    ],
)
async def test_without_allow_nothing_on_this_machine_is_reached_by_any_spelling(
    running: Running, opens: Opens, host: str
) -> None:
    partner = await running(answers(200))
    connector = opens(f"http://{host}:{partner.port}/", allow=None)
    outcomes = await connector.deliver(DELIVERY), await connector.check()
    for outcome in outcomes:
        assert isinstance(outcome, Blocked | Retry)
        assert "127" not in outcome.reason
        assert str(partner.port) not in outcome.reason
    assert partner.connections == 0


@pytest.mark.parametrize(
    "url", ["http://①②⑦.⓪.⓪.①/", "http://user:pass@127.0.0.1/", "ftp://127.0.0.1/", "file:///etc/passwd"]
)
def test_a_url_that_means_something_else_is_refused_when_it_is_loaded(url: str) -> None:
    with pytest.raises(ValueError, match="url"):
        kinds()["http"].settings.model_validate({"url": url, "secret": Reference(origin="env:S", text=SECRET)})


async def test_without_allow_an_address_that_is_not_public_is_told_with_what_to_add(
    running: Running, opens: Opens
) -> None:
    partner = await running(answers(200))
    connector = opens(partner.url, allow=None)
    told = Blocked("configuration: egress: its address is not a public one; add `allow: [its network]`")
    assert (await connector.check(), await connector.deliver(DELIVERY)) == (told, told)
    never = Blocked("configuration: egress: its address is one that is never connected to")
    assert await opens("http://169.254.169.254/", allow=None).check() == never
    assert await opens("http://169.254.169.254/", allow=["0.0.0.0/0"]).check() == never


async def test_where_allow_is_given_nothing_else_is_reached(running: Running, opens: Opens) -> None:
    partner = await running(answers(200))
    assert await opens(partner.url, allow=["10.0.0.0/8"]).deliver(DELIVERY) == EGRESS
    assert await opens(partner.url, allow=["127.0.0.0/8"]).deliver(DELIVERY) == Delivered(status=200)
    assert partner.connections == 1


async def test_a_name_that_moves_after_the_first_delivery_is_judged_again(
    running: Running, opens: Opens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: it is the address of the connection that is judged, not that of an earlier look-up."""

    async def last(request: Request, writer: asyncio.StreamWriter) -> None:
        await answers(200, "connection: close")(request, writer)
        writer.close()

    partner = await running(last, host="0.0.0.0")
    leads_to = iter(["127.0.0.2", "127.0.0.3"])

    def getaddrinfo(host: str, port: int, *_: object, **__: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(leads_to), port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    connector = opens(f"http://partner.example:{partner.port}/", allow=["127.0.0.2/32"])
    connector._client._connector._use_dns_cache = False  # an answer of 10 s ago is as good, but the test is shorter
    assert await connector.deliver(DELIVERY) == Delivered(status=200)
    assert await connector.deliver(DELIVERY) == EGRESS


async def test_of_several_addresses_only_the_permitted_are_tried(
    running: Running, opens: Opens, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbidden, partner = await running(answers(200), host="127.0.0.3"), await running(answers(200))

    def getaddrinfo(*_: object, **__: object) -> list[object]:
        addresses = [("127.0.0.3", forbidden.port), ("127.0.0.1", partner.port), ("127.0.0.3", forbidden.port)]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert await opens(f"http://partner.example:{partner.port}/").deliver(DELIVERY) == Delivered(status=200)
    with socket.socket() as placeholder:  # and one that is down is not taken for a forbidden one
        placeholder.bind(("127.0.0.1", 0))
        down = await opens(f"http://partner.example:{placeholder.getsockname()[1]}/").deliver(DELIVERY)
    assert down == Retry("refused the connection", whole_destination=True)
    assert forbidden.connections == 0


# ── TLS ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Certificate:
    pem: str
    file: Path

    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.file)
        return context


Issue = Callable[..., Certificate]


@pytest.fixture
def issue(tmp_path: Path) -> Issue:
    def certificate(name: str = "127.0.0.1", *, days: int = 1) -> Certificate:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "partner")])
        now = datetime.now(UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=10))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(name))]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        pem = made.public_bytes(serialization.Encoding.PEM)
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        file = tmp_path / f"{made.serial_number}.pem"
        file.write_bytes(secret + pem)
        return Certificate(pem.decode(), file)

    return certificate


UNTRUSTED = Blocked("configuration: TLS: its certificate is not trusted")


async def test_a_certificate_of_a_trusted_authority_is_accepted(running: Running, opens: Opens, issue: Issue) -> None:
    mine = issue()
    partner = await running(answers(200), tls=mine.context())
    connector = opens(partner.url, ca=mine.pem)
    assert await connector.check() == Delivered()
    assert await connector.deliver(DELIVERY) == Delivered(status=200)


async def test_a_certificate_that_proves_nothing_blocks_the_destination(
    running: Running, opens: Opens, issue: Issue
) -> None:
    mine, wrong_host, expired = issue(), issue("127.0.0.9"), issue(days=-1)
    for certificate, ca in ((mine, None), (mine, issue().pem), (wrong_host, wrong_host.pem), (expired, expired.pem)):
        partner = await running(answers(200), tls=certificate.context())
        connector = opens(partner.url, ca=ca)
        assert await connector.deliver(DELIVERY) == UNTRUSTED
        assert await connector.check() == UNTRUSTED
        assert not partner.received


async def test_an_outdated_tls_or_none_blocks_the_destination(opens: Opens, issue: Issue) -> None:
    mine = issue()
    outdated = mine.context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        outdated.minimum_version = outdated.maximum_version = ssl.TLSVersion.TLSv1_1
    outdated.set_ciphers("ALL:@SECLEVEL=0")

    def shake_hands(connection: socket.socket) -> None:
        with suppress(ssl.SSLError):
            outdated.wrap_socket(connection, server_side=True).close()

    def speak_plain(connection: socket.socket) -> None:
        connection.recv(10_000)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")

    for behaviour in (shake_hands, speak_plain):
        with socket.create_server(("127.0.0.1", 0)) as server:
            served = asyncio.create_task(asyncio.to_thread(serve_one, server, behaviour))
            connector = opens(f"https://127.0.0.1:{server.getsockname()[1]}/", ca=mine.pem)
            assert await connector.deliver(DELIVERY) == Blocked("configuration: TLS: no handshake")
            await served


def serve_one(server: socket.socket, behaviour: Callable[[socket.socket], None]) -> None:
    """In a thread: asyncio closes a connection without the alert that says why."""
    with server.accept()[0] as connection:
        behaviour(connection)


def test_a_ca_that_holds_no_certificate_is_refused_when_it_is_loaded() -> None:
    for pem in ("junk", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"):
        with pytest.raises(ValueError, match="holds no certificates"):
            kinds()["http"].settings.model_validate(
                {"url": "https://a.example/", "secret": Reference(origin="env:S", text=SECRET), "ca": pem}
            )


# ── check ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_check_connects_and_sends_nothing(running: Running, opens: Opens) -> None:
    partner = await running(answers(200))
    assert await opens(partner.url).check() == Delivered()
    await asyncio.sleep(0.05)
    assert (partner.connections, partner.received) == (1, [])


async def test_a_check_of_a_partner_that_is_down_says_so(opens: Opens) -> None:
    with socket.socket() as placeholder:
        placeholder.bind(("127.0.0.1", 0))
        connector = opens(f"http://127.0.0.1:{placeholder.getsockname()[1]}/")
        assert await connector.check() == Retry("refused the connection", whole_destination=True)
    assert await connector.lookup(DELIVERY) is None


def client_of(partner: Partner) -> Client:
    return Client(
        URL(partner.url),
        allow=[ip_network("127.0.0.0/8")],
        ca=None,
        timeout=timedelta(seconds=5),
        concurrency=4,
        agent="test",
    )
