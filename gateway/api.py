"""The operators' API: what people read and do, as JSON.

Each thing that can be asked is declared once, in ROUTES: it is served, checked and documented from there.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Annotated, Any, Generic, TypeVar
from uuid import UUID

import msgspec
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from dead_letter.audit import Audit, Deed
from dead_letter.left_behind import CannotMoveError, Home, LeftBehind, LeftPreview, Moved
from dead_letter.letters import Cause, DeadLetters, EmptySelectionError, Instant, Letter, Preview, Repair, Select, Word
from dead_letter.tokens import Holder, Tokens
from gateway.destinations import DestinationLine, home_called, line, lines, refuse_what_is_delivered
from gateway.openapi import describe
from gateway.permissions import RIGHTS, Permission
from gateway.problems import JSON, problem, problems_only
from gateway.silence import Expectation
from observability.names import LogEvent
from outbox.destinations import Destinations, UnknownDestinationError
from outbox.fleet import Fleet, Process
from outbox.page import BadCursorError, Page, page, place_of
from outbox.records import Books, EventRecord, EventSummary, Records, Rejection

log = structlog.get_logger()

BODY = 256 * 1024  # bytes that a body may have


def api(
    *,
    records: Records,
    letters: DeadLetters,
    tokens: Tokens,
    destinations: Destinations,
    audit: Audit,
    expectation: Callable[[], Awaitable[Expectation]],
    connectors: Callable[[], Mapping[str, str]],
    left: LeftBehind,
    homes: Callable[[], Mapping[str, Home]],
    fleet: Fleet,
    version: str,
) -> web.Application:
    """The application to mount at /api/v1.

    As of now: `connectors` is the kind of each configured destination, and `homes` those that may be reassigned to.
    """
    operators = Operators(
        records=records,
        letters=letters,
        destinations=destinations,
        audit=audit,
        expectation=expectation,
        connectors=connectors,
        left=left,
        homes=homes,
        fleet=fleet,
        version=version,
    )
    application = web.Application(middlewares=[problems_only, _refusals])
    for route in ROUTES:
        application.router.add_route(route.method, route.path, _serve(route, operators, tokens))
    return application


# ── what is asked ────────────────────────────────────────────────────────────────────────────────────

Limit = Annotated[int, msgspec.Meta(ge=1, le=200, description="How many at most.")]
Cursor = Annotated[str, msgspec.Meta(max_length=1024, description="`next` of the page before.")]
BOUNDS = {"since": "from", "until": "to"}


class Nothing(msgspec.Struct, frozen=True):
    """No parameters."""


class EventsQuery(msgspec.Struct, frozen=True, kw_only=True, rename=BOUNDS):
    """Which events.  `from` and `to` bound when they were accepted."""

    source: Word | None = None
    type: Annotated[Word, msgspec.Meta(description="A type, or the beginning of some: `shop.order.*`.")] | None = None
    subject: Word | None = None
    facility: Word | None = None
    since: Instant | None = None
    until: Instant | None = None
    cursor: Cursor | None = None
    limit: Limit = 50


class LettersQuery(msgspec.Struct, frozen=True, kw_only=True, rename=BOUNDS):
    """Which dead letters.  `from` and `to` bound when they died."""

    destination: Word | None = None
    cause: Word | None = None
    subject: Word | None = None
    facility: Word | None = None
    since: Instant | None = None
    until: Instant | None = None
    cursor: Cursor | None = None
    limit: Limit = 50

    @property
    def select(self) -> Select:
        return Select(
            destination=self.destination,
            cause=self.cause,
            subject=self.subject,
            facility=self.facility,
            since=self.since,
            until=self.until,
        )


class PageQuery(msgspec.Struct, frozen=True, kw_only=True):
    cursor: Cursor | None = None
    limit: Limit = 50


class RejectionsQuery(msgspec.Struct, frozen=True, kw_only=True, rename=BOUNDS):
    source: Word | None = None
    reason: Word | None = None
    since: Instant | None = None
    until: Instant | None = None
    cursor: Cursor | None = None
    limit: Limit = 50


class AuditQuery(msgspec.Struct, frozen=True, kw_only=True, rename=BOUNDS):
    actor: Word | None = None
    action: Word | None = None
    target: Word | None = None
    since: Instant | None = None
    until: Instant | None = None
    cursor: Cursor | None = None
    limit: Limit = 50


Reason = Annotated[
    str,
    msgspec.Meta(
        min_length=1,
        max_length=500,
        pattern=r"^[^\x00-\x1f\x7f]*\S[^\x00-\x1f\x7f]*$",
        description="Why; it stands in the audit.",
    ),
]


class RepairBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to replay or discard, and why.  A dry run needs no reason and changes nothing."""

    select: Select
    reason: Reason | None = None
    dry_run: bool = False


class HoldBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why, and until when; without `until`, until somebody releases it."""

    reason: Reason
    until: Instant | None = None


class ReassignBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where to, and why.  A dry run needs no reason and changes nothing."""

    to: Word
    reason: Reason | None = None
    dry_run: bool = False


class DiscardBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why.  A dry run needs no reason and changes nothing."""

    reason: Reason | None = None
    dry_run: bool = False


class ReleaseBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    reason: Reason


Query = TypeVar("Query")
Body = TypeVar("Body")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked(Generic[Query, Body]):
    """A request of somebody who may make it, read and checked."""

    holder: Holder | None  # none: the route is open
    place: Mapping[str, str]  # the variable parts of the path
    query: Query
    body: Body


@dataclass(frozen=True, slots=True)
class Answer:
    value: object
    status: int = 200


class Refusal(Exception):  # noqa: N818 — an answer, not a mistake
    """An answer that is a problem."""

    def __init__(self, status: int, title: str, detail: str, **headers: str) -> None:
        super().__init__(title)
        self.answer = problem(
            status, title, detail, headers={name.replace("_", "-"): headers[name] for name in headers}
        )


# ── what is answered ─────────────────────────────────────────────────────────────────────────────────


class Operators:
    """What people read and do."""

    def __init__(
        self,
        *,
        records: Records,
        letters: DeadLetters,
        destinations: Destinations,
        audit: Audit,
        expectation: Callable[[], Awaitable[Expectation]],
        connectors: Callable[[], Mapping[str, str]],
        left: LeftBehind,
        homes: Callable[[], Mapping[str, Home]],
        fleet: Fleet,
        version: str,
    ) -> None:
        self._records = records
        self._letters = letters
        self._destinations = destinations
        self._audit = audit
        self._expectation = expectation
        self._connectors = connectors
        self._left = left
        self._homes = homes
        self._fleet = fleet
        self._version = version
        self._proving = asyncio.Lock()

    async def events(self, asked: Asked[EventsQuery, None]) -> Answer:
        query = asked.query
        return Answer(
            await self._records.events(
                source=query.source,
                type=query.type,
                subject=query.subject,
                facility=query.facility,
                since=query.since,
                until=query.until,
                cursor=query.cursor,
                limit=query.limit,
            )
        )

    async def event(self, asked: Asked[Nothing, None]) -> Answer:
        try:
            event = await self._records.event(UUID(asked.place["id"]))
        except ValueError:
            event = None
        if event is None:
            raise Refusal(404, "No such event", "There is no event of this id, or retention has taken it.")
        return Answer(event)

    async def dead_letters(self, asked: Asked[LettersQuery, None]) -> Answer:
        return Answer(
            await self._letters.letters(asked.query.select, cursor=asked.query.cursor, limit=asked.query.limit)
        )

    async def causes(self, asked: Asked[LettersQuery, None]) -> Answer:
        return Answer(
            await self._letters.causes(asked.query.select, cursor=asked.query.cursor, limit=asked.query.limit)
        )

    async def replay(self, asked: Asked[Nothing, RepairBody]) -> Answer:
        return await self._repair(asked, self._letters.replay, LogEvent.DEAD_LETTERS_REPLAYED)

    async def discard(self, asked: Asked[Nothing, RepairBody]) -> Answer:
        return await self._repair(asked, self._letters.discard, LogEvent.DEAD_LETTERS_DISCARDED)

    async def _repair(
        self, asked: Asked[Nothing, RepairBody], deed: Callable[..., Awaitable[Repair]], told: LogEvent
    ) -> Answer:
        """Preview or do; whoever may repair one event at a time must name it."""
        body, holder = asked.body, _known(asked.holder)
        try:
            if body.select.destination is not None:
                await self._destinations.require(body.select.destination, configured=self._connectors())
            if body.dry_run:
                return Answer(await self._letters.preview(body.select))
            if not body.select.single and not body.select.empty:
                _require(holder, Permission.REPAIR_MANY, "name one event in select.events, or ask one of those")
            repair = await deed(body.select, reason=_said(body.reason), actor=holder.name)
        except UnknownDestinationError as unknown:
            raise Refusal(422, "No such destination", str(unknown)) from None
        except EmptySelectionError:
            raise Refusal(
                422, "Nothing selected", "An empty `select` would match every dead letter: name what to take."
            ) from None
        log.info(told, id=str(repair.id), count=repair.count, actor=holder.name)
        return Answer(repair, 202)

    async def destinations(self, asked: Asked[PageQuery, None]) -> Answer:
        after = place_of(asked.query.cursor, str) or ""
        found = [each for each in lines(await self._records.standings(), self._connectors()) if each.name > after]
        return Answer(page(found, asked.query.limit, item=lambda each: each, place=lambda each: each.name))

    async def expectations(self, asked: Asked[Nothing, None]) -> Answer:  # noqa: ARG002
        return Answer(await self._expectation())

    async def hold(self, asked: Asked[Nothing, HoldBody]) -> Answer:
        holder, name = _known(asked.holder), asked.place["name"]
        if asked.body.until is not None and asked.body.until <= datetime.now(UTC):
            raise Refusal(422, "The hold would be over", "`until` lies in the past.")
        await self._destinations.hold(name, until=asked.body.until, reason=asked.body.reason.strip(), by=holder.name)
        log.info(LogEvent.DESTINATION_HELD, destination=name, actor=holder.name)
        return Answer(await self._standing(name))

    async def release(self, asked: Asked[Nothing, ReleaseBody]) -> Answer:
        holder, name = _known(asked.holder), asked.place["name"]
        if await self._destinations.release(name, by=holder.name, reason=asked.body.reason.strip()):
            log.info(LogEvent.DESTINATION_RELEASED, destination=name, actor=holder.name)
        return Answer(await self._standing(name))

    async def reassign(self, asked: Asked[Nothing, ReassignBody]) -> Answer:
        name, body = asked.place["name"], asked.body
        refuse_what_is_delivered(name, self._connectors())
        try:
            home = home_called(body.to, self._homes())
        except UnknownDestinationError as unknown:
            raise Refusal(422, "No such destination", f"`to`: {unknown}") from None
        if body.dry_run:
            return Answer(await self._left.preview(name, home))
        reason, actor = _said(body.reason), _known(asked.holder).name
        moved = await self._left.reassign(name, home, reason=reason, actor=actor)
        log.info(
            LogEvent.DELIVERIES_REASSIGNED,
            id=str(moved.id),
            count=moved.count,
            destination=name,
            to=home.name,
            actor=actor,
        )
        return Answer(moved, 202)

    async def discard_left(self, asked: Asked[Nothing, DiscardBody]) -> Answer:
        name, body = asked.place["name"], asked.body
        refuse_what_is_delivered(name, self._connectors())
        if body.dry_run:
            return Answer(await self._left.preview(name))
        reason, actor = _said(body.reason), _known(asked.holder).name
        moved = await self._left.discard(name, reason=reason, actor=actor)
        log.info(LogEvent.DELIVERIES_DISCARDED, id=str(moved.id), count=moved.count, destination=name, actor=actor)
        return Answer(moved, 202)

    async def rejections(self, asked: Asked[RejectionsQuery, None]) -> Answer:
        query = asked.query
        return Answer(
            await self._records.rejections(
                source=query.source,
                reason=query.reason,
                since=query.since,
                until=query.until,
                cursor=query.cursor,
                limit=query.limit,
            )
        )

    async def audit(self, asked: Asked[AuditQuery, None]) -> Answer:
        query = asked.query
        return Answer(
            await self._audit.deeds(
                actor=query.actor,
                action=query.action,
                target=query.target,
                since=query.since,
                until=query.until,
                cursor=query.cursor,
                limit=query.limit,
            )
        )

    async def invariants(self, asked: Asked[Nothing, None]) -> Answer:  # noqa: ARG002
        async with self._proving:  # it reads everything: one at a time is enough
            return Answer(await self._records.books())

    async def processes(self, asked: Asked[PageQuery, None]) -> Answer:
        after = place_of(asked.query.cursor, tuple[str, datetime])
        found = [each for each in await self._fleet.processes() if after is None or (each.name, each.since) > after]
        return Answer(
            page(found, asked.query.limit, item=lambda each: each, place=lambda each: (each.name, each.since))
        )

    async def openapi(self, asked: Asked[Nothing, None]) -> Answer:  # noqa: ARG002
        return Answer(describe(ROUTES, version=self._version))

    async def _standing(self, name: str) -> DestinationLine:
        standing = next((found for found in await self._records.standings() if found.name == name), None)
        return line(name, self._connectors().get(name), standing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One thing that can be asked: who may, with what, and what comes of it."""

    method: str
    path: str
    does: str
    serve: Callable[[Operators, Any], Awaitable[Answer]]
    permission: Permission | None  # none: open to everybody, for it tells nothing about anybody
    query: type = Nothing
    body: type | None = None
    answers: Mapping[int, object]
    conflicts: bool = False  # whether it may be told that it cannot be done now

    @property
    def name(self) -> str:
        return self.serve.__name__


