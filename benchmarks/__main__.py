"""`make bench`: the figures, one line each; JSON and a Markdown table in benchmarks/results/.

    make bench               the default rows, in less than ten minutes
    make bench ALL=1         the long ones too, with the peers that can be installed
    make bench ONLY=intake   the rows whose names contain this, the long ones among them too; several with commas between
    make bench DOCS=1        …and the table goes into docs/explanation/performance.md
    make bench ROUNDS=1      a quick look; the figures are worth less

A goal that is short is told, and is no error.  A figure that could not be taken is one.
"""

import argparse
import asyncio
import gc
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from benchmarks import dispatch, footprint, intake, isolation, partitions, peers, storage, wake, whole
from benchmarks.results import DOCS, RESULTS, Machine, Result, State, keep, table, write_docs
from benchmarks.rows import Ground, NotRun, Row
from outbox.database import migrate
from outbox.embedded import Embedded

GROUPS = (intake, wake, dispatch, storage, partitions, whole, footprint, isolation, peers)
ROWS: tuple[Row, ...] = tuple(row for group in GROUPS for row in group.ROWS)
PATIENCE, GRACE = 4, 30  # a row may take this many times the seconds that it says, and so many more


async def main(
    rows: Sequence[Row],
    *,
    only: str | None = None,
    everything: bool = False,
    rounds: int | None = None,
    results: Path = RESULTS,
    docs: Path | None = None,
) -> int:
    """The exit code: 0 where every figure that was asked for could be taken."""
    chosen = [row for row in rows if (asked_for(only, row) if only else everything or not row.long)]
    if not chosen:
        print(f"no row is called {only!r}; there are: {', '.join(row.name for row in rows)}", file=sys.stderr)
        return 2
    print(f"{len(chosen)} rows, about {sum(row.seconds for row in chosen) / 60:.0f} minutes", flush=True)
    taken = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # the server's user, who is not root, has to get through
        machine = Machine.here(folder)
        for row in chosen:
            result = await take(row, folder, rounds, machine)
            print(line(result), flush=True)
            taken.append(result)
    kept = keep(taken, machine, results)
    if docs is not None:
        write_docs(docs, table(rows, kept))
    return 1 if any(result.failed for result in taken) else 0


def asked_for(only: str, row: Row) -> bool:
    return any(word in row.name for word in only.split(",") if word)


async def take(row: Row, folder: Path, rounds: int | None, machine: Machine) -> Result:
    began = time.monotonic()
    try:
        async with asyncio.timeout(PATIENCE * row.seconds + GRACE):
            figure = await on_its_own_ground(row, folder / row.name, rounds or row.rounds, machine)
        state, reason = State.TAKEN, figure.note
    except NotRun as error:
        figure, state, reason = None, State.NOT_RUN, str(error)
    except Exception as error:  # noqa: BLE001  a figure that cannot be taken is told, and the others are taken
        figure, state, reason = None, State.NOT_TAKEN, f"{type(error).__name__}: {error}"
    return Result(row=row, figure=figure, state=state, reason=reason, seconds=time.monotonic() - began)


async def on_its_own_ground(row: Row, folder: Path, rounds: int, machine: Machine):  # noqa: ANN201
    folder.mkdir()
    if not row.postgres:
        return await row.take(Ground("", folder, rounds))
    embedded = await Embedded.start(folder)
    try:
        await machine.ask(embedded.dsn)
        await migrate(embedded.dsn)
        return await row.take(Ground(embedded.dsn, folder, rounds))
    finally:
        await embedded.stop()


def line(result: Result) -> str:
    row, figure = result.row, result.figure
    if figure is None:
        excuse = f" (no error {row.may_not_run})" if not result.failed else ""
        return f"{row.name:<18} {result.state.value}: {result.reason}{excuse}"
    low, high = figure.span
    value = f"{figure.value:,.4g} {row.unit}" if figure.value < 1000 else f"{figure.value:,.0f} {row.unit}"
    ratio = f"{figure.ratio:6.2f} × {row.limit}" if figure.ratio is not None else " " * 6
    verdict = "met" if result.met else "SHORT"
    note = f"  ({figure.note})" if figure.note else ""
    return f"{row.name:<18} {value:>14}  {ratio}  {low:,.4g}–{high:,.4g}  goal {row.goal}  {verdict}{note}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", help="rows whose names contain this; several with commas between")
    parser.add_argument("--all", action="store_true", help="the long ones, too")
    parser.add_argument("--rounds", type=int, help="instead of what each row says")
    parser.add_argument("--docs", action="store_true", help=f"write the table into {DOCS}")
    told = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    work = main(ROWS, only=told.only, everything=told.all, rounds=told.rounds, docs=DOCS if told.docs else None)
    if sys.platform == "win32":
        sys.exit("the benchmarks need a Unix")
    import uvloop

    gc.freeze()  # as the program does (gateway/app.py), for what is measured in this process and for its limits
    gc.set_threshold(5_000)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(work))
