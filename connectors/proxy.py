"""Out through a proxy, by HTTP CONNECT: to an address that was judged here, or to a name where the proxy alone can look it up.

What the proxy does wrong is its own outcome: the partner was never asked, so no try of a delivery is used up by it.
"""

import base64
import re
import socket
import time
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit

from outbox.event import Blocked, Retry

LONGEST_HEAD = 16 * 1024
PATIENCE = 15.0  # seconds, for the proxy to connect
UNREACHED = {502, 503, 504}  # it did what it could: whom it was to connect to does not answer


class ProxyFault(OSError):  # noqa: N818  # what happened, in two words
    """There is no tunnel."""

    def __init__(self, outcome: Blocked | Retry) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class Proxy:
    """Opens tunnels; blocks, so it is called in a thread."""

    url: str
    login: str | None = None  # user:password
    resolves: bool = False  # it is given names

    def tunnel(self, host: str, port: int, timeout: float) -> socket.socket:
        """A blocking socket that leads to `host`; raises ProxyFault."""
        until = time.monotonic() + min(timeout, PATIENCE)
        place = urlsplit(self.url)
        try:
            connection = socket.create_connection((place.hostname or "", place.port or 3128), _left(until))
        except OSError:
            raise ProxyFault(Blocked("proxy: it cannot be connected to")) from None
        try:
            connection.sendall(self._asked(host, port))
            _refuse(_head(connection, until))
        except ProxyFault:
            connection.close()
            raise
        except OSError:
            connection.close()
            raise ProxyFault(Blocked("proxy: it does not answer")) from None
        connection.settimeout(timeout)
        return connection

    def _asked(self, host: str, port: int) -> bytes:
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
        if self.login is not None:
            lines.append(f"Proxy-Authorization: Basic {base64.b64encode(self.login.encode()).decode()}")
        return "\r\n".join([*lines, "", ""]).encode("idna" if not place.isascii() else "ascii")


def _head(connection: socket.socket, until: float) -> bytes:
    """All that the proxy says before the tunnel begins; whom it leads to speaks only when spoken to."""
    head = b""
    while b"\r\n\r\n" not in head:
        connection.settimeout(_left(until))
        more = connection.recv(4096)
        if not more or len(head) > LONGEST_HEAD:
            raise ProxyFault(Blocked("proxy: it hangs up before it answers"))
        head += more
    return head


def _refuse(head: bytes) -> None:
    """Raises ProxyFault unless there is a tunnel now."""
    said, _, more = head.partition(b"\r\n\r\n")
    answered = _STATUS.match(said)
    if answered is None or (more and answered[1].startswith(b"2")):
        raise ProxyFault(Blocked("configuration: proxy: what answers there is no HTTP proxy"))
    status = int(answered[1])
    words = f"answered {status} {_PHRASES.get(status, '')}".rstrip()
    if 200 <= status < 300:
        return
    if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        raise ProxyFault(Blocked(f"credentials: proxy: {words}", status))
    if status in UNREACHED:
        raise ProxyFault(Retry(f"the proxy could not reach it: {words}", whole_destination=True))
    raise ProxyFault(Blocked(f"configuration: proxy: {words}", status))


def _left(until: float) -> float:
    return max(0.01, until - time.monotonic())


_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})\b")
_PHRASES = {status.value: status.phrase for status in HTTPStatus}
