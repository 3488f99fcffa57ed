"""The other queues on Postgres: the same number of deliveries of nothing, on the same server, in turns with ours.

Each is installed from its registry into `benchmarks/.peers` when it is asked for, runs in a process of its own with the
options that made it fastest, and is no part of the program.  What is timed is the drain of a queue that was filled
before, until the last job is acknowledged.
"""

import asyncio
import json
import os
import shutil
import sys
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks.dispatch import Partner, drain, fill
from benchmarks.rows import Figure, Ground, NotRun, Row, at_least, reconcile
from tests.house import house_on

HERE = Path(__file__).parent
INSTALLED = HERE.parent / ".peers"
COUNT = 20_000
SLOWEST = 3_000  # jobs of a peer that takes more than a millisecond for each
AT_ONCE = 200


async def beside(ground: Ground, install: Callable[[], Awaitable[list[str]]], count: int) -> Figure:
    """Ours, in a round each with theirs."""
    command = await install()
    values, limits = [], []
    async with house_on(ground.dsn) as house:
        await house.destination("ledger")
        for _ in range(ground.rounds):
            told = json.loads(await output(*command, ground.dsn, str(count), str(AT_ONCE)))
            reconcile(told["accepted"], told["delivered"])
            limits.append(count / told["seconds"])
            values.append(await drain(house, "ledger", await fill(house, "ledger", COUNT), Partner()))
    return Figure(values, limits)


def python(script: str, *packages: str, least: tuple[int, int] = (3, 11)) -> Callable[[], Awaitable[list[str]]]:
    """An environment of its own with these."""

    async def install() -> list[str]:
        interpreter = sys.executable if sys.version_info >= least else shutil.which(f"python{least[0]}.{least[1]}")
        if interpreter is None:
            raise NotRun(f"needs Python {least[0]}.{least[1]}")
        environment = INSTALLED / script
        if not (environment / "ready").exists():
            try:
                await output(interpreter, "-m", "venv", "--clear", str(environment))
                pip = [
                    str(environment / "bin/python"),
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--disable-pip-version-check",
                ]
                await output(*pip, *packages)
            except OSError as error:
                raise NotRun(f"cannot be installed: {error}") from error
            (environment / "ready").touch()
        return [str(environment / "bin/python"), str(HERE / f"{script}.py")]

    return install


def node(script: str, package: str) -> Callable[[], Awaitable[list[str]]]:
    async def install() -> list[str]:
        program, npm = shutil.which("node"), shutil.which("npm")
        if program is None or npm is None:
            raise NotRun("needs node and npm")
        folder = INSTALLED / script
        if not (folder / "ready").exists():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                await output(npm, "install", "--silent", "--no-fund", "--no-audit", "--prefix", str(folder), package)
            except OSError as error:
                raise NotRun(f"cannot be installed: {error}") from error
            (folder / "ready").touch()
        shutil.copy(HERE / f"{script}.mjs", folder)  # modules are looked for beside the script
        return [program, str(folder / f"{script}.mjs")]

    return install


async def output(*command: str) -> bytes:
    """What the command prints; an OSError where it fails."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=PIPE, stderr=PIPE, env=os.environ | {"NODE_ENV": "production", "NO_LOG_SUCCESS": "1"}
    )
    try:
        told, wrong = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        raise
    if process.returncode != 0:
        last = wrong.decode(errors="replace").strip().splitlines()[-1:] or ["nothing was said"]
        raise OSError(f"{Path(command[0]).name} ended with {process.returncode}: {last[0][:200]}")
    return told


def row(
    name: str,
    goal: float,
    install: Callable[[], Awaitable[list[str]]],
    *,
    without: str,
    count: int = COUNT,
    seconds: float = 60,
) -> Row:
    return Row(
        name=f"peer-{name}",
        what=f"deliveries of nothing, {AT_ONCE} at a time, beside {name}",
        unit="/s",
        limit=name,
        goals=(at_least(goal),),
        seconds=seconds,
        take=lambda ground: beside(ground, install, count),
        long=True,
        rounds=3,
        may_not_run=f"without {without}",
    )


ROWS = (
    row(
        "pgqueuer", 3, python("pgqueuer_jobs", "pgqueuer==1.6.0", "asyncpg==0.32.0", "uvloop==0.23.0"), without="PyPI"
    ),
    row(
        "procrastinate", 3, python("procrastinate_jobs", "procrastinate==3.10.0", "uvloop==0.23.0"),
        without="PyPI", count=SLOWEST,
    ),
    row(
        "oban", 3, python("oban_jobs", "oban==0.7.0", "uvloop==0.23.0", least=(3, 12)),
        without="Python 3.12 or PyPI", count=SLOWEST,
    ),
    row("graphile-worker", 1, node("graphile_jobs", "graphile-worker@0.17.3"), without="node, npm or npm's registry"),
)  # fmt: skip
