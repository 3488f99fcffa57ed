"""The HTTP server, with the deadlines that aiohttp does not set, and errors that repeat nothing.

aiohttp waits for a request's head without a limit, and answers a head that it cannot read with the offending line:
both are mended here, on internals of the pinned version, and tested against raw sockets.
"""

import asyncio
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from gateway.config_sections import Listen

HEAD_DEADLINE = timedelta(seconds=5)
IDLE_DEADLINE = timedelta(seconds=75)  # longer than the proxies in front keep theirs
UNREADABLE = msgspec.json.encode(
    {
        "type": "about:blank",
        "title": "Unreadable request",
        "status": 400,
        "detail": "The request is not valid HTTP/1.1.",
    }
)


class Guarded(RequestHandler):
    """A connection whose head must arrive in time, and which tells no caller what it could not read."""

    __slots__ = ("_head_timer",)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = self._loop.call_later(
            HEAD_DEADLINE.total_seconds(), self._give_up_on_head
        )

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._messages or self._current_request is not None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None:  # the first bytes of a further request on a kept connection
            self._head_timer = self._loop.call_later(HEAD_DEADLINE.total_seconds(), self._give_up_on_head)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().connection_lost(exc)

    def _give_up_on_head(self) -> None:
        self._head_timer = None
        if self.transport is not None and self._current_request is None and not self._messages:
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 — it repeats what was sent
    ) -> web.StreamResponse:
        """Answers for what never became a request, or for a defect of the server's."""
        if status >= 500:
            return super().handle_error(request, status, exc, None)
        if request.writer.output_size > 0:
            raise ConnectionError
        answer = web.Response(status=status, body=UNREADABLE, content_type="application/problem+json")
        answer.force_close()
        return answer


class GuardedServer(web.Server):
    """Makes guarded connections."""

    def __call__(self) -> RequestHandler:
        return Guarded(self, loop=self._loop, **self._kwargs)


class Listening:
    """The application on its addresses; workers share a port, each with a socket of its own."""

    def __init__(self, application: web.Application) -> None:
        self._runner = _Runner(
            application,
            access_log=None,
            keepalive_timeout=IDLE_DEADLINE.total_seconds(),
            auto_decompress=False,
            lingering_time=2.0,
        )

    async def open(self, addresses: Sequence[Listen], *, share: bool) -> None:
        """Takes requests when it returns; raises OSError where an address cannot be had."""
        await self._runner.setup()
        for address in addresses:
            if address.path:
                with suppress(FileNotFoundError):
                    os.unlink(address.path)  # noqa: PTH108  a local socket: nothing to wait for
                await web.UnixSite(self._runner, address.path).start()
            else:
                await web.SockSite(self._runner, _bound(address, share=share), backlog=2048).start()

    @property
    def port(self) -> int | None:
        """The first TCP port, also where the configuration left the choice of it to the system (port 0)."""
        return next((address[1] for address in self._runner.addresses if isinstance(address, tuple)), None)

    async def close(self) -> None:
        """Stop listening, and let the requests that are under way end."""
        await self._runner.cleanup()


class _Runner(web.AppRunner):
    """aiohttp's, but for the connections that it makes."""

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = GuardedServer
        return server


def _bound(address: Listen, *, share: bool) -> socket.socket:
    host = address.host or "::"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    infos: list[Any] = socket.getaddrinfo(
        host, address.port, family=family if address.host else 0, type=socket.SOCK_STREAM
    )
    bound = socket.socket(infos[0][0], socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if not address.host and infos[0][0] == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind(infos[0][4])
    except OSError as error:
        bound.close()
        raise OSError(error.errno, f"serve.listen: {address} cannot be had: {error.strerror}") from error
    return bound
