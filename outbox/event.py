"""The nouns of the outbox: an event, its deliveries, what can come of an attempt.

Pure: no I/O, no clock, no imports of ours.  A connector needs nothing but this file.

An event and a delivery are structs of msgspec, frozen as the dataclasses are: they are made once a request and once an
attempt, and a frozen dataclass of ten fields takes ten times as long to make.  (`msgspec.structs.replace` changes one.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum, StrEnum
from typing import Protocol, assert_never
from uuid import UUID

import msgspec


class State(StrEnum):
    """Where a delivery stands.

        waiting ──deliver──> delivered
         │  ^  ├──give up──> dead ──discard──> discarded
         │  │  │<──replay────┘                    ^
         │  │  └──reassigned──────────────────────┤
        hold│release                              │
         v  │                                     │
        held ─────────────────────────────────────┘

    There is no state 'in progress': a lane has one owner, and what its owner did not settle
    is still waiting.  A crashed dispatcher leaves nothing to repair.
    """

    WAITING = "waiting"
    HELD = "held"
    DELIVERED = "delivered"
    DEAD = "dead"
    DISCARDED = "discarded"


class Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One fact, with the attributes of CloudEvents 1.0; `data` holds what a policy kept, and nothing else.

    Values of `data` are JSON: int, bool, str (a decimal is "42.50", a timestamp RFC 3339 in UTC) or a list of these.
    """

    id: UUID  # version 7
    source: str  # the source's name; its CloudEvents form is /sources/NAME
    type: str
    subject: str | None
    facility: str | None
    time: datetime  # when it happened, as the sender says; else when it was received
    data: Mapping[str, object]
    policy: str
    policy_version: int
    received_at: datetime
    traceparent: str | None  # the span that created the event (W3C Trace Context)


class Read(dict[str, object]):
    """Values that a delivery brings along beside its event, by field.  `repr` shows none of them."""

    def __repr__(self) -> str:
        return f"<{len(self)} values read>"


class Delivery(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One event on its way to one destination.

    The pair is its identity: the same over retries, replays and crashes, so a partner can recognise it.
    """

    event: Event
    destination: str
    attempt: int  # 1 for the first try; replays count on
    deadline: datetime  # after this a retry becomes a dead letter
    read: Read | None = None  # what was read for it from its source; exists during one try, and is kept nowhere

    @property
    def key(self) -> str:
        """The idempotency key: EVENT/DESTINATION."""
        return f"{self.event.id}/{self.destination}"


@dataclass(frozen=True, slots=True)
class Delivered:
    """The destination has it."""

    receipt: str = ""
    status: int | None = None  # the partner's status code, where its protocol has one


@dataclass(frozen=True, slots=True)
class Duplicate:
    """The destination had it already: an earlier try took effect."""

    receipt: str = ""
    status: int | None = None


@dataclass(frozen=True, slots=True)
class Pending:
    """The destination took it and is not finished; `lookup` is asked at `until`."""

    receipt: str
    until: datetime
    status: int | None = None


@dataclass(frozen=True, slots=True)
class Retry:
    """The destination could not take it now; asking again may help."""

    reason: str
    after: timedelta | None = None  # what the destination asked for, if it did
    whole_destination: bool = False  # it is overloaded or away, not this delivery's fault
    status: int | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """The destination understood and said no; asking again would hear the same."""

    reason: str
    status: int | None = None


@dataclass(frozen=True, slots=True)
class Blocked:
    """Nothing can be delivered there until a person acts: `reason` begins with `credentials:`, `configuration:` or `proxy:`."""

    reason: str
    status: int | None = None


@dataclass(frozen=True, slots=True)
class Unknown:
    """It may have happened: the request left, and no answer says what became of it."""

    reason: str
    status: int | None = None


Outcome = Delivered | Duplicate | Pending | Retry | Refused | Blocked | Unknown
"""What came of one attempt.  A reason is a short stable phrase of ours, never a partner's text: it is stored and shown."""


class OutcomeKind(IntEnum):
    """An outcome as `attempts.outcome` stores it; the numbers are on disk and stay."""

    DELIVERED = 0
    DUPLICATE = 1
    PENDING = 2
    RETRY = 3
    REFUSED = 4
    BLOCKED = 5
    UNKNOWN = 6

    @property
    def word(self) -> str:
        """As it is shown: `delivered`, `retry`, …"""
        return _WORDS[self]


_WORDS = [kind.name.lower() for kind in OutcomeKind]
_DELIVERED = OutcomeKind.DELIVERED  # which most of them are; looking a member up in its enum is not free


def kind_of(outcome: Outcome) -> OutcomeKind:
    match outcome:
        case Delivered():
            return _DELIVERED
        case Duplicate():
            return OutcomeKind.DUPLICATE
        case Pending():
            return OutcomeKind.PENDING
        case Retry():
            return OutcomeKind.RETRY
        case Refused():
            return OutcomeKind.REFUSED
        case Blocked():
            return OutcomeKind.BLOCKED
        case Unknown():
            return OutcomeKind.UNKNOWN
    assert_never(outcome)


class Connector(Protocol):
    """Speaks to one destination.

    One call is one try: a connector never sleeps, never retries, and never raises for a remote error.
    Where the partner keeps idempotency keys, a class says `keeps_keys = True`: then an `Unknown` may simply
    be sent again.  Without it an `Unknown` that `lookup` cannot clear up is left to a person.
    """

    async def check(self) -> Outcome:
        """Credentials and reachability, without an effect at the partner."""
        ...

    async def deliver(self, delivery: Delivery) -> Outcome:
        """One try."""
        ...

    async def lookup(self, delivery: Delivery) -> Outcome | None:
        """Did it already take effect?  None: it cannot be told, or it did not."""
        ...

    async def close(self) -> None: ...
