"""The partner: takes every post, answers 200, and notes what came and when.  A process of its own, and a bare protocol,
so that neither side of a comparison waits for it.

    python -m benchmarks.sink

It prints its port.  For each line on standard input it prints one of JSON: `count` how many have come, `take` all of
them since the last `take`, as (webhook-id, when), on the clock that all processes of a machine share.
"""

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import uvloop

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
NAME = re.compile(rb"\r\nwebhook-id: *([^\r]+)", re.IGNORECASE)


@dataclass
class Sink:
    """The process, as whoever started it sees it."""

    process: "subprocess.Popen[bytes]"
    port: int
    taken: list[str] = field(default_factory=list)  # the webhook-ids that nobody took until it ended

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def count(self) -> int:
        return msgspec.json.decode(self._ask("count"), type=int)

    def take(self) -> list[tuple[str, float]]:
        return msgspec.json.decode(self._ask("take"), type=list[tuple[str, float]])

    def await_count(self, expected: int, within: float = 60) -> None:
        """Looks seldom, for each look costs the sink a little."""
        until = time.monotonic() + within
        while (came := self.count()) < expected:
            if time.monotonic() > until:
                raise TimeoutError(f"{came} of {expected} came within {within:g} s")
            time.sleep(0.05)

    def _ask(self, what: str) -> bytes:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(what.encode() + b"\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()


@contextmanager
def sink() -> Iterator[Sink]:
    command = [sys.executable, "-m", "benchmarks.sink"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        running = Sink(process, int(process.stdout.readline()))
        try:
            yield running
        finally:
            running.taken = [name for name, _ in running.take()]


# ── in the process ──────────────────────────────────────────────────────────────────────────────────


class Taking(asyncio.Protocol):
    """Knows as much HTTP as it takes: it is not what is measured."""

    def __init__(self, came: list[tuple[str, float]]) -> None:
        self._came = came
        self._read = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # it is one
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._read += data
        while (end := self._read.find(b"\r\n\r\n")) >= 0:
            head = self._read[: end + 2]
            length = LENGTH.search(head)
            end += 4 + (int(length[1]) if length else 0)
            if len(self._read) < end:
                return
            self._read = self._read[end:]
            name = NAME.search(head)
            self._came.append((name[1].decode() if name else "", time.monotonic()))
            self._transport.write(ANSWER)


async def serve() -> None:
    came: list[tuple[str, float]] = []
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Taking(came), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        told: object = len(came)
        if line == "take\n":
            told = came.copy()
            came.clear()
        print(msgspec.json.encode(told).decode(), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as here:
        here.run(serve())
