"""The keeper of an embedded Postgres: a small process between the programs that use it and the server.

    serve ────┐
    a command ┼─ hold `users.lock`, shared: the kernel drops it with its holder, however that ends
    …         ┘
    keeper ───── waits for `users.lock` alone; gets it when nobody is left, and stops the server
      └─ postgres

So a killed program leaves nothing running, and whoever ends first takes nothing away from the others.  A server
that dies while somebody uses it is started again.

It runs as a script of its own, `python -I -S keeper.py FOLDER BINARIES`, and so uses the standard library alone.
What it has to say goes to the log that the server writes.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from enum import Enum, auto
from pathlib import Path
from queue import Empty, SimpleQueue

SHORTEST_PAUSE, LONGEST_PAUSE = timedelta(milliseconds=100), timedelta(seconds=5)  # before it is started again
FAST = 15  # seconds for a fast shutdown
ANOTHER = 3  # exit code: another keeper is at work here

PROMISES = {
    # What was committed stays, whatever becomes of the machine.
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    # Only who may enter the directory of the socket can connect.
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    # The server's log tells of the server and never of what is stored.  The text of an error repeats values, so
    # errors of statements are for who sent them, and none is logged.
    "logging_collector": "off",
    "log_destination": "stderr",
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
    "log_statement": "none",
    "log_min_duration_statement": "-1",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
}

MANNERS = {
    # It shares a small machine with the program.
    "max_connections": "1000",  # 15 for each of up to 64 workers, and some for commands
    "shared_buffers": "128MB",
    "max_parallel_workers_per_gather": "0",
    "io_method": "sync",
    "jit": "off",
    "autovacuum_max_workers": "2",
    "autovacuum_naptime": "15s",  # the queue turns over quickly
    "checkpoint_timeout": "30min",  # after each one pages are logged in full again
    "max_wal_size": "2GB",
    "log_checkpoints": "off",
    "log_line_prefix": "%m [%p] ",
    "log_timezone": "UTC",
    "timezone": "UTC",
    "cluster_name": "sluicegate",
}


def main(folder: Path, binaries: Path) -> int:
    """Start Postgres in `folder`, keep it while somebody uses it, and stop it."""
    with contextlib.suppress(PermissionError):
        os.setsid()  # Ctrl-C at a terminal is for the program alone
    for meant_for_the_program in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(meant_for_the_program, lambda *_: None)  # not SIG_IGN, which Postgres would inherit
    os.umask(0o077)
    os.chdir(folder)
    with (
        Path("keeper.lock").open("a") as keeper,
        Path("server.lock").open("a") as server,
        Path("users.lock").open("a") as users,
    ):
        if not take(keeper.fileno(), timedelta(seconds=0.2)):  # who looks for a keeper holds it for an instant
            return ANOTHER
        keeper.truncate(0)
        end_what_is_left(folder / "cluster", server.fileno())
        here = Server(folder, become_acceptable(folder, binaries), lock=server.fileno())
        return keep(here, keeper.fileno(), users.fileno())


def take(lock: int, patience: timedelta) -> bool:
    until = time.monotonic() + patience.total_seconds()
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.01)


class News(Enum):
    NOBODY_IS_LEFT = auto()
    POSTGRES_ENDED = auto()


def keep(server: "Server", keeper: int, users: int) -> int:
    """The first start must succeed; after that Postgres is started again whenever it ends by itself.

    Once it is ready, its process id stands in `keeper.lock`: so it can be told from one that an earlier keeper left.
    """
    news: SimpleQueue[News] = SimpleQueue()
    threading.Thread(target=await_nobody, args=(users, news), daemon=True).start()
    server.prepare()
    served, pause = False, SHORTEST_PAUSE
    while True:
        server.start(news)
        heard = None
        while heard is None and not server.ready():
            heard = listen(news, timedelta(milliseconds=10))
        if heard is None:
            served, pause = True, SHORTEST_PAUSE
            os.ftruncate(keeper, 0)
            os.write(keeper, str(server.pid).encode())
        if (heard or news.get()) is News.NOBODY_IS_LEFT:
            server.stop()
            return 0
        if not served:
            raise SystemExit("keeper: Postgres ended while it was starting.")
        say("Postgres ended by itself and is started again.")
        if listen(news, pause) is News.NOBODY_IS_LEFT:
            return 0
        pause = min(2 * pause, LONGEST_PAUSE)


def await_nobody(users: int, news: SimpleQueue[News]) -> None:
    fcntl.flock(users, fcntl.LOCK_EX)  # and keep it: who comes now waits until the server has stopped
    news.put(News.NOBODY_IS_LEFT)


def listen(news: SimpleQueue[News], patience: timedelta) -> News | None:
    try:
        return news.get(timeout=patience.total_seconds())
    except Empty:
        return None


class Server:
    """One data directory and the server that runs on it, as somebody whom Postgres accepts."""

    def __init__(self, folder: Path, binaries: Path, *, lock: int) -> None:
        self._folder = folder
        self._lock = lock
        self._cluster = folder / "cluster"
        self._binaries = binaries
        self._reachable = os.access(folder, os.R_OK | os.W_OK | os.X_OK)
        self._sockets = self._socket_directory()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def prepare(self) -> None:
        """Make the data directory if there is none, whole or not at all, and write its settings."""
        if not Path("cluster").exists():
            shutil.rmtree("new", ignore_errors=True)  # of a first start that was killed
            Path("new").mkdir()
            made = subprocess.run(
                [
                    *(self._binaries / "bin/initdb", "-D", self._seen_from_inside("new")),
                    *("--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-instructions"),
                    *("--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),  # the same everywhere
                ],
                cwd="new",
                stdout=subprocess.DEVNULL,
                check=False,
            )
            if made.returncode:
                raise SystemExit("keeper: initdb could not make the data directory.")
            Path("new").rename("cluster")
        for left in self._sockets.glob(".s.PGSQL.*"):  # of a server that was killed; nobody else's are here
            left.unlink()
        settings = "".join(f"{name} = '{value}'\n" for name, value in (MANNERS | PROMISES).items())
        written = "# Written at every start.  To change what is not a promise of the program: ALTER SYSTEM.\n"
        Path("cluster/postgresql.conf").write_text(written + settings)
        Path("cluster/pg_hba.conf").write_text("local all all trust\n")  # the directory of the socket is the door

    def start(self, news: SimpleQueue[News]) -> None:
        promises = PROMISES | {"unix_socket_directories": str(self._sockets)}
        self._process = subprocess.Popen(
            [
                *(self._binaries / "bin/postgres", "-D", self._seen_from_inside("cluster")),
                *(argument for name, value in promises.items() for argument in ("-c", f"{name}={value}")),
            ],
            cwd="cluster",
            stdin=subprocess.DEVNULL,
            pass_fds=[self._lock],  # so it is held until the last child has ended
        )
        threading.Thread(target=await_end, args=(self._process, news), daemon=True).start()

    def ready(self) -> bool:
        lines = lock_file(Path("cluster"))
        return lines[:1] == [str(self.pid)] and lines[7:8] == ["ready"]

    def stop(self) -> None:
        """Fast: connections are cut, what was committed is written out.

        If that takes too long it is stopped in the middle, and the next start reads the log of what was committed.
        (Postgres 18 never ends if it is told to while it begins anew after the crash of one of its children.)
        """
        assert self._process
        for stopped in everybody():  # somebody froze them: so they would neither end nor be told to
            if serves(stopped, self._cluster):
                with contextlib.suppress(OSError):
                    os.kill(stopped, signal.SIGCONT)
        for hint, patience in ((signal.SIGINT, FAST), (signal.SIGQUIT, 5), (signal.SIGKILL, None)):
            self._process.send_signal(hint)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
                break
        if self._sockets.parent != self._folder:
            with contextlib.suppress(OSError):
                self._sockets.rmdir()

    def _seen_from_inside(self, directory: str) -> str:
        """A path for a process that works in `directory`.

        Below somebody's private home a lesser user cannot follow the path, but can stay where it was put.
        """
        return str(self._folder / directory) if self._reachable else "/proc/self/cwd"

    def _socket_directory(self) -> Path:
        """Beside the data, unless that path is longer than a socket's may be, or needs quoting."""
        near = self._folder / "run"
        path = os.fsencode(near / ".s.PGSQL.5432")
        if self._reachable and len(path) <= 103 and re.fullmatch(rb"[\w./+@-]+", path):  # 103: macOS; Linux takes 107
            Path("run").mkdir(exist_ok=True)
            Path("run").chmod(0o700)
            return near
        named = hashlib.sha256(os.fsencode(self._folder)).hexdigest()[:16]
        far = Path(tempfile.gettempdir()) / f"sluicegate-{named}"
        with contextlib.suppress(FileExistsError):
            far.mkdir(mode=0o700)
        found = far.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077:
            return far
        return Path(tempfile.mkdtemp(prefix="sluicegate-"))  # somebody else took the name


