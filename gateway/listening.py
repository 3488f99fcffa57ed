"""The HTTP server, with the deadlines that aiohttp does not set, and errors that repeat nothing.

aiohttp waits for a request's head without a limit, and answers a head that it cannot read with the offending line:
both are mended here, on internals of the pinned version, and tested against raw sockets.
"""

import asyncio
import os
import socket
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from aiohttp import web
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler

from gateway.config_sections import Listen
from gateway.problems import problem
from observability.logs import log_sparingly
from observability.names import LogEvent

HEAD_DEADLINE = timedelta(seconds=5)
ANSWER_DEADLINE = timedelta(seconds=10)  # for a caller to take some of what it was answered
IDLE_DEADLINE = timedelta(seconds=75)  # longer than the proxies in front keep theirs
LINGERING = timedelta(seconds=2)  # for what is still sent of a body that was refused, so that the answer is heard
PARTING = timedelta(seconds=1)  # for who keeps a connection to be told, with an answer, that it is the last one
DRAIN = timedelta(seconds=15)  # for the requests that are under way at the end: longer than any deadline of one
BACKLOG = 2048


class AddressError(Exception):
    """An address of `serve.listen` cannot be had; the message says why."""


class Guarded(RequestHandler):
    """A connection whose head must arrive, and whose answers must be taken, in time; it repeats nothing of what it hears."""

    __slots__ = ("_answer_timer", "_body", "_head_timer", "_last")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._body: StreamReader = EMPTY_PAYLOAD  # of the last head
        self._last = False  # the request under way is
        self._answer_timer: asyncio.TimerHandle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        heads, of_a_head = self._request_count, self._body.is_eof()
        super().data_received(data)
        if self._request_count > heads:
            self._stop_timer()
            self._body = self._messages[-1][1]
        elif data and of_a_head and self._head_timer is None:  # without any, aiohttp calls it itself
            self._start_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.transport is not None:
            self._answer_timer = self._loop.call_later(ANSWER_DEADLINE.total_seconds(), self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answer_timer is not None:
            self._answer_timer.cancel()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_timer()
        if self._answer_timer is not None:
            self._answer_timer.cancel()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._head_timer = self._loop.call_later(HEAD_DEADLINE.total_seconds(), self._give_up_on_head)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up_on_head(self) -> None:
        """A connection on which a request is still under way waits for its end."""
        self._head_timer = None
        if self.transport is None:
            return
        if self._waiter is not None and not self._waiter.done():
            self.transport.abort()
        else:
            self._start_timer()

    def close(self) -> None:
        """At the end of the program.  A body that is still coming in is heard first, which aiohttp would not do."""
        if self._current_request is None or self._body.is_eof():
            super().close()
        else:
            self._last = True

    async def shutdown(self, timeout: float | None = 15.0) -> None:  # noqa: ASYNC109 — as aiohttp has it
        if self._last and self._task_handler is not None:
            await asyncio.wait((self._task_handler,), timeout=timeout)
        await super().shutdown(timeout)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 — it repeats what was sent
    ) -> web.StreamResponse:
        """Answer what never became a request; or a defect, outside of what `problems_only` answers for."""
        if status < 500:
            log_sparingly(LogEvent.REQUEST_REFUSED, level="info", reason="not_http", status=status)
            answer = problem(status, "Unreadable request", "The request is not valid HTTP/1.1.")
        else:
            self.log_exception("a request failed", exc_info=exc)
            answer = problem(500, "Trouble of ours", "The request failed by a defect of ours, which was logged.")
        if request.writer.output_size > 0:
            raise ConnectionError
        answer.force_close()
        return answer

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer: not with a text of aiohttp's, which may repeat a header, nor with the versions of libraries."""
        if isinstance(resp, web.HTTPException):
            resp = problem(resp.status, resp.reason, "The request asks for what is not done here.")
        if self._last or (isinstance(self._manager, GuardedServer) and self._manager.parting):
            resp.force_close()
        resp.headers.setdefault("Server", "sluicegate")
        return await super().finish_response(request, resp, start_time)


class GuardedServer(web.Server):
    """Makes guarded connections."""

    parting = False  # every answer is the last one on its connection

    def __call__(self) -> RequestHandler:
        return Guarded(self, loop=self._loop, **self._kwargs)