ROUTES = (
    Route(
        method="GET",
        path="/events",
        does="Events, the newest first.",
        serve=Operators.events,
        permission=Permission.READ_EVENTS,
        query=EventsQuery,
        answers={200: Page[EventSummary]},
    ),
    Route(
        method="GET",
        path="/events/{id}",
        does="One event with every delivery and every attempt.",
        serve=Operators.event,
        permission=Permission.READ_EVENTS,
        answers={200: EventRecord},
    ),
    Route(
        method="GET",
        path="/dead-letters",
        does="Deliveries that gave up, the newest first.",
        serve=Operators.dead_letters,
        permission=Permission.READ_EVENTS,
        query=LettersQuery,
        answers={200: Page[Letter]},
    ),
    Route(
        method="GET",
        path="/dead-letters/causes",
        does="What stopped them, each cause once, with what to do about it.",
        serve=Operators.causes,
        permission=Permission.READ_EVENTS,
        query=LettersQuery,
        answers={200: Page[Cause]},
    ),
    Route(
        method="POST",
        path="/dead-letters/replay",
        does="Send dead letters again. A dry run answers 200 and changes nothing.",
        serve=Operators.replay,
        permission=Permission.REPAIR_ONE,
        body=RepairBody,
        answers={200: Preview, 202: Repair},
    ),
    Route(
        method="POST",
        path="/dead-letters/discard",
        does="Lay dead letters aside for good. A dry run answers 200 and changes nothing.",
        serve=Operators.discard,
        permission=Permission.REPAIR_ONE,
        body=RepairBody,
        answers={200: Preview, 202: Repair},
    ),
    Route(
        method="GET",
        path="/destinations",
        does="Destinations, and how each is doing.",
        serve=Operators.destinations,
        permission=Permission.READ_HEALTH,
        query=PageQuery,
        answers={200: Page[DestinationLine]},
    ),
    Route(
        method="GET",
        path="/expectations",
        does="What is expected of sources and destinations, and whether it comes.",
        serve=Operators.expectations,
        permission=Permission.READ_HEALTH,
        answers={200: Expectation},
    ),
    Route(
        method="POST",
        path="/destinations/{name}/hold",
        does="Deliver nothing there any more; what is owed is kept.",
        serve=Operators.hold,
        permission=Permission.HOLD,
        body=HoldBody,
        answers={200: DestinationLine},
    ),
    Route(
        method="POST",
        path="/destinations/{name}/release",
        does="Deliver there again.",
        serve=Operators.release,
        permission=Permission.HOLD,
        body=ReleaseBody,
        answers={200: DestinationLine},
    ),
    Route(
        method="POST",
        path="/destinations/{name}/reassign",
        does="Send elsewhere what waits for a destination that is not configured any more. "
        "A dry run answers 200 and changes nothing.",
        serve=Operators.reassign,
        conflicts=True,
        permission=Permission.REPAIR_MANY,
        body=ReassignBody,
        answers={200: LeftPreview, 202: Moved},
    ),
    Route(
        method="POST",
        path="/destinations/{name}/discard",
        does="Lay aside for good what waits for a destination that is not configured any more. "
        "A dry run answers 200 and changes nothing.",
        serve=Operators.discard_left,
        conflicts=True,
        permission=Permission.REPAIR_MANY,
        body=DiscardBody,
        answers={200: LeftPreview, 202: Moved},
    ),
    Route(
        method="GET",
        path="/rejections",
        does="What was refused at the door, by second, source and reason.",
        serve=Operators.rejections,
        permission=Permission.READ_HEALTH,
        query=RejectionsQuery,
        answers={200: Page[Rejection]},
    ),
    Route(
        method="GET",
        path="/audit",
        does="Who did what, the newest first.",
        serve=Operators.audit,
        permission=Permission.READ_AUDIT,
        query=AuditQuery,
        answers={200: Page[Deed]},
    ),
    Route(
        method="GET",
        path="/invariants",
        does="The proof that nothing is lost, counted now.",
        serve=Operators.invariants,
        permission=Permission.READ_HEALTH,
        answers={200: Books},
    ),
    Route(
        method="GET",
        path="/processes",
        does="Who works on this database, and by which configuration.",
        serve=Operators.processes,
        permission=Permission.READ_HEALTH,
        query=PageQuery,
        answers={200: Page[Process]},
    ),
    Route(
        method="GET",
        path="/openapi.json",
        does="This API, described.",
        serve=Operators.openapi,
        permission=None,
        answers={200: dict[str, Any]},
    ),
)


