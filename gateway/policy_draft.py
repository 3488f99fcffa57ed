"""A policy proposed from one sample, closed by default: it keeps the record's number, and the rest waits for a person.

No value of the sample is copied but the word that says what kind of post it is; shapes and types are.  Pure.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, count
from typing import Any, Final

import msgspec

from gateway.config_patterns import why_unsafe

_KINDS: Final = ("_model", "model", "type", "event", "event_type", "kind", "resource", "action", "topic", "object")
_NUMBERS: Final = ("_id", "id", "uuid", "number")
_UUID: Final = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_TIMESTAMP: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}.*")
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_DECIMAL: Final = re.compile(r"-?[0-9]{1,20}\.[0-9]{1,12}")
_CODE: Final = re.compile(r"(?=.*[0-9])[A-Za-z0-9_./:-]{1,64}")
_WORD: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,39}")


class NoSampleError(Exception):
    """Its message says what is wrong with a sample."""


def draft(body: bytes, name: str) -> str:
    """YAML for `policies`; raises NoSampleError."""
    sample = _object_in(body)
    leaves = dict(_leaves(sample, ()))
    kind = next((path for path in leaves if len(path) == 1 and path[0] in _KINDS and _is_word(leaves[path])), None)
    number = next((path for path in leaves if path[-1] in _NUMBERS and _type_of(leaves[path]) in _SAFE), None)
    fields = _field_names(path for path in leaves if path != kind)
    lines = [
        "# A draft from one sample.  Nothing is kept but what has no # before it: take it away from what is needed,",
        "# and from nothing else.  What is free text cannot be kept.",
        "policies:",
        f"  {name}:",
        "    version: 1",
        "    purpose: write what this is kept for",
        "    class: metadata",
    ]
    if kind is not None:
        lines.append(f"    match: {{{_plain(kind[0])}: {json.dumps(leaves[kind])}}}")
    lines.append(f"    type: {name}.received")
    if number is not None:
        lines.append(f"    subject: {name}/{{{fields[number]}}}")
    lines.append("    keep:")
    for path, field in fields.items():
        lines.extend(_line(path, field, leaves[path], is_open=path == number))
    return "\n".join(lines)


def _object_in(body: bytes) -> dict[str, Any]:
    try:
        sample = msgspec.json.decode(body.removeprefix(b"\xef\xbb\xbf"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise NoSampleError("The sample is no JSON.") from None
    first = sample[0] if isinstance(sample, list) and sample else sample
    if not isinstance(first, dict) or not first:
        raise NoSampleError("The sample is no JSON object with something in it.")
    return first


def _leaves(value: dict[str, Any], above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, below in value.items():
        if isinstance(below, dict) and below:
            yield from _leaves(below, (*above, name))
        else:
            yield (*above, name), below


_SAFE: Final = ("int", "uuid")


def _type_of(value: object) -> str | None:
    """The type that this could be kept as; None where it is nothing that can be."""
    match value:
        case bool():
            return "bool"
        case int():
            return "int"
        case float():
            return "decimal"
        case str():
            shapes = {"uuid": _UUID, "timestamp": _TIMESTAMP, "date": _DATE, "decimal": _DECIMAL, "code": _CODE}
            return next((kind for kind, shape in shapes.items() if shape.fullmatch(value)), None)
        case _:
            return None


def _is_word(value: object) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def _line(path: tuple[str, ...], field: str, value: object, *, is_open: bool) -> Iterator[str]:
    place = ".".join(path)
    if (
        not all(path)
        or "." in "".join(path)
        or re.search(r'["\\]', place)
        or not place.isprintable()
        or len(place) > 200
    ):
        yield f"      # {json.dumps(place)} cannot be read by a path"
        return
    said = _said(value)
    if said is None:
        yield f"      # {json.dumps(place)}: {_why_not(value)}"
    else:
        yield f"      {'' if is_open else '# '}{field}: {{from: {_plain(place)}, {said}}}"


def _said(value: object) -> str | None:
    if isinstance(value, list):
        kinds = {_type_of(each) for each in value}
        (kind,) = kinds if len(kinds) == 1 else (None,)
        return None if kind in {None, "code"} else f"type: [{kind}], max: 100, optional: true"
    kind = _type_of(value)
    if kind == "code":
        pattern = _shape(str(value))
        return f"type: code, pattern: {json.dumps(pattern)}" if why_unsafe(pattern) is None else None
    if kind is None and _is_word(value):
        return "type: enum, of: [write, its, words]"
    return None if kind is None else f"type: {kind}"


def _why_not(value: object) -> str:
    match value:
        case None:
            return "null in this sample"
        case str():
            return "free text, which cannot be kept"
        case list() if value and isinstance(value[0], dict):
            return "a list of objects, which cannot be kept; if each is an event, see each of the source"
        case _:
            return "nothing that can be kept"


def _shape(code: str) -> str:
    """`FR-12` is two capital letters, a hyphen and digits."""
    shape = ""
    for run in re.findall(r"[A-Z]+|[a-z]+|[0-9]+|[^A-Za-z0-9]", code):
        letters = "[A-Z]" if run[0].isupper() else "[a-z]" if run[0].islower() else "[0-9]"
        shape += f"{letters}{{1,{max(len(run), 2)}}}" if run.isalnum() else re.escape(run)
    return shape


def _field_names(paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The last key of each; the whole path, or a number behind it, where another has that."""
    names: dict[tuple[str, ...], str] = {}
    for path in paths:
        candidates = chain((_as_name(path[-1:]), _as_name(path)), (f"{_as_name(path)}_{n}" for n in count(2)))
        names[path] = next(name for name in candidates if name not in names.values())
    return names


def _as_name(keys: tuple[str, ...]) -> str:
    name = re.sub(r"[^a-z0-9_]+", "_", "_".join(keys).lower()).strip("_")[:50] or "field"
    return name if re.match("[a-z_]", name) and name not in _YAML_WORDS else f"_{name}"


def _plain(text: str) -> str:
    """As YAML takes it."""
    return (
        text
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", text) and text.lower() not in _YAML_WORDS
        else json.dumps(text, ensure_ascii=False)
    )


_YAML_WORDS: Final = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
