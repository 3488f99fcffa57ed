"""The outbox beside a small model of it: whatever is done, in whatever order, both say the same.

    Expected    what the outbox promises, in plain Python: no clock, no leases, no watermarks
    Fleet       the real thing: the doors of the outbox on a real Postgres, and real dispatchers that are moved step by
                step, so that a failure comes again
    Machine     makes up stories (hypothesis), tells them to both, and compares after each step

`HYPOTHESIS_PROFILE=deep` tells more stories, and longer ones; `make chaos` ends with it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import count
from typing import Any, TypeVar
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dead_letter.letters import DeadLetters, Select
from observability.metrics import Metrics
from observability.tracing import Tracing
from outbox.clock import Identities
from outbox.database import Database
from outbox.destinations import Destinations
from outbox.dispatcher import ALL, Dispatcher, Target
from outbox.ending import end
from outbox.event import (
    Blocked,
    Delivered,
    Delivery,
    Duplicate,
    Outcome,
    Pending,
    Refused,
    Retry,
    State,
    Unknown,
)  # fmt: skip
from outbox.records import Records
from outbox.retention import Keep, Retention
from outbox.retry import Schedule, Verdict
from outbox.store import Arrival, Beat, Outbox, Reading, Seen, Settled, Settlement, Stored, Taken
from tests.house import DAY, House, house_on

T = TypeVar("T")
Key = tuple[UUID, str]  # a delivery: its event, and the destination as the story calls it
Row = tuple[UUID, int]  # the same, as it stands in the table: its event and its lane

SUBJECTS = ("order/1", "order/1", "order/2", None)
PLACES = ("plain", "ordered", "touchy")
SHARDS = {"plain": 1, "ordered": 2, "touchy": 1}
KEEPS_KEYS = {"plain", "ordered"}
HANDS = 3
SOON = timedelta(milliseconds=30)
FAR = timedelta(hours=1)
KEEP = Keep(events=DAY, dead_letters=30 * DAY, audit=30 * DAY)
OVER = -2 * DAY  # how far behind a clock is, by which an event's days are over
CLOCKS = (timedelta(0), timedelta(seconds=-2), timedelta(seconds=2), OVER)
OUTCOMES: tuple[Callable[[Any], Outcome], ...] = (
    lambda now: Delivered("r1", status=200),
    lambda now: Duplicate("r1", status=200),
    lambda now: Retry("HTTP 500", status=500),
    lambda now: Retry("HTTP 500", after=SOON, status=500),
    lambda now: Retry("HTTP 503", after=FAR, status=503),
    lambda now: Retry("no connection", after=timedelta(milliseconds=1), whole_destination=True),
    lambda now: Refused("HTTP 422", status=422),
    lambda now: Refused("HTTP 404", status=404),
    lambda now: Retry("HTTP 502", status=502),
    lambda now: Blocked("credentials: HTTP 401", status=401),
    lambda now: Unknown("no answer"),
    lambda now: Pending("job/1", now),
    lambda now: Pending("job/1", now + FAR),
)


# ── what is promised ────────────────────────────────────────────────────────────────────────────────


@dataclass
class Owed:
    """One delivery, as it ought to stand."""

    order: str | None  # the subject that keeps it in order
    place: int  # in the queue
    late: bool  # it became visible after others that stand behind it
    lane: int
    began: bool = False  # once, at least
    state: State = State.WAITING
    tries: int = 0
    due: float = 0.0  # at the earliest
    left_behind: int = 0  # so often its dispatcher vanished while it was under way


@dataclass
class Expected:
    """What the outbox promises."""

    owed: dict[Key, Owed] = field(default_factory=dict)
    accepted: dict[UUID, bool] = field(default_factory=dict)  # and whether its days are over
    held: set[str] = field(default_factory=set)
    places: Iterator[int] = field(default_factory=count)

    def accept(self, arrival: Arrival, to: Sequence[str], *, over: bool = False, written: int | None = None) -> None:
        """`written`: its place, where it became visible later than it was written."""
        self.accepted[arrival.event.id] = over
        place = next(self.places) if written is None else written
        for name, debt in zip(to, arrival.debts, strict=True):
            order = arrival.event.subject if name == "ordered" else None
            self.owed[arrival.event.id, name] = Owed(order, place, late=written is not None, lane=debt.lane)

    def why_not_to_try(self, key: Key, number: int, under_way: set[Key]) -> str | None:
        """What forbids that a dispatcher whose lane it is tries this one now."""
        owed = self.owed[key]
        if owed.state is not State.WAITING:
            return f"it is {owed.state}"
        if number != owed.tries + 1:
            return f"it is try {owed.tries + 1}, not {number}"
        if key[1] in self.held:
            return "its destination is held"
        if key in under_way:
            return "it is under way already"
        if time.monotonic() < owed.due - 0.02:
            return "it is not due"
        for other, before in self._of_its_subject(key):
            if other in under_way:
                return f"{other} of its subject is under way"
            if before.place < owed.place and not before.late:
                return f"{other} of its subject comes first"
        return None

    def overtakes(self, key: Key, told: Mapping[Row, int]) -> Key | None:
        """What came first of all that its dispatcher had been told of, and not begun, when it took this one unread."""
        owed = self.owed[key]
        when = told[key[0], owed.lane]
        for other, before in self.owed.items():
            fresh = (before.lane, before.order, before.state, before.began) == (owed.lane, None, State.WAITING, False)
            if fresh and before.place < owed.place and told.get((other[0], owed.lane), when) < when:
                return other
        return None

    def settle(self, key: Key, outcome: Outcome | None, *, at: float) -> Verdict:
        """`at`: when it was answered.  None: it killed too many dispatchers, and nobody was asked."""
        owed = self.owed[key]
        owed.tries += 1
        verdict = self._verdict(key, outcome)
        if verdict is Verdict.LATER:
            owed.due = at + self._delay(outcome, key).total_seconds()
        else:
            owed.state = State.DELIVERED if verdict is Verdict.DELIVERED else State.DEAD
        return verdict

    def replay(self, key: Key) -> None:
        owed = self.owed[key]
        owed.state, owed.place, owed.late, owed.due = State.WAITING, next(self.places), False, 0.0

    def discard(self, key: Key) -> None:
        self.owed[key].state = State.DISCARDED

    def drop_what_is_over(self) -> None:
        """An event stays for as long as somebody has to do with it, with all of its deliveries."""
        for event in [event for event, over in self.accepted.items() if over]:
            states = {owed.state for (id_, _), owed in self.owed.items() if id_ == event}
            if states <= {State.DELIVERED}:
                del self.accepted[event]
                self.owed = {key: owed for key, owed in self.owed.items() if key[0] != event}

    def ought_to_be_delivered(self) -> set[Key]:
        """When nobody holds anything and every partner takes everything: what is due, and stands behind nothing that is not."""
        soon = time.monotonic() + 0.2
        waits = {key for key, owed in self.owed.items() if owed.state is State.WAITING and owed.due > soon}
        return {
            key
            for key, owed in self.owed.items()
            if owed.state is State.WAITING and key not in waits and not waits & dict(self._of_its_subject(key)).keys()
        }

    def in_state(self, *states: State) -> list[Key]:
        return [key for key, owed in self.owed.items() if owed.state in states]

    def shown(self, key: Key) -> State:
        owed = self.owed[key]
        return State.HELD if owed.state is State.WAITING and key[1] in self.held else owed.state

    def _of_its_subject(self, key: Key) -> list[tuple[Key, Owed]]:
        """The others that wait in one order with it."""
        order = self.owed[key].order
        return [
            (other, owed)
            for other, owed in self.owed.items()
            if other != key and other[1] == key[1] and order and owed.order == order and owed.state is State.WAITING
        ]

    def _verdict(self, key: Key, outcome: Outcome | None) -> Verdict:
        match outcome:
            case Delivered() | Duplicate():
                return Verdict.DELIVERED
            case None | Refused():
                return Verdict.DEAD
            case Pending() | Blocked():
                return Verdict.LATER
            case Retry() | Unknown():  # `touchy` keeps no keys, and gives up at once
                return Verdict.LATER if key[1] in KEEPS_KEYS else Verdict.DEAD

    def _delay(self, outcome: Outcome | None, key: Key) -> timedelta:
        match outcome:
            case Retry(after=after) if after:
                return after
            case Blocked():
                return timedelta(seconds=5)
            case Pending(until=until) if until is not None:
                return FAR if until > self.now() + FAR / 2 else timedelta(0)
        return timedelta(0)

    now: Callable[[], Any] = lambda: None


# ── the real thing, step by step ────────────────────────────────────────────────────────────────────


class Watched(Outbox):
    """The real outbox; it remembers what it was asked to settle, so that it can be asked again."""

    def __init__(self, *, intake: Database, dispatch: Database) -> None:
        super().__init__(intake=intake, dispatch=dispatch)
        self.asked: list[Settlement] = []
        self.meanwhile: Callable[[], None] = lambda: None  # what comes while a read is under way

    async def read(self, readings: Sequence[Reading]) -> list[Taken]:
        rows = await super().read(readings)
        self.meanwhile()
        return rows

    async def settle(self, done: Sequence[Settlement]) -> Settled:
        self.asked += done
        return await super().settle(done)

    async def beat(self, *args: Any, **told: Any) -> Beat | None:
        """Of a server that has been up for long."""
        beat = await super().beat(*args, **told)
        return beat and replace(beat, up=DAY)


@dataclass
class Try:
    """A connector was asked, and has not answered."""

    key: Key
    number: int
    answer: "asyncio.Future[Outcome]"
    lanes: Collection[tuple[int, int]]  # that were its dispatcher's when it began, with their epochs


class Hand:
    """One process that dispatches, and its connectors.  It does what it is told to, one thing at a time.

    It has a door, too: what it stores, its dispatcher may take without a read, once word of it has come.
    """

    def __init__(self, fleet: "Fleet") -> None:
        self._fleet = fleet
        self.tries: list[Try] = []
        self.answered: dict[Key, tuple[Outcome, float]] = {}
        self.words: list[Taken] = []  # of what is stored; they have not come yet
        self.asleep = False
        self.dispatcher = Dispatcher(
            fleet.outbox, database=fleet.house.dispatch, clock=fleet.house.clock, metrics=fleet.metrics,
            tracing=fleet.tracing, lease=timedelta(minutes=1),
        )  # fmt: skip
        self.dispatcher.retarget(self._target(name) for name in PLACES)

    def _target(self, name: str) -> Target:
        destination = self._fleet.destination(name)
        give_up = timedelta(0) if name == "touchy" else DAY
        return Target(
            number=destination.id, name=destination.name, lanes=len(destination.lanes), connector=_Waits(self, name),
            schedule=Schedule(first=timedelta(0), cap=timedelta(0), give_up=give_up), timeout=DAY, concurrency=3,
            per_second=None,
        )  # fmt: skip

    @property
    def number(self) -> int:
        return self.dispatcher._number

    async def begin(self) -> None:
        await self.dispatcher._introduce()
        await self.beat()

    async def beat(self) -> None:
        """Who was killed is missed for long enough by then."""
        self.dispatcher._missing = dict.fromkeys((gone.number for gone in self._fleet.gone), float("-inf"))
        await self.dispatcher._beat_once()
        self.asleep = False

    async def sweep(self) -> None:
        await self.dispatcher._sweep()

    def door(self, *, late: bool) -> Outbox:
        """`late`: word of what is stored is slow to come, and whoever reads may know of it before."""
        outbox = Outbox(intake=self._fleet.house.intake, dispatch=self._fleet.house.dispatch)
        outbox.hand_over_to(self._hear_later if late else self.take)
        return outbox

    def take(self, fresh: Taken) -> bool:
        takes = self.dispatcher.take(fresh)
        if takes:
            self._fleet.taken.add((fresh.event_id, fresh.lane))
            self._fleet.tell(fresh.event_id, fresh.lane)
        return takes

    def _hear_later(self, fresh: Taken) -> bool:
        self.words.append(fresh)
        return True

    async def deliver(self) -> list[Try]:
        """It looks everywhere, reads and begins; the tries that it began."""
        self.dispatcher._destinations_changed = True
        return await self.go_on()

    async def go_on(self) -> list[Try]:
        """It reads where it knows that there is something to read, and begins what it has; the tries that it began."""
        before = list(self.tries)
        await self._hear()
        await self.dispatcher._open_keys()
        await self.dispatcher._read_once()
        self.dispatcher._start(ALL)
        await self._quiet()
        return [tried for tried in self.tries if tried not in before]

    async def answer(self, tried: Try, outcome: Outcome) -> list[Try]:
        """Whoever has an answer goes on at once; the tries that begin so."""
        await self._hear()
        self.tries.remove(tried)
        before = list(self.tries)
        self.answered[tried.key] = (outcome, time.monotonic())
        tried.answer.set_result(outcome)
        await self._quiet()
        return [begun for begun in self.tries if begun not in before]

    @property
    def done(self) -> list[Settlement]:
        """What it will write, if it may."""
        return [s for s in self.dispatcher._done if self.dispatcher._owns(s)]

    async def settle(self) -> None:
        settling = asyncio.create_task(self.dispatcher._settle())
        while self.dispatcher._done and not settling.done():
            await asyncio.sleep(0)
        await end(settling)

    async def leave(self) -> None:
        """As a program that is told to stop, and has no time to wait for what is under way."""
        self.dispatcher._loops = [asyncio.create_task(self.dispatcher._settle())]
        await self.dispatcher.stop(timedelta(0))

    async def fall_silent(self) -> None:
        """Killed: its line is cut, and nothing that it was at goes on."""
        presence, self.dispatcher._presence = self.dispatcher._presence, None
        assert presence is not None
        await presence.close()

    async def sleep(self, for_: timedelta) -> None:
        """It hangs, and its lease runs out, as it finds when it wakes."""
        await self._fleet.outbox.beat(self.number, -for_)
        self.dispatcher._lease_ends = 0.0
        self.asleep = True

    async def clean_up(self) -> None:
        await end(*self.dispatcher._attempts)
        if self.dispatcher._presence is not None:
            await self.dispatcher._presence.close()

    async def _hear(self) -> None:
        """Of every hold."""
        if self.dispatcher._destinations_changed:
            await self.dispatcher._look_at_destinations()

    async def _quiet(self) -> None:
        """Until each of its attempts waits for its partner, or is over."""
        async with asyncio.timeout(10):
            while len(self.dispatcher._attempts) != len(self.tries):
                await asyncio.sleep(0)


class _Waits:
    """A connector that answers when the story says so."""

    def __init__(self, hand: Hand, name: str) -> None:
        self._hand = hand
        self._name = name
        self.keeps_keys = name in KEEPS_KEYS

    async def check(self) -> Outcome:
        return Delivered()

    async def deliver(self, delivery: Delivery) -> Outcome:
        answer = asyncio.get_running_loop().create_future()
        lanes = {(own.lane.number, own.lane.epoch) for own in self._hand.dispatcher._lanes.values()}
        tried = Try((delivery.event.id, self._name), delivery.attempt, answer, lanes)
        self._hand.tries.append(tried)
        return await tried.answer

    async def lookup(self, delivery: Delivery) -> Outcome | None:
        return None

    async def close(self) -> None:
        pass


class _Producer:
    """Somebody whose transaction stays open: the outbox writes into it, and nobody sees it yet."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        self.connection = connection
        self.transaction = connection.transaction()
        self.wrote: list[tuple[Arrival, Sequence[str], int]] = []  # with their places in the queues

    async def fetchrow(self, sql: str, *arguments: object) -> asyncpg.Record | None:
        return await self.connection.fetchrow(sql, *arguments)

    async def fetch(self, sql: str, *arguments: object) -> list[asyncpg.Record]:
        return await self.connection.fetch(sql, *arguments)


