"""The two doors of Odoo: JSON-RPC, which every version up to 21 has, and JSON-2, which came with 19.

Both say an error by its name: Odoo's status codes have several meanings each.  What else comes with an error (its text,
and a traceback with paths) is dropped here and goes nowhere.
"""

import asyncio
import http.client
import re
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec
import odoorpc
from yarl import URL

from connectors import Blocked, Outcome, Refused, Retry, Unknown
from connectors.egress import Egress
from connectors.http_client import Answer, Client, not_connected, words
from connectors.retry_after import retry_after
from observability.logs import silence
from observability.tracing import Tracing

MOST = 1024 * 1024
"""So much of an answer is read: what is asked for here is a handful of records."""

CONNECT = 10.0
"""Seconds for a connection: the thread that waits for one cannot be let go before."""

# It writes all that it sends at level DEBUG, and hides a key only where it is called `password`.
silence("odoorpc.rpc.jsonrpclib")


class Fault(Exception):  # noqa: N818  # Odoo's, not ours
    """An exception inside Odoo, by its name.  Its transaction was rolled back: nothing happened."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Failed(Exception):  # noqa: N818  # it carries what came of the try
    """A call that brought no answer of Odoo's, and what that means for the try."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Login:
    database: str
    user: str
    key: str


class Door(Protocol):
    async def call(
        self, model: str, method: str, ids: Sequence[int] | None, arguments: Mapping[str, object], tracing: Tracing
    ) -> object:
        """Calls a method of a model (`ids` is None) or of its records; raises Fault or Failed."""
        ...

    async def close(self) -> None: ...


class Json2:
    """`POST /json/2/MODEL/METHOD` with named arguments, over our own HTTP client."""

    def __init__(self, client: Client, url: URL, login: Login) -> None:
        self._client = client
        self._url = url / "json/2"
        self._headers = {
            "authorization": f"bearer {login.key}",
            "x-odoo-database": login.database,
            "content-type": "application/json",
        }

    async def call(
        self, model: str, method: str, ids: Sequence[int] | None, arguments: Mapping[str, object], tracing: Tracing
    ) -> object:
        answer = await self._client.send(
            "POST",
            self._url / model / method,
            headers=self._headers,
            body=msgspec.json.encode(arguments if ids is None else {**arguments, "ids": ids}),
            tracing=tracing,
            read=MOST,
        )
        if not isinstance(answer, Answer):
            raise Failed(answer)
        if not answer.whole:
            raise Failed(Unknown("its answer was cut off", answer.status))
        try:
            said = msgspec.json.decode(answer.body)
        except msgspec.DecodeError:
            raise Failed(not_odoo(answer.status, answer.headers)) from None
        if answer.status == 200:
            return said
        if not isinstance(said, dict) or not isinstance(said.get("name"), str):
            raise Failed(not_odoo(answer.status, answer.headers))
        raise Fault(said["name"])

    async def close(self) -> None:
        """The client is whose it was."""


