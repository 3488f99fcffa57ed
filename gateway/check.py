"""Look at everything that a configuration names, and touch nothing: the database, and every destination."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import assert_never

from connectors import Blocked, Connector, Delivered, Duplicate, Outcome, Pending, Refused, Retry, Unknown
from gateway.config import Config
from gateway.config_sections import Destination
from gateway.destinations import dropped, owed
from gateway.partners import Partners
from gateway.policy_versions import PolicyVersions
from gateway.secrets_used import advice
from observability.tracing import Tracing
from outbox.database import Database, Unavailable, UnsuitableError, migrations_pending
from outbox.embedded import running
from outbox.embedded_folder import EmbeddedError
from outbox.fleet import Fleet, Process
from outbox.pooler import refuse_pooler
from outbox.records import Records, Standing
from outbox.secret_uses import SecretUses


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at; `says` is what is wrong and what to do, or what is right."""

    what: str
    good: bool
    says: str
    doubtful: bool = False  # good, but somebody should look at it


async def check(config: Config, *, version: str) -> AsyncIterator[Finding]:
    """The database first, then the destinations as they answer, in the order of the file."""
    for finding in await _database(config):
        yield finding
    for finding in await _destinations(config, version):
        yield finding


async def _database(config: Config) -> list[Finding]:
    try:
        if config.database != "embedded":
            await refuse_pooler(config.database.reveal())
            return await _stored(config, config.database.reveal(), "reachable")
        if not (config.folder / "data/postgres/cluster").exists():
            return [Finding(what="database", good=True, says="embedded; the first `sluicegate serve` makes it")]
        async with running(config.folder) as dsn:
            return await _stored(config, dsn, "embedded")
    except Unavailable as error:
        says = f"{error}; see that Postgres runs and that `database:` leads to it"
        return [Finding(what="database", good=False, says=says)]
    except (UnsuitableError, EmbeddedError) as error:
        return [Finding(what="database", good=False, says=str(error))]


async def _stored(config: Config, dsn: str, how: str) -> list[Finding]:
    """Whether the schema is this version's, and whether the configuration goes with what is stored."""
    if pending := await migrations_pending(dsn):
        says = f"{how}, but {', '.join(pending)} is still to be applied; run `sluicegate migrate`"
        return [Finding(what="database", good=False, says=says)]
    database = await Database.connect(dsn, size=1, application="sluicegate check")
    try:
        standings = await Records(database, configured=lambda: config.destinations).standings()
        changed = await PolicyVersions(database).changed(config.policies)
        processes = await Fleet(database).processes()
        uses = await SecretUses(database).all()
    finally:
        await database.close()
    return [
        Finding(what="database", good=True, says=f"{how}, migrated"),
        *(Finding(what="policies", good=False, says=told) for told in changed),
        *(
            Finding(what="destinations", good=False, says=told)
            for told in dropped(standings, named={*config.destinations, *config.gone})
        ),
        *_retired(config, {each.name: each for each in standings}),
        *_fleet(config, processes),
        *(
            Finding(what=f"source {told.source}", good=True, doubtful=told.doubtful, says=told.says)
            for told in advice(config, uses, datetime.now(UTC))
        ),
    ]


def _fleet(config: Config, processes: Sequence[Process]) -> Iterator[Finding]:
    """Who runs by another file than this one: in the middle of a deploy that is so, and afterwards it is a mistake."""
    others = [f"{each.name} ({each.role}) by {each.digest[:12]}" for each in processes if each.digest != config.digest]
    if others:
        says = (
            f"not by this file ({config.digest[:12]}), but others: {', '.join(others)}; reload or restart them with it"
        )
        yield Finding(what="processes", good=True, doubtful=True, says=says)


def _retired(config: Config, standings: Mapping[str, Standing]) -> Iterator[Finding]:
    """What is still owed to destinations that are to go, and which of them can go now."""
    for name in [*config.gone, *(each.name for each in config.destinations.values() if each.retired)]:
        standing = standings.get(name)
        if standing is None or not standing.waiting:
            says = "retired, and nothing waits for it any more; delete it from the file"
            if standing is not None and standing.dead:
                says = (
                    f"retired, and nothing waits for it, but its dead letters do ({standing.dead:,}); decide about them"
                )
        elif name in config.gone:
            says = f"retired, and {owed(standing)}, held; reassign or discard what waits"
        else:
            says = f"retired, and {owed(standing)}; delete it from the file when nothing does"
        yield Finding(what=f"destination {name}", good=True, doubtful=True, says=says)


async def _destinations(config: Config, version: str) -> list[Finding]:
    """All at the same time: one that is slow does not hold up the others."""
    partners = await Partners.open(config, tracing=Tracing.start(None, 0, version), version=version)
    try:
        return await asyncio.gather(
            *(_destination(config.destinations[name], connector) for name, connector in partners.connectors.items())
        )
    finally:
        await partners.close()


async def _destination(destination: Destination, connector: Connector) -> Finding:
    patience = destination.timeout + timedelta(seconds=5)
    try:
        outcome = await asyncio.wait_for(connector.check(), patience.total_seconds())
    except TimeoutError:
        outcome = Retry("it did not answer in time")
    good, says = _told(outcome)
    return Finding(what=f"destination {destination.name}", good=good, says=f"{destination.connector}: {says}")


def _told(outcome: Outcome) -> tuple[bool, str]:
    """What a person reads and does about the outcome of a check."""
    match outcome:
        case Delivered() | Duplicate() | Pending():
            return True, "answers"
        case Retry(reason=reason):
            return False, f"{reason}; see that it runs and that its address is right"
        case Unknown(reason=reason):
            return False, f"{reason}; see that it is what it should be, and try again"
        case Refused(reason=reason):
            return False, f"{reason}; correct what the configuration says about it"
        case Blocked(reason=reason) if reason.startswith("credentials"):
            return False, f"{reason}; put good credentials where the configuration takes them from"
        case Blocked(reason=reason) if reason.startswith("proxy"):
            return False, f"{reason}; see that the proxy runs and that its address is right"
        case Blocked(reason=reason):
            return False, f"{reason}; correct what the configuration says about it"
    assert_never(outcome)
