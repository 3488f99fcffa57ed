"""Cuts off what takes longer than it may.

A timer for each attempt costs as much as the rest of its bookkeeping.  Here an attempt writes down until when it may take, and
somebody looks at all of them now and then; so one may last that much longer than its time.
"""

import asyncio
import time
from datetime import timedelta
from typing import Self

NOW_AND_THEN = timedelta(milliseconds=500)
FOREVER = float("inf")


class Overdue:
    """The watch over all attempts of a process."""

    def __init__(self) -> None:
        self._watched: set[Watched] = set()

    def watched(self) -> "Watched":
        """The current task, for as long as it is in the `with` of this."""
        task = asyncio.current_task()
        assert task is not None
        return Watched(task, self._watched)

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(NOW_AND_THEN.total_seconds())
            now = time.monotonic()
            for watched in self._watched:
                watched.look(now)


class Watched:
    """A task that makes one attempt after another, each of which may take so long."""

    __slots__ = ("_ends", "_others", "_task", "_was_cut_off")

    def __init__(self, task: asyncio.Task[object], others: set["Watched"]) -> None:
        self._task = task
        self._others = others
        self._ends = FOREVER
        self._was_cut_off = False

    def __enter__(self) -> Self:
        self._others.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._others.discard(self)

    def begin(self, seconds: float) -> None:
        """An attempt that may take so long; to be followed by `end`."""
        self._ends = time.monotonic() + seconds

    def end(self) -> None:
        self._ends = FOREVER
        if self._was_cut_off:
            self._was_cut_off = False
            self._task.uncancel()

    @property
    def was_cut_off(self) -> bool:
        """The cancellation that just arrived in the task came from here, and from nobody else."""
        return self._was_cut_off and self._task.cancelling() == 1

    def look(self, now: float) -> None:
        if self._ends <= now and not self._was_cut_off:
            self._was_cut_off = True
            self._task.cancel()
