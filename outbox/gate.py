"""How gently a destination is treated: how many at once, how often, and when not at all.

    success ──> two more at a time for each round of answers, up to `concurrency`
    busy (429, 503, no answer) ──> 0.7 × as many
    away, or busy as a whole ──> a pause, as long as it asked for; if it did not, longer each time, up to a minute
    5 failures in a row, or more than half of 10 ──> the breaker opens: a pause, then one at a time again
    blocked twice, 5 s apart ──> the program holds the destination, longer each time, up to 5 minutes
    released by a person ──> open, whatever was before

No attempt is spent while it is closed: nothing is read from its lanes.  Pure but for what it remembers.
"""

from collections import deque
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import assert_never

from outbox.event import Blocked, Delivered, Duplicate, Outcome, Pending, Refused, Retry, Unknown
from outbox.retry import CONFIRM_BLOCKED, LONGEST_WISH
from outbox.store import Standing

IN_A_ROW = 5
MORE = 2.0  # at a time after each round of answers: with one, a drain by 200 at a time takes a fifth longer
SAMPLE = 10
SHORTEST_PAUSE = timedelta(seconds=1)
LONGEST_PAUSE = timedelta(minutes=1)
SHORTEST_HOLD = timedelta(seconds=10)
LONGEST_HOLD = timedelta(minutes=5)
BUSY = frozenset({429, 503})
NOTICEABLE = timedelta(seconds=1)  # by which two clocks may differ
OPEN = Standing(held_until=None, held_by=None, not_before=None)


@dataclass(frozen=True, slots=True)
class BackOff:
    """Leave the whole destination alone until then."""

    until: datetime


@dataclass(frozen=True, slots=True)
class HoldForCause:
    """Hold it: nothing can be delivered there until a person acts, or the cause goes away."""

    until: datetime
    reason: str


