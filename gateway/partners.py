"""The connectors of a configuration, opened: one for each destination, and one system for those that share it."""

from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from connectors import Connector, Opening, System, kinds
from gateway import hints
from gateway.config import Config
from gateway.config_sections import Destination, Reads
from observability.tracing import Tracing

if TYPE_CHECKING:
    from gateway.reread import Take


class Partners:
    def __init__(self, connectors: Mapping[str, Connector], opened: AsyncExitStack) -> None:
        self.connectors = connectors
        self._opened = opened

    @classmethod
    async def open(cls, config: Config, *, tracing: Tracing, version: str, take: "Take | None" = None) -> "Partners":
        """Nothing is sent: a partner is first spoken to by a delivery or a check.

        `take` is given what was read again on a hint; where nothing is delivered, nobody needs it.
        """
        async with AsyncExitStack() as opened:
            systems: dict[str, System] = {}
            for name, system in config.systems.items():
                kind = kinds()[system.connector]
                if kind.open_system:
                    systems[name] = kind.open_system(system.settings, system.timeout)
                    opened.push_async_callback(systems[name].close)
            connectors: dict[str, Connector] = {}
            for name, destination in config.destinations.items():
                opening = Opening(
                    destination=name,
                    settings=destination.settings,
                    system=systems.get(destination.system) if destination.system else None,
                    timeout=destination.timeout,
                    concurrency=destination.concurrency,
                    tracing=tracing,
                    version=version,
                )
                connector = _connector(opening, destination, config, take)
                if destination.reads is not None:
                    connector = _claiming(connector, opening, destination.reads, systems[destination.reads.system])
                connectors[name] = connector
                opened.push_async_callback(connector.close)
            return cls(connectors, opened.pop_all())
        raise AssertionError

    async def close(self) -> None:
        await self._opened.aclose()


def _connector(opening: Opening, destination: Destination, config: Config, take: "Take | None") -> Connector:
    if destination.connector != hints.CONNECTOR:
        return kinds()[destination.connector].connect(opening)
    from gateway.reread import Reread  # noqa: PLC0415 — what speaks to Odoo takes its time

    source = next(source for name, source in config.sources.items() if hints.name_of(name) == destination.name)
    return Reread(opening, hints.fields_by_model(config.policies[name] for name in source.accepts), take)


def _claiming(connector: Connector, opening: Opening, reads: Reads, system: System) -> Connector:
    from connectors.odoo_read import Reader  # noqa: PLC0415 — likewise
    from connectors.odoo_server import Server  # noqa: PLC0415
    from gateway.claim_check import ClaimCheck  # noqa: PLC0415

    assert isinstance(system, Server)
    return ClaimCheck(connector, reads, Reader(system, opening.tracing, opening.timeout))
