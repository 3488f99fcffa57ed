"""A flood of what is refused is answered late: whoever waits for an answer cannot send the next over that connection.

A sender that posts on and on over its connections is slowed down by them, at no cost here.  A few refusals are answered
at once; so is what is more than may wait, and its connections are kept, for a new one costs more than a refusal.
"""

import asyncio
import time
from random import uniform

from gateway.token_bucket import TokenBucket

AT_ONCE = 20.0  # refusals of one source a second
SHORTEST, LONGEST = 0.5, 0.9  # seconds of a pause; a sender such as Odoo waits for one
MOST = 100  # that wait at a time, each with a socket


class SlowRefusals:
    """Sources are names of ours, and the empty one for all that name none, so there are only so many of them."""

    def __init__(self) -> None:
        self._at_once: dict[str, TokenBucket] = {}
        self._paused = 0

    async def before(self, source: str) -> None:
        """To be awaited before a refusal is answered."""
        if source not in self._at_once:
            self._at_once[source] = TokenBucket(per_second=AT_ONCE)
        if self._at_once[source].take(time.monotonic()) or self._paused >= MOST:
            return
        self._paused += 1
        try:
            await asyncio.sleep(uniform(SHORTEST, LONGEST))  # noqa: S311  else all of them would come back at once
        finally:
            self._paused -= 1
