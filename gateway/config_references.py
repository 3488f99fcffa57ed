"""What the parts of a configuration say about each other: names that lead nowhere, and rules that can never apply.

A part that is wrong in itself is compared as far as it can be: whatever cannot be told without it is not complained about.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from itertools import product
from math import ceil, floor, prod
from typing import Final, Protocol

from connectors.settings import Secret, did_you_mean, instant, shown
from gateway import own_events
from gateway.config_mistakes import Reading
from gateway.config_sections import (
    CLASSES,
    OWN_SOURCE,
    AnyField,
    AnySource,
    BoolField,
    ClientCert,
    CodeField,
    Condition,
    ConstField,
    Contradiction,
    DateField,
    DecimalField,
    EnumField,
    Expected,
    Hmac,
    HttpSignature,
    IntField,
    Manners,
    OdooNative,
    Policy,
    Reads,
    Route,
    Serve,
    TimestampField,
    UuidField,
    Value,
    When,
    WithSecrets,
    is_pseudonym,
    words_of,
)
from gateway.fields import cut, timestamp
from gateway.routes import comparable, holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The sections that refer to each other, by the names that the file has in them."""

    unreadable: frozenset[str]  # sections that are no mapping of names, so that any name may be meant to be there
    serve: Serve | None  # None: it is wrong
    facilities: tuple[str, ...]
    systems: Mapping[str, str | None]  # the kind of each
    sources: Mapping[str, Reading[AnySource]]
    policies: Mapping[str, Reading[Policy]]
    routes: Mapping[str, Reading[Route]]
    destinations: Mapping[str, Reading[Manners]]


Place = tuple[str | int, ...]


def contradictions(parts: Parts) -> Iterator[Contradiction]:
    """Their keys begin with the section."""
    for name, source in parts.sources.items():
        if source.right is not None and not source.hides(("accepts",)):
            yield from _about_accepted(("sources", name, "accepts"), source.right.accepts, parts)
            if source.right.format == "form":
                yield from _about_form(("sources", name, "accepts"), source.right.accepts, parts)
        if isinstance(source.right, ClientCert) and parts.serve is not None:
            yield from _about_vouchers(("sources", name, "scheme"), parts.serve)
        if source.right is not None and source.right.signs_url and parts.serve and parts.serve.public_url is None:
            yield _without_public_url(("sources", name), source.right)
        if source.right is not None and source.right.expect is not None:
            yield from _about_expected(
                ("sources", name, "expect"), source.right.expect, _arriving((name,), parts), parts
            )
        if isinstance(source.right, OdooNative) and source.right.reread is not None:
            yield from _about_reread(name, source.right, parts)
    for name, destination in parts.destinations.items():
        if destination.right is not None and destination.right.reads is not None:
            yield from _is_odoo(("destinations", name, "reads", "system"), destination.right.reads.system, parts)
    for name, policy in parts.policies.items():
        if policy.right is not None and policy.right.facility is not None:
            places: dict[Place, str] = {
                ("policies", name, "facility", "of", raw): to for raw, to in policy.right.facility.of.items()
            }
            yield from _names(places, "facility", parts)
    for name, route in parts.routes.items():
        if route.right is not None:
            yield from _about_route(name, route.right, parts)


def unused(parts: Parts) -> Iterator[tuple[tuple[str, str], str]]:
    """What is there and does nothing: no mistake, but perhaps not meant."""
    accepted = {name for source in parts.sources.values() if source.right for name in source.right.accepts}
    reached = {name for route in parts.routes.values() if route.right for name in route.right.to}
    for name in parts.policies:
        if name not in accepted:
            yield ("policies", name), "is accepted by no source"
    for name, destination in parts.destinations.items():
        if name not in reached and not (destination.right and destination.right.retired):
            yield ("destinations", name), "is reached by no route"