class JsonRpc:
    """`/jsonrpc` through odoorpc, which blocks: each call runs in a thread of a pool of its own.

    Each call has its own client, so no state is shared; one login serves them all, since it costs Odoo half a second.
    """

    def __init__(
        self, url: URL, login: Login, *, egress: Egress, tls: ssl.SSLContext | None, seconds: float, threads: int
    ) -> None:
        self._url, self._login, self._egress, self._tls, self._seconds = url, login, egress, tls, seconds
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="odoo")
        self._logging_in = asyncio.Lock()
        self._uid: int | None = None
        self._wires: set[_Wire] = set()

    async def call(
        self, model: str, method: str, ids: Sequence[int] | None, arguments: Mapping[str, object], tracing: Tracing
    ) -> object:
        uid = self._uid or await self._log_in(tracing)
        by_name = dict(arguments)
        by_position = [*([] if ids is None else [list(ids)]), *(by_name.pop(name) for name in _UNNAMED.get(method, ()))]
        try:
            return await self._post(
                tracing,
                "object",
                "execute_kw",
                [self._login.database, uid, self._login.key, model, method, by_position, by_name],
            )
        except Fault as fault:
            if fault.name.endswith("AccessDenied"):
                self._uid = None
            raise

    async def close(self) -> None:
        for wire in self._wires:
            wire.cut()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _log_in(self, tracing: Tracing) -> int:
        async with self._logging_in:
            if self._uid is not None:
                return self._uid
            login = self._login
            try:
                uid = await self._post(tracing, "common", "login", [login.database, login.user, login.key])
            except Fault as fault:
                if fault.name.startswith("psycopg2."):  # it looks transient, and is how Odoo says that there is none
                    raise Failed(Blocked("configuration: database: Odoo cannot open it")) from None
                raise
            if not isinstance(uid, int) or not uid:
                raise Failed(Blocked("credentials: Odoo does not accept the user and its key"))
            self._uid = uid
            return uid

    async def _post(self, tracing: Tracing, service: str, method: str, args: Sequence[object]) -> object:
        wire = _Wire(self._egress, self._tls, self._seconds)
        self._wires.add(wire)
        with tracing.call("POST", self._url.host or "", self._url.port or 0) as call:
            try:
                async with asyncio.timeout(self._seconds):
                    said = await asyncio.get_running_loop().run_in_executor(
                        self._threads, self._exchange, wire, service, method, args
                    )
            except TimeoutError:
                call.failed("timeout")
                raise Failed(Unknown("no answer in time") if wire.left else Retry("no connection in time")) from None
            except Failed:
                call.failed("no answer")
                raise
            except Fault:
                call.failed("fault")
                raise
            finally:
                wire.cut()
                self._wires.discard(wire)
            call.answered(200)
            return said

    def _exchange(self, wire: "_Wire", service: str, method: str, args: Sequence[object]) -> object:
        """In a thread."""
        try:
            odoo = odoorpc.ODOO(
                self._url.host_subcomponent,
                protocol="jsonrpc+ssl" if self._tls else "jsonrpc",
                port=self._url.port,
                timeout=self._seconds,
                version="10.0",  # spares a look-up; nothing here depends on it
                opener=wire.opener(),
            )
            return odoo.json("/jsonrpc", {"service": service, "method": method, "args": args}).get("result")
        except odoorpc.error.RPCError as error:
            raise Fault(_name_in(error.info)) from None
        except urllib.error.HTTPError as error:
            with error:
                headers = {name.lower(): value for name, value in error.headers.items()}
                raise Failed(not_odoo(error.code, headers)) from None
        except urllib.error.URLError as error:
            raise Failed(wire.lost(error.reason)) from None
        except (OSError, http.client.HTTPException) as error:
            raise Failed(wire.lost(error)) from None
        except (ValueError, KeyError, TypeError, AttributeError):  # odoorpc believes that Odoo answers
            raise Failed(not_odoo(200, {})) from None


_UNNAMED = {"write": ["vals"], "check_access_rights": ["operation"]}
"""Arguments that modules which extend a method call differently, and that web clients always gave by position."""


class _Wire:
    """The connection of one call: opened only where that is allowed, and cut from outside when its time is over."""

    def __init__(self, egress: Egress, tls: ssl.SSLContext | None, seconds: float) -> None:
        self.left = False
        self._egress, self._tls, self._seconds = egress, tls, seconds
        self._over = False
        self._socket: socket.socket | None = None

    def opener(self) -> urllib.request.OpenerDirector:
        """No redirects, no proxies, no cookies, no other schemes than those of this one handler."""
        opener = urllib.request.OpenerDirector()
        opener.addheaders = [("User-Agent", "sluicegate")]
        for handler in (_Handler(self), urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler()):
            opener.add_handler(handler)
        return opener

    def open(self, host: str, port: int) -> socket.socket:
        self._socket = self._egress.connect((host, port), min(self._seconds, CONNECT))
        try:
            self._socket.settimeout(self._seconds)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                self._socket = self._tls.wrap_socket(self._socket, server_hostname=host, do_handshake_on_connect=False)
                self._socket.do_handshake()
            if self._over:
                raise TimeoutError
        except OSError:
            self._socket.close()
            raise
        self.left = True
        return self._socket

    def cut(self) -> None:
        """Lets the thread go that waits here."""
        self._over = True
        if self._socket is not None:
            with suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def lost(self, error: object) -> Outcome:
        match error:
            case TimeoutError() if self.left:
                return Unknown("no answer in time")
            case _ if self.left:
                return Unknown("hung up before it answered")
            case OSError():
                return not_connected(error)[1]
            case _:
                return Retry("cannot be connected to", whole_destination=True)


