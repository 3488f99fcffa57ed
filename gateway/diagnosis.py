"""Why a source's posts are refused: told to who operates the gateway, while they ask, and never to the caller.

`sluicegate sources diagnose NAME` asks every gateway on its Postgres, by a notification, to look closer at what is
refused of one source: for at most 15 minutes, and 20 requests.  What they find they tell by notifications, too: names and
lengths of headers, how far the clock is off, which common mistake would have verified.  Never a value; and all of it in
memory: what is stored is who asked, in the audit.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import uuid4

import msgspec
import structlog

from gateway.authenticate import Presented, Reason, Scheme
from gateway.authenticate.mistakes import Signs, mistakes
from observability.names import LogEvent
from outbox.database import Database, Session, Unavailable, UnsuitableError
from outbox.ending import end

ASK: Final = "sluicegate_diagnose"
TELL: Final = "sluicegate_diagnosed"
LONGEST: Final = timedelta(minutes=15)
MOST: Final = 20  # requests
MOST_HEADERS: Final = 40  # whose names are told: a notification holds 8,000 bytes
PROBE: Final = 30.0  # seconds between looks at the line on which it is asked

log = structlog.get_logger()


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """From who asks; `seconds` 0 ends what was asked for."""

    id: str
    source: str
    seconds: float
    requests: int


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One request that was refused; nothing of what it said."""

    ask: str
    at: datetime
    reason: str  # as metrics and logs have it
    headers: dict[str, list[int]]  # the length of each value, by name
    body: int  # bytes
    clock: float | None  # seconds by which the sender's time is ahead of ours
    mistakes: list[str]


class Diagnosis:
    """One gateway: it hears what is asked, and tells what it finds."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._asked: dict[str, tuple[Ask, float, int]] = {}  # by source: until when, and how many more
        self._telling: set[asyncio.Task[None]] = set()
        self._hearing: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._hearing = asyncio.create_task(self._hear())

    async def stop(self) -> None:
        if self._hearing is not None:
            await end(self._hearing, *self._telling)

    def look(self, source: str, scheme: Scheme, presented: Presented, reason: Reason) -> None:
        """At a post that was refused; nothing, unless somebody asks about its source."""
        if source not in self._asked:
            return
        ask, until, left = self._asked[source]
        if time.monotonic() > until or left <= 0:
            del self._asked[source]
            return
        self._asked[source] = ask, until, left - 1
        task = asyncio.create_task(self._tell(finding(ask.id, scheme, presented, reason)))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _tell(self, found: Finding) -> None:
        with suppress(Unavailable):
            await self._database.execute("SELECT pg_notify($1, $2)", TELL, msgspec.json.encode(found).decode())

    async def _hear(self) -> None:
        """On a line of its own, which is drawn anew where it is lost, and when the primary is left."""
        while True:
            with suppress(Unavailable, UnsuitableError):
                async with self._database.session() as session:
                    left, looked = self._database.left, time.monotonic()
                    await session.add_listener(ASK, lambda *heard: self._heard(str(heard[3])))
                    while self._database.left == left and not session.is_closed():
                        await asyncio.sleep(1)
                        if time.monotonic() - looked > PROBE:
                            looked = time.monotonic()
                            await session.execute("SELECT 1")
            await asyncio.sleep(1)

    def _heard(self, payload: str) -> None:
        try:
            ask = msgspec.json.decode(payload, type=Ask)
        except msgspec.DecodeError:
            return
        if ask.seconds > 0:
            seconds, requests = min(ask.seconds, LONGEST.total_seconds()), min(ask.requests, MOST)
            self._asked[ask.source] = ask, time.monotonic() + seconds, requests
            log.info(LogEvent.DIAGNOSIS_BEGUN, source=ask.source)
        elif ask.source in self._asked and self._asked[ask.source][0].id == ask.id:
            del self._asked[ask.source]


def finding(ask: str, scheme: Scheme, presented: Presented, reason: Reason) -> Finding:
    names = list(dict.fromkeys(name.lower()[:64] for name in presented.headers))[:MOST_HEADERS]
    signing = scheme.signing(presented) if isinstance(scheme, Signs) else None
    stamp = signing.timestamp if signing else None
    return Finding(
        ask=ask,
        at=datetime.now(UTC),
        reason=reason,
        headers={name: [len(value) for value in presented.headers.getall(name, ())][:3] for name in names},
        body=len(presented.body),
        clock=_ahead(stamp, presented.at),
        mistakes=[] if signing is None else [*_about_unit(stamp, presented.at), *mistakes(signing)],
    )


def _seconds(stamp: str | None) -> int | None:
    return int(stamp) if stamp and stamp.isascii() and stamp.isdigit() and len(stamp) <= 20 else None


def _ahead(stamp: str | None, at: float) -> float | None:
    sent = _seconds(stamp)
    if sent is None:
        return None
    return round((sent / 1000 if _is_milliseconds(sent, at) else sent) - at, 1)


def _about_unit(stamp: str | None, at: float) -> list[str]:
    sent = _seconds(stamp)
    return ["the time is in milliseconds, and seconds are expected"] if sent and _is_milliseconds(sent, at) else []


def _is_milliseconds(sent: int, at: float) -> bool:
    return abs(sent / 1000 - at) < 365 * 86_400


async def ask(
    session: Session, source: str, *, seconds: float, requests: int, asking: Callable[[], None]
) -> AsyncIterator[Finding]:
    """What the gateways find, until so many seconds are over or so many requests were looked at.

    `asking` is called once all gateways that hear have been asked.
    """
    asked = Ask(id=uuid4().hex, source=source, seconds=seconds, requests=requests)
    heard: asyncio.Queue[Finding] = asyncio.Queue()

    def hear(*told: object) -> None:
        with suppress(msgspec.DecodeError):
            found = msgspec.json.decode(str(told[3]), type=Finding)
            if found.ask == asked.id:
                heard.put_nowait(found)

    await session.add_listener(TELL, hear)
    await session.execute("SELECT pg_notify($1, $2)", ASK, msgspec.json.encode(asked).decode())
    asking()
    try:
        async with asyncio.timeout(seconds):
            for _ in range(requests):
                yield await heard.get()
    except TimeoutError:
        return
    finally:
        over = msgspec.structs.replace(asked, seconds=0.0)
        await session.execute("SELECT pg_notify($1, $2)", ASK, msgspec.json.encode(over).decode())
