"""Delivers what is due: wake → read → deliver → settle.

    beat     every second: renew the lease, see who lives, take a fair share of the lanes, give back what is too much
    read     one statement over the lanes that were woken and have room
    deliver  one task an attempt, as many as the destination's gate lets through
    settle   one statement for whatever has come of them meanwhile

All that it knows is memory: the database holds what is owed, and whoever takes a lane over starts from there.
"""

import asyncio
import heapq
import os
import re
import socket
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from random import random

import structlog
from msgspec.structs import replace

from observability.failpoints import failpoint
from observability.logs import DEBUG
from observability.metrics import DestinationMetrics, Metrics
from observability.names import LogEvent, SpanName
from observability.tracing import Tracing
from outbox.careful import Trials
from outbox.clock import DatabaseClock
from outbox.database import Database, Unavailable
from outbox.ending import end
from outbox.event import Connector, Delivered, Delivery, Outcome, OutcomeKind, Pending, Retry, Unknown, kind_of
from outbox.gate import BackOff, Gate, HoldForCause
from outbox.lanes import BEGINNING, OwnedLane
from outbox.overdue import Overdue, Watched
from outbox.presence import Presence
from outbox.retry import DELIVERED, Decision, Schedule, Verdict, decide
from outbox.store import WAKE, Beat, Lane, Outbox, Settled, Settlement, Taken, delivery_of
from outbox.waking import lanes_in

log = structlog.get_logger()

