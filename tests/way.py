"""What can lie between the program and its Postgres: a name that leads elsewhere, a link that falls silent, poolers."""

import asyncio
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

SSL, CANCEL = 80877103, 80877102
Lending = Literal["transaction", "session", "forgetful"]
W = TypeVar("W", bound="Way")


class Way(ABC):
    """A port on loopback, served by a thread of its own."""

    def __init__(self) -> None:
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._came, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _came(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._open.add(writer)
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                await self._serve(reader, writer)
        finally:
            self._tasks.discard(task)
            self._open.discard(writer)
            writer.close()

    async def _message(self, reader: asyncio.StreamReader) -> bytes:
        head = await reader.readexactly(5)
        return head + await reader.readexactly(struct.unpack("!i", head[1:])[0] - 4)

    @abstractmethod
    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None: ...

    async def _end(self) -> None:
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)


@contextmanager
def opened(way: W) -> Iterator[W]:
    thread = threading.Thread(target=way._loop.run_forever, daemon=True)
    thread.start()
    way._do(way._listen())
    try:
        yield way
    finally:
        way._do(way._end())
        way._loop.call_soon_threadsafe(way._loop.stop)
        thread.join()
        way._loop.close()


class Switch(Way):
    """Leads to one server or another, as a name does; or swallows what it is told, as a machine that is gone."""

    def __init__(self, to: int | Path) -> None:
        super().__init__()
        self._to = to
        self._speaking = asyncio.Event()
        self._speaking.set()

    def lead_to(self, port: int) -> None:
        """Who comes from now on; who is there stays where it is."""
        self._to = port

    def cut(self) -> None:
        self._do(self._cut())

    def fall_silent(self) -> None:
        """What is under way stays so, and who comes is not answered."""
        self._loop.call_soon_threadsafe(self._speaking.clear)

    def speak(self) -> None:
        self._loop.call_soon_threadsafe(self._speaking.set)

    async def _cut(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._speaking.wait()
        if isinstance(self._to, Path):
            inner, outer = await asyncio.open_unix_connection(str(self._to))
        else:
            inner, outer = await asyncio.open_connection("127.0.0.1", self._to)
        ways = [asyncio.create_task(self._pass(reader, outer)), asyncio.create_task(self._answer(inner, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            outer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while said := await reader.read(65536):
                await self._speaking.wait()
                writer.write(said)
                await writer.drain()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._pass(reader, writer)


class Deaf(Switch):
    """Every statement is answered; notifications do not arrive, from when on it is told so."""

    notifies = True

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while message := await self._message(reader):
            if self.notifies or message[:1] != b"A":
                writer.write(message)
                await writer.drain()


class Holding(Switch):
    """As some poolers do: a session that the server ends is the error of a statement, and the client's connection stays."""

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while message := await self._message(reader):
            writer.write(message)
            if message[:1] == b"E" and b"\0C57P01\0" in message:
                writer.write(b"Z" + struct.pack("!i", 5) + b"I")
                await asyncio.Event().wait()
            await writer.drain()


class Pooler(Way):
    """As poolers do: a connection to Postgres is lent for a transaction, or for a session.

    A forgetful one lends it for a session and forgets prepared statements after each transaction.  It knows no more
    startup parameters than pgbouncer does.
    """

    KNOWN = (b"user", b"database", b"application_name", b"timezone", b"client_encoding", b"datestyle")

    def __init__(self, socket: Path, lending: Lending) -> None:
        super().__init__()
        self._postgres = socket
        self._lending = lending
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def _end(self) -> None:
        await super()._end()
        for _, server in self._idle:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (start := await self._start_of(reader))[0] == SSL:
            writer.write(b"N")
        if start[0] == CANCEL:
            return
        words = start[1].split(b"\0")
        for name in words[::2]:
            if name and name.lower() not in self.KNOWN:
                told = b"SFATAL\0VFATAL\0C08P01\0Munsupported startup parameter: " + name + b"\0\0"
                writer.write(b"E" + struct.pack("!i", len(told) + 4) + told)
                await writer.drain()
                return
        server = await asyncio.open_unix_connection(str(self._postgres))
        server[1].write(struct.pack("!ii", len(start[1]) + 8, start[0]) + start[1])
        while (message := await self._message(server[0]))[:1] != b"Z":
            writer.write(message)
        writer.write(message)
        if self._lending == "transaction":
            self._idle.append(server)
            await self._lend(reader, writer)
            return
        try:
            while True:
                await self._transaction(reader, writer, server)
                if self._lending == "forgetful":
                    await self._forget(server)
        finally:
            server[1].close()

    async def _lend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            first = await self._message(reader)
            if first[:1] == b"X":
                return
            server = self._idle.pop(0)
            await self._transaction(reader, writer, server, first)
            self._idle.append(server)

    async def _transaction(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        first: bytes = b"",
    ) -> None:
        """Until the server says that it is in none."""
        states: asyncio.Queue[bytes] = asyncio.Queue()
        answering = asyncio.create_task(self._answer(server[0], writer, states))
        try:
            said = first or await self._message(reader)
            while said[:1] != b"X":
                server[1].write(said)
                if said[:1] in {b"S", b"Q"} and await states.get() == b"I":
                    return
                said = await self._message(reader)
            raise ConnectionResetError
        finally:
            answering.cancel()

    async def _answer(
        self, server: asyncio.StreamReader, writer: asyncio.StreamWriter, states: "asyncio.Queue[bytes]"
    ) -> None:
        state = b""
        while state != b"I":
            message = await self._message(server)
            writer.write(message)
            await writer.drain()
            if message[:1] == b"Z":
                state = message[-1:]
                states.put_nowait(state)

    async def _forget(self, server: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        server[1].write(b"Q" + struct.pack("!i", 19) + b"DEALLOCATE ALL\0")
        while (await self._message(server[0]))[:1] != b"Z":
            pass

    async def _start_of(self, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        length, code = struct.unpack("!ii", await reader.readexactly(8))
        return code, await reader.readexactly(length - 8)
