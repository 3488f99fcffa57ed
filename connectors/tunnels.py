"""Connections of aiohttp that are tunnels through a proxy.

aiohttp's own way through a proxy knows nothing of where one may go: here the egress judges each address and opens the tunnel,
and all that comes after is as without a proxy.  On internals of the pinned version, and tested against a real proxy.
"""

import asyncio
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import aiohttp
from aiohttp.abc import ResolveResult
from aiohttp.client_proto import ResponseHandler

from connectors.egress import Egress

SHARE = 0.8  # of a request's time, for the tunnel: so that it is the proxy that was too slow, and not its partner


class Tunnels(aiohttp.TCPConnector):
    def __init__(self, egress: Egress, seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self._egress = egress
        self._seconds = seconds * SHARE
        self._threads = ThreadPoolExecutor(min(self.limit, 8), thread_name_prefix="tunnel")

    async def _resolve_host(self, host: str, port: int, traces: Any = None) -> list[ResolveResult]:  # noqa: ARG002  aiohttp's
        """The egress looks it up; this is one for aiohttp to try."""
        return [ResolveResult(hostname=host, host="0.0.0.0", port=port, family=socket.AF_INET, proto=0, flags=0)]  # noqa: S104

    async def _wrap_create_connection(
        self,
        *args: Any,
        addr_infos: Any,  # noqa: ARG002  there are none
        req: aiohttp.ClientRequest,
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109  as aiohttp has it
        client_error: type[Exception] = aiohttp.ClientConnectorError,
        **options: Any,
    ) -> tuple[asyncio.Transport, ResponseHandler]:
        try:
            opened = await self._open(req.url.raw_host or "", req.port or 0)
        except OSError as error:
            raise client_error(req.connection_key, error) from error
        return await self._wrap_existing_connection(
            *args, req=req, timeout=timeout, client_error=client_error, sock=opened, **options
        )

    async def _open(self, host: str, port: int) -> socket.socket:
        opening = self._threads.submit(self._egress.connect, (host, port), self._seconds)
        try:
            opened = await asyncio.wrap_future(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close)
            raise
        opened.setblocking(False)  # noqa: FBT003  the standard library's
        return opened

    async def close(self, *args: Any, **options: Any) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        await super().close(*args, **options)


def _close(opening: "Future[socket.socket]") -> None:
    """Nobody waits for it any more."""
    with suppress(OSError):
        if not opening.cancelled():
            opening.result().close()