LEASE = timedelta(seconds=10)
BEAT = timedelta(seconds=1)
GRACE = timedelta(seconds=5)  # beyond a connector's own deadline, before its attempt is cut off
LARGEST_SETTLE = 1000
LONGEST_IDLE = timedelta(milliseconds=500)  # between polls
WORTH_A_TIMER = timedelta(seconds=10)
PUT_OFF = timedelta(minutes=1)  # a delivery whose outcome cannot be written
YOUNG = timedelta(seconds=2)  # a server that was started so recently has not yet seen everybody come back
SILENT = BEAT * 1.2  # who lives renews its lease with each beat
FAILED_JUST_NOW = timedelta(seconds=5)
NO_TIME = timedelta(0)
TRUST = timedelta(seconds=5)  # so long the others have to draw their lines to a server that is new, or cut off ours
MISSED = timedelta(seconds=0.7)  # a dispatcher whose line is missing for so long was killed; else it is drawn again
FAREWELL = timedelta(seconds=5)  # at the end, to settle what is done and hand over the rest
ALL = 1_000_000  # tasks: as many as there is work for
KEPT_FREE = 8  # a lane leaves one of so many places of its destination to the others
KILLS = 3  # so many processes a delivery may take down before it is buried


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A destination as the configuration has it."""

    number: int
    name: str
    lanes: int
    connector: Connector
    schedule: Schedule
    timeout: timedelta
    concurrency: int
    per_second: float | None

    @property
    def repeatable(self) -> bool:
        """The partner keeps idempotency keys: what may have happened may be sent again."""
        return bool(getattr(self.connector, "keeps_keys", False))

    @property
    def patience(self) -> float:
        """Seconds after which an attempt is cut off."""
        return (self.timeout + GRACE).total_seconds()


class Dispatcher:
    """One process' share of the lanes."""

    def __init__(
        self,
        outbox: Outbox,
        *,
        database: Database,
        clock: DatabaseClock,
        metrics: Metrics,
        tracing: Tracing,
        lease: timedelta = LEASE,
    ) -> None:
        self._outbox = outbox
        self._database = database
        self._clock = clock
        self._metrics = metrics
        self._tracing = tracing
        self._lease = lease
        self._number = 0
        self._lease_ends = 0.0  # on the monotonic clock
        self._targets: Mapping[int, Target] = {}
        self._gates: dict[int, Gate] = {}
        self._counts: dict[int, DestinationMetrics] = {}
        self._lanes: dict[int, OwnedLane] = {}
        self._turns: dict[int, deque[OwnedLane]] = {}  # by destination: lanes that have something to deliver
        self._attempts: set[asyncio.Task[None]] = set()
        self._trials = Trials()
        self._overdue = Overdue()
        self._done: list[Settlement] = []
        self._timers: list[tuple[float, int]] = []  # (monotonic, lane): something may be due there
        self._failed_at = float("-inf")  # a loop, by a bug
        self._left = database.left
        self._trusting_until = float("-inf")  # on the monotonic clock: whose line is not seen may be drawing it
        self._cut_off_until = float("-inf")  # likewise: our own line was cut just now, and so theirs may be
        self._missing: dict[int, float] = {}  # since when, by that clock: their lease runs, and no line is seen
        self._lane_counts: Mapping[int, int] = {}  # as the last beat counted them, by destination
        self._polled_at = 0.0  # when all lanes were looked at, on the monotonic clock
        self._work = asyncio.Event()
        self._to_settle = asyncio.Event()
        self._settling_fails = False
        self._destinations_changed = True
        self._floor = BEGINNING  # whatever is committed after the last sweep is due after this
        self._stopping = False
        self._loops: list[asyncio.Task[None]] = []
        self._presence: Presence | None = None

    # ── life ─────────────────────────────────────────────────────────────────────────────────────

    async def start(self, targets: Iterable[Target]) -> None:
        """Present and at work when it returns; raises Unavailable."""
        self.retarget(targets)
        await self._introduce()
        await self._beat_once()
        for loop in (self._beat, self._read, self._settle, self._overdue.watch):
            self._loops.append(asyncio.create_task(self._keep_at(loop)))

    def retarget(self, targets: Iterable[Target]) -> None:
        """From now on these; what is in flight ends as it began."""
        self._targets = {target.number: target for target in targets}
        for number, target in self._targets.items():
            if before := self._counts.get(number):
                before.tell()
            self._counts[number] = self._metrics.of_destination(target.name)
            if gate := self._gates.get(number):
                gate.configure(most=target.concurrency, per_second=target.per_second)
            else:
                self._gates[number] = Gate(most=target.concurrency, per_second=target.per_second)
        self._destinations_changed = True
        self._work.set()

    async def stop(self, drain: timedelta) -> None:
        """Start nothing more, hand over the lanes that are idle, wait for what is in flight, settle it, hand over the rest."""
        self._stopping = True
        for own in self._lanes.values():
            own.leaving = True
            own.empty()
        if self._attempts:
            await asyncio.wait(self._attempts, timeout=drain.total_seconds())
        cut_off = {own.lane.number for own in self._lanes.values() if own.in_flight}
        for task in self._attempts:
            task.cancel()
        if self._attempts:
            await asyncio.wait(self._attempts, timeout=1)  # they tell that they were cut off
        last = asyncio.get_running_loop().time() + FAREWELL.total_seconds()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(last):
                while self._done:
                    self._to_settle.set()
                    await asyncio.sleep(0.01)
        await end(*self._loops)
        with suppress(TimeoutError):  # a connector that does not let itself be cut off is left behind
            async with asyncio.timeout(5):
                await end(*self._attempts)
        failpoint("dispatch.before_give_back")
        with suppress(Unavailable, TimeoutError):  # to a Postgres that answers no more nothing can be handed over
            async with asyncio.timeout_at(max(last, asyncio.get_running_loop().time() + 1)):
                await self._outbox.give_back(
                    [own.lane for own in self._lanes.values() if own.lane.number not in cut_off]
                )
                await self._outbox.notify(WAKE, "")
                await self._outbox.leave(self._number)
        for counts in self._counts.values():
            counts.tell()
        self._lanes.clear()
        if self._presence is not None:
            await self._presence.close()

    def wake(self, due: Mapping[int, datetime]) -> Mapping[int, datetime]:
        """Something is due in these lanes; returns those that are not ours."""
        others = {}
        for number, at in due.items():
            lane = self._lanes.get(number)
            if lane is None:
                others[number] = at
            else:
                lane.rewind(at)
        self._work.set()
        return others

    def take(self, fresh: Taken) -> bool:
        """This process has just stored it: if its lane is ours, and nothing waits to be read there, it is not read either."""
        own = self._lanes.get(fresh.lane)
        if own is None or own.lane.destination not in self._targets:
            return False
        if self._gates[own.lane.destination].opens_at(self._clock.now()) is not None or not own.take_fresh(fresh):
            return False
        self._work.set()
        return True

    @property
    def alive(self) -> bool:
        """Its loops turn, none has failed just now, and its lease runs."""
        turning = bool(self._loops) and not any(loop.done() for loop in self._loops)
        return turning and self._leased() and time.monotonic() - self._failed_at > FAILED_JUST_NOW.total_seconds()

    async def _keep_at(self, loop: Callable[[], Awaitable[None]]) -> None:
        """A bug in a loop is told and the loop goes on: what it did not finish still stands in the database.

        While it goes on failing the dispatcher is not alive, and who watches its readiness is told.
        """
        while True:
            try:
                await loop()
            except Exception:
                name = f"dispatcher{loop.__name__}"
                self._failed_at = time.monotonic()
                self._metrics.task_failures.labels(name).inc()
                log.exception(LogEvent.TASK_FAILED, task=name)
                await asyncio.sleep(1)

    # ── beat ─────────────────────────────────────────────────────────────────────────────────────

    async def _introduce(self) -> None:
        """Under a number that counts only once its line is drawn: without one, nobody else would believe that it lives."""
        number = await self._outbox.register(f"{socket.gethostname()}:{os.getpid()}", self._lease)
        if self._presence is not None:
            await self._presence.close()
        presence = Presence(
            self._database,
            dispatcher=number,
            woken=self._heard,
            destinations_changed=self._heard_of_destinations,
            lost=self._line_lost,
        )
        await presence.open()
        self._number, self._presence = number, presence

    async def _beat(self) -> None:
        away = False
        while True:
            await asyncio.sleep((MISSED if self._missing else BEAT).total_seconds())
            try:
                await self._beat_once()
                await self._sweep()
            except Unavailable:
                away = True
                self._floor = BEGINNING  # whoever answers next may have another clock
                log.warning(LogEvent.POSTGRES_AWAY, part="dispatcher")
            else:
                if away:
                    log.info(LogEvent.POSTGRES_BACK, part="dispatcher")
                away = False

    async def _beat_once(self) -> None:
        failpoint("dispatch.beat")
        asked = time.monotonic()
        beat = await self._outbox.beat(self._number, self._lease, leaving=self._stopping, knows=self._targets)
        if beat is None:  # it slept so long that it was struck off
            await self._introduce()
            self._lose(lane.lane for lane in list(self._lanes.values()))
            return
        self._lease_ends = asked + self._lease.total_seconds()
        if self._left != self._database.left:
            self._left = self._database.left
            self._begin_anew()
        if self._presence is not None and not beat.seen:
            self._presence.redraw()
        standing = await self._outbox.owned(self._number)
        self._lose(
            [own.lane for own in list(self._lanes.values()) if (own.lane.number, own.lane.epoch) not in standing]
        )
        for lane in standing.values():  # leased by a statement whose answer was lost
            if lane.number not in self._lanes:
                await self._take_over([lane])
        self._lane_counts = beat.lanes
        gone = self._known_to_be_gone(beat)
        living = {peer.number: peer.knows for peer in beat.peers if not peer.leaving and peer.number not in gone}
        await self._share(living, gone)
        for own in list(self._lanes.values()):
            if own.leaving and own.idle:
                await self._outbox.give_back([own.lane])
                self._lanes.pop(own.lane.number, None)
        for number, target in self._targets.items():
            owned = sum(own.lane.destination == number for own in self._lanes.values())
            self._gates[number].scale(owned / self._lanes_of(target))
        self._metrics.lanes_owned.set(len(self._lanes))

    def _known_to_be_gone(self, beat: Beat) -> set[int]:
        """Those whose line is missing for some time, and who are not heard of otherwise.

        Postgres lets a line go the moment a process is killed, and also when only the connection is cut or Postgres
        itself is started again: then it is soon there again.  Whoever came here meanwhile has not seen that happen.
        """
        now = time.monotonic()
        missing = [peer for peer in beat.peers if not peer.present]
        self._missing = {peer.number: self._missing.get(peer.number, now) for peer in missing}
        if now < self._cut_off_until or beat.up < YOUNG:
            return set()
        return {
            peer.number
            for peer in missing
            if now - self._missing[peer.number] >= MISSED.total_seconds() and peer.silent > SILENT
        }

    async def _share(self, living: Mapping[int, Collection[int]], gone: Collection[int]) -> None:
        """As many lanes as the others: all of them over those who live and know their destination, the rest by rank.

        Configurations may differ for a while.  Destinations that the same ones know are shared among these, so that
        nobody leaves lanes to a dispatcher that could not deliver from them.
        """
        together: dict[tuple[int, ...], list[Target]] = {}
        for number, target in self._targets.items():
            who = {other for other, known in living.items() if number in known} | {self._number}
            together.setdefault(tuple(sorted(who)), []).append(target)
        for own in self._lanes.values():
            if own.lane.destination not in self._targets:
                self._leave(own)
        for knowing, targets in together.items():
            await self._share_among(knowing, targets, gone)

    async def _share_among(self, knowing: Sequence[int], targets: Sequence[Target], gone: Collection[int]) -> None:
        destinations = [target.number for target in targets]
        total = sum(map(self._lanes_of, targets))
        share = total // len(knowing) + (knowing.index(self._number) < total % len(knowing))
        staying = [own for own in self._lanes.values() if not own.leaving and own.lane.destination in destinations]
        for own in staying[share:]:
            self._leave(own)
        if len(staying) < share and not self._stopping and time.monotonic() > self._trusting_until:
            failpoint("dispatch.before_lease")
            lanes = await self._outbox.lease(self._number, destinations, share - len(staying), gone=gone)
            failpoint("dispatch.leased")
            await self._take_over(lanes)

    def _lanes_of(self, target: Target) -> int:
        """Others may have a newer file, and have given it more lanes than ours told."""
        return max(target.lanes, self._lane_counts.get(target.number, 0))

    def _leave(self, own: OwnedLane) -> None:
        own.leaving = True
        own.empty()

    async def _take_over(self, lanes: Sequence[Lane]) -> None:
        vanished = [lane.number for lane in lanes if lane.vanished]
        marked = await self._outbox.marked(vanished) if vanished else {}
        for lane in lanes:
            target = self._targets.get(lane.destination)  # None: a reload came in between; it is given back
            own = OwnedLane(
                lane,
                careful=target.concurrency if target else 1,
                lanes=self._lanes_of(target) if target else 1,
                marked=marked.get(lane.number, ()),
            )
            own.leaving = target is None
            self._lanes[lane.number] = own
            self._metrics.takeovers.labels(careful=str(lane.vanished).lower()).inc()
        for careful in {lane.vanished for lane in lanes}:
            taken = [lane for lane in lanes if lane.vanished == careful]
            names = {self._name(lane.destination) for lane in taken}
            log.info(LogEvent.LANES_TAKEN_OVER, lanes=len(taken), destinations=sorted(names), careful=careful)
        self._work.set()

    async def _sweep(self) -> None:
        """What was committed late stands behind the watermarks: read again from where it can be."""
        floor = await self._outbox.oldest_writer()
        for own in self._lanes.values():
            own.sweep(self._floor, floor)
        self._floor = floor
        self._destinations_changed = True
        self._work.set()

    def _begin_anew(self) -> None:
        """Postgres was started again, or another server took over.

        Advisory locks did not come along, so for a moment nobody is seen to live: nobody's lanes are taken then.
        What was committed last may not have come along either, and its clock may be another: all is read again.
        """
        self._trusting_until = time.monotonic() + TRUST.total_seconds()
        self._floor = BEGINNING
        for own in self._lanes.values():
            own.sweep(BEGINNING, BEGINNING)
        self._work.set()

    def _line_lost(self, reason: str) -> None:
        """What cut off our line may have cut off the others': for a moment nobody is believed to be gone."""
        self._cut_off_until = time.monotonic() + TRUST.total_seconds()
        self._metrics.presence_lost.labels(reason).inc()

    def _lose(self, lanes: Iterable[Lane]) -> None:
        for lane in lanes:
            if self._lanes.pop(lane.number, None) is not None:
                self._metrics.fenced.inc()
                log.warning(LogEvent.LANE_LOST, lane=lane.number, epoch=lane.epoch)

    def _leased(self) -> bool:
        return time.monotonic() < self._lease_ends

    def _heard(self, payload: str) -> None:
        named = lanes_in(payload) or dict.fromkeys(self._lanes)  # nothing named: anything may have been missed
        for number, at in named.items():
            if own := self._lanes.get(number):
                own.rewind(at or self._floor)
        self._work.set()

    def _heard_of_destinations(self) -> None:
        self._destinations_changed = True
        self._work.set()

    # ── read ─────────────────────────────────────────────────────────────────────────────────────

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._work.clear()
            try:
                if self._destinations_changed:
                    await self._look_at_destinations()
                await self._open_keys()
                more = await self._read_once()
            except Unavailable:
                await asyncio.sleep(0.2)
                continue
            if self._start(1):
                await asyncio.sleep(0)  # it begins, and works off alone whatever it need not wait for
                self._start()
            if not more:
                poll = loop.call_later(self._idle(), self._work.set)
                await self._work.wait()
                poll.cancel()
            self._ring()

    async def _look_at_destinations(self) -> None:
        self._destinations_changed = False
        standings = await self._outbox.standings()
        now = self._clock.now()
        for number, gate in self._gates.items():
            gate.stand(standings.get(number), now)
        for own in self._at_work():
            if self._gates[own.lane.destination].held(now):
                own.empty()  # what was read and not started must not slip out after the hold
            else:
                own.dirty = True

    def _at_work(self) -> list[OwnedLane]:
        """The lanes that are read and delivered from: those that stay here, of destinations that are configured."""
        return [own for own in self._lanes.values() if not own.leaving and own.lane.destination in self._targets]

    async def _open_keys(self) -> None:
        """Subjects whose delivery is settled or due again: the next of each, before anything behind it is read."""
        now = self._clock.now()
        wanted: list[tuple[OwnedLane, int]] = []
        for own in self._at_work():
            if not self._gates[own.lane.destination].held(now):
                wanted += [(own, key) for key in own.keys_to_open(now)]
        if not wanted:
            return
        try:
            rows = await self._outbox.next_of_keys([(own.lane.number, key) for own, key in wanted])
        except BaseException:
            for own, key in wanted:
                own.to_open[key] = None
            raise
        found = {(row.lane, row.key): row for row in rows}
        for own, key in wanted:
            own.opened(key, found.get((own.lane.number, key)), self._clock.now())
            if own.leaving:
                own.empty()
        self._tell_orphans(rows)

    async def _read_once(self) -> bool:
        """True where there was more than there was room for."""
        if self._stopping:
            return False
        now, readings = self._clock.now(), {}
        for own in self._at_work():
            if self._gates[own.lane.destination].opens_at(now) is None and (reading := own.reading()):
                readings[own.lane.number] = (own, reading)
        if not readings:
            return False
        rows = await self._outbox.read([reading for _, reading in readings.values()])
        failpoint("dispatch.read")
        by_lane: dict[int, list[Taken]] = {number: [] for number in readings}
        for row in rows:
            by_lane[row.lane].append(row)
        for number, (own, reading) in readings.items():
            own.take(reading, by_lane[number], self._clock.now())
            if own.leaving:
                own.empty()
        self._tell_orphans(rows)
        return any(own.wants_reading for own, _ in readings.values())

    def _tell_orphans(self, rows: Iterable[Taken]) -> None:
        """A row without its event cannot be delivered; it stays, and is an alarm."""
        for row in rows:
            if row.event is None:
                self._metrics.orphans.inc()
                log.error(LogEvent.PENDING_ORPHANED, event_id=row.event_id, lane=row.lane)

    def _idle(self) -> float:
        """Seconds until something is to be looked at without having been told."""
        now, soonest = self._clock.now(), LONGEST_IDLE.total_seconds()
        if self._timers:
            soonest = min(soonest, self._timers[0][0] - time.monotonic())
        for own in self._at_work():
            if own.buffer and (token := self._gates[own.lane.destination].next_token_in(now)) is not None:
                soonest = min(soonest, token)
        return max(0.0, soonest)

    def _ring(self) -> None:
        """Lanes whose time has come, and now and then all of them."""
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, number = heapq.heappop(self._timers)
            if own := self._lanes.get(number):
                own.dirty = True
        if now >= self._polled_at + LONGEST_IDLE.total_seconds():
            self._polled_at = now
            for own in self._lanes.values():
                own.dirty = True

    def _at(self, when: datetime, lane: int) -> None:
        """Look at this lane then; what is further off is found by the polls, soon enough."""
        wait = (when - self._clock.now()).total_seconds()
        if wait < WORTH_A_TIMER.total_seconds():
            heapq.heappush(self._timers, (time.monotonic() + wait + 0.001, lane))

    # ── deliver ──────────────────────────────────────────────────────────────────────────────────

    def _start(self, most: int = ALL) -> bool:
        """As many attempts as the gates let through, at `most` so many tasks a destination; whether more are to be made.

        The lane that had its turn longest ago comes first, and none alone takes the last eighth of the places: a party
        that floods leaves some free for another, who would have to wait for the end of an attempt.
        """
        now = self._clock.now()
        self._turns = {number: deque() for number in self._targets}
        at_work = sorted(self._at_work(), key=lambda own: own.started_at)
        lanes = Counter(own.lane.destination for own in at_work)
        limits = {number: self._gates[number].limit for number in lanes}
        shares = {n: limit - (limit // KEPT_FREE if lanes[n] > 1 else 0) for n, limit in limits.items()}
        for own in at_work:
            own.most_in_flight = shares[own.lane.destination]
            if own.buffer:
                self._turns[own.lane.destination].append(own)
        more = False
        for number, turns in self._turns.items():
            target, gate = self._targets[number], self._gates[number]
            room = gate.room(now) if turns and self._may_start() else 0
            more |= room > most and (len(turns) > 1 or (bool(turns) and len(turns[0].buffer) > most))
            for _ in range(min(room, most)):
                if (first := self._next(number)) is None:
                    break
                task = asyncio.create_task(self._work_off(first, self._begun(first, gate), target, gate))
                self._attempts.add(task)
                task.add_done_callback(self._attempts.discard)
            self._counts[number].tell_gate(in_flight=gate.in_flight, limit=gate.limit, paused=gate.paused)
        for counts in self._counts.values():
            counts.tell()
        return more

    def _may_start(self) -> bool:
        """What is settled too late is done twice; what was leased too long ago is somebody else's."""
        return not self._stopping and not self._settling_fails and self._leased() and len(self._done) <= LARGEST_SETTLE

    def _next(self, destination: int) -> OwnedLane | None:
        """The lane whose turn it is; the others of the destination come before it comes again."""
        turns = self._turns[destination]
        for _ in range(len(turns)):
            own = turns.popleft()
            ours = self._lanes.get(own.lane.number) is own and not own.leaving
            if ours and own.buffer and (not own.careful or self._may_be_tried(own)):
                turns.append(own)
                if own.in_flight < own.most_in_flight:
                    return own
        return None

    def _may_be_tried(self, own: OwnedLane) -> bool:
        """In careful mode: one of a lane at a time, and of all lanes where one is marked."""
        return not own.in_flight and self._trials.may_begin(own.buffer[0], own.marked)

    def _begun(self, own: OwnedLane, gate: Gate) -> Taken:
        own.in_flight += 1
        own.started_at = time.monotonic()
        gate.started()
        taken = own.buffer.popleft()
        if own.careful:
            self._trials.begin(taken, own.marked)
        return taken

    async def _work_off(self, own: OwnedLane, taken: Taken, target: Target, gate: Gate) -> None:
        """An attempt, and then the next one of the destination, as long as there are some and its gate lets them through.

        A task of its own for each would cost as much as all that is done around an attempt.
        """
        with self._overdue.watched() as watched:
            room = await self._attempt(own, taken, target, gate, watched)
            while room > 0 and self._may_start() and self._targets.get(target.number) is target:
                if (following := self._next(target.number)) is None:
                    return
                room = await self._attempt(following, self._begun(following, gate), target, gate, watched)

    async def _attempt(self, own: OwnedLane, taken: Taken, target: Target, gate: Gate, watched: Watched) -> int:
        """One try, from the lane to the settle; nothing that goes wrong in it is lost.  How many more may start now."""
        settlement: Settlement | None = None
        outcome: Outcome | None = None
        careful = taken in self._trials
        try:
            if careful and await self._outbox.suspect(taken) >= KILLS:
                settlement = self._buried(own, taken, target)
            elif self._leased():  # if not, it slept: its successor may be at it
                settlement, outcome = await self._tried(own, taken, target, watched)
        except Unavailable:
            pass
        except Exception as error:
            log.exception(LogEvent.DELIVERY_FAILED, event_id=taken.event_id, destination=target.name)
            outcome, later = Retry(f"bug: {type(error).__name__}"), Decision(verdict=Verdict.LATER, delay=PUT_OFF)
            settlement = _settlement(own, taken, target, outcome, later, self._clock.now(), timedelta(0), None)
        finally:
            own.in_flight -= 1
            if settlement is None:
                own.forget(taken)
            else:
                self._done.append(settlement)
            ended = settlement.at + settlement.took if settlement is not None else self._clock.now()
            room = self._ended(own, gate, target, outcome, ended)
            if careful:
                await self._lived_to_tell(taken)
        return room

    async def _lived_to_tell(self, taken: Taken) -> None:
        """Whatever came of it, it killed nobody; the next suspect may be tried."""
        try:
            with suppress(Unavailable):
                await self._outbox.clear(taken)
        finally:
            self._trials.end(taken)
            self._work.set()

    async def _tried(
        self, own: OwnedLane, taken: Taken, target: Target, watched: Watched
    ) -> tuple[Settlement, Outcome]:
        assert taken.event is not None
        delivery = delivery_of(taken, target.name, target.schedule.give_up)
        at = self._clock.now()
        with self._tracing.attempt(
            taken.event_id,
            target.name,
            delivery.attempt,
            taken.event.traceparent,
            at - taken.event.received_at,
            replayed=taken.attempts > 0 and taken.attempts == taken.spared,
        ) as span:
            outcome, decision = await self._try(target, taken, delivery, watched)
            span.ended(
                kind_of(outcome).word,
                failed=decision is not DELIVERED and not isinstance(outcome, Pending),
            )
        took = max(self._clock.now() - at, NO_TIME)  # the clock may have been set meanwhile
        return _settlement(own, taken, target, outcome, decision, at, took, span.trace), outcome

    async def _try(
        self, target: Target, taken: Taken, delivery: Delivery, watched: Watched
    ) -> tuple[Outcome, Decision]:
        """Ask the connector, and judge what it says.

        After the first try it is asked first what became of the earlier ones: one may have taken effect though its
        answer was lost, and one that answered Pending ends by what `lookup` says.

        What it raises, or says that is no outcome, is a bug of ours (or its author's) and becomes a retry, with its stack.
        """
        watched.begin(target.patience)
        try:
            failpoint("dispatch.before_attempt")
            found = await target.connector.lookup(delivery) if delivery.attempt > 1 else None
            outcome = sound(found or await target.connector.deliver(delivery))
            if isinstance(outcome, Unknown) and (found := await target.connector.lookup(delivery)):
                outcome = sound(found)
            failpoint("dispatch.answered")
            if isinstance(outcome, Delivered):  # nothing is to be judged
                return outcome, DELIVERED
        except asyncio.CancelledError:
            if not watched.was_cut_off:
                raise
            outcome = Unknown("no end of the attempt in time")
        except Exception as error:
            log.exception(LogEvent.DELIVERY_FAILED, event_id=delivery.event.id, destination=delivery.destination)
            outcome = Retry(f"bug: {type(error).__name__}")
        finally:
            watched.end()
        return outcome, self._decide(target, taken, delivery, outcome)

    def _decide(self, target: Target, taken: Taken, delivery: Delivery, outcome: Outcome) -> Decision:
        return decide(
            outcome,
            schedule=target.schedule,
            tries=taken.attempts + 1 - taken.spared,
            spared=taken.spared,
            now=self._clock.now(),
            deadline=delivery.deadline,
            repeatable=target.repeatable,
            random=random,
        )

    def _ended(self, own: OwnedLane, gate: Gate, target: Target, outcome: Outcome | None, now: datetime) -> int:
        """How many more may start now."""
        paused = gate.paused
        measure = gate.ended(outcome, now, first_wait=target.schedule.first)
        if gate.paused != paused:
            log.warning(LogEvent.BREAKER_OPENED if gate.paused else LogEvent.BREAKER_CLOSED, destination=target.name)
        if outcome is not None:
            self._counts[target.number].ended(kind_of(outcome).word)
        if measure is not None:
            task = asyncio.create_task(self._tell_others(target, measure))
            self._attempts.add(task)
            task.add_done_callback(self._attempts.discard)
        self._to_settle.set()
        room = gate.room(now)
        if room <= 1 or own.buffer or own.dirty or any(other.buffer for other in self._turns.get(target.number, ())):
            self._work.set()  # else there is nothing to read or start: a round for nothing is dear to what comes alone
        return room

    async def _tell_others(self, target: Target, measure: BackOff | HoldForCause) -> None:
        """Whoever owns the destination's lanes next treats it as we do.  It is a courtesy: our own gate knows already."""
        with suppress(Unavailable):
            match measure:
                case BackOff(until=until):
                    await self._outbox.leave_alone(target.number, until)
                case HoldForCause(until=until, reason=reason):
                    log.error(
                        LogEvent.DESTINATION_HELD, destination=target.name, reason=reason, until=until.isoformat()
                    )
                    await self._outbox.hold_for_cause(target.number, until, reason)

    def _buried(self, own: OwnedLane, taken: Taken, target: Target) -> Settlement:
        """It took down three processes, and is not tried again."""
        outcome, decision = Unknown("killed the dispatcher"), Decision(verdict=Verdict.DEAD)
        return _settlement(own, taken, target, outcome, decision, self._clock.now(), timedelta(0), None)

    # ── settle ───────────────────────────────────────────────────────────────────────────────────

    async def _settle(self) -> None:
        """A batch leaves as soon as the one before is written."""
        while True:
            epochs = {number: own.lane.epoch for number, own in self._lanes.items()}
            self._done = [s for s in self._done if epochs.get(s.lane) == s.epoch]  # the others' successor has them
            batch = self._done[:LARGEST_SETTLE]
            if not batch:
                self._settling_fails = False  # what could not be written is the others' now
                self._to_settle.clear()
                await self._to_settle.wait()
                continue
            try:
                settled, left = await self._write(batch)
            except Unavailable:
                self._settling_fails = True
                await asyncio.sleep(0.2)
                continue
            if self._settling_fails or len(self._done) > LARGEST_SETTLE:
                self._work.set()  # nothing was started meanwhile
            self._settling_fails = False
            self._done = left + self._done[len(batch) :]
            for settlement, again in settled:
                self._forget_about(settlement, again)
            self._tell(settled)
            if left:
                await asyncio.sleep(0.05)  # a lane that somebody holds: not at once again

    async def _write(
        self, batch: list[Settlement]
    ) -> tuple[list[tuple[Settlement, datetime | None]], list[Settlement]]:
        """What is settled, with when retries are due, and what is to be settled again.

        On an error that is in what is written, one by one: only the guilty one is put off, and its stack is told.
        """
        try:
            failpoint("dispatch.before_settle")
            settled = await self._outbox.settle(batch)
            failpoint("dispatch.settled")
        except Unavailable:
            raise
        except Exception:
            if len(batch) > 1:
                each = [await self._write([settlement]) for settlement in batch]
                return [done for some, _ in each for done in some], [left for _, some in each for left in some]
            [settlement] = batch
            log.exception(
                LogEvent.DELIVERY_FAILED,
                event_id=settlement.taken.event_id,
                destination=self._name(settlement.destination),
            )
            simpler = put_off(settlement)
            if simpler == settlement:
                return [], []  # not even that: it is left alone until its lane has another owner
            return await self._write([simpler])
        left = await self._again([s for n, s in enumerate(batch) if n not in settled.done], settled)
        return [(batch[n], again) for n, again in settled.done.items()], left

    def _forget_about(self, settlement: Settlement, again: datetime | None) -> None:
        own = self._lanes.get(settlement.lane)
        if own is not None and own.lane.epoch == settlement.epoch:
            own.settled(settlement.taken, again)
            if again is not None:
                self._at(again, own.lane.number)
            if again is not None or own.to_open or own.dirty or own.leaving:
                self._work.set()

    def _tell(self, settled: Sequence[tuple[Settlement, datetime | None]]) -> None:
        now, bound = self._clock.now(), log.bind()  # once: it costs more than what is said with it
        all_is_told = bound.is_enabled_for(DEBUG)
        took: dict[int, list[float]] = {settlement.destination: [] for settlement, _ in settled}
        age: dict[int, list[float]] = {number: [] for number in took}
        for settlement, again in settled:
            taken, number = settlement.taken, settlement.destination
            took[number].append(settlement.took.total_seconds())
            if settlement.verdict == Verdict.DELIVERED:
                age[number].append((now - taken.owed_since).total_seconds())
                if not all_is_told:
                    continue
            facts = {"event_id": taken.event_id, "destination": self._name(number), "attempt": taken.attempts + 1}
            match settlement.verdict:
                case Verdict.DELIVERED:
                    bound.debug(LogEvent.DELIVERY_SETTLED, outcome="delivered", **facts)
                case Verdict.LATER:
                    assert again is not None
                    due_in, reason = round((again - now).total_seconds(), 1), settlement.reason
                    bound.info(LogEvent.DELIVERY_SETTLED, outcome="retry", reason=reason, due_in=due_in, **facts)
                case Verdict.DEAD:
                    bound.warning(LogEvent.DELIVERY_DEAD, cause=settlement.cause, **facts)
                    created = taken.event.traceparent if taken.event else None
                    self._tracing.note(SpanName.DEAD_LETTER, created, taken.event_id, {})
        for number, seconds in took.items():
            self._counts[number].attempt_seconds.observe_each(seconds)
            self._counts[number].delivery_seconds.observe_each(age[number])

    async def _again(self, unsettled: list[Settlement], settled: Settled) -> list[Settlement]:
        """What could not be settled: fenced is forgotten, moved is looked for, skipped is tried again."""
        fenced = [s for s in unsettled if (s.lane, s.epoch) not in settled.standing]
        self._lose({Lane(s.lane, s.destination, s.epoch) for s in fenced if self._owns(s)})
        ours = [s for s in unsettled if (s.lane, s.epoch) in settled.standing]
        places = await self._outbox.places([s.taken for s in ours]) if ours else {}
        left = []
        for settlement in ours:
            place = places.get((settlement.lane, settlement.taken.event_id))
            if place is not None:
                left.append(replace(settlement, taken=replace(settlement.taken, place=place)))
            elif own := self._lanes.get(settlement.lane):
                own.forget(settlement.taken)
                self._work.set()
        return left

    def _owns(self, settlement: Settlement) -> bool:
        own = self._lanes.get(settlement.lane)
        return own is not None and own.lane.epoch == settlement.epoch

    def _name(self, destination: int) -> str:
        target = self._targets.get(destination)
        return target.name if target else str(destination)


def _settlement(
    own: OwnedLane,
    taken: Taken,
    target: Target,
    outcome: Outcome,
    decision: Decision,
    at: datetime,
    took: timedelta,
    trace: str | None,
) -> Settlement:
    return Settlement(
        lane=own.lane.number,
        epoch=own.lane.epoch,
        taken=taken,
        destination=target.number,
        verdict=decision.verdict,
        delay=decision.delay,
        spared=decision.spared,
        outcome=kind_of(outcome),
        status=outcome.status if outcome.status is not None and 0 <= outcome.status < 2**15 else None,
        reason=_storable(getattr(outcome, "reason", None)),
        receipt=_storable(getattr(outcome, "receipt", None)) or None,
        at=at,
        took=took,
        trace=trace,
        cause=cause_of(target.name, outcome) if decision.verdict == Verdict.DEAD else None,
    )


def sound(outcome: Outcome) -> Outcome:
    """An outcome that can be judged and stored; what is none raises, whoever made it."""
    if not isinstance(outcome, Outcome):
        raise TypeError(f"{type(outcome).__name__} is no outcome")
    if isinstance(outcome, Delivered) and isinstance(outcome.receipt, str) and isinstance(outcome.status, int | None):
        return outcome
    words = (getattr(outcome, "reason", ""), getattr(outcome, "receipt", ""))
    if not all(isinstance(word, str) for word in words) or not isinstance(outcome.status, int | None):
        raise TypeError(f"{type(outcome).__name__} holds something that it should not")
    if isinstance(outcome, Retry) and not isinstance(outcome.after, timedelta | None):
        raise TypeError("Retry.after is no timedelta")
    if isinstance(outcome, Pending) and outcome.until.tzinfo is None:
        raise TypeError("Pending.until has no time zone")
    return outcome


def put_off(settlement: Settlement) -> Settlement:
    """What came of it cannot be written: so much can, and it is tried again."""
    return replace(
        settlement,
        verdict=Verdict.LATER,
        delay=PUT_OFF,
        outcome=OutcomeKind.RETRY,
        status=None,
        reason="bug: its outcome could not be written",
        receipt=None,
        cause=None,
    )


def _storable(words: str | None) -> str | None:
    """A connector is somebody else's code: what it says must not be able to stop a settle."""
    return words and words[:300].replace("\0", "").encode(errors="replace").decode()


def cause_of(destination: str, outcome: Outcome) -> str:
    """What dead letters are grouped by: destination:outcome:code, the code a status or the reason's first words."""
    reason: str = getattr(outcome, "reason", "")
    code = (
        str(outcome.status) if outcome.status is not None else re.sub(r"[^A-Za-z0-9._]+", "-", reason).strip("-")[:60]
    )
    return f"{destination}:{kind_of(outcome).word}:{code or 'none'}"
