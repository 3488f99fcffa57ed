"""A lane as its owner sees it: how far it was read, what was read and is not settled, and which subjects are closed."""

import heapq
from collections import deque
from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from uuid import UUID

from outbox.store import Lane, Reading, Taken

BUFFER = 256  # deliveries read and not started, a destination
LEAST = 16  # and at the least a lane
WORTH_TELLING = 1000  # closed keys a read; of the others it returns rows, for nothing
BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
LOWEST = UUID(int=0)
MOMENT = timedelta(microseconds=1)


class OwnedLane:
    """In order, a key is closed while one of its deliveries is in flight or not due again yet.

    Reads go past closed keys; what they passed stands behind the watermark, so when such a key opens its next is
    looked for by itself (`to_open`), before any other of its deliveries can be read in the ordinary way.
    """

    def __init__(self, lane: Lane, *, careful: int, lanes: int = 1, marked: Collection[UUID] = ()) -> None:
        """`lanes` share the destination's buffer; `careful` is how many the owner before can have had in flight.

        `marked` are those of them that an owner before was trying with care when it died.
        """
        self.lane = lane
        self.careful = careful if lane.vanished else 0  # this many, one at a time, each with a marker first
        self.marked = marked
        self.leaving = False
        self.in_flight = 0
        self.most_in_flight = 0
        self.started_at = 0.0  # the latest attempt, on the monotonic clock: lanes take turns
        self.buffer: deque[Taken] = deque()
        self.known: dict[UUID, Taken] = {}  # read and not settled: in the buffer, in flight, or being settled
        self.closed: dict[int, datetime | None] = {}  # None: in flight
        self.to_open: dict[int, None] = {}  # in the order in which their turn came
        self.dirty = True  # there may be more to read
        self._share = max(LEAST, BUFFER // lanes)
        self._passed: set[int] = set()  # keys that have more behind the watermark
        self._crowded = False  # most of what was read last stood behind closed keys: the next read is told of these
        self._opens: list[tuple[datetime, int]] = []  # a heap: when closed keys are due again
        self._due_at = BEGINNING
        self._event = LOWEST
        self._read_to = BEGINNING + lane.epoch * MOMENT  # which is when it was leased
        self._floor = BEGINNING  # whatever is not visible yet is due after this
        self._floor_before = BEGINNING  # as it was when the read under way began
        self._again = 0  # rows behind which it was rewound: they come once more
        self._meanwhile: datetime | None = None  # rewound to this while a read was under way
        self._settled: set[UUID] = set()  # let go while a read was under way: it may have begun before that

    # ── reading ──────────────────────────────────────────────────────────────────────────────────

    def reading(self) -> Reading | None:
        """What to read now; None while there is enough in the buffer.  One read at a time, and then `take`."""
        if not self.wants_reading:
            return None
        self._settled.clear()
        self._meanwhile = None
        self._floor_before = self._floor
        return Reading(
            lane=self.lane.number,
            due_at=self._due_at,
            event=self._event,
            room=self._room + self._again,
            closed=tuple(islice(self._passed & self.closed.keys(), WORTH_TELLING)) if self._crowded else (),
        )

    @property
    def wants_reading(self) -> bool:
        return self.dirty and not self.leaving and self._room >= (self._most + 1) // 2

    @property
    def _most(self) -> int:
        return min(self._share, self.careful) if self.careful else self._share

    @property
    def _room(self) -> int:
        return self._most - len(self.buffer)

    def rewind(self, to: datetime) -> None:
        """Something due since then may have been committed after a read had passed it."""
        self.dirty = True
        self._meanwhile = min(to, self._meanwhile or to)
        if to - MOMENT < self._due_at:
            self._due_at, self._event, self._again = to - MOMENT, LOWEST, len(self.known)

    def sweep(self, before: datetime, floor: datetime) -> None:
        """What was committed late is due after `before`, and is read again from there; what will be is due after `floor`."""
        self.rewind(min(before, floor))  # lower than before where a clock was set back
        self._floor = floor

    def take(self, reading: Reading, rows: Sequence[Taken], now: datetime) -> None:
        """The rows of one reading, in the order of the queue.

        Where these were all, the next read begins no further back than what was swept: else those that were delivered
        without being read would be walked past, dead, again and again.
        """
        meanwhile = self._meanwhile
        self._again = 0
        if rows:
            self._due_at, self._event = rows[-1].due_at, rows[-1].event_id
            self._read_to = max(self._read_to, self._due_at)
        else:
            self._due_at, self._event = reading.due_at, reading.event
        known = len(self.known)
        for row in rows:
            if row.event_id not in self._settled:
                self._add(row, now)
        self._crowded = (len(self.known) - known) * 2 < len(rows)
        self.dirty = len(rows) >= reading.room
        if not self.dirty and self._due_at < self._floor_before:
            self._due_at, self._event = self._floor_before, LOWEST
        if meanwhile is not None:
            self.rewind(meanwhile)
        elif not self.known and not self.dirty:
            self.careful = 0  # what the owner before can have had in flight is done

    def take_fresh(self, row: Taken) -> bool:
        """One that was stored just now and not read; False where it is to be read like any other.

        What is in order is always read: only so it comes after what somebody else stored of its subject before it.  And
        word of it can be slow to come: behind the place up to which the lane was ever read, by us or an owner before, it
        may have been read and delivered by now.  The watermark stays until the next sweep, so what others store meanwhile
        is found as ever.
        """
        if row.key is not None or self.dirty or self.leaving or self.careful or self._room <= 0:
            return False
        if row.due_at <= self._read_to:
            return False
        self.known[row.event_id] = row
        self.buffer.append(row)
        return True

    def keys_to_open(self, now: datetime) -> list[int]:
        """Keys whose delivery is settled or due again: the next of each is to be read.

        For up to half of the room: subjects with much to deliver must not keep the others from being read.
        None in careful mode: what stands behind another of its subject cannot have been in flight.
        """
        if self.careful:
            return []
        while self._opens and self._opens[0][0] <= now:
            until, key = heapq.heappop(self._opens)
            if self.closed.get(key) == until:
                self.to_open[key] = None
        chosen = list(islice(self.to_open, max(0, self._most // 2 - len(self.buffer))))
        for key in chosen:
            del self.to_open[key]
        return chosen

    def opened(self, key: int, row: Taken | None, now: datetime) -> None:
        """The first in the queue of a key that was closed; None: it has no more."""
        self.closed.pop(key, None)
        if row is None:
            self._passed.discard(key)
        else:
            self._add(row, now)

    def _add(self, row: Taken, now: datetime) -> None:
        if row.event_id in self.known:
            return
        if row.key is not None:
            if row.key in self.closed:
                self._passed.add(row.key)
                return
            if row.not_before is not None and row.not_before > now:
                self._close(row.key, row.not_before)
                return
            self.closed[row.key] = None
        if row.event is not None:  # one without its event stays where it is, and so does its subject
            self.known[row.event_id] = row
            self.buffer.append(row)

    def _close(self, key: int, until: datetime) -> None:
        self.closed[key] = until
        heapq.heappush(self._opens, (until, key))

    # ── settling ─────────────────────────────────────────────────────────────────────────────────

    def settled(self, row: Taken, again: datetime | None) -> None:
        """It is delivered or dead, or is due `again`."""
        self._settled.add(row.event_id)
        self.known.pop(row.event_id, None)
        if self.careful:
            self.careful -= 1
            self.dirty = True
        if row.key is not None:
            if again is not None:
                self._close(row.key, again)
            elif row.key in self._passed:
                self.to_open[row.key] = None
            else:
                self.closed.pop(row.key, None)
        elif again is not None:
            self.rewind(again)

    def forget(self, row: Taken) -> None:
        """It was not tried, or stands no longer where it was read: whatever it is now, a later read tells."""
        self._settled.add(row.event_id)
        self.known.pop(row.event_id, None)
        if row.key is not None and self.closed.get(row.key, BEGINNING) is None:
            self.to_open[row.key] = None
        self.rewind(row.due_at)

    def empty(self) -> None:
        """What was read and not started is let go: the destination is held, or the lane is given back."""
        while self.buffer:
            self.forget(self.buffer.pop())

    @property
    def idle(self) -> bool:
        return not self.known
