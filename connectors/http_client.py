"""The one way out by HTTP: goes only where it may, believes nothing, and says whether a request had left.

A client belongs to one destination: its connections, its TLS, its limit.  It follows no redirect, reads no proxy or
.netrc from the environment, keeps no cookie, decompresses nothing, reads a bounded part of an answer, keeps to one
deadline for all of it, and sends a request once.

It stands on aiohttp's connector and not on its session, which sends a GET, PUT or DELETE a second time by itself when a
kept-alive connection drops; and here it is plain to see where a request leaves.  Answers are parsed by aiohttp.  A request
is written here, in one piece: line by line of visible ASCII, its length told, so that none can hide another.
"""

import asyncio
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from http import HTTPStatus
from ipaddress import IPv4Network, IPv6Network

import aiohttp
from aiohttp.connector import Connection
from aiohttp.http import HttpProcessingError, RawResponseMessage
from yarl import URL

from connectors import Blocked, Delivered, Retry, Unknown
from connectors.egress import Egress, EgressDenied, Resolver
from connectors.proxy import ProxyFault
from connectors.settings import Pem
from connectors.tls import WrongKey
from connectors.tunnels import Tunnels
from connectors.way_out import WayOut
from observability.tracing import Tracing

MOST = 64 * 1024
"""So much of an answer is read, unless the caller asks for more."""

PATIENCE = timedelta(seconds=1)
"""For the rest of an answer that nobody reads: its connection is worth no more than that."""

BODILESS = frozenset({"GET", "HEAD"})

