"""Those who post, in a process of their own: signed before the clock runs, and each answer's event is noted.

    python -m benchmarks.senders

At a `rate` it is an open loop: a request is due at its time, whatever became of the ones before, and how long it takes
counts from then, so that a system that stalls is not measured by the few that it let through.  Without a rate each
connection posts its next one when it has the answer to the last.
"""

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import msgspec

from benchmarks.load import NotAccepted, whole
from tests.serving import order, sign

numbers = count(time.time_ns() // 1_000_000)


class Posting(msgspec.Struct, frozen=True, kw_only=True):
    """So many; `rate` a second, None: as fast as they are answered."""

    port: int
    connections: int
    requests: int
    rate: float | None = None


class Accepted(msgspec.Struct, frozen=True, array_like=True):
    """One request that was answered by 202; seconds, on the clock that all processes of a machine share."""

    event: str
    due: float
    answered: float


@dataclass
class Senders:
    """The process, as whoever started it sees it."""

    process: "subprocess.Popen[bytes]"

    def post(self, port: int, requests: int, *, rate: float | None = None, connections: int = 64) -> list[Accepted]:
        """In the order of the answers.  Blocks: call it in a thread."""
        assert self.process.stdin
        assert self.process.stdout
        told = Posting(port=port, connections=connections, requests=requests, rate=rate)
        self.process.stdin.write(msgspec.json.encode(told) + b"\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise NotAccepted("the senders gave up; they said why above")
        return msgspec.json.decode(answer, type=list[Accepted])


@contextmanager
def senders() -> Iterator[Senders]:
    command = [sys.executable, "-m", "benchmarks.senders"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Senders(process)


# ── in the process ──────────────────────────────────────────────────────────────────────────────────


def obey() -> None:
    for line in sys.stdin.buffer:
        told = msgspec.json.decode(line, type=Posting)
        requests = [request() for _ in range(told.requests)]
        print(msgspec.json.encode(post(told, requests)).decode(), flush=True)


def request() -> bytes:
    """A purchase order that nobody has posted before, signed, which the routes of the benchmark owe to one destination."""
    body = json.dumps(order(id=next(numbers))).encode()
    head = [f"{name}: {value}\r\n" for name, value in sign(body, id=os.urandom(12).hex()).items()]
    lines = ["POST /hooks/odoo HTTP/1.1\r\nHost: 127.0.0.1\r\n", *head, f"Content-Length: {len(body)}\r\n\r\n"]
    return "".join(lines).encode() + body


def post(told: Posting, requests: Sequence[bytes]) -> list[Accepted]:
    """Over each connection in turn, for one that never posts is closed.  select and not epoll, which waits in whole milliseconds."""
    idle = deque(socket.create_connection(("127.0.0.1", told.port)) for _ in range(told.connections))
    for connection in idle:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    busy: dict[socket.socket, float] = {}
    accepted: list[Accepted] = []
    pause, sent = 1 / told.rate if told.rate else 0.0, 0
    began = now = time.monotonic()
    while len(accepted) < len(requests):
        while idle and sent < len(requests) and (due := began + sent * pause) <= now:
            connection = idle.popleft()
            connection.sendall(requests[sent])
            busy[connection] = due if told.rate else now
            sent += 1
            now = time.monotonic()
        wait = max(0.0, began + sent * pause - now) if idle and sent < len(requests) else None
        readable, _, _ = select.select(busy, (), (), wait)
        now = time.monotonic()
        for connection in readable:
            accepted.append(Accepted(event_of(connection), busy.pop(connection), now))
            idle.append(connection)
    for connection in idle:
        connection.close()
    return accepted


def event_of(connection: socket.socket) -> str:
    """What the answer calls it; nothing, where it is from a server that gives no names."""
    answer = whole(connection.recv(65536), connection)
    if not answer.startswith(b"HTTP/1.1 202 "):
        raise NotAccepted(repr(answer[:300]))
    _, _, named = answer.partition(b'"id":"')
    return named[:36].decode()


if __name__ == "__main__":
    obey()