def _about_reread(name: str, source: OdooNative, parts: Parts) -> Iterator[Contradiction]:
    yield from _is_odoo(("sources", name, "reread"), source.reread or "", parts)
    if (made := f"reread-{name}") in parts.destinations:
        yield Contradiction(("destinations", made), "has the name of what sources." + name + ".reread makes; rename it")
    for index, accepted in enumerate(source.accepts):
        policy = parts.policies[accepted].whole if accepted in parts.policies else None
        if policy is None:
            continue
        if not isinstance(policy.match.get("_model"), str):
            problem = (
                f'names "{accepted}", which says no model to read; add match: {{_model: …}} to it, or leave reread out'
            )
            yield Contradiction(("sources", name, "accepts", index), problem)
        for path in policy.all_paths:
            if not re.fullmatch(r"[a-z_][a-z0-9_]*", path):
                problem = (
                    f'names "{accepted}", which reads "{path}", and that is no field of Odoo; reread takes fields alone'
                )
                yield Contradiction(("sources", name, "accepts", index), problem)


def _is_odoo(place: Place, system: str, parts: Parts) -> Iterator[Contradiction]:
    if system not in parts.systems and "systems" not in parts.unreadable:
        hint = did_you_mean(system, tuple(parts.systems))
        yield Contradiction(place, f'names "{system}", but there is no such system{hint}')
    elif parts.systems.get(system) not in {"odoo", None}:
        yield Contradiction(place, f'names "{system}", which is no Odoo; name one whose connector is odoo')


def shared_secrets(sources: Mapping[str, AnySource]) -> Iterator[tuple[tuple[str, str, str, int], str]]:
    """Secrets of two sources: what is signed for one would count for the other, unless the URL is signed, too."""
    first: dict[Secret, str] = {}
    for name, source in sources.items():
        for index, timed in enumerate(
            source.secrets if isinstance(source, WithSecrets) and not source.signs_url else ()
        ):
            owner = first.setdefault(timed.secret, name)
            if owner != name:
                problem = f'is a secret of "{owner}", too, so that what is signed for one counts for the other; give each its own'
                yield ("sources", name, "secrets", index), problem


def _names(places: Mapping[Place, str], what: str, parts: Parts) -> Iterator[Contradiction]:
    """Complains about each place whose name is that of nothing."""
    section, known = {
        "facility": ("facilities", parts.facilities),
        "source": ("sources", (*parts.sources, OWN_SOURCE)),
        "policy": ("policies", tuple(parts.policies)),
        "destination": ("destinations", tuple(parts.destinations)),
    }[what]
    if section in parts.unreadable:
        return
    for place, name in places.items():
        if name not in known:
            yield Contradiction(place, f'names "{name}", but there is no such {what}{did_you_mean(name, known)}')


def _each(path: Place, names: Sequence[str] | None) -> Mapping[Place, str]:
    return {(*path, index): name for index, name in enumerate(names or ())}


def _about_accepted(path: Place, accepts: Sequence[str], parts: Parts) -> Iterator[Contradiction]:
    yield from _names(_each(path, accepts), "policy", parts)
    for index, name in enumerate(accepts):
        hiding = next((earlier for earlier in accepts[:index] if _hides(earlier, name, parts.policies)), None)
        if hiding is not None and name not in accepts[:index]:
            problem = f'names "{name}", but "{hiding}" before it matches all that it matches; put "{name}" first'
            yield Contradiction((*path, index), problem)


def _about_form(path: Place, accepts: Sequence[str], parts: Parts) -> Iterator[Contradiction]:
    """A form is flat, each of its names stands once, and all that it holds is text."""
    for index, name in enumerate(accepts):
        policy = parts.policies[name].whole if name in parts.policies else None
        if policy is None:
            continue
        nested = next((read for read in policy.all_paths if "." in read), None)
        several = next((kept for kept, field in policy.keep.items() if field.many), None)
        absent = next((read for read, wanted in policy.match.items() if wanted is None), None)
        if nested is not None:
            problem = f'names "{name}", which reads "{nested}", but a form has no keys below others; read one name'
            yield Contradiction((*path, index), problem)
        elif several is not None:
            problem = f'names "{name}", which keeps a list as "{several}", but a form has none; keep one value'
            yield Contradiction((*path, index), problem)
        elif absent is not None:
            problem = f'names "{name}", which matches "{absent}" with null, but a form has none; match a text'
            yield Contradiction((*path, index), problem)


