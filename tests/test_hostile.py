"""Who floods, or speaks no proper HTTP: row by row of what the door does before it believes anybody, on bare sockets.

Half of it are guarantees of aiohttp, not of ours: a release of it that takes them back is noticed here.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from ipaddress import ip_address

import pytest
import pytest_asyncio

from gateway.admission import MOST_ADDRESSES, AddressLimits, Admission
from gateway.config_sections import Serve
from tests.conftest import TEMPLATE, made_of
from tests.program import CANARY, Partner, Program, configuration, ended_with, order, partner, signed, until
from tests.test_door import rows, rows_at_rest
from tests.wire import Line, connected, post

MOST, MOST_OF_ONE = 40, 12
SERVE = f"""{{listen: "127.0.0.1:PORT", trusted_proxies: [127.0.0.2/32], connections: {MOST},
  connections_per_address: {MOST_OF_ONE}, limit_per_address: 30/s}}"""
SOURCES = """
  inside: {scheme: standard-webhooks, secrets: [env:SHOP_SECRET], accepts: [order], from: [127.0.0.9], limit: 1/m}
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
    text = configuration(partner=sink.address, database="env:DSN", sources=SOURCES)
    text = text.replace('{listen: "127.0.0.1:PORT"}', SERVE)
    program = Program(tmp_path_factory.mktemp("hostile"), text, environ={"DSN": dsn})
    with ended_with(program):
        program.start().ready()
        yield program
        assert program.stop() == 0
        assert CANARY not in program.output
        assert not program.log("request.failed"), "a defect of ours"


# ── what aiohttp refuses ────────────────────────────────────────────────────────────────────────────


def raw(*lines: str, body: bytes = b"{}", end: str = "\r\n") -> bytes:
    """A request of these lines, and no others."""
    return end.join([*lines, "", ""]).encode("latin-1") + body