KEEP_ALIVE = timedelta(seconds=4)
"""Below the 5 s after which common servers hang up on an idle connection, so that we seldom meet one hanging up."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]  # case does not matter
    body: bytes = b""  # as far as it was asked for
    whole: bool = True  # the body ended where it should


_NO_LIMITS = aiohttp.ClientTimeout(total=None, sock_connect=None)  # one deadline lies around everything

NoAnswer = Retry | Blocked | Unknown
"""Why there is none: the request had not left (`Retry`), cannot (`Blocked`), or had, and nobody knows (`Unknown`)."""


class Client:
    """Requests to one origin; made within a running event loop, and closed."""

    def __init__(
        self,
        origin: URL,
        *,
        allow: Sequence[IPv4Network | IPv6Network],
        ca: Pem | None,
        way: WayOut | None = None,
        timeout: timedelta,
        concurrency: int,
        agent: str,
    ) -> None:
        self._origin = origin.origin()
        self._host, self._port = origin.host or "", origin.port or 0
        self._loop = asyncio.get_running_loop()
        way = way or WayOut()
        egress = Egress(allow, way.through)
        self._resolver = Resolver(egress)
        encrypted = way.encrypted(ca) if origin.scheme == "https" else True
        if way.through is None:
            self._connector = aiohttp.TCPConnector(
                socket_factory=egress.socket_for,
                resolver=self._resolver,
                ssl=encrypted,
                limit=concurrency,
                keepalive_timeout=KEEP_ALIVE.total_seconds(),
            )
        else:
            self._connector = Tunnels(
                egress,
                timeout.total_seconds(),
                ssl=encrypted,
                limit=concurrency,
                keepalive_timeout=KEEP_ALIVE.total_seconds(),
            )
        self._place = aiohttp.ClientRequest(
            "GET", self._origin, loop=self._loop
        )  # whom to connect to; it is never sent
        self._headers = {"accept": "*/*", "accept-encoding": "identity", "user-agent": agent}
        self._seconds = timeout.total_seconds()

    async def send(
        self,
        method: str,
        url: URL,
        *,
        headers: Mapping[str, str],
        tracing: Tracing,
        body: bytes | None = None,
        read: int = 0,
    ) -> Answer | NoAnswer:
        """Sends once.  `read` bytes of the answer's body are wanted; the rest of it is not waited for.

        The status is the answer: once it is here, nothing that becomes of the body changes what the partner said.
        """
        connection = message = None
        with tracing.call(method, self._host, self._port) as call:
            request = self._request(method, url, {**self._headers, **headers, "traceparent": call.traceparent}, body)
            try:
                async with asyncio.timeout(self._seconds) as deadline:
                    connection = await self._connector.connect(self._place, [], _NO_LIMITS)
                    message, content = await _exchange(connection, request, with_body=method != "HEAD")
                    call.answered(message.code)
                    if content.is_eof() and not read:
                        connection.release()
                        return Answer(message.code, message.headers)
                    if not read:
                        deadline.reschedule(min(deadline.when() or 0, self._loop.time() + PATIENCE.total_seconds()))
                    said, whole = await _read(content, read)
                    if whole:
                        connection.release()
                    return Answer(message.code, message.headers, said, whole)
            except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
                if message is not None:
                    return Answer(message.code, message.headers, whole=False)
                failure = _judged(error, left=connection is not None)
                call.failed(failure.code)
                return failure.outcome
            finally:
                if connection is not None:  # one that was released is its connector's
                    connection.close()

    async def reach(self, url: URL) -> Delivered | NoAnswer:
        """Connects as `send` would, and sends nothing."""
        try:
            async with asyncio.timeout(self._seconds):
                self._refuse_elsewhere(url)
                connection = await self._connector.connect(self._place, [], _NO_LIMITS)
        except (aiohttp.ClientError, OSError) as error:
            return _judged(error, left=False).outcome
        connection.close()
        return Delivered()

    async def close(self) -> None:
        await self._connector.close()
        await self._resolver.close()

    def _request(self, method: str, url: URL, headers: Mapping[str, str], body: bytes | None) -> bytes:
        """All of it, as it goes out."""
        self._refuse_elsewhere(url)
        lines = [f"{method} {url.raw_path_qs} HTTP/1.1", f"host: {url.host_port_subcomponent}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body is not None or method not in BODILESS:
            lines.append(f"content-length: {len(body or b'')}")
        for line in lines:
            if not (line.isascii() and line.isprintable()):
                raise ValueError(f"the header {line.partition(':')[0]!a} would hold more than visible ASCII")
        return "\r\n".join([*lines, "", ""]).encode() + (body or b"")

    def _refuse_elsewhere(self, url: URL) -> None:
        if url.origin() != self._origin:
            raise ValueError("the request leads away from its destination")


async def _exchange(
    connection: Connection, request: bytes, *, with_body: bool
) -> tuple[RawResponseMessage, aiohttp.StreamReader]:
    """Sends the request on this connection, and waits for the head of its answer; what is provisional is passed over."""
    protocol, transport = connection.protocol, connection.transport
    if protocol is None or transport is None or transport.is_closing():
        raise ConnectionResetError
    protocol.set_response_params(
        skip_payload=not with_body, read_until_eof=True, auto_decompress=False, read_bufsize=MOST
    )
    transport.write(request)
    while True:
        message, content = await protocol.read()
        if not 100 <= message.code < 200 or message.code == HTTPStatus.SWITCHING_PROTOCOLS:
            return message, content


async def _read(content: aiohttp.StreamReader, wanted: int) -> tuple[bytes, bool]:
    """So much of a body; and whether it ended where it should, within what is read at the most."""
    body, limit = bytearray(), max(wanted, MOST)
    while len(body) <= limit and not content.at_eof():
        body += await content.readany()
    return bytes(body[:wanted]), len(body) <= limit


@dataclass(frozen=True, slots=True)
class _Failure:
    code: str  # for traces
    outcome: NoAnswer


def _judged(error: aiohttp.ClientError | HttpProcessingError | OSError, *, left: bool) -> _Failure:
    """What an error means for what was to be sent; none of its text, which can hold addresses and more, is kept."""
    match error:
        case aiohttp.ClientConnectorCertificateError(certificate_error=OSError() as cause):
            return _Failure(*not_connected(cause))
        case aiohttp.ClientConnectorError(os_error=cause):
            return _Failure(*not_connected(cause))
        case aiohttp.InvalidURL():
            return _Failure("url", Blocked("configuration: url: its host is no name and no address"))
        case TimeoutError() if left:
            return _Failure("timeout", Unknown("no answer in time"))
        case TimeoutError():
            return _Failure("timeout", Retry("no connection in time", whole_destination=True))
        case HttpProcessingError():
            return _Failure("protocol", Unknown("its answer is not HTTP"))
        case _ if left:
            return _Failure("reset", Unknown("hung up before it answered"))
        case _:
            return _Failure("reset", Retry("hung up", whole_destination=True))


def not_connected(error: OSError) -> tuple[str, Retry | Blocked]:
    """Why there is no connection: a code for traces, and what it means."""
    match error:
        case ProxyFault(outcome=outcome):
            return "proxy", outcome
        case WrongKey():
            return "tls", Blocked("configuration: TLS: its key is none of those that `pin` names")
        case ssl.SSLCertVerificationError():
            return "tls", Blocked("configuration: TLS: its certificate is not trusted")
        case ssl.SSLError():
            return "tls", Blocked("configuration: TLS: no handshake")
        case socket.gaierror():
            return "dns", Retry("its name does not resolve", whole_destination=True)
        case EgressDenied(why=why):
            return "egress", Blocked(f"configuration: egress: {why}")
        case ConnectionRefusedError():
            return "refused", Retry("refused the connection", whole_destination=True)
        case TimeoutError():
            return "timeout", Retry("no connection in time", whole_destination=True)
        case _:
            return "connect", Retry("cannot be connected to", whole_destination=True)


def words(status: int) -> str:
    """`answered 503 Service Unavailable`: our words for the number, not the partner's."""
    return f"answered {status} {_PHRASES.get(status, '')}".rstrip()


_PHRASES = {status.value: status.phrase for status in HTTPStatus}
