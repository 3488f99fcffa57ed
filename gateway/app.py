"""`sluicegate serve` after its first moments (serve.py): from a configuration to a process at work, or several on a port."""

import asyncio
import gc
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import ExitStack, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from gateway.config import Config
from gateway.listening import bound
from gateway.serve import WORKER
from gateway.service import VERSION, Place, Service
from gateway.waiting_room import AWAY, READ_ONLY, WaitingRoom
from observability import workers as across_workers
from observability.failpoints import armed
from observability.logs import configure, log_sparingly
from observability.metrics import Metrics
from observability.names import LogEvent
from outbox.database import ReadOnly, Unavailable, UnsuitableError, migrate, migrations_pending
from outbox.embedded import Embedded
from outbox.embedded_folder import EmbeddedFolder
from outbox.ending import end
from outbox.pooler import refuse_pooler

try:
    import uvloop
except ImportError:  # where there is none, asyncio's own loop does
    uvloop = None  # type: ignore[assignment]

Answer = TypeVar("Answer")

log = structlog.get_logger()

SOCKETS = "SLUICEGATE_SOCKETS"  # and the numbers of the sockets to listen on
READY, LEAVE = b"ready", b"leave"  # what a worker says to its parent, and the parent to one whose successor is at work
PATIENCE = timedelta(seconds=2)  # between looks for a Postgres that is away
LOOK = timedelta(milliseconds=200)  # between looks at the workers
REST = timedelta(seconds=1)  # before a worker that died is replaced
LONGEST_START = timedelta(seconds=60)  # of a worker that is to replace another
LAST_WAIT = timedelta(seconds=60)  # for workers to end: longer than all that they wait for by themselves
MOST_FILES = 65_536
OF_THE_PROGRAM = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


def serve(config: Config, folder: EmbeddedFolder | None, *, role: str, workers: int, environ: Mapping[str, str]) -> int:
    """Run until SIGTERM or SIGINT; the exit status.  Raises what `expected` in gateway/commands.py can tell a person."""
    _allow_many_connections()
    gc.freeze()  # what the program is made of stays: to look through it for garbage takes 80 ms, each time
    gc.set_threshold(5_000)  # hardly anything is ever found, and after each 700 objects it takes a thirtieth of a post
    if WORKER in environ:
        work = _worker(config, role, workers, environ)
    else:
        work = _main(config, folder, role, workers, environ)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if uvloop else None) as runner:
        return runner.run(work)


async def _main(
    config: Config, folder: EmbeddedFolder | None, role: str, workers: int, environ: Mapping[str, str]
) -> int:
    """The process that was started: it has the embedded Postgres, if there is one, and does the work or has it done."""
    metrics = Metrics(version=VERSION) if workers == 1 else Metrics()
    with configure(config.observability.logs, dropped=metrics.log_lines_dropped.inc) as logs:
        asyncio.get_running_loop().set_exception_handler(logs.loop_failed)
        stop, hangup = _heard(signal.SIGTERM, signal.SIGINT, twice=_end_at_once), _heard(signal.SIGHUP)
        renew = _heard(signal.SIGUSR2)
        log.info(LogEvent.SERVE_STARTING, version=VERSION, role=role, workers=workers)
        _tell_what_is_armed()
        embedded = await _unless(stop, Embedded(folder).serve()) if folder else None
        try:
            if stop.is_set():
                return 0
            _refuse_what_is_taken(config)
            dsn = embedded.dsn if embedded else config.database.reveal()  # type: ignore[union-attr]
            prepare = partial(_prepare, dsn, embedded=embedded is not None)
            async with WaitingRoom(config.serve.listen) as room:
                if not await _unless(stop, _patiently(prepare, room)):
                    return 0
                if workers == 1:
                    place = Place(role=role, dsn=dsn, workers=1, metrics=None)
                    return await _work(lambda: Service(config, place, environ), metrics, room, stop, hangup)
            return await _Workers(config, role, workers, dsn, environ).run(stop, hangup, renew)
        finally:
            if embedded:
                await embedded.stop()
            log.info(LogEvent.SERVE_STOPPED)


