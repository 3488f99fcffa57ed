"""Event → destinations: which routes take an event, and what they owe together.  Pure."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal, InvalidOperation
from operator import ge, gt, le, lt
from typing import Any

from gateway.config_sections import Condition, Route, Value
from gateway.fields import Unfit, timestamp


@dataclass(frozen=True, slots=True)
class Owed:
    """What the routes of an event owe to one destination: two routes to one destination are one delivery."""

    destination: str
    ordered: bool  # in order, if any of its routes asks for it
    give_up: timedelta | None  # the shortest of its routes; None: the destination's own


class Routes:
    """All routes, compiled.  Every route that matches applies.

    What hangs on source, type and facility alone is found once for each such triple; for every event only the
    conditions on kept fields are judged.
    """

    def __init__(self, routes: Mapping[str, Route], *, give_up: Mapping[str, timedelta] | None = None) -> None:
        """`give_up` is what the destinations say themselves: where one of two routes is silent, it is that route's."""
        self._routes = tuple(routes.values())
        self._give_up = give_up or {}
        self._candidates: dict[tuple[str, str, str | None], _Candidates] = {}

    def choose(self, *, source: str, type: str, facility: str | None, data: Mapping[str, object]) -> tuple[Owed, ...]:  # noqa: A002 — CloudEvents calls it so
        candidates = self._candidates.get((source, type, facility))
        if candidates is None:
            candidates = self._remember(source, type, facility)
        return candidates.owed(data)

    def _remember(self, source: str, type_: str, facility: str | None) -> "_Candidates":
        if len(self._candidates) >= _MOST_REMEMBERED:  # a type may be made of codes, and then there is no end to them
            self._candidates.clear()
        candidates = _Candidates(
            [route for route in self._routes if _may_take(route, source, type_, facility)], self._give_up
        )
        self._candidates[source, type_, facility] = candidates
        return candidates


class _Candidates:
    """The routes that take events of one source, type and facility, if their kept fields are as the routes say."""

    def __init__(self, routes: Sequence[Route], give_up: Mapping[str, timedelta]) -> None:
        self._routes = routes
        self._tests = [
            (place, [holds(*item) for item in route.when.data.items()]) for place, route in enumerate(routes)
        ]
        self._give_up = give_up
        self._together: dict[tuple[int, ...], tuple[Owed, ...]] = {}  # by the routes that take an event

    def owed(self, kept: Mapping[str, object]) -> tuple[Owed, ...]:
        taking = tuple([place for place, tests in self._tests if not tests or _all_hold(tests, kept)])
        owed = self._together.get(taking)
        if owed is None:
            owed = tuple(_merged([self._routes[place] for place in taking], self._give_up))
            if len(self._together) < _MOST_REMEMBERED:
                self._together[taking] = owed
        return owed


def _all_hold(tests: Iterable["_Test"], kept: Mapping[str, object]) -> bool:
    for test in tests:  # noqa: SIM110 — for every event: a generator would cost more than what it asks
        if not test(kept):
            return False
    return True


def _may_take(route: Route, source: str, type_: str, facility: str | None) -> bool:
    when = route.when
    return (
        (when.source is None or source in when.source)
        and (when.type is None or any(_is_type(type_, wanted) for wanted in when.type))
        and (when.facility is None or facility in when.facility)
    )


def _is_type(type_: str, wanted: str) -> bool:
    return type_.startswith(wanted[:-1]) if wanted.endswith(".*") else type_ == wanted


def _merged(routes: Iterable[Route], give_up: Mapping[str, timedelta]) -> Iterable[Owed]:
    asked: dict[str, list[Route]] = {}
    for route in routes:
        for destination in route.to:
            asked.setdefault(destination, []).append(route)
    for destination, asking in asked.items():
        own = give_up.get(destination)
        limits = [limit for route in asking if (limit := route.give_up or own) is not None]
        said = any(route.give_up is not None for route in asking)
        yield Owed(
            destination,
            ordered=any(route.order == "subject" for route in asking),
            give_up=min(limits) if said else None,
        )


# ── conditions on kept fields ──────────────────────────────────────────────────────────────────────

_Test = Callable[[Mapping[str, object]], bool]


def holds(name: str, condition: Condition) -> _Test:
    """Whether a kept field is as `condition` says.  Of a field that is not there nothing holds, not even `not`."""
    among = [comparable(value) for value in condition.in_] if condition.in_ is not None else None
    none_of = [comparable(value) for value in condition.not_ or ()]
    bounds = [(_BOUNDS[kind], *comparable(bound)) for kind, bound in condition.bounds.items()]

    def test(kept: Mapping[str, object]) -> bool:
        value = kept.get(name)
        if value is None or (among is not None and not any(read(value) == wanted for read, wanted in among)):
            return False
        if none_of and any(read(value) == wanted for read, wanted in none_of):
            return False
        for is_so, read, bound in bounds:  # noqa: SIM110 — as for `_all_hold`
            if (given := read(value)) is None or not is_so(given, bound):
                return False
        return True

    return test


def comparable(value: Value) -> tuple[Callable[[object], Any], Any]:
    """How to read a kept value so that it can be compared with `value`, and that in the same form."""
    match value:
        case bool():
            return _truth, value
        case int() | Decimal():
            return _number, value
        case str():
            try:
                moment = timestamp(value)
            except Unfit:
                moment = value
            return (_moment, _moment(moment)) if _moment(moment) else (_text, value)


def _truth(kept: object) -> bool | None:
    return kept if isinstance(kept, bool) else None


def _number(kept: object) -> int | Decimal | None:
    """An integer, or a decimal, which is kept as text: never compared as text, where 9 is more than 10."""
    if isinstance(kept, int) and not isinstance(kept, bool):
        return kept
    if not isinstance(kept, str):
        return None
    try:
        number = Decimal(kept)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _moment(kept: object) -> str | None:
    """A kept timestamp or date in the form whose order is that of time."""
    return kept.removesuffix("Z") if isinstance(kept, str) and _MOMENT.fullmatch(kept) else None


def _text(kept: object) -> str | None:
    return kept if isinstance(kept, str) else None


_BOUNDS: Mapping[str, Callable[[Any, Any], bool]] = {"gt": gt, "gte": ge, "lt": lt, "lte": le}
_MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}(?:T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]+)?Z)?")
_MOST_REMEMBERED = 4096
