"""A lane as its owner sees it: how far it was read, what was read and is not settled, and which subjects are closed."""

from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

from outbox.store import Lane, Reading, Taken

BUFFER = 256  # deliveries read and not started, a lane
BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
LOWEST = UUID(int=0)
MOMENT = timedelta(microseconds=1)


class OwnedLane:
    """In order, a key is closed while one of its deliveries is in flight or not due again yet.

    Reads go past closed keys; what they passed stands behind the watermark, so a key that opens is looked for
    by itself (`to_open`), before any of its deliveries can be read in the ordinary way.
    """

    def __init__(self, lane: Lane, *, careful: int) -> None:
        self.lane = lane
        self.careful = careful if lane.vanished else 0  # this many, one at a time, each with a marker first
        self.leaving = False
        self.in_flight = 0
        self.buffer: deque[Taken] = deque()
        self.known: dict[UUID, Taken] = {}  # read and not settled: in the buffer, in flight, or being settled
        self.closed: dict[int, datetime | None] = {}  # None: in flight
        self.to_open: set[int] = set()
        self.dirty = True  # there may be more to read
        self._due_at = BEGINNING
        self._event = LOWEST
        self._again = 0  # rows behind which it was rewound: they come once more
        self._meanwhile: datetime | None = None  # rewound to this while a read was under way
        self._settled: set[UUID] = set()  # while a read was under way: it may have begun before they were

    # ── reading ──────────────────────────────────────────────────────────────────────────────────

    def reading(self) -> Reading | None:
        """What to read now; None while there is enough in the buffer.  One read at a time, and then `take`."""
        if not self.wants_reading:
            return None
        self._settled.clear()
        self._meanwhile = None
        return Reading(lane=self.lane.number, due_at=self._due_at, event=self._event, room=self._room + self._again)

    @property
    def wants_reading(self) -> bool:
        return self.dirty and not self.leaving and self._room >= (self._most + 1) // 2

    @property
    def _most(self) -> int:
        return min(BUFFER, self.careful) if self.careful else BUFFER

    @property
    def _room(self) -> int:
        return self._most - len(self.buffer)

    def rewind(self, to: datetime) -> None:
        """Something due since then may have been committed after a read had passed it."""
        self.dirty = True
        self._meanwhile = min(to, self._meanwhile or to)
        if to - MOMENT < self._due_at:
            self._due_at, self._event, self._again = to - MOMENT, LOWEST, len(self.known)

    def take(self, reading: Reading, rows: Sequence[Taken], now: datetime) -> None:
        """The rows of one reading, in the order of the queue."""
        meanwhile = self._meanwhile
        self._again = 0
        if rows:
            self._due_at, self._event = rows[-1].due_at, rows[-1].event_id
        else:
            self._due_at, self._event = reading.due_at, reading.event
        for row in rows:
            if row.event_id not in self._settled:
                self._add(row, now)
        self.dirty = len(rows) >= reading.room
        if meanwhile is not None:
            self.rewind(meanwhile)
        elif not self.known:
            self.careful = 0  # what the owner before can have had in flight is done

    def opened(self, key: int, row: Taken | None, now: datetime) -> None:
        """The first in the queue of a key that was closed; None: it has no more."""
        del self.closed[key]
        if row is not None:
            self._add(row, now)

    def _add(self, row: Taken, now: datetime) -> None:
        if row.event_id in self.known:
            return
        if row.key is not None:
            if row.key in self.closed:
                return
            if row.not_before is not None and row.not_before > now:
                self.closed[row.key] = row.not_before
                return
            self.closed[row.key] = None
        self.known[row.event_id] = row
        self.buffer.append(row)

    def due_again(self, now: datetime) -> None:
        """Keys whose wait is over are looked for."""
        self.to_open |= {key for key, until in self.closed.items() if until is not None and until <= now}

    # ── settling ─────────────────────────────────────────────────────────────────────────────────

    def settled(self, row: Taken, again: datetime | None) -> None:
        """It is delivered or dead, or is due `again`."""
        self._settled.add(row.event_id)
        self.known.pop(row.event_id, None)
        if self.careful:
            self.careful -= 1
            self.dirty = True
        if row.key is not None:
            if again is None:
                self.to_open.add(row.key)
            else:
                self.closed[row.key] = again
        elif again is not None:
            self.rewind(again)

    def forget(self, row: Taken) -> None:
        """It was not tried, or stands no longer where it was read: whatever it is now, a later read tells."""
        self.known.pop(row.event_id, None)
        if row.key is not None and self.closed.get(row.key, BEGINNING) is None:
            self.to_open.add(row.key)
        self.rewind(row.due_at)

    def empty(self) -> None:
        """What was read and not started is let go: the destination is held, or the lane is given back."""
        while self.buffer:
            self.forget(self.buffer.pop())

    @property
    def idle(self) -> bool:
        return not self.known