class Gate:
    """One destination, as one process treats it."""

    def __init__(self, *, most: int, per_second: float | None = None) -> None:
        self.in_flight = 0
        self._most = most
        self._share = 1.0
        self._limit = float(most)  # of all processes together, as this one sees it
        self._per_second = per_second
        self._tokens = 1.0
        self._counted_at: datetime | None = None
        self._standing: Standing | None = None
        self._not_before: datetime | None = None
        self._failures = 0
        self._latest: deque[bool] = deque(maxlen=SAMPLE)
        self._pauses = 0
        self._blocked_since: datetime | None = None
        self._holds = 0

    def configure(self, *, most: int, per_second: float | None) -> None:
        """Another configuration: what was learned about the destination, and what is in flight there, stays."""
        self._limit = float(most) if self._limit >= self._most else min(self._limit, float(most))
        self._most = most
        self._per_second = per_second

    def scale(self, share: float) -> None:
        """This process owns that share of the destination's lanes, and so of what may go there at once and in a time."""
        self._share = share

    @property
    def limit(self) -> int:
        """How many at once, as adapted."""
        return max(1, int(self._limit * self._share))

    @property
    def paused(self) -> bool:
        """The breaker tripped and no delivery has succeeded since."""
        return self._pauses > 0

    def stand(self, standing: Standing | None, now: datetime) -> None:
        """What the database says of the destination: a hold, another process' back-off.

        One that it no longer speaks of before its time was lifted by a person, who knows better than we do.
        """
        before, self._standing = self._standing or OPEN, standing
        if standing is None and _latest(before.held_until, before.not_before, now) > now + NOTICEABLE:
            self._not_before = None
            self._recovered()

    def held(self, now: datetime) -> bool:
        return self._standing is not None and self._standing.held_until is not None and self._standing.held_until > now

    def opens_at(self, now: datetime) -> datetime | None:
        """None: it is open.  A hold opens at its end, at the latest."""
        if self._not_before is None and self._standing is None:
            return None
        told = self._standing or OPEN
        until = _latest(self._not_before, told.not_before, told.held_until, now)
        return until if until > now else None

    def room(self, now: datetime) -> int:
        """How many may start now."""
        if self.opens_at(now) is not None:
            return 0
        room = self.limit - self.in_flight
        return room if self._per_second is None else min(room, int(self._refill(now)))

    def next_token_in(self, now: datetime) -> float | None:
        """Seconds until the rate lets one start; None where it is not the rate that keeps it closed."""
        if self._per_second is None or self._tokens >= 1 or self.opens_at(now) is not None:
            return None
        return (1 - self._tokens) / max(self._per_second * self._share, 0.001)

    def _refill(self, now: datetime) -> float:
        assert self._per_second is not None
        if self._counted_at is not None:
            passed = max(0.0, (now - self._counted_at).total_seconds())
            rate = self._per_second * self._share
            burst = max(1.0, rate / 10)  # a tenth of a second's worth
            self._tokens = min(burst, self._tokens + passed * rate)
        self._counted_at = now
        return self._tokens

    def started(self) -> None:
        self.in_flight += 1
        if self._per_second is not None:
            self._tokens -= 1

    def ended(self, outcome: Outcome | None, now: datetime, *, first_wait: timedelta) -> BackOff | HoldForCause | None:
        """An attempt is over (None: it was never made); what has to be told to the other processes, if anything."""
        self.in_flight -= 1
        match outcome:
            case None:
                return None
            case Delivered() | Duplicate() | Pending() | Refused():
                self._succeeded()
                return None
            case Blocked(reason=reason):
                return self._blocked(reason, now)
            case Retry(whole_destination=True, after=after):
                self._busier()
                return self._away(now, after, first_wait)
            case Retry() | Unknown():
                return self._failed(outcome, now)
        assert_never(outcome)

    def _succeeded(self) -> None:
        """It answers: a refusal of one delivery is as good a sign of life as its acceptance."""
        self._limit = min(float(self._most), self._limit + MORE / self._limit)
        self._latest.append(True)
        self._recovered()

    def _recovered(self) -> None:
        self._failures = 0
        self._pauses = 0
        self._blocked_since = None
        self._holds = 0

    def _away(self, now: datetime, asked: timedelta | None, first_wait: timedelta) -> BackOff | None:
        """It is overloaded, or cannot be reached, for everybody: the others that were in flight say nothing new."""
        if asked is not None and asked > timedelta(0):
            return self._back_off(now + min(asked, LONGEST_WISH))
        return None if self._closed(now) else self._pause(now, least=first_wait)

    def _failed(self, outcome: Retry | Unknown, now: datetime) -> BackOff | None:
        if isinstance(outcome, Unknown) or outcome.status in BUSY:
            self._busier()
        self._failures += 1
        self._latest.append(False)
        if self._closed(now):  # the rest of those that were in flight when it tripped
            return None
        mostly = len(self._latest) == SAMPLE and sum(self._latest) * 2 < SAMPLE
        if self._failures < IN_A_ROW and not mostly and not self._pauses:
            return None
        self._latest.clear()
        self._limit = 1.0
        return self._pause(now)

    def _pause(self, now: datetime, least: timedelta = SHORTEST_PAUSE) -> BackOff:
        """Longer each time, until something succeeds."""
        pause = min(LONGEST_PAUSE, SHORTEST_PAUSE * 2**self._pauses)
        self._pauses = min(self._pauses + 1, 10)
        self._failures = 0
        return self._back_off(now + max(pause, least))

    def _blocked(self, reason: str, now: datetime) -> BackOff | HoldForCause | None:
        """The second that says so, 5 s after the first, holds the destination; what was in flight meanwhile does not."""
        if self._closed(now):
            return None
        if self._blocked_since is None:
            self._blocked_since = now
            return self._back_off(now + CONFIRM_BLOCKED)
        hold = min(LONGEST_HOLD, SHORTEST_HOLD * 2**self._holds)
        self._holds = min(self._holds + 1, 10)
        self._limit = 1.0
        self._back_off(now + hold)
        return HoldForCause(now + hold, reason)

    def _busier(self) -> None:
        self._limit = max(1.0, self._limit * 0.7)

    def _closed(self, now: datetime) -> bool:
        return self._not_before is not None and self._not_before > now

    def _back_off(self, until: datetime) -> BackOff:
        self._not_before = max(until, self._not_before or until)
        return BackOff(self._not_before)


def _latest(*times: datetime | None) -> datetime:
    return max(at for at in times if at is not None)
