"""The bytes of a request, within limits that are judged before anything is read."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from aiohttp import web
from aiohttp.client_exceptions import ClientPayloadError
from aiohttp.web_exceptions import HTTPException
from multidict import CIMultiDictProxy

from gateway.config_sections import Source

BODY_DEADLINE = timedelta(seconds=10)


class Head(Protocol):
    """Of a request."""

    @property
    def headers(self) -> CIMultiDictProxy[str]: ...

    @property
    def content_type(self) -> str: ...

    @property
    def charset(self) -> str | None: ...

    @property
    def content_length(self) -> int | None: ...


class Unacceptable(Exception):  # noqa: N818  an answer, not a mistake
    """Not read, or not to its end; `code` for metrics and logs, the rest for the caller."""

    def __init__(self, status: int, code: str, title: str, detail: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code
        self.title = title
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Media:
    """What a source posts."""

    usual: str  # as nearly everybody says it
    takes: Callable[[Head], bool]  # whether somebody says the same otherwise
    wrong: Callable[[Head], Unacceptable]


def _not_json(request: Head) -> Unacceptable:
    mend = " Or let the source say format: form." if request.content_type == FORM.usual else ""
    return Unacceptable(415, "not_json", "Not JSON", f"Send JSON, with Content-Type: application/json.{mend}")


def _not_a_form(request: Head) -> Unacceptable:
    mend = " Or leave format out of the source." if is_json(request.content_type) else ""
    return Unacceptable(
        415, "not_a_form", "Not a form", f"Send a form in UTF-8, with Content-Type: {FORM.usual}.{mend}"
    )


def _is_form(request: Head) -> bool:
    return request.content_type == FORM.usual and (request.charset or "utf-8").lower() == "utf-8"


def is_json(media_type: str) -> bool:
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))


JSON = Media("application/json", lambda request: is_json(request.content_type), _not_json)
FORM = Media("application/x-www-form-urlencoded", _is_form, _not_a_form)


def media_of(source: Source) -> Media:
    return JSON if source.format == "json" else FORM


def judge_head(request: Head, limit: int, media: Media = JSON) -> None:
    """What the head says of the body; raises Unacceptable."""
    headers = request.headers
    if "Content-Encoding" in headers and any(e.lower() != "identity" for e in headers.getall("Content-Encoding")):
        raise Unacceptable(415, "encoded", "Encoded body", "Send the body as it is, without Content-Encoding.")
    if "Transfer-Encoding" in headers and headers["Transfer-Encoding"].lower() != "chunked":
        raise Unacceptable(400, "transfer_encoding", "Transfer-Encoding", "Only chunked is understood.")
    if "Expect" in headers and headers["Expect"].lower() != "100-continue":
        raise Unacceptable(417, "expectation", "Expectation", "Only 100-continue is understood.")
    if headers.get("Content-Type") != media.usual and not media.takes(request):
        raise media.wrong(request)
    if (request.content_length or 0) > limit:
        raise too_large(limit)


def too_large(limit: int) -> Unacceptable:
    return Unacceptable(413, "too_large", "Body too large", f"At most {limit} bytes are taken here.")


def within(body: bytes, limit: int) -> bytes:
    """A body that is there as a whole, if it is no larger than `limit` bytes; raises Unacceptable."""
    if len(body) > limit:
        raise too_large(limit)
    return body


async def read_body(request: web.Request, limit: int) -> bytes:
    """All of it, if it comes in time and is no larger than `limit` bytes; raises Unacceptable."""
    content = request.content
    if content.is_eof():  # it came with its head, as most do
        return within(content.read_nowait(), limit)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_DEADLINE.total_seconds()):
            async for chunk in content.iter_any():
                size += len(chunk)
                if size > limit:
                    raise too_large(limit)
                chunks.append(chunk)
    except TimeoutError as error:
        raise Unacceptable(408, "slow_body", "Too slow", "The body did not arrive in time.") from error
    except ConnectionError as error:
        raise Unacceptable(400, "broken_off", "Unreadable body", "The body ended early.") from error
    except (ClientPayloadError, HTTPException, web.RequestPayloadError) as error:
        raise Unacceptable(
            400, "broken_body", "Unreadable body", "The body ended early or is badly chunked."
        ) from error
    return b"".join(chunks)
