"""Reads a part of a document as what it is meant to be, and says in our words what is wrong with it.

One mistake must not hide another: what is left when the wrong parts are taken away is read once more, so that it can
still be compared with the rest of the file.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar, get_args, get_origin

from pydantic import ValidationError, create_model
from pydantic_core import ErrorDetails

from connectors.settings import Reference, Settings, UnknownKey, did_you_mean, shown
from gateway.config_document import KeyPath
from gateway.config_sections import FIELD_TYPES

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, slots=True)
class Wrong:
    """What is wrong, at a path below the part that was read."""

    path: KeyPath
    problem: str


@dataclass(frozen=True, slots=True)
class Reading(Generic[S]):
    """What a part of the document says."""

    whole: S | None  # None if anything is wrong
    right: S | None  # as much of it as is right, and nothing ("", 0, no entries) for the rest; None if that is nothing
    wrong: tuple[Wrong, ...] = ()
    hidden: frozenset[KeyPath] = frozenset()  # what `right` lacks, though it may be meant

    def hides(self, path: KeyPath) -> bool:
        """Whether `right` tells nothing of the value at `path`."""
        return any(path[:length] in self.hidden for length in range(len(path) + 1))


def read_as(model: type[S], given: object, *, also_known: tuple[str, ...] = ()) -> Reading[S]:
    """`also_known` are keys that may stand beside those of `model`; they are proposed as mends."""
    try:
        whole = model.model_validate(given)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        missing = {_path(one, given) for one in errors if one["type"] == "missing"}
        right, hidden = _what_is_right(model, given)
        return Reading(None, right, tuple(_wrong(errors, given, also_known)), frozenset(missing | hidden))
    return Reading(whole, whole)


def unknown_key(key: str, known: Iterable[str]) -> str:
    return f"is no key that is known here{did_you_mean(key, tuple(known))}"


def _wrong(errors: Iterable[ErrorDetails], given: object, also_known: tuple[str, ...]) -> Iterator[Wrong]:
    """One for each path: where several types would do, each of them complains."""
    at: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        at.setdefault(_path(error, given), []).append(error)
    for path, alike in at.items():
        has_wrong_items = len(alike) > 1 or any(path == other[: len(path)] for other in at if other != path)
        if alike[-1]["type"] == "too_short" and has_wrong_items:
            alike.pop()
        if len(alike) > 1 and all(error["type"] in _EXPECTED for error in alike):
            expected = " or ".join(dict.fromkeys(_EXPECTED[error["type"]] for error in alike))
            yield Wrong(
                path, _problem_of_value(alike[0]["input"]) or f"is {shown(alike[0]['input'])}, but must be {expected}"
            )
            continue
        for error in alike:
            yield Wrong(path, _problem(error, path, also_known if len(path) == 1 else ()))


def _path(error: ErrorDetails, given: object) -> KeyPath:
    """The keys of the file in pydantic's location, without the names of alternatives that it puts between them."""
    path: list[str | int | bool] = []
    for step in error["loc"]:
        match given:
            case Mapping() if step in given:
                given = given[step]
            case list() | tuple() if isinstance(step, int) and step < len(given):
                given = given[step]
            case _ if error["type"] == "missing" and step == error["loc"][-1]:
                given = None
            case _:
                continue
        path.append(step)
    return tuple(path)


_EXPECTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "decimal_type": "a number",
    "is_instance_of": "a number",
    "tuple_type": "a list",
    "mapping_type": "a mapping",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "left out",
    "finite_number": "a finite number",
}


def _problem(error: ErrorDetails, path: KeyPath, also_known: tuple[str, ...]) -> str:
    given, context = error["input"], error.get("ctx", {})
    if problem := _problem_of_value(given):
        return problem
    match error["type"]:
        case "value_error":
            return str(context["error"])
        case "missing":
            return "is missing; add it"
        case "extra_forbidden":
            known = given.known if isinstance(given, UnknownKey) else ()
            return unknown_key(str(path[-1]), (*known, *also_known))
        case "literal_error":
            words = tuple(re.findall("'([^']*)'", context["expected"]))
            return f"is {shown(given)}, but must be {' or '.join(words)}{did_you_mean(str(given), words, among=False)}"
        case "union_tag_invalid" | "union_tag_not_found":
            return f"has no type that is known here; write one of {', '.join(FIELD_TYPES)}, or [int] for a list of int"
        case "greater_than_equal":
            return f"is {shown(given)}, but must be at least {context['ge']}"
        case "less_than_equal":
            return f"is {shown(given)}, but must be at most {context['le']}"
        case "string_pattern_mismatch":
            return f"is {shown(given)}, which has a character that does not belong there; correct it"
        case "string_too_short" | "too_short":
            return "is empty; write at least one" if context["min_length"] == 1 else f"needs {context['min_length']}"
        case "string_too_long" | "too_long":
            return f"is too long; the most is {context['max_length']}"
        case kind if kind in _EXPECTED:
            return f"is {_shown_unless_secret(given, _EXPECTED[kind])}, but must be {_EXPECTED[kind]}"
        case kind:
            return f"is not what belongs there ({kind.replace('_', ' ')}); correct it"


def _shown_unless_secret(given: object, expected: str) -> str:
    """A text where a list or a mapping belongs may be a secret that was meant to be in it."""
    return "a text" if isinstance(given, str) and expected in {"a list", "a mapping"} else shown(given)


def _problem_of_value(given: object) -> str | None:
    return given.problem if isinstance(given, Reference) and given.problem else None


def _what_is_right(model: type[S], given: object) -> tuple[S | None, set[KeyPath]]:
    """Takes away what is wrong until the rest is right; returns that, and the paths of what is gone."""
    lenient, gone = _lenient(model), set[KeyPath]()
    while isinstance(given, Mapping):
        try:
            return lenient.model_validate(given), gone
        except ValidationError as error:
            errors = error.errors(include_url=False)
            found = {_removable(_path(one, given), one["type"], given) for one in errors}
            gone |= found
            before = given
            for path in found:
                given = _without(given, path)
            if given == before:
                break
    return None, gone


def _removable(path: KeyPath, kind: str, given: object) -> KeyPath:
    """What has to go: all of a list, so that its other items keep their places, and all that lacks something."""
    if kind == "missing":
        path = path[:-1]
    for depth, key in enumerate(path):
        if not isinstance(given, Mapping):
            return path[:depth]
        given = given.get(key)
    return path


def _without(given: Any, path: KeyPath) -> Any:
    if not path:
        return None
    if not isinstance(given, Mapping) or path[0] not in given:
        return given
    rest = _without(given[path[0]], path[1:])
    return {
        key: rest if key == path[0] else value for key, value in given.items() if key != path[0] or rest is not None
    }


@cache
def _lenient(model: type[S]) -> type[S]:
    """The same model, where a key that it needs may be missing."""
    loosened: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if field.is_required():
            looser = copy(field)
            looser.default_factory = None
            looser.default = _nothing_of(field.annotation)
            loosened[name] = (field.annotation, looser)
    return create_model(model.__name__, __base__=model, **loosened)


def _nothing_of(annotation: Any) -> Any:
    origin = get_origin(annotation) or annotation
    for kind in (origin, *map(get_origin, get_args(annotation))):
        if kind in {str, int, tuple}:
            return kind()
        if kind is Mapping:
            return {}
    return None