class Listening:
    """The application on its addresses: on sockets of its own, or on those that the parent of several workers holds."""

    def __init__(self, application: web.Application) -> None:
        self._runner = _Runner(
            application,
            access_log=None,
            keepalive_timeout=IDLE_DEADLINE.total_seconds(),
            auto_decompress=False,
            lingering_time=LINGERING.total_seconds(),
            shutdown_timeout=DRAIN.total_seconds(),
        )

    async def open(self, addresses: Sequence[Listen], *, inherited: Sequence[int] = ()) -> None:
        """Takes requests when it returns; raises AddressError."""
        await self._runner.setup()
        for opened in map(adopted, inherited) if inherited else map(bound, addresses):
            site = _UnixSite if opened.family == socket.AF_UNIX else web.SockSite
            await site(self._runner, opened, backlog=BACKLOG).start()

    @property
    def port(self) -> int | None:
        """The first TCP port, also where the configuration left the choice of it to the system (port 0)."""
        return next((address[1] for address in self._runner.addresses if isinstance(address, tuple)), None)

    def part(self) -> None:
        """From now on each answer asks for another connection the next time, which may find somebody else here."""
        if isinstance(self._runner.server, GuardedServer):
            self._runner.server.parting = True

    async def close(self) -> None:
        """Stop listening, part from who keeps a connection, and let the requests that are under way end.

        To close a kept connection on which nothing is heard is to lose the request that is on its way there: its
        sender may not know whether to send it again.  So each is left open for a moment, to be told in an answer.
        """
        for site in list(self._runner.sites):
            await site.stop()
        self.part()
        until = time.monotonic() + PARTING.total_seconds()
        while self._runner.server and self._runner.server.connections and time.monotonic() < until:  # noqa: ASYNC110  aiohttp keeps no event of it
            await asyncio.sleep(0.02)
        await self._runner.cleanup()


class _Runner(web.AppRunner):
    """aiohttp's, but for the connections that it makes."""

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = GuardedServer
        return server


class _UnixSite(web.SockSite):
    """aiohttp's binds the path by itself, whoever listens there."""

    async def start(self) -> None:
        await web.BaseSite.start(self)
        assert self._runner.server is not None
        self._server = await asyncio.get_running_loop().create_unix_server(
            self._runner.server, sock=self._sock, backlog=self._backlog
        )


def adopted(number: int) -> socket.socket:
    """A socket that the parent holds, too: what waits there to be accepted is not lost with this process."""
    return socket.socket(fileno=os.dup(number))


def bound(address: Listen, *, share: bool = False) -> socket.socket:
    """A socket on this address, not listening yet; those that `share` it can have it together.  Raises AddressError."""
    try:
        if not address.path:
            return _bound_to_port(address, share=share)
        if share:
            raise AddressError(f"serve.listen: workers cannot share {address}; let them listen on a port, or use one")
        return _bound_to_path(address.path)
    except OSError as error:
        raise AddressError(f"serve.listen: {address} cannot be had: {error.strerror or error}") from error


def _bound_to_port(address: Listen, *, share: bool) -> socket.socket:
    """Of a host that is left out it is every address, where there is IPv6 of both kinds."""
    six = ":" in address.host or (not address.host and socket.has_dualstack_ipv6())
    family, every = (socket.AF_INET6, "::") if six else (socket.AF_INET, "0.0.0.0")  # noqa: S104
    infos: list[Any] = socket.getaddrinfo(address.host or every, address.port, family=family, type=socket.SOCK_STREAM)
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if six:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(bool(address.host)))
        opened.bind(infos[0][4])
    except OSError:
        opened.close()
        raise
    return opened


def _bound_to_path(path: str) -> socket.socket:
    """The socket that a program left behind is taken away; anything else that is there stays."""
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_left_behind(path):
            os.unlink(path)  # noqa: PTH108
        opened.bind(path)
    except OSError:
        opened.close()
        raise
    return opened


def _is_left_behind(path: str) -> bool:
    with suppress(FileNotFoundError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        if stat.S_ISSOCK(os.stat(path).st_mode):  # noqa: PTH116
            try:
                asking.connect(path)
            except ConnectionRefusedError:
                return True
    return False
