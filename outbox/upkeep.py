"""The tasks that the running service does now and then.  One that is not listed here does not exist."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from random import uniform

import structlog

from observability.failpoints import failpoint
from observability.metrics import Metrics
from observability.names import LogEvent
from outbox.database import Unavailable
from outbox.ending import end

log = structlog.get_logger()

SOON = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    every: timedelta
    run: Callable[[], Awaitable[object]]


class Upkeep:
    """Runs each task at its pace, for as long as the service runs; one that fails is told, and tried again."""

    def __init__(self, tasks: Sequence[Task], metrics: Metrics) -> None:
        self.tasks = tuple(tasks)
        self._metrics = metrics
        self._running: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._running = [asyncio.create_task(self._keep_at(task), name=task.name) for task in self.tasks]

    async def stop(self) -> None:
        await end(*self._running)

    async def _keep_at(self, task: Task) -> None:
        """The first time soon, for a service that is restarted every day must not do without what is done now and then."""
        await asyncio.sleep(min(task.every, SOON).total_seconds() * uniform(0.1, 1))  # noqa: S311  a fleet spreads itself
        while True:
            await self.run(task)
            await asyncio.sleep(task.every.total_seconds() * uniform(0.9, 1.1))  # noqa: S311

    async def run(self, task: Task) -> None:
        """Once, now."""
        self._metrics.task_runs.labels(task.name).inc()
        try:
            failpoint("upkeep.before_task")
            await task.run()
        except Unavailable:
            self._metrics.task_failures.labels(task.name).inc()
        except Exception:
            self._metrics.task_failures.labels(task.name).inc()
            log.exception(LogEvent.TASK_FAILED, task=task.name)