LINE, HOST, LENGTH = "POST /hooks/shop HTTP/1.1", "Host: gateway", "Content-Length: 2"
REFUSED_BY_AIOHTTP = {
    "chunked, and a length": raw(LINE, HOST, LENGTH, "Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "a length, and chunked": raw(LINE, HOST, "Transfer-Encoding: chunked", LENGTH, body=b"0\r\n\r\n"),
    "two lengths that differ": raw(LINE, HOST, LENGTH, "Content-Length: 3"),
    "two lengths that are the same": raw(LINE, HOST, LENGTH, LENGTH),
    "two lengths in one": raw(LINE, HOST, "Content-Length: 2, 2"),
    "a length with a sign": raw(LINE, HOST, "Content-Length: +2"),
    "a negative length": raw(LINE, HOST, "Content-Length: -2"),
    "a length with an underscore": raw(LINE, HOST, "Content-Length: 0_2"),
    "a length in hex": raw(LINE, HOST, "Content-Length: 0x2"),
    "a length that is empty": raw(LINE, HOST, "Content-Length: "),
    "a space before the colon": raw(LINE, HOST, "Content-Length : 2"),
    "a header that is folded": raw(LINE, HOST, LENGTH, "X-Name: a", " b"),
    "a header that begins with a space": raw(LINE, " X-Name: a", HOST, LENGTH),
    "line feeds alone": raw(LINE, HOST, LENGTH, end="\n"),
    "a carriage return alone": raw(LINE, HOST, LENGTH, "X-Name: a\rX-Other: b"),
    "a NUL in a value": raw(LINE, HOST, LENGTH, "X-Name: a\0b"),
    "a NUL in a name": raw(LINE, HOST, LENGTH, "X-Na\0me: a"),
    "no host": raw(LINE, LENGTH),
    "two hosts": raw(LINE, HOST, HOST, LENGTH),
    "too many headers": raw(LINE, HOST, LENGTH, *[f"X-{n}: a" for n in range(140)]),
    "a header that is too long": raw(LINE, HOST, LENGTH, f"X-Name: {'a' * 9000}"),
    "a target that is too long": raw(f"POST /hooks/{'a' * 9000} HTTP/1.1", HOST, LENGTH),
    "an encoding that is nearly chunked": raw(LINE, HOST, "Transfer-Encoding: xchunked", body=b"0\r\n\r\n"),
    "chunked twice": raw(LINE, HOST, "Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n"),
    "chunks whose sizes are none": raw(LINE, HOST, "Transfer-Encoding: chunked", body=b"0x2\r\n{}\r\n0\r\n\r\n"),
    "an HTTP that is none": raw("POST /hooks/shop HTTP/1.10", HOST, LENGTH),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_BY_AIOHTTP)
async def test_what_two_readers_could_read_differently_is_refused_and_ends_the_connection(
    program: Program, name: str
) -> None:
    async with connected(program.port, source="127.0.0.3") as line:
        answer = await line.ask(REFUSED_BY_AIOHTTP[name])
        assert (answer.status, answer.headers["content-type"]) in [
            (400, "application/problem+json"),
            (415, "application/problem+json"),  # read as one request, whose body nobody takes
        ]
        if answer.status == 400:
            assert await line.closed(within=4) < 4, "nothing that follows is another request"


async def test_a_request_that_hides_in_the_body_of_another_is_not_heard(program: Program, dsn: str) -> None:
    hidden = post(order())
    before = await rows_at_rest(dsn)
    for name in ("chunked, and a length", "two lengths that differ", "chunks whose sizes are none", "line feeds alone"):
        async with connected(program.port, source="127.0.0.3") as line:
            await line.send(REFUSED_BY_AIOHTTP[name] + hidden)
            assert (await line.answer()).status == 400
            assert await line.closed(within=4) < 4
    assert await rows(dsn) == before


async def test_bodies_that_are_packed_are_refused_as_they_are_and_cost_no_memory(program: Program) -> None:
    for encoding in ("gzip", "deflate", "br", "zstd", "identity, gzip"):
        body = b"\x1f\x8b" + b"\0" * 1000
        async with connected(program.port, source="127.0.0.3") as line:
            asked = await line.ask(post(body, {**signed(body), "content-encoding": encoding}))
            assert asked.status == 415


@pytest.mark.parametrize("coding", ["identity, chunked", "gzip, chunked", "chunked, identity"])
async def test_only_chunked_alone_is_a_transfer_encoding(program: Program, coding: str) -> None:
    async with connected(program.port, source="127.0.0.3") as line:
        asked = await line.ask(post(b"0\r\n\r\n", {**signed(b""), "transfer-encoding": coding}))
        assert asked.status == 400


async def test_a_target_that_is_a_whole_url_leads_to_the_same_door_and_nowhere_else(program: Program) -> None:
    async with connected(program.port, source="127.0.0.3") as line:
        for target, status in (
            (
                "http://elsewhere.example/hooks/shop",
                202,
            ),  # a server must take it (RFC 9112); the host says nothing here
            ("http://elsewhere.example/api/v1/events", 405),
            (f"http://elsewhere.example/{CANARY}", 404),
        ):
            answer = await line.ask(post(order() if status == 202 else b"{}", path=target))
            assert answer.status == status
            assert b"elsewhere" not in answer.raw


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "HEAD", "OPTIONS", "PROPFIND", "post"])
async def test_nothing_but_post_comes_in(program: Program, method: str) -> None:
    async with connected(program.port, source="127.0.0.3") as line:
        await line.send(post(b"", {"x-canary": CANARY}, method=method))
        answer = await line.answer(bodiless=method == "HEAD")
        assert answer.status == {"CONNECT": 404, "post": 400, "PROPFIND": 405}.get(method, 405)
        assert b"anary" not in answer.raw


# ── how many may come ───────────────────────────────────────────────────────────────────────────────


async def lines(stack: AsyncExitStack, program: Program, number: int, source: str) -> list[Line]:
    return [await stack.enter_async_context(connected(program.port, source=source)) for _ in range(number)]


async def is_let_in(line: Line) -> bool:
    with suppress(ConnectionError, asyncio.IncompleteReadError):
        return (await line.ask(post(b"", {}, "/live", method="GET"))).status == 200
    return False


async def test_one_address_has_so_many_connections_and_others_have_theirs(program: Program) -> None:
    async with AsyncExitStack() as stack:
        mine = await lines(stack, program, MOST_OF_ONE, "127.0.0.4")
        assert all([await is_let_in(line) for line in mine])
        assert not await is_let_in((await lines(stack, program, 1, "127.0.0.4"))[0])
        assert await is_let_in((await lines(stack, program, 1, "127.0.0.5"))[0])
        assert all([await is_let_in(line) for line in mine]), "those that are there stay"
    assert program.metric('sluicegate_connections_refused_total{limit="connections_per_address"}') == 1
    (said,) = program.log("connection.refused")
    assert said["limit"] == "serve.connections_per_address"
    async with connected(program.port, source="127.0.0.4") as line:
        assert await is_let_in(line), "once the others have gone there is room again"


