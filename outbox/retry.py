"""When to ask again, and what an outcome means for its delivery; pure."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum
from typing import assert_never

from outbox.event import Blocked, Delivered, Duplicate, Outcome, Pending, Refused, Retry, Unknown

LONGEST_WISH = timedelta(hours=24)  # a Retry-After beyond it is honoured up to it
LONGEST_PENDING = timedelta(days=366)
LONGEST_BLOCKED = timedelta(minutes=1)
CONFIRM_BLOCKED = timedelta(seconds=5)  # a second try after this must say the same before a destination is held


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Full-jitter exponential back-off: the n-th wait is anywhere between nothing and first × 2ⁿ⁻¹, at most cap."""

    first: timedelta
    cap: timedelta
    give_up: timedelta


class Verdict(IntEnum):
    """What the settle does with a delivery's row."""

    DELIVERED = 0
    LATER = 1
    DEAD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    verdict: Verdict
    delay: timedelta = timedelta(0)
    spared: bool = False  # this try does not count towards back-off


DELIVERED = Decision(verdict=Verdict.DELIVERED)


def decide(
    outcome: Outcome,
    *,
    schedule: Schedule,
    tries: int,
    now: datetime,
    deadline: datetime,
    repeatable: bool,
    random: Callable[[], float],
    spared: int = 0,
) -> Decision:
    """Judge one attempt.

    `tries` counts those that back-off counts, this one included, and `spared` those before that it does not count;
    `repeatable`: the partner keeps idempotency keys.
    The deadline is judged here, after an attempt has failed, and nowhere else: what waited long in a hold
    is tried once before it is given up.
    """
    match outcome:
        case Delivered() | Duplicate():
            return DELIVERED
        case Refused():
            return Decision(verdict=Verdict.DEAD)
        case Pending(until=until):
            return Decision(
                verdict=Verdict.LATER, delay=min(max(until - now, timedelta(0)), LONGEST_PENDING), spared=True
            )
        case Blocked():
            # Longer each time: if it is blocked alone, its tries must not pause the destination for the others.
            wait = min(CONFIRM_BLOCKED * (1 << min(spared, 10)), LONGEST_BLOCKED)
            return Decision(verdict=Verdict.LATER, delay=wait, spared=True)
        case Unknown() if not repeatable:
            return Decision(verdict=Verdict.DEAD)
        case Retry() | Unknown():
            if now >= deadline:
                return Decision(verdict=Verdict.DEAD)
            asked = outcome.after if isinstance(outcome, Retry) else None
            wait = wait_for(schedule, tries=tries, asked=asked, random=random)
            spared = isinstance(outcome, Retry) and outcome.whole_destination
            return Decision(verdict=Verdict.LATER, delay=min(wait, deadline - now), spared=spared)
    assert_never(outcome)


def wait_for(schedule: Schedule, *, tries: int, asked: timedelta | None, random: Callable[[], float]) -> timedelta:
    """The n-th wait; what the destination asked for is the least, spread by up to the first wait on top."""
    if asked is not None:
        return min(max(asked, timedelta(0)), LONGEST_WISH) + schedule.first * random()
    doublings: int = min(max(tries, 1) - 1, 20)
    longest: timedelta = min(schedule.cap, schedule.first * (1 << doublings))
    return longest * random()
