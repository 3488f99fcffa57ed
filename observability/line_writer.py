"""Lines to a stream that may stand still: whoever reads our standard output must not be able to stop our work."""

import os
import select
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from io import UnsupportedOperation
from queue import Empty, SimpleQueue
from typing import TextIO

QUEUE = 10_000  # lines: some 3 MB
AT_ONCE = 1_000


class LineWriter:
    """A bounded queue and the thread that writes what is in it; what finds no place is dropped and counted.

    `dropped` counts them as they are lost; `missed` hears of them when there is room again to tell it.
    """

    def __init__(
        self, stream: TextIO, *, dropped: Callable[[int], object], missed: Callable[[int], object] = lambda _: None
    ) -> None:
        self._stream = stream
        self._dropped = dropped
        self._tell_missed = missed
        self._missed = 0
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="log writer", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        if self._queue.qsize() < QUEUE or threading.current_thread() is self._thread:  # which tells of what was dropped
            self._queue.put(line)
        else:
            self._missed += 1
            self._dropped(1)

    def close(self, within: timedelta) -> None:
        self._queue.put(None)
        self._thread.join(within.total_seconds())

    def _work(self) -> None:
        goes_on = True
        while goes_on:
            lines, goes_on = self._next()
            lost = 0 if self._put(lines) else len(lines)
            missed, self._missed = self._missed, 0
            if lost:
                self._dropped(lost)
            if lost or missed:
                self._tell_missed(lost + missed)

    def _next(self) -> tuple[list[str], bool]:
        """Wait for a line, and take what has come with it."""
        line = self._queue.get()
        lines: list[str] = []
        while line is not None:
            lines.append(line)
            if len(lines) == AT_ONCE:
                return lines, True
            try:
                line = self._queue.get_nowait()
            except Empty:
                return lines, True
        return lines, False

    def _put(self, lines: list[str]) -> bool:
        try:
            for piece in _pieces(lines):
                self._write_all(piece)
        except (OSError, ValueError):  # the reader is gone, or the stream is closed
            return False
        return True

    def _write_all(self, piece: bytes) -> None:
        """Past the stream's buffer, whose lock a blocked thread would keep until the interpreter aborts over it."""
        try:
            file = self._stream.fileno()
        except UnsupportedOperation:
            self._stream.write(piece.decode())
            return
        left = memoryview(piece)
        while left:
            try:
                left = left[os.write(file, left) :]
            except BlockingIOError:
                select.select([], [file], [], 1)


def _pieces(lines: Iterable[str]) -> Iterator[bytes]:
    """Lines together, as far as a pipe takes them undivided: several processes may write to the same one."""
    piece = b""
    for line in lines:
        encoded = f"{line}\n".encode(errors="backslashreplace")
        if piece and len(piece) + len(encoded) > select.PIPE_BUF:
            yield piece
            piece = b""
        piece += encoded
    if piece:
        yield piece
