"""Who is silent, what is missing, who is late: watched over, told in the log, in metrics, and as events of our own."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import structlog

from dead_letter.letters import Instant
from gateway import own_events
from gateway.config import Config
from gateway.config_sections import DAYS, OWN_SOURCE, AnySource, Expected
from gateway.routes import Routes
from gateway.secrets_used import SecretLine, secret_lines
from observability.metrics import Metrics
from observability.names import LogEvent
from outbox.announcements import Announcement, Announcements
from outbox.cadence import Cadence, in_words
from outbox.clock import DatabaseClock, Identities
from outbox.database import Database
from outbox.event import Event
from outbox.expectations import Expectations, Party, Turn, Watched
from outbox.intake_batch import IntakeBatch
from outbox.records import Records, Standing
from outbox.secret_uses import SecretUses
from outbox.sequences import Counted, Sequences, Told
from outbox.store import Arrival, Debt, Destination

log = structlog.get_logger()


class Heard:
    """When each source, and each of its facilities, last posted something proven; the door's memory of it."""

    def __init__(self, database: Database) -> None:
        self._expectations = Expectations(database)
        self._heard: dict[Party, datetime] = {}

    def note(self, source: str, facility: str | None, at: datetime) -> None:
        """On the way of every request: nothing is asked and nothing is written here."""
        self._heard[source, facility or ""] = at

    async def flush(self) -> None:
        """Write it down; what cannot be written now is kept for the next time."""
        heard, self._heard = self._heard, {}
        if not heard:
            return
        try:
            await self._expectations.hear(heard)
        except BaseException:
            self._heard = heard | self._heard
            raise


class Silence:
    """The watch of this process.  Several may keep it: each thing is told once."""

    def __init__(
        self, database: Database, *, batch: IntakeBatch, clock: DatabaseClock, metrics: Metrics, listening: bool
    ) -> None:
        """Only who is `listening` for posts watches over who does not send any."""
        self._expectations = Expectations(database)
        self._sequences = Sequences(database)
        self._announcements = Announcements(database)
        self._batch = batch
        self._clock = clock
        self._identities = Identities(clock.seconds)
        self._metrics = metrics
        self._listening = listening
        self._cadences: Mapping[Party, Cadence] = {}
        self._fields: Mapping[str, str] = {}
        self._within: Mapping[str, timedelta] = {}
        self._routes = Routes({})
        self._destinations: Mapping[str, Destination] = {}

    def adopt(self, config: Config, destinations: Mapping[str, Destination]) -> None:
        self._cadences = cadences(config)
        self._fields = sequence_fields(config)
        self._within = expected_within(config)
        asking = {name: route for name, route in config.routes.items() if own_events.asks_for(route.when)}
        self._routes = Routes(asking, give_up={name: d.retry.give_up for name, d in config.destinations.items()})
        self._destinations = destinations

    async def watch(self) -> None:
        """Look at the sources once."""
        if self._listening and self._cadences:
            stands, turns = await self._expectations.watch(self._cadences)
            self._report(stands)
            for turn in turns:
                _say(turn)
        if self._fields:
            for told in await self._sequences.count(self._fields):
                _say_of_numbers(told)
            counted = await self._sequences.counted(list(self._fields))
            self._metrics.sequence_missing.report({(c.source, c.facility or ""): c.missing for c in counted})
        await self.tell()

    async def judge(self, standings: list[Standing]) -> None:
        """Look at the destinations once."""
        if not self._within:
            return
        for turn in await self._expectations.judge(standings, self._within):
            event = LogEvent.DESTINATION_LATE if turn.late else LogEvent.DESTINATION_RECOVERED
            log.warning(
                event,
                destination=turn.destination,
                waiting=turn.waiting,
                oldest=round(turn.oldest.total_seconds()),
                state=turn.state,
            )
        late = await self._expectations.late()
        self._metrics.destination_late.report({name: float(name in late) for name in self._within})
        await self.tell()

    async def tell(self) -> None:
        """Make events of what there is to say, one after another: what ends comes after what began."""
        while waiting := await self._announcements.waiting():
            for announcement in waiting:
                await self._batch.add(self._arrival(announcement))
            await self._announcements.told(waiting)

    def _report(self, stands: list[Watched]) -> None:
        now = self._clock.now()
        expected = [w for w in stands if w.expected is not None]
        self._metrics.source_silent.report(
            {(w.source, w.facility or ""): float(w.silent_since is not None) for w in expected}
        )
        self._metrics.source_heard_seconds.report(
            {(w.source, w.facility or ""): (now - w.heard_at).total_seconds() for w in expected if w.heard_at}
        )

    def _arrival(self, announcement: Announcement) -> Arrival:
        """Its id is the dedup key: whoever else tells it is not the first."""
        event = Event(
            id=self._identities.next(),
            source=OWN_SOURCE,
            type=announcement.type,
            subject=announcement.subject,
            facility=announcement.facility,
            time=announcement.at,
            data=announcement.data,
            policy=OWN_SOURCE,
            policy_version=1,
            received_at=self._clock.now(),
            traceparent=None,
        )
        text = own_events.as_text(announcement.data)
        same = announcement.id
        return Arrival(event=event, data=text, same=same, digest=same, debts=tuple(self._debts(event)))

    def _debts(self, event: Event) -> list[Debt]:
        """Never to the destination that it is about: that one would be late with it, too."""
        debts = []
        chosen = self._routes.choose(source=event.source, type=event.type, facility=event.facility, data=event.data)
        for owed in chosen:
            if owed.destination != event.data.get("destination"):
                destination = self._destinations[owed.destination]
                lane, key = destination.place(event.id, event.subject, ordered=owed.ordered)
                debts.append(Debt(lane=lane, destination=destination.id, key=key, give_up=owed.give_up))
        return debts