@dataclass
class Fleet:
    """All that works on one database."""

    house: House
    outbox: Watched
    people: Database
    metrics: Metrics
    tracing: Tracing
    story: int = 0
    taken: set[Row] = field(default_factory=set)  # without a read
    told: dict[Row, int] = field(default_factory=dict)  # since when the dispatcher of its lane may know of it
    moments: Iterator[int] = field(default_factory=count)
    hands: list[Hand] = field(default_factory=list)
    gone: list[Hand] = field(default_factory=list)
    producers: list[_Producer] = field(default_factory=list)

    def name(self, place: str) -> str:
        return f"{place}-{self.story}"

    def destination(self, place: str):
        return self.house.destinations[self.name(place)]

    async def begin_a_story(self) -> None:
        self.story += 1
        await self.house.partitions.ensure(self.house.clock.now() + OVER)
        await self.people.execute(
            "DELETE FROM pending; DELETE FROM dead_letters; DELETE FROM discards; DELETE FROM suspects;"
            "DELETE FROM events; DELETE FROM attempts; DELETE FROM carried_events; DELETE FROM carried_attempts;"
            "DELETE FROM tally; DELETE FROM proofs; DELETE FROM lanes; DELETE FROM destinations; DELETE FROM dispatchers"
        )
        await self.people.execute("VACUUM pending")  # the places of one story are those of the next
        for place, shards in SHARDS.items():
            await self.house.destination(self.name(place), shards)
        self.clocks = [
            Identities(lambda ahead=ahead: self.house.clock.seconds() + ahead.total_seconds())  # type: ignore[misc]
            for ahead in CLOCKS
        ]
        self.outbox.asked.clear()

    async def end_the_story(self) -> None:
        for hand in [*self.hands, *self.gone]:
            await hand.clean_up()
        for producer in self.producers:
            await producer.connection.close()
        self.hands, self.gone, self.producers = [], [], []

    def arrival(self, to: Sequence[str], subject: str | None, clock: int) -> Arrival:
        self.house.identities = self.clocks[clock]
        made = [
            self.house.arrival(self.name(place), subject=subject, ordered=place == "ordered", same=uuid4())
            for place in to
        ] or [self.house.arrival(subject=subject)]
        event = made[0].event
        debts = [
            self.house.arrival(self.name(place), subject=subject, ordered=place == "ordered").debts[0] for place in to
        ]
        return Arrival(event=event, data=made[0].data, same=uuid4(), digest=uuid4(), debts=tuple(debts))

    def tell(self, event: UUID, lane: int) -> None:
        self.told.setdefault((event, lane), next(self.moments))

    def wake(self, event: UUID, due: Mapping[int, datetime]) -> None:
        for hand in self.hands:
            hand.dispatcher.wake(due)
        for lane in due:
            self.tell(event, lane)

    async def open_producer(self) -> _Producer:
        connection = await asyncpg.connect(
            self.house.dsn, server_settings={"search_path": "sluicegate", "enable_seqscan": "off"}
        )
        producer = _Producer(connection)
        await producer.transaction.start()
        self.producers.append(producer)
        return producer


