"""Out through a proxy that others wrote, with a certificate of ours, to the key that is pinned; and whose fault it was if not."""

import asyncio
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from ipaddress import ip_network
from pathlib import Path

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from connectors import Blocked, Delivered, Opening, Outcome, Retry, Unknown, kinds
from connectors.egress import Egress, EgressDenied
from connectors.http import Http
from connectors.proxy import Proxy, ProxyFault
from connectors.settings import Reference
from connectors.tls import spki
from gateway.config import ConfigurationError, load
from gateway.renewal import Renewal
from observability.metrics import Metrics
from tests.program import until
from tests.test_http_connector import DELIVERY, SECRET, TRACING, Certificate, Issue, Running, answers, issue, running

__all__ = ["issue", "running"]  # fixtures
LOGIN = Reference(origin="env:PROXY_LOGIN", text="gateway:pass-word")
DOWN = Blocked("proxy: it cannot be connected to")


@contextmanager
def proxy(folder: Path, *arguments: str) -> Iterator[str]:
    """The URL of a `proxy.py`."""
    told = folder / f"port{len(list(folder.glob('port*')))}"
    command = [sys.executable, "-m", "proxy", "--hostname", "127.0.0.1", "--port", "0", "--port-file", str(told)]
    command += ["--num-workers", "1", "--num-acceptors", "1", "--log-level", "CRITICAL", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            yield f"http://127.0.0.1:{until(lambda: told.exists() and told.read_text().strip(), 20, 'proxy')}"
        finally:
            running.terminate()


@pytest.fixture(scope="module")
def open_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with proxy(tmp_path_factory.mktemp("proxy")) as url:
        yield url


def opened(url: str, *, timeout: float = 5, **settings: object) -> Http:
    kind = kinds()["http"]
    written = {"url": url, "secret": Reference(origin="env:S", text=SECRET), "allow": ["127.0.0.1/32"], **settings}
    connector = kind.connect(
        Opening(
            destination="ledger",
            settings=kind.settings.model_validate(written),
            system=None,
            timeout=timedelta(seconds=timeout),
            concurrency=4,
            tracing=TRACING,
            version="1",
        )
    )
    assert isinstance(connector, Http)
    return connector


async def tried(url: str, **settings: object) -> Outcome:
    connector = opened(url, **settings)
    try:
        return await connector.deliver(DELIVERY)
    finally:
        await connector.close()


# ── through a proxy ─────────────────────────────────────────────────────────────────────────────────


async def test_an_event_goes_through_a_proxy_encrypted_or_not_and_the_tunnel_is_kept(
    running: Running, issue: Issue, open_proxy: str
) -> None:
    mine = issue()
    for partner in (await running(answers(200)), await running(answers(200), tls=mine.context())):
        connector = opened(partner.url, proxy=open_proxy, ca=mine.pem)
        assert await connector.check() == Delivered()
        assert [await connector.deliver(DELIVERY) for _ in range(3)] == [Delivered(status=200)] * 3
        await connector.close()
        assert (partner.connections, len(partner.received)) == (2, 3)
        assert not {name for name in partner.received[0].headers if "proxy" in name}


async def test_a_proxy_that_wants_a_login_gets_it_and_the_partner_does_not(running: Running, tmp_path: Path) -> None:
    partner = await running(answers(200))
    with proxy(tmp_path, "--basic-auth", "gateway:pass-word") as url:
        assert await tried(partner.url, proxy=url, proxy_login=LOGIN) == Delivered(status=200)
        wrong = Blocked("credentials: proxy: answered 407 Proxy Authentication Required", 407)
        assert await tried(partner.url, proxy=url) == wrong
        other = Reference(origin="env:L", text="gateway:other")
        assert await tried(partner.url, proxy=url, proxy_login=other) == wrong
    assert len(partner.received) == 1
    assert b"pass-word" not in b"".join(f"{request.headers}".encode() for request in partner.received)


async def test_where_one_may_go_is_judged_before_the_proxy_is_asked(running: Running, open_proxy: str) -> None:
    partner = await running(answers(200))
    outside = await tried(partner.url, proxy=open_proxy, allow=["10.0.0.0/8"])
    assert outside == Blocked("configuration: egress: `allow` does not cover its address")
    for resolves in (False, True):
        for spelling in ("127.0.0.1", "[::ffff:127.0.0.1]", "127.1", "2130706433"):
            url = partner.url.replace("127.0.0.1", spelling)
            outcome = await tried(url, proxy=open_proxy, proxy_resolves=resolves, allow=["10.0.0.0/8"])
            assert isinstance(outcome, Blocked), (spelling, resolves)
        metadata = await tried(
            "http://169.254.169.254/", proxy=open_proxy, proxy_resolves=resolves, allow=["0.0.0.0/0"]
        )
        assert metadata == Blocked("configuration: egress: its address is one that is never connected to")
    assert partner.connections == 0


async def test_a_proxy_is_given_an_address_and_a_name_only_where_it_alone_can_look_it_up(running: Running) -> None:
    partner = await running(answers(200))
    with listening(lambda _: b"HTTP/1.1 403 Forbidden\r\n\r\n") as (url, heard):
        url_by_name = partner.url.replace("127.0.0.1", "localhost")
        await tried(url_by_name, proxy=url)
        await tried(url_by_name.replace("localhost", "name.invalid"), proxy=url, proxy_resolves=True)
        assert await tried(url_by_name.replace("localhost", "name.invalid"), proxy=url) == Retry(
            "its name does not resolve", whole_destination=True
        )
    assert [head.split(b"\r\n")[0] for head in heard] == [
        b"CONNECT 127.0.0.1:%d HTTP/1.1" % partner.port,
        b"CONNECT name.invalid:%d HTTP/1.1" % partner.port,
    ]


# ── whose fault it was ──────────────────────────────────────────────────────────────────────────────


async def test_a_partner_that_is_down_behind_a_proxy_is_down(open_proxy: str) -> None:
    with socket.socket() as placeholder:
        placeholder.bind(("127.0.0.1", 0))
        outcome = await tried(f"http://127.0.0.1:{placeholder.getsockname()[1]}/", proxy=open_proxy)
    assert outcome == Retry("the proxy could not reach it: answered 502 Bad Gateway", whole_destination=True)


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", Blocked("configuration: proxy: answered 403 Forbidden", 403)),
        (b"HTTP/1.1 500 X\r\n\r\n", Blocked("configuration: proxy: answered 500 Internal Server Error", 500)),
        (b"HTTP/1.0 407 X\r\n\r\n", Blocked("credentials: proxy: answered 407 Proxy Authentication Required", 407)),
        (b"HTTP/1.1 504 X\r\n\r\n", Retry("the proxy could not reach it: answered 504 Gateway Timeout", whole_destination=True)),
        (b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", Blocked("configuration: proxy: what answers there is no HTTP proxy")),
        (b"SSH-2.0-OpenSSH\r\n\r\n", Blocked("configuration: proxy: what answers there is no HTTP proxy")),
        (b"HTTP/1.1 200 OK\r\n", Blocked("proxy: it hangs up before it answers")),
        (b"", Blocked("proxy: it hangs up before it answers")),
        (b"x" * 40_000, Blocked("proxy: it hangs up before it answers")),
    ],
)  # fmt: skip
async def test_a_fault_of_the_proxy_is_never_taken_for_the_partners(
    running: Running, said: bytes, outcome: Outcome
) -> None:
    partner = await running(answers(200))
    with listening(lambda _: said) as (url, _):
        assert await tried(partner.url, proxy=url) == outcome
    assert partner.connections == 0


