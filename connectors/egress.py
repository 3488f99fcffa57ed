"""Where a connector may connect to, judged at the moment of connecting.

Only the address that a socket is opened for says where a name leads: whatever was resolved, redirected or written
before that can lie (literal addresses never see a resolver, and a name can point elsewhere a second later).
So each address is judged here, right before its socket exists.
"""

import asyncio
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

from connectors.proxy import Proxy

Address = IPv4Address | IPv6Address
Networks = tuple[IPv4Network | IPv6Network, ...]
AddressInfo = tuple[int, int, int, str, tuple[Any, ...]]  # as getaddrinfo answers


def _networks(text: str) -> Networks:
    return tuple(ip_network(word) for word in text.split())


NEVER = _networks(
    "0.0.0.0/8 ::/128 "  # "this host": Linux connects to itself
    "224.0.0.0/4 255.255.255.255/32 ff00::/8 "  # to many
    # what tells credentials to whoever asks: AWS (and most others), ECS, Alibaba, Azure, Oracle; AWS and Google by IPv6
    "169.254.169.254/32 169.254.170.0/24 100.100.100.200/32 168.63.129.16/32 192.0.0.192/32 fd00:ec2::/32 fd20:ce::254/128"
)
"""Nobody's webhook is there, whatever `allow` says."""

NOT_PUBLIC = _networks(
    "100.64.0.0/10 192.0.0.0/24 192.88.99.0/24 198.18.0.0/15 240.0.0.0/4 "
    "2001::/23 2001:db8::/32 2002::/16 3fff::/20 5f00::/16"
)
"""What `is_global` takes for public in some version of Python, or what tunnels to a hidden address."""

UNICAST = IPv6Network("2000::/3")
"""All that is assigned of the IPv6 internet."""


class EgressDenied(OSError):  # noqa: N818  # what happened, in one word
    """An OSError, so that a name's other addresses are tried.  The address is not told: a caller must not learn it."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class Egress:
    """The networks in `allow`, and only those; without any, the public internet."""

    def __init__(self, allow: Sequence[IPv4Network | IPv6Network] = (), proxy: Proxy | None = None) -> None:
        """Through `proxy`, whose own address is what the configuration says, `connect` alone leads out."""
        self._allow = tuple(allow)
        self._proxy = proxy

    def permits(self, address: str) -> bool:
        """Every face of an address must be permitted: itself, and the IPv4 address that it tunnels to."""
        return all(self._permits(face) for face in _faces(ip_address(address.partition("%")[0])))

    def socket_for(self, info: AddressInfo) -> socket.socket:
        """A socket for this address, or EgressDenied; aiohttp calls it for every connection that it makes."""
        if not self.permits(info[4][0]):
            raise EgressDenied(self._why_not(info[4][0]))
        return socket.socket(*info[:3])

    def connect(self, address: tuple[str, int], timeout: float) -> socket.socket:
        """Connects a blocking socket to the first address of a host that is permitted and answers."""
        if self._proxy and self._proxy.resolves and not _is_literal(address[0]):
            return self._proxy.tunnel(*address, timeout)
        failure: OSError | None = None
        for info in _resolve(*address, socket.AF_UNSPEC):
            try:
                if self._proxy:
                    return self._tunnel(self._proxy, info, timeout)
                connection = self.socket_for(info)
            except EgressDenied as denied:
                failure = failure or denied
                continue
            try:
                connection.settimeout(timeout)
                connection.connect(info[4])
            except OSError as error:
                connection.close()
                failure = error
            else:
                return connection
        raise failure or socket.gaierror(socket.EAI_NONAME, "it has no address")

    def _tunnel(self, proxy: Proxy, info: AddressInfo, timeout: float) -> socket.socket:
        """To this address, as it was judged: a proxy that looked the name up again could find another one."""
        host, port = info[4][:2]
        if not self.permits(host):
            raise EgressDenied(self._why_not(host))
        return proxy.tunnel(host.partition("%")[0], port, timeout)

    def _why_not(self, address: str) -> str:
        """What to tell of an address that is not permitted, since what to do about it differs."""
        if any(_within(face, NEVER) for face in _faces(ip_address(address.partition("%")[0]))):
            return "its address is one that is never connected to"
        if self._allow:
            return "`allow` does not cover its address"
        return "its address is not a public one; add `allow: [its network]`"

    def _permits(self, face: Address) -> bool:
        if _within(face, NEVER):
            return False
        if self._allow:
            return _within(face, self._allow)
        return face.is_global and not _within(face, NOT_PUBLIC) and (face.version == 4 or face in UNICAST)


def _is_literal(host: str) -> bool:
    """Whether it is an address by any spelling that a resolver would take for one."""
    try:
        socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except (socket.gaierror, UnicodeError):
        return False
    return True


def _faces(address: Address) -> Iterator[Address]:
    """What a packet to `address` can reach: IPv4 in IPv6 clothes is judged as IPv4."""
    if not isinstance(address, IPv6Address):
        yield address
    elif address.ipv4_mapped:
        yield address.ipv4_mapped
    else:
        yield address
        if address.sixtofour:
            yield address.sixtofour
        if address.teredo:
            yield from address.teredo
        if _within(address, _EMBEDDING) and int(address) > 1:
            yield IPv4Address(int(address) & 0xFFFF_FFFF)


_EMBEDDING = _networks("::/96 64:ff9b::/96 64:ff9b:1::/48")  # the old compatible form, and both of NAT64


def _within(address: Address, networks: Networks) -> bool:
    return any(address in network for network in networks)  # of the other version: no


class Resolver(AbstractResolver):
    """Looks names up in threads of its own, so that a slow name server of one destination delays no other's.

    Of several addresses it leaves out those that are not permitted, for a caller that hears only of its last failure:
    a partner that is down must not look like one that is forbidden.
    """

    def __init__(self, egress: Egress) -> None:
        self._egress = egress
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="resolve")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await asyncio.get_running_loop().run_in_executor(self._threads, _resolve, host, port, family)
        return [
            ResolveResult(
                hostname=host,
                host=sockaddr[0],
                port=port,
                family=kind,
                proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, _, protocol, _, sockaddr in [info for info in found if self._egress.permits(info[4][0])] or found
        ]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _resolve(host: str, port: int, family: int) -> list[AddressInfo]:
    try:
        found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    except UnicodeError:
        raise socket.gaierror(socket.EAI_NONAME, "no name that DNS can hold") from None
    return list(found)
