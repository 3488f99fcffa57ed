"""The HTTP server, with the deadlines that aiohttp does not set, and errors that repeat nothing.

aiohttp waits for a request's head without a limit, and answers a head that it cannot read with the offending line:
both are mended here, on internals of the pinned version, and tested against raw sockets.
"""

import asyncio
import os
import re
import socket
import stat
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from aiohttp import HttpVersion11, StreamReader, web
from aiohttp.helpers import HeadersMixin, rfc822_formatted_time
from aiohttp.http import RawRequestMessage
from aiohttp.http_writer import StreamWriter
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_response import REASON_PHRASES
from multidict import CIMultiDictProxy

from gateway.admission import Admission
from gateway.config_sections import Listen
from gateway.problems import answered, problem
from observability.logs import log_sparingly
from observability.names import LogEvent

HEAD_DEADLINE = timedelta(seconds=5)
ANSWER_DEADLINE = timedelta(seconds=10)  # for a caller to take some of what it was answered
IDLE_DEADLINE = timedelta(seconds=75)  # longer than the proxies in front keep theirs
REFUSED_IDLE = timedelta(seconds=5)  # whoever is refused keeps a connection no longer than it takes to try again
LINGERING = timedelta(seconds=2)  # for what is still sent of a body that was refused, so that the answer is heard
PARTING = timedelta(seconds=1)  # for who keeps a connection to be told, with an answer, that it is the last one
DRAIN = timedelta(seconds=15)  # for the requests that are under way at the end: longer than any deadline of one
BACKLOG = 2048


class AddressError(Exception):
    """An address of `serve.listen` cannot be had; the message says why."""


