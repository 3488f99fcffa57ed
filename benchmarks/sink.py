"""A partner that costs nothing: a process of its own that reads posts and answers 200, and tells at the end what came.

It is a bare protocol, so that neither side of a comparison waits for it.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


@dataclass
class Sink:
    port: int
    taken: list[str] = field(default_factory=list)  # the webhook-ids that came, once it has ended


@contextmanager
def sink() -> Iterator[Sink]:
    command = [sys.executable, "-m", "benchmarks.sink"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        running = Sink(int(process.stdout.readline()))
        try:
            yield running
        finally:
            process.stdin.close()
            running.taken = json.loads(process.stdout.read())


class Taking(asyncio.Protocol):
    """One connection."""

    def __init__(self, taken: list[str]) -> None:
        self._taken = taken
        self._got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one by behaviour only

    def data_received(self, data: bytes) -> None:
        self._got += data
        while (end := self._got.find(b"\r\n\r\n")) >= 0:
            head = self._got[:end].lower()
            length = int(_header(head, b"content-length") or 0)
            if len(self._got) < end + 4 + length:
                return
            self._got = self._got[end + 4 + length :]
            self._taken.append(_header(head, b"webhook-id").decode())
            self._transport.write(ANSWER)


def _header(head: bytes, name: bytes) -> bytes:
    return head.partition(b"\r\n" + name + b": ")[2].partition(b"\r\n")[0]


async def take_until_closed() -> None:
    taken: list[str] = []
    server = await asyncio.get_running_loop().create_server(lambda: Taking(taken), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()
    print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(take_until_closed())