# ── the way of one request ───────────────────────────────────────────────────────────────────────────


def _serve(route: Route, operators: Operators, tokens: Tokens) -> Handler:
    """Who are you, may you, what exactly do you ask; then the answer."""

    async def serve(request: web.Request) -> web.Response:
        holder = None
        if route.permission is not None:
            holder = await _identify(request, tokens)
            _require(holder, route.permission)
        answer = await route.serve(
            operators,
            Asked(
                holder=holder,
                place=request.match_info,
                query=_read_query(request, route.query),
                body=await _read_body(request, route.body) if route.body else None,
            ),
        )
        return web.Response(
            status=answer.status,
            body=JSON.encode(answer.value),
            content_type="application/json",
            headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"},
        )

    return serve


async def _identify(request: web.Request, tokens: Tokens) -> Holder:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    holder = await tokens.holder(token.strip()) if scheme.lower() == "bearer" else None
    if holder is None:
        raise Refusal(
            401,
            "Not proven who you are",
            "Send a good token as `Authorization: Bearer`; `sluicegate token create` makes one.",
            WWW_Authenticate="Bearer",
        )
    return holder


def _said(reason: str | None) -> str:
    if reason is None:
        raise Refusal(422, "No reason given", "Say why in `reason`: it stands in the audit.")
    return reason.strip()


