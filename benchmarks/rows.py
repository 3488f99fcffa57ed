"""What a figure is: a value, and the limit that it is held against, taken in the same run."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure.  `ratio` is value ÷ limit; `met` compares what the goal is about, the ratio or the value itself."""

    name: str
    what: str
    values: Sequence[float]  # one a round
    limits: Sequence[float]
    unit: str
    limit: str  # what the limit is
    goal: str
    met: bool

    @property
    def value(self) -> float:
        return median(self.values)

    @property
    def ratio(self) -> float:
        return median(value / limit for value, limit in zip(self.values, self.limits, strict=True))

    @property
    def span(self) -> tuple[float, float]:
        ratios = [value / limit for value, limit in zip(self.values, self.limits, strict=True)]
        return min(ratios), max(ratios)
