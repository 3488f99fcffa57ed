"""What a figure is: a value, the limit that it is held against, taken in the same run, and the goal.

A row declares itself in the `ROWS` of its group's file:

    Row(
        name="dispatch-noop", what="deliveries of nothing, attempts recorded", unit="/s",
        limit="an 80-line loop", goals=(at_least(0.5),), seconds=60, take=noop,
    )

and `take` is given a `Ground` and returns a `Figure`.  It raises what went wrong, or `NotRun` where something
that it needs cannot be had on this machine.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal


class NotRun(Exception):  # noqa: N818  it is no error where the row `may_not_run`
    """What the row needs cannot be had here; the message says what, and why."""


class Unbalanced(Exception):  # noqa: N818
    """What was accepted and what was delivered are not the same set: the figure is worth nothing."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on the ratio (`unit` is ×) or on the value (in its unit), and which side of it is good."""

    sense: Literal["≥", "≤"]
    bound: float
    unit: str

    def met(self, figure: "Figure") -> bool:
        told = figure.ratio if self.unit == "×" else figure.value
        return told is not None and (told >= self.bound if self.sense == "≥" else told <= self.bound)

    def __str__(self) -> str:
        return f"{self.sense} {self.bound:,g} {self.unit}".strip()


def at_least(bound: float, unit: str = "×") -> Goal:
    """Higher is better."""
    return Goal("≥", bound, unit)


def at_most(bound: float, unit: str = "×") -> Goal:
    """Lower is better."""
    return Goal("≤", bound, unit)


@dataclass(frozen=True, slots=True)
class Figure:
    """What was measured, one value a round, and the limit taken beside each."""

    values: Sequence[float]
    limits: Sequence[float] = ()  # none: the goal is about the value itself
    note: str = ""  # what else a reader should know of this run: which peer was the best, …

    @property
    def value(self) -> float:
        return median(self.values)

    @property
    def limit(self) -> float | None:
        return median(self.limits) if self.limits else None

    @property
    def ratios(self) -> list[float]:
        return [value / limit for value, limit in zip(self.values, self.limits, strict=True)] if self.limits else []

    @property
    def ratio(self) -> float | None:
        return median(self.ratios) if self.limits else None

    @property
    def span(self) -> tuple[float, float]:
        """Of the ratios; of the values where there is no limit."""
        told = self.ratios or self.values
        return min(told), max(told)


@dataclass(frozen=True, slots=True)
class Ground:
    """What a row may use: a migrated Postgres of its own, a folder, and how many rounds it is to take."""

    dsn: str
    folder: Path
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.  `seconds` is about how long it takes; after four times that it is given up."""

    name: str
    what: str
    unit: str
    limit: str = ""  # what the values are held against, in words
    goals: tuple[Goal, ...]
    seconds: float
    take: Callable[[Ground], Awaitable[Figure]]
    long: bool = False  # only with ALL=1, or where ONLY names it
    rounds: int = 5
    may_not_run: str = ""  # where `not run` is an answer, not a failure: "without Python 3.12 or PyPI"
    postgres: bool = True

    @property
    def goal(self) -> str:
        return ", ".join(map(str, self.goals))

    def met(self, figure: Figure) -> bool:
        return all(goal.met(figure) for goal in self.goals)


def reconcile(accepted: Iterable[object], delivered: Iterable[object], *, once: bool = True) -> None:
    """Raises Unbalanced unless each that was accepted was delivered, and nothing else; `once`: and none twice."""
    owed, came = set(accepted), Counter(iter(delivered))
    lost, strange = len(owed - came.keys()), len(came.keys() - owed)
    doubled = sum(n - 1 for n in came.values()) if once else 0
    if lost or strange or doubled:
        raise Unbalanced(f"of {len(owed)} accepted {lost} were lost, {doubled} came twice, {strange} came from nowhere")
