"""Destinations as people see them: what the configuration says of each, and how the database says it is doing."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dead_letter.letters import Instant
from outbox.records import Standing


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationLine:
    """A destination: what kind it is, and how it is doing."""

    name: str
    connector: str | None  # none: it is not configured any more
    state: str  # flowing, backing off, held; not configured, if nothing can go there any more
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
    configured = connector is not None or standing is None
    return DestinationLine(
        name=name,
        connector=connector,
        state=standing.state if standing and configured else "flowing" if configured else "not configured",
        reason=standing.reason if standing and configured else _gone(standing) if standing else None,
        held_by=standing.held_by if standing else None,
        until=standing.until if standing else None,
        waiting=standing.waiting if standing else 0,
        oldest_waiting_seconds=standing.oldest_waiting_seconds if standing else None,
        dead=standing.dead if standing else 0,
    )


def _gone(standing: Standing) -> str:
    """What became of what it is owed: nobody delivers it, however long it waits, until the destination is back."""
    if standing.waiting:
        told = "not in the configuration: what waits goes out once it is put back"
    elif standing.dead:
        told = "not in the configuration: discard its dead letters, or put it back and replay them"
    else:
        told = "not in the configuration"
    return f"{told}; and held: {standing.reason}" if standing.held_by else told