def _known(holder: Holder | None) -> Holder:
    assert holder is not None, "a route that changes something is never open"
    return holder


def _require(holder: Holder, permission: Permission, instead: str = "ask one of those") -> None:
    """The one place where rights are checked."""
    if permission not in RIGHTS[holder.role]:
        able = ", ".join(role for role in RIGHTS if permission in RIGHTS[role])
        raise Refusal(
            403, "Not allowed", f"The role {holder.role} may not do this ({permission}); {able} may: {instead}."
        )


def _read_query(request: web.Request, kind: type[Query]) -> Query:
    """The parameters, of which each is known and stands once."""
    known = [field.encode_name for field in msgspec.structs.fields(kind)]  # type: ignore[arg-type]
    for name in request.query:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"known are: {', '.join(known) or 'none'}."
            raise Refusal(400, "Unknown parameter", f"There is a parameter that is not known here; {hint}")
        if len(request.query.getall(name)) > 1:
            raise Refusal(400, "Parameter stands twice", f"`{name}` stands more than once.")
    try:
        return msgspec.convert(dict(request.query), kind, strict=False)
    except msgspec.ValidationError as error:
        raise Refusal(400, "Bad parameter", _told(error, kind, _IN_QUERY)) from None


async def _read_body(request: web.Request, kind: type[Body]) -> Body:
    """The body as JSON of the declared shape."""
    if request.content_type != "application/json":
        raise Refusal(415, "Not JSON", "Send the body as application/json.")
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > BODY:
            raise web.HTTPRequestEntityTooLarge(BODY, len(body))
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise Refusal(422, "Bad field", _told(error, kind, _IN_BODY)) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise Refusal(400, "Not readable", "The body is not JSON.") from None


