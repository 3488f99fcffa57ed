"""One Odoo, as its destinations share it: one login, one door, and a turn for each record."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, Literal
from weakref import WeakValueDictionary

import msgspec
from pydantic import AfterValidator, Field
from yarl import URL

from connectors import Blocked, Retry, Unknown
from connectors.egress import Egress
from connectors.http_client import Answer, Client
from connectors.odoo_doors import MOST, Door, Failed, Fault, Json2, JsonRpc, Login, not_odoo
from connectors.settings import Network, Pem, Secret, Url, shown
from connectors.tls import certificates
from connectors.way_out import WayOut
from observability.tracing import Tracing


def _without_path(url: str) -> str:
    if URL(url).path not in {"", "/"} or URL(url).query_string:
        raise ValueError(f"is {shown(url)}, but Odoo's API is at the root of its host; leave out what follows the host")
    return url


def _fits_a_header(key: Secret) -> Secret:
    if not (key.reveal().isascii() and key.reveal().isprintable()):
        raise ValueError(f"holds in {key.origin} what no API key holds; copy the key again, and nothing else")
    return key


class OdooSystem(WayOut):
    """One login to one database."""

    url: Annotated[Url, AfterValidator(_without_path)]
    """Where Odoo answers: https://odoo.example, without a path."""
    database: Annotated[str, Field(min_length=1)]
    """The name of its database."""
    user: Annotated[str, Field(min_length=1)]
    """The login of a user made for this, with no more rights than its destinations need."""
    key: Annotated[Secret, AfterValidator(_fits_a_header)]
    """That user's API key."""
    transport: Literal["auto", "jsonrpc", "json2"] = "auto"
    """How to speak to it: JSON-2 needs Odoo 19; left out, Odoo's version decides."""
    allow: tuple[Network, ...] = ()
    """The addresses that it may connect to; left out, it may connect to public ones."""
    ca: Annotated[Pem, AfterValidator(certificates)] | None = None
    """Certificates (PEM) of the authorities to trust instead of the system's; usually file:PATH."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 4
    """Calls at a time, of all its destinations together: each one keeps a worker of Odoo busy."""


JSON2_SINCE = 19
ESCAPES_SINCE = 17  # before, `message_post` took the body for HTML

LONGEST_CALL = timedelta(seconds=60)
"""Odoo repeats a call that collides with another by itself, for half a minute.  What changes something is given that
time, whatever the destination's own patience, so that we know when it is over."""


@dataclass(frozen=True, slots=True)
class Record:
    model: str
    id: int

    def __str__(self) -> str:
        return f"{self.model}/{self.id}"


class Turn:
    """One's turn on a record; what was begun in it goes on to its end, even when nobody waits for it any more."""

    def __init__(self) -> None:
        self.effect: asyncio.Task[object] | None = None


