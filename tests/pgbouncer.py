"""The real pgbouncer: the one of this machine, or one that is fetched by apt into a folder of the project's own."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from outbox.embedded_folder import binaries
from tests.postgres import folder_of_servers
from tests.program import free_port, until

ROOT = Path(__file__).parent.parent
PLACE = ROOT / ".tools/pgbouncer"
LACKING = PLACE / "lacking"  # why there is none: the end of the run says so

AS_SOMEBODY = """
import os, sys
from pathlib import Path
from outbox import keeper
binaries, program, *arguments = sys.argv[1:]
keeper.become_acceptable(Path.cwd(), Path(binaries))
os.execv(program, [program, *arguments])
"""


def found() -> Path | None:
    """None where it cannot be had."""
    if there := shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"):
        return Path(there)
    PLACE.mkdir(parents=True, exist_ok=True)
    with (PLACE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fetched = PLACE / "root/usr/sbin/pgbouncer"
        if not fetched.exists():
            fetch()
        if fetched.exists():
            LACKING.unlink(missing_ok=True)
            return fetched
    return None


def fetch() -> None:
    """With the libraries that it names; nothing is installed."""
    packages, names = PLACE / "packages", ["pgbouncer"]
    try:
        told = run("apt-cache", "depends", "--no-recommends", "--no-suggests", "pgbouncer").stdout
        names += [words[1] for line in told.splitlines() if (words := line.split())[:1] == ["Depends:"]]
        packages.mkdir(exist_ok=True)
        run(
            "apt-get",
            "download",
            *(name for name in names if name == "pgbouncer" or name.startswith("lib")),
            cwd=packages,
        )
        for package in packages.glob("*.deb"):
            run("dpkg", "-x", str(package), str(PLACE / "root"))
    except (OSError, subprocess.SubprocessError) as error:
        LACKING.write_text(f"apt-get download pgbouncer: {getattr(error, 'stderr', None) or error}"[:500])
    finally:
        shutil.rmtree(packages, ignore_errors=True)


def run(*command: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=90, check=True)


@contextmanager
def serving(pgbouncer: Path, sockets: str, **settings: str) -> Iterator[int]:
    """Its port, while it stands before the Postgres whose socket is in that directory."""
    port = free_port()
    asked = {
        "listen_addr": "127.0.0.1", "listen_port": str(port), "unix_socket_dir": "", "auth_type": "trust",
        "auth_file": "users", "default_pool_size": "20", "logfile": "said", **settings,
    }  # fmt: skip
    with folder_of_servers() as folder:
        lines = "".join(f"{name} = {value}\n" for name, value in asked.items())
        (folder / "ini").write_text(f"[databases]\n* = host={sockets} port=5432\n[pgbouncer]\n{lines}")
        (folder / "users").write_text('"sluicegate" ""\n')
        libraries = ":".join(str(place) for place in (PLACE / "root/usr/lib").glob("*-linux-gnu*"))
        process = subprocess.Popen(
            [sys.executable, "-c", AS_SOMEBODY, str(binaries()), str(pgbouncer), "ini"],
            cwd=folder,
            env={"PATH": os.defpath, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": libraries},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            said = folder / "said"
            until(lambda: said.exists() and "process up" in said.read_text(), 20, "pgbouncer that is up")
            yield port
        finally:
            process.terminate()
            process.wait(20)
