"""One process at work: all parts, put together.  The only place that knows everybody."""

import asyncio
import base64
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import msgspec
import structlog
from aiohttp import web

from dead_letter.audit import Audit
from dead_letter.left_behind import LeftBehind
from dead_letter.letters import DeadLetters
from dead_letter.tokens import Tokens
from gateway import config as configuration
from gateway import hints
from gateway.admission import Admission
from gateway.api import api
from gateway.config import Config, ConfigurationError
from gateway.destinations import dropped, homes
from gateway.diagnosis import Diagnosis
from gateway.intake import Intake
from gateway.listening import Listening
from gateway.parties import lanes, parties
from gateway.partners import Partners
from gateway.policy_versions import PolicyVersions
from gateway.problems import problems_only
from gateway.refusals import Refusals
from gateway.renewal import Renewal
from gateway.secrets_used import SecretsUsed
from gateway.silence import Heard, Silence, expectation
from gateway.waiting_room import AWAY, READ_ONLY
from gateway.watchdog import Watchdog
from observability.logs import log_sparingly
from observability.metrics import Metrics
from observability.names import LogEvent
from observability.tracing import Tracing
from outbox.clock import DatabaseClock
from outbox.database import Database, ReadOnly, Unavailable, UnsuitableError
from outbox.destinations import Destinations
from outbox.dispatcher import Dispatcher, Target
from outbox.ending import end
from outbox.fleet import Fleet
from outbox.intake_batch import IntakeBatch
from outbox.partitions import LEAST, Partitions
from outbox.primary import Primary
from outbox.records import Records
from outbox.retention import Keep, Retention
from outbox.retry import Schedule
from outbox.store import Destination, Outbox
from outbox.upkeep import Task, Upkeep
from outbox.waking import Waker

log = structlog.get_logger()

