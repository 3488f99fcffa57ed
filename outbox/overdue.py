"""Cuts off what takes longer than it may.

A timer for each attempt costs as much as the rest of its bookkeeping.  Here an attempt is a line in a dictionary, and
somebody looks at all of them now and then; so one may last that much longer than its time.
"""

import asyncio
import time
from datetime import timedelta

NOW_AND_THEN = timedelta(milliseconds=500)


class Overdue:
    def __init__(self) -> None:
        self._ends: dict[asyncio.Task[object], float] = {}  # on the monotonic clock; infinity: it was cut off

    def begin(self, longest: timedelta) -> asyncio.Task[object]:
        """From now on the current task may take so long; to be followed by `ended`."""
        task = asyncio.current_task()
        assert task is not None
        self._ends[task] = time.monotonic() + longest.total_seconds()
        return task

    def cut_off(self, task: asyncio.Task[object]) -> bool:
        """The cancellation that just arrived in the task came from here, and from nobody else."""
        return self._ends[task] == float("inf") and task.cancelling() == 1

    def ended(self, task: asyncio.Task[object]) -> None:
        if self._ends.pop(task) == float("inf"):
            task.uncancel()

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(NOW_AND_THEN.total_seconds())
            now = time.monotonic()
            for task, end in self._ends.items():
                if end <= now:
                    self._ends[task] = float("inf")
                    task.cancel()