def _tell_what_is_armed() -> None:
    """This program will fail on purpose, and whoever reads its log is not to wonder why."""
    if points := armed():
        log.error(LogEvent.FAILPOINTS_ARMED, points=points)


def _refuse_what_is_taken(config: Config) -> None:
    """Before anything else is done.  Workers share a port with everybody who would share it, so they could not tell."""
    for address in config.serve.listen:
        if address.port:
            bound(address).close()


async def _worker(config: Config, role: str, workers: int, environ: Mapping[str, str]) -> int:
    """One of several.  The parent says when it is time; what a terminal or a supervisor sends to all is no hurry."""
    directory = _metrics_directory(config)
    metrics = Metrics(directory, version=VERSION)
    with configure(config.observability.logs, dropped=metrics.log_lines_dropped.inc) as logs:
        asyncio.get_running_loop().set_exception_handler(logs.loop_failed)
        _tell_what_is_armed()
        stop, hangup = _heard(signal.SIGTERM), _heard(signal.SIGHUP)
        succeeded = _hear_the_parent(stop)
        sockets = tuple(int(number) for number in environ[SOCKETS].split(","))
        place = Place(role=role, dsn=environ[WORKER], workers=workers, metrics=directory, sockets=sockets)
        try:
            async with WaitingRoom(config.serve.listen, inherited=sockets) as room:
                # the program may be another one than its parent was made of
                await _unless(stop, _patiently(partial(_refuse_an_old_schema, place.dsn), room))
                return await _work(
                    lambda: Service(config, place, environ), metrics, room, stop, hangup,
                    ready=partial(os.write, sys.stdin.fileno(), READY), succeeded=succeeded,
                )  # fmt: skip
        finally:
            metrics.close()


async def _prepare(dsn: str, *, embedded: bool) -> bool:
    """The schema is what this program needs: ours is brought there, one of one's own is somebody's decision."""
    if embedded:
        await migrate(dsn)
    else:
        await refuse_pooler(dsn)
        await _refuse_an_old_schema(dsn)
    return True


async def _refuse_an_old_schema(dsn: str) -> None:
    if pending := await migrations_pending(dsn):
        raise UnsuitableError(f"database: {', '.join(pending)} is still to be applied; run `sluicegate migrate`")


async def _work(
    make: Callable[[], Service],
    metrics: Metrics,
    room: WaitingRoom,
    stop: asyncio.Event,
    hangup: asyncio.Event,
    *,
    ready: Callable[[], object] = lambda: None,
    succeeded: asyncio.Event | None = None,
) -> int:
    """`succeeded`: somebody else listens on the same sockets already, so nobody has to be told that this one ends."""

    async def begin() -> Service:
        service = make()
        try:
            await service.start(metrics, before_listening=room.close)
        except BaseException:
            await service.stop()
            raise
        return service

    if service := await _unless(stop, _patiently(begin, room)):
        try:
            log.info(LogEvent.SERVE_READY)
            ready()
            await _unless(stop, _reload_at(hangup, service))
            log.info(LogEvent.SERVE_STOPPING)
            if succeeded is None or not succeeded.is_set():
                await service.give_notice()
        finally:
            await service.stop()
    return 0


async def _patiently(attempt: Callable[[], Awaitable[Answer]], room: WaitingRoom) -> Answer:
    """As often as it takes until Postgres is there; what comes meanwhile is told to come back."""
    while True:
        try:
            return await attempt()
        except Unavailable as error:
            only_reads = isinstance(error, ReadOnly)
            reason = type(error if only_reads else error.__cause__ or error).__name__
            log_sparingly(LogEvent.POSTGRES_AWAY, part="start", reason=reason)
            await room.open(READ_ONLY if only_reads else AWAY)
            await asyncio.sleep(PATIENCE.total_seconds())


