"""The server that writes: how it is found among those that an address names, and when it is left.

A connection stays with the server that it was opened to, whatever becomes of that one: a primary that was made
read-only, a machine that fell silent, a standby that took over under the same name.  So all pools and sessions of a
process share one `Primary`.  Whoever finds that a connection is of no use any more says so there, and every
connection that was opened before is drawn anew before it is used again: the name is resolved again, and only a
server that writes is taken.
"""

import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg

from observability.logs import log_sparingly
from observability.names import LogEvent

if TYPE_CHECKING:
    Session: TypeAlias = asyncpg.Connection[asyncpg.Record]
else:  # where it runs, asyncpg's classes take no parameter
    Session = asyncpg.Connection

REST = 1.0  # seconds in which the errors of many connections tell of one change

# One of several servers that answers so is passed over.
ELSEWHERE = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.TargetServerAttributeNotMatched,
)


class Primary:
    """What a process knows of the server that writes."""

    def __init__(self) -> None:
        self.left = 0  # how often; what was opened at another count is not used any more
        self._left_at = float("-inf")
        self._host = 0  # of those that the address names: where the last one was found
        self._known = False

    def leave(self, reason: str) -> None:
        """A connection was of no use any more, and the others are not believed either.

        Once a second at most: what was opened before the first error goes with it, whatever it says later.
        """
        if self._known and time.monotonic() > self._left_at + REST:
            self._left_at = time.monotonic()
            self.left += 1
            log_sparingly(LogEvent.POSTGRES_LEFT, reason=reason)

    async def connect(self, dsn: str | None = None, **arguments: Any) -> Session:
        """As asyncpg's own, with the first of the servers that writes; the one where it was found last is asked first.

        Each of them gets its share of the time: asyncpg would give all of it to one that is silent.
        """
        hosts, failed = hosts_in(dsn or ""), None
        arguments["timeout"] /= len(hosts)
        for turn in (*range(self._host, len(hosts)), *range(self._host)):
            try:
                session = await _open(dsn=dsn, **arguments, **hosts[turn])
            except ELSEWHERE as error:
                if failed is None or isinstance(error, asyncpg.TargetServerAttributeNotMatched):
                    failed = error
            else:
                self._host, self._known = turn, True
                return session
        assert failed is not None
        if isinstance(failed, asyncpg.TargetServerAttributeNotMatched):
            self.leave(type(failed).__name__)
        raise failed


def hosts_in(dsn: str) -> list[dict[str, Any]]:
    """The arguments to asyncpg for each of the servers that an address names; none, where that is one."""
    parts = urlsplit(dsn)
    query = parse_qs(parts.query)
    named = (parts.netloc.rpartition("@")[2] or query.get("host", [""])[0]).split(",")
    if len(named) == 1:
        return [{}]
    ports = query.get("port", ["5432"])[0].split(",")
    hosts = []
    for number, host in enumerate(named):
        name, port = re.fullmatch(r"(.*?)(?::(\d+))?", host).groups()  # type: ignore[union-attr]  # it matches all
        hosts.append({"host": unquote(name).strip("[]"), "port": int(port or ports[number % len(ports)])})
    return hosts


async def _open(*, server_settings: Mapping[str, str], **arguments: Any) -> Session:
    """A pooler takes few settings with the first packet and refuses the others: there they are set after it."""
    try:
        session: Session = await asyncpg.connect(server_settings=dict(server_settings), **arguments)
    except asyncpg.PostgresError as error:
        if "startup parameter" not in str(error):
            raise
    else:
        return session
    named = {"application_name": server_settings["application_name"]}
    session = await asyncpg.connect(server_settings=named, **arguments)
    try:
        await session.execute(
            "SELECT set_config(name, value, false) FROM unnest($1::text[], $2::text[]) AS s (name, value)",
            list(server_settings),
            list(server_settings.values()),
        )
    except BaseException:
        session.terminate()
        raise
    return session