class _Handler(urllib.request.AbstractHTTPHandler):
    def __init__(self, wire: _Wire) -> None:
        super().__init__()
        self._wire = wire
        self.http_request = self.https_request = self.do_request_

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        def connection(host: str, **_: object) -> _Connection:
            return _Connection(host, self._wire)

        return self.do_open(connection, request)

    https_open = http_open


class _Connection(http.client.HTTPConnection):
    def __init__(self, host: str, wire: _Wire) -> None:
        super().__init__(host)
        self.response_class = _Bounded
        self._wire = wire

    def connect(self) -> None:
        self.sock = self._wire.open(self.host, self.port)


class _Bounded(http.client.HTTPResponse):
    def read(self, amount: int | None = None) -> bytes:
        if amount is not None:
            return super().read(amount)
        body = super().read(MOST + 1)
        if len(body) > MOST:
            raise http.client.HTTPException
        return body


def not_odoo(status: int, headers: Mapping[str, str]) -> Outcome:
    """An answer that Odoo's API did not give: a proxy's, a web page, or another program's."""
    match status:
        case 401 | 403 | 407:
            return Blocked(f"credentials: {words(status)}, and not by Odoo's API", status)
        case 413:
            return Refused(words(status), status)
        case 408 | 429 | 503:
            return Retry(words(status), retry_after(headers, datetime.now(UTC)), whole_destination=True, status=status)
        case _ if status >= 500:
            return Unknown(words(status), status)
        case _ if status >= 300:
            return Blocked(f"configuration: url or database: {words(status)}, and not by Odoo's API", status)
        case _:
            return Unknown("its answer is not Odoo's", status)


def _name_in(info: Any) -> str:
    match info:
        case {"data": {"name": str(name)}}:
            return name
        case _:
            return ""


_NAMES = re.compile(r"(odoo|psycopg2|werkzeug|builtins)(\.[A-Za-z0-9_]{1,40}){1,4}")


def judged(fault: Fault) -> Outcome:
    """What the name of an exception inside Odoo means; of an AccessError, as far as its name tells."""
    match word := fault.name.rpartition(".")[2]:
        case "UserError" | "ValidationError" | "RedirectWarning":
            return Refused(f"Odoo's rules forbid it: {word}")
        case "MissingError":
            return Refused("the record is gone: MissingError")
        case "IndexError":
            return Refused("Odoo cannot take a value: IndexError")
        case "AccessDenied" | "Unauthorized" | "SessionExpiredException":
            return Blocked("credentials: Odoo does not accept the user and its key")
        case "AccessError" | "Forbidden":
            return Blocked("configuration: rights: the user may not do this: AccessError")
        case "NotFound" | "AttributeError":
            return Blocked(f"configuration: Odoo has no such model or method: {word}")
        case "ValueError" | "KeyError":
            return Blocked(f"configuration: Odoo has no such field or value: {word}")
        case "UnprocessableEntity" | "TypeError" | "BadRequest":
            return Blocked(f"configuration: Odoo takes other arguments: {word}")
        case _ if _NAMES.fullmatch(fault.name):
            return Retry(f"Odoo failed: {word}")
        case _:
            return Retry("Odoo failed")
