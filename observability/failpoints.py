"""Places where the program can be told to fail, for those who prove that it survives: each step from the door to the settle.

    SLUICEGATE_FAILPOINTS="intake.committed=exit@3; dispatch.answered=sleep(0.5)%0.1; seed=7"

    NAME=ACTION           each time that the program comes by
    NAME=ACTION@3         only the third time, counted by each process for itself
    NAME=ACTION%0.1       one time in ten, by chance; `seed=7` makes the chance the same in each run

    exit          the process ends on the spot, as by kill -9: status 137, nothing is cleaned up, nothing is written
    stop          the process stops until somebody sends SIGCONT
    raise         FailpointError is raised there
    sleep(0.5)    the whole process hangs for so long, not only the one that came by

Nothing is armed unless the environment says so when the program starts, and then it says so loudly.  A point that is
not armed costs one look into an empty dictionary.
"""

import os
import random
import re
import signal
import time
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, assert_never, cast, get_args

VARIABLE = "SLUICEGATE_FAILPOINTS"

Point = Literal[
    # the door
    "intake.read",  # a request has been read, nothing is believed yet
    "intake.authenticated",
    "intake.minimized",
    "intake.before_commit",  # a batch is about to be sent to Postgres
    "intake.committed",  # it is durable, and nobody knows
    "intake.handed_over",  # it is durable, and the dispatcher of this process holds it without having read it
    "intake.before_wake",  # the answers are on their way, no dispatcher has been woken
    "intake.before_answer",  # one request's answer is known, and not written
    "wake.before_notify",  # lanes of another process are about to be named
    # the dispatcher
    "dispatch.beat",  # the lease is about to be renewed
    "dispatch.before_lease",  # lanes that nobody owns are about to be taken over
    "dispatch.leased",  # they are ours in the database, and not yet in memory
    "dispatch.read",  # deliveries were read, and none is started
    "dispatch.suspected",  # careful mode: it is written down that this delivery is about to be tried
    "dispatch.before_attempt",
    "dispatch.answered",  # the partner has answered, and nobody knows
    "dispatch.before_settle",
    "dispatch.settled",  # it is written, and memory still holds it as in flight
    "dispatch.before_give_back",  # drained, and the lanes are still ours
    # upkeep
    "upkeep.before_task",
    "partitions.before_make",
    "partitions.before_drop",
    "partitions.detached",  # a partition hangs on nothing any more, and is still there
    "migrations.before_commit",
]
POINTS: tuple[str, ...] = get_args(Point)

Action = Literal["exit", "stop", "raise", "sleep"]
ACTIONS: tuple[str, ...] = get_args(Action)


class FailpointError(Exception):
    """What `raise` raises."""


class FailpointsError(Exception):
    """What the environment says about failpoints makes no sense; the message says what would."""


def failpoint(point: Point) -> None:
    """Here the program can be made to fail."""
    if _armed and (fault := _armed.get(point)):
        fault.come_by()


def arm(spoken: str) -> None:
    """From now on these, and no others.  Raises FailpointsError."""
    faults, seed = _parsed(spoken)
    _armed.clear()
    for fault in faults:
        fault.chance = random.Random(f"{seed} {fault.point}")  # noqa: S311  it is to be the same each time
        _armed[fault.point] = fault


def armed() -> list[str]:
    """Each as it was spoken."""
    return [fault.spoken for fault in _armed.values()]


@dataclass(slots=True, kw_only=True)
class _Fault:
    spoken: str
    point: str
    action: Action
    seconds: float = 0.0
    nth: int | None = None
    probability: float | None = None
    passes: int = 0
    chance: random.Random | None = None

    def come_by(self) -> None:
        self.passes += 1
        if self.nth is not None and self.passes != self.nth:
            return
        if self.probability is not None and self.chance and self.chance.random() >= self.probability:
            return
        match self.action:
            case "exit":
                os._exit(137)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "raise":
                raise FailpointError(self.point)
            case "sleep":
                time.sleep(self.seconds)
            case _:
                assert_never(self.action)


_armed: dict[str, _Fault] = {}

SPOKEN = re.compile(
    r"(?P<point>[^=\s]+)\s*=\s*(?P<action>[a-z]+)(?:\((?P<seconds>\d+(?:\.\d+)?)\))?"
    r"(?:@(?P<nth>\d+)|%(?P<probability>\d*\.?\d+))?"
)


def _parsed(spoken: str) -> tuple[list[_Fault], int]:
    faults: dict[str, _Fault] = {}
    seed = 0
    for part in filter(None, (part.strip() for part in spoken.split(";"))):
        if number := re.fullmatch(r"seed\s*=\s*(\d+)", part):
            seed = int(number[1])
            continue
        fault = _fault(part)
        if fault.point in faults:
            raise FailpointsError(f"{VARIABLE}: {fault.point} is armed twice; a point has one action.")
        faults[fault.point] = fault
    return list(faults.values()), seed


def _fault(part: str) -> _Fault:
    said = SPOKEN.fullmatch(part)
    if said is None:
        raise FailpointsError(
            f'{VARIABLE}: "{part}" cannot be read; say NAME=ACTION, NAME=ACTION@NTH or NAME=ACTION%PROBABILITY, '
            "several with ; between them."
        )
    point, action, seconds, nth, probability = said.groups()
    if point not in POINTS:
        raise FailpointsError(f'{VARIABLE}: there is no failpoint "{point}"{_perhaps(point, POINTS)}')
    if action not in ACTIONS:
        raise FailpointsError(f'{VARIABLE}: {point} cannot do "{action}"{_perhaps(action, ACTIONS)}')
    if (action == "sleep") != (seconds is not None):
        right = "sleep(0.5), with its seconds" if action == "sleep" else f"{action}, without seconds"
        raise FailpointsError(f'{VARIABLE}: "{part}" cannot be read; say {right}.')
    if nth == "0" or (probability is not None and not 0 < float(probability) <= 1):
        raise FailpointsError(
            f'{VARIABLE}: "{part}" never happens; count from @1, and say a probability in 0 < % <= 1.'
        )
    return _Fault(
        spoken=part,
        point=point,
        action=cast("Action", action),
        seconds=float(seconds or 0),
        nth=None if nth is None else int(nth),
        probability=None if probability is None else float(probability),
    )


def _perhaps(wrong: str, known: tuple[str, ...]) -> str:
    if close := get_close_matches(wrong, known, n=1, cutoff=0.5):
        return f'; did you mean "{close[0]}"?'
    return f"; there are {', '.join(known)}"
