"""Group commit: requests that arrive together share one transaction, and each waits for it.

A batch leaves the moment the one before it is written, never on a timer: alone, a request waits for nobody; in a crowd,
those that came while the last batch was being written are the next one.  Only past one that is slow another goes at once.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from itertools import accumulate, takewhile
from typing import NamedTuple

from observability.failpoints import failpoint
from outbox.database import Unavailable
from outbox.ending import end
from outbox.store import Arrival, Buckets, Outbox, Seen, Stored

SLOW = timedelta(milliseconds=50)  # after that the batch under way is not waited for: another connection takes the next
PATIENCE = timedelta(seconds=2)  # senders wait for a few seconds at most
LARGEST = 500  # arrivals in one statement
LONGEST_QUEUE = 10_000  # arrivals that may wait, and
HEAVIEST_QUEUE = 16 * 1024 * 1024  # bytes of what is kept of them; beyond either the door says 503 before memory grows
BIGGEST_PART = 2  # nobody alone fills more than half of that: there is always room for another
LAST_WAIT = timedelta(seconds=2)  # at the end, for what is being written: its senders do not wait for longer


Party = tuple[str, str | None]
"""A source, and the facility of its event."""


class Waiting(NamedTuple):
    arrival: Arrival
    answer: asyncio.Future[Stored | Seen]
    rest: Sequence["Waiting"] = ()  # what came in the same post: it is stored with this one, or not at all


class IntakeBatch:
    """Stores arrivals; tells `wake` the lanes of what is new, and since when it is due.

    Where more wait than one batch takes, each party (a source, and the facility within it) has its turn: whoever floods
    waits behind itself.
    """

    def __init__(
        self,
        outbox: Outbox,
        *,
        buckets: Callable[[], Buckets],
        wake: Callable[[dict[int, datetime]], None],
        sizes: Callable[[int], None],
        connections: int = 2,
    ) -> None:
        self._outbox = outbox
        self._buckets = buckets
        self._wake = wake
        self._sizes = sizes
        self._connections = self._free = connections
        self._waiting: list[Waiting] = []
        self._rest = 0  # that is to be stored together with one of them
        self._weight = 0  # of what waits, in bytes
        self._places: defaultdict[Party, int] = defaultdict(int)  # that each party takes up in the queue
        self._writing: set[asyncio.Task[None]] = set()

    async def add(self, arrival: Arrival) -> Stored | Seen:
        """Durable when it returns; raises Unavailable when that is not known in time.

        What becomes durable after the sender was told to try again is recognised then.
        """
        if len(self._waiting) + self._rest >= LONGEST_QUEUE or self._weight >= HEAVIEST_QUEUE:
            raise Unavailable("too many requests wait for the database")
        party = party_of(arrival)
        if self._places[party] >= LONGEST_QUEUE // BIGGEST_PART:
            raise Unavailable("too many requests of one party wait for the database")
        self._places[party] += 1
        loop = asyncio.get_running_loop()
        waiting = Waiting(arrival, loop.create_future())
        self._waiting.append(waiting)
        self._weight += len(arrival.data)
        if self._free == self._connections:
            self._begin()
        late = loop.call_later(PATIENCE.total_seconds(), _fail, waiting, Unavailable("it was not stored in time"))
        try:
            return await waiting.answer
        finally:
            late.cancel()

    async def add_together(self, arrivals: Sequence[Arrival]) -> list[Stored | Seen]:
        """Up to LARGEST of one post: stored in one transaction, or none of them; otherwise as `add`."""
        if not arrivals:
            return []
        weight = sum(len(arrival.data) for arrival in arrivals)
        if len(self._waiting) + self._rest + len(arrivals) > LONGEST_QUEUE or self._weight >= HEAVIEST_QUEUE:
            raise Unavailable("too many requests wait for the database")
        parties = Counter(map(party_of, arrivals))
        if any(self._places[party] + n > LONGEST_QUEUE // BIGGEST_PART for party, n in parties.items()):
            raise Unavailable("too many requests of one party wait for the database")
        for party, n in parties.items():
            self._places[party] += n
        loop = asyncio.get_running_loop()
        first, *rest = [Waiting(arrival, loop.create_future()) for arrival in arrivals]
        waiting = first._replace(rest=rest)
        self._waiting.append(waiting)
        self._rest += len(rest)
        self._weight += weight
        if self._free == self._connections:
            self._begin()
        late = loop.call_later(PATIENCE.total_seconds(), _fail, waiting, Unavailable("it was not stored in time"))
        try:
            return list(await asyncio.gather(*(each.answer for each in _all_of([waiting]))))
        finally:
            late.cancel()

    async def close(self) -> None:
        """Whatever waits is written first; but on a Postgres that does not answer, nobody waits for it any more."""
        if self._writing:
            await asyncio.wait(self._writing, timeout=LAST_WAIT.total_seconds())
        await end(*self._writing)

    def _begin(self) -> None:
        """Have somebody write what waits, if there is a connection for it."""
        if self._free and self._waiting:
            self._free -= 1
            task = asyncio.create_task(self._write())
            self._writing.add(task)
            task.add_done_callback(self._writing.discard)

    async def _write(self) -> None:
        try:
            while True:
                batch, together = self._next()
                if not batch:
                    break
                self._sizes(len(together))
                await self._write_down(batch, together)
        finally:
            self._free += 1

    async def _write_down(self, batch: list[Waiting], together: list[Waiting]) -> None:
        slow = asyncio.get_running_loop().call_later(SLOW.total_seconds(), self._begin)
        try:
            await self._store(batch, together)
        except Exception as error:  # noqa: BLE001  whatever it is, each of the batch must hear it
            for waiting in batch:
                _fail(waiting, error)
        finally:
            slow.cancel()

    def _next(self) -> tuple[list[Waiting], list[Waiting]]:
        """Those whose sender still waits, and these with all of their posts: who was told to come back brings it again."""
        waiting = [waiting for waiting in self._waiting if not waiting.answer.done()]
        if len(waiting) + self._rest > LARGEST:
            waiting = in_turns(waiting)
        most = _how_many_fit(waiting) if self._rest else LARGEST
        batch, self._waiting = waiting[:most], waiting[most:]
        together, left = batch, self._waiting
        if self._rest:
            together, left = _all_of(batch), _all_of(left)
            self._rest = len(left) - len(self._waiting)
        self._weight = sum(len(waiting.arrival.data) for waiting in left)
        self._places = defaultdict(int, Counter(party_of(waiting.arrival) for waiting in left))
        return batch, together

    async def _store(self, batch: list[Waiting], together: list[Waiting]) -> None:
        """On an error that is in what is stored, post by post: only the guilty one fails."""
        try:
            failpoint("intake.before_commit")
            answers = await self._outbox.add([w.arrival for w in together], self._buckets())
        except Unavailable:
            raise
        except Exception:
            if len(batch) == 1:
                raise
            for waiting in batch:
                await self._write_down([waiting], _all_of([waiting]))
            return
        failpoint("intake.committed")
        due: dict[int, datetime] = {}
        for waiting, answer in zip(together, answers, strict=True):
            if not waiting.answer.done():  # its request may have gone away meanwhile
                waiting.answer.set_result(answer)
            if isinstance(answer, Stored) and answer.due_at is not None:
                for debt in waiting.arrival.debts:
                    due[debt.lane] = min(due.get(debt.lane, answer.due_at), answer.due_at)
        failpoint("intake.before_wake")
        if due:
            self._wake(due)


def party_of(arrival: Arrival) -> Party:
    return arrival.event.source, arrival.event.facility


def in_turns(waiting: Sequence[Waiting]) -> list[Waiting]:
    """The first of each party, then the second of each, …"""
    turns: Counter[Party] = Counter()
    ranked = []
    for one in waiting:
        party = party_of(one.arrival)
        ranked.append((turns[party], one))
        turns[party] += 1 + len(one.rest)
    return [one for _, one in sorted(ranked, key=lambda turn: turn[0])]


def _all_of(waiting: Sequence[Waiting]) -> list[Waiting]:
    """With what came in the same posts."""
    return [each for one in waiting for each in (one, *one.rest)]


def _how_many_fit(waiting: Sequence[Waiting]) -> int:
    """Into one statement: no post is torn apart."""
    sizes = accumulate(1 + len(one.rest) for one in waiting)
    return max(1, sum(1 for size in takewhile(LARGEST.__ge__, sizes)))


def _fail(waiting: Waiting, error: Exception) -> None:
    for each in (waiting, *waiting.rest):
        if not each.answer.done():
            each.answer.set_exception(error)