def _say(turn: Turn) -> None:
    event = LogEvent.SOURCE_SILENT if turn.silent else LogEvent.SOURCE_RESUMED
    log.warning(event, source=turn.source, facility=turn.facility, since=turn.since.isoformat(timespec="seconds"))


def _say_of_numbers(told: Told) -> None:
    match told.what:
        case "gap":
            event = LogEvent.SEQUENCE_GAP
        case "filled":
            event = LogEvent.SEQUENCE_FILLED
        case "restarted":
            event = LogEvent.SEQUENCE_RESTARTED
        case _:
            event = LogEvent.SEQUENCE_GIVEN_UP
    log.warning(
        event, source=told.source, facility=told.facility, first=told.first, last=told.last, missing=told.missing
    )


# ── what the configuration expects ───────────────────────────────────────────────────────────────────


def cadences(config: Config) -> dict[Party, Cadence]:
    """How often each source, or each of its facilities, is expected to post."""
    found = {}
    for name, source in config.sources.items():
        expected = source.expect
        if expected is None or expected.every is None:
            continue
        for facility in expected.facilities:
            found[name, facility] = _cadence(expected, expected.every, config.facilities[facility].timezone)
        if not expected.facilities:
            found[name, ""] = _cadence(expected, expected.every, expected.timezone or "UTC")
    return found


def _cadence(expected: Expected, every: timedelta, timezone: str) -> Cadence:
    return Cadence(
        every=every,
        zone=ZoneInfo(timezone),
        opens=expected.from_,
        closes=expected.to,
        days=frozenset(DAYS.index(day) for day in expected.days),
    )


def sequence_fields(config: Config) -> dict[str, str]:
    """The field with the numbers of each source that has some."""
    return {name: field for name, source in config.sources.items() if (field := _field(source)) is not None}


def _field(source: AnySource) -> str | None:
    return source.expect.sequence if source.expect is not None else None


def expected_within(config: Config) -> dict[str, timedelta]:
    """How soon each destination is expected to take what it is owed."""
    return {name: d.expect.within for name, d in config.destinations.items() if d.expect is not None}


# ── as operators see it ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLine:
    """A source or one of its facilities: when it was heard, and whether that is as expected."""

    name: str
    facility: str | None
    state: str  # heard, silent; not expected, if nothing is
    heard_at: Instant | None
    expected: str | None
    silent_since: Instant | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceLine:
    """The numbers of a source or one of its facilities: how far they go, and how many of them are missing."""

    source: str
    facility: str | None
    first: int
    last: int
    missing: int
    gaps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LateLine:
    """A destination that is expected to take what it is owed in time."""

    destination: str
    state: str  # in time, late
    within: str
    oldest_waiting_seconds: float | None
    late_since: Instant | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What is expected, and whether it comes."""

    sources: list[SourceLine]
    sequences: list[SequenceLine]
    destinations: list[LateLine]
    secrets: list[SecretLine]


async def expectation(database: Database, config: Config) -> Expectation:
    """As the database has it now."""
    expectations = Expectations(database)
    stands = await expectations.standings(cadences(config))
    told = {(w.source, w.facility or "") for w in stands}
    within, late = expected_within(config), await expectations.late()
    standings = {s.name: s for s in await Records(database).standings()} if within else {}
    unheard = [name for name in config.sources if not any(source == name for source, _ in told)]
    return Expectation(
        sources=sorted(
            [_line(w) for w in stands] + [_unheard(name) for name in unheard],
            key=lambda line: (line.name, line.facility or ""),
        ),
        sequences=[_of(counted) for counted in await Sequences(database).counted(list(sequence_fields(config)))],
        destinations=[
            LateLine(
                destination=name,
                state="late" if name in late else "in time",
                within=in_words(longest),
                oldest_waiting_seconds=standings[name].oldest_waiting_seconds if name in standings else None,
                late_since=late.get(name),
            )
            for name, longest in sorted(within.items())
        ],
        secrets=secret_lines(config, await SecretUses(database).all()),
    )


def _line(watched: Watched) -> SourceLine:
    return SourceLine(
        name=watched.source,
        facility=watched.facility,
        state="not expected" if watched.expected is None else "silent" if watched.silent_since else "heard",
        heard_at=watched.heard_at,
        expected=watched.expected,
        silent_since=watched.silent_since,
    )


def _unheard(name: str) -> SourceLine:
    return SourceLine(name=name, facility=None, state="not expected", heard_at=None, expected=None, silent_since=None)


def _of(counted: Counted) -> SequenceLine:
    return SequenceLine(
        source=counted.source,
        facility=counted.facility,
        first=counted.first,
        last=counted.last,
        missing=counted.missing,
        gaps=counted.gaps,
    )
