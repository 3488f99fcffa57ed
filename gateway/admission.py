"""What one address may have of the door, whoever it says it is: connections, and requests before anything is proven.

An IPv6 network of 64 bits is one address here: whoever has one has all of them.
"""

from collections.abc import Callable, Hashable
from ipaddress import IPv6Address, ip_address

from gateway.authenticate.peer import Address, is_within, unmapped
from gateway.config_sections import Serve
from gateway.token_bucket import TokenBucket

UNCOUNTED = ""
MOST_ADDRESSES = 10_000  # whose requests are counted at a time; the one that was longest not heard of is forgotten


class Admission:
    """Connections at a time: so many in all, and so many from one address.

    Trusted proxies and Unix sockets stand for many, so that only the first counts for them.
    """

    def __init__(self, serve: Serve, refused: Callable[[str], None]) -> None:
        """`refused` is told the key of the configuration whose number was reached."""
        self._refused = refused
        self._inside = 0
        self._of: dict[Hashable, int] = {}
        self.adopt(serve)

    def adopt(self, serve: Serve) -> None:
        """For the connections that come from now on."""
        self._most, self._most_of_one, self._proxies = (
            serve.connections,
            serve.connections_per_address,
            serve.trusted_proxies,
        )

    def enter(self, peer: str | None) -> Hashable | None:
        """What to `leave` with; None: there are too many already."""
        if self._inside >= self._most:
            self._refused("connections")
            return None
        whose: Hashable = UNCOUNTED
        if peer is not None and not is_within(address := ip_address(peer.partition("%")[0]), self._proxies):
            whose = counted_as(address)
            if self._of.get(whose, 0) >= self._most_of_one:
                self._refused("connections_per_address")
                return None
        self._inside += 1
        self._of[whose] = self._of.get(whose, 0) + 1
        return whose

    def leave(self, whose: Hashable) -> None:
        self._inside -= 1
        self._of[whose] -= 1
        if not self._of[whose]:
            del self._of[whose]


class AddressLimits:
    """A rate for each address, in bounded memory."""

    def __init__(self, *, per_second: float) -> None:
        self._per_second = per_second
        self._limits: dict[Hashable, TokenBucket] = {}  # the one that was heard of last stands last

    def exceeded(self, address: Address | None, now: float) -> TokenBucket | None:
        """The limit that was reached; an address that is not known has none."""
        if address is None:
            return None
        whose = counted_as(address)
        limit = self._limits.pop(whose, None)
        if limit is None:
            limit = TokenBucket(per_second=self._per_second)
            if len(self._limits) >= MOST_ADDRESSES:
                del self._limits[next(iter(self._limits))]
        self._limits[whose] = limit
        return None if limit.take(now) else limit


def counted_as(address: Address) -> Hashable:
    address = unmapped(address)
    return int(address) >> 64 if isinstance(address, IPv6Address) else str(address)
