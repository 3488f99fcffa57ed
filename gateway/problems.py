"""Errors as answers: RFC 9457 problem+json, the same everywhere, and never an echo of what was sent."""

from collections.abc import Awaitable, Mapping

import msgspec
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from observability.names import LogEvent
from outbox.database import Unavailable

log = structlog.get_logger()
JSON = msgspec.json.Encoder()


def problem(
    status: int, title: str, detail: str, *, headers: Mapping[str, str] | None = None, **extra: object
) -> web.Response:
    """An error as application/problem+json.

    `title` names the kind of problem and `detail` says what to do about this one; both are sentences of ours.
    Whoever calls this passes no word of the caller's body: what a policy does not name must not travel back
    into somebody's log either.
    """
    told = {"type": "about:blank", "title": title, "status": status, "detail": detail, **extra}
    return web.Response(
        status=status,
        body=JSON.encode(told),
        content_type="application/problem+json",
        headers={"Cache-Control": "no-store", **(headers or {})},
    )


UNKNOWN = "The database does not answer, so nothing is promised. Try again: what was stored is recognised then."


def unavailable(detail: str = UNKNOWN) -> web.Response:
    """Trouble of ours that passes: a 503 that says when to come back.

    Of a statement that was sent and not answered nobody can say whether it took effect, so nothing is said of it.
    """
    return problem(503, "Not available now", detail, headers={"Retry-After": "2"})


@web.middleware
async def problems_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what goes wrong on the way of a request into problem+json: aiohttp's refusals, and trouble of ours.

    A bug is logged here, in one place, with its stack; the caller learns only that it was not their fault.
    """
    return await answered(handler(request), request)


async def answered(handling: Awaitable[web.StreamResponse], request: web.Request | None = None) -> web.StreamResponse:
    """The same for one; without a request it is a post that went past the router."""
    try:
        return await handling
    except web.HTTPException as refused:
        if refused.status < 400:
            raise
        allow = {"Allow": refused.headers["Allow"]} if "Allow" in refused.headers else None
        return problem(refused.status, refused.reason, DETAILS.get(refused.status, refused.reason), headers=allow)
    except Unavailable:
        return unavailable()
    except Exception:
        method, route = (request.method, _route(request)) if request else ("POST", HOOKS)
        log.exception(LogEvent.REQUEST_FAILED, method=method, route=route)
        return problem(500, "Trouble of ours", "The request failed by a defect of ours, which was logged.")


HOOKS = "/hooks/{source}"
DETAILS = {
    404: "There is nothing at this address.",
    405: "This address does not take that method; the header Allow says which it takes.",
    413: "The body is larger than is taken here.",
}


def _route(request: web.Request) -> str | None:
    """The declared route, never the path: that may hold a token."""
    try:
        resource = request.match_info.route.resource
    except AssertionError:  # it went past the router
        return HOOKS
    return resource.canonical if resource else None
