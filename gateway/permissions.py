"""What each role may do: one table, asked in one place (gateway/api.py)."""

from collections.abc import Mapping
from enum import StrEnum

from dead_letter.tokens import Role


class Permission(StrEnum):
    READ_HEALTH = "read:health"  # destinations, refusals at the door, the books: numbers
    READ_EVENTS = "read:events"  # events and dead letters: which record, when, what became of it
    READ_AUDIT = "read:audit"  # who did what
    REPAIR_ONE = "repair:one"  # replay or discard the dead letters of one named event
    REPAIR_MANY = (
        "repair:many"  # … of everything that a selection matches, or that waits for a destination that is gone
    )
    HOLD = "hold"  # hold and release a destination


RIGHTS: Mapping[Role, frozenset[Permission]] = {
    Role.VIEWER: frozenset({Permission.READ_HEALTH, Permission.READ_EVENTS}),
    Role.OPERATOR: frozenset(
        {
            Permission.READ_HEALTH,
            Permission.READ_EVENTS,
            Permission.READ_AUDIT,
            Permission.REPAIR_ONE,
            Permission.HOLD,
        }
    ),
    Role.LEAD: frozenset(
        {
            Permission.READ_HEALTH,
            Permission.READ_EVENTS,
            Permission.READ_AUDIT,
            Permission.REPAIR_ONE,
            Permission.REPAIR_MANY,
            Permission.HOLD,
        }
    ),
    Role.ENGINEER: frozenset({Permission.READ_HEALTH, Permission.READ_EVENTS, Permission.READ_AUDIT}),
    Role.AUDITOR: frozenset({Permission.READ_HEALTH, Permission.READ_EVENTS, Permission.READ_AUDIT}),
    # Whoever gives out rights touches no business data with them.
    Role.ADMIN: frozenset({Permission.READ_HEALTH, Permission.READ_AUDIT}),
}
