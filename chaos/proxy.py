"""A TCP proxy on loopback that fails as networks do: delay, black hole, cut at a pattern, a limit of bytes, reset."""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(slots=True, kw_only=True)
class Weather:
    """How it is on the line, now; to be changed at any moment, also for what is connected already."""

    delay: float = 0.0  # seconds, each piece, both ways
    black_hole: bool = False  # nothing passes, and nobody is told
    refuses: bool = False  # new connections are closed at once
    cut_after: bytes | None = None  # sent by the client: it passes, and the server's answer to it does not
    cut_before: bytes | None = None  # sent by the client: it does not pass, and the line is cut
    limit: int | None = None  # bytes from the server in one connection, and then it is reset
    times: int | None = None  # so many cuts, and then the line is good again

    def like(self, **changes: Any) -> "Weather":
        return replace(self, **changes)


class Proxy:
    """Between a client and a server, which is reached by `connect`."""

    def __init__(self, connect: Callable[[], Awaitable[Streams]]) -> None:
        self._connect = connect
        self._server: asyncio.Server | None = None
        self._clear = asyncio.Event()
        self._clear.set()
        self._lines: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.weather = Weather()
        self.cuts = 0
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._clear.set()
        if self._server is not None:
            self._server.close()
        for line in self._lines:
            line.cancel()
        await asyncio.gather(*self._lines, return_exceptions=True)

    def becomes(self, weather: Weather) -> None:
        self.weather = weather
        if weather.black_hole:
            self._clear.clear()
        else:
            self._clear.set()

    def reset_all(self) -> None:
        """Every connection at once, as by a router that forgets."""
        for writer in list(self._writers):
            reset(writer)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = asyncio.current_task()
        assert line is not None
        self._lines.add(line)
        self._writers.add(writer)
        try:
            await self._clear.wait()
            if self.weather.refuses:
                return
            there, onward = await self._connect()
            deaf = asyncio.Event()  # the answer is on its way, and does not arrive
            try:
                ways = [
                    asyncio.create_task(self._outward(reader, onward, writer, deaf)),
                    asyncio.create_task(self._homeward(there, writer, deaf)),
                ]
                self._lines.update(ways)
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
                self._lines.difference_update(ways)
            finally:
                onward.close()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._lines.discard(line)
            self._writers.discard(writer)
            writer.close()

    async def _outward(
        self,
        reader: asyncio.StreamReader,
        onward: asyncio.StreamWriter,
        home: asyncio.StreamWriter,
        deaf: asyncio.Event,
    ) -> None:
        while piece := await self._piece(reader):
            weather = self.weather
            if weather.cut_before and weather.cut_before in piece and self._may_cut():
                reset(home)
                return
            if weather.cut_after and weather.cut_after in piece and self._may_cut():
                deaf.set()
                onward.write(piece)
                await onward.drain()
                await asyncio.sleep(0.3)  # the server does it, and its answer finds nobody
                reset(home)
                return
            onward.write(piece)
            await onward.drain()

    async def _homeward(self, there: asyncio.StreamReader, home: asyncio.StreamWriter, deaf: asyncio.Event) -> None:
        carried = 0
        while piece := await self._piece(there):
            if deaf.is_set():
                continue
            limit = self.weather.limit
            if limit is not None and carried + len(piece) > limit and self._may_cut():
                home.write(piece[: max(0, limit - carried)])
                with suppress(OSError):
                    await home.drain()
                reset(home)
                return
            carried += len(piece)
            home.write(piece)
            await home.drain()

    async def _piece(self, reader: asyncio.StreamReader) -> bytes:
        piece = await reader.read(65536)
        if self.weather.delay:
            await asyncio.sleep(self.weather.delay)
        await self._clear.wait()
        return piece

    def _may_cut(self) -> bool:
        if self.weather.times is not None:
            if self.weather.times <= 0:
                return False
            self.weather.times -= 1
        self.cuts += 1
        return True


def reset(writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN."""
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