class Guarded(RequestHandler):
    """A connection whose head must arrive, and whose answers must be taken, in time; it repeats nothing of what it hears."""

    __slots__ = (
        "_admission",
        "_admitted",
        "_answer_timer",
        "_body",
        "_head_timer",
        "_hooks",
        "_last",
        "_refused_at",
        "_refused_timer",
    )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._body: StreamReader = EMPTY_PAYLOAD  # of the last head
        self._hooks = self._manager.hooks if isinstance(self._manager, GuardedServer) else None
        self._last = False  # the request under way is
        self._answer_timer: asyncio.TimerHandle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._refused_at: float | None = None  # the last answer was no yes
        self._refused_timer: asyncio.TimerHandle | None = None
        self._admission = self._manager.admission if isinstance(self._manager, GuardedServer) else None
        self._admitted = None if self._admission is None else self._admission.enter(self._address)
        self._start_timer()
        if self._admission is not None and self._admitted is None and self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        heads, of_a_head = self._request_count, self._body.is_eof()
        super().data_received(data)
        if self._request_count > heads:
            self._stop_timer()
            self._body = self._messages[-1][1]
        elif data and of_a_head and self._head_timer is None:  # without any, aiohttp calls it itself
            self._start_timer()

    async def start(self) -> None:
        """The loop of aiohttp, with no task for each request, for as long as what comes are posts that are there as a whole.

        The first request that is anything else hands the connection over to aiohttp's own.
        """
        while not self._force_close:
            if not self._messages:
                try:
                    self._waiter = self._loop.create_future()
                    await self._waiter
                finally:
                    self._waiter = None
            post = self._post()
            if post is None:
                await super().start()
                return
            another = await self._take(post)
            post = None  # while it waits for the next, a connection holds nothing of the last
            if not another:
                break
        if not self._force_close and self.transport is not None:
            self._task_handler = None
            self.transport.close()

    def _post(self) -> "Post | None":
        """The next request, if it is a post to the hooks that needs no more reading."""
        message, payload = self._messages[0]
        if not isinstance(message, RawRequestMessage) or message.method != "POST" or not payload.is_eof():
            return None
        path = _HOOKS.fullmatch(message.path)
        if path is None or "Expect" in message.headers or self._upgraded or self._hooks is None:
            return None
        self._messages.popleft()
        if self._parser is not None:
            self._parser.message_consumed()
        if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
            self._resume_reading_if_drained()
        return Post(message, self._whole(payload), self, path[1], path[2])

    def _whole(self, payload: StreamReader) -> bytes:
        """The body that is there.  To read it by the book is to ask the parser and the socket for more, each time."""
        buffer: deque[bytes] = getattr(payload, "_buffer", _NONE)  # the empty payload has none
        return buffer.popleft() if len(buffer) == 1 and not self._reading_paused else payload.read_nowait()

    async def _take(self, post: "Post") -> bool:
        """Answer it; whether another may follow on this connection."""
        if self._manager is None or self._hooks is None:
            return False  # the caller has gone
        self._manager.requests_count += 1
        self._request_in_progress = True
        try:
            answer = await answered(self._hooks(post, post.source, post.token))
            gone = await self._answer(post, answer)
        except asyncio.CancelledError:
            self.force_close()
            raise
        except ConnectionError:
            return False
        except Exception as error:  # noqa: BLE001 — a defect costs this caller the connection, and no other
            self.log_exception("a request failed", exc_info=error)
            self.force_close()
            return False
        finally:
            self._request_in_progress = False
            if self._handler_waiter is not None:
                self._handler_waiter.set_result(None)
        if gone or not self._keepalive or self._close:
            return False
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._keepalive_handle is None and not self._force_close:
            self._keepalive_handle = self._loop.call_at(self._next_keepalive_close_time, self._process_keepalive)
        return True

    async def _answer(self, post: "Post", answer: web.StreamResponse) -> bool:
        """Whether the caller has gone meanwhile."""
        self._note(answer.status)
        if isinstance(answer, Brief | web.Response) and post.message.version == HttpVersion11:
            self._keepalive = not (post.message.should_close or self._ends or answer.keep_alive is False)
            return await self._write(in_one_piece(answer, keep_alive=self._keepalive))
        if self._request_factory is None:
            return True
        writer = StreamWriter(self, self._loop)
        task = self._task_handler or asyncio.current_task()
        request = self._request_factory(post.message, EMPTY_PAYLOAD, self, writer, task)  # type: ignore[arg-type]
        answer, gone = await self.finish_response(request, answer, None)
        self._keepalive = bool(answer.keep_alive)
        return gone

    def _note(self, status: int) -> None:
        """Whoever is refused and then says nothing is soon parted from: strangers must not hold connections for nothing."""
        self._refused_at = self._loop.time() if status >= 400 else None
        if self._refused_at is not None and self._refused_timer is None:
            self._refused_timer = self._loop.call_later(REFUSED_IDLE.total_seconds(), self._part_from_refused)

    def _part_from_refused(self) -> None:
        self._refused_timer = None
        if self._refused_at is None or self.transport is None:
            return
        left = self._refused_at + REFUSED_IDLE.total_seconds() - self._loop.time()
        if left <= 0 and self._waiter is not None and not self._waiter.done():
            self.force_close()
        else:  # refused again meanwhile, or busy with the next request
            self._refused_timer = self._loop.call_later(max(left, 1.0), self._part_from_refused)

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
        for timer in (self._answer_timer, self._refused_timer):
            if timer is not None:
                timer.cancel()
        if self._admission is not None and self._admitted is not None:
            self._admission.leave(self._admitted)
        super().connection_lost(exc)

    @property
    def _address(self) -> str | None:
        """Of the peer; None on a Unix socket."""
        return str(self.peername[0]) if isinstance(self.peername, tuple) else None

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
        if isinstance(resp, Brief):
            resp = resp.in_full()
        if isinstance(resp, web.HTTPException):
            resp = problem(resp.status, resp.reason, "The request asks for what is not done here.")
        if self._ends:
            resp.force_close()
        resp.headers.setdefault("Server", "sluicegate")
        self._note(resp.status)
        answered = await super().finish_response(request, resp, start_time)
        if request.content.is_eof() and request.content.exception() is None:
            request.content.read_nowait()  # nobody has asked for it, and it would stay until the next request
        return answered

    @property
    def _ends(self) -> bool:
        """Whether the connection does, with the answer that is under way."""
        return self._last or (isinstance(self._manager, GuardedServer) and self._manager.parting)

    async def _write(self, answer: bytes) -> bool:
        """In one piece; whether the caller has gone."""
        if self.transport is None or self.transport.is_closing():
            return True
        self.transport.write(answer)
        if self._paused:
            try:
                await self._drain_helper()
            except ConnectionError:
                return True
        return False


