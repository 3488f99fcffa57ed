"""Postgres servers that a test has to itself: to be killed, frozen, copied and promoted, over TCP."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from outbox.embedded_folder import binaries
from tests.program import free_port, until

# As somebody whom Postgres accepts, as the keeper of the embedded one does it.
AS_SOMEBODY = """
import os, sys
from pathlib import Path
from outbox import keeper
binaries, tool, *arguments = sys.argv[1:]
place = keeper.become_acceptable(Path.cwd(), Path(binaries)) / "bin" / tool
os.execv(place, [str(place), *arguments])
"""
HERE = "/proc/self/cwd"  # a lesser user can stay in a folder that it could not find


class Postgres:
    """One data directory, and the server on it while there is one; `name` is what a standby is known by."""

    def __init__(self, folder: Path, name: str = "primary") -> None:
        self.folder = folder / name
        self.name = name
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def dsn(self, database: str = "postgres", *, user: str = "postgres", port: int | None = None) -> str:
        return f"postgresql://{user}@127.0.0.1:{port or self.port}/{database}?sslmode=disable"

    # ── life ─────────────────────────────────────────────────────────────────────────────────────

    def make(self) -> "Postgres":
        """Empty but for the role and the database `sluicegate`."""
        self.folder.mkdir(mode=0o700)
        self.run("initdb", "-D", HERE, "--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "-N")
        with (self.folder / "pg_hba.conf").open("a") as rules:
            rules.write("host replication all 127.0.0.1/32 trust\n")
        self.configure(
            shared_buffers="16MB", max_connections="100", fsync="off", wal_level="replica", max_wal_senders="5",
            unix_socket_directories="", listen_addresses="127.0.0.1", max_parallel_workers_per_gather="0",
            hot_standby="on", wal_keep_size="64MB", autovacuum="off", checkpoint_timeout="30min", io_method="sync",
        )  # fmt: skip
        self.start()
        self.execute("CREATE ROLE sluicegate LOGIN; GRANT pg_monitor TO sluicegate;")
        self.execute("CREATE DATABASE sluicegate OWNER sluicegate")
        return self

    def twin_of(self, other: "Postgres", *, standby_of: "Postgres | None" = None) -> "Postgres":
        """By copying the files of one that is stopped; it may follow one that is at work on such files."""
        shutil.copytree(other.folder, self.folder, symlinks=True)
        self.folder.chmod(0o700)
        if standby_of:
            primary = (
                f"host=127.0.0.1 port={standby_of.port} user=postgres application_name={self.name} sslmode=disable"
            )
            self.configure(primary_conninfo=primary)
            (self.folder / "standby.signal").touch()
        return self

    def copy_of(self, other: "Postgres", *options: str) -> "Postgres":
        """By pg_basebackup, while the other one is at work; with `-R` it is a standby of that."""
        self.folder.mkdir(mode=0o700)
        self.run(
            "pg_basebackup", "-D", HERE, "-c", "fast", "-N", "-X", "stream", *options,
            "-d", f"host=127.0.0.1 port={other.port} user=postgres application_name={self.name} sslmode=disable",
        )  # fmt: skip
        return self

    def configure(self, **settings: str) -> None:
        with (self.folder / "postgresql.conf").open("a") as written:
            written.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def start(self, *, ready: bool = True) -> "Postgres":
        with (self.folder.parent / f"{self.name}.log").open("ab") as said:
            self._process = subprocess.Popen(
                self._command("postgres", "-D", HERE, "-p", str(self.port)),
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=self._environ(),
            )  # fmt: skip
        if ready:
            until(self._answers, 30, lambda: f"{self.name}; it said: {self._said()}")
        return self

    def stop(self, by: signal.Signals = signal.SIGINT) -> None:
        """SIGINT ends it in order, at once; SIGQUIT as a crash does."""
        if self._process is not None:
            self.thaw()
            self._process.send_signal(by)
            self._process.wait(30)
            self._process = None

    def kill(self) -> None:
        """As if its machine were gone: kill -9 of all its processes."""
        assert self._process is not None
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait(30)
        self._process = None

    def freeze(self) -> None:
        for process in self.processes():
            os.kill(process, signal.SIGSTOP)

    def thaw(self) -> None:
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)

    def promote(self) -> None:
        self.fetchval("SELECT pg_promote(true, 30)")

    def processes(self) -> list[int]:
        """The postmaster first, so that it starts no more of them."""
        assert self._process is not None
        children: list[str] = []
        with suppress(OSError):  # it has ended
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return [self._process.pid, *map(int, children)]

    # ── what a test asks of it ───────────────────────────────────────────────────────────────────

    def execute(self, sql: str, database: str = "postgres") -> None:
        self.fetchval(sql, database)

    def fetchval(self, sql: str, database: str = "postgres") -> Any:
        """The first value of what psql says; a text, or None."""
        psql = [binaries() / "bin/psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", self.dsn(database), "-c", sql]
        done = subprocess.run(psql, env=self._environ(), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().partition("\n")[0] or None

    def run(self, tool: str, *arguments: str) -> str:
        done = subprocess.run(
            self._command(tool, *arguments), cwd=self.folder, env=self._environ(), capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{tool}: {done.stderr[-2000:]}"
        return done.stdout

    def _command(self, tool: str, *arguments: str) -> list[str]:
        return [sys.executable, "-c", AS_SOMEBODY, str(binaries()), tool, *arguments]

    def _environ(self) -> dict[str, str]:
        root = str(Path(__file__).parent.parent)
        return {
            "PATH": os.defpath,
            "LC_ALL": "C",
            "PYTHONPATH": root,
            "HOME": str(self.folder),
            "PGCONNECT_TIMEOUT": "5",
        }

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._said()
        with suppress(OSError):
            pid = (self.folder / "postmaster.pid").read_text().splitlines()
            return pid[7:8] in (["ready   "], ["ready"])
        return False

    def _said(self) -> str:
        return (self.folder.parent / f"{self.name}.log").read_text()[-2000:]


@contextmanager
def folder_of_servers() -> Iterator[Path]:
    """Where a lesser user finds them, too; short, for the sake of sockets."""
    folder = Path(tempfile.mkdtemp(prefix="sluicegate-servers-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ended_with(*servers: Postgres) -> Iterator[None]:
    try:
        yield
    finally:
        for server in servers:
            if server._process is not None:
                server.kill()
