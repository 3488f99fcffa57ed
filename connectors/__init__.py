"""Where events go: one module for each kind of system; each knows events and outcomes, and nothing of the database.

A third party's connector is a package with an entry point in the group `sluicegate.connectors` that names a `Kind`.
It needs this module and nothing else of ours.
"""

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Protocol

from connectors.settings import Settings
from outbox.event import (
    Blocked,
    Connector,
    Delivered,
    Delivery,
    Duplicate,
    Event,
    Outcome,
    Pending,
    Read,
    Refused,
    Retry,
    Unknown,
)

if TYPE_CHECKING:  # only a connector that is opened needs it; the shape of a configuration does not
    from observability.tracing import Tracing

__all__ = [
    "Blocked",
    "Connector",
    "Delivered",
    "Delivery",
    "Duplicate",
    "Event",
    "Kind",
    "Opening",
    "Outcome",
    "Pending",
    "Read",
    "Refused",
    "Retry",
    "System",
    "Unknown",
    "kinds",
]


class System(Protocol):
    """What the destinations of one entry under `systems:` share: one login, one pool.  Who opened it closes it, last."""

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """All that a connector is given when it is opened, within a running event loop."""

    destination: str
    settings: Settings  # an instance of its kind's `settings`
    system: object | None  # what its kind's `open_system` made, where the destination names a system
    timeout: timedelta  # for one try, all in all
    concurrency: int  # tries at a time, at most
    tracing: "Tracing"
    version: str  # ours, for a User-Agent


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of destination: the shape of its settings, and how it is opened."""

    name: str
    settings: type[Settings]
    connect: Callable[[Opening], Connector]
    system: type[Settings] | None = None  # the shape of its entries under `systems:`
    open_system: Callable[[Settings, timedelta], System] | None = None  # within a running event loop
    hands_on: bool = False  # whether its deliveries hand on what `reads` read for them (Delivery.read)


def kinds() -> Mapping[str, Kind]:
    """Every kind of destination that is installed, by its name: ours, and those of other packages."""
    return _Kinds()


class _Kinds(Mapping[str, Kind]):
    """Imports a kind's module when it is asked for.

    So an installed package runs no code of its own here until a configuration names its kind, and a broken one harms
    nobody else.  Ours cannot be replaced: a package that brings an `http` of its own is not heard.
    """

    _OURS = {"http": "connectors.http_kind:KIND", "odoo": "connectors.odoo:KIND"}  # noqa: RUF012  # read only

    def __init__(self) -> None:
        self._theirs: dict[str, EntryPoint] = {
            entry.name: entry for entry in entry_points(group="sluicegate.connectors") if entry.name not in self._OURS
        }

    def __getitem__(self, name: str) -> Kind:
        kind = pkgutil.resolve_name(self._OURS[name]) if name in self._OURS else self._theirs[name].load()
        if not isinstance(kind, Kind):
            raise TypeError(f'the entry point "{name}" of sluicegate.connectors names no connectors.Kind')
        return kind

    def __contains__(self, name: object) -> bool:
        return name in self._OURS or name in self._theirs

    def __iter__(self) -> Iterator[str]:
        yield from self._OURS
        yield from self._theirs

    def __len__(self) -> int:
        return len(self._OURS) + len(self._theirs)
