"""What changed between two texts of the policies, for who has to agree to it.  Pure."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec
from pydantic import BaseModel

from gateway.config_sections import CLASSES, Policy
from gateway.policy_versions import digest

_OWN: Final = ("name", "version", "keep")


class Difference(msgspec.Struct, frozen=True):
    """One policy, and what is said of it otherwise than before."""

    policy: str
    before: int | None  # its version; None: it is new
    after: int | None  # None: it is gone
    changes: tuple[str, ...]
    unnumbered: bool = False  # it keeps something else under the same number, which no start accepts


def differences(before: Mapping[str, Policy], after: Mapping[str, Policy]) -> list[Difference]:
    """Of every policy that is not the same in both, by name."""
    found = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old is None and new is not None:
            kept = ", ".join(new.keep)
            found.append(Difference(name, None, new.version, (f"new, for {new.purpose}; it keeps {kept}",)))
        elif new is None and old is not None:
            found.append(Difference(name, old.version, None, ("gone",)))
        elif old is not None and new is not None and old != new:
            unnumbered = old.version == new.version and digest(old) != digest(new)
            found.append(Difference(name, old.version, new.version, tuple(_changes(old, new)), unnumbered))
    return found


def _changes(old: Policy, new: Policy) -> Iterator[str]:
    for key in [*new.key_names()]:
        attribute = {"class": "class_"}.get(key, key)
        was, now = getattr(old, attribute), getattr(new, attribute)
        if key in _OWN or was == now:
            continue
        wider = " (more than before)" if key == "class" and CLASSES.index(now) > CLASSES.index(was) else ""
        yield f"{key}: {_written(was)} became {_written(now)}{wider}"
    for name, field in new.keep.items():
        if name not in old.keep:
            yield f"keeps {name}, too: {_written(field)}"
        elif field != old.keep[name]:
            yield f"keeps {name} otherwise: {_written(old.keep[name])} became {_written(field)}"
    for name in old.keep:
        if name not in new.keep:
            yield f"keeps {name} no more"


def _written(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case BaseModel():
            fields = type(value).model_fields
            said = {
                fields[name].alias or name: getattr(value, name) for name in fields if name in value.model_fields_set
            }
            return "{" + ", ".join(f"{key}: {_written(each)}" for key, each in said.items()) + "}"
        case Mapping():
            return "{" + ", ".join(f"{_written(key)}: {_written(each)}" for key, each in value.items()) + "}"
        case tuple() | list():
            return "[" + ", ".join(map(_written, value)) + "]"
        case bool():
            return str(value).lower()
        case _:
            return str(value)
