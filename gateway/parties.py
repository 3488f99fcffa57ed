"""Who shares a destination: the sources, and the facilities within them, whose events may come there.

Each has a lane of its own there, as far as there are lanes (outbox/store.py, Destination.place), and lanes take turns:
whoever floods waits behind itself alone.
"""

from collections.abc import Iterator, Mapping

from gateway.config import Config
from gateway.config_sections import OWN_SOURCE, Route

MOST_LANES = 16  # a destination; each costs a look into the queue now and then

Party = tuple[str, str | None]
"""A source, and the facility that an event of it belongs to."""


def parties(config: Config) -> dict[str, Mapping[Party, int]]:
    """By destination, those that may send something there, numbered; what the program itself says comes first."""
    found: dict[str, dict[Party, int]] = {name: {(OWN_SOURCE, None): 0} for name in config.destinations}
    for route in config.routes.values():
        for name in found.keys() & set(route.to):
            for party in _arriving(route, config):
                found[name].setdefault(party, len(found[name]))
    return dict(found)


def lanes(sharing: Mapping[Party, int]) -> int:
    """How many lanes a destination gets that these share: what the program itself says is too little for one."""
    return max(1, min(len(sharing) - 1, MOST_LANES))


def _arriving(route: Route, config: Config) -> Iterator[Party]:
    for name in route.when.source or config.sources:
        source = config.sources.get(name)
        for policy in (config.policies[accepted] for accepted in source.accepts) if source else ():
            sites = sorted(set(policy.facility.of.values())) if policy.facility else [None]
            yield from ((name, site) for site in sites if route.when.facility is None or site in route.when.facility)