class Post(HeadersMixin):
    """A post to /hooks/{source} that is there as a whole: of a request, what the door needs, and no more."""

    def __init__(
        self, message: RawRequestMessage, whole: bytes, connection: Guarded, source: str, token: str | None
    ) -> None:
        self.message = message
        self.headers: CIMultiDictProxy[str] = message.headers
        self._headers = message.headers  # where aiohttp looks for them
        self._whole = whole
        self.source = source
        self.token = token
        self._connection = connection

    def give_body(self) -> bytes:
        """Once: who waits for an answer keeps no body."""
        whole, self._whole = self._whole, b""
        return whole

    @property
    def raw_path(self) -> str:
        """The target, as aiohttp calls it."""
        return self.message.path

    @property
    def transport(self) -> asyncio.Transport | None:
        return self._connection.transport

    @property
    def remote(self) -> str | None:
        """The address of the peer; None on a Unix socket."""
        return self._connection._address  # noqa: SLF001  the other half of this


def on_unix_socket(request: "Incoming") -> bool:
    """By the socket itself: that a peer has no address says only that it could not be asked for one."""
    transport = request.transport
    opened = None if transport is None else transport.get_extra_info("socket")
    return opened is not None and opened.family == socket.AF_UNIX


class Brief(web.StreamResponse):
    """A small answer of JSON that is written as it stands.

    What aiohttp does for an answer of any kind costs more than all that is done to accept a post.
    """

    def __init__(self, status: int, text: str) -> None:
        self._status = status
        self.text = text

    @property
    def keep_alive(self) -> bool | None:
        """As the caller wants it."""
        return None

    def in_full(self) -> web.Response:
        """The same for a caller who does not simply speak HTTP/1.1."""
        return web.Response(status=self._status, body=self.text.encode("ascii"), content_type="application/json")


def in_one_piece(answer: Brief | web.Response, *, keep_alive: bool) -> bytes:
    """Head and body in HTTP/1.1."""
    if isinstance(answer, Brief):
        fields, body = "Content-Type: application/json\r\n", answer.text.encode("ascii")
    else:
        fields = "".join([f"{name}: {value}\r\n" for name, value in answer.headers.items()])
        body = answer.body if isinstance(answer.body, bytes) else b""
    head = (
        f"HTTP/1.1 {answer.status} {REASON_PHRASES[answer.status]}\r\n{fields}Content-Length: {len(body)}\r\n"
        f"Date: {rfc822_formatted_time()}\r\nServer: sluicegate\r\n{'' if keep_alive else _CLOSE}\r\n"
    )
    return head.encode("ascii") + body


_NONE: deque[bytes] = deque()
_CLOSE = "Connection: close\r\n"


class GuardedServer(web.Server):
    """Makes guarded connections."""

    parting = False  # every answer is the last one on its connection
    hooks: "Hooks | None" = None
    admission: Admission | None = None  # without one, whoever comes is let in

    def __call__(self) -> RequestHandler:
        return Guarded(self, loop=self._loop, **self._kwargs)


class Listening:
    """The application on its addresses: on sockets of its own, or on those that the parent of several workers holds."""

    def __init__(
        self, application: web.Application, *, hooks: "Hooks | None" = None, admission: Admission | None = None
    ) -> None:
        """`hooks` takes what is posted to /hooks/{source}, past the application; the rest of it goes there."""
        self._runner = _Runner(
            application,
            hooks,
            admission,
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


Incoming = Post | web.Request
Hooks = Callable[[Incoming, str, str | None], Awaitable[web.StreamResponse]]  # source, and token where there is one


class _Runner(web.AppRunner):
    """aiohttp's, but for the connections that it makes, and for a shorter way to the door."""

    def __init__(
        self, application: web.Application, hooks: Hooks | None, admission: Admission | None, **options: Any
    ) -> None:
        super().__init__(application, **options)
        self._admission = admission
        self._hooks = hooks

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = GuardedServer
        server.admission = self._admission  # type: ignore[attr-defined]
        if self._hooks is not None and isinstance(server, GuardedServer):
            server.hooks = self._hooks
            server.request_handler = _shortcut(self._hooks, past=server.request_handler)
        return server


def _shortcut(hooks: Hooks, *, past: Any) -> Any:
    """Past the router and the middlewares, for a post whose path and head are plain; any other goes the long way."""

    async def handle(request: web.Request) -> web.StreamResponse:
        if (
            request.method == "POST"
            and (path := _HOOKS.fullmatch(request.raw_path))
            and "Expect" not in request.headers
        ):
            return await answered(hooks(request, path[1], path[2]), request)
        answer: web.StreamResponse = await past(request)
        return answer

    return handle


_HOOKS = re.compile(r"/hooks/([A-Za-z0-9_.-]+)(?:/([A-Za-z0-9_~.-]+))?")  # nothing in it is encoded


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