async def test_a_proxy_that_is_trusted_speaks_for_many_until_there_are_too_many_in_all(program: Program) -> None:
    async with AsyncExitStack() as stack:
        through = await lines(stack, program, MOST - 5, "127.0.0.2")
        assert all([await is_let_in(line) for line in through])
        more = await lines(stack, program, 10, "127.0.0.2")
        assert not all([await is_let_in(line) for line in more])
    until(lambda: program.metric('sluicegate_connections_refused_total{limit="connections"}') >= 1, 5, "a refusal")
    assert program.get("/ready").status == 200


async def test_one_address_may_post_so_much_whoever_it_is_and_to_whatever_source(program: Program) -> None:
    async def flooded(line: Line) -> list[int]:
        head = {"content-type": "application/json"}
        posts = [post(b"{}", head, "/hooks/nobody" if n % 2 else "/hooks/shop") for n in range(60)]
        return [(await line.ask(one)).status for one in posts]

    before = program.metric('sluicegate_refused_total{reason="address_rate_limited",source=""}')
    async with AsyncExitStack() as stack:
        flood = await lines(stack, program, 8, "127.0.0.6")
        ask = asyncio.gather(*(flooded(line) for line in flood))
        await asyncio.sleep(1)
        async with connected(program.port, source="127.0.0.7") as line:
            assert (await line.ask(post(order()))).status == 202, "nobody else is slowed down"
        statuses = [status for each in await ask for status in each]
    assert 429 in statuses
    assert {401, 404, 429} >= set(statuses)
    assert program.metric('sluicegate_refused_total{reason="address_rate_limited",source=""}') > before
    async with connected(program.port, source="127.0.0.2") as line:  # behind the proxy, somebody else
        asked = post(body := order(), {**signed(body), "x-forwarded-for": "192.0.2.1"})
        assert (await line.ask(asked)).status == 202


async def test_how_busy_a_source_is_is_told_to_nobody_who_may_not_post_there(program: Program) -> None:
    async with connected(program.port, source="127.0.0.9") as line:
        assert (await line.ask(post(order(), path="/hooks/inside"))).status == 202
        assert (await line.ask(post(order(), path="/hooks/inside"))).status == 429
    async with connected(program.port, source="127.0.0.8") as line:
        assert (await line.ask(post(order(), path="/hooks/inside"))).status == 401


def test_what_is_counted_of_addresses_is_bounded_and_a_network_of_ipv6_is_one() -> None:
    limits = AddressLimits(per_second=1)
    now = time.monotonic()
    for number in range(MOST_ADDRESSES + 100):
        assert limits.exceeded(ip_address(number + 2**24), now) is None
    assert len(limits._limits) == MOST_ADDRESSES
    assert limits.exceeded(ip_address("2001:db8::1"), now) is None
    assert limits.exceeded(ip_address("2001:db8::ffff:2"), now) is not None
    assert limits.exceeded(ip_address("2001:db8:0:1::1"), now) is None
    assert limits.exceeded(ip_address("::ffff:192.0.2.1"), now) is None
    assert limits.exceeded(ip_address("192.0.2.1"), now) is not None
    assert limits.exceeded(None, now) is None


def test_who_leaves_makes_room_and_nothing_of_them_is_remembered() -> None:
    refused: list[str] = []
    admission = Admission(Serve(connections=10, connections_per_address=2), refused.append)
    whose = [admission.enter(address) for address in ("192.0.2.1", "192.0.2.1", "fe80::1%eth0", None, None, None)]
    assert None not in whose
    assert admission.enter("192.0.2.1") is None
    assert refused == ["connections_per_address"]
    admission.adopt(Serve(connections=10, connections_per_address=3))
    assert admission.enter("192.0.2.1") is not None
    for one in [*whose, whose[0]]:
        admission.leave(one)
    assert (admission._inside, admission._of) == (0, {})
