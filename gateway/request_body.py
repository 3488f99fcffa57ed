"""The bytes of a request, within limits that are judged before anything is read."""

import asyncio
from datetime import timedelta
from typing import Protocol

from aiohttp import web
from aiohttp.client_exceptions import ClientPayloadError
from aiohttp.web_exceptions import HTTPException
from multidict import CIMultiDictProxy

BODY_DEADLINE = timedelta(seconds=10)


class Head(Protocol):
    """Of a request."""

    @property
    def headers(self) -> CIMultiDictProxy[str]: ...

    @property
    def content_type(self) -> str: ...

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


def judge_head(request: Head, limit: int) -> None:
    """What the head says of the body; raises Unacceptable."""
    headers = request.headers
    if "Content-Encoding" in headers and any(e.lower() != "identity" for e in headers.getall("Content-Encoding")):
        raise Unacceptable(415, "encoded", "Encoded body", "Send the body as it is, without Content-Encoding.")
    if "Transfer-Encoding" in headers and headers["Transfer-Encoding"].lower() != "chunked":
        raise Unacceptable(400, "transfer_encoding", "Transfer-Encoding", "Only chunked is understood.")
    if "Expect" in headers and headers["Expect"].lower() != "100-continue":
        raise Unacceptable(417, "expectation", "Expectation", "Only 100-continue is understood.")
    if headers.get("Content-Type") != "application/json" and not is_json(request.content_type):
        raise Unacceptable(415, "not_json", "Not JSON", "Send JSON, with Content-Type: application/json.")
    if (request.content_length or 0) > limit:
        raise too_large(limit)


def is_json(media_type: str) -> bool:
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))


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