def _about_vouchers(path: Place, serve: Serve) -> Iterator[Contradiction]:
    """Whoever else can connect could write the header with somebody's certificate, which is no secret."""
    if not serve.trusted_proxies and not any(address.path for address in serve.listen):
        problem = (
            "is client-cert, which only a proxy can tell of; "
            "name it in serve.trusted_proxies, or let serve.listen be a Unix socket"
        )
        yield Contradiction(path, problem)


def _without_public_url(path: Place, source: AnySource) -> Contradiction:
    key = "components" if isinstance(source, HttpSignature) else "signed" if isinstance(source, Hmac) else "scheme"
    problem = (
        "has the URL that is called from outside, which only you know; write serve.public_url: https://gateway.example"
    )
    return Contradiction((*path, key), problem)


def _hides(earlier: str, later: str, policies: Mapping[str, Reading[Policy]]) -> bool:
    if earlier == later or earlier not in policies or later not in policies:
        return False
    first, second = policies[earlier].whole, policies[later].whole
    return first is not None and second is not None and _marked(first) <= _marked(second)


def _marked(policy: Policy) -> set[tuple[str, str, object]]:
    """What it matches, in a form where 1 and true differ."""
    return {(path, type(value).__name__, value) for path, value in policy.match.items()}


def _about_expected(
    path: Place, expected: Expected, arriving: Mapping[str, Policy] | None, parts: Parts
) -> Iterator[Contradiction]:
    unknown = list(_names(_each((*path, "facilities"), expected.facilities), "facility", parts))
    yield from unknown
    if arriving is None:
        return
    found = {site for policy in arriving.values() if policy.facility for site in policy.facility.of.values()}
    for index, facility in enumerate(expected.facilities if not unknown else ()):
        if facility not in found:
            problem = f'names "{facility}", but no policy that it accepts finds this facility; leave it out'
            yield Contradiction((*path, "facilities", index), problem)
    if expected.sequence is not None:
        for policy in arriving.values():
            if why := _why_uncounted(policy, expected.sequence):
                yield Contradiction((*path, "sequence"), why)


def _why_uncounted(policy: Policy, name: str) -> str | None:
    """Why the field holds no numbers that can be counted; None if it does."""
    field = policy.keep.get(name)
    if field is None:
        whole_numbers = [kept for kept, one in policy.keep.items() if isinstance(one, IntField)]
        known = did_you_mean(name, whole_numbers)
        return f'names "{name}", which policy "{policy.name}" does not keep; keep it there as an int{known}'
    if not isinstance(field, IntField) or field.many or field.token or field.lookup or field.bucket:
        return f'names "{name}", which policy "{policy.name}" keeps as no plain int; keep it there with type: int'
    if field.optional:
        return f'names "{name}", which is optional in policy "{policy.name}", so that it may be missing; leave out optional'
    return None


# ── routes ─────────────────────────────────────────────────────────────────────────────────────────


def _about_route(name: str, route: Route, parts: Parts) -> Iterator[Contradiction]:
    path, when = ("routes", name), route.when
    yield from _names(_each((*path, "to"), route.to), "destination", parts)
    for index, to in enumerate(route.to):
        destination = parts.destinations.get(to)
        if destination is not None and destination.right is not None and destination.right.retired:
            problem = f'names "{to}", which is retired; send it elsewhere, or take retired: true from destinations.{to}'
            yield Contradiction((*path, "to", index), problem)
    unknown = [
        *_names(_each((*path, "when", "source"), when.source), "source", parts),
        *_names(_each((*path, "when", "facility"), when.facility), "facility", parts),
    ]
    yield from unknown
    if unknown or parts.unreadable or any(wrong.path[:1] == ("when",) for wrong in parts.routes[name].wrong):
        return
    sources = when.source or (*parts.sources, *([OWN_SOURCE] if own_events.asks_for(when) else []))
    if arriving := _arriving(sources, parts):
        yield from _about_when((*path, "when"), when, arriving)
        taken = [policy for policy in arriving.values() if _may_take(when, policy)]
        yield from _about_taken(path, route, taken, parts)