async def test_a_proxy_that_is_away_or_silent_uses_up_no_try_of_the_partner(running: Running) -> None:
    partner = await running(answers(200))
    with socket.socket() as placeholder:
        placeholder.bind(("127.0.0.1", 0))
        assert await tried(partner.url, proxy=f"http://127.0.0.1:{placeholder.getsockname()[1]}") == DOWN
    with listening(lambda _: time.sleep(3) or b"") as (url, _):
        began = time.monotonic()
        assert await tried(partner.url, proxy=url, timeout=1) == Blocked("proxy: it does not answer")
        assert time.monotonic() - began < 2
    assert partner.connections == 0


async def test_what_blocks_in_a_thread_goes_through_the_same_tunnel(running: Running, open_proxy: str) -> None:
    """As the calls of odoorpc do."""
    partner = await running(answers(200))
    egress = Egress([ip_network("127.0.0.1/32")], Proxy(open_proxy))

    def ask() -> bytes:
        with egress.connect(("127.0.0.1", partner.port), 5) as tunnel:
            tunnel.sendall(b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
            return tunnel.recv(100)

    assert (await asyncio.to_thread(ask)).startswith(b"HTTP/1.1 200")
    with pytest.raises(EgressDenied):
        await asyncio.to_thread(Egress((), Proxy(open_proxy)).connect, ("127.0.0.1", partner.port), 5)
    with pytest.raises(ProxyFault):
        await asyncio.to_thread(Proxy("http://127.0.0.1:1").tunnel, "192.0.2.1", 443, 5)


# ── who is who ──────────────────────────────────────────────────────────────────────────────────────


def pin_of(certificate: Certificate) -> str:
    return spki(x509.load_pem_x509_certificate(certificate.pem.encode()).public_bytes(Encoding.DER))


async def test_a_partner_must_have_the_key_that_is_pinned_whoever_vouches_for_it(
    running: Running, issue: Issue, open_proxy: str
) -> None:
    mine, next_one = issue(), issue()
    partner = await running(answers(200), tls=mine.context())
    good, wrong = [pin_of(next_one), pin_of(mine)], [pin_of(next_one)]
    none = Blocked("configuration: TLS: its key is none of those that `pin` names")
    for way in ({}, {"proxy": open_proxy}):
        assert await tried(partner.url, ca=mine.pem, pin=good, **way) == Delivered(status=200)
        received = len(partner.received)
        assert await tried(partner.url, ca=mine.pem, pin=wrong, **way) == none
        assert await tried(partner.url, ca=next_one.pem, pin=good, **way) == Blocked(
            "configuration: TLS: its certificate is not trusted"
        ), "a pin makes nothing trusted"
        assert len(partner.received) == received


async def test_all_of_it_holds_on_the_loop_that_the_program_runs_on(
    running: Running, issue: Issue, open_proxy: str
) -> None:
    mine = issue()
    partner = await running(answers(200), tls=mine.context())

    def on_uvloop(**settings: object) -> Outcome:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(tried(partner.url, ca=mine.pem, **settings))

    good = await asyncio.to_thread(on_uvloop, pin=[pin_of(mine)], proxy=open_proxy)
    assert good == Delivered(status=200)
    for way in ({}, {"proxy": open_proxy}):
        wrong = await asyncio.to_thread(on_uvloop, pin=[pin_of(issue())], **way)
        assert wrong == Blocked("configuration: TLS: its key is none of those that `pin` names")
    assert len(partner.received) == 1


async def test_a_partner_that_asks_for_a_certificate_gets_ours(running: Running, issue: Issue) -> None:
    theirs, ours = issue(), issue()
    asks = theirs.context()
    asks.verify_mode = ssl.CERT_REQUIRED
    asks.load_verify_locations(cadata=ours.pem)
    partner = await running(answers(200), tls=asks)
    key = Reference(origin="file:key", text=ours.file.read_text().partition("-----BEGIN CERTIFICATE")[0])
    assert await tried(partner.url, ca=theirs.pem, certificate=ours.pem, certificate_key=key) == Delivered(status=200)
    received = len(partner.received)
    assert isinstance(await tried(partner.url, ca=theirs.pem), Unknown | Blocked | Retry)
    assert len(partner.received) == received


# ── the configuration ───────────────────────────────────────────────────────────────────────────────


def test_what_cannot_be_a_way_out_is_refused_when_it_is_loaded(issue: Issue) -> None:
    mine, other = issue(), issue()
    key = Reference(origin="file:key", text=other.file.read_text().partition("-----BEGIN CERTIFICATE")[0])
    for settings, said in (
        ({"proxy": "https://proxy.example:3128"}, "a proxy is an address alone"),
        ({"proxy": "http://proxy.example:3128/path"}, "a proxy is an address alone"),
        ({"proxy": "http://user:secret@proxy.example"}, "holds a login"),
        ({"proxy_login": LOGIN}, "names none; add proxy"),
        ({"proxy_resolves": True}, "names none; add proxy"),
        ({"proxy": "http://p.example", "proxy_login": Reference(origin="env:L", text="token")}, "holds in env:L no login"),
        ({"certificate": mine.pem}, "add the other"),
        ({"certificate_key": key}, "add the other"),
        ({"certificate": mine.pem, "certificate_key": key}, "is not the key of its certificate"),
        ({"certificate": "junk", "certificate_key": key}, "holds no certificates"),
        ({"pin": ["abc"]}, "pattern"),
        ({"pin": [pin_of(mine)], "url": "http://partner.example/"}, "its url is not encrypted"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            opened(str(settings.pop("url", "https://partner.example/")), **settings)


CONFIGURATION = """
key: env:KEY
database: embedded
destinations:
  ledger: {connector: http, url: https://partner.example/, secret: env:S, ca: file:ca.pem}
"""


def test_a_mistake_in_a_way_out_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "sluicegate.yaml"
    path.write_text(CONFIGURATION.replace("ca: file:ca.pem", "proxy_resolves: true"))
    with pytest.raises(ConfigurationError) as error:
        load(path, {"KEY": "k" * 32, "S": SECRET})
    assert str(error.value) == f"{path}:5: destinations.ledger says how to speak to a proxy, but names none; add proxy"


async def test_authorities_of_a_file_that_changes_are_taken_anew(issue: Issue, tmp_path: Path) -> None:
    first, second = issue(), issue()
    (tmp_path / "ca.pem").write_text(first.pem)
    (tmp_path / "sluicegate.yaml").write_text(CONFIGURATION)
    config = load(tmp_path / "sluicegate.yaml", {"KEY": "k" * 32, "S": SECRET})
    renewal = Renewal(Metrics())
    assert await renewal.look(config) is None
    (tmp_path / "ca.pem").write_text(second.pem)
    assert await renewal.look(config) is None
    renewed = await renewal.look(config)
    assert renewed is not None
    assert renewed.destinations["ledger"].settings != config.destinations["ledger"].settings
    (tmp_path / "ca.pem").write_text("junk")
    assert [await renewal.look(renewed) for _ in range(3)] == [None] * 3, "what is no certificate changes nothing"


# ── what stands in for a proxy that misbehaves ──────────────────────────────────────────────────────


@contextmanager
def listening(answer: Callable[[bytes], bytes]) -> Iterator[tuple[str, list[bytes]]]:
    """Answers each head, and hangs up."""
    heard: list[bytes] = []

    def serve(server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection, suppress(OSError):
                    heard.append(connection.recv(10_000))
                    connection.sendall(answer(heard[-1]))

    with socket.create_server(("127.0.0.1", 0)) as server:
        serving = threading.Thread(target=serve, args=(server,), daemon=True)
        serving.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", heard
        server.shutdown(socket.SHUT_RDWR)
    serving.join(5)
