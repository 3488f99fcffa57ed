"""A load generator in a process of its own: raw sockets, and requests that were made and signed before the clock runs.

    python -m benchmarks.load

It takes one order a line on standard input, posts, and answers with one line; both are JSON.  A closed loop: each
connection posts its next request when it has the answer to the last.
"""

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import uuid4

import msgspec

from tests.serving import order, sign


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """Post so many; `fresh`: new ones, else the bytes that were posted last."""

    port: int
    connections: int
    requests: int
    fresh: bool


class Posted(msgspec.Struct, frozen=True, kw_only=True):
    """All of them were answered by 202; seconds."""

    requests: int
    took: float
    median: float
    p99: float

    @property
    def per_second(self) -> float:
        return self.requests / self.took


class NotAccepted(Exception):  # noqa: N818 — an answer, not a mistake
    """Something else than 202 came back."""


@dataclass
class Generator:
    """The process, as whoever started it sees it."""

    process: "subprocess.Popen[bytes]"

    def post(self, port: int, *, connections: int, requests: int, fresh: bool) -> Posted:
        """Blocks: call it in a thread."""
        assert self.process.stdin
        assert self.process.stdout
        told = Order(port=port, connections=connections, requests=requests, fresh=fresh)
        self.process.stdin.write(msgspec.json.encode(told) + b"\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise NotAccepted("the load generator gave up; it said why above")
        return msgspec.json.decode(answer, type=Posted)


@contextmanager
def generator() -> Iterator[Generator]:
    command = [sys.executable, "-m", "benchmarks.load"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Generator(process)


# ── in the process ──────────────────────────────────────────────────────────────────────────────────


def obey() -> None:
    requests: list[bytes] = []
    for line in sys.stdin.buffer:
        told = msgspec.json.decode(line, type=Order)
        if told.fresh:
            requests = [request() for _ in range(told.requests)]
        print(msgspec.json.encode(post(told.port, told.connections, requests)).decode(), flush=True)


def request() -> bytes:
    """A new purchase order, signed, that the routes of the benchmark owe to one destination."""
    body = json.dumps(order(id=uuid4().int % 10**9 + 1)).encode()
    head = [f"{name}: {value}\r\n" for name, value in sign(body, id=os.urandom(12).hex()).items()]
    lines = ["POST /hooks/odoo HTTP/1.1\r\nHost: 127.0.0.1\r\n", *head, f"Content-Length: {len(body)}\r\n\r\n"]
    return "".join(lines).encode() + body


def post(port: int, connections: int, requests: Sequence[bytes]) -> Posted:
    opened = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
    waiting = select.epoll()
    by_number = {}
    for connection in opened:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        waiting.register(connection, select.EPOLLIN)
        by_number[connection.fileno()] = connection
    left, clock = iter(requests), time.perf_counter
    sent: dict[int, float] = {}
    took: list[float] = []
    usual = 0  # the length of the first whole answer, which most others will have, too
    began = clock()
    for number, connection in by_number.items():
        sent[number] = clock()
        connection.sendall(next(left))
    while len(took) < len(requests):
        for number, _ in waiting.poll():
            connection = by_number[number]
            answer = connection.recv(65536)
            if len(answer) != usual:
                answer = whole(answer, connection)
                usual = len(answer)
            if not answer.startswith(b"HTTP/1.1 202 "):
                raise NotAccepted(repr(answer[:300]))
            now = clock()
            took.append(now - sent[number])
            if following := next(left, None):
                sent[number] = now
                connection.sendall(following)
    elapsed = clock() - began
    waiting.close()
    for connection in opened:
        connection.close()
    took.sort()
    return Posted(requests=len(took), took=elapsed, median=took[len(took) // 2], p99=took[len(took) * 99 // 100])


def whole(answer: bytes, connection: socket.socket) -> bytes:
    """One answer to its end, by the length that its head tells."""
    while True:
        head, blank, body = answer.partition(b"\r\n\r\n")
        if blank and len(body) >= int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0):
            return answer
        more = connection.recv(65536)
        if not more:
            raise NotAccepted(f"cut off after {answer!r}")
        answer += more


if __name__ == "__main__":
    obey()