def _arriving(sources: Iterable[str], parts: Parts) -> Mapping[str, Policy] | None:
    """The policies that events of `sources` may have; None if that cannot be told."""
    arriving: dict[str, Policy] = {}
    for name in sources:
        if name == OWN_SOURCE:
            arriving |= own_events.policies(parts.facilities)
            continue
        source = parts.sources.get(name)
        if source is None or source.right is None or source.hides(("accepts",)):
            return None
        for accepted in source.right.accepts:
            policy = parts.policies.get(accepted)
            if policy is None or policy.whole is None:
                return None
            arriving[accepted] = policy.whole
    return arriving


class Configured(Protocol):
    """A configuration that is right."""

    @property
    def sources(self) -> Mapping[str, AnySource]: ...
    @property
    def routes(self) -> Mapping[str, Route]: ...


def destinations_of(policy: Policy, config: Configured) -> list[str]:
    """Where events of this policy may go, by any route."""
    posting = {name for name, source in config.sources.items() if policy.name in source.accepts}
    sites = set(policy.facility.of.values()) if policy.facility else set()
    reached = [
        to
        for route in config.routes.values()
        if (posting if route.when.source is None else posting & {*route.when.source})
        and (route.when.facility is None or sites & {*route.when.facility})
        and _may_take(route.when, policy)
        for to in route.to
    ]
    return list(dict.fromkeys(reached))


def _about_when(path: Place, when: When, arriving: Mapping[str, Policy]) -> Iterator[Contradiction]:
    """Conditions that nothing can meet; each is judged by what the ones before it let through."""
    left = list(arriving.values())
    for index, wanted in enumerate(when.type or ()):
        if not any(_may_be(policy, wanted) for policy in left):
            types = sorted({text for policy in left for text in _types(policy) if _ANY not in text})
            problem = f"is {shown(wanted)}, which no event that comes here can have{did_you_mean(wanted, types)}"
            yield Contradiction((*path, "type", *((index,) if len(when.type or ()) > 1 else ())), problem)
    left = [policy for policy in left if _has_type(policy, when.type)]
    if left and when.facility is not None:
        left = [policy for policy in left if policy.facility and set(policy.facility.of.values()) & set(when.facility)]
        if not left:
            problem = "is that of no event that comes here; let the policy find it, with facility: {from: …, of: {…}}"
            yield Contradiction((*path, "facility"), problem)
    if left:
        complaints = list(_about_data((*path, "data"), when.data, left))
        yield from complaints or _about_type_and_data(path, when, left)


def _about_data(
    path: Place, conditions: Mapping[str, Condition], policies: Sequence[Policy]
) -> Iterator[Contradiction]:
    complaints = [
        complaint
        for name, condition in conditions.items()
        for complaint in _about_condition((*path, name), name, condition, policies)
    ]
    yield from complaints
    if not complaints and not any(conditions.keys() <= policy.keep.keys() for policy in policies):
        yield Contradiction(path, "asks for fields that no policy keeps together; make two routes of it")


def _about_type_and_data(path: Place, when: When, policies: Iterable[Policy]) -> Iterator[Contradiction]:
    """A type that is made of a kept field says what that field is; a condition may want something else of it."""
    asked = [policy for policy in policies if _may_take(when, policy)]
    if asked and when.type is not None and when.data and not any(_may_be_together(policy, when) for policy in asked):
        yield Contradiction(path, "takes nothing, for its type and its data contradict each other; correct one of them")


def _may_be_together(policy: Policy, when: When) -> bool:
    """Whether an event of this policy can have a type and kept fields as the route wants them."""
    parts = re.split(r"\{(\w+)\}", policy.type)
    names = list(dict.fromkeys(parts[1::2]))
    choices = [_kept_values(policy.keep[name]) or [_ANY] for name in names]
    if prod(map(len, choices)) > _MOST_TYPES:
        return True
    for chosen in product(*choices):
        values = dict(zip(names, chosen, strict=True))
        words = [_word(values[part]) if index % 2 else part for index, part in enumerate(parts)]
        if any(_may_be_one("".join(words), wanted) for wanted in when.type or ()) and all(
            values.get(name, _ANY) == _ANY or holds(name, condition)(values) for name, condition in when.data.items()
        ):
            return True
    return False


def _kept_values(field: AnyField) -> list[Value] | None:
    """All that a field can be; None where that is open."""
    if isinstance(field, BoolField):
        return [False, True]
    if isinstance(field, IntField | DecimalField) and field.bucket is not None:
        return list(field.bucket)
    words = words_of(field)
    return None if words is None else list(words)