_TIME = "write a time with its zone, such as 2026-11-23T10:00:00Z"
_IN_QUERY = {
    "limit": "write a number from 1 to 200",
    "cursor": "write the `next` of the page before, or leave it out",
    "from": _TIME,
    "to": _TIME,
}
_IN_BODY = {
    "": "write the body as a JSON object",
    "select": 'write what to take, such as {"destination": "NAME"}',
    "events": "write 1 to 1,000 ids of events, as a list",
    "from": _TIME,
    "to": _TIME,
    "until": _TIME,
    "reason": "write why, in one line of 1 to 500 characters",
    "dry_run": "write true or false",
}
_WORD = "write 1 to 512 characters in one line"
"""How to write each parameter and field; most are words."""


def _told(error: msgspec.ValidationError, kind: type, written: Mapping[str, str]) -> str:
    """Where it is wrong and how to write it, in our words; no word of the caller's."""
    what, _, where = str(error).partition(" - at `$")
    where = where.strip("`.")
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", what):
        name = missing[1]
        return f"`{name}` is missing: {written.get(name, _WORD)}."
    if what.startswith("Object contains unknown field"):
        known = ", ".join(f"`{field.encode_name}`" for field in msgspec.structs.fields(Select if where else kind))
        return f"{f'`{where}`' if where else 'The body'} holds a field that is not known here; known are: {known}."
    name = where.rpartition(".")[2].partition("[")[0]
    how = written.get(name, _WORD)
    return f"`{where}`: {how}." if where else f"{how[:1].upper()}{how[1:]}."


@web.middleware
async def _refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refusal as refusal:
        return refusal.answer
    except BadCursorError:
        return problem(400, "Bad cursor", "`cursor` is not the `next` of a page; leave it out to begin at the start.")
    except UnknownDestinationError as unknown:
        return problem(404, "No such destination", str(unknown))
    except CannotMoveError as refusal:
        return problem(409, "Cannot be taken now", str(refusal))
