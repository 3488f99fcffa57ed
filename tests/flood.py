"""Posts at a rate whatever becomes of the ones before: each goes out when it is due, over an idle connection or a new one.

A process of its own: `python -m tests.flood`, one order a line on standard input; it and the answer are JSON.
"""

import asyncio
import socket
import sys
import time
from collections import Counter

import msgspec
import uvloop

PATIENCE = 60.0  # seconds for the last answers


class Posting(msgspec.Struct, frozen=True, kw_only=True):
    port: int
    rate: float  # a second
    requests: list[bytes]  # as they go over the wire


class Posted(msgspec.Struct, frozen=True, kw_only=True):
    offered: float  # a second: `rate`, unless this process could not keep up with it
    connections: int
    answers: dict[int, int]  # how many of each status; 0: none
    accepted: list[str]  # the bodies of all 2xx
    took: list[float]  # seconds from when a request was due until it was answered


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, flood: "Flood") -> None:
        self._flood = flood
        self._due: float | None = None
        self._answer = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport = transport

    def post(self, request: bytes, due: float) -> None:
        self._due, self._answer = due, b""
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, found, body = self._answer.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if self._due is not None and found and len(body) >= length:
            self._flood.answered(int(head[9:12]), body.decode(), self._due)
            self._due = None
            self._flood.idle.append(self)

    def connection_lost(self, _: Exception | None) -> None:
        if self in self._flood.idle:
            self._flood.idle.remove(self)
        if self._due is not None:
            self._flood.unanswered()

    def close(self) -> None:
        self._transport.abort()


class Flood:
    def __init__(self, told: Posting) -> None:
        self._told = told
        self._began = time.perf_counter()
        self._connections = 0
        self._answers: Counter[int] = Counter()
        self._accepted: list[str] = []
        self._took: list[float] = []
        self._connecting: set[asyncio.Task[None]] = set()
        self.idle: list[Connection] = []

    async def run(self) -> Posted:
        for number, request in enumerate(self._told.requests):
            due = self._began + number / self._told.rate
            if (early := due - time.perf_counter()) > 0 or number % 20 == 0:
                await asyncio.sleep(max(0.0, early))
            if self.idle:
                self.idle.pop().post(request, due)
            else:
                task = asyncio.create_task(self._connect(request, due))
                self._connecting.add(task)
                task.add_done_callback(self._connecting.discard)
        took = time.perf_counter() - self._began
        patient = time.perf_counter() + PATIENCE
        while self._answers.total() < len(self._told.requests) and time.perf_counter() < patient:
            await asyncio.sleep(0.01)
        self._answers[0] += len(self._told.requests) - self._answers.total()
        return Posted(
            offered=min(self._told.rate, len(self._told.requests) / took),
            connections=self._connections,
            answers=dict(+self._answers),
            accepted=self._accepted,
            took=self._took,
        )

    async def _connect(self, request: bytes, due: float) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(lambda: Connection(self), "127.0.0.1", self._told.port)
        except OSError:
            self.unanswered()
            return
        self._connections += 1
        connection.post(request, due)

    def answered(self, status: int, body: str, due: float) -> None:
        self._answers[status] += 1
        self._took.append(time.perf_counter() - due)
        if 200 <= status < 300:
            self._accepted.append(body)

    def unanswered(self) -> None:
        self._answers[0] += 1


async def post(told: Posting) -> Posted:
    flood = Flood(told)
    posted = await flood.run()
    for connection in flood.idle[:]:
        connection.close()
    return posted


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for line in sys.stdin.buffer:
            told = runner.run(post(msgspec.json.decode(line, type=Posting)))
            sys.stdout.buffer.write(msgspec.json.encode(told) + b"\n")
            sys.stdout.flush()
