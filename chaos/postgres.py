"""The Postgres that is killed, frozen and starved: the embedded one, with its keeper, on a socket in a folder of its own."""

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import asyncpg

from chaos.proxy import Proxy, Streams
from outbox.database import migrate
from outbox.embedded import Embedded

TEMPLATE = "migrated"


class Postgres:
    """One cluster; each stage gets a database of its own in it."""

    def __init__(self, folder: Path, embedded: Embedded) -> None:
        self.folder = folder
        self._embedded = embedded
        self._numbers = count(1)
        self._sockets = parse_qs(urlsplit(embedded.dsn).query)["host"][0]

    @classmethod
    @asynccontextmanager
    async def running(cls, folder: Path) -> AsyncIterator[Self]:
        folder.mkdir(parents=True, exist_ok=True)
        embedded = await Embedded.start(folder)
        postgres = cls(folder, embedded)
        try:
            await postgres.order(f"CREATE DATABASE {TEMPLATE} OWNER sluicegate")
            await migrate(postgres.dsn(TEMPLATE))
            yield postgres
        finally:
            await postgres.back()
            await embedded.stop()

    # ── its databases ────────────────────────────────────────────────────────────────────────────

    async def create(self, *, empty: bool = False) -> str:
        """The name of a new database, with the schema in place unless it is to be empty."""
        name = f"stage_{next(self._numbers)}"
        await self.back()
        await self.order(f"CREATE DATABASE {name} TEMPLATE {'template1' if empty else TEMPLATE} OWNER sluicegate")
        return name

    async def drop(self, name: str) -> None:
        with suppress(asyncpg.PostgresError, OSError):
            await self.order(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def dsn(self, name: str, *, through: Proxy | None = None, user: str = "sluicegate") -> str:
        if through is not None:
            return f"postgresql://{user}@127.0.0.1:{through.port}/{name}?sslmode=disable"
        return urlsplit(self._embedded.dsn)._replace(netloc=f"{user}@", path=f"/{name}").geturl()

    async def connect(self) -> Streams:
        """For a proxy."""
        return await asyncio.open_unix_connection(f"{self._sockets}/.s.PGSQL.5432")

    async def order(self, *statements: str, database: str = "postgres") -> Any:
        """As superuser; the first value of the last one's first row."""
        connection = await asyncpg.connect(self.dsn(database, user="postgres"), timeout=10)
        try:
            for statement in statements[:-1]:
                await connection.execute(statement)
            return await connection.fetchval(statements[-1])
        finally:
            await connection.close()

    # ── its processes ────────────────────────────────────────────────────────────────────────────

    @property
    def postmaster(self) -> int:
        return int((self.folder / "data/postgres/cluster/postmaster.pid").read_text().split()[0])

    @property
    def keeper(self) -> int:
        return parent_of(self.postmaster)

    def processes(self) -> list[int]:
        """The postmaster first, then all that it started."""
        try:
            first = self.postmaster
        except (OSError, IndexError):
            return []
        return [first, *children_of(first)]

    def send_signal(self, number: signal.Signals, *, only_first: bool = False) -> None:
        for process in self.processes()[: 1 if only_first else None]:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def kill(self) -> None:
        """Kill -9 of the postmaster; its children notice, and the keeper starts it again."""
        self.send_signal(signal.SIGKILL, only_first=True)

    def kill_a_backend(self, choose: Callable[[list[int]], int]) -> None:
        """`kill -9` of one that serves a client: Postgres then cuts off all the others, and recovers."""
        backends = [process for process in self.processes()[1:] if b" stage_" in command_of(process)]
        if backends:
            with suppress(ProcessLookupError):
                os.kill(choose(backends), signal.SIGKILL)

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        processes = self.processes()
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)

    @asynccontextmanager
    async def away(self, by: signal.Signals = signal.SIGQUIT) -> AsyncIterator[None]:
        """Ended, and not started again inside the block."""
        keeper, first = self.keeper, self.postmaster
        os.kill(keeper, signal.SIGSTOP)
        try:
            os.kill(first, by)
            until = time.monotonic() + 20
            while is_alive(first) and time.monotonic() < until:
                await asyncio.sleep(0.02)
            yield
        finally:
            os.kill(keeper, signal.SIGCONT)

    async def back(self, within: float = 60) -> None:
        """Taking connections when it returns."""
        until = time.monotonic() + within
        while True:
            try:
                await self.order("SELECT 1")
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.05)
            else:
                return


# ── file systems of this machine ────────────────────────────────────────────────────────────────────


@contextmanager
def small_file_system(place: Path, size: int) -> Iterator[Path]:
    """In memory, of `size` MiB; mounting one takes root."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m,mode=755", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def why_no_file_system() -> str | None:
    """The reason, where none can be mounted."""
    if shutil.which("mount") is None:
        return "there is no mount"
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_file_system(Path(folder) / "small", 1):
                return None
        except (OSError, subprocess.CalledProcessError):
            return "only root may mount a small file system"


# ── processes of this machine ───────────────────────────────────────────────────────────────────────


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def is_alive(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def children_of(process: int) -> list[int]:
    """All that it started, and what these started."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            parents.setdefault(parent_of(int(entry.name)), []).append(int(entry.name))
    found, left = [], list(parents.get(process, ()))
    while left:
        found.append(child := left.pop())
        left += parents.get(child, ())
    return found


def command_of(process: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""
