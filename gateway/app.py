"""`sluicegate serve`: from a configuration to a process at work, or to several that share a port."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import structlog

from gateway import config as configuration
from gateway.config import Config
from gateway.service import VERSION, Place, Service
from observability import workers as across_workers
from observability.logs import configure, log_sparingly
from observability.metrics import Metrics
from observability.names import LogEvent
from outbox.database import Unavailable, UnsuitableError, migrate, migrations_pending
from outbox.embedded import Embedded

try:
    import uvloop
except ImportError:  # where there is none, asyncio's own loop does
    uvloop = None  # type: ignore[assignment]

log = structlog.get_logger()

WORKER = "SLUICEGATE_WORKER"  # how a process knows that it is one of several: the DSN that its parent found
PATIENCE = 2.0  # seconds between looks for a Postgres that is away


def serve(*, config_path: Path, role: str, workers: int | None, environ: Mapping[str, str]) -> int:
    """Run until SIGTERM or SIGINT; the exit status.  Raises what `expected` in gateway/commands.py can tell a person."""
    config = configuration.load(config_path, environ)
    number = workers or config.serve.workers
    work = _worker(config, role, number, environ) if WORKER in environ else _main(config, role, number, environ)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if uvloop else None) as runner:
        return runner.run(work)


async def _main(config: Config, role: str, workers: int, environ: Mapping[str, str]) -> int:
    """The process that was started: it has the embedded Postgres, if there is one, and does the work or has it done."""
    metrics = Metrics(version=VERSION) if workers == 1 else Metrics()
    with configure(config.observability.logs, dropped=metrics.log_lines_dropped.inc) as logs:
        asyncio.get_running_loop().set_exception_handler(logs.loop_failed)
        log.info(LogEvent.SERVE_STARTING, version=VERSION, role=role, workers=workers)
        stop = _signals(signal.SIGTERM, signal.SIGINT)
        embedded = await Embedded.start(config.folder) if config.database == "embedded" else None
        try:
            dsn = embedded.dsn if embedded else config.database.reveal()  # type: ignore[union-attr]
            if not await _prepared(dsn, stop, embedded=embedded is not None):
                return 0
            if workers == 1:
                place = Place(role=role, dsn=dsn, workers=1, metrics=None)
                return await _work(Service(config, place, environ), metrics, stop)
            return await _Workers(config, role, workers, dsn, environ).run(stop)
        finally:
            if embedded:
                await embedded.stop()
            log.info(LogEvent.SERVE_STOPPED)


async def _worker(config: Config, role: str, workers: int, environ: Mapping[str, str]) -> int:
    """One of several."""
    directory = _metrics_directory(config)
    metrics = Metrics(directory, version=VERSION)
    with configure(config.observability.logs, dropped=metrics.log_lines_dropped.inc) as logs:
        asyncio.get_running_loop().set_exception_handler(logs.loop_failed)
        stop = _signals(signal.SIGTERM, signal.SIGINT)
        place = Place(role=role, dsn=environ[WORKER], workers=workers, metrics=directory)
        try:
            return await _work(Service(config, place, environ), metrics, stop)
        finally:
            metrics.close()


async def _work(service: Service, metrics: Metrics, stop: asyncio.Event) -> int:
    try:
        while not stop.is_set():
            try:
                await service.start(metrics)
                break
            except Unavailable:
                log_sparingly(LogEvent.POSTGRES_AWAY, part="start")
                await service.stop()
                await _wait(stop, PATIENCE)
                service = service.again()
        _on_hangup(service)
        log.info(LogEvent.SERVE_READY)
        await stop.wait()
        log.info(LogEvent.SERVE_STOPPING)
    finally:
        await service.stop()
    return 0


async def _prepared(dsn: str, stop: asyncio.Event, *, embedded: bool) -> bool:
    """The schema is what this program needs: ours is brought there, one of one's own is somebody's decision."""
    while not stop.is_set():
        try:
            if embedded:
                await migrate(dsn)
            elif pending := await migrations_pending(dsn):
                raise UnsuitableError(
                    f"database: {', '.join(pending)} is still to be applied; run `sluicegate migrate`"
                )
        except Unavailable:
            log_sparingly(LogEvent.POSTGRES_AWAY, part="start")
            await _wait(stop, PATIENCE)
        else:
            return True
    return False


class _Workers:
    """Several processes on one port; one that dies is replaced."""

    def __init__(self, config: Config, role: str, number: int, dsn: str, environ: Mapping[str, str]) -> None:
        self._config = config
        self._command = [
            sys.executable, "-m", "gateway.cli", "serve",
            "--config", str(config.path), "--role", role, "--workers", str(number),
        ]  # fmt: skip
        self._number = number
        self._environ = {**environ, WORKER: dsn}
        self._processes: list[subprocess.Popen[bytes]] = []

    async def run(self, stop: asyncio.Event) -> int:
        across_workers.start_afresh(_metrics_directory(self._config))
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._tell, signal.SIGHUP)
        self._processes = [self._start() for _ in range(self._number)]
        try:
            while not stop.is_set():
                await _wait(stop, 0.5)
                for place, process in enumerate(self._processes):
                    if process.poll() is not None and not stop.is_set():
                        log.error(LogEvent.WORKER_DIED, pid=process.pid, status=process.returncode)
                        await _wait(stop, 1.0)
                        self._processes[place] = self._start()
        finally:
            self._tell(signal.SIGTERM)
            statuses = await asyncio.gather(*(asyncio.to_thread(process.wait) for process in self._processes))
        return max(statuses, key=abs, default=0)

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(self._command, env=self._environ)  # noqa: S603
        log.info(LogEvent.WORKER_STARTED, pid=process.pid)
        return process

    def _tell(self, number: signal.Signals) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.send_signal(number)


def _metrics_directory(config: Config) -> Path:
    return config.folder / "data" / "metrics"


def _signals(*numbers: signal.Signals) -> asyncio.Event:
    """Set by the first of these signals; a second one ends the process at once."""
    stop = asyncio.Event()

    def heard() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in numbers:
        asyncio.get_running_loop().add_signal_handler(number, heard)
    return stop


def _on_hangup(service: Service) -> None:
    reloading: set[asyncio.Task[None]] = set()

    def heard() -> None:
        task = asyncio.create_task(service.reload())
        reloading.add(task)
        task.add_done_callback(reloading.discard)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, heard)


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()
