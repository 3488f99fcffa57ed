"""Whose request it is, behind proxies.  Pure."""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


def client_address(peer: Address | None, forwarded: Sequence[str], trusted: Sequence[Network]) -> Address | None:
    """The nearest address that is not a trusted proxy's: what came before it, anyone can have written.

    `forwarded` are the X-Forwarded-For headers in their order; `peer` is None on a Unix socket, which only what runs
    here can reach, so that its header counts.  None means unknown, and whoever asks for an address refuses that.
    """
    if peer is not None:
        peer = unmapped(peer)
        if not _is_in(peer, trusted):
            return peer
    hops = [hop.strip() for header in forwarded for hop in header.split(",")]
    nearest: Address | None = peer
    for hop in reversed(hops):
        nearest = _address(hop)
        if nearest is None or not _is_in(nearest, trusted):
            return nearest
    return nearest


def _address(hop: str) -> Address | None:
    """An address as proxies write it: alone, or with a port."""
    if hop.startswith("["):
        hop = hop[1:].partition("]")[0]
    elif hop.count(":") == 1:
        hop = hop.partition(":")[0]
    try:
        return unmapped(ip_address(hop))
    except ValueError:
        return None


def unmapped(address: Address) -> Address:
    """`::ffff:10.0.0.1` is 10.0.0.1, wherever it is compared."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def is_within(address: Address, networks: Sequence[Network]) -> bool:
    return _is_in(unmapped(address), networks)


def _is_in(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks if network.version == address.version)
