"""What the program says itself: events from the source `sluicegate`, which go where a route names them.

A route takes them only if it asks for the source `sluicegate`, or for a type below `sluicegate.`: what was written for
the events of partners is not surprised by them.  A destination is never told of its own lateness.
"""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from gateway.config_sections import OWN_SOURCE, Policy, When

_NAME: Final = {"type": "code", "pattern": "[a-z0-9-]{1,63}"}
_TIME: Final = {"type": "timestamp"}
_NUMBER: Final = {"type": "int"}
_SPAN: Final = {"type": "code", "pattern": "[0-9]{1,9}[smhd]"}
_STATE: Final = {"type": "enum", "of": ("flowing", "backing_off", "held")}
_OF_A_SOURCE: Final[Mapping[str, Mapping[str, Any]]] = {"source": _NAME, "facility": {**_NAME, "optional": True}}
_NUMBERS: Final[Mapping[str, Mapping[str, Any]]] = {**_OF_A_SOURCE, "first": _NUMBER, "last": _NUMBER}
_OF_A_DESTINATION: Final[Mapping[str, Mapping[str, Any]]] = {
    "destination": _NAME,
    "state": _STATE,
    "waiting": _NUMBER,
    "within": _SPAN,
}

KINDS: Final[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
    "sluicegate.source.silent": {**_OF_A_SOURCE, "since": _TIME, "every": _SPAN},
    "sluicegate.source.resumed": {**_OF_A_SOURCE, "since": _TIME, "heard_at": _TIME},
    "sluicegate.sequence.gap": {**_NUMBERS, "missing": _NUMBER},
    "sluicegate.sequence.filled": _NUMBERS,
    "sluicegate.sequence.restarted": _NUMBERS,
    "sluicegate.sequence.given_up": {**_NUMBERS, "missing": _NUMBER},
    "sluicegate.destination.late": {**_OF_A_DESTINATION, "oldest": _TIME},
    "sluicegate.destination.recovered": _OF_A_DESTINATION,
}
"""Their types, and what their data holds."""


def policies(facilities: tuple[str, ...]) -> dict[str, Policy]:
    """What a policy would say of each kind, so that routes are checked against them as against all others."""
    found = {}
    for kind, data in KINDS.items():
        about = "source" if "source" in data else "destination"
        sites = {"facility": {"from": "site", "of": {name: name for name in facilities}}} if facilities else {}
        found[kind] = Policy.model_validate(
            {
                "name": kind,
                "version": 1,
                "purpose": "operation of this gateway",
                "type": kind,
                "subject": f"{about}/{{{about}}}",
                "keep": {key: {"from": key, **said} for key, said in data.items()},
                **(sites if about == "source" else {}),
            }
        )
    return found


def asks_for(when: When) -> bool:
    """Whether a route is meant for what the program says itself."""
    return OWN_SOURCE in (when.source or ()) or any(wanted.startswith(f"{OWN_SOURCE}.") for wanted in (when.type or ()))


def as_text(data: Mapping[str, object]) -> str:
    return msgspec.json.encode(data).decode()