async def _reload_at(hangup: asyncio.Event, service: Service) -> None:
    """One at a time; a SIGHUP that came before there was anything to reload counts, too."""
    while True:
        await hangup.wait()
        hangup.clear()
        try:
            await service.reload()
        except Exception:
            log.exception(LogEvent.TASK_FAILED, task="reload")


class _Workers:
    """Several processes on one port.  One that dies is replaced, and so is each of them in turn when that is asked for.

    Each has sockets of its own, among which the system distributes the connections, and the parent holds them, too:
    what waits in them to be accepted when a worker ends is not lost, for its successor listens there already.
    """

    def __init__(self, config: Config, role: str, number: int, dsn: str, environ: Mapping[str, str]) -> None:
        self._config = config
        self._command = [
            sys.executable, "-m", "gateway.cli", "serve",
            "--config", str(config.path), "--role", role, "--workers", str(number),
        ]  # fmt: skip
        self._number = number
        self._environ = {**environ, WORKER: dsn}
        self._workers: list[_Worker] = []
        self._others: list[_Worker] = []  # those that are to come, or on their way out
        self._renewing: asyncio.Task[None] | None = None

    async def run(self, stop: asyncio.Event, hangup: asyncio.Event, renew: asyncio.Event) -> int:
        """Until `stop`; raises AddressError before any of them is started."""
        across_workers.start_afresh(_metrics_directory(self._config))
        with ExitStack() as held:  # so that the addresses stay ours, whatever becomes of the workers
            for address in self._config.serve.listen:
                held.enter_context(bound(address, share=True))
            self._workers = [self._start(self._sockets()) for _ in range(self._number)]
            try:
                while not stop.is_set():
                    await _wait(stop, LOOK)
                    if hangup.is_set():
                        hangup.clear()
                        self._tell(signal.SIGHUP)
                    if renew.is_set() and (self._renewing is None or self._renewing.done()):
                        renew.clear()
                        self._renewing = asyncio.create_task(self._renew())
                    await self._replace_the_dead(stop)
            finally:
                status = await self._end()
        return status

    async def _replace_the_dead(self, stop: asyncio.Event) -> None:
        """What waits in the sockets of one that died is let go: the others take the connections that come from now on."""
        for place, worker in enumerate(self._workers):
            if worker.process.poll() is not None and not stop.is_set():
                log.error(LogEvent.WORKER_DIED, pid=worker.process.pid, status=worker.process.returncode)
                worker.close()
                await worker.ended()
                await _wait(stop, REST)
                if not stop.is_set():
                    self._workers[place] = self._start(self._sockets())

    async def _renew(self) -> None:
        """One after the other: each goes on until its successor takes requests, from the same sockets.

        The successor is made of the program and the configuration as they are now.  If it does not come to work, what
        is there stays.
        """
        for place in range(self._number):
            old = self._workers[place]
            successor = self._start(old.sockets)
            self._others.append(successor)
            if not await successor.takes_requests() or self._workers[place] is not old:
                log.error(LogEvent.WORKER_NOT_RENEWED, pid=old.process.pid, successor=successor.process.pid)
                successor.process.kill()
                await successor.ended()
                self._others.remove(successor)
                return
            self._others.remove(successor)
            self._workers[place] = successor
            self._others.append(old)
            old.let_go()
            log.info(LogEvent.WORKER_RENEWED, pid=old.process.pid, successor=successor.process.pid)
            await old.ended()
            self._others.remove(old)

    async def _end(self) -> int:
        """0 if all of them ended well."""
        if self._renewing is not None:
            await end(self._renewing)
        for worker in self._workers:
            worker.close()
        self._tell(signal.SIGTERM)
        everybody = [*self._workers, *self._others]
        await asyncio.gather(*(worker.ended() for worker in everybody))
        self._tell(signal.SIGKILL)
        return int(any(worker.process.wait() != 0 for worker in everybody))

    def _sockets(self) -> list[socket.socket]:
        return [bound(address, share=True) for address in self._config.serve.listen]

    def _start(self, sockets: list[socket.socket]) -> "_Worker":
        worker = _Worker(self._command, self._environ, sockets)
        log.info(LogEvent.WORKER_STARTED, pid=worker.process.pid)
        return worker

    def _tell(self, number: signal.Signals) -> None:
        for worker in [*self._workers, *self._others]:
            worker.process.send_signal(number)  # nothing happens to one that has ended