def _word(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _about_reads(path: Place, reads: Reads, taken: Sequence[Policy]) -> Iterator[Contradiction]:
    """Each event that comes there names a record, and has room for what is read of it."""
    for policy in taken:
        match policy.keep.get(reads.key):
            case IntField(many=False, token=None, optional=False):
                pass
            case None:
                problem = f'names "{reads.key}", but events by policy "{policy.name}" come there and keep no such field'
                yield Contradiction((*path, "id"), f"{problem}; keep it, or send them elsewhere")
                return
            case _:
                problem = f'names "{reads.key}", which by policy "{policy.name}" is not always a whole number'
                yield Contradiction((*path, "id"), f"{problem}; name a field of type int, without optional and token")
                return
        if "read" in policy.keep:
            problem = f'hands over what it reads as data.read, but policy "{policy.name}" keeps a field "read"'
            yield Contradiction(path, f"{problem}; give that another name")
            return


def _about_taken(path: Place, route: Route, taken: Sequence[Policy], parts: Parts) -> Iterator[Contradiction]:
    """What the route does with the events that it takes."""
    if route.order == "subject" and taken and not any(policy.subject for policy in taken):
        problem = "is by subject, but no policy whose events come here has one; give it a subject, or leave order out"
        yield Contradiction((*path, "order"), problem)
    for index, name in enumerate(route.to):
        destination = parts.destinations.get(name)
        if destination is None or destination.right is None or destination.hides(("receives",)):
            continue
        if (reads := destination.right.reads) and not destination.right.retired:
            yield from _about_reads(("destinations", name, "reads"), reads, taken)
        receives = destination.right.receives
        for policy in () if destination.right.retired else taken:
            if CLASSES.index(policy.class_) > CLASSES.index(receives):
                yield Contradiction(
                    (*path, "to", index),
                    f'names "{name}", which receives {receives}, but what comes here by policy "{policy.name}" is '
                    f"{policy.class_}; send it elsewhere, or let the destination say receives: {policy.class_}",
                )
                break


_ANY: Final = "\0"  # stands in a type for a value that only an event has
_MOST_TYPES: Final = 1000


def _types(policy: Policy) -> list[str]:
    """Every type that its events may have, with _ANY where that is open."""
    parts = re.split(r"\{(\w+)\}", policy.type)
    choices = [[part] if index % 2 == 0 else _words(policy.keep[part]) for index, part in enumerate(parts)]
    count = 1
    for index, choice in enumerate(choices):
        count *= len(choice)
        if count > _MOST_TYPES:
            choices[index:] = [[_ANY]]
            break
    return ["".join(chosen) for chosen in product(*choices)]


def _words(field: AnyField) -> list[str]:
    values = _kept_values(field)
    return [_ANY] if values is None else sorted(set(map(_word, values)))


def _may_take(when: When, policy: Policy) -> bool:
    return _has_type(policy, when.type) and when.data.keys() <= policy.keep.keys()


def _has_type(policy: Policy, wanted: Sequence[str] | None) -> bool:
    return wanted is None or any(_may_be(policy, one) for one in wanted)


def _may_be(policy: Policy, wanted: str) -> bool:
    return any(_may_be_one(text, wanted) for text in _types(policy))


def _may_be_one(text: str, wanted: str) -> bool:
    if not wanted.endswith(".*"):
        return re.fullmatch(".+".join(map(re.escape, text.split(_ANY))), wanted) is not None
    prefix, (known, *unknown) = wanted.removesuffix("*"), text.split(_ANY)
    return known.startswith(prefix) or (bool(unknown) and prefix.startswith(known))


# ── conditions on kept fields ──────────────────────────────────────────────────────────────────────


def _about_condition(
    path: Place, name: str, condition: Condition, policies: Sequence[Policy]
) -> Iterator[Contradiction]:
    kept = [policy.keep[name] for policy in policies if name in policy.keep]
    if not kept:
        known = sorted({field for policy in policies for field in policy.keep})
        yield Contradiction(path, f"is kept by no policy whose events come here{did_you_mean(name, known)}")
        return
    reasons = [_why_never(field, condition) for field in kept]
    if all(reasons):
        yield Contradiction(path, reasons[0] or "")


def _why_never(field: AnyField, condition: Condition) -> str | None:
    """Why no value of `field` can meet `condition`; None if one can."""
    if field.many:
        return "is a list, which no route can judge; keep what the route needs in a field of its own"
    if is_pseudonym(field):
        return "is kept as a pseudonym, which no route can judge; keep what the route needs in a field of its own"
    ordered = isinstance(field, IntField | DecimalField | TimestampField | DateField) and words_of(field) is None
    if condition.bounds and not ordered:
        return f"is of type {field.kind}, which has no more or less; write the values that are meant"
    for value in (*condition.bounds.values(), *(condition.in_ or ()), *(condition.not_ or ())):
        if why := _why_never_equal(field, value):
            return why
    for value in (*(condition.in_ or ()), *(condition.not_ or ())):
        if why := _why_never_left(field, value):
            return why
    return (
        None if _can_hold(field, condition) else "contradicts itself, for no value is all that it asks for; correct it"
    )


def _why_never_left(field: AnyField, value: Value) -> str | None:
    """Why no value is this one after a policy took away from it."""
    match field:
        case IntField() | DecimalField() if field.bucket is not None and value not in field.bucket:
            return f"is never {shown(value)}, for of it only {', '.join(map(str, field.bucket))} can be kept; write one of them"
        case TimestampField() | DateField() if field.truncate is not None:
            kept = str(_as_kept(field, value))
            left = cut(kept, field.truncate)
            if kept != left:
                return f"is never {shown(value)}, for of it only the {field.truncate} is kept; write {left}"
        case _:
            pass
    return None


def _can_hold(field: AnyField, condition: Condition) -> bool:
    """Whether one value can be all that `condition` asks for."""
    candidates = condition.in_ or _kept_values(field)
    if candidates is not None:
        return any(holds("field", condition)({"field": _as_kept(field, value)}) for value in candidates)
    bounds = [(kind, comparable(bound)[1]) for kind, bound in condition.bounds.items()]
    if isinstance(field, IntField):
        bounds = [_to_whole(kind, bound) for kind, bound in bounds]
    return all(
        low < high or (low == high and (least, most) == ("gte", "lte"))
        for least, low in bounds
        for most, high in bounds
        if least.startswith("g") and most.startswith("l")
    )


def _to_whole(kind: str, bound: int | Decimal) -> tuple[str, int]:
    """The same bound for whole numbers, which it belongs to itself."""
    match kind:
        case "gt":
            return "gte", floor(bound) + 1
        case "lt":
            return "lte", ceil(bound) - 1
        case "gte":
            return "gte", ceil(bound)
        case _:
            return "lte", floor(bound)


def _as_kept(field: AnyField, value: Value) -> object:
    if isinstance(field, TimestampField) and isinstance(value, str):
        return timestamp(value)
    return str(value) if isinstance(value, Decimal) else value


def _why_never_equal(field: AnyField, value: Value) -> str | None:
    wanted: str | None = None
    if (words := words_of(field)) is not None:
        if value in [word for word in words if type(word) is type(value)]:
            return None
        return f"is never {shown(value)}{did_you_mean(str(value), tuple(dict.fromkeys(map(str, words))))}"
    match field:
        case IntField() | DecimalField():
            wanted = None if isinstance(value, int | Decimal) and not isinstance(value, bool) else "a number"
        case BoolField():
            wanted = None if isinstance(value, bool) else "true or false"
        case TimestampField():
            wanted = None if _is_instant(value) else "a time, as 2026-12-01T00:00:00Z"
        case DateField():
            wanted = None if _is_date(value) else "a date, as 2026-12-01"
        case EnumField() | ConstField():
            wanted = None  # their words are judged above
        case UuidField() | CodeField():
            wanted = None if isinstance(value, str) else "a text"
    return f"is compared with {shown(value)}, but is of type {field.kind}; write {wanted}" if wanted else None


def _is_instant(value: object) -> bool:
    try:
        instant(value)
    except ValueError:
        return False
    return True


def _is_date(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(date.fromisoformat(value))
    except ValueError:
        return False
