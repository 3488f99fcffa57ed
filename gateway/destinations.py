"""Destinations as people see them: what the configuration says of each, and how the database says it is doing."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from dead_letter.left_behind import CannotMoveError, Home
from dead_letter.letters import Instant
from gateway.config import Config
from gateway.config_sections import CLASSES, Destination
from gateway.hints import CONNECTOR
from outbox.destinations import UnknownDestinationError
from outbox.records import Standing


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationLine:
    """A destination: what kind it is, and how it is doing."""

    name: str
    connector: str | None  # none: it is not configured any more
    state: str  # flowing, backing off, held; one that nobody knows any more is held: not configured
    reason: str | None
    held_by: str | None
    until: Instant | None
    waiting: int
    oldest_waiting_seconds: float | None
    dead: int


def lines(standings: Iterable[Standing], connectors: Mapping[str, str]) -> list[DestinationLine]:
    """All that are configured, and those that were and still have something waiting, dead or on hold."""
    found = {standing.name: standing for standing in standings}
    remembered = {name for name, standing in found.items() if standing.waiting or standing.dead or standing.held_by}
    return [line(name, connectors.get(name), found.get(name)) for name in sorted({*connectors, *remembered})]


def line(name: str, connector: str | None, standing: Standing | None) -> DestinationLine:
    """One that was configured and never started has no standing yet: nothing waits for it."""
    return DestinationLine(
        name=name,
        connector=connector,
        state=standing.state if standing else "flowing",
        reason=_reason(standing, here=connector is not None) if standing else None,
        held_by=standing.held_by if standing else None,
        until=standing.until if standing else None,
        waiting=standing.waiting if standing else 0,
        oldest_waiting_seconds=standing.oldest_waiting_seconds if standing else None,
        dead=standing.dead if standing else 0,
    )


def _reason(standing: Standing, *, here: bool) -> str | None:
    """Why nothing goes there; of one that nobody knows any more, what becomes of what it is owed."""
    if standing.configured and (here or standing.reason):
        return standing.reason
    if standing.configured:
        return "not configured here; another process delivers to it"
    if standing.waiting:
        told = "not configured: put it back, or reassign or discard what waits"
    elif standing.dead:
        told = "not configured: discard its dead letters, or put it back and replay them"
    else:
        told = "not configured"
    return f"{told}; and held: {standing.reason}" if standing.held_by else told


def dropped(standings: Iterable[Standing], named: Collection[str]) -> list[str]:
    """A sentence with its mend for each destination that still owes, and of which a configuration says nothing.

    `named` are those of which it says something, be it only that they are retired.
    """
    return [
        f"destinations.{each.name} is gone from the file, but {owed(each)}; put it back with `retired: true`: "
        "no route may lead there, and what waits still goes out. If its system is gone, too, leave `retired: true` as "
        f"its only key: what waits is held until `sluicegate destinations reassign {each.name} NEW` or "
        f"`sluicegate destinations discard {each.name}`"
        for each in standings
        if each.waiting and each.name not in named
    ]


def homes(config: Config) -> dict[str, Home]:
    """Where deliveries may be reassigned to: what is configured and stays."""
    ordered = {name for route in config.routes.values() if route.order for name in route.to}
    return {
        name: Home(name=name, ordered=name in ordered, receives=_may_receive(destination, config))
        for name, destination in config.destinations.items()
        if not destination.retired and destination.connector != CONNECTOR
    }


def _may_receive(destination: Destination, config: Config) -> frozenset[tuple[str, int]] | None:
    highest = CLASSES.index(destination.receives)
    if highest == len(CLASSES) - 1:
        return None
    policies = [policy for policy in config.policies.values() if CLASSES.index(policy.class_) <= highest]
    return frozenset((policy.name, policy.version) for policy in policies)


def home_called(name: str, found: Mapping[str, Home]) -> Home:
    """Raises UnknownDestinationError for what is not configured, or is itself on its way out."""
    if name not in found:
        raise UnknownDestinationError(name, sorted(found))
    return found[name]


def refuse_what_is_delivered(name: str, configured: Collection[str]) -> None:
    """What waits for a destination that is configured goes out; raises CannotMoveError."""
    if name in configured:
        raise CannotMoveError(
            f"{name} is configured, so what waits for it goes out: leave `retired: true` as its only key, "
            "reload every process, and do this again."
        )


def owed(standing: Standing) -> str:
    """`1 delivery waits for it`, `1,200 deliveries wait for it`."""
    return "1 delivery waits for it" if standing.waiting == 1 else f"{standing.waiting:,} deliveries wait for it"
