"""From the door to the partner: the program as it is served, with those who post and the partner in processes of their own.

What was accepted is held against what came, in every round: the same events, each of them once.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from benchmarks.intake import bare
from benchmarks.rows import Figure, Ground, Row, at_least, at_most, reconcile
from benchmarks.senders import Accepted, Senders, senders
from benchmarks.sink import Sink, sink
from tests.program import Program, ended_with
from tests.serving import CONFIGURATION, ENVIRON

WARM_UP = 1_000
SUSTAINED = 20_000  # events a round: some seconds of it
BURST = 10_000
QUIET, BUSY = 200, 1_000  # events a second
TICKS = os.sysconf("SC_CLK_TCK")


# ── how many ────────────────────────────────────────────────────────────────────────────────────────


def sustained(ground: Ground) -> Figure:
    """Events a second from the first post until the last one is at the partner, beside a server that only answers."""
    values, limits = [], []
    with senders() as posting, sink() as partner, bare() as limit, program(ground.folder, partner, ground.dsn) as ours:
        way(posting, ours.port, partner, WARM_UP)
        posting.post(limit, WARM_UP)
        for _ in range(ground.rounds):
            limits.append(answered_per_second(posting.post(limit, SUSTAINED)))
            values.append(per_second(*way(posting, ours.port, partner, SUSTAINED)))
    return Figure(values, limits)


def burst(ground: Ground) -> Figure:
    with senders() as posting, sink() as partner, program(ground.folder, partner, ground.dsn) as ours:
        way(posting, ours.port, partner, WARM_UP)
        return Figure([per_second(*way(posting, ours.port, partner, BURST)) for _ in range(ground.rounds)])


# ── how long ────────────────────────────────────────────────────────────────────────────────────────


def waits_beside_a_bare_loop(ground: Ground, seconds: int) -> Figure:
    """95 of 100 come within so many milliseconds after they were due to be posted."""
    values, limits = [], []
    with (
        senders() as posting,
        sink() as partner,
        bare_loop(ground.dsn, partner) as limit,
        program(ground.folder, partner, ground.dsn) as ours,
    ):
        for port in (limit, ours.port):
            way(posting, port, partner, WARM_UP, rate=QUIET * 2)
        for _ in range(ground.rounds):
            limits.append(p95(*way(posting, limit, partner, QUIET * seconds, rate=QUIET)))
            values.append(p95(*way(posting, ours.port, partner, QUIET * seconds, rate=QUIET)))
    return Figure(values, limits)


def waits(ground: Ground, seconds: int) -> Figure:
    return Figure([p95(*round_) for round_ in busy_rounds(ground, seconds)])


def rest(ground: Ground, seconds: int) -> Figure:
    """Seconds from when the last one was due until nothing is left."""
    return Figure(
        [
            max(at for _, at in came) - max(one.due for one in accepted)
            for accepted, came in busy_rounds(ground, seconds)
        ]
    )


def busy_rounds(ground: Ground, seconds: int) -> Iterator[tuple[list[Accepted], list[tuple[str, float]]]]:
    with senders() as posting, sink() as partner, program(ground.folder, partner, ground.dsn) as ours:
        way(posting, ours.port, partner, WARM_UP)
        for _ in range(ground.rounds):
            yield way(posting, ours.port, partner, BUSY * seconds, rate=BUSY)


# ── how dear ────────────────────────────────────────────────────────────────────────────────────────


def processor_seconds(ground: Ground, seconds: int) -> Figure:
    """Of the program and its own Postgres, a thousand events, at a rate that leaves it time to sleep."""
    values = []
    with senders() as posting, sink() as partner, program(ground.folder, partner, "embedded") as ours:
        way(posting, ours.port, partner, WARM_UP, rate=QUIET * 2)
        for _ in range(ground.rounds):
            before = spent(ours)
            way(posting, ours.port, partner, QUIET * seconds, rate=QUIET)
            values.append((spent(ours) - before) * 1000 / (QUIET * seconds))
    return Figure(values)


def spent(program: Program) -> float:
    """By all that live of its family, and by those that they have buried."""
    stats = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split() for process in program.family()]
    return sum(int(ticks) for ticks in chain.from_iterable(stat[11:15] for stat in stats)) / TICKS


# ── what they share ─────────────────────────────────────────────────────────────────────────────────


def way(
    posting: Senders, port: int, partner: Sink, requests: int, *, rate: float | None = None
) -> tuple[list[Accepted], list[tuple[str, float]]]:
    """All are accepted, all come, none comes twice."""
    accepted = posting.post(port, requests, rate=rate)
    partner.await_count(requests)
    time.sleep(0.1)  # for one that would come twice
    came = partner.take()
    reconcile((one.event for one in accepted), (event for event, _ in came))
    return accepted, came


def per_second(accepted: Sequence[Accepted], came: Sequence[tuple[str, float]]) -> float:
    return len(came) / (max(at for _, at in came) - min(one.due for one in accepted))


def answered_per_second(accepted: Sequence[Accepted]) -> float:
    return len(accepted) / (max(one.answered for one in accepted) - min(one.due for one in accepted))


def p95(accepted: Sequence[Accepted], came: Sequence[tuple[str, float]]) -> float:
    due = {one.event: one.due for one in accepted}
    took = sorted(at - due[event] for event, at in came)
    return 1000 * took[len(took) * 95 // 100]


@contextmanager
def program(folder: Path, partner: Sink, database: str, *arguments: str) -> Iterator[Program]:
    """`sluicegate serve`, as its users start it; one destination, not in order, is owed each event."""
    text = CONFIGURATION.format(
        dsn="embedded" if database == "embedded" else "env:DSN", partner=partner.address, more=""
    )
    text = text.replace(", order: subject", "").replace("127.0.0.1:0", "127.0.0.1:PORT")
    place = folder / "serve"  # of its own: what has a path in it is taken to be of the program, and ends with it
    place.mkdir()
    made = Program(place, text, *arguments, environ={**ENVIRON, "DSN": database})
    with ended_with(made):
        made.start().ready(90)
        yield made


@contextmanager
def bare_loop(dsn: str, partner: Sink) -> Iterator[int]:
    """The port of one."""
    command = [sys.executable, "-m", "benchmarks.bare_loop", dsn, partner.address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        yield int(process.stdout.readline())
        process.terminate()


def row(
    name: str,
    what: str,
    unit: str,
    goals: tuple,  # type: ignore[type-arg]
    take: Callable[[Ground], Figure],
    seconds: float,
    *,
    limit: str = "",
    rounds: int = 5,
    long: bool = False,
    postgres: bool = True,
) -> Row:
    return Row(
        name=name, what=what, unit=unit, limit=limit, goals=goals, seconds=seconds, rounds=rounds, long=long, postgres=postgres,
        take=lambda ground: asyncio.to_thread(take, ground),
    )  # fmt: skip


ROWS = (
    row(
        "whole", "door, dispatcher and partner at once, until the last is there", "/s", (at_least(0.14),),
        sustained, 26, limit="bare aiohttp 202",
    ),
    row("whole-burst", "a burst of 10,000, until the last is there", "/s", (at_least(2_000, "/s"),), burst, 26),
    row(
        "whole-200", "due → at the partner, 200/s, p95", "ms", (at_most(4, "ms"), at_most(2)),
        lambda ground: waits_beside_a_bare_loop(ground, 2), 30, limit="accept, commit, post",
    ),
    row("whole-1000", "due → at the partner, 1,000/s, p95", "ms", (at_most(50, "ms"),), lambda g: waits(g, 2), 18),
    row(
        "whole-1000-rest", "after 1,000/s, nothing is left", "s", (at_most(1, "s"),),
        lambda ground: rest(ground, 3), 20,
    ),
    row(
        "whole-1000-60s", "due → at the partner, 1,000/s for 60 s, p95", "ms", (at_most(50, "ms"),),
        lambda ground: waits(ground, 60), 70, rounds=1, long=True,
    ),
    row(
        "whole-1000-60s-rest", "after 1,000/s for 60 s, nothing is left", "s", (at_most(1, "s"),),
        lambda ground: rest(ground, 60), 70, rounds=1, long=True,
    ),
    row(
        "whole-processor", "processor time of the program and its Postgres a thousand events, at 200/s", "s",
        (at_most(1.5, "s"),), lambda ground: processor_seconds(ground, 3), 24, postgres=False,
    ),
)  # fmt: skip
