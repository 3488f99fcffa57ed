"""HTTP as it goes over the wire: every byte of a request is the test's, and every byte of an answer is read."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from tests.program import signed

Fields = Mapping[str, str] | Sequence[tuple[str, str]]


def post(
    body: bytes,
    headers: Fields | None = None,
    path: str = "/hooks/shop",
    *,
    method: str = "POST",
    length: int | None = None,
) -> bytes:
    """A request; signed for `shop` unless it has headers of its own, with the length that it has unless it says another."""
    given = signed(body) if headers is None else headers
    fields = list(given.items()) if isinstance(given, Mapping) else list(given)
    if not {name.lower() for name, _ in fields} & {"content-length", "transfer-encoding"}:
        fields.append(("content-length", str(len(body) if length is None else length)))
    lines = [f"{method} {path} HTTP/1.1", "host: sluicegate", *(f"{name}: {value}" for name, value in fields)]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body


def chunked(*chunks: bytes, headers: Mapping[str, str] | None = None, end: bytes = b"0\r\n\r\n") -> bytes:
    sent = b"".join(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n" for chunk in chunks) + end
    return post(sent, {**(headers or signed(b"".join(chunks))), "transfer-encoding": "chunked"})


@dataclass(frozen=True)
class Heard:
    status: int
    headers: dict[str, str]
    body: bytes
    raw: bytes

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)


class Line:
    """A connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, *pieces: bytes, every: float = 0) -> None:
        for piece in pieces:
            self._writer.write(piece)
            await self._writer.drain()
            if every:
                await asyncio.sleep(every)

    @asynccontextmanager
    async def sending(self, *pieces: bytes, every: float) -> AsyncIterator[None]:
        """Meanwhile, for as long as the other side lets us."""
        sending = asyncio.create_task(self.send(*pieces, every=every))
        try:
            yield
        finally:
            sending.cancel()
            with suppress(asyncio.CancelledError, ConnectionError):
                await sending

    async def answer(self, within: float = 5, *, bodiless: bool = False) -> Heard:
        async with asyncio.timeout(within):
            head = await self._reader.readuntil(b"\r\n\r\n")
            line, *fields = head.decode("latin-1").rstrip().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
            length = 0 if bodiless else int(headers.get("content-length", 0))
            body = await self._reader.readexactly(length)
        return Heard(int(line.split()[1]), headers, body, head + body)

    async def ask(self, request: bytes) -> Heard:
        await self.send(request)
        return await self.answer()

    async def closed(self, within: float) -> float:
        """Seconds until the other side has closed it without a word."""
        began = time.monotonic()
        async with asyncio.timeout(within):
            with suppress(ConnectionError):
                assert await self._reader.read(1) == b""
        return time.monotonic() - began


@asynccontextmanager
async def connected(port: int, *, source: str | None = None) -> AsyncIterator[Line]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0) if source else None)
    try:
        yield Line(reader, writer)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def asked(port: int, request: bytes) -> Heard:
    async with connected(port) as line:
        return await line.ask(request)
