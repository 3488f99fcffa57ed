"""`Retry-After`, as partners really send it."""

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

LONGEST = timedelta(hours=24)
"""Nobody keeps a delivery waiting for longer by a header."""

_SECONDS = re.compile(r"[0-9]{1,20}(\.[0-9]{1,9})?")
_DATE = re.compile(r"[A-Z][a-z]{2,8},? [0-9A-Za-z: -]{12,24}(GMT)?", re.ASCII)  # RFC 9110 § 5.6.7, all three forms


def retry_after(headers: Mapping[str, str], now: datetime) -> timedelta | None:
    """What the partner asked for, at most a day; None if it said nothing, or nothing that means something.

    A date that has passed means now: the back-off's jitter still spreads those who heard the same.
    """
    said = headers.get("retry-after", "").strip()
    if _SECONDS.fullmatch(said):
        return min(timedelta(seconds=math.ceil(min(float(said), LONGEST.total_seconds()))), LONGEST)
    if not _DATE.fullmatch(said):
        return None
    try:
        then = parsedate_to_datetime(said)
    except (ValueError, OverflowError):
        return None
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return min(max(then - now, timedelta()), LONGEST)
