"""W3C Trace Context, as far as it may come in: `traceparent`, and neither `tracestate` nor baggage."""

import random
import re
from typing import NamedTuple

_FIELDS = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class Context(NamedTuple):
    """A span, as another process knows it; the ids are lower-case hex."""

    trace_id: str
    span_id: str
    sampled: bool


def read(header: str | None) -> Context | None:
    """The span that a header names; None if it names none in the way that the standard asks for.

    A version that is younger than ours may carry more fields, version 00 may not; ff is no version; hex is lower case.
    """
    if header is None or not (fields := _FIELDS.fullmatch(header)):
        return None
    version, trace_id, span_id, flags, more = fields.groups()
    if version == "00" and more is not None:
        return None
    return Context(trace_id, span_id, flags[1] in "13579bdf")


def write(trace_id: str, span_id: str, *, sampled: bool) -> str:
    return f"00-{trace_id}-{span_id}-{'01' if sampled else '00'}"


def new_trace_id() -> str:
    return random.getrandbits(128).to_bytes(16, "big").hex()


def new_span_id() -> str:
    return random.getrandbits(64).to_bytes(8, "big").hex()
