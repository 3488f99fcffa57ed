"""Ends a process whose event loop hangs: it can neither deliver nor give its lanes back, and another one can."""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import structlog

from observability.names import LogEvent

log = structlog.get_logger()

TICK = timedelta(seconds=1)
HANGS = 20  # ticks in which the loop did not turn once
STATUS = 70  # EX_SOFTWARE


class Watchdog:
    """A thread that watches the loop, by its own ticks: a machine that slept is not a loop that hangs."""

    def __init__(self, lag: Callable[[float], None], *, hangs: int = HANGS) -> None:
        self._lag = lag
        self._hangs = hangs
        self._turns = 0
        self._stopped = threading.Event()
        self._ticking: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._ticking = asyncio.create_task(self._tick())
        self._thread.start()

    async def stop(self) -> None:
        self._stopped.set()
        if self._ticking is not None:
            self._ticking.cancel()

    async def _tick(self) -> None:
        while True:
            slept = time.monotonic()
            await asyncio.sleep(TICK.total_seconds() / 2)
            self._lag(max(0.0, time.monotonic() - slept - TICK.total_seconds() / 2))
            self._turns += 1

    def _watch(self) -> None:
        seen, still = -1, 0
        while not self._stopped.wait(TICK.total_seconds()):
            still = still + 1 if self._turns == seen else 0
            seen = self._turns
            if still >= self._hangs:
                log.critical(LogEvent.LOOP_HANGS, seconds=still)
                time.sleep(0.2)  # for the line to be written
                os._exit(STATUS)
