"""Tells whoever owns a lane that something is due in it: in this process by a call, elsewhere by a notification.

Notifications go out on a connection of their own, coalesced, and never inside the transaction of an intake
(there they would take group commit away).  They are a courtesy: polls find what they would have said.
"""

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta

from observability.failpoints import failpoint
from outbox.database import Unavailable
from outbox.ending import end
from outbox.store import WAKE, Outbox

PACE = timedelta(milliseconds=5)  # at most one notification in this time
LAST_WAIT = timedelta(seconds=1)
LONGEST = 300  # lanes in one notification: its payload is limited to 8,000 bytes
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Waker:
    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._here: Callable[[Mapping[int, datetime]], Mapping[int, datetime]] = lambda due: due
        self._elsewhere: dict[int, datetime] = {}
        self._telling: asyncio.Task[None] | None = None

    def dispatch_here(self, wake: Callable[[Mapping[int, datetime]], Mapping[int, datetime]]) -> None:
        """A dispatcher in this process: it wakes its own lanes, and returns those that are not its own."""
        self._here = wake

    def wake(self, due: Mapping[int, datetime]) -> None:
        for lane, at in self._here(due).items():
            self._elsewhere[lane] = min(at, self._elsewhere.get(lane, at))
        if self._elsewhere and self._telling is None:
            self._telling = asyncio.create_task(self._tell())

    async def close(self) -> None:
        """What is to be told is told first, if Postgres takes it."""
        if self._telling is not None:
            await asyncio.wait((self._telling,), timeout=LAST_WAIT.total_seconds())
        if self._telling is not None:
            await end(self._telling)

    async def _tell(self) -> None:
        try:
            while self._elsewhere:
                told = dict(list(self._elsewhere.items())[:LONGEST])
                for lane in told:
                    del self._elsewhere[lane]
                try:
                    failpoint("wake.before_notify")
                    await self._outbox.notify(WAKE, payload_of(told))
                except Unavailable:
                    return  # whoever owns the lanes polls
                await asyncio.sleep(PACE.total_seconds())
        finally:
            self._telling = None


def payload_of(due: Mapping[int, datetime]) -> str:
    return ",".join(f"{lane}@{(at - EPOCH) // timedelta(microseconds=1)}" for lane, at in due.items())


def lanes_in(payload: str) -> dict[int, datetime | None]:
    """What a notification names; None: since when is not told.  What cannot be read is left to the polls."""
    lanes: dict[int, datetime | None] = {}
    for word in payload.split(","):
        lane, _, at = word.partition("@")
        if lane.isdecimal():
            lanes[int(lane)] = EPOCH + timedelta(microseconds=int(at)) if at.isdecimal() else None
    return lanes