def await_end(process: subprocess.Popen[bytes], news: SimpleQueue[News]) -> None:
    process.wait()
    news.put(News.POSTGRES_ENDED)


# ── what an earlier keeper left ─────────────────────────────────────────────────────────────────────


def end_what_is_left(cluster: Path, lock: int) -> None:
    """Stop a server whose keeper was killed, and take away the lock file of one that is dead.

    Postgres judges by the process id in its lock file, which proves nothing: a killed postmaster can stay a zombie
    for seconds, and in a container the same small number soon belongs to somebody else.  A server that our keeper
    started holds `server.lock`, as do its children: the kernel knows when the last of them has ended.
    """
    if not take(lock, timedelta(0)):
        first, *_ = lock_file(cluster) or [""]
        postmaster = int(first) if first.isdigit() else 0
        patience = timedelta(seconds=5)  # children notice by themselves that their postmaster is gone
        if serves(postmaster, cluster):
            say(f"Postgres (process {postmaster}) was left by a keeper that was killed, and is stopped.")
            os.kill(postmaster, signal.SIGINT)
            patience = timedelta(seconds=FAST)
        if not take(lock, patience):
            for process in everybody():
                if serves(process, cluster):
                    os.kill(process, signal.SIGKILL)
            if not take(lock, timedelta(seconds=5)):
                raise SystemExit(f"keeper: {cluster} is in use by a server that this machine does not show.")
    (cluster / "postmaster.pid").unlink(missing_ok=True)