# ── stories ─────────────────────────────────────────────────────────────────────────────────────────


ROUTED = (["ordered"], ["ordered", "touchy"], ["plain", "ordered"], ["touchy"], ["plain"], [*PLACES], [])
POST = st.tuples(st.sampled_from(ROUTED), st.sampled_from(SUBJECTS))
POSTS = st.lists(POST, min_size=1, max_size=3)
WHICH = st.integers(0, 11)
ANSWERS = st.lists(st.integers(0, len(OUTCOMES) - 1), max_size=3)
WORD = ("at once", "not yet begun", "while it reads")  # comes of what was stored, to whoever may take it without a read
BUSY, NEVER = 2, 6  # of the outcomes


@dataclass(frozen=True)
class Door:
    """Of somebody who dispatches, too."""

    which: int
    reads: bool  # he does, all there is, just before
    word: str  # when it comes of what he stores

    @property
    def late(self) -> bool:
        return self.word in {"late", "while it reads"}


DOORS = st.none() | st.builds(Door, WHICH, st.booleans(), st.sampled_from((*WORD, "late")))


class Machine(RuleBasedStateMachine):
    """Rules have no preconditions that depend on time, so that a story can be told again."""

    def __init__(self, fleet: Fleet, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        super().__init__()
        self.fleet = fleet
        self._run = run
        self.expected = Expected()
        self.expected.now = fleet.house.clock.now
        self.epochs: dict[int, tuple[int | None, int]] = {}
        self.dropped = False
        self.moved = False  # since both were compared
        self.committed: list[Arrival] = []

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        self.moved = True
        return self._run(work)  # type: ignore[no-any-return]

    @initialize(
        hands=st.integers(1, 2), posts=st.lists(POST, min_size=4, max_size=8),
        clock=st.sampled_from((0, 1, 2, 3, 3, 3)), door=DOORS,
    )  # fmt: skip
    def begin(self, hands: int, posts: list[tuple[list[str], str | None]], clock: int, door: Door | None) -> None:
        self.run(self.fleet.begin_a_story())
        self.letters = DeadLetters(self.fleet.people)
        self.holds = Destinations(self.fleet.people)
        self.records = Records(self.fleet.people)
        self.retention = Retention(self.fleet.people, self.fleet.house.partitions, KEEP)
        for _ in range(hands):
            self.one_more_dispatcher()
            self.run(self._compare_lanes())
        self._accepts(posts, clock, wake=True, door=door)

    # ── the door ─────────────────────────────────────────────────────────────────────────────────

    @rule(posts=POSTS, clock=st.integers(0, len(CLOCKS) - 1), wake=st.booleans(), door=DOORS)
    def accept(self, posts: list[tuple[list[str], str | None]], clock: int, wake: bool, door: Door | None) -> None:
        self._accepts(posts, clock, wake=wake, door=door)

    def _accepts(
        self, posts: list[tuple[list[str], str | None]], clock: int, *, wake: bool, door: Door | None = None
    ) -> None:
        """Through the door of somebody who only stores, or of one who dispatches, too, and may take it without a read."""
        hand = self._hand(door.which) if door else None
        if door is None or hand is None:
            self.run(self._stores(posts, clock, wake, self.fleet.outbox))
            return
        if door.reads:
            self._delivers(hand)
        self.run(self._stores(posts, clock, wake, hand.door(late=door.late)))
        self._word_is_there(hand, door.word, wake=wake)

    async def _stores(self, posts: list[tuple[list[str], str | None]], clock: int, wake: bool, door: Outbox) -> None:
        arrivals = [self.fleet.arrival(to, subject, self._clock(clock)) for to, subject in posts]
        answers = await door.add(arrivals, self.fleet.house.buckets())
        for arrival, (to, _), answer in zip(arrivals, posts, answers, strict=True):
            assert isinstance(answer, Stored)
            left = {(arrival.event.id, debt.lane) for debt in arrival.debts} - self.fleet.taken - self._awaited()
            assert (answer.event, answer.due_at is None) == (arrival.event.id, not left)
            self._accepted(arrival, to, clock=clock)
            if wake and answer.due_at is not None:
                self.fleet.wake(arrival.event.id, {debt.lane: answer.due_at for debt in arrival.debts})

    def _awaited(self) -> set[Row]:
        """Of which word is still to come."""
        return {(fresh.event_id, fresh.lane) for hand in self.fleet.hands for fresh in hand.words}

    @precondition(lambda self: any(hand.words for hand in self.fleet.hands))
    @rule(which=WHICH, wake=st.booleans(), word=st.sampled_from(WORD))
    def word_comes(self, which: int, wake: bool, word: str) -> None:
        """Of all that somebody stored a while ago: it may have been delivered, or be another's to deliver, by now."""
        waiting = [hand for hand in self.fleet.hands if hand.words]
        hand = waiting[which % len(waiting)]
        if word != "while it reads":
            self._hears(hand, wake=wake)
        self._word_is_there(hand, word, wake=wake)

    def _word_is_there(self, hand: Hand, word: str, *, wake: bool) -> None:
        match word:
            case "at once":
                self._begins(hand.go_on())
            case "while it reads":
                self.fleet.outbox.meanwhile = lambda: self._hears(hand, wake=wake)
                self._delivers(hand)
                self.fleet.outbox.meanwhile = lambda: None
                self._hears(hand, wake=wake)  # now, if there was nothing that it might read

    def _hears(self, hand: Hand, *, wake: bool) -> None:
        words, hand.words = hand.words, []
        for fresh in words:
            if not hand.take(fresh) and wake:
                self.fleet.wake(fresh.event_id, {fresh.lane: fresh.due_at})

    @precondition(lambda self: self.committed)
    @rule(which=WHICH, other_body=st.booleans(), beside=st.booleans())
    def post_again(self, which: int, other_body: bool, beside: bool) -> None:
        """The same once more, alone or in a batch with a new one, and twice in it: the first one stands."""
        first = self.committed[which % len(self.committed)]

        async def post() -> None:
            again = self.fleet.arrival(["plain"], None, 0)
            again = Arrival(
                event=again.event, data=again.data, same=first.same,
                digest=uuid4() if other_body else first.digest, debts=again.debts,
            )  # fmt: skip
            new = self.fleet.arrival(["ordered"], SUBJECTS[0], 0)
            batch = [again, new, again] if beside else [again]
            answers = await self.fleet.outbox.add(batch, self.fleet.house.buckets())
            kept = first.digest if first.event.id in self.expected.accepted else None
            assert answers[0] == answers[-1] == Seen(first.event.id, kept)
            if beside:
                assert isinstance(answers[1], Stored)
                self._accepted(new, ["ordered"])

        self.run(post())

    @rule(posts=POSTS)
    def open_a_transaction(self, posts: list[tuple[list[str], str | None]]) -> None:
        """A producer that is slow to commit."""
        if len(self.fleet.producers) >= 2:
            return

        async def write() -> None:
            producer = await self.fleet.open_producer()
            slow = Outbox(intake=producer, dispatch=producer)  # type: ignore[arg-type]
            arrivals = [self.fleet.arrival(to, subject, 0) for to, subject in posts]
            answers = await slow.add(arrivals, self.fleet.house.buckets())
            assert all(isinstance(answer, Stored) for answer in answers)
            producer.wrote = [
                (arrival, to, next(self.expected.places)) for arrival, (to, _) in zip(arrivals, posts, strict=True)
            ]

        self.run(write())

    @rule(which=WHICH, commits=st.integers(0, 3))
    def end_a_transaction(self, which: int, commits: int) -> None:
        """Nobody is woken: it is for the sweep to find what it wrote."""
        if not self.fleet.producers:
            return
        producer = self.fleet.producers.pop(which % len(self.fleet.producers))

        async def finish() -> None:
            await (producer.transaction.commit() if commits else producer.transaction.rollback())
            await producer.connection.close()

        self.run(finish())
        for arrival, to, place in producer.wrote if commits else ():
            self._accepted(arrival, to, written=place)

    def _clock(self, clock: int) -> int:
        """Once the partitions of days that are over have been dropped, nobody writes there."""
        return 0 if self.dropped and CLOCKS[clock] == OVER else clock

    def _accepted(self, arrival: Arrival, to: Sequence[str], *, clock: int = 0, written: int | None = None) -> None:
        self.expected.accept(arrival, to, over=CLOCKS[self._clock(clock)] == OVER, written=written)
        self.committed.append(arrival)

    # ── dispatchers ──────────────────────────────────────────────────────────────────────────────

    @rule()
    def one_more_dispatcher(self) -> None:
        if len(self.fleet.hands) < HANDS:
            hand = Hand(self.fleet)
            self.fleet.hands.append(hand)
            self.run(hand.begin())

    def _hand(self, which: int) -> Hand | None:
        return self.fleet.hands[which % len(self.fleet.hands)] if self.fleet.hands else None

    @rule(which=WHICH, sweep=st.booleans())
    def beat(self, which: int, sweep: bool) -> None:
        if hand := self._hand(which):
            self.run(hand.beat())
            if sweep:
                self.run(hand.sweep())

    @rule(which=WHICH, patient=st.booleans(), rounds=st.lists(st.tuples(ANSWERS, st.booleans()), max_size=3))
    def deliver(self, which: int, patient: bool, rounds: list[tuple[list[int], bool]]) -> None:
        """It begins what it can; some of that is answered at once, and settled, and makes room for more."""
        if hand := self._hand(which):
            if patient:
                time.sleep(SOON.total_seconds() if self._something_is_due_soon() else 0)
            self._delivers(hand)
            for outcomes, settle in rounds:
                self._answer_some(hand, outcomes)
                if settle:
                    self._settles(hand)
                self._delivers(hand)

    def _delivers(self, hand: Hand) -> int:
        return self._begins(hand.deliver())

    def _begins(self, work: Coroutine[Any, Any, list[Try]]) -> int:
        """How many tries it begins; each of them was allowed.

        Who lost a lane may still be at what is tried again by right, and be its owner again.
        """
        stands = self.run(self._where_each_stands())
        under_way = {t.key for hand in self.fleet.hands for t in hand.tries if stands.get(t.key) in t.lanes}
        begun = self.run(work)
        for tried in begun:
            why = self.expected.why_not_to_try(tried.key, tried.number, under_way)
            assert why is None, f"{tried.key} must not be tried: {why}"
            assert stands[tried.key] in tried.lanes, f"{tried.key} is another's to try"
            under_way.add(tried.key)
            self._in_its_turn(tried.key)
        return len(begun)

    def _in_its_turn(self, key: Key) -> None:
        owed = self.expected.owed[key]
        if not owed.began and (key[0], owed.lane) in self.fleet.taken:
            first = self.expected.overtakes(key, self.fleet.told)
            assert first is None, f"{key} was taken past {first}, which was to be read"
        owed.began = True

    async def _where_each_stands(self) -> dict[Key, tuple[int, int]]:
        """In which lane, and with what epoch."""
        rows = await self.fleet.people.fetch(
            """
            SELECT p.event_id, d.name, l.lane, l.epoch
              FROM pending AS p
              JOIN lanes AS l USING (lane)
              JOIN destinations AS d ON d.id = l.destination
            """
        )
        return {(row["event_id"], row["name"].rpartition("-")[0]): (row["lane"], row["epoch"]) for row in rows}

    def _something_is_due_soon(self) -> bool:
        now = time.monotonic()
        return any(now < owed.due < now + 1 for owed in self.expected.owed.values())

    @rule(which=WHICH, outcomes=ANSWERS)
    def answer(self, which: int, outcomes: list[int]) -> None:
        if hand := self._hand(which):
            self._answer_some(hand, outcomes)

    def _answer_some(self, hand: Hand, outcomes: list[int]) -> None:
        for tried, outcome in zip(list(hand.tries), outcomes, strict=False):
            self._answers(hand, tried, OUTCOMES[outcome](self.fleet.house.clock.now()))

    def _answers(self, hand: Hand, tried: Try, outcome: Outcome) -> None:
        self._begins(hand.answer(tried, outcome))

    @rule(which=WHICH, answer=st.sampled_from((BUSY, NEVER)), then=st.sampled_from(("", "replay", "discard", "drop")))
    def one_answer_for_all(self, which: int, answer: int, then: str) -> None:
        """A partner that is away, or takes nothing until somebody has mended what it is told."""
        if hand := self._hand(which):
            self._delivers(hand)
            self._answer_some(hand, [answer] * len(hand.tries))
            self._settles(hand)
            self.both_say_the_same()
            if then == "drop":
                self.drop_what_is_over()
            elif then:
                self.repair(which, all_of_it=True, discard=int(then == "replay"))
            self._delivers(hand)

    @rule(which=WHICH)
    def settle(self, which: int) -> None:
        if hand := self._hand(which):
            self._settles(hand)

    def _settles(self, hand: Hand) -> None:
        done = hand.done
        self.run(hand.settle())
        for settlement in done:
            key = self._key(settlement)
            outcome, at = hand.answered.pop(key, (None, 0.0))
            if self.epochs[settlement.lane][1] == settlement.epoch:
                if outcome is None:
                    assert self.expected.owed[key].left_behind >= 2, f"{key} was buried, and killed nobody"
                verdict = self.expected.settle(key, outcome, at=at)
                assert settlement.verdict is verdict, f"{key}: {settlement.verdict!r} after {outcome}"

    def _key(self, settlement: Settlement) -> Key:
        [place] = [p for p in PLACES if self.fleet.destination(p).id == settlement.destination]
        return settlement.taken.event_id, place

    @rule(
        which=WHICH,
        how=st.sampled_from(["killed", "told to stop", "asleep", "asleep and struck off"]),
        noticed=st.booleans(),
        outcomes=ANSWERS,
    )
    def away(self, which: int, how: str, noticed: bool, outcomes: list[int]) -> None:
        """In the middle of its work.  `noticed`: the others take its lanes over at once, before a sleeper wakes."""
        hand = self._hand(which)
        if hand is None:
            return
        self._delivers(hand)
        match how:
            case "killed":
                self._left_behind(hand)
                self.fleet.hands.remove(hand)
                self.fleet.gone.append(hand)
                self.run(hand.fall_silent())
                self.run(self._until_it_is_known_to_be_gone(hand))
            case "told to stop":
                self._settles(hand)
                self.fleet.hands.remove(hand)
                self.run(hand.leave())
            case _:
                self._left_behind(hand)
                self.run(hand.sleep(timedelta(minutes=2 if how.endswith("off") else 0, seconds=1)))
        if noticed:
            self.one_more_dispatcher()
            for other in self.fleet.hands:
                if not other.asleep:
                    self.both_say_the_same()
                    self.run(other.beat())
            self.both_say_the_same()
        if hand in self.fleet.hands:
            self._answer_some(hand, outcomes)
            self._settles(hand)

    async def _until_it_is_known_to_be_gone(self, hand: Hand) -> None:
        silent = "UPDATE dispatchers SET lease_until = lease_until - interval '10 s' WHERE id = $1"
        await self.fleet.people.execute(silent, hand.number)
        sql = "SELECT count(*) FROM living_dispatchers WHERE id = $1"
        async with asyncio.timeout(10):
            while await self.fleet.people.fetchval(sql, hand.number):
                await asyncio.sleep(0.001)

    def _left_behind(self, hand: Hand) -> None:
        for key in {*(tried.key for tried in hand.tries), *map(self._key, hand.done)}:
            if key in self.expected.owed:
                self.expected.owed[key].left_behind += 1

    @rule(which=WHICH, how_many=st.integers(1, 4))
    def settle_what_is_no_more(self, which: int, how_many: int) -> None:
        """What was settled once, and what somebody has who lost his lane and does not know: nothing changes."""
        stale = [s for hand in self.fleet.hands for s in hand.dispatcher._done if self.epochs[s.lane][1] != s.epoch]
        asked = self.fleet.outbox.asked
        at = which % len(asked) if asked else 0
        if again := [*stale, *asked[at : at + how_many]]:
            assert self.run(Outbox.settle(self.fleet.outbox, again)).done == {}

    @rule(posts=POSTS, door=DOORS)
    def others_take_their_places(self, posts: list[tuple[list[str], str | None]], door: Door | None) -> None:
        """Where a row was, another one is: who asks for the place alone settles what he has never seen."""
        self.run(self.fleet.people.execute("VACUUM (INDEX_CLEANUP ON, TRUNCATE OFF) pending"))
        self._accepts(posts, 0, wake=True, door=door)
        if asked := self.fleet.outbox.asked:
            assert self.run(Outbox.settle(self.fleet.outbox, asked[-100:])).done == {}

    # ── people, and what is done now and then ────────────────────────────────────────────────────

    @rule(place=st.sampled_from(PLACES), release=st.booleans())
    def hold_or_release(self, place: str, release: bool) -> None:
        if release:
            held = self.run(self.holds.release(self.fleet.name(place), by="anna", reason="over"))
            assert held == (place in self.expected.held)
            self.expected.held.discard(place)
        else:
            self.run(self.holds.hold(self.fleet.name(place), until=None, reason="maintenance", by="anna"))
            self.expected.held.add(place)
        for hand in self.fleet.hands:
            hand.dispatcher._heard_of_destinations()

    @rule(which=WHICH, all_of_it=st.booleans(), discard=st.integers(0, 2))
    def repair(self, which: int, all_of_it: bool, discard: int) -> None:
        """Replay or discard: one event, or a whole destination."""
        dead = self.expected.in_state(State.DEAD)
        if not dead:
            return
        event, place = dead[which % len(dead)]
        taken = [key for key in dead if key[1] == place] if all_of_it else [(event, place)]
        select = Select(destination=self.fleet.name(place), events=None if all_of_it else (event,))
        work = self.letters.replay if discard else self.letters.discard
        repair = self.run(work(select, reason="mended", actor="anna"))
        assert repair.count == len(taken)
        for key in sorted(taken):  # in the order of their events
            self.expected.replay(key) if discard else self.expected.discard(key)

    @rule(task=st.sampled_from(["roll up", "roll up a crowd", "prove", "ask for the time"]))
    def keep_up(self, task: str) -> None:
        now = self.fleet.house.clock.now()
        match task:
            case "prove":  # id by id, of the days that are over
                self.run(self.fleet.people.execute("DELETE FROM proofs"))
                assert self.run(self.retention.prove(now)) == []
            case "ask for the time":
                self.run(self.fleet.house.clock.ask(self.fleet.people))
            case "roll up":
                self.run(self.retention.roll_up())
            case _:  # where many rows of the books say the same, they become one
                self.run(self._accept_a_crowd())
                self.run(self.retention.roll_up())

    async def _accept_a_crowd(self) -> None:
        if len(self.expected.accepted) < 40:
            for _ in range(51):
                arrival = self.fleet.arrival([], None, 0)
                await self.fleet.outbox.add([arrival], self.fleet.house.buckets())
                self.expected.accept(arrival, [])

    @rule()
    def drop_what_is_over(self) -> None:
        """What is still owed outlives it.  Not while a producer writes, for whose end it would wait."""
        if self.fleet.producers or not any(self.expected.accepted.values()):
            return
        self.run(self.retention.run(self.fleet.house.clock.now()))
        self.expected.drop_what_is_over()
        self.dropped = True

    # ── after each step ──────────────────────────────────────────────────────────────────────────

    @invariant()
    def both_say_the_same(self) -> None:
        if not self.moved:
            return
        self.run(self._compare_lanes())
        self._nothing_slips_out_of_a_hold()
        self.run(self._compare_deliveries())
        self.run(self._compare_books())
        self.moved = False

    async def _compare_lanes(self) -> None:
        """Epochs only grow, and a lane leaves its owner by that one's own hand, or when that one is gone."""
        names = [self.fleet.name(place) for place in PLACES]
        rows = await self.fleet.people.fetch(
            """
            SELECT lane, owner, epoch, owner IN (SELECT id FROM living_dispatchers) AS lives
              FROM lanes JOIN destinations ON destinations.id = destination WHERE name = ANY ($1::text[])
            """,
            names,
        )
        living = {hand.number for hand in self.fleet.hands if not hand.asleep}
        for row in rows:
            owner, epoch = self.epochs.get(row["lane"], (None, 0))
            if row["owner"] == owner or row["owner"] is None:
                assert row["epoch"] == epoch
            else:
                assert row["epoch"] > epoch
                assert owner not in living, f"lane {row['lane']} was taken from dispatcher {owner}, which lives"
            self.epochs[row["lane"]] = (row["owner"], row["epoch"])

    def _nothing_slips_out_of_a_hold(self) -> None:
        """Who has heard of it has nothing in hand that he could begin."""
        held = {self.fleet.destination(place).id for place in self.expected.held}
        for dispatcher in (hand.dispatcher for hand in self.fleet.hands):
            if not dispatcher._destinations_changed:
                assert not any(own.buffer for own in dispatcher._lanes.values() if own.lane.destination in held)

    async def _compare_deliveries(self) -> None:
        """Each is in one place, which is the expected one, with as many tries, each with its number."""
        rows = await self.fleet.people.fetch(
            """
            SELECT p.event_id, l.destination, 'waiting' AS state, p.attempts FROM pending AS p JOIN lanes AS l USING (lane)
             UNION ALL
            SELECT event_id, destination, 'dead', attempts FROM dead_letters
             UNION ALL
            SELECT event_id, destination, 'discarded', -1 FROM discards
             UNION ALL
            SELECT event_id, destination, 'delivered', number
              FROM (SELECT event_id, destination, number, outcome FROM attempts
                     UNION
                    SELECT event_id, destination, number, outcome FROM carried_attempts) AS ended
             WHERE outcome IN (0, 1)
            """
        )
        numbers = await self.fleet.people.fetch(
            """
            SELECT event_id, destination, array_agg(number ORDER BY number) AS numbers
              FROM (SELECT event_id, destination, number FROM attempts
                     UNION ALL
                    SELECT event_id, destination, number FROM carried_attempts) AS tries
             GROUP BY event_id, destination
            """
        )
        places = {self.fleet.destination(place).id: place for place in PLACES}
        found: dict[Key, tuple[str, int]] = {}
        for row in rows:
            key = (row["event_id"], places[row["destination"]])
            assert key not in found, f"{key} is {row['state']}, and {found[key]}"
            found[key] = (row["state"], row["attempts"])
        tries = {(row["event_id"], places[row["destination"]]): row["numbers"] for row in numbers}
        for key, owed in self.expected.owed.items():
            state, attempts = found.pop(key, ("nowhere", 0))
            assert state == owed.state, f"{key} is {state}, not {owed.state}"
            assert attempts in {owed.tries, -1}
            assert tries.get(key, []) == list(range(1, owed.tries + 1))
        assert not found, f"nobody is owed {found}"

    async def _compare_books(self) -> None:
        books = await self.records.books()
        assert books.balanced, books.differences
        shown = Counter(self.expected.shown(key) for key in self.expected.owed)
        deliveries = books.deliveries
        assert deliveries.owed == len(self.expected.owed)
        told = {state: getattr(deliveries, state) for state in State}
        assert told == {state: shown[state] for state in State}
        routed = {event for event, _ in self.expected.owed}
        assert (books.events.accepted, books.events.routed) == (len(self.expected.accepted), len(routed))

    # ── the end of a story ───────────────────────────────────────────────────────────────────────

    def teardown(self) -> None:
        try:
            if hasattr(self, "letters"):
                self._all_ends_well()
        finally:
            self.run(self.fleet.end_the_story())

    def _all_ends_well(self) -> None:
        """Every partner takes everything, and whoever is there goes on: nothing that is due is left."""
        for _ in range(len(self.fleet.producers)):
            self.end_a_transaction(0, 1)
        self._accepts([([*PLACES], None)], 0, wake=True, door=Door(self.fleet.story, False, "late"))
        if self.fleet.story % 2:
            self._much_is_refused_at_the_end()
        else:
            self._somebody_comes_at_the_end()
        for hand in self.fleet.hands:
            for tried in list(hand.tries):
                self._answers(hand, tried, Delivered("r1", status=200))
            self._settles(hand)
        self._a_clean_slate()
        if not self.fleet.hands:
            self.one_more_dispatcher()
        time.sleep(2 * SOON.total_seconds() if self._something_is_due_soon() else 0)
        for _ in range(5):  # who was struck off comes again, who has too much lets it end and gives it back, …
            for hand in self.fleet.hands:
                self.run(hand.beat())
                self.both_say_the_same()
            for hand in self.fleet.hands:
                self.run(hand.sweep())
            while sum(self._goes_on(hand) for hand in self.fleet.hands):
                pass
        assert all(owner is not None for owner, _ in self.epochs.values()), "a lane is nobody's"
        self.both_say_the_same()
        self._word_comes_at_last()
        left = self.expected.ought_to_be_delivered()
        assert not left, f"due and never delivered: {left}"

    def _much_is_refused_at_the_end(self) -> None:
        """And is left so while its days are over, and others stand where it stood: a story seldom comes to that."""
        for which, hand in enumerate(self.fleet.hands):
            if not hand.asleep:
                self.one_answer_for_all(which, NEVER, "")
        self.drop_what_is_over()
        self.both_say_the_same()
        self.others_take_their_places([(["plain", "ordered"], SUBJECTS[0])] * 4, Door(0, True, "at once"))
        self.both_say_the_same()

    def _somebody_comes_at_the_end(self) -> None:
        """Whoever is at work leaves him lanes, and takes nothing more of what he stores there meanwhile."""
        self._accepts([([*PLACES], None)], 0, wake=True)
        for hand in self.fleet.hands:
            self._delivers(hand)
        self.one_more_dispatcher()
        self.both_say_the_same()
        for which, hand in enumerate(self.fleet.hands):
            self.run(hand.beat())
            self.both_say_the_same()
            self._accepts([([*PLACES], None)], 0, wake=False, door=Door(which, False, "at once"))

    def _word_comes_at_last(self) -> None:
        """Of what has been delivered by then, to one who took over from all others."""
        last = next((hand for hand in self.fleet.hands if hand.words), None)
        if last is None:
            return
        for other in [hand for hand in self.fleet.hands if hand is not last]:
            self.fleet.hands.remove(other)
            self.run(other.leave())
        self.both_say_the_same()
        self.run(last.beat())
        self.both_say_the_same()
        self._goes_on(last)
        self._hears(last, wake=False)
        while self._goes_on(last):
            pass
        self.both_say_the_same()

    def _a_clean_slate(self) -> None:
        """What was learned of a destination is forgotten when somebody holds and releases it; what comes meanwhile waits."""
        for hand in self.fleet.hands:
            self._delivers(hand)
        for place in PLACES:
            self.hold_or_release(place, release=False)
        for which in range(len(self.fleet.hands)):
            self._accepts([([*PLACES], None)], 0, wake=False, door=Door(which, True, "at once"))
            self.both_say_the_same()
        for place in PLACES:
            self.hold_or_release(place, release=True)

    def _goes_on(self, hand: Hand) -> bool:
        began = self._delivers(hand)
        for tried in list(hand.tries):
            self._answers(hand, tried, Delivered("r1", status=200))
        done = hand.done
        self._settles(hand)
        return bool(began or done)


@pytest.mark.timeout(3600)
def test_whatever_happens_in_whatever_order_the_outbox_keeps_its_promises(dsn: str) -> None:
    async def open_all(parts: AsyncExitStack) -> Fleet:
        house = await parts.enter_async_context(house_on(dsn))
        people = await Database.connect(dsn, size=2)
        parts.push_async_callback(people.close)
        tracing = Tracing.start(None, 0.0, "test")
        parts.callback(tracing.close)
        outbox = Watched(intake=house.intake, dispatch=house.dispatch)
        return Fleet(house, outbox, people, Metrics(), tracing)

    with asyncio.Runner() as runner:
        parts = AsyncExitStack()
        fleet = runner.run(open_all(parts))
        try:
            run_state_machine_as_test(lambda: Machine(fleet, runner.run), settings=_depth())
            assert fleet.taken, "nothing was ever taken without a read"
        finally:
            runner.run(parts.aclose())


def _depth() -> settings:
    """Some stories, always the same ones; with another profile than the usual one, as that one says."""
    told = settings.get_current_profile_name()
    if told != "default":
        return settings(settings.get_profile(told), deadline=None, suppress_health_check=list(HealthCheck))
    return settings(
        max_examples=20, stateful_step_count=30, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck), print_blob=False, phases=[Phase.generate],  # a story is short enough
    )  # fmt: skip
