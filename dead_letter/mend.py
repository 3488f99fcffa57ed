"""What a person should do about a dead letter, in one plain sentence."""

from typing import assert_never

from outbox.event import OutcomeKind


def mend(destination: str, outcome: OutcomeKind, status: int | None, cause: str) -> str:
    """By the outcome of the last attempt, then by the partner's status, which in most protocols is HTTP's."""
    if "killed the dispatcher" in cause:
        return "Delivering it ended the dispatcher three times: report it as a defect, and do not replay it before that is mended."
    match outcome:
        case OutcomeKind.REFUSED:
            return _refused(destination, status)
        case OutcomeKind.RETRY:
            return f"{destination} could not take it before the deadline: see that it works again, then replay."
        case OutcomeKind.BLOCKED:
            return f"{destination} does not let us in: put the credentials or the configuration right, then replay."
        case OutcomeKind.UNKNOWN:
            return (
                f"It may have happened: look at {destination}; if it is there, discard it, and if it is not, replay it."
            )
        case OutcomeKind.PENDING:
            return f"{destination} took it and never said how it ended: ask there; discard it if it is done, else replay it."
        case OutcomeKind.DELIVERED | OutcomeKind.DUPLICATE:
            return f"{destination} has it: discard it."
    assert_never(outcome)


def _refused(destination: str, status: int | None) -> str:
    match status:
        case 404:
            return (
                f"What it is about is not there at {destination}: create it there or correct the address, then replay."
            )
        case 409:
            return f"It contradicts what {destination} holds: compare both, then discard it or replay."
        case 410:
            return (
                f"{destination} says that this address is gone for good: point the destination elsewhere, then replay."
            )
        case 413:
            return f"It is too large for {destination}: have its limit raised, then replay."
        case 300 | 301 | 302 | 303 | 307 | 308:
            return f"{destination} has moved, and redirects are not followed: correct its address, then replay."
        case _:
            return f"{destination} understood and said no: correct the record at its source or the rule at {destination}, then replay."