class _Worker:
    """One of them, as its parent sees it: a process, a line to it, and the sockets that it listens on."""

    def __init__(self, command: list[str], environ: Mapping[str, str], sockets: list[socket.socket]) -> None:
        """It hears no signal before it listens to them, and its standard input ends when this process does."""
        self.sockets = sockets
        numbers = [opened.fileno() for opened in sockets]
        self._line, theirs = socket.socketpair()
        self._line.settimeout(0)
        signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_PROGRAM)
        try:
            self.process = subprocess.Popen(  # noqa: S603
                command,
                env={**environ, SOCKETS: ",".join(map(str, numbers))},
                stdin=theirs.fileno(),
                pass_fds=numbers,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_THE_PROGRAM)
            theirs.close()

    async def takes_requests(self) -> bool:
        """As soon as it does; not, if it ends or takes too long."""
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(LONGEST_START.total_seconds()):
                return await asyncio.get_running_loop().sock_recv(self._line, len(READY)) == READY
        return False

    def let_go(self) -> None:
        """It may end: its successor is there."""
        with suppress(OSError):
            self._line.send(LEAVE)

    def close(self) -> None:
        """The sockets are nobody's any more but its own."""
        for opened in self.sockets:
            opened.close()

    async def ended(self) -> None:
        await asyncio.to_thread(_await_end, self.process)
        self._line.close()


def _await_end(process: "subprocess.Popen[bytes]") -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(LAST_WAIT.total_seconds())


def _allow_many_connections() -> None:
    """Many systems let a process have no more than 1,024 files open, unless it asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _metrics_directory(config: Config) -> Path:
    return config.folder / "data" / "metrics"


def _heard(*numbers: signal.Signals, twice: Callable[[], None] = lambda: None) -> asyncio.Event:
    """Set by any of these signals; one that comes when it is set already does `twice`."""
    event = asyncio.Event()

    def hear() -> None:
        if event.is_set():
            twice()
        event.set()

    for number in numbers:
        asyncio.get_running_loop().add_signal_handler(number, hear)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    return event


def _end_at_once() -> None:
    """Somebody is in a hurry.  Nothing is lost: the outbox is made for that."""
    os._exit(1)


def _hear_the_parent(stop: asyncio.Event) -> asyncio.Event:
    """Its word that we have a successor; and its end, however that comes, for then our standard input ends, too.

    If it did not even wait for us, we are in a hurry as well.
    """
    loop, succeeded = asyncio.get_running_loop(), asyncio.Event()

    def hear() -> None:
        try:
            word = os.read(sys.stdin.fileno(), len(LEAVE))
        except ConnectionError:  # killed, and it had not read what we said
            word = b""
        if word:
            succeeded.set()
        else:
            loop.remove_reader(sys.stdin.fileno())
            if stop.is_set() and not succeeded.is_set():
                _end_at_once()
        stop.set()

    loop.add_reader(sys.stdin.fileno(), hear)
    return succeeded


async def _unless(stop: asyncio.Event, work: Coroutine[object, object, Answer]) -> Answer | None:
    """Do it, but drop it half-way when it is time to stop."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        if not working.done():
            working.cancel()
    with suppress(asyncio.CancelledError):
        return await working
    return None


async def _wait(stop: asyncio.Event, time: timedelta) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(time.total_seconds()):
            await stop.wait()