class Server:
    """Where the calls of all destinations of a system go.  Made within a running event loop, and closed."""

    def __init__(self, settings: OdooSystem, timeout: timedelta) -> None:
        self._settings = settings
        self._url = URL(settings.url)
        self._login = Login(database=settings.database, user=settings.user, key=settings.key.reveal())
        self._longest = max(LONGEST_CALL, timeout)
        self._client = Client(
            self._url,
            allow=settings.allow,
            ca=settings.ca,
            way=settings,
            timeout=self._longest,
            concurrency=settings.concurrency,
            agent="sluicegate",
        )
        self._opening = asyncio.Lock()
        self._door: Door | None = None
        self._context: dict[str, object] = {}
        self._escapes = False
        self._turns: WeakValueDictionary[Record, asyncio.Lock] = WeakValueDictionary()
        self._effects: set[asyncio.Task[object]] = set()

    @asynccontextmanager
    async def turn(self, record: Record) -> AsyncIterator[Turn]:
        """Waits until nobody else of this process is at this record.

        Odoo answers two calls on one record at a time by repeating one of them, for seconds; and who looks for an
        earlier note while the call that posts it still goes on, finds none.
        """
        lock = self._turns.setdefault(record, asyncio.Lock())
        await lock.acquire()
        turn = Turn()
        try:
            yield turn
        finally:
            if turn.effect is None or turn.effect.done():
                lock.release()
            else:
                turn.effect.add_done_callback(lambda _: lock.release())

    async def ask(
        self, tracing: Tracing, model: str, method: str, ids: Sequence[int] | None = None, /, **arguments: object
    ) -> Any:
        """Calls what changes nothing: without an answer it is simply asked again later."""
        try:
            return await self._call(tracing, model, method, ids, arguments)
        except Failed as failed:
            if isinstance(failed.outcome, Unknown):
                raise Failed(Retry(failed.outcome.reason, status=failed.outcome.status)) from None
            raise

    async def act(
        self, turn: Turn, tracing: Tracing, model: str, method: str, ids: Sequence[int], /, **arguments: object
    ) -> Any:
        """Calls what changes something, in one's turn."""
        turn.effect = asyncio.create_task(self._call(tracing, model, method, ids, arguments))
        self._effects.add(turn.effect)
        turn.effect.add_done_callback(self._effects.discard)
        return await asyncio.shield(turn.effect)

    async def escapes(self, tracing: Tracing) -> bool:
        """Whether this Odoo makes text of what is posted as a note."""
        if self._door is None:
            await self._open(tracing)
        return self._escapes

    async def close(self) -> None:
        for effect in tuple(self._effects):
            effect.cancel()
        await asyncio.gather(*self._effects, return_exceptions=True)
        if self._door is not None:
            await self._door.close()
        await self._client.close()

    async def _call(
        self, tracing: Tracing, model: str, method: str, ids: Sequence[int] | None, arguments: dict[str, Any]
    ) -> object:
        door = self._door or await self._open(tracing)
        context = self._context | arguments.get("context", {})
        return await door.call(model, method, ids, arguments | {"context": context}, tracing)

    async def _open(self, tracing: Tracing) -> Door:
        async with self._opening:
            if self._door is None:
                door = await self._choose(tracing)
                try:
                    self._context = await self._companies(door, tracing)
                except BaseException:
                    await door.close()
                    raise
                self._door = door
            return self._door

    async def _choose(self, tracing: Tracing) -> Door:
        transport = self._settings.transport
        try:
            major = JSON2_SINCE if transport == "json2" else await self._version(tracing)
        except Failed:
            if transport == "auto":
                raise
            major = 0  # a proxy may let nothing but the API through
        self._escapes = major >= ESCAPES_SINCE
        if transport == "json2" or (transport == "auto" and major >= JSON2_SINCE):
            return Json2(self._client, self._url, self._login)
        return JsonRpc(
            self._url,
            self._login,
            egress=Egress(self._settings.allow, self._settings.through),
            tls=self._settings.encrypted(self._settings.ca) if self._url.scheme == "https" else None,
            seconds=self._longest.total_seconds(),
            threads=self._settings.concurrency,
        )

    async def _companies(self, door: Door, tracing: Tracing) -> dict[str, object]:
        """All companies of the user: without them Odoo shows the records of one, and those of the others look gone."""
        try:
            found = await door.call(
                "res.users",
                "search_read",
                None,
                {"domain": [["login", "=", self._login.user]], "fields": ["company_id", "company_ids"], "limit": 1},
                tracing,
            )
        except Fault as fault:
            if fault.name.endswith("AccessError"):
                return {}
            raise
        match found:
            case [{"company_id": [int(first), *_], "company_ids": [*others]}]:
                return {"allowed_company_ids": [first, *(other for other in others if other != first)]}
            case _:
                return {}

    async def _version(self, tracing: Tracing) -> int:
        headers = {"content-type": "application/json"}
        answer = await self._client.send("GET", self._url / "web/version", headers=headers, tracing=tracing, read=MOST)
        if isinstance(answer, Answer) and answer.status == 404:
            asked = b'{"jsonrpc": "2.0", "method": "call", "params": {}, "id": 1}'
            answer = await self._client.send(
                "POST",
                self._url / "web/webclient/version_info",
                headers=headers,
                body=asked,
                tracing=tracing,
                read=MOST,
            )
        if not isinstance(answer, Answer):
            raise Failed(Retry(answer.reason, whole_destination=True) if isinstance(answer, Unknown) else answer)
        if answer.status != 200:
            raise Failed(not_odoo(answer.status, answer.headers))
        return _major(answer.body)


def _major(body: bytes) -> int:
    """19 of `19.0`, `saas~19.4+e` and `19.0-20260701`."""
    try:
        said = msgspec.json.decode(body)
    except msgspec.DecodeError:
        said = None
    match said:
        case {"version": str(version)} | {"result": {"server_version": str(version)}}:
            digits = version.removeprefix("saas~").partition(".")[0]
            if digits.isascii() and digits.isdigit():
                return int(digits)
        case _:
            pass
    raise Failed(Blocked("configuration: url: what answers there does not tell Odoo's version"))
