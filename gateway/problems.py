"""Errors as answers: RFC 9457 problem+json, the same everywhere, and never an echo of what was sent."""

from collections.abc import Mapping

import msgspec
from aiohttp import web

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


def unavailable(detail: str = "The database does not answer; nothing was stored. Try again.") -> web.Response:
    """Trouble of ours that passes: a 503 that says when to come back."""
    return problem(503, "Not available now", detail, headers={"Retry-After": "2"})
