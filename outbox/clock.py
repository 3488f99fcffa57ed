"""The database's time, and the identities that are made from it.

Every gateway on one Postgres tells the same time, whatever its own clock says: the offset is measured on
connecting and now and then, and in between the monotonic clock carries it on.
"""

import os
import struct
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

from outbox.database import Database
from outbox.identity import uuid_of

QUESTIONS = 3  # the answer that came back fastest is the most exact


class DatabaseClock:
    """Now, as the database would say it."""

    def __init__(self) -> None:
        self._offset: float | None = None  # seconds from the monotonic clock to the database's epoch

    async def ask(self, database: Database) -> None:
        """Measure the offset; raises what the database raises."""
        best = float("inf")
        for _ in range(QUESTIONS):
            asked = time.monotonic()
            told: datetime = await database.fetchval("SELECT clock_timestamp()")
            took = time.monotonic() - asked
            if took < best:
                best, self._offset = took, told.timestamp() - asked - took / 2

    def seconds(self) -> float:
        """Since the epoch."""
        if self._offset is None:
            raise RuntimeError("the database has not been asked for the time")
        return time.monotonic() + self._offset

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.seconds(), UTC)

    @property
    def known(self) -> bool:
        return self._offset is not None

    @property
    def skew(self) -> timedelta:
        """How far this machine's clock is ahead of the database's: signatures are judged by this machine's."""
        return timedelta(seconds=time.time() - self.seconds())


class Identities:
    """UUIDs of version 7 (RFC 9562): 48 bits of milliseconds, 12 of a counter within one, 62 at random.

    They never go backwards within a process, even when the clock does.
    """

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._last = 0  # the first half: 48 bits of milliseconds, 4 of the version, 12 of the counter
        self._random: list[int] = []  # from the system, many at a time: asking costs more than all the rest

    def next(self) -> UUID:
        first = int(self._seconds() * 1000) << 16 | 0x7000
        if first <= self._last:
            first = self._last + 1
            if first & 0xFFF == 0:
                first += 0xF000  # the counter has run over, into the version: on into the milliseconds
        self._last = first
        if not self._random:
            self._random = [number >> 2 | 0b10 << 62 for number in struct.unpack("256Q", os.urandom(8 * 256))]
        return uuid_of(_HALVES.pack(first, self._random.pop()))


_HALVES = struct.Struct(">QQ")


def instant_of(event: UUID) -> datetime:
    """When an identity was made."""
    return datetime.fromtimestamp((event.int >> 80) / 1000, UTC)