DRAIN = timedelta(
    seconds=30
)  # from when it is told to stop until nothing is waited for any more, requests and deliveries
ORDERED_SHARDS = 16
LARGEST_SKEW = timedelta(seconds=5)
LAST_FLUSH = timedelta(seconds=2)  # of what was refused, at the end
LONGEST_LOOK = timedelta(seconds=2)  # at the database, for /ready: no probe waits for long
VERSION = version("sluicegate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where this process works: which part it plays, on which Postgres, beside how many others on the same port."""

    role: str  # all, gateway or dispatcher
    dsn: str
    workers: int
    metrics: Path | None  # where the metrics of several workers come together
    sockets: tuple[int, ...] = ()  # those to listen on, where the parent of several workers holds them


class Service:
    """Opens its parts from the bottom up, and closes them in the opposite order."""

    def __init__(self, config: Config, place: Place, environ: Mapping[str, str]) -> None:
        self._config = config
        self._place = place
        self._environ = environ
        self._parts = AsyncExitStack()
        self._stopping = False
        self._drained_at = float("inf")  # when nothing is waited for any more, on the monotonic clock
        self._primary = Primary()
        self._followed = self._primary.left
        self._disagreed = False
        self._destinations: dict[str, Destination] = {}
        self._retired: dict[asyncio.Task[None], Partners] = {}
        self._taking = asyncio.Lock()  # one configuration at a time

    @property
    def _gateway(self) -> bool:
        return self._place.role in {"all", "gateway"}

    @property
    def _dispatching(self) -> bool:
        return self._place.role in {"all", "dispatcher"}

    # ── life ─────────────────────────────────────────────────────────────────────────────────────

    async def start(self, metrics: Metrics, *, before_listening: Callable[[], Awaitable[None]] | None = None) -> None:
        """At work when it returns.  Raises Unavailable, UnsuitableError, AddressError."""
        self.metrics = metrics
        observed = self._config.observability
        self.tracing = Tracing.start(observed.otlp, observed.sample, VERSION, metrics)
        self._parts.push_async_callback(asyncio.to_thread, self.tracing.close)
        await self._open_database()
        await self._open_outbox()
        self._watchdog = Watchdog(metrics.loop_lag_seconds.observe)
        self._watchdog.start()
        self._parts.push_async_callback(self._watchdog.stop)
        if self._dispatching:
            self._parts.push_async_callback(self._stop_dispatching)
            await self.dispatcher.start(self._targets())
        self._parts.push_async_callback(self._leave_the_fleet)
        await self._report_configuration()
        self.upkeep.start()
        self._parts.push_async_callback(self.upkeep.stop)
        self._parts.push_async_callback(self._flush)
        if before_listening:
            await before_listening()
        self._listening = Listening(
            self._application(), hooks=self.intake.take if self._gateway else None, admission=self._admission
        )
        self._parts.push_async_callback(self._listening.close)
        await self._listening.open(self._config.serve.listen, inherited=self._place.sockets)
        self.port = self._listening.port
        await self._tell_of_the_forgotten()

    async def give_notice(self) -> None:
        """Go on for a while and say that it will end: who asks /ready sends the next ones elsewhere."""
        self._stopping = True
        self._listening.part()
        await asyncio.sleep(self._config.serve.notice.total_seconds())

    async def stop(self) -> None:
        """Take nothing more, finish what is under way, hand over the rest."""
        self._stopping = True
        self._drained_at = time.monotonic() + DRAIN.total_seconds()
        await self._parts.aclose()

    async def _stop_dispatching(self) -> None:
        """In what the requests that were under way have left of the time."""
        await self.dispatcher.stop(timedelta(seconds=max(0.0, self._drained_at - time.monotonic())))

    async def _open_database(self) -> None:
        """Pools of their own, so that nobody's question can keep intake or dispatch from a connection."""
        waited = self.metrics.pool_wait_seconds.observe

        async def opened(application: str, size: int, *, pinned: bool = False) -> Database:
            database = await Database.connect(
                self._place.dsn,
                size=size,
                application=f"sluicegate {application}",
                pinned=pinned,
                waited=lambda wait: waited(wait.total_seconds()),
                primary=self._primary,
            )
            self._parts.push_async_callback(database.close)
            return database

        self._intake_database = await opened("intake", 4, pinned=True)
        self._dispatch_database = await opened("dispatch", 4, pinned=True)
        self._operators_database = await opened("operators", 4)

    async def _open_outbox(self) -> None:
        config = self._config
        self.clock = DatabaseClock()
        await self.clock.ask(self._intake_database)
        self.partitions = Partitions(self._operators_database, dedup=config.retention.dedup)
        await self._make_partitions()
        self.outbox = Outbox(intake=self._intake_database, dispatch=self._dispatch_database)
        self.waker = Waker(self.outbox)
        self._parts.push_async_callback(self.waker.close)
        self.batch = IntakeBatch(
            self.outbox,
            buckets=lambda: self.partitions.buckets(self.clock.now()),
            wake=self.waker.wake,
            sizes=self.metrics.batch_size.observe,
        )
        self._parts.push_async_callback(self.batch.close)
        self._versions = PolicyVersions(self._operators_database)
        self.records = Records(self._operators_database, configured=lambda: self._config.destinations)
        self.fleet = Fleet(self._operators_database)
        self.letters = DeadLetters(self._operators_database, tracing=self.tracing)
        self.refusals = Refusals(self._operators_database, self.metrics)
        self.heard = Heard(self._operators_database)
        self.renewal = Renewal(self.metrics)
        self.secrets_used = SecretsUsed(self._operators_database, self.metrics)
        self.silence = Silence(
            self._operators_database,
            batch=self.batch,
            clock=self.clock,
            metrics=self.metrics,
            listening=self._gateway,
        )
        self.dispatcher = Dispatcher(
            self.outbox, database=self._dispatch_database, clock=self.clock, metrics=self.metrics, tracing=self.tracing
        )
        self.waker.dispatch_here(self.dispatcher.wake)
        if self._dispatching:
            self.outbox.hand_over_to(self.dispatcher.take)
        self.diagnosis = Diagnosis(self._operators_database)
        self._admission = Admission(config.serve, self._turned_away)
        self.intake = Intake(
            batch=self.batch,
            clock=self.clock,
            metrics=self.metrics,
            tracing=self.tracing,
            refusals=self.refusals,
            heard=self.heard,
            secrets_used=self.secrets_used,
            diagnosis=self.diagnosis,
            key=key_of(config),
            share=self._place.workers,
        )
        self._parts.push_async_callback(self.intake.close)
        if self._gateway:
            self.diagnosis.start()
            self._parts.push_async_callback(self.diagnosis.stop)
        self.upkeep = Upkeep(self._tasks(), self.metrics)
        await self._adopt(config)
        self._parts.push_async_callback(self._close_partners)

    def _turned_away(self, limit: str) -> None:
        self.metrics.connections_refused.labels(limit).inc()
        log_sparingly(LogEvent.CONNECTION_REFUSED, level="info", limit=f"serve.{limit}")

    # ── configuration ────────────────────────────────────────────────────────────────────────────

    async def reload(self) -> None:
        """Read the file again; a bad one is refused with all its mistakes, and the old one goes on."""
        async with self._taking:
            try:
                config = await asyncio.to_thread(
                    configuration.load, self._config.path, self._environ, last=self._config
                )
            except ConfigurationError as error:
                for mistake in error.mistakes:
                    log.error(LogEvent.CONFIG_REFUSED, mistake=str(mistake))  # noqa: TRY400  it is not our mistake
                return
            try:
                if not await self._take(config):
                    return
            except Unavailable:
                log.error(LogEvent.CONFIG_REFUSED, mistake="the database does not answer; send SIGHUP again")  # noqa: TRY400  nor this
                return
            log.info(LogEvent.CONFIG_RELOADED, digest=config.digest[:12])
            with suppress(Unavailable):
                await self._report_configuration()
            await self._tell_of_the_forgotten()

    async def _renew_secrets(self) -> None:
        """Take those that have changed, by the configuration as it was read; what else the file says by now waits for SIGHUP."""
        before = self._config
        renewed = await self.renewal.look(before)  # as long as it takes: who reloads meanwhile is not held up
        if renewed is None:
            return
        async with self._taking:
            if self._config is before and await self._take(renewed):
                self.renewal.took(before, renewed)

    async def _take(self, config: Config) -> bool:
        """Work by it from now on, if that can be; else why not is told.  Raises Unavailable."""
        if fixed := needs_restart(self._config, config):
            log.error(LogEvent.CONFIG_REFUSED, mistake=f"{', '.join(fixed)} cannot change while it runs; restart it")
            return False
        before = self.partners
        refused = [*await self._dropped(config), *await self._versions.changed(config.policies)]
        for told in refused:
            log.error(LogEvent.CONFIG_REFUSED, mistake=told)
        if refused:
            return False
        await self._adopt(config)
        if self._dispatching:
            self.dispatcher.retarget(self._targets())
        retired = asyncio.create_task(self._retire(before))
        self._retired[retired] = before
        retired.add_done_callback(self._retired.pop)
        return True

    async def _dropped(self, config: Config) -> list[str]:
        """What a new configuration forgets that this one knows, though something is still owed to it.

        What this one does not know either was told at the start, which refuses no work to all the others.
        """
        forgotten = {*self._config.destinations, *self._config.gone} - {*config.destinations, *config.gone}
        standings = [each for each in await self.records.standings() if each.name in forgotten] if forgotten else []
        return dropped(standings, named=())

    async def _tell_of_the_forgotten(self) -> None:
        """Destinations that nobody knows any more, and to which something is still owed: it is held."""
        with suppress(Unavailable):
            for standing in await self.records.standings():
                if standing.waiting and not standing.configured:
                    log.warning(
                        LogEvent.DESTINATION_NOT_CONFIGURED, destination=standing.name, waiting=standing.waiting
                    )

    async def _adopt(self, config: Config) -> None:
        """Raises UnsuitableError for a policy that was changed under its old number."""
        if changed := await self._versions.changed(config.policies):
            raise UnsuitableError("\n".join(changed))
        await self._versions.record(config.policies)
        ordered = {name for route in config.routes.values() if route.order for name in route.to}
        ordered |= hints.destinations(config.sources).keys()  # of one record, what was read last is told last
        shards = {name: ORDERED_SHARDS if name in ordered else 1 for name in config.destinations}
        shared = {name: lanes(sharing) for name, sharing in parties(config).items()}
        destinations = await self.outbox.ensure_destinations(shards, shared)
        self.partners = await Partners.open(
            config, tracing=self.tracing, version=VERSION, take=self.intake.take_what_was_read
        )
        self._destinations = destinations
        keep = Keep(
            events=config.retention.events, dead_letters=config.retention.dead_letters, audit=config.retention.audit
        )
        self.retention = Retention(self._operators_database, self.partitions, keep)
        await self.intake.adopt(config, self._destinations)
        self._admission.adopt(config.serve)
        self.silence.adopt(config, self._destinations)
        self._config = config

    async def _retire(self, partners: Partners) -> None:
        """What is in flight ends by the connectors that it began with."""
        await asyncio.sleep(
            max((d.timeout.total_seconds() for d in self._config.destinations.values()), default=0) + 10
        )
        await partners.close()

    async def _close_partners(self) -> None:
        retired = dict(self._retired)
        await end(*retired)
        for partners in (*retired.values(), self.partners):
            await partners.close()

    def _targets(self) -> list[Target]:
        return [
            Target(
                number=self._destinations[name].id,
                name=name,
                lanes=len(self._destinations[name].lanes),
                connector=self.partners.connectors[name],
                schedule=Schedule(first=d.retry.first, cap=d.retry.cap, give_up=d.retry.give_up),
                timeout=d.timeout,
                concurrency=d.concurrency,
                per_second=d.rate.per_second if d.rate else None,
            )
            for name, d in self._config.destinations.items()
        ]

    # ── upkeep ───────────────────────────────────────────────────────────────────────────────────

    def _tasks(self) -> list[Task]:
        return [
            Task("primary", timedelta(seconds=1), self._follow),
            Task("clock", timedelta(seconds=30), self._ask_the_time),
            Task("partitions", timedelta(minutes=10), self._make_partitions),
            Task("retention", timedelta(hours=1), self._drop_what_is_over),
            Task("tally", timedelta(seconds=30), lambda: self.retention.roll_up()),  # noqa: PLW0108  a reload makes a new one
            Task("proof", timedelta(hours=1), self._prove),
            Task("fleet", timedelta(seconds=10), self._report_configuration),
            Task("books", timedelta(seconds=15), self._report),
            Task("refusals", timedelta(seconds=1), self.refusals.flush),
            Task("heard", timedelta(seconds=5), self.heard.flush),
            Task("renewal", timedelta(seconds=2), self._renew_secrets),
            Task("secrets", timedelta(minutes=1), self._report_secrets),
            Task("silence", timedelta(seconds=10), self.silence.watch),
        ]

    async def _follow(self) -> None:
        """To another primary: it has a clock of its own, and the partitions that were made last may be lost with the old one."""
        if self._followed != (left := self._primary.left):
            await self._ask_the_time()
            await self._make_partitions()
            self._followed = left

    async def _ask_the_time(self) -> None:
        await self.clock.ask(self._intake_database)
        self.metrics.clock_offset_seconds.set(-self.clock.skew.total_seconds())
        if abs(self.clock.skew) > LARGEST_SKEW:
            log.error(LogEvent.CLOCK_SKEWED, ahead=round(self.clock.skew.total_seconds(), 1))

    async def _make_partitions(self) -> None:
        """Too few ahead is told in time to mend it, above all when somebody's lock keeps new ones from being made."""
        now = self.clock.now()
        try:
            await self.partitions.ensure(now)
        finally:
            ahead = await self.partitions.ahead(now)
            self.metrics.partitions_ahead.report(ahead)
            for table, number in ahead.items():
                if number < LEAST[table]:
                    log.error(LogEvent.PARTITIONS_LOW, table=table, ahead=number)

    async def _drop_what_is_over(self) -> None:
        """Nothing, while there is reason to doubt the database's clock: what is dropped does not come back."""
        if abs(self.clock.skew) > LARGEST_SKEW:
            log.error(LogEvent.RETENTION_WAITS, reason="skewed", ahead=round(self.clock.skew.total_seconds(), 1))
            return
        if over := await self.partitions.leapt(self.clock.now()):
            log.error(LogEvent.RETENTION_WAITS, reason="leapt", days=over.days)
            return
        for name in await self.retention.run(self.clock.now()):
            log.info(LogEvent.PARTITION_DROPPED, name=name)

    async def _prove(self) -> None:
        for day in await self.retention.prove(self.clock.now()):
            log.error(LogEvent.BOOKS_UNBALANCED, day=f"{day:%Y-%m-%d}")

    async def _report_secrets(self) -> None:
        """What proves something, and what cannot for now."""
        self.metrics.issuer_away.report({name: float(away) for name, away in self.intake.issuers().items()})
        await self.secrets_used.report(self._config)

    async def _report(self) -> None:
        """What the database says of the destinations, for the metrics."""
        standings = await self.records.standings()
        held = {s.name: s for s in standings if s.state == "held"}
        flowing = [s for s in standings if s.name not in held]
        self.metrics.waiting.report({s.name: s.waiting for s in flowing})
        self.metrics.held.report({s.name: s.waiting for s in held.values()})
        self.metrics.dead.report({s.name: s.dead for s in standings})
        self.metrics.oldest_waiting_seconds.report({s.name: s.oldest_waiting_seconds or 0 for s in flowing})
        self.metrics.balanced.report(float(all(s.balanced for s in standings)))
        for standing in standings:
            if not standing.balanced:
                log.error(LogEvent.BOOKS_UNBALANCED, destination=standing.name)
        await self.silence.judge(standings)

    async def _report_configuration(self) -> None:
        """To the others, and what they say; a fleet that does not agree is told when it begins, and when it ends."""
        name = f"{socket.gethostname()}:{os.getpid()}"
        agreement = await self.fleet.report(name=name, role=self._place.role, digest=self._config.digest)
        self.metrics.configuration.report({self._config.digest: 1})
        self.metrics.fleet_processes.report(dict(agreement.processes))
        self.metrics.configurations_differ.report(float(agreement.broken))
        if agreement.broken != self._disagreed:
            self._disagreed = agreement.broken
            told = {digest[:12]: count for digest, count in agreement.processes.items()}
            if agreement.broken:
                log.error(LogEvent.CONFIGURATIONS_DIFFER, processes=told, ours=self._config.digest[:12])
            else:
                log.info(LogEvent.CONFIGURATIONS_AGREE, processes=told)

    async def _leave_the_fleet(self) -> None:
        with suppress(Unavailable):
            await self.fleet.leave()

    async def _flush(self) -> None:
        with suppress(Unavailable, TimeoutError):
            async with asyncio.timeout(LAST_FLUSH.total_seconds()):
                await self.refusals.flush()
                await self.heard.flush()
                self.intake.tell()
                await self.secrets_used.flush()

    # ── HTTP ─────────────────────────────────────────────────────────────────────────────────────

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[problems_only])
        application.router.add_get("/live", self._live)
        application.router.add_get("/ready", self._ready)
        application.router.add_get("/metrics", self._metrics)
        if self._gateway:
            for path in ("/hooks/{source}", "/hooks/{source}/{token}"):
                application.router.add_post(path, self.intake.accept, expect_handler=self.intake.expect)
            application.add_subapp("/api/v1", self._api())
        return application

    def _api(self) -> web.Application:
        return api(
            records=self.records,
            letters=self.letters,
            tokens=Tokens(self._operators_database),
            destinations=Destinations(self._operators_database),
            audit=Audit(self._operators_database),
            expectation=lambda: expectation(self._operators_database, self._config),
            connectors=lambda: {name: d.connector for name, d in self._config.destinations.items()},
            left=LeftBehind(self._operators_database),
            homes=lambda: homes(self._config),
            fleet=self.fleet,
            version=VERSION,
        )

    async def _live(self, _: web.Request) -> web.Response:
        return web.json_response({"live": True})

    async def _ready(self, _: web.Request) -> web.Response:
        missing = await self._missing()
        body = {"ready": not missing, "missing": missing, "version": VERSION, "configuration": self._config.digest}
        return web.Response(
            status=503 if missing else 200,
            body=msgspec.json.encode(body),
            content_type="application/json",
            headers={"Cache-Control": "no-store", **({"Retry-After": "2"} if missing else {})},
        )

    async def _missing(self) -> list[str]:
        """What keeps this process from work, in words."""
        missing = []
        if self._stopping:
            missing.append("it is stopping")
        try:
            async with asyncio.timeout(LONGEST_LOOK.total_seconds()):
                await self._intake_database.fetchval("SELECT 1", timeout=LONGEST_LOOK / 2)
        except ReadOnly:
            missing.append(READ_ONLY)
            log_sparingly(LogEvent.POSTGRES_AWAY, part="readiness", reason="ReadOnly")
        except (Unavailable, TimeoutError):
            missing.append(AWAY)
            log_sparingly(LogEvent.POSTGRES_AWAY, part="readiness")
        if abs(self.clock.skew) > LARGEST_SKEW:
            missing.append(f"this clock is {self.clock.skew.total_seconds():+.0f} s off the database's")
        if self._dispatching and not self.dispatcher.alive:
            missing.append("the dispatcher has no lease")
        try:
            self.partitions.buckets(self.clock.now())
        except RuntimeError as error:
            missing.append(str(error))
        return missing

    async def _metrics(self, _: web.Request) -> web.Response:
        self.intake.tell()
        text = await asyncio.to_thread(self.metrics.render)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


def needs_restart(old: Config, new: Config) -> list[str]:
    """The keys that a running process cannot take on."""
    changed = []
    if old.serve.listen != new.serve.listen:
        changed.append("serve.listen")
    if old.serve.workers != new.serve.workers:
        changed.append("serve.workers")
    if old.database != new.database:
        changed.append("database")
    if old.key != new.key:
        changed.append("key")
    if old.observability != new.observability:
        changed.append("observability")
    if old.retention.dedup != new.retention.dedup:
        changed.append("retention.dedup")
    return changed


def key_of(config: Config) -> bytes:
    """The 32 bytes that digests and pseudonyms are made under: the configured key, or the one in data/key, made once."""
    if config.key is not None:
        return sha256(config.key.bytes).digest()
    path = config.folder / "data" / "key"
    with suppress(FileExistsError):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        made = path.with_name(f"key.{os.getpid()}")
        with open(made, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(base64.b64encode(os.urandom(32)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(made, path)  # whole or not at all, and only the first one's
        finally:
            made.unlink()
    return sha256(path.read_bytes().strip()).digest()
