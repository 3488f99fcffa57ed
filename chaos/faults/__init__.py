"""The faults, a row each.  A file in this folder adds rows: mark a function with `@fault`, and it is found.

    @fault(2, "kill -9 between commit and answer", Plan(gateways=2))
    async def killed_after_commit(stage: Stage) -> None:
        async with stage.disturb("kill"):
            ...
        await stage.recovered()

What cannot be injected on this machine, or is not built yet, is a row as well, which says why.
"""

import importlib
import pkgutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from chaos.stage import Plan, Stage

Deed = Callable[[Stage], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`number` is its place in the table; letters tell several of one kind apart."""

    number: str
    name: str
    plan: Plan = field(default_factory=Plan)
    deed: Deed | None = None
    why_not: Callable[[], str | None] = lambda: None  # the reason, where it cannot be injected here
    not_built: str = ""

    @property
    def place(self) -> tuple[int, str]:
        digits = "".join(c for c in self.number if c.isdigit())
        return int(digits or 0), self.number


FAULTS: dict[str, Fault] = {}


def fault(
    number: int | str, name: str, plan: Plan | None = None, *, why_not: Callable[[], str | None] = lambda: None
) -> Callable[[Deed], Deed]:
    """This function injects it."""

    def known(deed: Deed) -> Deed:
        add(Fault(number=str(number), name=name, plan=plan or Plan(), deed=deed, why_not=why_not))
        return deed

    return known


def not_built(number: int | str, name: str, what_is_missing: str) -> None:
    add(Fault(number=str(number), name=name, not_built=what_is_missing))


def add(new: Fault) -> None:
    if new.number in FAULTS:
        raise ValueError(f"two faults are called {new.number}")
    FAULTS[new.number] = new


def all_faults() -> list[Fault]:
    """In the order of their numbers."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted(FAULTS.values(), key=lambda fault: fault.place)