def everybody() -> Iterator[int]:
    return (int(process.name) for process in Path("/proc").glob("[0-9]*"))


def serves(process: int, cluster: Path) -> bool:
    """Whether it is a Postgres that works in `cluster`; where the kernel does not tell, whether it is a Postgres."""
    if not Path("/proc/self/stat").exists():
        told = subprocess.run(
            ["/bin/ps", "-o", "comm=", "-p", str(process)], capture_output=True, text=True, check=False
        )
        return told.stdout.strip().endswith("postgres")
    try:
        found = Path(f"/proc/{process}")
        return (found / "comm").read_text() == "postgres\n" and (found / "cwd").samefile(cluster)
    except OSError:
        return False


def lock_file(cluster: Path) -> list[str]:
    """Process id, directory, start, port, directory of the socket, address, shared memory, status."""
    try:
        return [line.strip() for line in (cluster / "postmaster.pid").read_text().splitlines()]
    except FileNotFoundError:
        return []


# ── who Postgres runs as ────────────────────────────────────────────────────────────────────────────


def become_acceptable(folder: Path, binaries: Path) -> Path:
    """Become somebody who is not root and has a name, as Postgres demands; returns where the binaries are for them.

    A namespace is tried first: outside it one stays who one is, so nothing changes hands and every path is open.
    Else root gives the data to a lesser user, who may need a copy of the binaries too.
    """
    me, found = os.geteuid(), folder.stat()
    if me != 0 and is_named(me):
        return binaries
    user = a_named_user()
    if user and me == found.st_uid and works(lambda: enter_namespace(user), binaries):
        enter_namespace(user)
        return binaries
    if me == 0 and (user or found.st_uid != 0):
        uid, gid = (user.pw_uid, user.pw_gid) if user and found.st_uid == 0 else (found.st_uid, found.st_gid)
        for place in places(binaries):
            if works(lambda: become(uid, gid), place):
                hand_over(folder, uid, gid)
                become(uid, gid)
                return place
    raise SystemExit(
        f"keeper: Postgres does not run as {who()}, and this machine lets it run neither in a user namespace nor as a lesser "
        "user. Start sluicegate as a user who has a name and is not root (useradd --system sluicegate), or set "
        "`database:` to a Postgres of your own."
    )


def works(become_it: Callable[[], None], binaries: Path) -> bool:
    """Try on a child whether `postgres` runs so: the steps cannot be taken back."""
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            become_it()
            ended = subprocess.run([binaries / "bin/postgres", "--version"], stdout=subprocess.DEVNULL, check=False)
            os._exit(ended.returncode)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def enter_namespace(inner: pwd.struct_passwd) -> None:
    """Be called `inner` from now on, and stay who one is for everybody outside."""
    uid, gid = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000) != 0:  # CLONE_NEWUSER
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{inner.pw_uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{inner.pw_gid} {gid} 1")


def become(uid: int, gid: int) -> None:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)


def hand_over(folder: Path, uid: int, gid: int) -> None:
    for place in (folder, *folder.rglob("*")):
        if place.lstat().st_uid != uid:
            os.chown(place, uid, gid, follow_symlinks=False)


def places(binaries: Path) -> Iterator[Path]:
    yield binaries
    with contextlib.suppress(OSError):
        yield copy_of(binaries)


def copy_of(binaries: Path) -> Path:
    """The binaries where everybody can reach them and only root can write."""
    original = (binaries / "bin/postgres").stat()
    shelf = Path("/var/lib/sluicegate")
    copy = shelf / f"postgres-{original.st_size:x}-{original.st_mtime_ns:x}"
    if not copy.exists():
        shelf.mkdir(parents=True, exist_ok=True)
        shelf.chmod(0o755)
        made = Path(tempfile.mkdtemp(dir=shelf))
        package, libraries = binaries.parent, binaries.parent.with_name(binaries.parent.name + ".libs")
        shutil.copytree(binaries, made / package.name / binaries.name, ignore=shutil.ignore_patterns("include"))
        if libraries.exists():
            shutil.copytree(libraries, made / libraries.name)
        made.chmod(0o755)
        (made / package.name).chmod(0o755)
        with contextlib.suppress(FileExistsError):
            made.rename(copy)
    return copy / binaries.parent.name / binaries.name


def a_named_user() -> pwd.struct_passwd | None:
    for name in ("sluicegate", "postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return None


def is_named(uid: int) -> bool:
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwuid(uid).pw_name)
    return False


def who() -> str:
    return "root" if os.geteuid() == 0 else f"user {os.geteuid()}, who has no name in /etc/passwd"


def say(text: str) -> None:
    print(f"keeper: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
